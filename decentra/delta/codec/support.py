"""Which k of each chunk's C positions are kept, in fewer bits than log2 binomial(C, k) where they cluster, and never noticeably more.

A chunk is halved again and again; for every node that still holds at least two kept positions, the number in its left half is coded; a node with one
names it with log2(size) bits. If all supports are equally likely that number is hypergeometric, and the counts cost together exactly what naming the
support costs (enumerative coding, Cover 1973, doi 10.1109/TIT.1973.1054929). In real deltas whole rows of a matrix move more than others, so
halves are less even than that: then it is beta-binomial with a concentration that the encoder picks for every level and writes in front.

Nodes of one level and count share one table of probabilities, so the range coder (constriction, arXiv 2201.01741) runs over whole groups. The tables
are quotients of whole numbers, correctly rounded: every machine has the same ones. Whatever decodes is k increasing positions per chunk, so a
decoder needs no bounds checks; damage to the bytes is found by the packet's checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import comb, lgamma, log2

import constriction
import numpy as np
import numpy.typing as npt

from decentra.delta.raw import Ints
from decentra.errors import RejectedPayload

# M chunks, K kept positions of all chunks together, G nodes of one level, S splits of a level that differ

CHUNK_BITS = 12
CHUNK_ELEMENTS = 1 << CHUNK_BITS
WORD_BYTES = 4
_MODELS_BYTES = CHUNK_BITS // 2

# quarters of the beta-binomial's concentration; 0: hypergeometric. The index is what is written, four bits a level.
CONCENTRATIONS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)


def encode_support(positions_K: Ints, kept_M: Ints) -> bytes:
    """``positions_K``: ascending in each chunk, each in [0, 4096), chunk after chunk; ``kept_M``: how many of each chunk, at least 1."""
    coder = constriction.stream.queue.RangeEncoder()
    models: list[int] = []
    first_G, count_G = _first_of(kept_M), kept_M
    for level in range(CHUNK_BITS):
        size, half = CHUNK_ELEMENTS >> level, CHUNK_ELEMENTS >> (level + 1)
        is_single_G = count_G == 1
        singles = positions_K[first_G[is_single_G]] & (size - 1)
        if singles.size:
            coder.encode(singles.astype(np.int32), _uniform(size))
        first_G, count_G = first_G[~is_single_G], count_G[~is_single_G]
        if not count_G.size:
            break
        before_K = np.concatenate(([0], np.cumsum((positions_K & half) == 0)))
        left_G = before_K[first_G + count_G] - before_K[first_G]
        models.append(_best_model(half, count_G, left_G))
        for count, group in _by_count(count_G):
            low, high = max(0, count - half), min(count, half)
            if low < high:
                coder.encode((left_G[group] - low).astype(np.int32), _split_model(half, count, CONCENTRATIONS[models[-1]]))
        first_G, count_G = _children(first_G, count_G, left_G)
    models += [0] * (CHUNK_BITS - len(models))
    written = bytes(models[i] | models[i + 1] << 4 for i in range(0, CHUNK_BITS, 2))
    return written + bytes(coder.get_compressed().astype("<u4").tobytes())


def decode_support(data: bytes | memoryview, kept_M: Ints) -> Ints:
    """Positions [K] as they were encoded, ascending in each chunk. Raises RejectedPayload (``malformed``) for some of what no encoder writes."""
    if len(data) < _MODELS_BYTES or (len(data) - _MODELS_BYTES) % WORD_BYTES:
        raise RejectedPayload("malformed", f"{len(data)} bytes name no kept positions")
    try:
        return _decoded(data, kept_M)
    except AssertionError as error:  # constriction's InvalidData
        raise RejectedPayload("malformed", f"the kept positions do not decode: {error}") from None


def _decoded(data: bytes | memoryview, kept_M: Ints) -> Ints:
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4", offset=_MODELS_BYTES).astype(np.uint32))
    positions_K = np.zeros(int(kept_M.sum()), np.int64)
    first_G, count_G, base_G = _first_of(kept_M), kept_M, np.zeros(len(kept_M), np.int64)
    for level in range(CHUNK_BITS):
        size, half = CHUNK_ELEMENTS >> level, CHUNK_ELEMENTS >> (level + 1)
        concentration = CONCENTRATIONS[data[level // 2] >> (level % 2 * 4) & 15]
        is_single_G = count_G == 1
        num_singles = int(is_single_G.sum())
        if num_singles:
            positions_K[first_G[is_single_G]] = base_G[is_single_G] + coder.decode(_uniform(size), num_singles)
        first_G, count_G, base_G = first_G[~is_single_G], count_G[~is_single_G], base_G[~is_single_G]
        if not count_G.size:
            return positions_K
        left_G = np.empty_like(count_G)
        for count, group in _by_count(count_G):
            low, high = max(0, count - half), min(count, half)
            left_G[group] = low + coder.decode(_split_model(half, count, concentration), len(group)) if low < high else low
        both_G = np.stack((base_G, base_G + half), axis=1).reshape(-1)
        base_G = both_G[np.stack((left_G, count_G - left_G), axis=1).reshape(-1) > 0]
        first_G, count_G = _children(first_G, count_G, left_G)
    positions_K[first_G] = base_G  # nodes of size 1
    return positions_K


def max_support_bytes(kept_M: Ints) -> int:
    """Bound on ``encode_support`` for any positions: with the hypergeometric tables no support costs more than the others, but for their
    rounding to 24 bits; others are used where they cost less."""
    return int(support_bits(kept_M) * 1.001 / 8) + _MODELS_BYTES + 4 * WORD_BYTES


def support_bits(kept_M: Ints) -> float:
    """log2 of the number of supports: the bound for a code that knows nothing of the data."""
    counts, how_often = np.unique(kept_M, return_counts=True)
    return float(sum(n * log2(comb(CHUNK_ELEMENTS, int(k))) for k, n in zip(counts, how_often, strict=True)))


def _first_of(kept_M: Ints) -> Ints:
    """Index into K of each chunk's first kept position."""
    first_M: Ints = np.cumsum(kept_M) - kept_M
    return first_M


