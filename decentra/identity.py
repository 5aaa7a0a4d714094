"""Ed25519 keys: a peer's identity (its libp2p peer id IS its public key), the run key and the service key; signing with a stated purpose."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from decentra.errors import ConfigError, IntegrityError
from decentra.ids import PeerId

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# libp2p: a peer id is the identity multihash (0x00, length 36) of the protobuf PublicKey{type: Ed25519, data: 32 bytes}
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
# libp2p: an identity file is the protobuf PrivateKey{type: Ed25519, data: 32 bytes seed + 32 bytes public key}
_KEY_FILE_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])


@dataclass(frozen=True)
class Keypair:
    """One Ed25519 key pair."""

    seed: bytes
    public: bytes

    @staticmethod
    def generate() -> Keypair:
        return Keypair.from_seed(os.urandom(32))

    @staticmethod
    def from_seed(seed: bytes) -> Keypair:
        if len(seed) != 32:
            raise ConfigError(f"an Ed25519 seed has 32 bytes, got {len(seed)}")
        public = Ed25519PrivateKey.from_private_bytes(seed).public_key()
        return Keypair(seed, public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))

    @property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public)

    def sign(self, purpose: str, body: bytes) -> bytes:
        """64-byte signature over ``purpose`` and ``body``; the purpose keeps a signature from being used elsewhere."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(_framed(purpose, body))

    def __repr__(self) -> str:
        return f"Keypair({self.peer_id})"


def _framed(purpose: str, body: bytes) -> bytes:
    head = purpose.encode()
    return b"decentra.v1\0" + len(head).to_bytes(2, "big") + head + body


def is_signed(public: bytes, purpose: str, body: bytes, signature: bytes) -> bool:
    """True when ``signature`` is ``public``'s over this purpose and body."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _framed(purpose, body))
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id_of(public: bytes) -> PeerId:
    return PeerId(_to_base58(_PEER_ID_PREFIX + public))


def public_key_of(peer: PeerId) -> bytes:
    """The 32-byte public key inside a peer id. Raises IntegrityError for any other kind of id."""
    raw = _from_base58(peer)
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise IntegrityError(f"expected an Ed25519 peer id (12D3KooW...), got {peer[:60]!r}")
    return raw[len(_PEER_ID_PREFIX) :]


def load_key(path: Path) -> Keypair:
    """Read a key file in libp2p's identity format. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from None
    if len(raw) != 68 or not raw.startswith(_KEY_FILE_PREFIX):
        raise ConfigError(f"key file {path}: expected a 68-byte libp2p Ed25519 identity, got {len(raw)} bytes; restore it from your backup")
    pair = Keypair.from_seed(raw[4:36])
    if pair.public != raw[36:]:
        raise ConfigError(f"key file {path}: its two halves do not belong together; restore it from your backup")
    return pair


def save_key(path: Path, pair: Keypair) -> None:
    """Write a key file, readable by its owner only; never overwrites."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"key file {path} exists already; a key is never overwritten") from None
    with os.fdopen(fd, "wb") as file:
        file.write(_KEY_FILE_PREFIX + pair.seed + pair.public)
        file.flush()
        os.fsync(file.fileno())


def load_or_create_key(path: Path) -> Keypair:
    if not path.exists():
        save_key(path, Keypair.generate())
    return load_key(path)


def _to_base58(raw: bytes) -> str:
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def _from_base58(text: str) -> bytes:
    number = 0
    if len(text) > 128:
        raise IntegrityError(f"expected a base58 peer id of at most 128 characters, got {len(text)}")
    for char in text:
        digit = _BASE58.find(char)
        if digit < 0:
            raise IntegrityError(f"expected a base58 peer id, got {text[:60]!r}")
        number = number * 58 + digit
    body = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return b"\0" * (len(text) - len(text.lstrip("1"))) + body
