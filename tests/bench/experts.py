"""What training a part of the experts costs: loss, memory and bytes of swarms whose peers hold all experts, mirror the others, or hold only theirs.

    python -m tests.bench.experts --json [--seeds 1,2,3] [--steps 200] [--only "MODE;..."] [--cache FILE] [--no-memory]

mode        full: every peer trains all experts; mirror: it has all of them and trains its own; held: it has only its own; spes: the rule of SPES (arXiv
            2602.11543), fixed disjoint blocks of experts with one holder each, others frozen, plain means, fp32
data        shared: all peers draw from all text; own30: a domain each and 30 % common text; own: a domain each and nothing else
tx_bytes    of packets, one peer to all others; dense_ratio is how many times that is less than fp32 deltas of the whole model would be
peak_bytes  most memory of one peer process above what imports take, for a model of 40 M parameters, one holding a quarter of the experts; see ``peak``

All swarms of one table do the same number of inner steps in all, so they see equally many tokens. The lab (``tests/bench/lab.py``) shares accounts,
codecs, merging and inner loop with the runtime.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decentra.config import PeerConfig
from decentra.delta.account import Account
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.ids import PeerId, expert_of
from tests.bench.deltas import bench_manifest, layout_of
from tests.bench.lab import inner_loop, mean_loss, parse_settings, run_swarm
from tests.bench.learning import Cache
from tests.bench.measure import arguments, machine, show

NUM_EXPERTS, NUM_STEPS, H = 8, 200, 10
DATA = {
    "shared": ("data.shared_fraction=1.0",),
    "own30": ("data.shared_fraction=0.3",),
    "own": ("data.shared_fraction=0.0",),
}
PEAK_SHAPE = {"hidden_size": 384, "num_layers": 8, "expert_hidden_size": 512, "num_experts": 8}  # 4 of 5 parameters are experts'


@dataclass(frozen=True)
class Arm:
    """One row: ``peers`` peers with ``experts`` of the eight experts each."""

    mode: str
    peers: int
    experts: int
    data: str

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.peers} peers, {self.experts} experts, {self.data}"

    @property
    def holders(self) -> float:
        return self.peers * self.experts / NUM_EXPERTS

    @property
    def settings(self) -> tuple[str, ...]:
        codec = "fp32" if self.mode == "spes" else "int8"
        place = "held" if self.mode == "held" else "mirror"
        return (
            f"lab.peers={self.peers}", f"placement.experts_per_peer={self.experts}", f"placement.mode={place}", f"codec.name={codec}",
            f"rounds.inner_steps={H}", "lab.report_every=0", *DATA[self.data],
        )  # fmt: skip


def _arms() -> tuple[Arm, ...]:
    arms = []
    for data in ("own30", "shared"):
        arms += [Arm("full", 8, 8, data), Arm("mirror", 8, 2, data), Arm("held", 8, 2, data), Arm("spes", 8, 1, data)]
        arms += [Arm("full", 4, 8, data), Arm("mirror", 4, 4, data), Arm("held", 4, 4, data)]
    return (*arms, Arm("held", 4, 2, "own"), Arm("mirror", 4, 2, "own"), Arm("held", 4, 2, "own30"))


ARMS = _arms()


def run(arm: Arm, seed: int, steps: int) -> dict[str, Any]:
    """Loss, bytes of one peer's packets to all others, and rounds. Peers of a swarm of four do twice the steps of those of eight."""
    manifest, lab = parse_settings([*arm.settings, f"lab.steps={steps * 8 // arm.peers}"])
    model, swarm = run_swarm(manifest.model_copy(update={"seed": seed}), lab, lambda _: None)
    sent = swarm.packet_bytes / lab.peers * (lab.peers - 1)
    dense = 4.0 * swarm.layout.num_elements * swarm.num_rounds * (lab.peers - 1)
    return {"loss": mean_loss(model, manifest, lab.eval_windows), "bytes": sent, "dense_ratio": dense / sent}


