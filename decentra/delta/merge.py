"""A round's deltas to the one that the outer step takes: their mean, over all peers or over those who sent an element, or their radial merge.

Bit-equal on every machine like the sum (``aggregate.py``). It judges nothing: weights and clips are the settlement's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from decentra.delta.aggregate import Bits, aggregate, checked_scalars
from decentra.delta.decoded import Decoded
from decentra.delta.norm import norm_of
from decentra.errors import ConfigError
from decentra.ids import PeerId
from decentra.modules import Fragment, Slot

# N elements of a fragment, S of one tensor of it, P peers

_TRIMMED_AT_ONCE = 1 << 18  # elements that are sorted at a time
AGREEMENT = 2.0**-10  # mean of unit directions below which peers agree on none; 4096 peers at right angles have 2**-6
_EMBEDDING = re.compile(r"(^|[._])embed", re.IGNORECASE)


def merge(
    fragment: Fragment, deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None = None, *, rule: str, trim: float = 0.375
) -> Tensor:  # fmt: skip
    """The merged delta, fp32 [N], of all deltas times their clips, by the manifest's ``outer.merge``.

    ``mean``: the weighted sum over all peers (``aggregate``); what a sparse packet left out counts as zero.

    ``contributors``: that, divided by the weight of the peers whose packets hold the element (as SparseLoCo's code does, arXiv 2508.15706): an
    element that one of four sent moves as far as it says, not a quarter of it. The same for dense packets.

    ``radial`` (radial-directional averaging of Decoupled DiLoCo, arXiv 2604.21428): a tensor's merged norm is the weighted mean of the peers'
    norms, its direction that of the weighted mean of their unit directions. So peers that disagree do not shorten the step, and a long delta does
    not outvote a short one; a clip shortens its peer's norm and leaves its direction. Embeddings and tensors of less than two dimensions are plain
    means.

    ``rows``: a row of a tensor is the mean over the peers that moved it; a row of zeros is no evidence and weighs nothing. It is the router's in
    runs whose members hold a part of the experts: who lacks an expert leaves its row alone, and must not hold back who trains it. Where all
    moved all rows it is the mean, bit for bit.

    ``trimmed`` (coordinate-wise trimmed mean, arXiv 1803.01498): of each element the largest and the smallest ``trim`` of the peers are left out, and the
    rest is averaged with equal weights, so what fewer than that send moves nothing beyond what honest peers sent.

    Raises what ``aggregate`` does, and ConfigError for another rule.
    """
    if rule == "mean":
        return aggregate(deltas, weight_bits, clip_bits)
    if rule == "contributors":
        return _over_contributors(deltas, weight_bits, clip_bits)
    if rule == "rows":
        return _over_rows(fragment, deltas, weight_bits, clip_bits)
    if rule == "trimmed":
        return _trimmed(deltas, weight_bits, clip_bits, trim)
    if rule != "radial":
        raise ConfigError(f"outer.merge: expected 'mean', 'contributors', 'radial' or 'trimmed', got {rule!r}")
    scalars = checked_scalars(deltas, weight_bits, clip_bits)
    spans = [(slot.offset, slot.size) for slot in fragment.slots]
    parts = {peer: deltas[peer].cut(spans) for peer in scalars}
    merged_N = torch.empty(fragment.num_elements)
    for index, slot in enumerate(fragment.slots):
        tensors = {peer: parts[peer][index] for peer in scalars}
        merged_S = _radial(tensors, scalars, slot.size) if is_radial(slot) else None
        if merged_S is None:
            merged_S = aggregate(tensors, weight_bits, clip_bits).numpy()
        merged_N.numpy()[slot.offset : slot.offset + slot.size] = merged_S
    return merged_N


def _over_contributors(deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None) -> Tensor:
    """Elementwise fp32 mul, add and div in the order of peer ids; where nobody sent anything it is zero."""
    total_N = aggregate(deltas, weight_bits, clip_bits)
    share_N = torch.zeros_like(total_N)
    for peer, (weight, _) in checked_scalars(deltas, weight_bits, clip_bits).items():
        deltas[peer].add_presence_to(share_N, weight)
    return torch.where(share_N > 0, torch.div(total_N, share_N), total_N)


def _over_rows(fragment: Fragment, deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None) -> Tensor:
    """fp32 mul, add and div, and comparisons with zero, in the order of peer ids; a row nobody moved is zero."""
    total_N = aggregate(deltas, weight_bits, clip_bits)
    scalars = checked_scalars(deltas, weight_bits, clip_bits)
    dense = {peer: deltas[peer].dense().numpy() for peer in scalars}
    for slot in fragment.slots:
        span = slice(slot.offset, slot.offset + slot.size)
        num_rows = slot.shape[0] if len(slot.shape) >= 2 else 1
        moved = {peer: (values_N[span].reshape(num_rows, -1) != 0).any(1) for peer, values_N in dense.items()}
        if all(rows.all() for rows in moved.values()):
            continue
        share = np.zeros(num_rows, np.float32)
        for peer, (weight, _) in scalars.items():
            share += moved[peer] * np.float32(weight)
        rows = total_N.numpy()[span].reshape(num_rows, -1)
        rows[share > 0] /= share[share > 0, None]
    return total_N


def num_trimmed(num_peers: int, trim: float) -> int:
    """How many are left out at each end: a share, and never so many that nobody is left."""
    return max(0, min(int(trim * num_peers), (num_peers - 1) // 2))


def _trimmed(deltas: Mapping[PeerId, Decoded], weight_bits: Bits, clip_bits: Bits | None, trim: float) -> Tensor:
    """fp32 mul, compare and add, from the smallest value that is kept to the largest; who has no weight has no voice."""
    scalars = {peer: s for peer, s in checked_scalars(deltas, weight_bits, clip_bits).items() if s[0] > 0}
    num_elements = next(iter(deltas.values())).num_elements
    merged_N = np.zeros(num_elements, np.float32)
    if not scalars:
        return torch.from_numpy(merged_N)
    left_out = num_trimmed(len(scalars), trim)
    dense = [deltas[peer].dense().numpy() * np.float32(clip) for peer, (_, clip) in scalars.items()]
    share = np.float32(1.0 / (len(dense) - 2 * left_out))
    for start in range(0, num_elements, _TRIMMED_AT_ONCE):
        span = slice(start, start + _TRIMMED_AT_ONCE)
        sorted_PN = np.sort(np.stack([values_N[span] for values_N in dense]) + np.float32(0), axis=0)  # + 0: equal values have equal bits
        for row_N in sorted_PN[left_out : len(dense) - left_out]:
            merged_N[span] += row_N
    merged_N *= share
    return torch.from_numpy(merged_N)


def is_radial(slot: Slot) -> bool:
    """True for what has a direction of its own: matrices, but for embeddings, whose rows are trained by whoever met their tokens."""
    return len(slot.shape) >= 2 and _EMBEDDING.search(slot.name) is None


def _radial(tensors: Mapping[PeerId, Decoded], scalars: Mapping[PeerId, tuple[float, float]], size: int) -> npt.NDArray[np.float32] | None:
    """fp32 [S], or None where the peers agree on no direction: blown up to full length, what is left of it would be rounding noise.

    A delta of norm zero has no direction and shortens the step by its weight. Scalars are fp64 in the order of peer ids. Elements are multiplied
    in fp64 and rounded to fp32 once, so a tiny norm's inverse does not overflow; each is one IEEE operation, the same everywhere.
    """
    length = agreed = 0.0
    direction_S = np.zeros(size, np.float32)
    for peer, (weight, clip) in scalars.items():
        norm = tensors[peer].norm()
        length += weight * clip * norm
        if norm > 0 and weight > 0:
            agreed += weight
            tensors[peer].add_scaled_to(direction_S, weight / norm)
    if length == 0:
        return direction_S
    norm = norm_of([direction_S])
    if norm <= AGREEMENT * agreed:
        return None
    return (direction_S.astype(np.float64) * (length / norm)).astype(np.float32)
