from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.delta.packet import decode_packet, encode_packet, max_packet_bytes
from decentra.errors import ConfigError, RejectedPayload, TrainingError
from decentra.ids import FragmentId
from decentra.modules import Fragment, build_layout

from .helpers import CODEC_NAMES, DENSE_NAMES, SPARSE_NAMES, large_fragment, same_bits, small_fragment, vector

FRAGMENT, LARGE = small_fragment(), large_fragment()
N = FRAGMENT.num_elements
HEADER_BYTES, CRC_BYTES = 44, 4
CODE_AT, LENGTHS_AT = 6, 28


def packet(codec_name: str = "int8", seed: int = 1, fragment: Fragment = FRAGMENT) -> bytes:
    return encode_packet(fragment, vector(fragment.num_elements, seed), codec_name)


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


def test_a_packet_is_one_peers_of_one_round() -> None:
    data = encode_packet(FRAGMENT, vector(N, 1), "int8", peer="alice", round=7)
    assert data != encode_packet(FRAGMENT, vector(N, 1), "int8", peer="bob", round=7), "two peers never offer the same bytes"
    decode_packet(data, FRAGMENT, peer="alice", round=7, must_be_theirs=True)
    for peer, round, expected in (("mallory", 7, "relabelled"), ("alice", 8, "replayed")):
        with pytest.raises(RejectedPayload) as caught:
            decode_packet(data, FRAGMENT, peer=peer, round=round, must_be_theirs=True)
        assert (caught.value.reason, caught.value.peer, caught.value.round) == (expected, peer, round)
    for cut in (0, HEADER_BYTES - 1, len(data) - 1):
        with pytest.raises(RejectedPayload) as caught:
            decode_packet(data[:cut], FRAGMENT, peer="alice", round=7, must_be_theirs=True)
        assert caught.value.reason in ("size", "malformed"), "truncated"


@pytest.mark.parametrize("codec_name", DENSE_NAMES)
def test_round_trip(codec_name: str) -> None:
    x_N, data = vector(N, 1), packet(codec_name)
    assert len(data) == max_packet_bytes(FRAGMENT, codec_name)
    y_N = decode_packet(data, FRAGMENT).dense()
    assert torch.allclose(x_N, y_N, atol={"fp32": 0.0, "int4": 0.3}.get(codec_name, 0.02))
    assert same_bits(decode_packet(bytearray(data), FRAGMENT).dense(), y_N)
    assert same_bits(decode_packet(memoryview(data), FRAGMENT).dense(), y_N)


def test_norms_and_scalars_travel_as_bf16_in_an_int8_packet() -> None:
    x_N, y_N = vector(N, 1), decode_packet(packet("int8"), FRAGMENT).dense()
    for part in (slice(0, 3), slice(133, 134)):
        assert same_bits(y_N[part], x_N[part].to(torch.bfloat16).float())
    assert max_packet_bytes(FRAGMENT, "int8") == HEADER_BYTES + CRC_BYTES + (2 * 4 + 130) + (3 + 1) * 2


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
    # a length field that promises 2**64 - 1 bytes, and lengths that are right in sum only
    for lengths in ((2**64 - 1, 8), (2**63, 8), (5, 8), (137, 9)):
        assert reason(forged(lambda b, n=lengths: struct.pack_into("<QQ", b, LENGTHS_AT, *n))) == "size"  # type: ignore[misc]


def test_the_frame_is_judged() -> None:
    assert reason(forged(lambda b: struct.pack_into("<4s", b, 0, b"XXXX"))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<H", b, 4, 1))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<Q", b, 8, 0))) == "shape"
    assert reason(forged(lambda b: struct.pack_into("<H", b, CODE_AT, 77))) == "codec"
    assert reason(forged(lambda b: struct.pack_into("<H", b, CODE_AT, 1))) == "size"
    assert reason(packet()[:30] + bytes([packet()[30] ^ 1]) + packet()[31:]) == "malformed"


