"""All benchmarks one after the other, and one table of what they found.

    python -m tests.bench.all [--quick] [--json]     (make bench)

Each runs in a process of its own; its whole JSON goes to ``bench-out/NAME.json``. A benchmark that fails is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import arguments, machine, show

OUT = Path("bench-out")


def commands(*, is_quick: bool) -> dict[str, list[str]]:
    quick = ["--quick"] if is_quick else []
    short = ["--seconds", "60"] if is_quick else []
    return {
        "codec": ["codec"],
        "round": ["round"],
        "round-50mbit": ["round", "--rate-mbit", "50", "--rtt-ms", "50"],
        "control": ["control"],
        "control-100ms": ["control", "--rtt-ms", "100"],
        "wan-50mbit": ["wan", *short],
        "wan-10mbit": ["wan", "--rate-mbit", "10", *short],
        "downlink": ["downlink"],
        "join": ["join", *(["--joins", "3"] if is_quick else [])],
        "experts": ["experts", "--cache", str(OUT / "experts.jsonl"), "--seeds", "1", *(["--steps", "10"] if is_quick else [])],
        "learning": ["learning", "--plot", str(OUT / "loss-bytes.png"), "--cache", str(OUT / "learning.jsonl"), *quick],
    }


def run(name: str, args: Sequence[str]) -> dict[str, Any]:
    """One benchmark's result; ``failed`` with its last words where it has none."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    OUT.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-m", f"tests.bench.{args[0]}", "--json", *args[1:]], stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    (OUT / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def table(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(what, value, next to what) rows."""
    rows: list[tuple[str, str, str]] = []
    for name, r in results.items():
        if "failed" in r:
            rows.append((name, "failed", str(r["failed"])))
        elif name == "codec":
            for s in r["settings"]:
                bound = f"; index {s['index_bits']} of {s['index_bound_bits']} bits" if "index_bits" in s else ""
                rows.append(
                    (f"codec {s['codec']}", f"{s['bits_per_param_model']} bits/param", f"{s['times_smaller_than_fp32']}x below fp32{bound}")
                )
                rows.append(
                    (f"codec {s['codec']}, time", f"{s['encode_over_copy']} / {s['decode_over_copy']} copies", "encode / decode and add")
                )
        elif name.startswith("round"):
            others = f"hivemind fp16 {r.get('hivemind_s')} s, torchft fp32 {r.get('torchft_s')} s, star fp32 {r.get('star_s')} s"
            rows.append(
                (
                    f"{name}, {r['num_peers']} peers x {r['num_params'] / 1e6:.1f} M",
                    f"{r['decentra_s']} s ({', '.join(r['codecs'])})",
                    others,
                )
            )
        elif name == "downlink":
            few, many = r["rows"][0], r["rows"][-1]
            what = f"{many['num_holders']} holders against {few['num_holders']}, anchors equal: {few['anchors_equal'] and many['anchors_equal']}"
            rows.append(("bytes down per peer and round", f"{r['ratio']}x", what))
        elif name.startswith("control"):
            rows.append(
                (f"{name}, {r['num_peers']} peers", f"p50 {r['p50_ms']} ms, p95 {r['p95_ms']} ms", f"{r['cpu_s_per_round']} CPU-s a round")
            )
        elif name.startswith("wan"):
            rows.append(
                (
                    f"{name}, {r['num_peers']} peers x {r['num_params'] / 1e6:.1f} M",
                    f"{100 * r['utilisation']:.0f} % of the time in inner steps",
                    f"dense fp32: {100 * r['dense_utilisation']:.1f} %; {r['evictions']} evictions; {r['steps_per_round']} steps a round, H ="
                    f" {r['inner_steps']}",
                )
            )
        elif name == "join":
            times = f"admitted p95 {r['admitted_p95_s']} s, training p95 {r['ready_p95_s']} s"
            rows.append(
                (f"{r['num_ok']} of {r['num_joins']} cold joins, {r['mode']}", times, f"{r['bytes_over_needed']}x the bytes needed")
            )
        elif name == "experts":
            for mode, share in r["peak_share"].items():
                what = f"{r['process'][mode]['dense_ratio']}x fewer bytes than dense fp32 of the whole model"
                rows.append((f"peak memory of a peer, {mode}", f"{100 * share:.0f} %", what))
            for row in r["rows"]:
                who = f"{row['num_peers']} peers, {row['experts_per_peer']} experts each, data {row['data']}"
                rows.append(
                    (f"experts: {row['mode']}, {who}", f"loss {row['loss_mean']}", f"{row['holders']} holders; seeds {row['seeds']}")
                )
        else:
            for row in r["rows"]:
                gap = "" if row["gap_closed"] is None else f"gap closed {row['gap_closed']}"
                ratio = "" if row["bytes_ratio_to_ddp"] is None else f"{row['bytes_ratio_to_ddp']}x fewer bytes than DDP; "
                rows.append((f"learning: {row['method']}", f"loss {row['loss_mean']}", ratio + gap))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--quick", action="store_true", help="learning with one seed and few steps")
        parser.add_argument("--only", help="names, comma-separated")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    wanted = {n: c for n, c in commands(is_quick=args.quick).items() if args.only is None or n in args.only.split(",")}
    results = {name: run(name, command) for name, command in wanted.items()}
    lines = [
        f"Measured on {machine()}.",
        "",
        "| what | value | |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in table(results)),
    ]
    OUT.mkdir(exist_ok=True)
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    if args.json:
        show({"ok": not any("failed" in r for r in results.values()), "results": results}, as_json=True)
    return 1 if any("failed" in r for r in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
