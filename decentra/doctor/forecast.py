"""What taking part would cost this machine, from what was measured of it. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decentra.config import Manifest
from decentra.delta.packet import max_packet_bytes
from decentra.delta.rate import allowed
from decentra.ids import ROUTER, expert_of
from decentra.modules import Fragment, Layout

COPIES = 2.0  # in which a packet leaves its sender; others pass it on
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Of this machine and the way to the run. None: not known."""

    step_s: float
    num_experts: int  # that this peer would train
    is_partial: bool
    num_trainers: int  # of the run, this one included
    num_keepers: int
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    cap_bytes_per_day: float | None = None


def forecast(manifest: Manifest, layout: Layout, m: Measured) -> dict[str, Any]:
    """Codec, bytes per round and hour, and the share of time inside inner steps to expect. The densest codec whose packets leave in the share of a
    round that the run's manifest allows them, within the owner's limits; bytes are upper bounds."""
    spec, round_s = manifest.codec, manifest.rounds.inner_steps * m.step_s
    rungs = allowed(spec.name, spec.sparsest or spec.name)
    most = [rate * round_s * spec.share for rate in (m.up_bytes_per_s,) if rate is not None]
    if m.cap_bytes_per_day is not None:
        most.append(m.cap_bytes_per_day * round_s / 86_400)
    up_of = {name: COPIES * sum(_packet(manifest, f, name) for f in _own(layout, m)) for name in rungs}
    codec = next((name for name in rungs if not most or up_of[name] <= min(most)), rungs[-1])
    up, down = up_of[codec], sum(_down(manifest, f, codec, m) for f in layout.fragments)
    link_s = max((up / m.up_bytes_per_s if m.up_bytes_per_s else 0.0), (down / m.down_bytes_per_s if m.down_bytes_per_s else 0.0))
    if manifest.rounds.overlap:
        utilisation, why = 1.0, "inner steps go on while packets travel"
        if link_s > round_s:
            why += f"; a round's packets take {link_s / round_s:.1f} times as long as its steps, so this peer will miss rounds"
    else:
        utilisation, why = round_s / (round_s + link_s), "inner steps wait for each round"
    return {
        "codec": codec, "round_s": round_s, "up_bytes_per_round": up, "down_bytes_per_round": down, "link_s": link_s,
        "up_mb_per_hour": up / max(round_s, link_s) * HOUR_S / 1e6, "down_mb_per_hour": down / max(round_s, link_s) * HOUR_S / 1e6,
        "up_mbit_needed": up_of[rungs[-1]] / (round_s * spec.share) * 8 / 1e6, "is_in_time": link_s <= round_s,
        "utilisation": utilisation, "why": why,
    }  # fmt: skip


def _own(layout: Layout, m: Measured) -> list[Fragment]:
    return [f for f in layout.fragments if (expert := expert_of(f.module)) is None or expert < m.num_experts]


def _packet(manifest: Manifest, fragment: Fragment, codec: str) -> float:
    is_dense = manifest.placement.mode == "held" and fragment.module == ROUTER  # router rows are never sparse there
    return max_packet_bytes(fragment, "int8" if is_dense else codec)


def _down(manifest: Manifest, fragment: Fragment, codec: str, m: Measured) -> float:
    """What one round of a fragment brings: the packets of its other holders, or the one that stands for all."""
    expert = expert_of(fragment.module)
    is_own = expert is None or expert < m.num_experts
    if not is_own and m.is_partial:
        return 0.0
    holders = m.num_trainers if expert is None else max(1, round(m.num_trainers * m.num_experts / manifest.model.num_experts))
    reduced = manifest.rounds.reduce_from is not None and holders >= manifest.rounds.reduce_from
    return _packet(manifest, fragment, codec) * (1 if reduced else max(0, holders - is_own))
