from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.delta.packet import decode_packet, encode_packet, max_packet_bytes
from decentra.errors import ConfigError, RejectedPayload, TrainingError
from decentra.ids import FragmentId
from decentra.modules import build_layout

from .helpers import CODEC_NAMES, same_bits, small_fragment, vector

FRAGMENT = small_fragment()
N = FRAGMENT.num_elements
HEADER_BYTES, SECTION_BYTES, CRC_BYTES = 20, 14, 4


def packet(codec_name: str = "int8", seed: int = 1) -> bytes:
    return encode_packet(FRAGMENT, vector(N, seed), codec_name)


def sealed(body: bytes | bytearray) -> bytes:
    """``body`` with a checksum that holds: what a peer sends that lies on purpose."""
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


def forged(change: Callable[[bytearray], None], codec_name: str = "int8") -> bytes:
    body = bytearray(packet(codec_name)[:-CRC_BYTES])
    change(body)
    return sealed(body)


def reason(data: bytes) -> str:
    with pytest.raises(RejectedPayload) as caught:
        decode_packet(data, FRAGMENT, peer="mallory", round=7)
    assert caught.value.peer == "mallory"
    assert caught.value.round == 7
    return caught.value.reason


@pytest.mark.parametrize("codec_name", CODEC_NAMES)
def test_round_trip(codec_name: str) -> None:
    x_N, data = vector(N, 1), packet(codec_name)
    assert len(data) == max_packet_bytes(FRAGMENT, codec_name)
    y_N = decode_packet(data, FRAGMENT)
    assert torch.allclose(x_N, y_N, atol=0 if codec_name == "fp32" else 0.02)
    assert same_bits(decode_packet(bytearray(data), FRAGMENT), y_N)
    assert same_bits(decode_packet(memoryview(data), FRAGMENT), y_N)


def test_norms_and_scalars_travel_as_bf16_in_an_int8_packet() -> None:
    x_N, y_N = vector(N, 1), decode_packet(packet("int8"), FRAGMENT)
    for part in (slice(0, 3), slice(133, 134)):
        assert same_bits(y_N[part], x_N[part].to(torch.bfloat16).float())
    assert max_packet_bytes(FRAGMENT, "int8") == HEADER_BYTES + CRC_BYTES + 4 * SECTION_BYTES + 3 * 2 + (2 * 4 + 130) + 0 + 2


def test_encoding_refuses_what_is_not_finite_or_unknown() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        encode_packet(FRAGMENT, torch.full((N,), float("nan")), "int8")
    with pytest.raises(ConfigError):
        encode_packet(FRAGMENT, vector(N, 1), "zip")


def test_lengths_are_judged() -> None:
    good = packet()
    assert reason(b"") == "size"
    assert reason(good[:23]) == "size"
    assert reason(good + bytes(10_000)) == "size"
    assert reason(good[:-1]) == "malformed"
    assert reason(sealed(good[:-CRC_BYTES] + b"\0")) == "size"
    assert reason(sealed(good[:-20])) == "size"
    # a length field that promises 2**64 - 1 bytes, and one that is short by one
    for length in (2**64 - 1, 2**63, 5):
        assert reason(forged(lambda b, n=length: struct.pack_into("<Q", b, HEADER_BYTES + 6, n))) == "size"  # type: ignore[misc]


def test_frame_and_sections_are_judged() -> None:
    assert reason(forged(lambda b: struct.pack_into("<4s", b, 0, b"XXXX"))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<H", b, 4, 2))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<H", b, 6, 1))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<Q", b, 8, 0))) == "shape"
    assert reason(forged(lambda b: struct.pack_into("<I", b, 16, 3))) == "shape"
    assert reason(forged(lambda b: struct.pack_into("<I", b, HEADER_BYTES, 1))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<H", b, HEADER_BYTES + 4, 77))) == "codec"
    assert reason(packet()[:30] + bytes([packet()[30] ^ 1]) + packet()[31:]) == "malformed"


def test_values_are_judged() -> None:
    first = HEADER_BYTES + SECTION_BYTES
    assert reason(forged(lambda b: struct.pack_into("<f", b, first, float("nan")), "fp32")) == "not-finite"
    assert reason(forged(lambda b: struct.pack_into("<H", b, first, 0x7F80), "bf16")) == "not-finite"
    scale = first + 6 + SECTION_BYTES
    assert reason(forged(lambda b: struct.pack_into("<f", b, scale, -1.0))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<f", b, scale, 3.4e38))) == "not-finite"  # finite itself, its products are not


def test_a_packet_of_another_fragment_is_refused() -> None:
    shapes = [(f"m.mlp.experts.{e}.up_proj.weight", (4, 4)) for e in (0, 1)]
    layout = build_layout(shapes)
    one, two = layout[FragmentId("expert.0/0")], layout[FragmentId("expert.1/0")]
    data = encode_packet(one, vector(16, 1), "fp32")
    with pytest.raises(RejectedPayload) as caught:
        decode_packet(data, two)
    assert caught.value.reason == "shape"


def decodes_or_is_refused(data: bytes) -> None:
    try:
        y_N = decode_packet(data, FRAGMENT)
    except RejectedPayload:
        return
    assert y_N.shape == (N,)
    assert bool(torch.isfinite(y_N).all())


@settings(deadline=None)
@given(st.binary(max_size=800))
def test_random_bytes_never_crash(data: bytes) -> None:
    decodes_or_is_refused(data)
    decodes_or_is_refused(sealed(packet()[:HEADER_BYTES] + data))


@settings(deadline=None)
@given(st.sampled_from(CODEC_NAMES), st.data())
def test_mutated_and_cut_packets_never_crash(codec_name: str, data: st.DataObject) -> None:
    body = bytearray(packet(codec_name)[:-CRC_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1) | st.integers(0, 60))
        body[at : at + 1] = data.draw(st.binary(max_size=3))
        if not body:
            break
    decodes_or_is_refused(bytes(body))
    decodes_or_is_refused(sealed(body))
    decodes_or_is_refused(sealed(body[: data.draw(st.integers(0, len(body)))]))


@settings(deadline=None)
@given(st.integers(0, len(packet()) * 8 - 1))
def test_one_flipped_bit_is_always_seen(bit: int) -> None:
    data = bytearray(packet())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RejectedPayload):
        decode_packet(bytes(data), FRAGMENT)
