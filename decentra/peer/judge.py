"""Whether another's packets help: the loss of this peer's own text with a small step of one, against what this peer's own packet brings.

The same text for all packets of a round, and text that nobody else can foretell. Noise, nothing and what was true long ago bring next to nothing; a delta
turned round brings less; honest ones of the trunk bring about as much as one's own. Late in a run all of it is small beside the difference between one window
and the next: so a judge objects to what is clearly too little, and counts the last rounds together (tests/bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from decentra.config import JudgeSpec
from decentra.delta.decoded import Decoded
from decentra.ids import FragmentId, PeerId, short
from decentra.ports import Events

CLEARLY = -2.5  # standard errors below what is asked
MEMORY = 0.7  # what a round counts for in the next one
LONGEST = 8.0  # times the length of one's own packet, per token where it is of more: nobody learns so much more of the same rules
MOST = 4.0  # standard errors that one round counts: nobody lives on a good beginning


class Judging(Protocol):
    """The trainer as a judge sees it."""

    async def gains(
        self, fragment: FragmentId, anchor_N: Tensor, deltas: Sequence[Tensor], step: float, number: int, num_windows: int
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet to be judged, or to judge by."""

    sender: PeerId
    delta: Decoded
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Own:
    """What this peer's packet of a round brought in each window, nats per token [W]."""

    round: int
    gains_W: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What a sender's packets were worth so far: ``total`` of scores, each one's weight falling with the rounds after it, and the sum of squared weights."""

    total: float = 0.0
    squares: float = 0.0

    def after(self, score: float) -> Standing:
        return Standing(MEMORY * self.total + max(-MOST, min(MOST, score)), MEMORY * MEMORY * self.squares + 1.0)

    @property
    def score(self) -> float:
        """Standard errors above what is asked; where all that is asked was just brought, a standard normal number."""
        return self.total / self.squares**0.5 if self.squares else 0.0


def score(gains_W: Tensor, least_W: Tensor) -> float:
    """How far a packet's gains are above what is asked, in standard errors of the mean over windows. What is not finite is far below.

    A window that is more than twice as far off as most counts as twice: a loss that explodes does so unevenly, and must not hide behind that.
    """
    above_W = gains_W - least_W
    if not bool(above_W.isfinite().all()):
        return -MOST
    if most := 2.0 * float(above_W.abs().quantile(0.5)):
        above_W = above_W.clamp(-most, most)
    error = float(above_W.std() / len(above_W) ** 0.5) if len(above_W) > 1 else 0.0
    mean = float(above_W.mean())
    if error == 0.0:
        return 0.0 if mean == 0.0 else MOST if mean > 0 else -MOST
    return mean / error


def is_too_long(norm: float, num_tokens: int, own_norm: float, own_tokens: int) -> bool:
    """A step that long may even lower the loss, early in a run; it is still nobody's progress."""
    return own_norm > 0 and own_tokens > 0 and norm > LONGEST * own_norm * max(1.0, num_tokens / own_tokens)


def asked_of(gains_W: Tensor, own_W: Tensor, share: float) -> Tensor:
    """``share`` of one's own gains, window by window, where one's own brings anything at all."""
    return share * own_W if float(own_W.mean()) > 0 else torch.zeros_like(gains_W)


@dataclass
class Judge:
    """Judges one round after the other; remembers what its own packets brought, and how others stood."""

    rules: JudgeSpec
    live: Judging
    events: Events
    salt: int  # of the text's choice; secret
    _own: dict[FragmentId, Own] = field(default_factory=dict)
    _standings: dict[tuple[FragmentId, PeerId], Standing] = field(default_factory=dict)

    async def objects(
        self, fragment: FragmentId, round: int, anchor_N: Tensor, other: Packet, own: Packet | None, num_holders: int
    ) -> bool:
        """True when ``other``'s packets clearly bring less than the manifest's share of what one's own bring per token.

        Without an own packet of this round nothing but progress is asked.
        """
        assert self.rules.share is not None
        known = self._own.get(fragment)
        known = known if known is not None and known.round == round else None
        deltas = [other.delta.dense(), *([own.delta.dense()] if own is not None and known is None else [])]
        found = await self.live.gains(fragment, anchor_N, deltas, 1.0 / num_holders, self.salt + round, self.rules.windows)
        if own is not None and known is None:
            self._own[fragment] = known = Own(round, found[1], own.num_tokens)
        least_W = torch.zeros_like(found[0])
        if known is not None and known.num_tokens:
            least_W = asked_of(found[0], known.gains_W, self.rules.share * min(1.0, other.num_tokens / known.num_tokens))
        standing = self._standings.get((fragment, other.sender), Standing()).after(score(found[0], least_W))
        self._standings[fragment, other.sender] = standing
        is_long = own is not None and is_too_long(other.delta.norm(), other.num_tokens, own.delta.norm(), own.num_tokens)
        objects = standing.score < CLEARLY or is_long
        if is_long:
            why = f"it is more than {LONGEST:g} times as long as this peer's own of the same round"
            self.events.emit("objected", fragment=fragment, round=round, peer=short(other.sender), why=why)
        elif objects:
            why = (
                f"a step of it brings {float(found[0].mean()):.2e} nats per token, {float(least_W.mean()):.2e} is asked; with the rounds before"
                f" {standing.score:.1f} standard errors"
            )
            self.events.emit("objected", fragment=fragment, round=round, peer=short(other.sender), why=why)
        return objects
