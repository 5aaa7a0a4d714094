"""Streams to other peers for one protocol: connect where needed, keep what may serve again, leave alone who did not answer. Sends nothing itself.

Opening a stream costs two daemons and a handshake; a round has a packet of every fragment from every peer, so a stream is used again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from decentra.errors import Unreachable
from decentra.gossip.node import GossipNode
from decentra.ids import PeerId


@dataclass(frozen=True, slots=True)
class DialTimes:
    """Seconds."""

    connect_s: float
    reached_s: float  # who answered is asked for a stream without connecting anew for this long
    unreachable_s: float  # who did not answer is not dialled again for this long
    keep_s: float  # a stream that is not used is kept this long


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    was_kept: bool = False  # it has served before: the other end may have closed it meanwhile

    def abort(self) -> None:
        self.writer.transport.abort()


class Dialer:
    """Opens streams of ``protocol``; at most ``num_kept`` to each peer wait for their next use."""

    def __init__(self, node: GossipNode, protocol: str, times: DialTimes, *, num_kept: int) -> None:
        self._node, self._protocol, self._times, self._num_kept = node, protocol, times, num_kept
        self._kept: dict[PeerId, list[tuple[float, Stream]]] = {}
        self._unreachable_until: dict[PeerId, float] = {}
        self._reached_until: dict[PeerId, float] = {}
        self._is_closed = False

    async def open(self, peer: PeerId, addresses: Sequence[str]) -> Stream:
        """A kept stream, else a new one. Raises Unreachable."""
        self._sweep()
        if kept := self._kept.get(peer):
            return kept.pop()[1]
        if self._reached_until.get(peer, 0.0) > time.monotonic():
            try:
                return Stream(*await self._node.open_stream(peer, self._protocol, self._times.connect_s))
            except Unreachable:
                self._reached_until.pop(peer, None)
        await self._reach(peer, addresses)
        stream = Stream(*await self._node.open_stream(peer, self._protocol, self._times.connect_s))
        self._reached_until[peer] = time.monotonic() + self._times.reached_s
        return stream

    def give_back(self, peer: PeerId, stream: Stream) -> None:
        """The stream is in step with the other end and free."""
        self._sweep()
        kept = self._kept.setdefault(peer, [])
        if self._is_closed or len(kept) >= self._num_kept or stream.writer.is_closing() or stream.reader.at_eof():
            stream.abort()
            return
        kept.append((time.monotonic() + self._times.keep_s, Stream(stream.reader, stream.writer, was_kept=True)))

    def close(self) -> None:
        """End the streams that wait, and those in use when they are given back."""
        self._is_closed = True
        for kept in self._kept.values():
            for _, stream in kept:
                stream.abort()
        self._kept.clear()

    def _sweep(self) -> None:
        """Forget what is over."""
        now = time.monotonic()
        for peer in list(self._kept):
            good = []
            for until, stream in self._kept[peer]:
                if until > now and not stream.writer.is_closing() and not stream.reader.at_eof():
                    good.append((until, stream))
                else:
                    stream.abort()
            if good:
                self._kept[peer] = good
            else:
                del self._kept[peer]
        self._unreachable_until = {other: until for other, until in self._unreachable_until.items() if until > now}
        self._reached_until = {other: until for other, until in self._reached_until.items() if until > now}

    async def _reach(self, peer: PeerId, addresses: Sequence[str]) -> None:
        now = time.monotonic()
        if peer in self._unreachable_until and peer not in await self._node.connected():
            left_s = self._unreachable_until.get(peer, now) - now
            raise Unreachable(f"peer {peer} did not answer a moment ago; it is dialled again in {max(left_s, 0):.0f} s")
        try:
            await self._node.connect(peer, addresses, self._times.connect_s)
        except Unreachable:
            self._unreachable_until[peer] = time.monotonic() + self._times.unreachable_s
            raise
        self._unreachable_until.pop(peer, None)
