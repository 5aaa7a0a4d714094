"""Every trial of what must not break, one after the other, and a page with what came of each: chaos-out/report.html.

    python -m tests.chaos.all [--quick] [--only simulate,fuzz,...] [--json]     (make chaos)

Each runs in a process of its own; its JSON goes to ``chaos-out/NAME.json``, from which the page is drawn: with ``--only`` the others are those of the
last time. ``--quick``: minutes instead of two hours, for trying; its figures say nothing. Trials that need network namespaces are left out without root.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path("chaos-out")
Found = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One promise of one trial: what was asked, what came, whether it holds."""

    what: str
    target: str
    value: Callable[[Found], str]
    holds: Callable[[Found], bool]


@dataclass(frozen=True)
class Trial:
    name: str
    about: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    asked: tuple[Asked, ...]


def _least(key: str, least: float, what: str) -> Asked:
    return Asked(what, f"at least {least:g}", lambda f: f"{f[key]:.3f}", lambda f: f[key] >= least)


def _most(key: str, most: float, what: str, unit: str = "") -> Asked:
    return Asked(what, f"at most {most:g}{unit}", lambda f: f"{f[key]:.3g}{unit}", lambda f: f[key] <= most)


def _none(key: str, what: str) -> Asked:
    return Asked(what, "none", lambda f: str(f[key]), lambda f: not f[key])


def _true(key: str, what: str) -> Asked:
    return Asked(what, "yes", lambda f: "yes" if f[key] else "no", lambda f: bool(f[key]))


def _throughput(found: Found) -> bool:
    return bool(found["throughput_ratio"] >= min(0.98, found["bound_ratio"] - 0.01))


TRIALS = (
    Trial(
        "simulate", "whole swarms on virtual time, with crashes, cuts, losses and take-overs",
        ("decentra.cli.main", "simulate", "--seeds", "500", "--jobs", "2"), ("--seeds", "20"), (_none("violations", "promises broken"),),
    ),
    Trial(
        "fuzz", "spoilt bytes wherever bytes come from outside, under an audit hook", ("tests.chaos.fuzz", "--minutes", "5"), ("--turns", "12000"),
        (_none("finds", "inputs that brought up another error than one of ours"), _none("events", "things executed while reading")),
    ),
    Trial(
        "failover", "the averaging service is killed in any phase of a round, and starts again from its ledger", ("tests.chaos.failover", "--kills", "20"),
        ("--kills", "2"),
        (
            _none("settlements_lost", "settlements lost"), _none("settlements_doubled", "settlements doubled"),
            _most("next_settlement_p95_s", 10, "next confirmed round after the start, p95", " s"), _true("anchors_equal", "anchors are the ledger's"),
        ),
    ),
    Trial(
        "partition", "the network falls in two for 30 s", ("tests.chaos.partition",), ("--partitions", "1", "--seconds", "10"),
        (
            _none("forks", "forks"), _none("settled_alone", "rounds settled with packets from the other side"),
            _most("healed_p95_s", 15, "everybody holds the newest anchor after, p95", " s"), _true("anchors_equal", "anchors are the ledger's"),
        ),
    ),
    Trial(
        "harm", "a full disk, no memory, wrong clocks", ("tests.chaos.harm",), ("--only", "clock"),
        (
            _true("all_named", "each is said in words that name it"), _none("lost", "settlements lost"),
            _most("back_worst_s", 20, "contributes again after, at worst", " s"),
        ),
    ),
    Trial(
        "churn", "eight peers killed, frozen and cut off", ("tests.chaos.churn", "--minutes", "30"), ("--minutes", "1", "--kills", "2"),
        (
            Asked(
                "confirmed tokens against the part without faults", "0.98, or the share of time that peers were up less 0.01",
                lambda f: f"{f['throughput_ratio']:.3f} (up {f['bound_ratio']:.3f})", _throughput,
            ),
            _least("settled_ratio", 0.99, "rounds confirmed"), _least("participation", 0.9, "contributors over live peers"),
            _most("survivor_p95_s", 5, "the others' next settlement is late by, p95", " s"),
            _most("victim_p95_s", 20, "a killed peer contributes again after, p95", " s"),
            _none("forks", "forks"), _true("anchors_equal", "anchors are the ledger's"),
        ),
    ),
    Trial(
        "byzantine", "three of eight lie", ("tests.chaos.byzantine", "--arms", "mean,trimmed,judged"), ("--attacks", "flip", "--steps", "20"),
        (
            Asked(
                "worst loss over the honest peers alone", "at most 1.03", lambda f: f"{max(r['loss_ratio'] for r in f['rows']):.4f}",
                lambda f: max(r["loss_ratio"] for r in f["rows"]) <= 1.03,
            ),
            Asked(
                "honest peers in quarantine", "none", lambda f: str(sum(r["false_quarantines"] for r in f["rows"])),
                lambda f: not sum(r["false_quarantines"] for r in f["rows"]),
            ),
        ),
    ),
)  # fmt: skip


