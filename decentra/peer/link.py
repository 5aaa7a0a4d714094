"""How late this peer's packets arrive, as the receipts of others show it, and the codec that follows from it. No I/O.

A packet has arrived when half of the other members of its roster have given receipts: one member that cannot fetch proves nothing about our uplink. It
missed its round when that was settled without it. What is still open when the service goes away proves nothing and is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from decentra.config import CodecSpec, PeerConfig
from decentra.delta.packet import max_packet_bytes
from decentra.delta.rate import Limits, Pace, allowed, held_back
from decentra.ids import FragmentId, PeerId
from decentra.modules import Layout
from decentra.protocol.messages import FragmentView, Offer, Phase

USUAL_COPIES = 2.0  # in which a packet leaves its sender; others pass it on
SMOOTHING = 0.3  # of the newest time of a round


@dataclass
class RateControl:
    """The codec of every packet of one peer. Fixed where the manifest allows only one."""

    spec: CodecSpec
    layout: Layout
    limits: Limits
    me: PeerId
    round_s: float | None = None
    trained: frozenset[FragmentId] = frozenset()
    pace: Pace = field(init=False, default_factory=lambda: Pace(0))
    codec_now: str = field(init=False, default="")
    why_now: str = field(init=False, default="")
    _under_way: dict[FragmentId, tuple[Offer, float]] = field(init=False, default_factory=dict)
    _encoded_at: dict[FragmentId, float] = field(init=False, default_factory=dict)
    _worst: float | None = field(init=False, default=None)  # lateness since the last step
    _stepped_at: float = field(init=False, default=-math.inf)

    def __post_init__(self) -> None:
        self.rungs = allowed(self.spec.name, self.spec.sparsest or self.spec.name)
        if self.has_choice:  # nobody knows the link yet, and what an earlier process left in residuals must come out slowly
            self.pace = Pace(len(self.rungs) - 1, why="begins sparse")

    @property
    def has_choice(self) -> bool:
        return len(self.rungs) > 1

    def codec(self, fragment: FragmentId, now: float) -> str:
        """The codec of this fragment's next packet; called once per encode."""
        if (before := self._encoded_at.get(fragment)) is not None and now > before:
            took_s = now - before if self.round_s is None else min(now - before, 4 * self.round_s)  # an outage is no round
            self.round_s = took_s if self.round_s is None else (1 - SMOOTHING) * self.round_s + SMOOTHING * took_s
        self._encoded_at[fragment] = now
        if not self.has_choice:
            self.codec_now = self.rungs[0]
            return self.codec_now
        if self._worst is not None and now - self._stepped_at >= (self.round_s or 0.0):
            self.pace = self.pace.after(self._worst, self.limits.share, len(self.rungs))
            self._worst, self._stepped_at = None, now
        rung, why = held_back(self.pace.rung, self.rungs, self._round_bytes(), self.round_s, self.limits)
        self.codec_now, self.why_now = self.rungs[rung], why or self.pace.why
        return self.codec_now

    def encoded(self, offer: Offer, now: float) -> None:
        self._under_way[offer.fragment] = (offer, now)

    def saw(self, view: FragmentView, now: float) -> None:
        """Notice when our packet has arrived, or its round went past it."""
        if view.fragment not in self._under_way:
            return
        offer, sent_at = self._under_way[view.fragment]
        if view.round < offer.round:
            return
        is_over = view.round > offer.round or view.phase is not Phase.OPEN
        others = set(view.reducers or (*view.holders, *view.keepers)) - {self.me}
        have = {holder for sender, holder in view.receipts if sender == self.me}
        if not is_over and 2 * len(have & others) < len(others):
            return
        del self._under_way[view.fragment]
        if is_over:
            settlement = view.settlement if view.round == offer.round else None
            if settlement is None or any(e.packet == offer.packet for e in settlement.entries):
                return  # it is in, or nobody's fault: says nothing of its time
            lateness = math.inf
        else:
            lateness = (now - sent_at) / self.round_s if self.round_s else 0.0
        self._worst = lateness if self._worst is None else max(self._worst, lateness)

    def disconnected(self) -> None:
        self._under_way.clear()

    @property
    def why(self) -> str:
        """In words, for status; empty where there is nothing to choose."""
        return f"sends {self.codec_now} ({self.why_now})" if self.has_choice and self.codec_now else ""

    def _round_bytes(self) -> Mapping[str, float]:
        fragments = [f for f in self.layout.fragments if f.id in self.trained or not self.trained]
        return {rung: USUAL_COPIES * sum(max_packet_bytes(f, rung) for f in fragments) for rung in self.rungs}


def limits_of(spec: CodecSpec, config: PeerConfig) -> Limits:
    """What the manifest and the owner of this machine allow."""
    return Limits(spec.share, config.up_bytes_per_s, config.cap_bytes_per_day)
