"""Calling a machine back: can others open a connection to it? The service connects to the caller's own address only, and says yes or no.

It is no tool to look at ports with: the address is the one that the call came from, "yes" needs the caller's own nonce from behind it, and every "no"
is the same word after the same time, whatever was there. (Behind a forwarder all callers have the forwarder's address; the answer is about that one.)
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

from decentra.errors import Refused, RejectedPayload
from decentra.pb import averaging_pb2 as pb

NONCE_BYTES = 16
CALL_BACK_S = 3.0
MIN_PORT = 1024
MIN_GAP_S = 1.0  # between two calls back to one address
MAX_AT_ONCE, MAX_REMEMBERED = 8, 1024
_GRPC_PEER = re.compile(r"ipv([46]):(.+):(\d{1,5})")


def address_of(grpc_peer: str) -> str:
    """The IP address in what gRPC calls a peer, such as ``ipv4:192.0.2.1:41234``. Raises RejectedPayload."""
    found = _GRPC_PEER.fullmatch(unquote(grpc_peer))
    if found is None:
        raise RejectedPayload("malformed", f"expected a caller with an IP address, got {grpc_peer[:60]!r}")
    address = ipaddress.ip_address(found.group(2).strip("[]").partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


@dataclass
class Prober:
    """Answers ProbeRequests. ``clock``: any seconds that only grow."""

    clock: Callable[[], float] = time.monotonic
    _gate: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))
    _asked_at: OrderedDict[str, float] = field(init=False, default_factory=OrderedDict)

    async def answer(self, request: pb.ProbeRequest, grpc_peer: str) -> pb.ProbeReply:
        """Port 0: no call back. Raises RejectedPayload, and Refused for who asks too often."""
        address = address_of(grpc_peer)
        if request.port == 0:
            return pb.ProbeReply(address=address)
        if not MIN_PORT <= request.port <= 65535 or len(request.nonce) != NONCE_BYTES:
            raise RejectedPayload(
                "malformed",
                f"expected a port from {MIN_PORT} on and {NONCE_BYTES} bytes of nonce, got {request.port}, {len(request.nonce)} bytes",
            )
        self._count(address)
        async with self._gate:
            began = self.clock()
            if await _is_there(address, request.port, request.nonce):
                return pb.ProbeReply(address=address, is_reachable=True)
            await asyncio.sleep(max(0.0, began + CALL_BACK_S - self.clock()))
        return pb.ProbeReply(
            address=address, why=f"no connection to {address} port {request.port} that shows the nonce, within {CALL_BACK_S:g} s"
        )

    def _count(self, address: str) -> None:
        now = self.clock()
        if now - self._asked_at.get(address, -MIN_GAP_S) < MIN_GAP_S:
            raise Refused(f"{address} asked to be called back a moment ago; wait a second")
        self._asked_at[address] = now
        self._asked_at.move_to_end(address)
        if len(self._asked_at) > MAX_REMEMBERED:
            self._asked_at.popitem(last=False)


async def _is_there(address: str, port: int, nonce: bytes) -> bool:
    """Whether a machine can be reached there and shows its nonce."""
    with suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(CALL_BACK_S):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                return await reader.readexactly(NONCE_BYTES) == nonce
            finally:
                writer.transport.abort()
    return False
