"""A round's packets as one packet, so that what a peer downloads does not grow with the number of senders. Made by reducers; pure.

With mean m of the settled packets and residual r of the merges before: packet = encode(m + r), r' = (m + r) - decode(packet): error feedback on the
way down, as EF21 has it in both directions (arXiv 2510.00643). Nothing is lost, some of it comes a round later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from decentra.bits import Buffer
from decentra.delta.aggregate import aggregate
from decentra.delta.anchor import AnchorState, decode_anchor, encode_anchor
from decentra.delta.decoded import Decoded
from decentra.delta.packet import decode_packet, encode_packet
from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import PeerId
from decentra.modules import Fragment

# N elements of a fragment


def reduce_packets(
    fragment: Fragment, deltas: Mapping[PeerId, Decoded], weight_bits: Mapping[PeerId, int], residual: Buffer | None, codec_name: str
) -> tuple[bytes, bytes]:
    """(packet, new residual); a residual travels in the form of an anchor, and None is zero.

    Raises IntegrityError when the residual that came is not one of this fragment, or the sum is not finite.
    """
    raw_N = aggregate(deltas, weight_bits)
    try:
        if residual is not None:
            raw_N = torch.add(raw_N, decode_anchor(fragment, residual).anchor_N)
        packet = encode_packet(fragment, raw_N, codec_name)
        left_N = decode_packet(packet, fragment, peer="self").subtracted_from(raw_N)
        return packet, encode_anchor(fragment, AnchorState(left_N))
    except RejectedPayload as error:
        raise IntegrityError(f"the packets of {fragment.id} cannot be merged: {error.detail}") from None
