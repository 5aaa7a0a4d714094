"""How long a round waits before its quorum suffices. No I/O, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

MIN_KNOWN = 5
SPREAD = 6.0  # multiples of the median absolute deviation; 6 lets through all but gross outliers


def cut_off_s(arrivals_s: Sequence[float], default_s: float) -> float:
    """Cut-off of the next round from the ages at which the last offers of earlier rounds came in.

    The manifest's default until five rounds are known, then median + 6 MAD with half the median as the least margin, and never more than
    four times the default.
    """
    if len(arrivals_s) < MIN_KNOWN:
        return default_s
    middle = median(arrivals_s)
    spread = median(abs(a - middle) for a in arrivals_s)
    return min(4 * default_s, middle + max(SPREAD * spread, 0.5 * middle, 2.0))
