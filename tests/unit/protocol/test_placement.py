"""Placement: within capacity and range, least-held experts first, equal everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.errors import ConfigError
from decentra.ids import PeerId
from decentra.protocol.placement import adopted, check_experts, coverage, place

names = st.text("abcdef", min_size=1, max_size=4).map(PeerId)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, dict[PeerId, tuple[int, ...]]]:
    num_experts = draw(st.integers(1, 12))
    experts = st.sets(st.integers(0, num_experts - 1), max_size=num_experts).map(lambda s: tuple(sorted(s)))
    return num_experts, draw(st.dictionaries(names, experts, max_size=8))


@given(swarms(), names, st.integers(0, 15))
def test_capacity_range_and_least_held_first(swarm: tuple[int, dict[PeerId, tuple[int, ...]]], peer: PeerId, count: int) -> None:
    num_experts, present = swarm
    chosen = place(peer, count, num_experts, present)
    assert len(chosen) == min(count, num_experts) == len(set(chosen))
    assert check_experts(chosen, num_experts) == chosen
    others = {p: e for p, e in present.items() if p != peer}
    held = coverage(num_experts, others)
    left = [held[e] for e in range(num_experts) if e not in chosen]
    assert not chosen or not left or max(held[e] for e in chosen) <= min(left)


@given(swarms(), names, st.integers(0, 6))
def test_it_depends_on_who_is_here_and_not_on_the_order(swarm: tuple[int, dict[PeerId, tuple[int, ...]]], peer: PeerId, count: int) -> None:
    num_experts, present = swarm
    backwards = dict(reversed(list(present.items())))
    assert place(peer, count, num_experts, present) == place(peer, count, num_experts, backwards)


@given(st.integers(1, 10), st.integers(1, 4), st.integers(1, 10))
def test_joining_one_by_one_spreads_evenly(num_experts: int, each: int, num_peers: int) -> None:
    present: dict[PeerId, tuple[int, ...]] = {}
    for index in range(num_peers):
        peer = PeerId(f"peer-{index}")
        present[peer] = place(peer, each, num_experts, present)
    held = coverage(num_experts, present)
    assert max(held) - min(held) <= 1


def test_partners_differ() -> None:
    """Two pairs of peers that share both their experts would lose two experts at once."""
    present = {PeerId("a"): (0, 1), PeerId("b"): (2, 3)}
    third = place(PeerId("c"), 2, 4, present)
    assert third not in ((0, 1), (2, 3))


def test_unknown_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="experts 0 to 3"):
        check_experts((4,), 4)
    with pytest.raises(ConfigError):
        check_experts((-1,), 4)
    assert check_experts((3, 1, 3), 4) == (1, 3)


@given(swarms(), st.sets(st.integers(0, 11)), st.dictionaries(names, st.integers(0, 12)))
def test_adopting_never_overfills_and_leaves_only_what_nobody_can_take(
    swarm: tuple[int, dict[PeerId, tuple[int, ...]]], orphans: set[int], most: dict[PeerId, int]
) -> None:
    _, present = swarm
    free = {e for e in orphans if all(e not in held for held in present.values())}
    after = {**present, **adopted(sorted(free), present, most)}
    assert all(set(present[p]) <= set(after[p]) for p in present)
    assert all(len(after[p]) <= max(len(present[p]), most.get(p, 99)) for p in present)
    left = free - {e for held in after.values() for e in held}
    assert not left or all(len(after[p]) >= most.get(p, 99) for p in present)
