"""The sparse codec's parts: which values are kept, and what naming them costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.delta.codec.support import CHUNK_ELEMENTS, decode_support, encode_support, max_support_bytes, support_bits
from decentra.delta.codec.topk import SCALES, TopK, top_rows
from decentra.delta.raw import Ints
from decentra.errors import RejectedPayload
from decentra.ids import digest_of

from .helpers import vector

counts = st.lists(st.integers(1, 300) | st.sampled_from([1, 2, 64, 4096]), min_size=1, max_size=6)


def support(kept: list[int], seed: int) -> Ints:
    rng = np.random.default_rng(seed)
    return np.concatenate([np.sort(rng.choice(CHUNK_ELEMENTS, k, replace=False)) for k in kept])


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(0, 1 << 30))
def test_a_support_comes_back_at_the_size_of_its_name(kept: list[int], seed: int) -> None:
    kept_M, positions_K = np.array(kept), support(kept, seed)
    data = encode_support(positions_K, kept_M)
    assert np.array_equal(decode_support(data, kept_M), positions_K)
    assert len(data) <= max_support_bytes(kept_M)
    assert len(data) * 8 <= support_bits(kept_M) * 1.001 + 112


@pytest.mark.parametrize("kept", [1, 2, 63, 64, 4095, 4096])
@pytest.mark.parametrize("where", ["first", "last", "even"])
def test_no_support_costs_more_than_another(kept: int, where: str) -> None:
    """Also the least random ones: that makes the size of an offer a bound."""
    positions_K = {
        "first": np.arange(kept),
        "last": np.arange(CHUNK_ELEMENTS - kept, CHUNK_ELEMENTS),
        "even": np.arange(kept) * (CHUNK_ELEMENTS // kept),
    }[where]
    kept_M = np.array([kept])
    data = encode_support(positions_K, kept_M)
    assert np.array_equal(decode_support(data, kept_M), positions_K)
    assert len(data) <= max_support_bytes(kept_M)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=600), counts)
def test_any_bytes_name_a_support_or_are_refused(data: bytes, kept: list[int]) -> None:
    kept_M = np.array(kept)
    try:
        positions_K = decode_support(data[: len(data) // 4 * 4 + 2], kept_M)
    except RejectedPayload:
        return
    assert len(positions_K) == sum(kept)
    for chunk in np.split(positions_K, np.cumsum(kept)[:-1]):
        assert bool((np.diff(chunk) > 0).all())
        assert 0 <= chunk[0] <= chunk[-1] < CHUNK_ELEMENTS


def test_the_index_code_meets_the_bound_on_a_large_matrix() -> None:
    kept_M = np.full(500, 64)
    positions_K = support([64] * 500, 1)
    assert len(encode_support(positions_K, kept_M)) * 8 <= 1.0005 * support_bits(kept_M) + 112


def test_clustered_supports_cost_less_than_the_bound() -> None:
    """Rows of 256 columns of which some move eight times as often."""
    rng = np.random.default_rng(1)
    weight = np.repeat(rng.choice([1.0, 8.0], (500, 16), p=[0.8, 0.2]), 256, axis=1)
    positions_K = np.concatenate([np.sort(rng.choice(CHUNK_ELEMENTS, 64, replace=False, p=w / w.sum())) for w in weight])
    kept_M = np.full(500, 64)
    data = encode_support(positions_K, kept_M)
    assert np.array_equal(decode_support(data, kept_M), positions_K)
    assert len(data) * 8 < 0.95 * support_bits(kept_M)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 1 << 30), st.sampled_from([2, 5, 1000, 1 << 20]))
def test_the_largest_are_kept_and_of_equals_the_first(k: int, seed: int, num_values: int) -> None:
    x_MC = torch.randint(-num_values, num_values, (7, 40), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.argsort(x_MC.abs(), dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert np.array_equal(top_rows(x_MC.numpy(), k).reshape(7, k), expected.numpy())


@pytest.mark.parametrize("k", [16, 64, 256])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "zeros", "one row"])
def test_the_fast_selection_is_the_selection(k: int, kind: str) -> None:
    x_MC = vector(64 * CHUNK_ELEMENTS, 3).view(64, CHUNK_ELEMENTS)
    x_MC = {
        "normal": x_MC,
        "heavy": x_MC**7,
        "ties": x_MC.round(),
        "zeros": x_MC * (x_MC > 2.5),
        "one row": torch.where(torch.arange(CHUNK_ELEMENTS) % 64 == 0, x_MC * 100, x_MC),  # what a regular sample would miss or overrate
    }[kind].contiguous()
    expected = torch.argsort(x_MC.abs(), dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert np.array_equal(top_rows(x_MC.numpy(), k).reshape(64, k), expected.numpy())


def test_scales_are_the_same_numbers_everywhere() -> None:
    assert len(SCALES) == 256
    assert SCALES[0] == 0
    assert bool((np.diff(SCALES) > 0).all())
    assert np.allclose(np.diff(np.log2(SCALES[1:])), 0.125, atol=1e-6)
    assert digest_of(SCALES.astype("<f4").tobytes()) == "dbc86aee98460a9f704656c6eca97d36a865d27a665cf24f01d8aa48b3932d28"


def test_no_chunk_crosses_a_tensor() -> None:
    codec, sizes = TopK(64, 18), (4096, 5000, 8192, 70)
    x_N = vector(sum(sizes), 1)
    whole = codec.decode(codec.encode(x_N, sizes), sizes)
    values_N = np.zeros(sum(sizes), np.float32)
    values_N[whole.positions_K] = whole.values_K
    at = 0
    for size in sizes:
        alone = codec.decode(codec.encode(x_N[at : at + size].contiguous(), (size,)), (size,))
        values_n = np.zeros(size, np.float32)
        values_n[alone.positions_K] = alone.values_K
        assert np.array_equal(values_N[at : at + size], values_n)
        at += size