def run(trial: Trial, *, is_quick: bool) -> Found:
    """Its result, also kept in a file; ``failed`` with its last words where it has none."""
    print(f"--- {trial.name}: {trial.about}", file=sys.stderr, flush=True)
    began = time.monotonic()
    line = [sys.executable, "-m", *trial.command, *(trial.quick if is_quick else ()), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        found: Found = json.loads(lines[-1])
    else:
        found = {"failed": f"exit code {done.returncode}; {lines[-1] if lines else 'it said nothing'}"}
    found |= {
        "took_s": round(time.monotonic() - began),
        "command": " ".join(line[1:]),
        "is_quick": is_quick,
        "day": time.strftime("%Y-%m-%d %H:%M"),
    }
    OUT.mkdir(exist_ok=True)
    (OUT / f"{trial.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def rows_of(trial: Trial, found: Found) -> list[tuple[str, str, str, bool]]:
    """(what, asked, measured, holds) of each promise."""
    if "failed" in found:
        return [(trial.about, "it runs", found["failed"], False)]
    return [(a.what, a.target, a.value(found), a.holds(found)) for a in trial.asked]


# ---------------------------------------------------------------- the page


def _png(draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    draw(figure.subplots())
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _plot_churn(axes: Any, found: Found) -> None:
    axes.plot([t / 60 for t, _ in found["curve"]], [n / 1000 for _, n in found["curve"]], linewidth=1.4)
    for at, what in found["marks"]:
        axes.axvline(at / 60, color={"kill": "C3", "stop": "C1", "cut": "C2"}[what.split()[0]], linewidth=0.8, alpha=0.7)
    for name, at in zip(("without faults", "faults at random", "one kill after the other"), found["parts_s"], strict=True):
        axes.axvline(at / 60, color="black", linestyle=":", linewidth=1)
        axes.annotate(name, (at / 60, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set(xlabel="minutes (red: kill, orange: frozen, green: cut off)", ylabel="confirmed tokens, thousands")


def _plot_waits(axes: Any, found: Found) -> None:
    axes.bar(range(1, len(found["waits_s"]) + 1), found["waits_s"])
    axes.axhline(10, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="kill", ylabel="seconds to the next\nconfirmed round")


def _plot_healing(axes: Any, found: Found) -> None:
    axes.bar(range(1, len(found["healed_s"]) + 1), found["healed_s"])
    axes.axhline(15, color="0.5", linestyle="--", linewidth=1)
    axes.set_xticks(range(1, len(found["away"]) + 1), [f"{n} of {found['peers']} away" for n in found["away"]], fontsize=8)
    axes.set(ylabel="seconds until all hold\nthe newest anchor")


def _plot_attacks(axes: Any, found: Found) -> None:
    arms = (("loss_ratio", "judged"), ("loss_ratio_trimmed", "trimmed"), ("loss_ratio_undefended", "undefended"))
    for number, (key, name) in enumerate(arms):
        axes.bar([i + 0.27 * (number - 1) for i in range(len(found["rows"]))], [r[key] - 1 for r in found["rows"]], 0.25, label=name)
    axes.axhline(0.03, color="0.5", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(found["rows"])), [r["attack"] for r in found["rows"]])
    axes.set(ylabel="loss above honest peers alone", ylim=(min(-0.01, *(r["loss_ratio"] - 1 for r in found["rows"])), 0.2))
    axes.legend(fontsize=8)


_PLOTS: dict[str, Callable[[Any, Found], None]] = {
    "churn": _plot_churn, "failover": _plot_waits, "partition": _plot_healing, "byzantine": _plot_attacks,
}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
.held { color: #176b2c } .missed { color: #a11; font-weight: 600 } img { max-width: 100% } code { font-size: 13px; color: #555 }
"""


def page(results: dict[str, Found]) -> str:
    """The whole report as one HTML file that needs no other."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>decentra: what must not break</title><style>{_STYLE}</style><h1>What must not break</h1>"
    ]
    for trial in TRIALS:
        if (found := results.get(trial.name)) is None:
            continue
        quick = " Quick: these figures say nothing." if found.get("is_quick") else ""
        parts.append(f"<h2>{trial.name}: {html.escape(trial.about)}</h2><table><tr><th>promise<th>asked<th>measured<th></tr>")
        for what, target, value, holds in rows_of(trial, found):
            mark = "<td class=held>held" if holds else "<td class=missed>missed"
            parts.append(f"<tr><td>{html.escape(what)}<td>{html.escape(target)}<td>{html.escape(value)}{mark}</tr>")
        parts.append(
            f"</table><p><code>python -m {html.escape(found['command'])}</code><br>{found['day']}, {found['took_s']} s.{quick}</p>"
        )
        if trial.name in _PLOTS and "failed" not in found:
            parts.append(_png(lambda axes, draw=_PLOTS[trial.name], found=found: draw(axes, found)))
    return "\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(t.name for t in TRIALS))
    args = parser.parse_args(argv)
    only = args.only.split(",")
    if unknown := set(only) - {t.name for t in TRIALS}:
        parser.error(f"no trial {sorted(unknown)}; there are {', '.join(t.name for t in TRIALS)}")
    results: dict[str, Found] = {}
    for trial in TRIALS:
        kept = OUT / f"{trial.name}.json"
        if trial.name in only:
            results[trial.name] = run(trial, is_quick=args.quick)
        elif kept.is_file():
            results[trial.name] = json.loads(kept.read_text())
        (OUT / "report.html").write_text(page(results)) if results else None
    missed = 0
    for trial in TRIALS:
        for what, target, value, holds in rows_of(trial, results[trial.name]) if trial.name in results else ():
            missed += not holds
            print(f"{'held  ' if holds else 'MISSED'} {trial.name:10} {what}: {value} (asked: {target})", file=sys.stderr)
    print(f"the page is {(OUT / 'report.html').resolve()}", file=sys.stderr)
    if args.json:
        print(json.dumps({"ok": not missed, "missed": missed, "report": str(OUT / "report.html"), "trials": results}))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
