"""The invite: one line of text that lets a peer find a run and be let in. No network, no signatures: the token inside is opaque here.

Layout of the text: ``decentra1_`` + base64url(payload + checksum). Payload, all integers big-endian:
run id (32 bytes), run public key (32), then three lists (bootstrap, services, token), each a count byte and per item a length byte and the
item. The checksum is the first 6 bytes of sha256 over prefix and payload.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from decentra.errors import ConfigError, InviteError
from decentra.ids import RunId, is_digest

PREFIX = "decentra1_"
MAX_INVITE_CHARS = 4096
MAX_BOOTSTRAP, MAX_SERVICES = 8, 4
_CHECKSUM_BYTES = 6
_ALPHABET = re.compile(r"[A-Za-z0-9_-]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")


@dataclass(frozen=True)
class Invite:
    """What a peer needs to join: which run, whose key it trusts, whom to ask. ``token`` is secret; it is empty where admission is open."""

    run_id: RunId
    run_public: bytes
    bootstrap: tuple[str, ...] = ()  # libp2p multiaddrs
    services: tuple[str, ...] = ()  # host:port of the averaging service
    token: bytes = field(default=b"", repr=False)

    def encode(self) -> str:
        """The invite line. Raises InviteError when a part cannot be written."""
        if not is_digest(self.run_id) or len(self.run_public) != 32:
            raise InviteError("an invite needs a run id of 64 hex characters and a run key of 32 bytes")
        tokens = (self.token,) if self.token else ()
        payload = bytes.fromhex(self.run_id) + self.run_public
        payload += _pack([_ascii(one) for one in self.bootstrap], MAX_BOOTSTRAP, "bootstrap addresses")
        payload += _pack([_ascii(_checked_address(one)) for one in self.services], MAX_SERVICES, "service addresses")
        payload += _pack(tokens, 1, "tokens")
        return PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).rstrip(b"=").decode()


def parse_invite(text: str) -> Invite:
    """Read an invite line; white space around and inside it (a wrapped line) does not matter. Raises InviteError."""
    line = "".join(text.split())
    if len(line) > MAX_INVITE_CHARS:
        raise InviteError(f"an invite has at most {MAX_INVITE_CHARS} characters, got {len(line)}; paste the invite line alone")
    _check_prefix(line)
    raw = _decode(line.removeprefix(PREFIX))
    payload, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if len(raw) <= _CHECKSUM_BYTES or _checksum(payload) != checksum:
        raise InviteError("the invite is truncated or mistyped (its checksum does not fit); copy the whole line again")
    return _unpack(payload)


def split_address(text: str) -> tuple[str, int]:
    """``host:port`` (IPv6 in brackets) as its two parts, brackets removed. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 <= int(port) <= 65535:
        raise ConfigError(f"expected an address like averager.example.org:7411 or [2001:db8::1]:7411, got {text[:100]!r}")
    return host.strip("[]"), int(port)


def _check_prefix(line: str) -> None:
    if line.startswith(PREFIX):
        return
    if found := re.match(r"decentra([0-9]{1,4})_", line):
        raise InviteError(f"the invite has format {found.group(1)}, this version reads format 1; update decentra (pip install -U decentra)")
    raise InviteError(f"an invite starts with {PREFIX!r}, got {line[:12]!r}; paste the whole line the organiser sent")


def _decode(body: str) -> bytes:
    if not _ALPHABET.fullmatch(body):
        strange = next((char for char in body if not _ALPHABET.fullmatch(char)), "")
        raise InviteError(f"the invite holds {strange!r}, which is no character of an invite; copy the whole line again")
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (binascii.Error, ValueError):
        raise InviteError("the invite is truncated or mistyped (its length is impossible); copy the whole line again") from None
    # The last character may carry unused bits: only one of its spellings is right, or a slip there would go unseen.
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != body:
        raise InviteError("the invite is truncated or mistyped (its last character does not fit); copy the whole line again")
    return raw


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + payload).digest()[:_CHECKSUM_BYTES]


def _checked_address(text: str) -> str:
    try:
        split_address(text)
    except ConfigError as error:
        raise InviteError(f"service address: {error}") from None
    return text


def _ascii(text: str) -> bytes:
    if not text.isascii() or not text.isprintable():
        raise InviteError(f"an address in an invite is plain ASCII, got {text[:60]!r}")
    return text.encode()


def _pack(items: Sequence[bytes], most: int, what: str) -> bytes:
    if len(items) > most:
        raise InviteError(f"an invite has at most {most} {what}, got {len(items)}")
    packed = bytes([len(items)])
    for item in items:
        if not 1 <= len(item) <= 255:
            raise InviteError(f"each of the invite's {what} has 1 to 255 bytes, got {len(item)}")
        packed += bytes([len(item)]) + item
    return packed


def _unpack(payload: bytes) -> Invite:
    # The checksum held, so what is wrong from here on was written wrongly, not copied wrongly.
    try:
        run_id, run_public = RunId(payload[:32].hex()), payload[32:64]
        bootstrap, at = _unpack_list(payload, 64, MAX_BOOTSTRAP)
        services, at = _unpack_list(payload, at, MAX_SERVICES)
        tokens, at = _unpack_list(payload, at, 1)
        if at != len(payload):
            raise ValueError(f"{len(payload) - at} bytes are left over")
        addresses = tuple(_checked_address(_text(one)) for one in services)
        return Invite(run_id, run_public, tuple(_text(one) for one in bootstrap), addresses, tokens[0] if tokens else b"")
    except (IndexError, ValueError) as error:
        raise InviteError(f"the invite was written wrongly ({error}); ask the organiser for a new one") from None


def _unpack_list(payload: bytes, at: int, most: int) -> tuple[list[bytes], int]:
    num_items, at = payload[at], at + 1
    if num_items > most:
        raise ValueError(f"a list of {num_items} items, at most {most} are allowed")
    items = []
    for _ in range(num_items):
        size, at = payload[at], at + 1
        item, at = payload[at : at + size], at + size
        if size == 0 or at > len(payload):
            raise ValueError("an item is empty or cut off")
        items.append(item)
    return items, at


def _text(raw: bytes) -> str:
    text = raw.decode("ascii")
    if not text.isprintable():
        raise ValueError("an address has unprintable characters")
    return text
