"""The cut-off follows arrivals, within bounds."""

from __future__ import annotations

from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from decentra.protocol.deadline import MIN_KNOWN, cut_off_s

ages = st.floats(0, 1e4)


@given(st.lists(ages, max_size=MIN_KNOWN - 1), st.floats(0.1, 1e3))
def test_the_default_until_enough_is_known(arrivals: list[float], default: float) -> None:
    assert cut_off_s(arrivals, default) == default


@given(st.lists(ages, min_size=MIN_KNOWN, max_size=20), st.floats(0.1, 1e3))
def test_bounds(arrivals: list[float], default: float) -> None:
    found = cut_off_s(arrivals, default)
    assert found <= 4 * default
    assert found == 4 * default or found >= max(1.5 * median(arrivals), median(arrivals) + 2.0) - 1e-9


@given(st.lists(ages, min_size=MIN_KNOWN, max_size=20), st.floats(0.1, 1e3), st.randoms())
def test_order_does_not_matter(arrivals: list[float], default: float, random: object) -> None:
    shuffled = list(arrivals)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert cut_off_s(arrivals, default) == cut_off_s(shuffled, default)


def test_one_outlier_changes_little() -> None:
    assert cut_off_s([10.0] * 9 + [1000.0], 60.0) == cut_off_s([10.0] * 10, 60.0) == 15.0
