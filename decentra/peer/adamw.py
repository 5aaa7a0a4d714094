"""AdamW over torch's fused kernel (arXiv 1711.05101, alg. 2). Holds moments, no schedule and no gradient clipping.

Not ``torch.optim.AdamW``, whose constructor loads torch's compiler: 1.5-2 CPU-seconds and 70 MB in every peer, for nothing used here.
The kernel is the same and so are the results, bit for bit (tested).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-8
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of every parameter that was ever updated: 0-d fp32, and two of its own shape


class AdamW:
    """Updates ``parameters`` in place from their ``grad``; one without a gradient is left alone, moments included.

    Matrices decay by ``weight_decay``, vectors (norms: scales, not directions) do not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, beta1: float, beta2: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._beta1, self._beta2, self._weight_decay = beta1, beta2, weight_decay

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                groups.setdefault((parameter.ndim >= 2, parameter.dtype), []).append(parameter)
        for (is_matrix, _), members in groups.items():
            self._update(members, lr, self._weight_decay if is_matrix else 0.0)

    def _update(self, members: list[Tensor], lr: float, weight_decay: float) -> None:
        states = [self._state_of(parameter) for parameter in members]
        steps, means, squares = ([state[key] for state in states] for key in MOMENTS)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            members,
            [p.grad for p in members if p.grad is not None],
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            lr=lr,
            beta1=self._beta1,
            beta2=self._beta2,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = dict(zip(MOMENTS, (step, torch.zeros_like(parameter), torch.zeros_like(parameter)), strict=True))
        return self.state[parameter]
