"""Which k of each chunk's C positions are kept, at the information-theoretic size: log2 binomial(C, k) bits per chunk, plus a few bytes in all.

A chunk is halved again and again; for every node that still holds at least two kept positions, the number in its left half is coded. If all
supports are equally likely, that number is hypergeometric, so the counts cost together exactly what naming the support costs (enumerative coding,
Cover 1973, doi 10.1109/TIT.1973.1054929). A node with one position names it with log2(size) bits. Nodes of one level and count share one table
of probabilities, so the range coder (constriction, arXiv 2201.01741) runs over whole groups.

The tables are quotients of whole numbers, correctly rounded: every machine has the same ones. Whatever decodes is k increasing positions per
chunk, so a decoder needs no bounds checks; damage to the bytes is found by the packet's checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import comb, log2

import constriction
import numpy as np

from decentra.delta.raw import Ints
from decentra.errors import RejectedPayload

# M chunks, K kept positions of all chunks together, G nodes of one level

CHUNK_BITS = 12
CHUNK_ELEMENTS = 1 << CHUNK_BITS
WORD_BYTES = 4


def encode_support(positions_K: Ints, kept_M: Ints) -> bytes:
    """``positions_K``: ascending in each chunk, each in [0, 4096), chunk after chunk; ``kept_M``: how many of each chunk, at least 1."""
    coder = constriction.stream.queue.RangeEncoder()
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
        is_left_K = (positions_K & half) == 0
        before_K = np.concatenate(([0], np.cumsum(is_left_K)))
        left_G = before_K[first_G + count_G] - before_K[first_G]
        for count, group in _by_count(count_G):
            low, high = max(0, count - half), min(count, half)
            if low < high:
                coder.encode((left_G[group] - low).astype(np.int32), _split_model(half, count))
        first_G, count_G = _children(first_G, count_G, left_G)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode_support(data: bytes | memoryview, kept_M: Ints) -> Ints:
    """Positions [K] as they were encoded, ascending in each chunk. ``data``: a multiple of 4 bytes. Raises RejectedPayload (``malformed``) for
    some of what no encoder writes."""
    try:
        return _decoded(data, kept_M)
    except AssertionError as error:  # constriction's InvalidData
        raise RejectedPayload("malformed", f"the kept positions do not decode: {error}") from None


def _decoded(data: bytes | memoryview, kept_M: Ints) -> Ints:
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    positions_K = np.zeros(int(kept_M.sum()), np.int64)
    first_G, count_G, base_G = _first_of(kept_M), kept_M, np.zeros(len(kept_M), np.int64)
    for level in range(CHUNK_BITS):
        size, half = CHUNK_ELEMENTS >> level, CHUNK_ELEMENTS >> (level + 1)
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
            left_G[group] = low + coder.decode(_split_model(half, count), len(group)) if low < high else low
        children_first_G, children_count_G = _children(first_G, count_G, left_G)
        both_G = np.stack((base_G, base_G + half), axis=1).reshape(-1)
        base_G = both_G[np.stack((left_G, count_G - left_G), axis=1).reshape(-1) > 0]
        first_G, count_G = children_first_G, children_count_G
    positions_K[first_G] = base_G  # nodes of size 1
    return positions_K


def max_support_bytes(kept_M: Ints) -> int:
    """Bound on ``encode_support`` for any positions: no support costs more than the others but for the rounding of tables to 24 bits."""
    return int(support_bits(kept_M) * 1.001 / 8) + 4 * WORD_BYTES


def support_bits(kept_M: Ints) -> float:
    """log2 of the number of supports: the bound for a code that knows nothing of the data."""
    counts, how_often = np.unique(kept_M, return_counts=True)
    return float(sum(n * log2(comb(CHUNK_ELEMENTS, int(k))) for k, n in zip(counts, how_often, strict=True)))


def _first_of(kept_M: Ints) -> Ints:
    """Index into K of each chunk's first kept position."""
    first_M: Ints = np.concatenate(([0], np.cumsum(kept_M)[:-1])).astype(np.int64)
    return first_M


def _children(first_G: Ints, count_G: Ints, left_G: Ints) -> tuple[Ints, Ints]:
    """The halves that hold something, left before right."""
    first = np.stack((first_G, first_G + left_G), axis=1).reshape(-1)
    count = np.stack((left_G, count_G - left_G), axis=1).reshape(-1)
    return first[count > 0], count[count > 0]


def _by_count(count_G: Ints) -> Iterator[tuple[int, Ints]]:
    """Nodes grouped by how many positions they hold, in ascending order; within a group in their order."""
    order_G = np.argsort(count_G, kind="stable")
    counts, starts = np.unique(count_G[order_G], return_index=True)
    ends = [*starts[1:].tolist(), len(order_G)]
    for count, start, end in zip(counts.tolist(), starts.tolist(), ends, strict=True):
        yield count, order_G[start:end]


@lru_cache(maxsize=4096)
def _split_model(half: int, count: int) -> constriction.stream.model.Categorical:
    """How ``count`` of 2 ``half`` positions fall left: hypergeometric."""
    low, high = max(0, count - half), min(count, half)
    total = comb(2 * half, count)
    # int / int is correctly rounded, whatever the machine
    probabilities = np.array([comb(half, j) * comb(half, count - j) / total for j in range(low, high + 1)])
    return constriction.stream.model.Categorical(probabilities, perfect=False)


@lru_cache(maxsize=CHUNK_BITS + 1)
def _uniform(size: int) -> constriction.stream.model.Uniform:
    return constriction.stream.model.Uniform(size)