def test_values_are_judged() -> None:
    assert reason(forged(lambda b: struct.pack_into("<f", b, HEADER_BYTES, float("nan")), "fp32")) == "not-finite"
    assert reason(forged(lambda b: struct.pack_into("<H", b, HEADER_BYTES, 0x7F80), "bf16")) == "not-finite"
    assert reason(forged(lambda b: struct.pack_into("<f", b, HEADER_BYTES, -1.0))) == "malformed"
    assert reason(forged(lambda b: struct.pack_into("<f", b, HEADER_BYTES, 3.4e38))) == "not-finite"  # finite itself, its products are not


@pytest.mark.parametrize("codec_name", SPARSE_NAMES)
def test_a_sparse_packet_keeps_the_largest_of_each_chunk_and_everything_small(codec_name: str) -> None:
    """Chunks start anew with every matrix; norms and router rows travel dense."""
    x_N = vector(LARGE.num_elements, 1)
    data = encode_packet(LARGE, x_N, codec_name)
    assert len(data) <= max_packet_bytes(LARGE, codec_name)
    y_N = decode_packet(data, LARGE).dense()
    k = int(codec_name.removeprefix("topk"))
    for slot in LARGE.slots:
        x, y = x_N[slot.offset : slot.offset + slot.size], y_N[slot.offset : slot.offset + slot.size]
        if slot.size < 4096:
            assert torch.allclose(x, y, atol=0.02)
            continue
        for start in range(0, slot.size, 4096):
            chunk, kept = x[start : start + 4096], y[start : start + 4096]
            num_kept = max(1, k * len(chunk) // 4096)
            assert kept.count_nonzero() == num_kept
            assert torch.equal((kept != 0).nonzero()[:, 0], chunk.abs().topk(num_kept).indices.sort().values)
            assert torch.equal(kept.sign(), torch.where(kept != 0, chunk.sign(), 0.0))
            mean = float(chunk.abs().topk(num_kept).values.mean())
            assert float(kept.abs().max()) == pytest.approx(mean, rel=0.045)  # scales lie an eighth of an octave apart


def test_a_packet_of_another_fragment_is_refused() -> None:
    shapes = [(f"m.mlp.experts.{e}.up_proj.weight", (4, 4)) for e in (0, 1)]
    layout = build_layout(shapes)
    one, two = layout[FragmentId("expert.0/0")], layout[FragmentId("expert.1/0")]
    data = encode_packet(one, vector(16, 1), "fp32")
    with pytest.raises(RejectedPayload) as caught:
        decode_packet(data, two)
    assert caught.value.reason == "shape"


def decodes_or_is_refused(data: bytes, fragment: Fragment = FRAGMENT) -> None:
    try:
        y_N = decode_packet(data, fragment).dense()
    except RejectedPayload:
        return
    assert y_N.shape == (fragment.num_elements,)
    assert bool(torch.isfinite(y_N).all())


@given(st.binary(max_size=800))
def test_random_bytes_never_crash(data: bytes) -> None:
    decodes_or_is_refused(data)
    decodes_or_is_refused(sealed(packet()[:HEADER_BYTES] + data))
    sparse = packet("topk64", fragment=LARGE)
    body = data.ljust(len(sparse) - HEADER_BYTES - CRC_BYTES, data[:1] or b"\0")
    decodes_or_is_refused(sealed(sparse[:HEADER_BYTES] + body), LARGE)


@given(st.sampled_from(CODEC_NAMES), st.data())
def test_mutated_and_cut_packets_never_crash(codec_name: str, data: st.DataObject) -> None:
    fragment = data.draw(st.sampled_from([FRAGMENT, LARGE]))
    body = bytearray(packet(codec_name, fragment=fragment)[:-CRC_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1) | st.integers(0, 60))
        body[at : at + 1] = data.draw(st.binary(max_size=3))
        if not body:
            break
    decodes_or_is_refused(bytes(body), fragment)
    decodes_or_is_refused(sealed(body), fragment)
    decodes_or_is_refused(sealed(body[: data.draw(st.integers(0, len(body)))]), fragment)


@given(st.integers(0, len(packet()) * 8 - 1))
def test_one_flipped_bit_is_always_seen(bit: int) -> None:
    data = bytearray(packet())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RejectedPayload):
        decode_packet(bytes(data), FRAGMENT)
