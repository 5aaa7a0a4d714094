"""What a settlement makes of an anchor: merge its packets, take the outer step. The same for members and for who replays a ledger; pure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from decentra.bits import ONE_BITS
from decentra.config import Manifest
from decentra.delta.aggregate import aggregate, checked_clip
from decentra.delta.anchor import AnchorState
from decentra.delta.decoded import Decoded
from decentra.delta.merge import merge
from decentra.delta.outer import outer_step
from decentra.ids import PeerId
from decentra.modules import Fragment
from decentra.protocol.messages import Settlement


def scalars_of(settlement: Settlement) -> tuple[dict[PeerId, int], dict[PeerId, int]]:
    """(weight bits, clip bits) of every entry. Raises RejectedPayload for a clip that is none."""
    for entry in settlement.entries:
        checked_clip(entry.peer, entry.clip_bits)
    return {e.peer: e.weight_bits for e in settlement.entries}, {e.peer: e.clip_bits for e in settlement.entries}


def merged_delta(fragment: Fragment, manifest: Manifest, settlement: Settlement, deltas: Mapping[PeerId, Decoded]) -> Tensor:
    """fp32 [N]: the settled deltas merged by the manifest's rule; of a round with reducers the packet that they made."""
    if settlement.merged is not None:
        return aggregate(deltas, dict.fromkeys(deltas, ONE_BITS))
    return merge_entries(fragment, manifest, settlement, deltas)


def merge_entries(fragment: Fragment, manifest: Manifest, settlement: Settlement, deltas: Mapping[PeerId, Decoded]) -> Tensor:
    """fp32 [N]: the entries' own deltas, whatever reducers made of them."""
    weights, clips = scalars_of(settlement)
    return merge(fragment, deltas, weights, clips, rule=manifest.merge_of(fragment.id), trim=manifest.outer_of(fragment.id).trim)


def stepped(fragment: Fragment, manifest: Manifest, state: AnchorState, settlement: Settlement, merged_N: Tensor) -> AnchorState:
    """The anchor after the settlement's outer step along ``merged_N``, fp32 [N]."""
    rule = manifest.outer_of(fragment.id).rule
    return outer_step(state, merged_N, rule=rule, lr_bits=settlement.lr_bits, momentum_bits=settlement.momentum_bits)