def table(arms: Sequence[Arm], seeds: Sequence[int], steps: int, cache: Cache, say: Callable[[str], None]) -> list[dict[str, Any]]:
    found: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:  # the whole table for a seed, then for the next: broken off, it is a table of fewer seeds
        for arm in arms:
            start_s, key = time.process_time(), [arm.mode, list(arm.settings), seed, steps]
            if (known := cache.find(key)) is None:
                cache.keep(key, known := run(arm, seed, steps))
            found[arm].append(known)
            say(
                f"{arm.name}, seed {seed}: loss {known['loss']:.4f}, {known['bytes'] / 1e6:.1f} MB, {time.process_time() - start_s:.0f} CPU-s"
            )
    rows = []
    for arm, results in found.items():
        losses = [r["loss"] for r in results]
        rows.append(
            {
                "mode": arm.mode, "num_peers": arm.peers, "experts_per_peer": arm.experts, "holders": arm.holders, "data": arm.data,
                "seeds": list(seeds), "losses": losses, "loss_mean": statistics.fmean(losses),
                "loss_sem": statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
                "tx_bytes": statistics.fmean(r["bytes"] for r in results), "dense_ratio": statistics.fmean(r["dense_ratio"] for r in results),
            }
        )  # fmt: skip
    return rows


# ---------------------------------------------------------------- memory


def peaks() -> dict[str, int]:
    """Peak memory above the imports of a peer with all experts and of one with a quarter of them in each mode, each in a process of its own."""
    found = {}
    for mode in ("full", "mirror", "held"):
        line = [sys.executable, "-m", "tests.bench.experts", "--peak", mode]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        found[mode] = int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
    return found


def peak(mode: str) -> int:
    """Bytes: this process's peak over what it had after its imports, after inner steps and a round of every fragment that it trains."""
    torch.set_num_threads(1)
    before = _peak_now()
    manifest, lab = bench_manifest(**PEAK_SHAPE), parse_settings([])[1]
    own = tuple(range(NUM_EXPERTS if mode == "full" else NUM_EXPERTS // 4))
    layout = layout_of(manifest)
    trained = [f for f in layout.fragments if (e := expert_of(f.module)) is None or e in own]
    inner = inner_loop(
        manifest, lab, layout, PeerConfig(), PeerId("peak"), frozenset(f.id for f in trained), own if mode == "held" else None
    )
    followed = layout.fragments if mode == "mirror" else trained
    accounts = {}
    for fragment in followed:
        state = AnchorState(inner.snapshot(fragment.id).live_N)
        accounts[fragment.id] = Account(fragment, state, anchor_digest(encode_anchor(fragment, state)))
    for _ in range(2):
        inner.step()
    for fragment in trained:
        account = accounts[fragment.id]
        snapshot = inner.snapshot(fragment.id)
        account.encode(1, snapshot.live_N, "topk64", 1.0, snapshot.num_tokens, snapshot.num_steps)
        inner.shift(fragment.id, account.excluded(account.anchor_state, account.anchor_digest))
    return _peak_now() - before


def _peak_now() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", default="1,2,3")
        parser.add_argument("--steps", type=int, default=NUM_STEPS, help="inner steps of each of eight peers")
        parser.add_argument("--only", help="rows by their names, separated by semicolons; default: all")
        parser.add_argument("--cache", type=Path, help="file of results that are not computed again")
        parser.add_argument("--no-memory", action="store_true")
        parser.add_argument("--peak", choices=("full", "mirror", "held"), help="measure this process and nothing else")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    if args.peak:
        show({"mode": args.peak, "peak_bytes": peak(args.peak)}, as_json=True)
        return 0
    torch.set_num_threads(1)
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", file=sys.stderr, flush=True)

    names = None if args.only is None else [name.strip() for name in args.only.split(";")]
    arms = [arm for arm in ARMS if names is None or arm.name in names]
    result: dict[str, Any] = {"machine": machine(), "steps": args.steps}
    result["rows"] = table(arms, [int(s) for s in args.seeds.split(",")], args.steps, Cache(args.cache), say)
    if not args.no_memory:
        found = peaks()
        result |= {"peak_bytes": found, "peak_share": {mode: found[mode] / found["full"] for mode in found}}
        for row in result["rows"]:
            row["peak_bytes"] = found.get(row["mode"])
    show(result, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
