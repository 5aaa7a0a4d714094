"""Whom to ask for a blob, by what the service says of the members."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from decentra.ids import PeerId
from decentra.protocol.messages import Role, SwarmView

KNOWN_FILE = "known-peers.json"  # of a process: addresses that answered last time, a list in JSON


def directory_of(swarm: SwarmView) -> Callable[[PeerId], tuple[str, ...]]:
    """Addresses of a member."""
    addresses = {m.peer: m.addresses for m in swarm.members}
    return lambda peer: addresses.get(peer, ())


def by_reachability(peers: Iterable[PeerId], swarm: SwarmView) -> tuple[PeerId, ...]:
    """Keepers first, then trainers that can be dialled."""
    rank = {m.peer: (m.role is not Role.KEEPER, not m.addresses) for m in swarm.members}
    return tuple(sorted(peers, key=lambda p: rank.get(p, (True, True))))
