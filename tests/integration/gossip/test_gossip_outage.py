"""A node whose bootstrap node is away for long: it is back soon after the bootstrap node is, whatever p2pd's own pauses have grown to."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

from gossip_world import QUICK, Recorder, world

from decentra.gossip.node import GossipNode
from decentra.identity import load_or_create_key


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_daemon_that_reaches_nobody_is_replaced_and_one_that_reaches_somebody_is_kept(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
            bootstrap = f"{listen}/p2p/{load_or_create_key(here.key_file('bootstrap')).peer_id}"
            events, timing = Recorder(), replace(QUICK, renew_s=1.0)
            node = await GossipNode.start(here.key_file("home"), listen=(), initial_peers=(bootstrap,), events=events, timing=timing)
            try:
                assert not node.is_attached
                first_pid = node.daemon.pid
                await events.seen("p2p-renewed")
                await events.seen("p2p-restarted")
                assert node.daemon.pid != first_pid
                assert not events.named("p2p-died")
                await here.node("bootstrap", listen=(listen,))
                await node.wait_attached(15.0)
                num_renewed, pid = len(events.named("p2p-renewed")), node.daemon.pid
                await asyncio.sleep(3 * timing.renew_s)  # nothing is to happen, so there is no condition to wait for
                assert (len(events.named("p2p-renewed")), node.daemon.pid) == (num_renewed, pid)
            finally:
                await node.close()

    asyncio.run(run())
