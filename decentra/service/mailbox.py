"""A member's outbox inside the averaging service: only the newest view of each thing waits. Used in the event loop only. No network.

Memory is bounded by construction: one view per fragment, one of the swarm, and the last ``MAX_REJECTED`` refusals. A member that reads
slowly misses intermediate views, never the newest one.
"""

from __future__ import annotations

import asyncio
from collections import deque

from decentra.ids import FragmentId
from decentra.protocol.messages import FragmentView, Rejected, ServiceMessage, SwarmView

MAX_REJECTED = 64


class Mailbox:
    """What the service still has to say to one stream. ``nonce`` is the process behind the stream; the driver sets it."""

    def __init__(self) -> None:
        self.nonce = ""
        self._views: dict[FragmentId, FragmentView] = {}
        self._swarm: SwarmView | None = None
        self._rejected: deque[Rejected] = deque(maxlen=MAX_REJECTED)
        self._wake = asyncio.Event()
        self._is_closed = False
        self._reason: str | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def reason(self) -> str | None:
        """Why the service ended the stream; None while it is open, or when it ended in peace."""
        return self._reason

    def put(self, message: ServiceMessage) -> None:
        """Take a message; a view older than the one that waits is dropped, so is everything after ``close``."""
        if self._is_closed:
            return
        match message:
            case FragmentView():
                waiting = self._views.get(message.fragment)
                if waiting is None or (message.round, message.version) >= (waiting.round, waiting.version):
                    self._views[message.fragment] = message
            case SwarmView():
                if self._swarm is None or message.version >= self._swarm.version:
                    self._swarm = message
            case Rejected():
                self._rejected.append(message)
        self._wake.set()

    async def get(self) -> list[ServiceMessage]:
        """Wait until something is there and take all of it: refusals, fragments, the swarm. Empty: closed, and nothing is left.

        The swarm comes last, so that a member hears of the last confirmed anchors before it hears that the run is over.
        """
        await self._wake.wait()
        messages: list[ServiceMessage] = [*self._rejected, *self._views.values()]
        if self._swarm is not None:
            messages.append(self._swarm)
        self._rejected.clear()
        self._views, self._swarm = {}, None
        if not self._is_closed:
            self._wake.clear()
        return messages

    def close(self, reason: str | None) -> None:
        """End the stream once what waits is taken; ``reason`` is told to the member. The first reason stands."""
        if not self._is_closed:
            self._is_closed, self._reason = True, reason
        self._wake.set()
