"""The first address of a run's network: a node that only listens, stores DHT records and answers. Trains nothing, averages nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from decentra.errors import ConfigError
from decentra.gossip.address import check_multiaddr
from decentra.gossip.node import GossipNode
from decentra.identity import load_or_create_key
from decentra.ports import Events

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/7410",)

__all__ = ["DEFAULT_LISTEN", "check_multiaddr", "run_bootstrap"]


async def run_bootstrap(
    key_file: Path,
    listen: Sequence[str],
    announce: Sequence[str],
    events: Events,
    *,
    initial_peers: Sequence[str] = (),
) -> GossipNode:
    """Start a bootstrap node; its identity is made at the first start and kept, because every invite names it.

    ``initial_peers`` are other bootstrap nodes of the run. Raises ConfigError, PortTaken, Unreachable.
    """
    if not listen:
        raise ConfigError(f"a bootstrap node has to listen; give an address such as {DEFAULT_LISTEN[0]}")
    load_or_create_key(key_file)
    node = await GossipNode.start(key_file, listen=listen, announce=announce, initial_peers=initial_peers, events=events)
    events.emit("bootstrap-listening", addresses=node.addresses, why=f"bootstrap node {node.peer_id} listens")
    return node
