from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decentra.config import ModelSpec
from decentra.model.kernels import RMSNorm, rotate
from decentra.model.moe import MoE

torch.set_num_threads(1)


def moe_of(
    present: tuple[int, ...], *, num_experts: int = 5, k: int = 2, renormalised: bool = True, dtype: torch.dtype = torch.float64
) -> MoE:
    spec = ModelSpec(hidden_size=8, expert_hidden_size=6, num_experts=num_experts, num_experts_per_token=k, norm_topk_prob=renormalised)
    moe = MoE(spec, present).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return moe


def plain(moe: MoE, x_TD: Tensor) -> Tensor:
    """The same layer token by token, from the formulas and autograd's own operations."""
    rows = []
    for x_D in x_TD:
        probs_P = (moe.gate.weight.to(torch.float32) @ x_D.float())[list(moe.present)].softmax(-1)
        weights_K, choice_K = probs_P.topk(moe.num_chosen)
        if moe.is_renormalised:
            weights_K = weights_K / weights_K.sum()
        y_D = torch.zeros_like(x_D)
        for weight, choice in zip(weights_K, choice_K.tolist(), strict=True):
            gate, up, down = moe.experts[str(moe.present[choice])].weights()
            y_D = y_D + weight * (down @ (F.silu(gate @ x_D) * (up @ x_D)))
        rows.append(y_D)
    return torch.stack(rows)


def gradients(moe: MoE, y_TD: Tensor, x_TD: Tensor) -> dict[str, Tensor | None]:
    moe.zero_grad(set_to_none=True)
    x_TD.grad = None
    (y_TD * torch.arange(y_TD.numel()).view_as(y_TD).cos()).sum().backward()
    return {"x": x_TD.grad, **{name: p.grad for name, p in moe.named_parameters()}}


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 12),
    present=st.sets(st.integers(0, 4), min_size=1).map(lambda s: tuple(sorted(s))),
    k=st.integers(2, 5),
    renormalised=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dispatch_and_gradients_equal_the_plain_formula(
    num_tokens: int, present: tuple[int, ...], k: int, renormalised: bool, seed: int
) -> None:
    moe = moe_of(present, k=k, renormalised=renormalised, dtype=torch.float32)
    x_TD = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y_TD, stats = moe(x_TD)
    torch.testing.assert_close(y_TD, plain(moe, x_TD), atol=1e-5, rtol=1e-4)
    ours, theirs = gradients(moe, y_TD, x_TD), gradients(moe, plain(moe, x_TD), x_TD)
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None or not expected.any():
            assert found is None or not found.any(), name
        else:
            assert found is not None, name
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert stats.num_slots_P.sum() == num_tokens * min(k, len(present))


def test_an_expert_without_tokens_gets_no_gradient_at_all() -> None:
    moe = moe_of((0, 1, 2, 3, 4), dtype=torch.float32)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[1:3] = 1.0
    x_TD = torch.rand(6, 8)  # positive: rows 1 and 2 win for every token
    y_TD, stats = moe(x_TD)
    y_TD.sum().backward()
    assert stats.num_slots_P.tolist() == [0, 6, 6, 0, 0]
    assert moe.experts["0"].up_proj.weight.grad is None
    assert moe.experts["1"].up_proj.weight.grad is not None


def test_frozen_experts_cost_no_weight_gradient_products() -> None:
    moe = moe_of((0, 1, 2, 3, 4), dtype=torch.float32)
    x_TD = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def num_products() -> int:
        y_TD, _ = moe(x_TD)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y_TD.sum().backward()
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))

    num_all = num_products()
    for expert in ("0", "1", "2"):
        moe.experts[expert].requires_grad_(False)
    assert num_all - num_products() == 3 * 3  # gate, up and down of three experts


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_runs_experts_in_half_precision_and_stays_close(dtype: torch.dtype) -> None:
    moe = moe_of((0, 1, 2, 3, 4), dtype=torch.float32)
    x_TD = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact, _ = moe(x_TD)
    with torch.autocast("cpu", dtype=dtype):
        rounded, stats = moe(x_TD)
    assert rounded.dtype == dtype
    assert stats.z_loss.dtype == torch.float32
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
    rounded.float().sum().backward()
    gradient = moe.experts["0"].up_proj.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


def test_rms_norm_equals_the_composed_one_with_gradients() -> None:
    norm = RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 8, requires_grad=True)
    direction = torch.randn(3, 5, 8)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6))
    ours = torch.autograd.grad((norm(x) * direction).sum(), [x, norm.weight])
    theirs = torch.autograd.grad((F.rms_norm(x, (8,), norm.weight, 1e-6) * direction).sum(), [x, norm.weight])
    torch.testing.assert_close(ours, theirs)


def test_rotation_gradient_is_the_numeric_one() -> None:
    angle = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: rotate(v, (angle.cos(), angle.sin())), (x,))
    torch.testing.assert_close(rotate(x, (angle.cos(), angle.sin())).norm(dim=-1), x.norm(dim=-1))


def test_affinity_moves_the_choice_and_nothing_else() -> None:
    spec = ModelSpec(hidden_size=16, expert_hidden_size=8, num_experts=4, num_experts_per_token=2)
    moe = MoE(spec, range(4))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(4))
    plain, stats = moe(x_TD)
    moe.favour([1], 100.0)
    moved, favoured = moe(x_TD)
    assert int(favoured.num_slots_P[1]) == 64, "everybody goes to it"
    assert torch.equal(favoured.mean_prob_P, stats.mean_prob_P), "probabilities are the router's"
    assert not torch.equal(moved, plain)
    moe.favour([], 0.0)
    assert torch.equal(moe(x_TD)[0], plain)


def test_loss_free_balancing_evens_the_load_outside_the_gradient() -> None:
    spec = ModelSpec(hidden_size=16, expert_hidden_size=8, num_experts=4, num_experts_per_token=1, norm_topk_prob=False, bias_rate=0.05)
    moe = MoE(spec, range(4))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
        moe.gate.weight[2] += 0.5
    x_TD = torch.randn(256, 16, generator=torch.Generator().manual_seed(4)) + 0.3
    moe.eval()
    _, before = moe(x_TD)
    assert moe.bias_P is None, "evaluation moves nothing"
    moe.train()
    for _ in range(200):
        y_TD, _ = moe(x_TD)
    y_TD.sum().backward()
    assert moe.bias_P is not None
    assert not moe.bias_P.requires_grad
    assert "bias_P" not in moe.state_dict()
    moe.eval()
    _, after = moe(x_TD)
    assert int(after.num_slots_P.max()) < 0.6 * int(before.num_slots_P.max())
    assert torch.equal(after.mean_prob_P, before.mean_prob_P), "weights are the router's own"
