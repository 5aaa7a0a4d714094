"""What a seed is turned into: how many machines, which outer rule, how slow the links, how many faults. No asyncio, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from decentra.config import CodecName
from decentra.ids import Digest, FragmentId

NUM_EXPERTS = 2


@dataclass(frozen=True)
class Scenario:
    """One simulated story. Times are virtual seconds."""

    seed: int
    num_trainers: int = 3
    has_keeper: bool = True
    num_faults: int = 8
    fault_s: float = 50.0  # faults happen until here; then everybody is up and connected, and the swarm must get on
    step_s: float = 0.8
    inner_steps: int = 3
    max_delay_s: float = 0.1  # of a message while the net is sound
    max_compute_s: float = 0.2  # of a tensor operation
    outer_rule: Literal["average", "nesterov"] = "average"
    reduce_from: int | None = None  # holders
    experts_per_peer: int = 1
    codec: CodecName = "int8"
    merged: CodecName | None = None
    merge: Literal["mean", "radial"] = "mean"
    clip: float | None = None
    is_partial: bool = False  # trainers hold only what they train; there is a keeper then

    @property
    def pace(self) -> float:
        """Rounds with hundreds of packets need longer deadlines: the reducers fetch every one of them."""
        return max(1.0, self.num_trainers / 50)

    @staticmethod
    def from_seed(seed: int) -> Scenario:
        """Every kind of swarm in turn: two to four trainers, with and without keeper, reducers and clips, both rules, merges and modes, quick and slow."""
        rng = Random(seed * 7919 + 17)
        return Scenario(
            seed,
            num_trainers=2 + seed % 3,
            has_keeper=seed // 3 % 4 != 3 or seed % 5 == 4,
            num_faults=rng.randrange(4, 13),
            step_s=rng.choice([0.4, 0.8, 1.2]),
            inner_steps=rng.choice([2, 3, 4]),
            max_delay_s=rng.choice([0.02, 0.1, 0.5]),
            max_compute_s=rng.choice([0.05, 0.2, 1.0]),
            outer_rule="nesterov" if seed % 2 else "average",
            reduce_from=2 if seed // 3 % 2 else None,
            merge="radial" if seed % 4 > 1 else "mean",
            clip=1.0 if seed % 3 else None,  # every second delta is cut
            is_partial=seed % 5 == 4,
        )


@dataclass
class Report:
    """What a simulated run came to."""

    seed: int
    heights: dict[FragmentId, int]
    num_confirmed: int
    num_thin: int
    num_given_up: int
    num_rolled_back: int
    num_crashes: int
    num_wiped: int
    faults: list[str]
    anchors: dict[FragmentId, Digest] = field(repr=False, default_factory=dict)
    log_hash: str = ""


class Violation(AssertionError):
    """A promise was broken; the message names the seed that shows it."""
