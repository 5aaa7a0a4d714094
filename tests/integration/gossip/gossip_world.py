"""What the gossip tests share: real nodes on 127.0.0.1, recorded events, and conditions with deadlines. Tests nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from decentra.errors import Refused
from decentra.gossip.blobs import BlobStore
from decentra.gossip.exchange import ExchangeLimits, HivemindExchange
from decentra.gossip.node import GossipNode, Timing
from decentra.identity import load_or_create_key
from decentra.ids import Digest, PeerId, RunId

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
QUICK = Timing(ping_s=0.5, connect_s=3.0, few_s=0.5, calm_s=2.0, retry_s=0.2, retry_max_s=1.0)
RUN = RunId("5e" * 32)
TICKET = b"admitted"


class Recorder:
    """ports.Events that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]

    async def seen(self, event: str, timeout_s: float = 20.0) -> dict[str, Any]:
        await eventually(lambda: bool(self.named(event)), timeout_s, f"event {event}; so far {self.events}")
        return self.named(event)[-1]


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> None:
    """Wait until ``condition()`` holds; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)


def admit_ticket(peer: PeerId, credentials: bytes) -> None:
    if credentials != TICKET:
        raise Refused(f"peer {peer} shows no admission to this run; join it first")


class World:
    """Starts nodes and exchanges under one directory; all are closed in reverse order."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.root, self._stack = root, stack

    def key_file(self, name: str) -> Path:
        load_or_create_key(self.root / f"{name}.key")
        return self.root / f"{name}.key"

    async def node(
        self,
        name: str,
        *,
        listen: Sequence[str] = LOOPBACK,
        initial_peers: Sequence[str] = (),
        known_peers: Sequence[str] = (),
        events: Recorder | None = None,
    ) -> GossipNode:
        node = await GossipNode.start(
            self.key_file(name),
            listen=listen,
            initial_peers=initial_peers,
            known_peers=known_peers,
            events=events or Recorder(),
            timing=QUICK,
        )
        self._stack.push_async_callback(node.close)
        return node

    async def exchange(self, node: GossipNode, *, ticket: bytes = TICKET, limits: ExchangeLimits = ExchangeLimits()) -> HivemindExchange:
        store = BlobStore(self.root / f"blobs-{node.peer_id}", 1 << 30)
        exchange = HivemindExchange(node, store, RUN, lambda: ticket, admit_ticket, limits)
        await exchange.start()
        self._stack.push_async_callback(exchange.close)
        return exchange


@asynccontextmanager
async def world(root: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(root, stack)


async def fetch(exchange: HivemindExchange, node: GossipNode, digest: Digest, offset: int = 0) -> bytes:
    """Pull a whole blob from ``node``."""
    return b"".join([chunk async for chunk in exchange.get(node.peer_id, node.addresses, digest, offset)])
