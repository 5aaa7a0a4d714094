"""The sparse codec: of every 4096 values the k largest by magnitude, as sign times one scale per chunk. Stateless; the rest is the caller's
residual (error feedback; top-k per chunk as in SparseLoCo, arXiv 2508.15706, one bit per value instead of two).

Section: one byte per chunk (its scale in ``SCALES``), one bit per kept value (1: negative), the kept positions (``support``). A last, shorter chunk
keeps its share of k, at least one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.codec.support import CHUNK_ELEMENTS, decode_support, encode_support, max_support_bytes
from decentra.delta.raw import Ints, Sizes
from decentra.errors import RejectedPayload

# N elements of all tensors of a section, M chunks, C elements of a chunk, k kept of a full chunk, K kept in all

_STEPS_PER_OCTAVE = 8
_TOP_OCTAVE = 4
_SAMPLE_EVERY = 8
_BLOCK_ROWS = 32


def _scales() -> npt.NDArray[np.float32]:
    """0, then 255 scales from 2**-27.875 to 2**3.875 at eighths of an octave. Square roots are exact to the last bit everywhere, powers are not."""
    steps = [1.0]
    eighth = float(np.sqrt(np.sqrt(np.sqrt(2.0))))
    for _ in range(_STEPS_PER_OCTAVE - 1):
        steps.append(steps[-1] * eighth)
    down = [2.0 ** (_TOP_OCTAVE - 1 - i // _STEPS_PER_OCTAVE) * steps[_STEPS_PER_OCTAVE - 1 - i % _STEPS_PER_OCTAVE] for i in range(255)]
    return np.array([0.0, *reversed(down)], np.float32)


SCALES = _scales()
_BETWEEN = np.sqrt(SCALES[1:-1].astype(np.float64) * SCALES[2:])  # where the nearest scale changes, in the logarithm


@dataclass(frozen=True, eq=False)
class Sparse:
    """A vector [N] that is zero but for K values. ``positions_K``: int64, each once, in no promised order."""

    num_elements: int
    positions_K: Ints
    values_K: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Chunks:
    """How a section's tensors are cut: full chunks first, then the tensors' shorter ends. No chunk crosses a tensor's edge."""

    runs: tuple[tuple[int, int], ...]  # (start, number of full chunks) of neighbouring full chunks
    ends: tuple[tuple[int, int, int], ...]  # (start, length, kept)
    start_M: Ints
    length_M: Ints
    kept_M: Ints


@dataclass(frozen=True)
class TopK:
    """k of 4096: about k / 4096 * (log2(4096 e / k) + 1) bits per value."""

    kept_per_chunk: int
    code: int

    @property
    def name(self) -> str:
        return f"topk{self.kept_per_chunk}"

    def encoded_size(self, sizes: Sizes) -> int | None:
        return None

    def max_size(self, sizes: Sizes) -> int:
        kept_M = _chunks(sizes, self.kept_per_chunk).kept_M
        if not len(kept_M):
            return 0
        return len(kept_M) + _sign_bytes(kept_M) + max_support_bytes(kept_M)

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        chunks = _chunks(sizes, self.kept_per_chunk)
        if not len(chunks.kept_M):
            return b""
        kept_M, values = chunks.kept_M, values_N.numpy()
        full = [top_rows(values[s : s + n * CHUNK_ELEMENTS].reshape(n, CHUNK_ELEMENTS), self.kept_per_chunk) for s, n in chunks.runs]
        ends = [top_rows(values[s : s + n].reshape(1, n), kept) for s, n, kept in chunks.ends]
        positions_K = np.concatenate(full + ends)
        kept_K = values[np.repeat(chunks.start_M, kept_M) + positions_K]
        mean_M = np.add.reduceat(np.abs(kept_K, dtype=np.float64), np.cumsum(kept_M) - kept_M) / kept_M
        level_M = np.where(mean_M < SCALES[1] / 2, 0, 1 + np.searchsorted(_BETWEEN, mean_M)).astype(np.uint8)
        return level_M.tobytes() + np.packbits(kept_K < 0).tobytes() + encode_support(positions_K, kept_M)

    def decode(self, data: Buffer, sizes: Sizes) -> Sparse:
        """Finite values whatever the bytes."""
        chunks = _chunks(sizes, self.kept_per_chunk)
        num_chunks, sign_bytes = len(chunks.kept_M), _sign_bytes(chunks.kept_M)
        if not num_chunks:
            return Sparse(0, np.empty(0, np.int64), np.empty(0, np.float32))
        support = memoryview(data)[num_chunks + sign_bytes :]
        if len(data) < num_chunks + sign_bytes:
            raise RejectedPayload("malformed", f"{len(data)} bytes are no section of {sum(sizes)} {self.name} values")
        level_M = np.frombuffer(data, np.uint8, num_chunks)
        is_negative_K = np.unpackbits(np.frombuffer(data, np.uint8, sign_bytes, num_chunks), count=int(chunks.kept_M.sum())).view(bool)
        positions_K = decode_support(support, chunks.kept_M)
        if chunks.ends and (positions_K >= np.repeat(chunks.length_M, chunks.kept_M)).any():
            raise RejectedPayload("malformed", "a kept position lies beyond the end of its tensor")
        scale_K = np.repeat(SCALES[level_M], chunks.kept_M)
        values_K = np.where(is_negative_K, -scale_K, scale_K)
        return Sparse(sum(sizes), positions_K + np.repeat(chunks.start_M, chunks.kept_M), values_K)


