"""The arithmetic of a settlement: every scalar that follows from its offers and the manifest. Who settles computes it, and whoever doubts it, and who leaves
somebody out of a round that is long over. No I/O, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Protocol

from decentra.bits import bits_float, float_bits
from decentra.config import OuterSpec
from decentra.ids import PeerId, short
from decentra.protocol.messages import Settlement

MAX_OFFER_TOKENS, MAX_OFFER_BYTES = 1 << 40, 1 << 40  # sums of them stay far inside 63 bits
INFINITE_BITS = 0x7F800000  # float32: what is below is a finite number that is not negative


class _Weighed(Protocol):
    """An offer, or its entry in a settlement."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def norm_bits(self) -> int: ...


def scalars_of(offers: Sequence[_Weighed], height: int, outer: OuterSpec) -> tuple[int, int, tuple[tuple[int, int], ...]] | None:
    """(outer lr bits, momentum bits, (weight bits, clip bits) of each) of the round that leads to ``height``; None where nobody trained a token."""
    num_tokens = sum(o.num_tokens for o in offers)
    if num_tokens == 0:
        return None
    lr, momentum = outer.scalars(height, num_tokens)
    clips = outer.clips([bits_float(o.norm_bits) for o in offers])
    weights = tuple((float_bits(o.num_tokens / num_tokens), float_bits(clip)) for o, clip in zip(offers, clips, strict=True))
    return float_bits(lr), float_bits(momentum), weights


def what_is_wrong(settlement: Settlement, outer: OuterSpec) -> str:
    """What a settlement's scalars say that its manifest does not give; empty where all is as it should be. Anybody can compute it, whoever wrote it."""
    entries = settlement.entries
    names, packets = [e.peer for e in entries], [e.packet for e in entries]
    if not entries or names != sorted(set(names)) or len(set(packets)) != len(packets):
        return "its entries are none, or not one for each peer in their order"
    if not all(0 <= e.num_tokens <= MAX_OFFER_TOKENS and 0 <= e.norm_bits < INFINITE_BITS for e in entries):
        return "an entry has tokens or a norm that no offer may have"
    if not (num_tokens := sum(e.num_tokens for e in entries)):
        return "nobody trained a token of it"
    if wrong := next((e for e in entries if e.weight_bits != float_bits(e.num_tokens / num_tokens)), None):
        return f"{short(wrong.peer)} weighs {bits_float(wrong.weight_bits):g}, its tokens give {wrong.num_tokens / num_tokens:g}"
    clips = outer.clips([bits_float(e.norm_bits) for e in entries])
    if cut := next(((e, clip) for e, clip in zip(entries, clips, strict=True) if e.clip_bits != float_bits(clip)), None):
        return f"{short(cut[0].peer)} is clipped to {bits_float(cut[0].clip_bits):g}, the norms give {cut[1]:g}"
    lr, momentum = outer.scalars(settlement.height, num_tokens)
    if (settlement.lr_bits, settlement.momentum_bits) != (float_bits(lr), float_bits(momentum)):
        said = bits_float(settlement.lr_bits), bits_float(settlement.momentum_bits)
        return f"its outer lr and momentum are {said[0]:g} and {said[1]:g}, the manifest gives {lr:g} and {momentum:g}"
    return ""


def without(settlement: Settlement, peers: Container[PeerId], outer: OuterSpec) -> Settlement | None:
    """The settlement as it would be had these peers offered nothing: weights, clips and outer scalars of those that are left. None: nobody is left.

    One without any of them comes back as it is, with what its reducers made; else everybody's packets are needed.
    """
    entries = tuple(e for e in settlement.entries if e.peer not in peers)
    if len(entries) == len(settlement.entries):
        return settlement
    if (scalars := scalars_of(entries, settlement.height, outer)) is None:
        return None
    lr_bits, momentum_bits, weights = scalars
    entries = tuple(replace(e, weight_bits=weight, clip_bits=clip) for e, (weight, clip) in zip(entries, weights, strict=True))
    return replace(
        settlement, entries=entries, lr_bits=lr_bits, momentum_bits=momentum_bits, reducers=(), residual=None, merged=None, failed=()
    )
