"""What training a part of the experts costs: loss, memory and bytes of swarms whose peers hold all experts, mirror the others, or hold only theirs.

    python -m tests.bench.experts --json [--seeds 1,2,3] [--steps 200] [--only "MODE;..."] [--cache FILE] [--no-memory]

mode        full: every peer trains all experts; mirror: it has all of them and trains its own; held: it has only its own; spes: the rule of SPES (arXiv
            2602.11543), fixed disjoint blocks of experts with one holder each, others frozen, plain means, fp32; affinity: mirror, and a token's choice adds
            3 to the logits of its peer's experts; refit: held, and 40 steps of the router alone on common text at the end; choosing: held, and of four windows
            of common text the one that the router sends to its peer's experts most (data affinity); both: that of eight windows,
            and the router refitted
data        shared: all peers draw from all text; own30: a domain each and 30 % common text; own: a domain each and nothing else
tx_bytes    of packets, one peer to all others; dense_ratio is how many times that is less than fp32 deltas of the whole model would be
peak_bytes  most memory of one ``decentra join`` above what imports take, a model of 40 M parameters; full: all experts, else a quarter of them

All swarms of one table do the same number of inner steps in all, so they see equally many tokens. The lab (``tests/bench/lab.py``) shares accounts,
codecs, merging and inner loop with the runtime.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.deltas import layout_of
from tests.bench.lab import mean_loss, parse_settings, run_swarm
from tests.bench.learning import Cache
from tests.bench.measure import arguments, machine, show
from tests.bench.round import Place, start_swarm
from tests.bench.story import Log

NUM_EXPERTS, NUM_STEPS, H = 8, 200, 10
NUM_PEAK_ROUNDS, PEAK_S = 2, 300.0
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
        place = "held" if self.mode in ("held", "refit", "choosing", "both") else "mirror"
        more = {
            "affinity": ("placement.affinity=3",),
            "refit": ("lab.refit=40",),
            "choosing": ("placement.data_affinity=4",),
            "both": ("placement.data_affinity=8", "lab.refit=40"),
        }.get(self.mode, ())
        return (
            f"lab.peers={self.peers}", f"placement.experts_per_peer={self.experts}", f"placement.mode={place}", f"codec.name={codec}",
            f"rounds.inner_steps={H}", "lab.report_every=0", *DATA[self.data], *more,
        )  # fmt: skip


def _arms() -> tuple[Arm, ...]:
    arms = []
    for data in ("own30", "shared"):
        arms += [Arm("full", 8, 8, data), Arm("mirror", 8, 2, data), Arm("held", 8, 2, data), Arm("spes", 8, 1, data)]
        arms += [Arm("affinity", 8, 2, data), Arm("refit", 8, 2, data), Arm("choosing", 8, 2, data), Arm("both", 8, 2, data)]
        arms += [Arm("full", 4, 8, data), Arm("mirror", 4, 4, data), Arm("held", 4, 4, data)]
    return (*arms, Arm("held", 4, 2, "own"), Arm("mirror", 4, 2, "own"), Arm("held", 4, 2, "own30"))


ARMS = _arms()


def run(arm: Arm, seed: int, steps: int, common: Sequence[str]) -> dict[str, Any]:
    """Loss, bytes of one peer's packets to all others, and rounds. Peers of a swarm of four do twice the steps of those of eight."""
    manifest, lab = parse_settings([*common, *arm.settings, f"lab.steps={steps * 8 // arm.peers}"])
    model, swarm = run_swarm(manifest.model_copy(update={"seed": seed}), lab, lambda _: None)
    sent = swarm.packet_bytes / lab.peers * (lab.peers - 1)
    dense = 4.0 * swarm.layout.num_elements * swarm.num_rounds * (lab.peers - 1)
    return {"loss": mean_loss(model, manifest, lab.eval_windows), "bytes": sent, "dense_ratio": dense / sent}


def table(
    arms: Sequence[Arm], seeds: Sequence[int], steps: int, cache: Cache, say: Callable[[str], None], common: Sequence[str] = ()
) -> list[dict[str, Any]]:
    found: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:  # the whole table for a seed, then for the next: broken off, it is a table of fewer seeds
        for arm in arms:
            start_s, key = time.process_time(), [arm.mode, list(arm.settings), seed, steps, *common]
            if (known := cache.find(key)) is None:
                cache.keep(key, known := run(arm, seed, steps, common))
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


def peaks() -> dict[str, dict[str, float]]:
    """Of one ``decentra join`` that trains all experts, and of ones with a quarter of them, after some rounds: peak memory above the imports,
    and how many times fewer bytes a round's packets have than fp32 deltas of the whole model."""
    return {mode: peak(mode) for mode in ("full", "mirror", "held")}


def peak(mode: str) -> dict[str, float]:
    """Most resident memory of the member's process (VmHWM) less that of a process with the same imports; its packets are top-k 64 of 4096."""
    settings = [f"model.{key}={value}" for key, value in PEAK_SHAPE.items()]
    settings += [
        "name=bench", "data.bytes_per_domain=60000", "data.held_out_bytes=2048", "codec.name=topk64", "rounds.inner_steps=2",
        f"placement.mode={'held' if mode == 'held' else 'mirror'}", f"placement.experts_per_peer={NUM_EXPERTS // (1 if mode == 'full' else 4)}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="decentra-bench-") as name:
        here = Place(None, Path(name))
        try:
            manifest, _ = start_swarm(here, settings, 1)
            log, deadline = Log(here.folder / "p0.log", "committed", "encoded"), time.monotonic() + PEAK_S
            while not log.read() or min(Counter(e["fragment"] for e in log.named("committed")).values(), default=0) < NUM_PEAK_ROUNDS:
                here.check()
                if time.monotonic() > deadline:
                    raise SystemExit(f"a peer of mode {mode} did not commit {NUM_PEAK_ROUNDS} rounds in {PEAK_S:g} s")
                time.sleep(0.5)
            sent = {e["fragment"]: e["num_bytes"] for e in log.named("encoded")}  # the newest packet of every fragment
            dense = 4.0 * layout_of(manifest).num_elements
            return {
                "peak_bytes": most_resident(here.processes[-1].pid) - _with_imports(), "packet_bytes": sum(sent.values()),
                "dense_ratio": dense / sum(sent.values()),
            }  # fmt: skip
        finally:
            here.close()


def most_resident(pid: int) -> int:
    """VmHWM of a process, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _with_imports() -> int:
    code = "import os, decentra.cli.join, tests.bench.experts as e; print(e.most_resident(os.getpid()))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", default="1,2,3")
        parser.add_argument("--steps", type=int, default=NUM_STEPS, help="inner steps of each of eight peers")
        parser.add_argument("--only", help="rows by their names, separated by semicolons; default: all")
        parser.add_argument("--cache", type=Path, help="file of results that are not computed again")
        parser.add_argument("--no-memory", action="store_true")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
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
        result |= {"process": found, "peak_share": {mode: f["peak_bytes"] / found["full"]["peak_bytes"] for mode, f in found.items()}}
        for row in result["rows"]:
            row["peak_bytes"] = found[row["mode"]]["peak_bytes"] if row["mode"] in found else None
    show(result, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