@lru_cache(maxsize=64)
def _chunks(sizes: Sizes, kept_per_chunk: int) -> _Chunks:
    runs: list[list[int]] = []
    ends: list[tuple[int, int, int]] = []
    at = 0
    for size in sizes:
        num_full, rest = divmod(size, CHUNK_ELEMENTS)
        if num_full and runs and runs[-1][0] + runs[-1][1] * CHUNK_ELEMENTS == at:
            runs[-1][1] += num_full
        elif num_full:
            runs.append([at, num_full])
        if rest:
            ends.append((at + num_full * CHUNK_ELEMENTS, rest, max(1, kept_per_chunk * rest // CHUNK_ELEMENTS)))
        at += size
    start = [start + i * CHUNK_ELEMENTS for start, n in runs for i in range(n)] + [e[0] for e in ends]
    num_full = len(start) - len(ends)
    length = [CHUNK_ELEMENTS] * num_full + [e[1] for e in ends]
    kept = [kept_per_chunk] * num_full + [e[2] for e in ends]
    return _Chunks(
        tuple((s, n) for s, n in runs), tuple(ends), np.array(start, np.int64), np.array(length, np.int64), np.array(kept, np.int64)
    )


def top_rows(x_MC: npt.NDArray[np.float32], k: int) -> Ints:
    """Columns of the k largest magnitudes of every row [M k], ascending, row after row; of equals the first."""
    # a few rows at a time stay in the processor's cache
    return np.concatenate([_top_of_block(x_MC[i : i + _BLOCK_ROWS], k) for i in range(0, len(x_MC), _BLOCK_ROWS)])


def _top_of_block(x_MC: npt.NDArray[np.float32], k: int) -> Ints:
    num_rows, columns = x_MC.shape
    # a finite float's magnitude orders as its bits do
    bits_MC = x_MC.view(np.int32) & 0x7FFFFFFF
    candidates_J = np.flatnonzero(bits_MC >= _low_bar(bits_MC, k))
    rows_J = candidates_J // columns
    num_M = np.bincount(rows_J, minlength=num_rows)
    if num_M.min() < k:  # the sample misled: take the long way
        candidates_J, num_M = np.arange(bits_MC.size), np.full(num_rows, columns)
        rows_J = candidates_J // columns
    width = int(num_M.max())
    first_M = np.cumsum(num_M) - num_M
    # -1: no candidate; below every magnitude
    table = np.full((num_rows, width), -1, np.int32)
    table[rows_J, np.arange(len(rows_J)) - first_M[rows_J]] = bits_MC.reshape(-1)[candidates_J]
    bar_M = np.partition(table, width - k, axis=1)[:, width - k]
    candidate_bits_J, bar_J = bits_MC.reshape(-1)[candidates_J], bar_M[rows_J]
    is_kept_J = candidate_bits_J > bar_J
    is_tie_J = candidate_bits_J == bar_J
    missing_M = k - np.bincount(rows_J[is_kept_J], minlength=num_rows)
    if int(is_tie_J.sum()) > int(missing_M.sum()):
        before_J = np.cumsum(is_tie_J) - is_tie_J  # ties before this one
        is_tie_J &= before_J - before_J[first_M][rows_J] < missing_M[rows_J]
    found: Ints = candidates_J[is_kept_J | is_tie_J] - np.repeat(np.arange(num_rows) * columns, k)
    return found


def _low_bar(bits_MC: npt.NDArray[np.int32], k: int) -> npt.NDArray[np.int32]:
    """A bar [M, 1] that most likely at least k of each row reach, and not many more: from every eighth column."""
    columns = bits_MC.shape[1]
    wanted = 2 * k // _SAMPLE_EVERY + 8
    if columns < 16 * k or columns < 64 * _SAMPLE_EVERY:
        return np.full((len(bits_MC), 1), -1, np.int32)
    sample = np.ascontiguousarray(bits_MC[:, ::_SAMPLE_EVERY])
    at = sample.shape[1] - wanted
    return np.partition(sample, at, axis=1)[:, at : at + 1]


def _sign_bytes(kept_M: Ints) -> int:
    return (int(kept_M.sum()) + 7) // 8
