"""Norms that are bit-equal, and the ways to merge deltas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decentra.bits import float_bits
from decentra.config import Manifest, parse_config
from decentra.delta.aggregate import aggregate
from decentra.delta.decoded import Decoded
from decentra.delta.merge import is_radial, merge, num_trimmed
from decentra.delta.norm import norm_of
from decentra.delta.packet import decode_packet, encode_packet
from decentra.errors import ConfigError, IntegrityError, RejectedPayload
from decentra.ids import FragmentId, PeerId
from decentra.modules import Slot, build_layout

from .helpers import CODEC_NAMES, finite_floats, large_fragment, same_bits, vector

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
FRAGMENT = build_layout([("embed.weight", (6, 4)), ("norm", (4,)), ("up.weight", (5, 4)), ("down.weight", (4, 5))])[FragmentId("trunk/0")]
N = FRAGMENT.num_elements
WEIGHTS = {A: float_bits(0.5), B: float_bits(0.3), C: float_bits(0.2)}


def slot(name: str) -> Slot:
    return next(s for s in FRAGMENT.slots if s.name == name)


def of(values_N: Tensor, name: str) -> Tensor:
    return values_N[slot(name).offset : slot(name).offset + slot(name).size]


def three(scale: float = 1.0) -> dict[PeerId, Decoded]:
    return {peer: Decoded.of(vector(N, seed, scale * 10.0**seed)) for seed, peer in enumerate((A, B, C))}


def sparse(values_N: Tensor) -> Decoded:
    """The same delta with every second run of values as positions, and zeros left out."""
    half = values_N.numel() // 2
    rest = values_N[half:].numpy()
    order = np.flatnonzero(rest)[::-1].copy()
    return Decoded(values_N.numel(), ((0, values_N[:half]),), order + half, rest[order])


# ---------------------------------------------------------------- norms


@given(st.lists(finite_floats, max_size=60), st.integers(0, 60), st.randoms(use_true_random=False))
def test_a_norm_does_not_depend_on_order_cuts_or_zeros(values: list[float], cut: int, rng: object) -> None:
    x = np.array(values, np.float32)
    shuffled = list(values) + [0.0] * 5
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    y = np.array(shuffled, np.float32)
    norm = norm_of([x])
    assert norm == norm_of([y]) == norm_of([y[:cut], y[cut:]]) == norm_of([-x])
    assert math.isclose(norm, math.hypot(*x.astype(np.float64)), rel_tol=1e-6)


def test_norms_of_many_values_and_of_extreme_ones() -> None:
    for seed, scale in enumerate((1.0, 1e-30, 1e30)):
        x_N = vector(100_003, seed, scale)
        expected = float(torch.linalg.vector_norm(x_N, dtype=torch.float64))
        assert math.isclose(norm_of([x_N.numpy()]), expected, rel_tol=1e-8)
        assert norm_of([x_N.numpy()]) == norm_of([x_N.flip(0).numpy()]) == norm_of([x_N[:999].numpy(), x_N[999:].numpy()])
    smallest, largest = np.float32(2.0**-149), np.finfo(np.float32).max
    assert norm_of([np.full(4, smallest)]) == 2 * 2.0**-149
    assert norm_of([np.full(40_000, largest)]) == 200 * float(largest)
    assert norm_of([]) == norm_of([np.zeros(3, np.float32)]) == norm_of([np.empty(0, np.float32)]) == 0
    ones = np.ones(2, np.float32)
    for bad in (np.inf, -np.inf):
        assert norm_of([ones, np.array([1, bad], np.float32)]) == math.inf
    for arrays in ([ones, np.array([np.nan, np.inf], np.float32)], [np.array([np.nan], np.float32), ones]):
        assert math.isnan(norm_of(arrays))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("codec_name", CODEC_NAMES)
def test_the_parts_of_a_delta_are_the_delta(codec_name: str) -> None:
    fragment = large_fragment()
    x_N = vector(fragment.num_elements, 1)
    whole = decode_packet(encode_packet(fragment, x_N, codec_name), fragment)
    parts = whole.cut([(s.offset, s.size) for s in fragment.slots])
    assert same_bits(torch.cat([part.dense() for part in parts]), whole.dense())


# ---------------------------------------------------------------- the radial merge


def test_each_matrix_gets_the_mean_norm_in_the_mean_direction() -> None:
    deltas = three()
    merged_N = merge(FRAGMENT, deltas, WEIGHTS, rule="radial")
    for name in ("up.weight", "down.weight"):
        tensors = {peer: of(delta.dense(), name).double() for peer, delta in deltas.items()}
        shares = {A: 0.5, B: 0.3, C: 0.2}
        length = sum(shares[p] * float(x_S.norm()) for p, x_S in tensors.items())
        direction_S = sum(shares[p] * x_S / x_S.norm() for p, x_S in tensors.items())
        assert isinstance(direction_S, Tensor)
        expected_S = length * direction_S / direction_S.norm()
        assert torch.allclose(of(merged_N, name).double(), expected_S, rtol=1e-5, atol=1e-7 * length)


def test_embeddings_and_vectors_are_plain_means() -> None:
    deltas = three()
    merged_N, mean_N = merge(FRAGMENT, deltas, WEIGHTS, rule="radial"), merge(FRAGMENT, deltas, WEIGHTS, rule="mean")
    assert same_bits(mean_N, aggregate(deltas, WEIGHTS))
    for name in ("embed.weight", "norm"):
        assert same_bits(of(merged_N, name), of(mean_N, name))
    assert not torch.allclose(of(merged_N, "up.weight"), of(mean_N, "up.weight"))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (8, 4), False), ("Embedding.weight", (8, 4), False), ("pos_embed", (8, 4), False),
        ("model.norm.weight", (8,), False), ("scale", (), False),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (8, 4), True), ("disembed.weight", (8, 4), True), ("conv", (2, 3, 4), True),
    ],
)  # fmt: skip
def test_what_has_a_direction(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_radial(Slot(name, shape, 0)) == expected


def test_one_peer_alone_gets_its_own_delta() -> None:
    x_N = vector(N, 3)
    assert torch.allclose(merge(FRAGMENT, {A: Decoded.of(x_N)}, {A: float_bits(1.0)}, rule="radial"), x_N, rtol=1e-6)


def test_orthogonal_deltas_do_not_shorten_the_step() -> None:
    deltas, size = {}, slot("up.weight").size
    for index, peer in enumerate((A, B)):
        x_N = torch.zeros(N)
        of(x_N, "up.weight")[index * size // 2 : (index + 1) * size // 2] = 1.0
        deltas[peer] = Decoded.of(x_N)
    halves = dict.fromkeys(deltas, float_bits(0.5))
    own = deltas[A].norm()
    assert math.isclose(Decoded.of(merge(FRAGMENT, deltas, halves, rule="radial")).norm(), own, rel_tol=1e-6)
    assert math.isclose(Decoded.of(merge(FRAGMENT, deltas, halves, rule="mean")).norm(), own / math.sqrt(2), rel_tol=1e-6)


def test_norms_of_zero_are_safe_and_count() -> None:
    zero, x = Decoded.of(torch.zeros(N)), Decoded.of(vector(N, 1))
    weights = {A: float_bits(0.25), B: float_bits(0.75)}
    nothing_N = merge(FRAGMENT, {A: zero, B: Decoded(N)}, weights, rule="radial")
    assert not nothing_N.any()
    quarter_N = merge(FRAGMENT, {A: x, B: zero}, weights, rule="radial")
    assert torch.allclose(quarter_N, x.dense() * 0.25, rtol=1e-6), "who has nothing shortens the step and turns nothing"
    weightless_N = merge(FRAGMENT, {A: x, B: Decoded.of(vector(N, 2))}, {A: float_bits(1.0), B: 0}, rule="radial")
    assert torch.allclose(weightless_N, x.dense(), rtol=1e-6)
    assert not merge(FRAGMENT, {A: x, B: x}, {A: 0, B: 0}, rule="radial").any()


def test_a_clip_shortens_its_peer_and_does_not_turn_it() -> None:
    deltas, clips = three(), {A: float_bits(1.0), B: float_bits(0.5), C: float_bits(0.125)}
    shorter = {p: Decoded.of(delta.dense() * c) for (p, delta), c in zip(deltas.items(), (1.0, 0.5, 0.125), strict=True)}
    for rule in ("mean", "radial"):
        clipped_N = merge(FRAGMENT, deltas, WEIGHTS, clips, rule=rule)
        assert torch.allclose(clipped_N, merge(FRAGMENT, shorter, WEIGHTS, rule=rule), rtol=1e-4, atol=1e-5)
        assert same_bits(merge(FRAGMENT, deltas, WEIGHTS, {}, rule=rule), merge(FRAGMENT, deltas, WEIGHTS, rule=rule))
        with pytest.raises(RejectedPayload):
            merge(FRAGMENT, deltas, WEIGHTS, {**clips, A: float_bits(1.5)}, rule=rule)


def test_directions_that_cancel_are_a_plain_mean() -> None:
    """What is left of them is rounding noise; blown up to full length it would be a random step."""
    x_N = vector(N, 1)
    deltas = {A: Decoded.of(x_N), B: Decoded.of(-x_N * 3), C: Decoded.of(vector(N, 2) * 0)}
    weights = {A: float_bits(0.4), B: float_bits(0.4), C: float_bits(0.2)}
    assert same_bits(merge(FRAGMENT, deltas, weights, rule="radial"), aggregate(deltas, weights))
    deltas[B] = Decoded.of(-x_N * 1.0001)
    assert same_bits(merge(FRAGMENT, deltas, weights, rule="radial"), aggregate(deltas, weights))


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.sampled_from([2.0**-149, 1e-40, 1e-20, 1.0, 1e20, 3e37])] * 3), st.integers(0, 9))
def test_norms_of_every_size_give_finite_steps(scales: tuple[float, float, float], seed: int) -> None:
    deltas = {p: Decoded.of(torch.sign(vector(N, seed + i)) * s) for i, (p, s) in enumerate(zip((A, B, C), scales, strict=True))}
    merged_N = merge(FRAGMENT, deltas, WEIGHTS, rule="radial")
    assert bool(torch.isfinite(merged_N).all())
    length = sum(w * norm_of([of(deltas[p].dense(), "up.weight").numpy()]) for p, w in ((A, 0.5), (B, 0.3), (C, 0.2)))
    assert math.isclose(norm_of([of(merged_N, "up.weight").numpy()]), length, rel_tol=1e-4, abs_tol=2.0**-146)


@given(st.permutations([A, B, C]), st.integers(0, 20))
def test_order_of_arrival_and_form_of_a_delta_change_no_bit(order: list[PeerId], seed: int) -> None:
    deltas = {p: vector(N, seed + i) * (vector(N, 99 + i) > 0) for i, p in enumerate((A, B, C))}
    expected_N = merge(FRAGMENT, {p: Decoded.of(x_N) for p, x_N in deltas.items()}, WEIGHTS, rule="radial")
    mixed = {p: sparse(deltas[p]) if p != B else Decoded.of(deltas[p]) for p in order}
    assert same_bits(merge(FRAGMENT, mixed, {p: WEIGHTS[p] for p in reversed(order)}, rule="radial"), expected_N)


@pytest.mark.parametrize("codec_name", CODEC_NAMES)
def test_packets_of_every_codec_merge_like_their_dense_forms(codec_name: str) -> None:
    fragment = large_fragment()
    packets = {p: encode_packet(fragment, vector(fragment.num_elements, i, 1e-3), codec_name) for i, p in enumerate((A, B, C))}
    deltas = {p: decode_packet(packet, fragment) for p, packet in packets.items()}
    dense = {p: Decoded.of(delta.dense()) for p, delta in deltas.items()}
    merged_N = merge(fragment, deltas, WEIGHTS, rule="radial")
    assert same_bits(merged_N, merge(fragment, dense, WEIGHTS, rule="radial"))
    assert all(same_bits(deltas[p].dense(), dense[p].dense()) for p in deltas), "inputs stay as they were"


def test_an_element_that_one_peer_sent_moves_as_far_as_it_says() -> None:
    def at(positions: list[int], values: list[float]) -> Decoded:
        return Decoded(N, (), np.array(positions, np.int64), np.array(values, np.float32))

    deltas = {A: at([0, 1], [1.0, 2.0]), B: at([1], [4.0]), C: at([5], [0.0])}
    merged_N = merge(FRAGMENT, deltas, WEIGHTS, rule="contributors")
    assert torch.allclose(merged_N[:2], torch.tensor([1.0, (0.5 * 2 + 0.3 * 4) / 0.8]))
    assert not merged_N[2:].any()
    clips = {A: float_bits(0.5), B: float_bits(1.0), C: float_bits(1.0)}
    assert torch.allclose(merge(FRAGMENT, deltas, WEIGHTS, clips, rule="contributors")[0], torch.tensor(0.5))


def test_dense_packets_have_one_mean() -> None:
    deltas = three()
    assert torch.allclose(merge(FRAGMENT, deltas, WEIGHTS, rule="contributors"), aggregate(deltas, WEIGHTS), rtol=1e-6)


def test_incomplete_rounds_bad_weights_and_unknown_rules_are_refused() -> None:
    deltas = three()
    with pytest.raises(ConfigError, match="median"):
        merge(FRAGMENT, deltas, WEIGHTS, rule="median")
    for rule in ("mean", "contributors", "radial"):
        with pytest.raises(IntegrityError):
            merge(FRAGMENT, {A: deltas[A]}, WEIGHTS, rule=rule)
        with pytest.raises(RejectedPayload):
            merge(FRAGMENT, deltas, {**WEIGHTS, B: 0x7F800000}, rule=rule)


# ---------------------------------------------------------------- rows


def test_a_row_is_the_mean_over_those_who_moved_it() -> None:
    fragment = build_layout([("layers.0.mlp.gate.weight", (4, 3))])[FragmentId("router/0")]
    deltas = {}
    for seed, (peer, rows) in enumerate({A: (0, 1), B: (1, 2), C: (1,)}.items()):
        values_ED = torch.zeros(4, 3)
        values_ED[list(rows)] = vector(3 * len(rows), seed).view(len(rows), 3)
        deltas[peer] = Decoded.of(values_ED.flatten())
    merged_ED = merge(fragment, deltas, WEIGHTS, rule="rows").view(4, 3)
    a, b, c = (deltas[p].dense().view(4, 3) for p in (A, B, C))
    torch.testing.assert_close(merged_ED[0], a[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(merged_ED[1], 0.5 * a[1] + 0.3 * b[1] + 0.2 * c[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged_ED[2], b[2], rtol=1e-6, atol=0)
    assert not merged_ED[3].any(), "nobody moved it"


def test_where_all_moved_all_rows_merging_them_is_the_mean() -> None:
    assert same_bits(merge(FRAGMENT, three(), WEIGHTS, rule="rows"), merge(FRAGMENT, three(), WEIGHTS, rule="mean"))


def test_rows_are_merged_alike_whether_packets_are_sparse_or_dense() -> None:
    values = {peer: vector(N, seed) for seed, peer in enumerate((A, B, C))}
    for seed, values_N in enumerate(values.values()):
        values_N[seed * 4 : seed * 4 + 8] = 0.0
    dense = merge(FRAGMENT, {p: Decoded.of(v) for p, v in values.items()}, WEIGHTS, rule="rows")
    assert same_bits(dense, merge(FRAGMENT, {p: sparse(v) for p, v in values.items()}, WEIGHTS, rule="rows"))


# ---------------------------------------------------------------- trimmed


@given(st.integers(3, 9), st.integers(0, 5), st.floats(0.0, 0.49), st.randoms(use_true_random=False))
def test_few_liars_move_nothing_beyond_the_honest(num_peers: int, seed: int, trim: float, rng: object) -> None:
    names = [PeerId(f"p{i}") for i in range(num_peers)]
    values = {p: vector(N, seed + i, 1.0) for i, p in enumerate(names)}
    hostile = rng.sample(names, num_trimmed(num_peers, trim))  # type: ignore[attr-defined]
    for i, p in enumerate(hostile):
        values[p] = vector(N, 99 + i, 1e6)
    weights = {p: float_bits(1.0 / num_peers) for p in names}
    merged_N = merge(FRAGMENT, {p: Decoded.of(v) for p, v in values.items()}, weights, rule="trimmed", trim=trim)
    honest = torch.stack([values[p] for p in names if p not in hostile])
    slack = 1e-6 * honest.abs().max()
    assert bool((merged_N <= honest.max(0).values + slack).all())
    assert bool((merged_N >= honest.min(0).values - slack).all())


def test_trimmed_is_the_mean_of_the_middle_and_of_equals_it_is_them() -> None:
    names = [PeerId(f"p{i}") for i in range(5)]
    weights = {p: float_bits(0.2) for p in names}
    x_N = vector(N, 1, 1.0)
    same = merge(FRAGMENT, {p: Decoded.of(x_N) for p in names}, weights, rule="trimmed")
    assert torch.allclose(same, x_N, rtol=1e-6)
    values = torch.stack([vector(N, i, 1.0) for i in range(5)])
    found = merge(FRAGMENT, {p: Decoded.of(v) for p, v in zip(names, values, strict=True)}, weights, rule="trimmed", trim=0.2)
    assert torch.allclose(found, values.sort(0).values[1:4].mean(0), rtol=1e-5, atol=1e-7)
    backwards = merge(
        FRAGMENT, {p: Decoded.of(v) for p, v in reversed(list(zip(names, values, strict=True)))}, weights, rule="trimmed", trim=0.2
    )
    assert same_bits(found, backwards)
    shuffled = merge(FRAGMENT, {p: Decoded.of(v) for p, v in zip(names, values.flip(0), strict=True)}, weights, rule="trimmed", trim=0.2)
    assert same_bits(found, shuffled), "it does not matter who said what"
    silent = weights | {names[0]: float_bits(0.0)}
    assert not same_bits(
        merge(FRAGMENT, {p: Decoded.of(v) for p, v in zip(names, values, strict=True)}, silent, rule="trimmed", trim=0.2), found
    )


def test_a_trimmed_merge_of_sparse_packets_is_refused() -> None:
    with pytest.raises(ConfigError, match="int4 and denser"):
        parse_config(Manifest, {"name": "x", "outer": {"merge": "trimmed"}, "codec": {"name": "int8", "sparsest": "topk64"}}, "test")
