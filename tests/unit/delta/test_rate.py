from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.delta.rate import LADDER, Limits, allowed, choose
from decentra.errors import ConfigError

BYTES = dict(zip(LADDER, (40e6, 20e6, 10.3e6, 500e3, 300e3, 170e3, 100e3, 60e3), strict=True))


def pick(
    mbit: float | None, *, round_s: float | None = 10.0, last: str | None = None, limits: Limits = Limits(), rungs: tuple[str, ...] = LADDER
) -> str:
    link = None if mbit is None else mbit * 1e6 / 8
    return choose(rungs, BYTES, round_s=round_s, link_bytes_per_s=link, limits=limits, last=last).codec


def test_the_densest_that_fits_wins() -> None:
    assert pick(100) == "fp32"  # 62 MB in half of ten seconds
    assert pick(50) == "bf16"
    assert pick(20) == "int8"
    assert pick(10) == "topk256"
    assert pick(0.5) == "topk128"
    assert pick(0.2) == "topk32"
    assert pick(0.01) == "topk16"  # nothing fits: the sparsest


def test_without_measurements_nothing_changes() -> None:
    assert pick(None) == "fp32"
    assert pick(None, last="topk64") == "topk64"
    assert pick(1000, round_s=None, last="topk32") == "topk32"


def test_denser_one_rung_a_round_sparser_at_once() -> None:
    assert pick(1000, last="topk64") == "topk128"
    assert pick(1000, last="topk256") == "int8"
    assert pick(0.01, last="fp32") == "topk16"


def test_the_owners_limits_count_and_are_named() -> None:
    slow = choose(LADDER, BYTES, round_s=10.0, link_bytes_per_s=1e9, limits=Limits(up_bytes_per_s=5e6 / 8), last=None)
    assert slow.codec == "topk256"
    assert "limit of 5 Mbit/s" in slow.why
    capped = choose(LADDER, BYTES, round_s=10.0, link_bytes_per_s=1e9, limits=Limits(cap_bytes_per_day=1e9), last=None)
    assert capped.codec == "topk32"
    assert "cap of 1 GB a day" in capped.why
    hopeless = choose(LADDER, BYTES, round_s=10.0, link_bytes_per_s=None, limits=Limits(cap_bytes_per_day=1e6), last=None)
    assert hopeless.codec == "topk16"
    assert "more than" in hopeless.why


@given(st.floats(1, 1e9), st.floats(0.1, 1e4), st.sampled_from([None, *LADDER]), st.integers(0, 7), st.integers(0, 7))
def test_a_choice_is_allowed_and_fits_unless_nothing_does(link: float, round_s: float, last: str | None, one: int, other: int) -> None:
    rungs = allowed(LADDER[min(one, other)], LADDER[max(one, other)])
    found = choose(rungs, BYTES, round_s=round_s, link_bytes_per_s=link, limits=Limits(), last=last)
    assert found.codec in rungs
    assert BYTES[found.codec] <= 0.5 * link * round_s or found.codec == rungs[-1]
    assert found.why


def test_a_ladder_of_a_manifest_is_in_order() -> None:
    assert allowed("int8", "topk64") == ("int8", "topk256", "topk128", "topk64")
    with pytest.raises(ConfigError, match="denser"):
        allowed("topk64", "int8")
    with pytest.raises(ConfigError, match="expected one of"):
        allowed("zip", "int8")
