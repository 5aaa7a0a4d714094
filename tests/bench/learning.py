"""Loss against bytes: one peer alone, one with everybody's batch (what per-step averaging of gradients would do), and swarms between them.

    python -m tests.bench.learning --json [--quick] [--seeds 1,2,3] [--steps 500] [--only "METHOD;..."] [--plot loss-bytes.png] [--cache FILE]

All methods but two, which say so, do as many inner steps from the same start on the same text (all domains, every peer another order), each with the rates of
``METHODS``; how they were found, on seed 0, is in ``tests/bench/LOG.md``. The lab (``tests/bench/lab.py``) shares accounts, codecs, merging and inner
loop with the runtime; only waiting is modelled. The whole table is about 110 CPU-minutes.

bytes_per_peer    what one peer sends: its packets to every other peer; for the big batch 2 (P - 1) / P fp32 gradients every step (ring all-reduce)
bytes_ratio_to_ddp  how many times less than that
gap_closed        share of the loss between alone and the big batch that the method closes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.lab import Lab, mean_loss, parse_settings, run_alone, run_swarm
from tests.bench.measure import arguments, machine, show

EVERYTHING = ("data.shared_fraction=1.0", "placement.experts_per_peer=8")


@dataclass(frozen=True)
class Method:
    """One row. ``kind``: solo, ddp or swarm."""

    name: str
    kind: str
    settings: tuple[str, ...] = ()
    num_seeds: int | None = None  # the first so many; a point of the curve needs no error bar
    times: int = 1  # as many inner steps as the others; then it is compared with rows of as many only


def swarm(name: str, codec: str, h: int, *more: str, num_seeds: int | None = None, times: int = 1) -> Method:
    return Method(name, "swarm", (f"codec.name={codec}", f"rounds.inner_steps={h}", *more), num_seeds, times)


RATE = "train.lr=1.4e-3"
SPARSE = ("codec.error_feedback=0.95", "outer.lr=2")
METHODS = (
    Method("alone", "solo", (RATE,)),
    Method("big batch", "ddp", (RATE,)),
    swarm("int8, H 5", "int8", 5, RATE),
    swarm("int4, H 12", "int4", 12, RATE),
    swarm("top-k 64, H 5", "topk64", 5, RATE, *SPARSE),
    swarm("top-k 64, H 5, no error feedback", "topk64", 5, RATE, "codec.error_feedback=0", "outer.lr=2", num_seeds=1),
    swarm("int8, H 25", "int8", 25, RATE, num_seeds=1),
    swarm("top-k 64, H 25", "topk64", 25, RATE, *SPARSE, num_seeds=1),
    swarm("int8, H 14, twice the steps", "int8", 14, RATE, num_seeds=2, times=2),
    swarm("top-k 32, H 14, twice the steps", "topk32", 14, RATE, "codec.error_feedback=0.95", "outer.lr=3", num_seeds=2, times=2),
)


class Cache:
    """Results by what was asked, in a file of JSON lines: a table of hours goes on where it was interrupted, and several processes can fill it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def find(self, key: list[Any]) -> dict[str, Any] | None:
        lines = self.path.read_text().splitlines() if self.path is not None and self.path.exists() else []
        return next((r["result"] for r in map(json.loads, lines) if r["key"] == key), None)

    def keep(self, key: list[Any], result: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")


def run(method: Method, seed: int, steps: int, common: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Loss and bytes of one method and seed."""
    manifest, lab = parse_settings([*EVERYTHING, f"lab.steps={steps}", "lab.report_every=0", *common, *method.settings])
    manifest = manifest.model_copy(update={"seed": seed})
    if method.kind == "swarm":
        model, swarm = run_swarm(manifest, lab, say)
        sent = swarm.packet_bytes / lab.peers * (lab.peers - 1)
        return {"loss": mean_loss(model, manifest, lab.eval_windows), "bytes": sent, "params": swarm.layout.num_elements}
    if method.kind == "ddp":
        train = manifest.train.model_copy(update={"batch_size": manifest.train.batch_size * lab.peers})
        manifest = manifest.model_copy(update={"train": train})
    model = run_alone(manifest, lab, method.kind, None, say)
    params = sum(p.numel() for p in model.parameters())
    return {
        "loss": mean_loss(model, manifest, lab.eval_windows),
        "bytes": ddp_bytes(lab, params, steps) if method.kind == "ddp" else 0.0,
        "params": params,
    }


def ddp_bytes(lab: Lab, params: int, steps: int) -> float:
    return 2 * (lab.peers - 1) / lab.peers * 4 * params * steps


def table(
    methods: Sequence[Method], seeds: Sequence[int], steps: int, common: Sequence[str], say: Callable[[str], None], cache: Cache
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in methods:
        found = []
        for seed in seeds[: method.num_seeds]:
            num_steps = steps * method.times
            start_s, key = time.process_time(), [method.kind, list(method.settings), seed, num_steps, list(common)]
            if (known := cache.find(key)) is None:
                cache.keep(key, known := run(method, seed, num_steps, common, say))
            found.append(known)
            say(
                f"{method.name}, seed {seed}: loss {found[-1]['loss']:.4f}, {found[-1]['bytes'] / 1e6:.2f} MB, {time.process_time() - start_s:.0f} CPU-s"
            )
        losses, num_bytes = [f["loss"] for f in found], statistics.fmean(f["bytes"] for f in found)
        h = next((int(s.partition("=")[2]) for s in method.settings if s.startswith("rounds.inner_steps=")), None)
        sem = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
        rows.append(
            {
                "method": method.name, "h": h, "steps": steps * method.times, "seeds": list(seeds[: method.num_seeds]), "losses": losses,
                "loss_mean": statistics.fmean(losses), "loss_sem": sem,
                "bytes_per_peer": num_bytes,
                "bytes_ratio_to_ddp": ddp_bytes(_lab(common), found[0]["params"], steps * method.times) / num_bytes if num_bytes else None,
            }
        )  # fmt: skip
    alone, big = (next((r["loss_mean"] for r, m in zip(rows, methods, strict=True) if m.kind == kind), None) for kind in ("solo", "ddp"))
    for row, method in zip(rows, methods, strict=True):
        is_comparable = alone is not None and big is not None and alone != big and method.times == 1
        row["gap_closed"] = (alone - row["loss_mean"]) / (alone - big) if is_comparable else None
    return rows


def _lab(common: Sequence[str]) -> Lab:
    return parse_settings(list(common))[1]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss against bytes sent, both from the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        if row["bytes_per_peer"]:
            axes.errorbar(row["bytes_per_peer"] / 1e6, row["loss_mean"], yerr=row["loss_sem"], fmt="o", label=row["method"])
        else:
            axes.axhline(row["loss_mean"], linestyle="--", color="grey", label=row["method"])
    axes.set_xscale("log")
    axes.set_xlabel("MB sent per peer")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--quick", action="store_true", help="one seed and 60 steps: shows that it runs, not who is better")
        parser.add_argument("--seeds", default="1,2,3")
        parser.add_argument("--steps", type=int, default=500)
        parser.add_argument("--only", help="methods, separated by semicolons; default: all")
        parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="for all methods")
        parser.add_argument("--plot", type=Path)
        parser.add_argument("--cache", type=Path, help="file of results that are not computed again")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", file=sys.stderr, flush=True)

    seeds, steps = ([0], 60) if args.quick else ([int(s) for s in args.seeds.split(",")], args.steps)
    names = None if args.only is None else args.only.split(";")
    methods = [m for m in METHODS if names is None or m.name in names]
    rows = table(methods, seeds, steps, args.settings, say, Cache(args.cache))
    if args.plot is not None:
        plot(rows, args.plot)
    show({"steps": steps, "machine": machine(), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
