"""A round's packets as one packet, so that what a peer downloads does not grow with the number of senders. Made by reducers; pure.

With m the merge of the settled packets (``merge.py``) and r the residual of the reductions before: packet = encode(m + r), r' = (m + r) -
decode(packet): error feedback on the way down, as EF21 has it in both directions (arXiv 2510.00643). Nothing is lost, some of it comes a round later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.anchor import AnchorState, decode_anchor, encode_anchor, max_anchor_bytes
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.raw import FLOAT_BYTES
from decentra.errors import IntegrityError, RejectedPayload, TrainingError
from decentra.ids import MERGED
from decentra.modules import Fragment

# N elements of a fragment


def max_residual_bytes(fragment: Fragment) -> int:
    """Size of a residual's blob: an anchor without momentum."""
    return max_anchor_bytes(fragment) - FLOAT_BYTES * fragment.num_elements


def reduce_packets(fragment: Fragment, merged_N: Tensor, residual: Buffer | None, codec_name: str, round: int) -> tuple[bytes, bytes]:
    """(packet, new residual) of the merged deltas, fp32 [N]; a residual travels in the form of an anchor, and None is zero.

    Raises IntegrityError when the residual that came is not one of this fragment, or the sum is not finite.
    """
    raw_N = merged_N
    try:
        if residual is not None:
            raw_N = torch.add(merged_N, decode_anchor(fragment, residual).anchor_N)
        packet = encode_packet(fragment, raw_N, codec_name, peer=MERGED, round=round)
        left_N = decode_packet(packet, fragment, peer="self").subtracted_from(raw_N)
        return packet, encode_anchor(fragment, AnchorState(left_N))
    except (RejectedPayload, TrainingError) as error:
        raise IntegrityError(f"the packets of {fragment.id} cannot be merged: {getattr(error, 'detail', error)}") from None
