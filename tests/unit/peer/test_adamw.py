from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from decentra.peer.adamw import AdamW

torch.set_num_threads(1)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 4))]


def test_equals_torchs_own_bit_for_bit_with_gradients_that_come_and_go() -> None:
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, beta1=0.9, beta2=0.95, weight_decay=0.1)
    groups = [{"params": [theirs[0], theirs[2]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        lr = 0.01 * (number + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator)
            is_missing = (number + index) % 4 == 0
            a.grad, b.grad = (None, None) if is_missing else (gradient, gradient.clone())
        mine.step(lr)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_a_gradient_nothing_moves_and_no_moments_appear() -> None:
    ours = parameters()
    before = [p.detach().clone() for p in ours]
    mine = AdamW(ours, beta1=0.9, beta2=0.95, weight_decay=0.1)
    ours[0].grad = torch.ones_like(ours[0])
    mine.step(0.1)
    mine.zero_grad()
    mine.step(0.1)
    assert not torch.equal(ours[0], before[0])
    assert torch.equal(ours[1], before[1])
    assert list(mine.state) == [ours[0]]
    assert mine.state[ours[0]]["step"].item() == 1


def test_training_never_loads_torchs_compiler() -> None:
    program = (
        "import sys, torch; from torch import nn; from decentra.peer.adamw import AdamW; p = nn.Parameter(torch.ones(3, 3));"
        "a = AdamW([p], beta1=0.9, beta2=0.95, weight_decay=0.1); p.square().sum().backward();"
        "nn.utils.clip_grad_norm_([p], 1.0); a.step(0.1); a.zero_grad(); print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