def _children(first_G: Ints, count_G: Ints, left_G: Ints) -> tuple[Ints, Ints]:
    """The halves that hold something, left before right."""
    first = np.stack((first_G, first_G + left_G), axis=1).reshape(-1)
    count = np.stack((left_G, count_G - left_G), axis=1).reshape(-1)
    return first[count > 0], count[count > 0]


def _by_count(count_G: Ints) -> Iterator[tuple[int, Ints]]:
    """Nodes grouped by how many positions they hold, in ascending order; within a group in their order."""
    order_G = np.argsort(count_G.astype(np.uint16), kind="stable")  # radix sort
    how_many = np.bincount(count_G)
    end = 0
    for count in np.flatnonzero(how_many).tolist():
        start, end = end, end + int(how_many[count])
        yield count, order_G[start:end]


# ---------------------------------------------------------------- models of a split


@lru_cache(maxsize=1 << 15)
def _split_model(half: int, count: int, concentration: int) -> constriction.stream.model.Categorical:
    """How ``count`` positions of a node of 2 ``half`` fall left, from ``max(0, count - half)`` on."""
    low, high = max(0, count - half), min(count, half)
    if concentration == 0:
        weights = [comb(half, j) * comb(half, count - j) for j in range(low, high + 1)]
    else:
        rising = _rising(concentration, count)
        weights = [comb(count, j) * rising[j] * rising[count - j] for j in range(low, high + 1)]
    total = sum(weights)
    # int / int is correctly rounded, whatever the machine
    return constriction.stream.model.Categorical(np.array([weight / total for weight in weights]), perfect=False)


@lru_cache(maxsize=4096)
def _rising(concentration: int, count: int) -> tuple[int, ...]:
    """a (a + 1) ... (a + j - 1) for j = 0 .. count, times 4**j, where a = concentration / 4."""
    values = [1]
    for j in range(count):
        values.append(values[-1] * (concentration + 4 * j))
    return tuple(values)


@lru_cache(maxsize=CHUNK_BITS + 1)
def _uniform(size: int) -> constriction.stream.model.Uniform:
    return constriction.stream.model.Uniform(size)


def _best_model(half: int, count_G: Ints, left_G: Ints) -> int:
    """Index of the concentration with which these splits cost least. Only a choice: floating point is good enough."""
    most = int(count_G.max()) + 1
    how_often = np.bincount(count_G * most + left_G)
    splits_S = np.flatnonzero(how_often)
    count_S, left_S = np.divmod(splits_S, most)
    right_S, how_often_S = count_S - left_S, how_often[splits_S]
    log_factorial, log_gamma, log_gamma_twice = _log_gammas()  # what is the same for all models is left out
    uniform_S = (
        2 * log_factorial[half] - log_factorial[half - left_S] - log_factorial[half - right_S]
        - log_factorial[2 * half] + log_factorial[2 * half - count_S]
    )  # fmt: skip
    sides_AS = log_gamma[:, left_S] + log_gamma[:, right_S] - log_gamma_twice[:, count_S]
    gain_A = sides_AS @ how_often_S + (log_gamma_twice[:, 0] - 2 * log_gamma[:, 0]) * how_often_S.sum()
    gain_A[0] = uniform_S @ how_often_S
    return int(np.argmax(gain_A))


@lru_cache(maxsize=1)
def _log_gammas() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """ln n! [C + 1]; ln gamma(n + a) and ln gamma(n + 2 a) for every concentration a [A, C + 1]."""
    n = range(CHUNK_ELEMENTS + 1)
    once, twice = ([[lgamma(i + a) if i + a else 0.0 for i in n] for a in (c * x / 4 for c in CONCENTRATIONS)] for x in (1, 2))
    return np.array([lgamma(i + 1) for i in n]), np.array(once), np.array(twice)
