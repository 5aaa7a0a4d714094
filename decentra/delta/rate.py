"""Rate control: which codec a peer sends with, from how late its packets arrive and what its owner allows. Pure; the caller watches and counts.

Like a TCP sender it does not know its link, it tries: one rung sparser when packets took more than their share of a round or missed it, one rung
denser after calm rounds, and twice as many of them after a try that failed. Latency that has nothing to do with size costs tries, not density for ever.
One rung at a time also lets a sparse codec's residual out slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from decentra.config import CodecName
from decentra.errors import ConfigError

LADDER: tuple[str, ...] = get_args(CodecName)  # densest first
DAY_S = 86_400.0
CALM_SHARE = 0.25  # of the allowed share: below it a round was calm
MAX_PATIENCE = 64  # calm rounds before the next try


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be sent. ``None``: no limit of this kind."""

    share: float = 0.5  # of a round's time that may pass until a packet has arrived
    up_bytes_per_s: float | None = None
    cap_bytes_per_day: float | None = None

    def bytes_per_round(self, round_s: float) -> tuple[float, str] | None:
        """The owner's smaller limit and its name; None without one."""
        found: list[tuple[float, str]] = []
        if self.up_bytes_per_s is not None:
            found.append((self.up_bytes_per_s * round_s, f"the limit of {self.up_bytes_per_s * 8 / 1e6:.3g} Mbit/s"))
        if self.cap_bytes_per_day is not None:
            found.append((self.cap_bytes_per_day * round_s / DAY_S, f"the cap of {self.cap_bytes_per_day / 1e9:.3g} GB a day"))
        return min(found, default=None)

    @property
    def is_set(self) -> bool:
        return self.up_bytes_per_s is not None or self.cap_bytes_per_day is not None


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a peer stands on the ladder."""

    rung: int  # index: 0 is the densest allowed
    calm: float = 0.0  # calm rounds since the last step; one that was in time but not calm is a quarter
    patience: int = 1  # calm rounds before a step denser
    was_try: bool = False  # the last step was one denser, and no round has judged it yet
    why: str = "no packet has arrived yet"

    def after(self, lateness: float, share: float, num_rungs: int) -> Pace:
        """A round is over. ``lateness``: time until the packet had arrived over the time of a round; infinite: it missed the round."""
        late = "missed its round" if lateness == float("inf") else f"took {lateness:.0%} of a round to arrive"
        if lateness > share:
            patience = min(MAX_PATIENCE, 2 * self.patience) if self.was_try else self.patience
            return Pace(min(self.rung + 1, num_rungs - 1), 0.0, patience, False, f"a packet {late}, more than {share:.0%}")
        # where a round is hardly longer than a round trip, no codec makes packets calm: tries are fewer then, but they are made
        calm = self.calm + (1.0 if lateness <= share * CALM_SHARE else 0.25)
        if self.rung == 0 or calm < self.patience:
            return replace(self, calm=calm, was_try=False, why=f"a packet {late}")
        return Pace(self.rung - 1, 0.0, self.patience, True, f"a packet {late}: there may be room")


def allowed(densest: str, sparsest: str) -> tuple[str, ...]:
    """The rungs between two codecs of a manifest, densest first. Raises ConfigError."""
    for name in (densest, sparsest):
        if name not in LADDER:
            raise ConfigError(f"codec: expected one of {', '.join(LADDER)}, got {name!r}")
    first, last = LADDER.index(densest), LADDER.index(sparsest)
    if first > last:
        raise ConfigError(f"codec.sparsest {sparsest!r} is denser than codec.name {densest!r}")
    return LADDER[first : last + 1]


def held_back(
    rung: int, rungs: tuple[str, ...], round_bytes: Mapping[str, float], round_s: float | None, limits: Limits
) -> tuple[int, str]:
    """The rung that the owner's limits leave, and why if it is a sparser one. ``round_bytes``: what a round costs this peer with each rung."""
    if not limits.is_set:
        return rung, ""
    if round_s is None:
        return len(rungs) - 1, "the owner set a limit, and the time of a round is not known yet"
    limit = limits.bytes_per_round(round_s)
    assert limit is not None, "a limit is set"
    most, name = limit
    fits = next((i for i in range(rung, len(rungs)) if round_bytes[rungs[i]] <= most), None)
    if fits is None:
        return len(rungs) - 1, f"the sparsest codec of the run, and more than {most / 1e6:.3g} MB a round: {name}"
    return fits, "" if fits == rung else f"{most / 1e6:.3g} MB a round: {name}"
