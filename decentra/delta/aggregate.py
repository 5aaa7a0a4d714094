"""The weighted sum of a round's deltas, bit-equal on every machine. It judges nothing and normalises no weight: the settlement did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decentra.bits import ONE_BITS, bits_float, float_bits
from decentra.delta.decoded import Decoded
from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import PeerId

__all__ = ["aggregate", "bits_float", "checked_clip", "checked_scalars", "float_bits"]

# N elements of a fragment, P peers

Bits = Mapping[PeerId, int]  # float32 bits


def aggregate(deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None = None) -> Tensor:
    """Sum over P of (weight * clip) * delta, fp32 [N]; weights and clips are float32 bits, a clip is 1 where it is not given.

    From +0 in ascending order of peer id, only elementwise mul and add: every CPU gets the same bits. Raises IntegrityError when deltas and
    weights are of different peers or there are none, RejectedPayload for a weight that is not finite or is negative and for a clip outside 0 to 1.
    """
    scalars = checked_scalars(deltas, weight_bits, clip_bits)
    total_N = torch.zeros(next(iter(deltas.values())).num_elements)
    for peer, (weight, clip) in scalars.items():
        deltas[peer].add_to(total_N, weight * clip)  # exact in fp64, and there rounded to fp32
    return total_N


def checked_scalars(
    deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None = None
) -> dict[PeerId, tuple[float, float]]:
    """Every peer's weight and clip, in ascending order of peer id. Raises as ``aggregate`` does."""
    if not deltas or deltas.keys() != weight_bits.keys():
        raise IntegrityError(
            f"expected one delta for every settled offer, got deltas of {sorted(deltas)}, weights of {sorted(weight_bits)};"
            " fetch what is missing"
        )
    assert len({delta.num_elements for delta in deltas.values()}) == 1, "deltas of one round have one shape"
    clips = {} if clip_bits is None else clip_bits
    return {peer: (_weight(peer, weight_bits[peer]), checked_clip(peer, clips.get(peer, ONE_BITS))) for peer in sorted(deltas)}


def checked_clip(peer: str, bits: int) -> float:
    """A clip's value. Raises RejectedPayload when it is not in 0 to 1."""
    clip = bits_float(bits)
    if not 0 <= clip <= 1:
        raise RejectedPayload("malformed", f"the settlement gives {peer} the clip {clip}; a clip is in 0 to 1")
    return clip


def _weight(peer: PeerId, bits: int) -> float:
    weight = bits_float(bits)
    if weight < 0:
        raise RejectedPayload("malformed", f"the settlement gives {peer} the weight {weight}; a weight is not negative")
    return weight
