from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.delta.anchor import AnchorState, anchor_digest, decode_anchor, encode_anchor, max_anchor_bytes
from decentra.errors import RejectedPayload
from decentra.ids import FragmentId, digest_of
from decentra.modules import build_layout

from .helpers import same_bits, small_fragment, vector

FRAGMENT = small_fragment()
N = FRAGMENT.num_elements


def state(has_momentum: bool) -> AnchorState:
    return AnchorState(vector(N, 1), vector(N, 2) if has_momentum else None)


@pytest.mark.parametrize("has_momentum", [False, True])
def test_round_trip_is_bit_equal_and_canonical(has_momentum: bool) -> None:
    data = encode_anchor(FRAGMENT, state(has_momentum))
    assert data == encode_anchor(FRAGMENT, state(has_momentum))
    assert anchor_digest(data) == digest_of(data)
    assert len(data) <= max_anchor_bytes(FRAGMENT)
    back = decode_anchor(FRAGMENT, data)
    assert same_bits(back.anchor_N, state(has_momentum).anchor_N)
    assert (back.momentum_N is not None) == has_momentum
    assert encode_anchor(FRAGMENT, back) == data


def test_digest_covers_the_outer_state() -> None:
    plain, moved = state(True), AnchorState(state(True).anchor_N, vector(N, 3))
    assert encode_anchor(FRAGMENT, plain) != encode_anchor(FRAGMENT, moved)


def test_result_owns_its_memory() -> None:
    data = bytearray(encode_anchor(FRAGMENT, state(False)))
    back = decode_anchor(FRAGMENT, data)
    before = back.anchor_N.clone()
    data[40:] = bytes(len(data) - 40)
    assert same_bits(back.anchor_N, before)


def reason(data: bytes) -> str:
    with pytest.raises(RejectedPayload) as caught:
        decode_anchor(FRAGMENT, data)
    return caught.value.reason


def test_every_refusal_has_its_reason() -> None:
    good = encode_anchor(FRAGMENT, state(False))
    assert reason(b"") == "size"
    assert reason(good[:-1]) == "size"
    assert reason(good + b"\0") == "size"
    assert reason(good + bytes(10 * len(good))) == "size"
    assert reason(b"XXXX" + good[4:]) == "malformed"
    assert reason(good[:4] + b"\xff\xff" + good[6:]) == "malformed"
    assert reason(good[:6] + b"\xff\xff" + good[8:]) == "malformed"
    assert reason(good[:-4] + b"\x00\x00\xc0\x7f") == "not-finite"
    other = build_layout([("a.norm", (3,)), ("b.weight", (13, 10)), ("d.scalar", ())])[FragmentId("trunk/0")]
    assert reason(encode_anchor(other, state(False))) == "shape"


def test_an_infinite_anchor_is_never_published() -> None:
    bad = AnchorState(vector(N, 1), torch.full((N,), float("inf")))
    with pytest.raises(RejectedPayload, match="not-finite"):
        encode_anchor(FRAGMENT, bad)


@given(st.binary(max_size=max_anchor_bytes(FRAGMENT) + 8), st.booleans())
def test_any_bytes_decode_or_are_refused(tail: bytes, has_header: bool) -> None:
    data = encode_anchor(FRAGMENT, state(False))[:24] + tail if has_header else tail
    try:
        back = decode_anchor(FRAGMENT, data)
    except RejectedPayload:
        return
    assert encode_anchor(FRAGMENT, back) == data
