"""The pseudo-gradient: what a peer's inner steps changed, with the sign of a gradient. Nothing else."""

from __future__ import annotations

from torch import Tensor

# N elements of a fragment


def pseudo_gradient(anchor_N: Tensor, live_N: Tensor) -> Tensor:
    """anchor - live, fp32 [N] (DiLoCo, arXiv 2311.08105, alg. 1, outer gradient)."""
    assert anchor_N.shape == live_N.shape, f"anchor has shape {tuple(anchor_N.shape)}, live {tuple(live_N.shape)}"
    return anchor_N - live_N
