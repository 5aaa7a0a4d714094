"""Which peer trains which experts: rendezvous hashing under capacity, sticky, least-held experts first. No I/O, no clock, no randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from decentra.config import PlacementSpec
from decentra.errors import ConfigError
from decentra.ids import PeerId

Placement = Mapping[PeerId, tuple[int, ...]]


def rendezvous(*parts: str) -> int:
    """Highest-random-weight score of a pairing (Thaler and Ravishankar 1998): equal everywhere, uniform, no state."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def check_experts(experts: Sequence[int], num_experts: int, frozen: Collection[int] = ()) -> tuple[int, ...]:
    """Sorted, distinct, in range and not frozen, or ConfigError."""
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise ConfigError(f"expert {expert} is out of range: this run has experts 0 to {num_experts - 1}")
        if expert in frozen:
            raise ConfigError(f"expert {expert} is frozen in this run (placement.frozen_experts): nobody trains it; choose another")
    return tuple(sorted(set(experts)))


def place(peer: PeerId, count: int, num_experts: int, present: Placement, frozen: Collection[int] = ()) -> tuple[int, ...]:
    """``count`` experts for a newcomer, given what present peers hold; none of the ``frozen`` ones.

    The least-held experts come first; among equals, those whose other holders share least with this choice so far (so that no two peers mirror
    each other and every pair of experts has independent holders); then by rendezvous score.
    """
    holders: dict[int, list[PeerId]] = {e: [] for e in range(num_experts) if e not in frozen}
    for other, experts in present.items():
        for expert in experts:
            if other != peer and expert in holders:
                holders[expert].append(other)
    chosen: list[int] = []
    while len(chosen) < min(count, len(holders)):
        partners = [p for e in chosen for p in holders[e]]
        free = [e for e in holders if e not in chosen]
        chosen.append(min(free, key=lambda e: (len(holders[e]), sum(partners.count(p) for p in holders[e]), rendezvous(peer, str(e)))))
    return tuple(sorted(chosen))


def part_of(experts: Sequence[int], count: int, present: Placement) -> tuple[int, ...]:
    """The ``count`` of a peer's experts that others hold least: what it keeps when it has room for no more."""
    held = {e: sum(e in others for others in present.values()) for e in experts}
    return tuple(sorted(sorted(experts, key=lambda e: (held[e], e))[:count]))


class Since(NamedTuple):
    """When an expert lost its last holder."""

    at_s: float
    num_rounds: int | None  # confirmed rounds of the trunk then; None: nobody ever held it, so a newcomer may be on the way


def is_late(rules: PlacementSpec, since: Since, now: Since) -> bool:
    """Whether an expert without a holder is given away ``now``."""
    if now.at_s >= since.at_s + rules.adopt_s:
        return True
    if rules.adopt_rounds is None or since.num_rounds is None or now.num_rounds is None:
        return False
    return now.num_rounds >= since.num_rounds + rules.adopt_rounds


def adopted(orphans: Sequence[int], present: Placement, most: Mapping[PeerId, int] | None = None) -> dict[PeerId, tuple[int, ...]]:
    """Who trains which experts once every orphan has one holder more: it goes to whoever trains fewest, among equals by rendezvous score.

    ``most``: how many experts fit into a peer, where that is known. Only the peers that change; an orphan for which nobody has room stays one.
    """
    changed: dict[PeerId, tuple[int, ...]] = {}
    for expert in sorted(orphans):
        now = {**present, **changed}
        willing = [p for p, experts in now.items() if most is None or len(experts) < most.get(p, len(experts) + 1)]
        if willing:
            peer = min(willing, key=lambda p: (len(now[p]), rendezvous(p, str(expert))))
            changed[peer] = tuple(sorted({*now[peer], expert}))
    return changed


def coverage(num_experts: int, present: Placement) -> tuple[int, ...]:
    """Number of present holders of each expert."""
    return tuple(sum(e in experts for experts in present.values()) for e in range(num_experts))
