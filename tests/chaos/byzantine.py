"""Members that lie: eval loss of a swarm of eight, three of them hostile, over that of the five honest ones, with three defences and with none.

    python -m tests.chaos.byzantine --json [--attacks flip,x100,...] [--steps 100] [--seed 1]

In the lab (tests/bench/lab.py), which shares accounts, codecs and merging with the runtime; every expert is trained by all, so each module has
eight holders. Defences: judged (judging.share), trimmed (outer.merge), guarded (judging.share, and outer_experts.merge trimmed: what judges do not see);
loss_ratio is that of the judged arm. Attacks: flip (the delta times -1), x100, noise (of the honest norm), replay (the first delta for ever), copy
(another's delta), nothing (a delta of zeros with a full weight), expert (honest, but for one expert, whose delta is sent ten times over and negated), alie
(honest mean less 1.5 standard deviations, element by element: small but many, arXiv 1902.06156). What is not finite or lies about its norm never gets so
far: receivers refuse it (tests/unit/delta/test_hostile.py). Clips at twice the median norm are on in all arms.

two_holders   the same attack on one expert where each expert has two holders, one of them a liar: what no merge can mend; status names such modules
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from decentra.delta.decoded import Decoded
from decentra.ids import TRUNK, FragmentId, PeerId, module_of_fragment
from decentra.peer.judge import CLEARLY, Standing, asked_of, is_too_long, score
from tests.bench.lab import Lab, Swarm, build_swarm, mean_loss, parse_settings, run_steps
from tests.chaos.telling import teller

NUM_PEERS, NUM_HOSTILE, H = 8, 3, 10
SHARE, NUM_WINDOWS, QUARANTINE_ROUNDS = 0.2, 8, 16
Deltas = dict[PeerId, Decoded]


@dataclass
class Hostile(Swarm):
    """A swarm in which the first peers send something else than what they learned."""

    attack: str = ""
    is_judged: bool = False
    first: dict[FragmentId, Deltas] = field(default_factory=dict)
    target: str = ""  # the fragment that attack "expert" is about
    quarantined_until: dict[PeerId, int] = field(default_factory=dict)  # round
    false_quarantines: int = 0
    standings: dict[tuple[PeerId, PeerId], Standing] = field(default_factory=dict)  # (judge, sender)

    def altered(self, fragment: FragmentId, deltas: Deltas, norms: dict[PeerId, float]) -> tuple[Deltas, dict[PeerId, float]]:
        hostile = {peer.id for peer in self.peers[:NUM_HOSTILE]}
        liars, honest = [p for p in sorted(deltas) if p in hostile], [p for p in sorted(deltas) if p not in hostile]
        if self.attack == "expert":
            if not self.target and module_of_fragment(fragment).startswith("expert.") and liars and honest:
                self.target = fragment
            if fragment != self.target:
                liars = []
        self.first.setdefault(fragment, deltas)
        values = {peer: deltas[peer].dense() for peer in deltas}
        stacked = torch.stack([values[peer] for peer in honest]) if honest else torch.zeros(1, 1)
        for number, peer in enumerate(liars):
            if self.attack:
                deltas = deltas | {peer: Decoded.of(self._lie(fragment, peer, number, values, stacked, honest))}
        if self.is_judged:
            deltas = {p: d for p, d in deltas.items() if self.quarantined_until.get(p, 0) <= self.num_rounds}
            if module_of_fragment(fragment) == TRUNK:
                condemned = self._condemned(fragment, deltas, hostile if self.attack else set())
                self.quarantined_until |= dict.fromkeys(condemned, self.num_rounds + QUARANTINE_ROUNDS)
                self.false_quarantines += len(condemned - hostile) if self.attack else len(condemned)
                deltas = {p: d for p, d in deltas.items() if p not in condemned}
        return deltas, {peer: delta.norm() for peer, delta in deltas.items()}

    def _condemned(self, fragment: FragmentId, deltas: Deltas, liars: set[PeerId]) -> set[PeerId]:
        """Whom more than two thirds of the other holders object to. Liars object to everybody who is honest, and to no liar: the worst they can do."""
        objections = dict.fromkeys(deltas, 0)
        names = sorted(deltas)
        values = [deltas[p].dense() for p in names]
        for judge in self.peers:
            if judge.id not in deltas:
                continue
            if judge.id in liars:
                objections |= {p: n + 1 for p, n in objections.items() if p not in liars}
                continue
            found = judge.inner.gains(fragment, self.anchors[fragment].anchor_N, values, 1 / len(names), self.num_rounds, NUM_WINDOWS)
            own_W = found[names.index(judge.id)]
            for peer, gains_W in zip(names, found, strict=True):
                at = judge.id, peer
                self.standings[at] = self.standings.get(at, Standing()).after(score(gains_W, asked_of(gains_W, own_W, SHARE)))
                is_long = is_too_long(deltas[peer].norm(), 1, deltas[judge.id].norm(), 1)
                objections[peer] += peer != judge.id and (is_long or self.standings[at].score < CLEARLY)
        return {p for p, n in objections.items() if 3 * n > 2 * (len(deltas) - 1)}

    def _lie(
        self, fragment: FragmentId, peer: PeerId, number: int, values: dict[PeerId, Tensor], honest_PN: Tensor, names: Sequence[PeerId]
    ) -> Tensor:  # fmt: skip
        own = values[peer]
        match self.attack:
            case "flip":
                return -own
            case "x100":
                return 100.0 * own
            case "noise":
                noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(1000 * self.num_rounds + number))
                return noise * own.norm() / noise.norm()
            case "replay":
                return self.first[fragment][peer].dense()
            case "expert":
                return -10.0 * own
            case "copy":
                return values[names[0]]
            case "nothing":
                return torch.zeros_like(own)
            case "alie":
                return honest_PN.mean(0) - 1.5 * honest_PN.std(0)
        raise ValueError(self.attack)


ARMS = ("mean", "trimmed", "judged", "guarded")
KEYS = {"loss_ratio": "judged", "loss_ratio_guarded": "guarded", "loss_ratio_trimmed": "trimmed", "loss_ratio_undefended": "mean"}
ATTACKS = ("flip", "x100", "noise", "replay", "copy", "nothing", "alie", "expert")


def run(attack: str, arm: str, steps: int, seed: int, experts_per_peer: int = 8) -> tuple[float, int]:
    """Held-out loss, and how often somebody honest was put into quarantine. No attack: the honest peers alone."""
    torch.set_num_threads(1)
    num_peers = NUM_PEERS if attack else NUM_PEERS - NUM_HOSTILE
    manifest, lab = parse_settings(
        [
            f"lab.peers={num_peers}", f"lab.steps={steps}", "lab.report_every=0", f"placement.experts_per_peer={experts_per_peer}",
            f"rounds.inner_steps={H}", "data.shared_fraction=1.0", f"outer.merge={'trimmed' if arm == 'trimmed' else 'mean'}", "outer.clip=2",
        ]
    )  # fmt: skip
    of_experts = manifest.outer.model_copy(update={"merge": "trimmed"}) if arm == "guarded" else None
    manifest = manifest.model_copy(update={"seed": seed, "outer_experts": of_experts})
    swarm: Swarm = build_swarm(manifest, lab)
    is_judged = arm in ("judged", "guarded")
    hostile = Hostile(swarm.manifest, swarm.layout, swarm.peers, swarm.anchors, attack=attack, is_judged=is_judged)
    model, _ = run_steps(hostile if attack or hostile.is_judged else swarm, Lab(**vars(lab)), lambda _: None)
    return mean_loss(model, manifest, 64), hostile.false_quarantines


def measure(attacks: Sequence[str], arms: Sequence[str], steps: int, seed: int, jobs: int, say: Callable[[str], None]) -> dict[str, Any]:
    cases = [("", m, 8) for m in arms] + [(a, m, 8) for a in attacks for m in arms]
    cases += [(a, m, 2) for a in ("", "expert") for m in ("mean", "judged") if "expert" in attacks]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        losses, mistakes = {}, {}
        for case, (loss, num) in zip(
            cases,
            pool.map(_run_case, [(*case[:2], steps, seed, case[2]) for case in cases]),
            strict=True,
        ):
            losses[case], mistakes[case] = loss, num
            say(f"{case[0] or 'honest peers alone'}, {case[1]}, {case[2]} experts each: {loss:.4f}, {num} false quarantines")
    honest = losses["", "mean", 8]
    rows = [
        {
            "attack": a,
            **{key: losses[a, arm, 8] / honest for key, arm in KEYS.items() if arm in arms},
            "false_quarantines": sum(mistakes[a, arm, 8] for arm in arms),
        }
        for a in attacks
    ]
    few = {arm: losses["expert", arm, 2] / losses["", "mean", 2] for arm in ("mean", "judged")} if "expert" in attacks else {}
    return {
        "num_peers": NUM_PEERS, "num_hostile": NUM_HOSTILE, "steps": steps, "seed": seed, "honest_loss": honest,
        "without_liars": {m: losses["", m, 8] / honest for m in arms},
        "false_quarantines_without_liars": sum(mistakes["", arm, 8] for arm in arms), "rows": rows, "two_holders": few,
    }  # fmt: skip


def _run_case(case: tuple[str, str, int, int, int]) -> tuple[float, int]:
    return run(*case)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--arms", default=",".join(ARMS), help="mean has to be one of them")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    found = measure(args.attacks.split(","), args.arms.split(","), args.steps, args.seed, args.jobs, teller())
    for row in found["rows"]:
        ratios = ", ".join(f"{arm} {row[key]:.3f}" for key, arm in KEYS.items() if key in row)
        print(f"{row['attack']:8} {ratios}, {row['false_quarantines']} false quarantines", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
