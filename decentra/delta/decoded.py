"""A decoded packet: some values of a fragment dense, some sparse. Adds itself to a sum without becoming a whole vector first.

Everything here is elementwise fp32 mul, add or sub, so every machine gets the same bits, dense or sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from decentra.delta.norm import norm_of
from decentra.delta.raw import Ints

# N elements of a fragment, n of a run of it, K values of the sparse part


@dataclass(frozen=True, eq=False)
class Decoded:
    """One peer's delta of one fragment. Elements in no run and at no position are zero."""

    num_elements: int
    runs: tuple[tuple[int, Tensor], ...] = ()  # (start, fp32 [n])
    positions_K: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # each once
    values_K: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @staticmethod
    def of(values_N: Tensor) -> Decoded:
        """A dense delta, fp32 [N]."""
        return Decoded(values_N.numel(), ((0, values_N.contiguous()),))

    @property
    def is_sparse(self) -> bool:
        """True when it holds far less than a value per element."""
        return 10 * (len(self.values_K) + sum(run_n.numel() for _, run_n in self.runs)) < self.num_elements

    def dense(self) -> Tensor:
        """fp32 [N], a new tensor."""
        values_N = np.zeros(self.num_elements, np.float32)
        for start, run_n in self.runs:
            values_N[start : start + run_n.numel()] = run_n.numpy()
        values_N[self.positions_K] = self.values_K
        return torch.from_numpy(values_N)

    def add_to(self, total_N: Tensor, weight: float) -> None:
        """``total_N`` += weight * self. A total that began as +0 gets the same bits whether zeros are added or left out."""
        total = total_N.numpy()
        for start, run_n in self.runs:
            total[start : start + run_n.numel()] += run_n.numpy() * np.float32(weight)
        total[self.positions_K] += self.values_K * np.float32(weight)

    def add_presence_to(self, total_N: Tensor, weight: float) -> None:
        """``total_N`` += weight wherever this delta holds a value, zeros included."""
        total = total_N.numpy()
        for start, run_n in self.runs:
            total[start : start + run_n.numel()] += np.float32(weight)
        total[self.positions_K] += np.float32(weight)

    def add_scaled_to(self, total: npt.NDArray[np.float32], factor: float) -> None:
        """``total`` += factor * self, where the factor is beyond fp32: multiplied in fp64, rounded to fp32, added in fp32."""
        for start, run_n in self.runs:
            total[start : start + run_n.numel()] += (run_n.numpy().astype(np.float64) * factor).astype(np.float32)
        total[self.positions_K] += (self.values_K.astype(np.float64) * factor).astype(np.float32)

    def cut(self, spans: Sequence[tuple[int, int]]) -> list[Decoded]:
        """One delta for every (start, length) of ``spans``, each counted from its own start. Runs are views."""
        order_K = np.argsort(self.positions_K)
        sorted_K = self.positions_K[order_K]
        parts = []
        for start, length in spans:
            first, last = np.searchsorted(sorted_K, (start, start + length))
            runs = []
            for at, run_n in self.runs:
                low, high = max(at, start), min(at + run_n.numel(), start + length)
                if low < high:
                    runs.append((low - start, run_n[low - at : high - at]))
            parts.append(Decoded(length, tuple(runs), sorted_K[first:last] - start, self.values_K[order_K[first:last]]))
        return parts

    def subtracted_from(self, raw_N: Tensor) -> Tensor:
        """raw - self, fp32 [N], a new tensor."""
        left_N = raw_N.clone()
        left = left_N.numpy()
        for start, run_n in self.runs:
            left[start : start + run_n.numel()] -= run_n.numpy()
        left[self.positions_K] -= self.values_K
        return left_N

    def norm(self) -> float:
        """L2 norm with the same bits everywhere, sparse or dense; infinite or NaN when a value is."""
        return norm_of([run_n.numpy() for _, run_n in self.runs] + [self.values_K])
