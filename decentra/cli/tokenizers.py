"""The run's tokenizer on this machine: a blob that the manifest names, fetched from members like an anchor and kept as a file."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from decentra.averaging.client import AveragingClient
from decentra.cli.members import by_reachability, directory_of
from decentra.config import Manifest
from decentra.data.tokens import BYTES, MAX_TOKENIZER_BYTES, TOKENIZER_FILE, FileTokenizer, Tokenizer
from decentra.errors import Unreachable
from decentra.gossip.exchange import HivemindExchange
from decentra.ids import Digest, digest_of
from decentra.peer.disk import RealDisk, write_atomic
from decentra.peer.fetch import Fetcher
from decentra.ports import Events

RETRY_S = 1.0


async def tokenizer_for(
    manifest: Manifest, root: Path, client: AveragingClient, exchange: HivemindExchange, events: Events, patience_s: float
) -> Tokenizer:
    """The tokenizer that the manifest names, from ``root`` or from members; served on from here. Raises Unreachable, ConfigError, OSError."""
    digest = manifest.data.tokenizer
    if digest is None:
        return BYTES
    disk = RealDisk(root)
    data = disk.read(TOKENIZER_FILE) or b""
    if digest_of(data) != digest:
        data = await fetch_tokenizer(digest, client, exchange, events, time.monotonic() + patience_s)
        write_atomic(disk, TOKENIZER_FILE, data)
    await exchange.put(digest, data)
    exchange.pin(digest)
    return await asyncio.to_thread(FileTokenizer, data, f"the tokenizer of run '{manifest.name}'")


async def fetch_tokenizer(digest: Digest, client: AveragingClient, exchange: HivemindExchange, events: Events, deadline: float) -> bytes:
    """Its file, verified. Keepers have it, and so has every trainer that began. Raises Unreachable after ``deadline``."""
    while True:
        try:
            swarm, _ = await client.status()
            members = by_reachability([m.peer for m in swarm.members if m.is_live], swarm)
            return await Fetcher(exchange, directory_of(swarm), events).fetch(digest, MAX_TOKENIZER_BYTES, members)
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            events.emit("waiting", why=f"{error}; the run's tokenizer is asked for again")
            await asyncio.sleep(RETRY_S)
