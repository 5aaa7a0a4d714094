"""The outer optimizers: one step of a fragment's anchor along the mean delta, bit-equal on every machine. Inputs stay untouched."""

from __future__ import annotations

import torch
from torch import Tensor

from decentra.bits import bits_float
from decentra.delta.anchor import AnchorState
from decentra.errors import ConfigError

# N elements of a fragment
# Only out-of-place contiguous fp32 mul, add and sub: lerp, addcmul, alpha= and foreach fuse or reorder differently between CPUs.


def outer_step(state: AnchorState, mean_N: Tensor, *, rule: str, lr_bits: int, momentum_bits: int) -> AnchorState:
    """The next anchor, fp32 [N], in new tensors; lr and momentum are float32 bits of the settlement.

    ``average``: A' = A - lr g. ``nesterov``: m' = mu m + g, A' = A - lr (g + mu m') (DiLoCo, arXiv 2311.08105, alg. 1, in the form of
    PyTorch's SGD without dampening; a missing m is zero). Raises ConfigError for another rule, RejectedPayload for bits of inf or NaN.
    """
    assert mean_N.shape == state.anchor_N.shape, f"anchor has shape {tuple(state.anchor_N.shape)}, mean {tuple(mean_N.shape)}"
    anchor_N, mean_N, lr = state.anchor_N.contiguous(), mean_N.contiguous(), bits_float(lr_bits)
    if rule == "average":
        momentum_N = None if state.momentum_N is None else state.momentum_N.clone()
        return AnchorState(torch.sub(anchor_N, torch.mul(mean_N, lr)), momentum_N)
    if rule == "nesterov":
        mu = bits_float(momentum_bits)
        old_N = torch.zeros_like(mean_N) if state.momentum_N is None else state.momentum_N.contiguous()
        momentum_N = torch.add(torch.mul(old_N, mu), mean_N)
        step_N = torch.add(mean_N, torch.mul(momentum_N, mu))
        return AnchorState(torch.sub(anchor_N, torch.mul(step_N, lr)), momentum_N)
    raise ConfigError(f"outer.rule: expected 'average' or 'nesterov', got {rule!r}")
