"""The L2 norm of a delta with the same bits on every machine: its sum is of integers, which no order and no thread count changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# n values of one array

_BITS = 24  # as many as a float32 has: the largest value is exact
_BLOCK = 1 << 15  # squares of 2 * 24 bits: so many of them stay below 2**63


def norm_of(arrays: Sequence[npt.NDArray[np.float32]]) -> float:
    """L2 norm over all fp32 arrays [n]; how values lie in them, and zeros left out, change no bit. Infinite or NaN when a value is.

    A float sum depends on its order, and processors choose it by their vector width. So values are rounded to whole multiples of
    2**-24 of the power of two above the largest one (elementwise, in fp64, where the product is exact), and the squares are summed as int64. Only
    the square root rounds again, as IEEE 754 prescribes. What the grid loses is below the rounding of fp32 for values of like size.
    """
    ends = [float(end) for x_n in arrays if x_n.size for end in (x_n.max(), x_n.min())]
    if not all(map(math.isfinite, ends)):
        return math.nan if any(map(math.isnan, ends)) else math.inf
    largest = max(map(abs, ends), default=0.0)
    if largest == 0:
        return 0.0
    exponent = math.frexp(largest)[1] - _BITS
    scale = math.ldexp(1.0, -exponent)
    total = 0
    for x_n in arrays:
        for at in range(0, x_n.size, _BLOCK):  # a block at a time stays in the processor's cache
            steps_n = np.rint(x_n[at : at + _BLOCK].astype(np.float64) * scale).astype(np.int64)
            total += int(np.dot(steps_n, steps_n))
    return math.ldexp(math.sqrt(total), exponent)
