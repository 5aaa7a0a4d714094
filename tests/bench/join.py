"""Cold joins, one after another, into a run whose trainer loads a core: how long until a peer is admitted, until it trains, and what it fetched.

    python -m tests.bench.join --json [--joins 50] [--mode held|mirror]

admitted_p95_s    from exec to the service's line that it is in; ready_p95_s: to its first inner step with all anchors it needs
bytes_over_needed all blob bytes a newcomer received until it left, right after, over the size of the anchors that it needs: a held one's are the
                  trunk, the router and its experts

Every join is a new process with a new identity, killed once it trains. Limits of this measurement: loopback, one machine, no loss; the death of a donor
in mid-transfer is a test (tests/integration/gossip), not a figure here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decentra.config import Manifest
from decentra.ids import expert_of
from tests.bench.deltas import layout_of
from tests.bench.measure import arguments, load, machine, show
from tests.bench.round import Place, start_swarm
from tests.bench.story import Log, lines

NUM_JOINS, READY_S = 50, 90.0
MODEL = {"hidden_size": 128, "num_layers": 4, "num_experts": 8, "expert_hidden_size": 192}


def measure(num_joins: int, mode: str) -> dict[str, Any]:
    settings = [f"model.{key}={value}" for key, value in MODEL.items()]
    settings += [
        "name=bench", "data.bytes_per_domain=60000", "data.held_out_bytes=2048", f"placement.mode={mode}", "placement.experts_per_peer=2",
        "admission.max_members=4000", "rounds.gather_s=1",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="decentra-bench-") as name:
        here = Place(None, Path(name))
        try:
            manifest, _ = start_swarm(here, settings, 1)
            line = [
                sys.executable,
                "-m",
                "decentra.cli.main",
                "invite",
                str(here.folder / "run"),
                "--uses",
                "4000",
                "--json",
            ]  # the host's is for 32
            invite = str(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])["invite"])
            trainer = Log(here.folder / "p0.log", "training")
            _wait(lambda: bool(trainer.read()), "the trainer")
            joins = [_join(here, manifest, invite, f"n{i}") for i in range(num_joins)]
        finally:
            here.close()
    good = [j for j in joins if j is not None]
    return {
        "num_joins": num_joins, "num_ok": len(good), "mode": mode,
        "admitted_p50_s": statistics.median(j["admitted_s"] for j in good), "admitted_p95_s": _p95([j["admitted_s"] for j in good]),
        "ready_p50_s": statistics.median(j["ready_s"] for j in good), "ready_p95_s": _p95([j["ready_s"] for j in good]),
        "bytes_over_needed": statistics.median(j["fetched"] / j["needed"] for j in good),
    }  # fmt: skip


def _join(here: Place, manifest: Manifest, invite: str, name: str) -> dict[str, float] | None:
    """One cold join; None when it did not train in time."""
    host, log = (
        Log(here.folder / "host.log", "admitted"),
        Log(here.folder / f"{name}.log", "service-connected", "placed-here", "training"),
    )
    num_before, began = len(host.read()), time.time()
    where = ["--name", name, "--dir", str(here.folder / name), "--listen", "/ip4/127.0.0.1/tcp/0", "--log-json", "--json"]
    process = here.start(name, [sys.executable, "-m", "decentra.cli.main", "join", invite, *where], name, out=f"{name}.out")
    try:
        _wait(lambda: bool(log.read() and [e for e in log.named("training") if e["experts"]]), name)
        admitted = host.read()[num_before:]
        experts = log.named("training")[-1]["experts"]
        needed = sum(
            4 * f.num_elements for f in layout_of(manifest).fragments
            if manifest.placement.mode == "mirror" or (e := expert_of(f.module)) is None or e in experts
        )  # fmt: skip
        process.terminate()
        process.wait(10)
        (left,) = lines(here.folder / f"{name}.out")[-1:]
        return {
            "admitted_s": admitted[0]["at_s"] - began, "ready_s": log.named("training")[-1]["at_s"] - began,
            "fetched": left["rx_bytes"], "needed": needed,
        }  # fmt: skip
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return None
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        here.processes.remove(process)


def _wait(holds: Any, what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not train within {READY_S:g} s")
        time.sleep(0.02)


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--joins", type=int, default=NUM_JOINS)
        parser.add_argument("--mode", choices=("held", "mirror"), default="held")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    show({"machine": machine(), "load_before": load()} | measure(args.joins, args.mode), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
