"""Eight peers on hosts of their own, and misfortune: kill -9, frozen for 20 s, cable pulled for 30 s. What does the swarm still get done?

    python -m tests.chaos.churn --json [--minutes 30] [--peers 8] [--kills 30] [--seed 1]

Real processes in network namespaces (needs root); a supervisor starts who was killed again a second later. Steps are padded by sleeping, so that the
machine's cores are not the limit (``cpu_idle`` says how idle they were). Three parts, one after the other, in one run:

fault-free    a third of ``--minutes`` (5 at least)
churn         ``--minutes`` with faults at random, ``--faults-per-hour`` of them per peer (3.9, as published for 32 replicas and 125 faults an hour)
kills         ``--kills`` peers are killed one after the other, each when the one before contributes again: for the percentiles

throughput_ratio   confirmed tokens of the trunk per second, churn over fault-free; bound_ratio: one less the share of peers' time that the faults took
settled_ratio      rounds of all fragments that ended in churn: how many of them were confirmed
participation      contributors over live peers, mean over the trunk's settled rounds of churn; live: nothing befell it while the round was open
survivor_p95_s     by how much the settlement after a kill came later than the median time between settlements
victim_p95_s       from the kill to the first settlement with a packet of the peer that was killed, for a round opened after it
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "netlab"))

from crew import ORGANISER, Crew
from lab import KernelLab, why_impossible

from decentra.cli.rundir import RunDir
from tests.bench.padded import model_code
from tests.chaos import annals
from tests.chaos.annals import Outage
from tests.chaos.telling import at_least_one, end, teller

STOP_S, CUT_S, RESTART_S = 20.0, 30.0, 1.0
PAD_S = 0.3  # of a step
SETTINGS = ("rounds.inner_steps=20", "placement.experts_per_peer=1", "placement.adopt_s=60", "rounds.lease_s=8", "model.num_experts=8")
READY_S = 180.0
BACK_S = 120.0  # the longest anybody may take to contribute again


@dataclass
class Storm:
    """The swarm, and what befell whom. Everything here happens at real times, since the machine is real."""

    crew: Crew
    lab: KernelLab
    invite: str
    rng: random.Random
    say: Callable[[str], None]
    outages: list[Outage] = field(default_factory=list)
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)  # (when, repair)
    busy: set[str] = field(default_factory=set)

    def wait_until(self, end_s: float) -> None:
        """Sleep until then, doing the repairs that fall due."""
        while (now := time.time()) < end_s:
            for job in [j for j in self.due if j[0] <= now]:
                self.due.remove(job)
                job[1]()
            time.sleep(0.1)

    def befall(self, name: str, kind: str) -> None:
        began = time.time()
        self.busy.add(name)
        child = self.crew.peers[name]
        if kind == "kill":
            child.end_now()
            self._repair(began, RESTART_S, name, kind, lambda: self.crew.join(name, self.invite))
        elif kind == "stop":
            child.send(signal.SIGSTOP)
            self._repair(began, STOP_S, name, kind, lambda: child.send(signal.SIGCONT))
        else:
            self.lab.set_link(name, is_up=False)
            self._repair(began, CUT_S, name, kind, lambda: self.lab.set_link(name, is_up=True))
        self.say(f"{kind} {name}")

    def _repair(self, began: float, after_s: float, name: str, kind: str, how: Callable[[], object]) -> None:
        def repair() -> None:
            how()
            self.outages.append(Outage(name, kind, began, time.time()))
            self.busy.discard(name)

        self.due.append((began + after_s, repair))

    def churn(self, seconds: float, faults_per_peer_hour: float) -> tuple[float, float]:
        start = time.time()
        at = start
        while True:
            at += self.rng.expovariate(faults_per_peer_hour * len(self.crew.peers) / 3600)
            if at >= start + seconds:
                break
            self.wait_until(at)
            if free := sorted(self.crew.peers.keys() - self.busy):
                self.befall(self.rng.choice(free), self.rng.choice(("kill", "stop", "cut")))
        self.wait_until(start + seconds)
        return start, time.time()

    def kills(self, num: int) -> list[tuple[str, float]]:
        found = []
        names = sorted(self.crew.peers)
        while self.due:
            self.wait_until(time.time() + 1)
        for number in range(num):
            self.wait_until(time.time() + self.rng.uniform(0, 8))  # in any phase of a round
            name, killed_at = names[number % len(names)], time.time()
            last = max(e["round"] for e in self.crew.host.events("round-opened") if e["fragment"] == "trunk/0")
            self.befall(name, "kill")
            while not self._contributes(name, last) and time.time() < killed_at + BACK_S:
                self.wait_until(time.time() + 1)
            found.append((name, killed_at))
            self.say(f"kill {number + 1} of {num}: {name} contributes again after {time.time() - killed_at:.0f} s")
        return found

    def _contributes(self, name: str, after: int) -> bool:
        """Its packet is in a round that opened after round ``after``."""
        mine = self.crew.peers[name].events("committed")
        return any(e["fragment"] == "trunk/0" and e["ending"] == "applied" and e["round"] > after for e in mine)


def measure(minutes: float, num_peers: int, num_kills: int, rate: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    names = [f"p{i}" for i in range(num_peers)]
    with tempfile.TemporaryDirectory(prefix="decentra-churn-") as folder, KernelLab((ORGANISER, *names)) as lab:
        code = model_code(Path(folder) / "model.py", pad_s=PAD_S)
        with Crew(lab, Path(folder), SETTINGS, code) as crew:
            invite = crew.start_host()
            for name in names:
                crew.join(name, invite)
            storm = Storm(crew, lab, invite, random.Random(seed), say)

            def all_in() -> bool:
                return any(e["fragment"] == "trunk/0" and e["num_offers"] == num_peers for e in crew.host.events("round-settled"))

            crew.until(all_in, READY_S, "a round has the offers of all")
            say("all contribute: the part without faults begins")
            psutil.cpu_times_percent()
            calm = time.time(), time.time() + max(300.0, 20 * minutes)
            storm.wait_until(calm[1])
            idle = psutil.cpu_times_percent().idle / 100
            say(f"churn begins; the cores were {idle:.0%} idle")
            stormy = storm.churn(60 * minutes, rate)
            kills = storm.kills(num_kills)
            storm.wait_until(time.time() + 2 * STOP_S)
            crew.stop_run()
            said = crew.until_over(90)
            events = crew.host.events()
            records = crew.ledger()
            genesis = RunDir(crew.run).manifest().genesis
            steps = sum(len(child.events("recovered")) for child in crew.peers.values())
        rounds = annals.rounds_of(records, events, {str(result["peer"]): name for name, result in said.items()})
    away = storm.outages
    taken_s = sum(max(0.0, min(o.ended_s, stormy[1]) - max(o.began_s, stormy[0])) for o in away)
    rates = [annals.confirmed_tokens(rounds, *part) / (part[1] - part[0]) for part in (calm, stormy)]
    gaps = _gaps(rounds, *calm)
    survivors = [_late(rounds, at) - statistics.median(gaps) for _, at in kills if annals.settled_before(rounds, at) is not None]
    victims = [(annals.contributed_at(rounds, name, at) or at + BACK_S) - at for name, at in kills]
    return {
        "peers": num_peers, "minutes": minutes, "seed": seed,
        "faults": {kind: sum(o.kind == kind and o.began_s < stormy[1] for o in away) for kind in ("kill", "stop", "cut")},
        "kills": num_kills, "cpu_idle": idle, "round_p50_s": statistics.median(gaps), "tokens_per_s": rates[0],
        "throughput_ratio": rates[1] / rates[0], "bound_ratio": 1 - taken_s / (num_peers * (stormy[1] - stormy[0])),
        "settled_ratio": annals.settled_ratio(rounds, *stormy), "settled_ratio_fault_free": annals.settled_ratio(rounds, *calm),
        "settled_ratio_kills": annals.settled_ratio(rounds, stormy[1], time.time()),
        "participation": annals.participation(rounds, names, away, *stormy),
        "participation_fault_free": annals.participation(rounds, names, away, *calm),
        "survivor_p50_s": annals.percentile(survivors, 0.5), "survivor_p95_s": annals.percentile(survivors, 0.95),
        "victim_p50_s": annals.percentile(victims, 0.5), "victim_p95_s": annals.percentile(victims, 0.95), "recoveries": steps,
        "forks": annals.num_forks(records), "anchors_equal": annals.are_confirmed([s["anchors"] for s in said.values()], records, genesis),
        "curve": _curve(rounds, calm[0]), "marks": [[round(o.began_s - calm[0], 1), f"{o.kind} {o.peer}"] for o in away],
        "parts_s": [0.0, calm[1] - calm[0], stormy[1] - calm[0]],
    }  # fmt: skip


def _gaps(rounds: Sequence[annals.Round], start_s: float, end_s: float) -> list[float]:
    times = sorted(r.settled_s for r in annals.of_trunk(rounds) if r.settled_s is not None and start_s <= r.settled_s < end_s)
    return [b - a for a, b in pairwise(times)]


def _late(rounds: Sequence[annals.Round], killed_at: float) -> float:
    """Time between the settlements around the kill."""
    before, after = annals.settled_before(rounds, killed_at), annals.settled_after(rounds, killed_at)
    return (after if after is not None else killed_at + BACK_S) - (before or killed_at)


def _curve(rounds: Sequence[annals.Round], start_s: float) -> list[list[float]]:
    """(seconds, confirmed tokens so far), for the report's plot."""
    curve, total = [], 0
    for r in sorted((r for r in annals.of_trunk(rounds) if r.confirmed_s is not None), key=lambda r: r.confirmed_s or 0.0):
        if r.confirmed_s is not None and r.confirmed_s >= start_s:
            total += sum(r.tokens.values())
            curve.append([round(r.confirmed_s - start_s, 1), total])
    return curve


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--kills", type=at_least_one, default=30)
    parser.add_argument("--faults-per-hour", type=float, default=3.9, help="of each peer")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if (why := why_impossible()) is not None:
        print(f"no network lab: {why}", file=sys.stderr)
        return 3
    found = measure(args.minutes, args.peers, args.kills, args.faults_per_hour, args.seed, teller())
    summary = (
        f"throughput {found['throughput_ratio']:.3f} of fault-free (bound {found['bound_ratio']:.3f}), {found['settled_ratio']:.3f} of rounds confirmed,"
        f" participation {found['participation']:.3f}, survivors +{found['survivor_p95_s']:.1f} s p95, victims {found['victim_p95_s']:.1f} s p95"
    )
    return end(found, summary, as_json=args.json, holds=bool(not found["forks"] and found["anchors_equal"]))


if __name__ == "__main__":
    raise SystemExit(main())
