"""Merged packets: nothing of the packets is lost between the packet and what it left out, and everybody makes the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.bits import float_bits
from decentra.delta.aggregate import aggregate
from decentra.delta.anchor import AnchorState, decode_anchor, encode_anchor
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.reduce import reduce_packets
from decentra.errors import IntegrityError
from decentra.ids import FragmentId, PeerId
from decentra.modules import build_layout

from .helpers import CODEC_NAMES, same_bits, small_fragment, vector

FRAGMENT = small_fragment()
N = FRAGMENT.num_elements


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(CODEC_NAMES), min_size=1, max_size=5), st.sampled_from(CODEC_NAMES), st.integers(0, 99), st.booleans())
def test_the_packet_and_what_it_left_are_all_there_was(senders: list[str], codec: str, seed: int, has_residual: bool) -> None:
    packets = {PeerId(f"p{i}"): encode_packet(FRAGMENT, vector(N, seed + i), name) for i, name in enumerate(senders)}
    weights = {peer: float_bits(1 / len(packets)) for peer in packets}
    residual_N = vector(N, seed + 50) if has_residual else torch.zeros(N)
    blob = encode_anchor(FRAGMENT, AnchorState(residual_N)) if has_residual else None

    mean_N = aggregate({p: decode_packet(d, FRAGMENT) for p, d in packets.items()}, weights)
    packet, left = reduce_packets(FRAGMENT, mean_N, blob, codec, 3)
    assert (packet, left) == reduce_packets(FRAGMENT, mean_N.clone(), blob, codec, 3)
    sent_N, left_N = decode_packet(packet, FRAGMENT).dense(), decode_anchor(FRAGMENT, left).anchor_N
    assert same_bits(left_N, (mean_N + residual_N) - sent_N)


def test_a_foreign_residual_is_an_error_that_says_so() -> None:
    other = build_layout([("x.weight", (7,))])[FragmentId("trunk/0")]
    foreign = encode_anchor(other, AnchorState(torch.zeros(7)))
    for blob in (foreign, b"", b"x" * 100):
        with pytest.raises(IntegrityError, match="cannot be merged"):
            reduce_packets(FRAGMENT, vector(N, 1), blob, "int8", 3)
