"""What this peer's uplink carries, as the receipts of others show it, and the codec that follows from it. No I/O.

Sending is watched from outside: a packet is under way from its offer until every other member of its roster has given a receipt, or its round is settled
without them. While packets are under way the link counts as busy; packet bytes over busy time, times the copies that really left, is its rate. That
includes round trips and the receivers' own time, so it is what a round can count on, not what a speed test shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from decentra.config import CodecSpec, PeerConfig
from decentra.delta.packet import max_packet_bytes
from decentra.delta.rate import Choice, Limits, allowed, choose
from decentra.ids import FragmentId, PeerId
from decentra.modules import Layout
from decentra.protocol.messages import FragmentView, Offer, Phase

SMOOTHING = 0.5  # of the newest measurement
USUAL_FANOUT = 2.0  # copies a packet leaves in until more is known: others pass it on


@dataclass
class Uplink:
    """Packets under way and the rates of past busy times."""

    tx_bytes: Callable[[], int]  # all that left this peer so far
    bytes_per_s: float | None = None
    fanout: float = USUAL_FANOUT
    _under_way: dict[FragmentId, int] = field(default_factory=dict)
    _busy_since: float = 0.0
    _busy_bytes: int = 0
    _tx_before: int = 0

    def sent(self, fragment: FragmentId, num_bytes: int, now: float) -> None:
        if not self._under_way:
            self._busy_since, self._busy_bytes, self._tx_before = now, 0, self.tx_bytes()
        self._under_way[fragment] = num_bytes
        self._busy_bytes += num_bytes

    def ended(self, fragment: FragmentId, now: float) -> None:
        if self._under_way.pop(fragment, None) is None or self._under_way or now <= self._busy_since:
            return
        left = self.tx_bytes() - self._tx_before
        if left > 0:
            self.fanout = _smooth(self.fanout, left / self._busy_bytes)
            # seconds per byte are smoothed, not bytes per second: one slow round weighs more than one fast one
            s_per_byte = _smooth(None if self.bytes_per_s is None else 1 / self.bytes_per_s, (now - self._busy_since) / left)
            self.bytes_per_s = 1 / s_per_byte


@dataclass
class RateControl:
    """The codec of every packet of one peer. Fixed where the manifest allows only one."""

    spec: CodecSpec
    layout: Layout
    limits: Limits
    uplink: Uplink
    me: PeerId
    round_s: float | None = None
    choices: dict[FragmentId, Choice] = field(default_factory=dict)
    trained: frozenset[FragmentId] = frozenset()
    _encoded_at: dict[FragmentId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rungs = allowed(self.spec.name, self.spec.sparsest or self.spec.name)

    def codec(self, fragment: FragmentId, now: float) -> Choice:
        """The codec of this fragment's next packet; called once per encode."""
        if (before := self._encoded_at.get(fragment)) is not None and now > before:
            self.round_s = _smooth(self.round_s, now - before)
        self._encoded_at[fragment] = now
        if len(self.rungs) == 1:
            return Choice(self.rungs[0], "the run has one codec")
        last = self.choices.get(fragment)
        choice = choose(
            self.rungs, self._round_bytes(), round_s=self.round_s, link_bytes_per_s=self.uplink.bytes_per_s, limits=self.limits,
            last=None if last is None else last.codec,
        )  # fmt: skip
        self.choices[fragment] = choice
        return choice

    def encoded(self, offer: Offer, now: float) -> None:
        self.uplink.sent(offer.fragment, offer.num_bytes, now)

    def saw(self, view: FragmentView, now: float) -> None:
        """Notice when our packet has arrived everywhere, or its round is past it."""
        roster = {*view.holders, *view.keepers} - {self.me}
        have = {holder for sender, holder in view.receipts if sender == self.me}
        if view.phase is not Phase.OPEN or (roster and roster <= have):
            self.uplink.ended(view.fragment, now)

    @property
    def why(self) -> str:
        """In words, for status; empty where there is nothing to choose."""
        if len(self.rungs) == 1 or not self.choices:
            return ""
        codecs = sorted({c.codec for c in self.choices.values()}, key=self.rungs.index)
        newest = self.choices[max(self.choices, key=lambda f: self._encoded_at[f])]
        return f"sends {' and '.join(codecs)} ({newest.why})"

    def _round_bytes(self) -> Mapping[str, float]:
        fragments = [f for f in self.layout.fragments if f.id in self.trained or not self.trained]
        return {rung: self.uplink.fanout * sum(max_packet_bytes(f, rung) for f in fragments) for rung in self.rungs}


def limits_of(spec: CodecSpec, config: PeerConfig) -> Limits:
    """What the manifest and the owner of this machine allow."""
    return Limits(spec.share, config.up_bytes_per_s, config.cap_bytes_per_day)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
