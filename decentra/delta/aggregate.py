"""The weighted sum of a round's deltas, bit-equal on every machine. It judges nothing and normalises no weight: the settlement did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decentra.bits import bits_float, float_bits
from decentra.delta.decoded import Decoded
from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import PeerId

__all__ = ["aggregate", "bits_float", "float_bits"]

# N elements of a fragment, P peers


def aggregate(deltas: Mapping[PeerId, Decoded], weight_bits: Mapping[PeerId, int]) -> Tensor:
    """Sum over P of weight * delta, fp32 [N]; ``weight_bits`` are float32 bits.

    From +0 in ascending order of peer id, only elementwise mul and add: every CPU gets the same bits. Raises IntegrityError when deltas and
    weights are of different peers or there are none, RejectedPayload for a weight that is not finite or is negative.
    """
    weights = checked_scalars(deltas, weight_bits)
    total_N = torch.zeros(next(iter(deltas.values())).num_elements)
    for peer, weight in weights.items():
        deltas[peer].add_to(total_N, weight)
    return total_N


def checked_scalars(deltas: Mapping[PeerId, Decoded], weight_bits: Mapping[PeerId, int]) -> dict[PeerId, float]:
    """Every peer's weight, in ascending order of peer id. Raises as ``aggregate`` does."""
    if not deltas or deltas.keys() != weight_bits.keys():
        raise IntegrityError(
            f"expected one delta for every settled offer, got deltas of {sorted(deltas)}, weights of {sorted(weight_bits)};"
            " fetch what is missing"
        )
    assert len({delta.num_elements for delta in deltas.values()}) == 1, "deltas of one round have one shape"
    return {peer: _weight(peer, weight_bits[peer]) for peer in sorted(deltas)}


def _weight(peer: PeerId, bits: int) -> float:
    weight = bits_float(bits)
    if weight < 0:
        raise RejectedPayload("malformed", f"the settlement gives {peer} the weight {weight}; a weight is not negative")
    return weight
