from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.delta.aggregate import aggregate, bits_float, float_bits
from decentra.delta.anchor import AnchorState
from decentra.delta.decoded import Decoded
from decentra.delta.outer import outer_step
from decentra.delta.screen import screen
from decentra.errors import ConfigError, IntegrityError, RejectedPayload
from decentra.ids import PeerId

from .helpers import finite_floats, same_bits, vector

ONE, HALF = float_bits(1.0), float_bits(0.5)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


@given(finite_floats)
def test_bits_round_trip(x: float) -> None:
    assert math.copysign(1.0, bits_float(float_bits(x))) == math.copysign(1.0, x)
    assert bits_float(float_bits(x)) == x


def test_bits_are_ieee_float32() -> None:
    assert float_bits(1.0) == 0x3F800000
    assert float_bits(0.1) == 0x3DCCCCCD
    for bad in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ConfigError):
            float_bits(bad)
    for bits in (0x7F800000, 0xFFC00000, -1, 1 << 32):
        with pytest.raises(RejectedPayload):
            bits_float(bits)


@given(st.permutations([A, B, C]))
def test_sum_does_not_depend_on_the_order_of_arrival(order: list[PeerId]) -> None:
    deltas = {p: vector(1000, i, 10.0 ** (3 * i)) for i, p in enumerate((A, B, C))}
    weights = {p: float_bits(w) for p, w in ((A, 0.1), (B, 0.3), (C, 0.6))}
    total_N = aggregate({p: Decoded.of(deltas[p]) for p in order}, {p: weights[p] for p in reversed(order)})
    w = [torch.tensor(x) for x in (0.1, 0.3, 0.6)]
    assert same_bits(total_N, (deltas[A] * w[0] + deltas[B] * w[1]) + deltas[C] * w[2])
    # the order matters, or this test could not fail
    assert not same_bits(total_N, (deltas[C] * w[2] + deltas[B] * w[1]) + deltas[A] * w[0])


def test_aggregate_leaves_its_inputs_alone() -> None:
    x_N = vector(10, 1)
    total_N = aggregate({A: Decoded.of(x_N)}, {A: ONE})
    total_N.zero_()
    assert same_bits(x_N, vector(10, 1))


def test_aggregate_refuses_incomplete_rounds_and_bad_weights() -> None:
    x = Decoded.of(vector(10, 1))
    for deltas, weights in (({}, {}), ({A: x}, {A: ONE, B: ONE}), ({A: x, B: x}, {A: ONE})):
        with pytest.raises(IntegrityError):
            aggregate(deltas, weights)
    for bits in (0x7FC00000, float_bits(-0.5)):
        with pytest.raises(RejectedPayload):
            aggregate({A: x}, {A: bits})
    for bits in (0x7FC00000, float_bits(-0.5), ONE + 1, 0x7F800000):
        with pytest.raises(RejectedPayload):
            aggregate({A: x}, {A: ONE}, {A: bits})


def test_clips_multiply_weights() -> None:
    deltas = {p: vector(1000, i) for i, p in enumerate((A, B, C))}
    weights = {p: float_bits(w) for p, w in ((A, 0.1), (B, 0.3), (C, 0.6))}
    clips = {p: float_bits(c) for p, c in ((A, 1.0), (B, 0.7), (C, 0.0))}
    total_N = aggregate({p: Decoded.of(x_N) for p, x_N in deltas.items()}, weights, clips)
    assert same_bits(total_N, deltas[A] * torch.tensor(0.1) + deltas[B] * (torch.tensor(0.3) * torch.tensor(0.7)))


def test_a_sparse_delta_adds_the_bits_of_its_dense_form() -> None:
    """Also where products underflow to -0 and where a total is zero."""
    for seed in range(5):
        x_N, y_N = vector(5000, seed, 1e-3), torch.zeros(5000)
        positions_K = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:70].numpy()
        values_K = (vector(70, seed + 10, 1e-30)).numpy()
        y_N[positions_K] = torch.from_numpy(values_K)
        sparse = Decoded(5000, ((100, x_N[100:140]),), positions_K[positions_K > 140], values_K[positions_K > 140])
        y_N[:141] = 0
        y_N[100:140] = x_N[100:140]
        assert same_bits(sparse.dense(), y_N)
        weights = {A: float_bits(1e-20), B: float_bits(0.7)}
        assert same_bits(aggregate({A: sparse, B: Decoded.of(x_N)}, weights), aggregate({A: Decoded.of(y_N), B: Decoded.of(x_N)}, weights))
        assert same_bits(sparse.subtracted_from(x_N), x_N - y_N)
        assert math.isclose(sparse.norm(), float(y_N.double().norm()), rel_tol=1e-7)
        assert sparse.norm() == Decoded.of(y_N).norm()


def test_average_moves_the_anchor_by_the_mean() -> None:
    momentum_N = vector(3, 5)
    state = AnchorState(torch.tensor([1.0, 2.0, 3.0]), momentum_N)
    new = outer_step(state, torch.tensor([1.0, 0.0, -2.0]), rule="average", lr_bits=HALF, momentum_bits=0)
    assert new.anchor_N.tolist() == [0.5, 2.0, 4.0]
    assert new.momentum_N is not None
    assert same_bits(new.momentum_N, momentum_N)
    assert state.anchor_N.tolist() == [1.0, 2.0, 3.0]


def test_nesterov_is_torch_sgd() -> None:
    parameter = torch.nn.Parameter(vector(500, 1))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    state = AnchorState(vector(500, 1))
    for step in range(4):
        mean_N = vector(500, 10 + step)
        parameter.grad = mean_N.clone()
        optimizer.step()
        before = state
        kept_N = before.anchor_N.clone()
        state = outer_step(state, mean_N, rule="nesterov", lr_bits=float_bits(0.7), momentum_bits=float_bits(0.9))
        assert same_bits(before.anchor_N, kept_N)
        assert torch.allclose(state.anchor_N, parameter.detach(), atol=1e-5)
    assert state.momentum_N is not None


def test_outer_step_refuses_unknown_rules_and_bad_scalars() -> None:
    state, mean_N = AnchorState(torch.zeros(2)), torch.ones(2)
    with pytest.raises(ConfigError, match="adam"):
        outer_step(state, mean_N, rule="adam", lr_bits=ONE, momentum_bits=ONE)
    with pytest.raises(RejectedPayload):
        outer_step(state, mean_N, rule="average", lr_bits=0x7F800000, momentum_bits=ONE)


def test_the_screen_takes_the_true_norm_only() -> None:
    x_N, five = torch.tensor([3.0, -4.0]), float_bits(5.0)
    for values_N, norm_bits in ((x_N, five), (torch.zeros(2), 0), (torch.full((4,), 1e38), float_bits(2e38))):
        screen(Decoded.of(values_N), norm_bits=norm_bits, peer="p", round=3)
    lies = [(x_N, lie, "norm") for lie in (five + 1, five - 1, 0, float_bits(-5.0), float_bits(50.0), 0x7F800000, 0x7FC00000)]
    endless = (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("-inf")]), torch.full((4,), 3e38))
    for values_N, norm_bits, reason in (*lies, *((x_N, 0x7F800000, "not-finite") for x_N in endless)):
        with pytest.raises(RejectedPayload) as caught:
            screen(Decoded.of(values_N), norm_bits=norm_bits, peer="p", round=3)
        assert (caught.value.reason, caught.value.peer, caught.value.round) == (reason, "p", 3)
    with pytest.raises(RejectedPayload, match="states a norm of 4, the packet's is 5"):
        screen(Decoded.of(x_N), norm_bits=float_bits(4.0), peer="p", round=3)
