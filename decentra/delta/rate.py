"""Rate control: which codec a peer sends with, from what its link carries and what its owner allows. Pure; the caller measures.

The densest codec whose packets fit wins. A step towards denser is one rung a round: the residual that a sparse codec left is worth many rounds,
and would come out at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from decentra.config import CodecName
from decentra.errors import ConfigError

LADDER: tuple[str, ...] = get_args(CodecName)  # densest first
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be sent. ``None``: no limit of this kind."""

    share: float = 0.5  # of a round's time that may be spent on sending
    up_bytes_per_s: float | None = None
    cap_bytes_per_day: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    codec: str
    why: str  # in words, for status


def allowed(densest: str, sparsest: str) -> tuple[str, ...]:
    """The rungs between two codecs of a manifest, densest first. Raises ConfigError."""
    for name in (densest, sparsest):
        if name not in LADDER:
            raise ConfigError(f"codec: expected one of {', '.join(LADDER)}, got {name!r}")
    first, last = LADDER.index(densest), LADDER.index(sparsest)
    if first > last:
        raise ConfigError(f"codec.sparsest {sparsest!r} is denser than codec.name {densest!r}")
    return LADDER[first : last + 1]


def choose(
    rungs: tuple[str, ...],
    round_bytes: Mapping[str, float],
    *,
    round_s: float | None,
    link_bytes_per_s: float | None,
    limits: Limits,
    last: str | None = None,
) -> Choice:
    """The codec of the next packet.

    ``round_bytes``: what one round would cost this peer with each rung, all its fragments and receivers together. ``round_s``: usual time
    between two packets; ``link_bytes_per_s``: measured; None: not known yet. ``last``: the codec of the packet before.
    """
    budget, why = _budget(round_s, link_bytes_per_s, limits)
    if budget is None:
        wanted, why = last if last in rungs else rungs[0], "no transfer has been measured yet"
    else:
        wanted = next((rung for rung in rungs if round_bytes[rung] <= budget), rungs[-1])
        if round_bytes[wanted] > budget:
            why = f"the sparsest codec of the run; more than {why}"
    if last in rungs and rungs.index(wanted) < rungs.index(last) - 1:
        return Choice(rungs[rungs.index(last) - 1], f"one step towards {wanted}: {why}")
    return Choice(wanted, why)


def _budget(round_s: float | None, link_bytes_per_s: float | None, limits: Limits) -> tuple[float | None, str]:
    """Bytes of one round, and where the number comes from."""
    if round_s is None:
        return None, ""
    found: list[tuple[float, str]] = []
    if link_bytes_per_s is not None:
        found.append((link_bytes_per_s * round_s * limits.share, f"{limits.share:.0%} of a round at {_mbit(link_bytes_per_s)} measured"))
    if limits.up_bytes_per_s is not None:
        found.append((limits.up_bytes_per_s * round_s, f"the limit of {_mbit(limits.up_bytes_per_s)}"))
    if limits.cap_bytes_per_day is not None:
        found.append((limits.cap_bytes_per_day * round_s / DAY_S, f"the cap of {limits.cap_bytes_per_day / 1e9:.3g} GB a day"))
    if not found:
        return None, ""
    most, why = min(found)
    return most, f"{most / 1e6:.3g} MB a round: {why}"


def _mbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e6:.3g} Mbit/s"
