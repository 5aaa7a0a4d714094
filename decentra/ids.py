"""Names of things as distinct types, so that a peer is never passed where a digest is meant."""

from __future__ import annotations

import hashlib
from typing import NewType

RunId = NewType("RunId", str)  # hex sha256 of the genesis manifest
PeerId = NewType("PeerId", str)  # libp2p peer id in base58; it encodes the Ed25519 public key
Digest = NewType("Digest", str)  # hex sha256 of a blob
ModuleId = NewType("ModuleId", str)  # "trunk" | "router" | "expert.3"
FragmentId = NewType("FragmentId", str)  # "<module>/<index>", for example "expert.3/0"

MERGED = PeerId("merged")  # stands as the sender of a packet that two reducers made alike
TRUNK = ModuleId("trunk")
ROUTER = ModuleId("router")


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """Hex sha256 of ``data``."""
    return Digest(hashlib.sha256(data).hexdigest())


def is_digest(text: str) -> bool:
    """True for 64 lower-case hex characters."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def expert_module(expert: int) -> ModuleId:
    return ModuleId(f"expert.{expert}")


def expert_of(module: ModuleId) -> int | None:
    """The expert's index, or None for the trunk and the router."""
    return int(module[7:]) if module.startswith("expert.") else None


def module_of_fragment(fragment: FragmentId) -> ModuleId:
    return ModuleId(fragment.rsplit("/", 1)[0])


def short(name: str, num_chars: int = 8) -> str:
    """The part of a peer id or digest that people read: libp2p ids share their first 8 characters, so the tail is used."""
    return name[-num_chars:] if name.startswith("12D3Koo") else name[:num_chars]
