"""RMSNorm and rotary positions as single autograd nodes, cheaper on CPUs than their composition. No attention, no experts.

Shapes: B batch, T tokens, H heads, C channels of one head, D last dimension; "C2" is C / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x.float(), self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rstd = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight_D)
        y: Tensor = normed * weight_D
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x * rstd and g = dy * w: dw = sum(dy * n), dx = rstd * (g - n * mean(g * n))."""
        normed, rstd, weight_D = ctx.saved_tensors
        dx = dweight_D = None
        if ctx.needs_input_grad[1]:
            dweight_D = (grads[0] * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            dx = grads[0] * weight_D
            mean = torch.linalg.vecdot(dx, normed).div_(dx.shape[-1]).unsqueeze(-1)
            dx = dx.addcmul_(normed, mean, value=-1.0).mul_(rstd)
        return dx, dweight_D, None


def rotate(x_BHTC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (c, c + C/2) by the angles whose cos and sin are ``rope``, each [T, C/2] (arXiv 2104.09864, eq. 34)."""
    y_BHTC: Tensor = _Rotate.apply(x_BHTC, *rope)  # type: ignore[no-untyped-call]
    return y_BHTC


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTC: Tensor, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC2, sin_TC2)
        return _turned(x_BHTC, cos_TC2, sin_TC2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TC2, sin_TC2 = ctx.saved_tensors
        return _turned(grads[0], cos_TC2, -sin_TC2), None, None  # the gradient turns the other way


def _turned(x_BHTC: Tensor, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
    first, second = x_BHTC.chunk(2, dim=-1)
    y_BHTC = torch.empty_like(x_BHTC)
    y_first, y_second = y_BHTC.chunk(2, dim=-1)
    torch.mul(first, cos_TC2, out=y_first).addcmul_(second, sin_TC2, value=-1.0)
    torch.mul(second, cos_TC2, out=y_second).addcmul_(first, sin_TC2)
    return y_BHTC
