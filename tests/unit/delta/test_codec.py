from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from decentra.delta.codec import CODECS, Codec, codec_by_code, codec_named
from decentra.errors import ConfigError, RejectedPayload

from .helpers import CODEC_NAMES, DENSE_NAMES, finite_floats, same_bits, vector

FLT_MAX = 3.4028234663852886e38


def test_registry_knows_names_and_codes() -> None:
    assert tuple(c.name for c in CODECS) == CODEC_NAMES
    assert [codec_by_code(c.code) for c in CODECS] == list(CODECS)
    with pytest.raises(ConfigError, match="fp32, bf16, int8, int4, topk16"):
        codec_named("zip")
    with pytest.raises(RejectedPayload, match="codec"):
        codec_by_code(99)


@pytest.mark.parametrize("codec", [codec_named(n) for n in DENSE_NAMES], ids=lambda c: c.name)
@given(st.lists(finite_floats, max_size=300))
@example([FLT_MAX, -FLT_MAX])
@example([1e-45] * 130)
@example([0.0] * 128 + [1.0])
@example([])
def test_decoded_values_are_finite_near_and_of_the_promised_size(codec: Codec, values: list[float]) -> None:
    x_N = torch.tensor(values, dtype=torch.float32)
    sizes = (len(values),)
    data = codec.encode(x_N, sizes)
    assert len(data) == codec.encoded_size(sizes) == codec.max_size(sizes)
    y_N = codec.decode(data, sizes)
    assert isinstance(y_N, torch.Tensor)
    assert y_N.dtype == torch.float32
    assert y_N.shape == x_N.shape
    assert bool(torch.isfinite(y_N).all())
    error_N = (x_N.double() - y_N.double()).abs()
    if codec.name == "fp32":
        assert same_bits(x_N, y_N)
    elif codec.name == "bf16":
        # half a unit in the last of 8 places; one whole where the largest values saturate
        assert bool((error_N <= x_N.double().abs() * 2**-8 + 1e-40).all())
    else:
        levels = 127 if codec.name == "int8" else 7
        for start in range(0, len(values), 128):
            block = slice(start, start + 128)
            # a subnormal scale loses up to half of the smallest fp32 in each level
            assert bool((error_N[block] <= x_N[block].double().abs().max() / levels * 0.501 + 128 * 1.5e-45).all())


def there_and_back(name: str, x_N: torch.Tensor) -> torch.Tensor:
    y_N = codec_named(name).decode(codec_named(name).encode(x_N, (x_N.numel(),)), (x_N.numel(),))
    assert isinstance(y_N, torch.Tensor)
    return y_N


def test_bf16_agrees_with_torch() -> None:
    x_N = torch.cat([vector(5000, 1, scale) for scale in (1e-30, 1e-3, 1.0, 1e30)])
    ties_N = (torch.arange(1, 4000, dtype=torch.int32) * 0x8000 + 0x3F000000).view(torch.float32)
    for v_N in (x_N, ties_N):
        assert same_bits(there_and_back("bf16", v_N), v_N.to(torch.bfloat16).float())


def test_int8_blocks_do_not_touch_each_other() -> None:
    x_N = torch.cat([torch.full((128,), 1e6), torch.zeros(128), torch.full((5,), 1e-6)])
    assert torch.allclose(there_and_back("int8", x_N), x_N, rtol=1e-6, atol=0)


def test_int8_absmax_comes_back_exactly_enough() -> None:
    y_N = there_and_back("int8", torch.tensor([127.0, -63.0, 0.4, 0.6]))
    assert y_N.tolist() == [127.0, -63.0, 0.0, 1.0]


def test_int4_values_lie_in_halves_of_bytes() -> None:
    x_N = torch.tensor([7.0, -7.0, 3.4, 0.0, -1.0])
    data = codec_named("int4").encode(x_N, (2, 3))
    assert data == struct.pack("<f", 1.0) + bytes([15 | 1 << 4, 11 | 8 << 4, 7 | 8 << 4])
    assert there_and_back("int4", x_N).tolist() == [7.0, -7.0, 3.0, 0.0, -1.0]
    for bad, why in ((bytes([0 | 8 << 4]), "below -7"), (bytes([15 | 9 << 4]), "odd last half")):
        with pytest.raises(RejectedPayload, match=why):
            codec_named("int4").decode(struct.pack("<f", 1.0) + bad, (1,))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("<f", float("nan")) + b"\x01", "not-finite"),
        (struct.pack("<f", float("inf")) + b"\x01", "not-finite"),
        (struct.pack("<f", -1.0) + b"\x01", "malformed"),
        (struct.pack("<f", 1.0) + b"\x80", "malformed"),
    ],
)
def test_int8_refuses_what_it_would_never_write(data: bytes, reason: str) -> None:
    with pytest.raises(RejectedPayload) as caught:
        codec_named("int8").decode(data, (1,))
    assert caught.value.reason == reason
