from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.delta.rate import LADDER, MAX_PATIENCE, Limits, Pace, allowed, held_back
from decentra.errors import ConfigError

BYTES = dict(zip(LADDER, (40e6, 20e6, 10.3e6, 5.3e6, 500e3, 300e3, 170e3, 100e3, 60e3), strict=True))
NUM = len(LADDER)


def walk(pace: Pace, lateness: list[float]) -> Pace:
    for late in lateness:
        pace = pace.after(late, 0.5, NUM)
    return pace


def test_late_packets_make_it_sparser_and_calm_ones_denser() -> None:
    assert walk(Pace(2), [0.6]).rung == 3
    assert walk(Pace(2), [math.inf] * 10).rung == NUM - 1
    assert walk(Pace(5), [0.1]).rung == 4
    assert walk(Pace(5), [0.3] * 3).rung == 5, "in time, but not calm"
    assert walk(Pace(5), [0.3] * 4).rung == 4
    assert walk(Pace(0), [0.01] * 5).rung == 0


def test_a_try_that_fails_makes_the_next_one_wait_twice_as_long() -> None:
    pace = Pace(4)
    for patience in (1, 2, 4, 8):
        assert pace.patience == patience
        pace = walk(pace, [0.01] * (patience - 1))
        assert pace.rung == 4
        pace = walk(pace, [0.01])
        assert pace.rung == 3
        pace = walk(pace, [2.0])
        assert pace.rung == 4
    assert walk(Pace(4, patience=MAX_PATIENCE, was_try=True), [2.0]).patience == MAX_PATIENCE


def test_a_link_that_carries_one_rung_is_used_with_that_rung_almost_always() -> None:
    """Rungs denser than 5 are late. In 300 rounds few tries fail."""
    pace, late = Pace(0), 0
    for _ in range(300):
        is_late = pace.rung < 5
        late += is_late
        pace = pace.after(0.9 if is_late else 0.05, 0.5, NUM)
    assert late <= 5 + 7 + 300 // MAX_PATIENCE  # down, then tries after 1, 2, 4, ... 64, 64, ... calm rounds
    assert pace.rung >= 5 - 1


@given(st.lists(st.floats(0, 10) | st.just(math.inf), max_size=60), st.integers(0, NUM - 1))
def test_it_stays_on_the_ladder_and_says_why(lateness: list[float], rung: int) -> None:
    pace = walk(Pace(rung), lateness)
    assert 0 <= pace.rung < NUM
    assert 1 <= pace.patience <= MAX_PATIENCE
    assert pace.why


def test_the_owners_limits_hold_from_the_first_packet() -> None:
    slow = Limits(up_bytes_per_s=5e6 / 8)
    assert held_back(0, LADDER, BYTES, None, slow)[0] == NUM - 1
    rung, why = held_back(0, LADDER, BYTES, 10.0, slow)
    assert (LADDER[rung], "limit of 5 Mbit/s" in why) == ("int4", True)
    rung, why = held_back(0, LADDER, BYTES, 10.0, Limits(cap_bytes_per_day=1e9))
    assert (LADDER[rung], "cap of 1 GB a day" in why) == ("topk32", True)
    rung, why = held_back(0, LADDER, BYTES, 10.0, Limits(cap_bytes_per_day=1e6))
    assert (LADDER[rung], "more than" in why) == ("topk16", True)
    assert held_back(6, LADDER, BYTES, 10.0, slow) == (6, ""), "a limit makes nothing denser"
    assert held_back(0, LADDER, BYTES, None, Limits()) == (0, "")


def test_a_ladder_of_a_manifest_is_in_order() -> None:
    assert allowed("int8", "topk64") == ("int8", "int4", "topk256", "topk128", "topk64")
    with pytest.raises(ConfigError, match="denser"):
        allowed("topk64", "int8")
    with pytest.raises(ConfigError, match="expected one of"):
        allowed("zip", "int8")
