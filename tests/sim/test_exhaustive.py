"""Every interleaving of small swarms keeps the promises; with a weaker rule the same check finds them broken."""

from __future__ import annotations

import pytest
from exhaustive import CASES, Explorer, weakened
from small_swarm import Case

MIN_STATES = 1000  # fewer would mean that the story does not get going


@pytest.mark.parametrize("name", CASES)
def test_small_swarms_are_sound(name: str) -> None:
    explorer = Explorer(CASES[name])
    result = explorer.explore()
    assert result.num_states > MIN_STATES
    assert result.is_sound, {kind: [explorer.describe(s) for s in states[:2]] for kind, states in result.violations.items() if states}


def test_every_ending_is_reached() -> None:
    """The search sees confirmed, abandoned and void rounds, and roll-backs: a check that never gets there proves nothing."""
    explorer = Explorer(Case(2, deaths=1))
    explorer.explore()
    phases = {o.phase.value for s in explorer.services for o in s.book.recent}
    assert phases == {"confirmed", "abandoned", "void"}
    lone = Explorer(Case(1, 0, 1, deaths=1)).explore()
    assert lone.num_rolled_back > 0
    assert lone.is_sound


def test_without_receipts_a_settled_round_dies_with_its_sender() -> None:
    with weakened("no-receipts"):
        result = Explorer(Case(1, 1, deaths=1)).explore()
    assert result.violations["unconfirmable"]


def test_with_one_attester_a_confirmed_anchor_is_lost() -> None:
    with weakened("one-attester"):
        result = Explorer(Case(1, 1, deaths=1)).explore()
    assert result.violations["lost"]
    assert Explorer(Case(1, 1, deaths=1)).explore().is_sound, "the rule is back in force"
