"""The bytes of one blob stream: request, reply, limits. No I/O beyond the reader it is given, no decisions.

request:  version u8 | digest 32 bytes | offset u64 | length u16 | credentials
reply:    status u8 | total bytes of the blob u64 | length u16 | reason (UTF-8); with OK, total - offset bytes follow
All numbers are big-endian.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from enum import IntEnum

from decentra.errors import RejectedPayload
from decentra.ids import Digest, is_digest

VERSION = 1
MAX_CREDENTIALS_BYTES = 4 << 10
MAX_REASON_BYTES = 1 << 10

_REQUEST = struct.Struct(">B32sQH")
_REPLY = struct.Struct(">BQH")


class Status(IntEnum):
    OK = 0
    MISSING = 1  # this peer does not have the blob
    REFUSED = 2  # bad credentials
    BUSY = 3  # too many transfers; ask again or ask another
    MALFORMED = 4
    OFFSET = 5  # past the end
    FAILED = 6  # this peer's disk


@dataclass(frozen=True, slots=True)
class Request:
    digest: Digest
    offset: int
    credentials: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    status: Status
    total_bytes: int = 0
    reason: str = ""


def pack_request(request: Request) -> bytes:
    """Raises RejectedPayload for what the other side would refuse."""
    if not is_digest(request.digest) or not 0 <= request.offset < 1 << 63:
        raise RejectedPayload("malformed", f"expected a digest and an offset, got {request.digest[:80]!r} and {request.offset}")
    if len(request.credentials) > MAX_CREDENTIALS_BYTES:
        raise RejectedPayload("size", f"credentials have at most {MAX_CREDENTIALS_BYTES} bytes, got {len(request.credentials)}")
    head = _REQUEST.pack(VERSION, bytes.fromhex(request.digest), request.offset, len(request.credentials))
    return head + request.credentials


async def read_request(reader: asyncio.StreamReader) -> Request:
    """Raises RejectedPayload (another version, too large), IncompleteReadError."""
    version, digest, offset, num_bytes = _REQUEST.unpack(await reader.readexactly(_REQUEST.size))
    if version != VERSION:
        raise RejectedPayload("malformed", f"expected blob request version {VERSION}, got {version}; update the older of the two peers")
    if num_bytes > MAX_CREDENTIALS_BYTES:
        raise RejectedPayload("size", f"credentials have at most {MAX_CREDENTIALS_BYTES} bytes, got {num_bytes}")
    return Request(Digest(digest.hex()), offset, await reader.readexactly(num_bytes))


def pack_reply(reply: Reply) -> bytes:
    reason = reply.reason.encode()[:MAX_REASON_BYTES]
    return _REPLY.pack(reply.status, reply.total_bytes, len(reason)) + reason


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Raises RejectedPayload (unknown status, reason too long), IncompleteReadError."""
    status, total_bytes, num_bytes = _REPLY.unpack(await reader.readexactly(_REPLY.size))
    if status not in Status.__members__.values() or num_bytes > MAX_REASON_BYTES:
        raise RejectedPayload("malformed", f"expected a blob reply, got status {status} with a reason of {num_bytes} bytes")
    reason = (await reader.readexactly(num_bytes)).decode(errors="replace")
    return Reply(Status(status), total_bytes, reason if reason.isprintable() else ascii(reason))
