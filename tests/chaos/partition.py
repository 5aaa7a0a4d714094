"""The network falls in two, again and again, and heals after 30 s: does the smaller half stay out of the ledger, and how soon is everybody one swarm again?

    python -m tests.chaos.partition --json [--partitions 8] [--peers 5] [--seconds 30] [--seed 1]

Real processes on hosts in network namespaces (needs root). Who is cut off from the organiser's host and from the others is drawn from the seed: one to
four of five peers; they reach each other meanwhile. The service and its keeper are on the organiser's side, so only that side may settle anything.

healed_p95_s         from the mending of the network until every peer is a holder of an opened round of the trunk: it has attested the newest anchor
contributing_p95_s   until a settled round of the trunk holds a packet of every peer: a round's inner steps and the way back
forks                heights for which two anchors were confirmed
settled_alone        rounds that were settled during a partition with a packet that its sender offered from the other side: zero, or the cut leaks
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "netlab"))

from crew import ORGANISER, Crew
from lab import KernelLab, why_impossible

from decentra.cli.rundir import RunDir
from tests.bench.padded import model_code
from tests.chaos import annals
from tests.chaos.telling import at_least_one, end, teller

PAD_S = 0.15
SETTINGS = ("rounds.inner_steps=20", "placement.experts_per_peer=1", "placement.adopt_s=120")
READY_S, BACK_S, BETWEEN_S = 180.0, 120.0, 8.0
Cut = tuple[float, float, list[str]]  # began, mended, who was away


def measure(num: int, num_peers: int, seconds: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    names, rng = [f"p{i}" for i in range(num_peers)], random.Random(seed)
    cuts: list[Cut] = []
    with tempfile.TemporaryDirectory(prefix="decentra-partition-") as folder, KernelLab((ORGANISER, *names)) as lab:
        code = model_code(Path(folder) / "model.py", pad_s=PAD_S)
        with Crew(lab, Path(folder), SETTINGS, code) as crew:
            invite = crew.start_host()
            for name in names:
                crew.join(name, invite)
            crew.until(lambda: _num_full(crew, num_peers, 0.0) > 0, READY_S, "a round has the offers of all")
            for number in range(num):
                away = rng.sample(names, rng.randint(1, num_peers - 1))
                time.sleep(BETWEEN_S + rng.uniform(0, 4))
                began = time.time()
                _between(lab.block, away, names)
                time.sleep(seconds)
                _between(lab.unblock, away, names)
                mended = time.time()
                cuts.append((began, mended, away))
                crew.until(
                    lambda since=mended: _num_full(crew, num_peers, since) > 0 or time.time() > since + BACK_S,
                    BACK_S + 10, "all contribute again",
                )  # fmt: skip
                say(f"partition {number + 1}: {len(away)} of {num_peers} away, all contribute {time.time() - mended:.1f} s after it")
            crew.stop_run()
            said = crew.until_over(90)
            events, records = crew.host.events(), crew.ledger()
            num_fetched = sum(len(child.events("recovered")) for child in crew.peers.values())
            genesis = RunDir(crew.run).manifest().genesis
    rounds = annals.rounds_of(records, events, {str(result["peer"]): name for name, result in said.items()})
    healed = [_whole_after(rounds, at, names, lambda r: r.opened_s, lambda r: r.holders) for _, at, _ in cuts]
    contributing = [_whole_after(rounds, at, names, lambda r: r.settled_s, lambda r: r.tokens.keys()) for _, at, _ in cuts]
    return {
        "partitions": num, "peers": num_peers, "seconds": seconds, "seed": seed, "away": [len(away) for _, _, away in cuts],
        "healed_p50_s": annals.percentile(healed, 0.5), "healed_p95_s": annals.percentile(healed, 0.95), "healed_s": [round(h, 1) for h in healed],
        "contributing_p50_s": annals.percentile(contributing, 0.5), "contributing_p95_s": annals.percentile(contributing, 0.95),
        "forks": annals.num_forks(records), "settled_alone": sum(_leaks(rounds, cut) for cut in cuts),
        "rounds_while_parted": sum(r.confirmed_s is not None and any(b < r.confirmed_s < e for b, e, _ in cuts) for r in annals.of_trunk(rounds)),
        "anchors_fetched_whole": num_fetched, "settled_ratio": annals.settled_ratio(rounds, cuts[0][0], time.time()),
        "anchors_equal": annals.are_confirmed([s["anchors"] for s in said.values()], records, genesis),
    }  # fmt: skip


def _num_full(crew: Crew, num_peers: int, since_s: float) -> int:
    events = crew.host.events("round-settled")
    return sum(e["fragment"] == "trunk/0" and e["num_offers"] == num_peers and annals.unix_s(e) > since_s for e in events)


def _between(change: Callable[[str, str], None], away: Sequence[str], names: Sequence[str]) -> None:
    for one in away:
        for other in (ORGANISER, *(n for n in names if n not in away)):
            change(one, other)


def _whole_after(
    rounds: Sequence[annals.Round], mended_s: float, names: Sequence[str], when: Callable[[annals.Round], float | None],
    who: Callable[[annals.Round], Any],
) -> float:  # fmt: skip
    """Seconds from the mending to the first round of the trunk that has everybody; the patience where there was none."""
    times = [t for r in annals.of_trunk(rounds) if (t := when(r)) is not None and t > mended_s and set(who(r)) >= set(names)]
    return min(times, default=mended_s + BACK_S) - mended_s


def _leaks(rounds: Sequence[annals.Round], cut: Cut) -> int:
    """Settled rounds that opened and settled inside the partition and hold a packet from the other side."""
    began, mended, away = cut
    inside = [r for r in rounds if r.settled_s is not None and r.opened_s > began and r.settled_s < mended]
    return sum(not r.tokens.keys().isdisjoint(away) for r in inside)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--partitions", type=at_least_one, default=8)
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if (why := why_impossible()) is not None:
        print(f"no network lab: {why}", file=sys.stderr)
        return 3
    found = measure(args.partitions, args.peers, args.seconds, args.seed, teller())
    summary = (
        f"{found['partitions']} partitions of {found['seconds']:g} s: healed after {found['healed_p50_s']:.1f} s (p95 {found['healed_p95_s']:.1f} s),"
        f" all contribute after {found['contributing_p50_s']:.1f} s (p95 {found['contributing_p95_s']:.1f} s), {found['forks']} forks"
    )
    return end(found, summary, as_json=args.json, holds=bool(not found["forks"] and not found["settled_alone"] and found["anchors_equal"]))


if __name__ == "__main__":
    raise SystemExit(main())
