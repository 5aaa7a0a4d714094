"""Whom this peer can come back through: bootstrap nodes for ever, other peers while they answer. No I/O, no clock."""

from __future__ import annotations

import random
from collections.abc import Sequence

from decentra.errors import ConfigError
from decentra.gossip.address import dialable, parse_multiaddr
from decentra.ids import PeerId

MAX_KNOWN = 256
MAX_FAILURES = 3  # a known peer that fails this often in a row is forgotten


class Contacts:
    """Bootstrap nodes and known peers with their addresses (without peer id)."""

    def __init__(self, own: PeerId, initial_peers: Sequence[str], known_peers: Sequence[str] = ()) -> None:
        """Raises ConfigError for an initial peer that is no TCP address with a peer id; bad known peers are left out."""
        self._own = own
        self._initial: dict[PeerId, tuple[str, ...]] = {}
        self._known: dict[PeerId, tuple[str, ...]] = {}  # oldest first
        self._num_failures: dict[PeerId, int] = {}
        for text in initial_peers:
            address = parse_multiaddr(text)
            if address.peer is None or address.port == 0:
                raise ConfigError(f"bootstrap address {text}: expected a port and /p2p/PEER; copy the line the bootstrap node prints")
            if address.peer != own:
                self._initial[address.peer] = (*self._initial.get(address.peer, ()), address.dial)
        for text in known_peers:
            try:
                address = parse_multiaddr(text)
            except ConfigError:
                continue
            if address.peer is not None:
                self.remember(address.peer, (text,))

    @property
    def bootstraps(self) -> tuple[str, ...]:
        return tuple(f"{dial}/p2p/{peer}" for peer, dials in self._initial.items() for dial in dials)

    def is_empty(self) -> bool:
        return not self._initial and not self._known

    def known(self) -> tuple[str, ...]:
        return tuple(f"{dial}/p2p/{peer}" for peer, dials in self._known.items() for dial in dials)

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        dials = dialable(peer, addresses)
        if peer == self._own or not dials:
            return
        before = self._known.pop(peer, ())
        self._known[peer] = tuple(dict.fromkeys((*dials, *before)))[:4]
        while len(self._known) > MAX_KNOWN:
            self._num_failures.pop(next(iter(self._known)), None)
            del self._known[next(iter(self._known))]

    def answered(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self._num_failures.pop(peer, None)
        self.remember(peer, addresses)

    def failed(self, peer: PeerId) -> None:
        if peer in self._known:
            self._num_failures[peer] = self._num_failures.get(peer, 0) + 1
            if self._num_failures[peer] >= MAX_FAILURES:
                del self._known[peer], self._num_failures[peer]

    def to_greet(self, num_known: int) -> list[tuple[PeerId, tuple[str, ...]]]:
        """All bootstrap nodes and up to ``num_known`` other known peers, drawn at random."""
        others = [peer for peer in self._known if peer not in self._initial]
        drawn = random.sample(others, min(num_known, len(others)))
        return [*self._initial.items(), *((peer, self._known[peer]) for peer in drawn)]
