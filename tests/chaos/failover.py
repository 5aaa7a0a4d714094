"""The averaging service is killed again and again, each time when a round is under way, and started again from its ledger.

    python -m tests.chaos.failover --json [--kills 20] [--peers 3]

Real processes on loopback: a host (bootstrap node, service, keeper in one), kill -9, the same ports again. A kill comes after another number of milliseconds
each time, so that it meets rounds in every phase; the pauses are drawn from the seed.

settlements_lost      of those that the ledger held when the host was killed, how many it does not hold at the end: they are compared record by record
settlements_doubled   rounds that were settled to two different sets of packets
next_settlement_p95_s from the start of the new host's process to its first confirmed round
members_left          members that ended on the way; anchors_equal: what the peers hold at the end is what the ledger confirms
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from processes import Command, Lab, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.invite import parse_invite
from decentra.protocol import ledger
from tests.chaos.annals import percentile
from tests.chaos.telling import at_least_one, end, teller

READY_S = 90.0


def measure(num_kills: int, num_peers: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="decentra-failover-") as name, lab(Path(name)) as world:
        run = world.init("rounds.inner_steps=10")
        host = world.host(run)
        invite = world.invite_of(host.start())
        line = parse_invite(invite)
        ports = int(line.bootstrap[0].split("/")[4]), int(line.services[0].rpartition(":")[2])
        peers = [world.member("join", invite, f"peer-{i}").start() for i in range(num_peers)]
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 3, READY_S)
        before: list[ledger.Record] = []
        waits_s: list[float] = []
        num_lost = 0
        for kill in range(num_kills):
            time.sleep(rng.uniform(0.2, 2.5))  # wherever the rounds are then
            host.kill()
            now = ledger_records(run, Path(name) / f"ledger-{kill}")
            num_lost += _missing(before, now)
            before = now
            host = world.host(run, bootstrap_port=ports[0], service_port=ports[1])
            waits_s.append(_confirmed_after(world, host))
            say(f"kill {kill + 1}: the next round is confirmed {waits_s[-1]:.1f} s after the start of the new host")
        members_left = sum(not p.is_running for p in peers)
        ended = [ctrl_c(p)[0] for p in peers if p.is_running]
        ctrl_c(host)
        records = ledger_records(run, Path(name) / "ledger-end")
        num_lost += _missing(before, records)
        return {
            "kills": num_kills, "peers": num_peers, "seed": seed, "settlements": sum(isinstance(r, ledger.Settled) for r in records),
            "settlements_lost": num_lost, "settlements_doubled": _doubled(records), "rounds_confirmed": sum(isinstance(r, ledger.Confirmed) for r in records),
            "rounds_given_up": sum(isinstance(r, ledger.GaveUp) for r in records),
            "why_given_up": dict(Counter(f"{r.phase}: {r.why}" for r in records if isinstance(r, ledger.GaveUp))),
            "next_settlement_p50_s": statistics.median(waits_s),
            "next_settlement_p95_s": percentile(waits_s, 0.95), "waits_s": [round(w, 1) for w in waits_s], "members_left": members_left, "exit_codes": ended,
            "anchors_equal": _are_confirmed([p.last_json().get("anchors", {}) for p in peers], records, run),
        }  # fmt: skip


def _confirmed_after(world: Lab, host: Command) -> float:
    num = len(host.events("round-confirmed"))
    began = time.monotonic()
    host.start()
    world.wait_for("the next confirmed round", lambda: len(host.events("round-confirmed")) > num, READY_S)
    return time.monotonic() - began


def _missing(before: Sequence[ledger.Record], now: Sequence[ledger.Record]) -> int:
    """Settlements of an earlier reading that a later one does not begin with."""
    kept = list(now[: len(before)])
    return sum(isinstance(r, ledger.Settled) and (i >= len(kept) or kept[i] != r) for i, r in enumerate(before))


def _doubled(records: Sequence[ledger.Record]) -> int:
    found: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for record in records:
        if isinstance(record, ledger.Settled):
            s = record.settlement
            found.setdefault((s.fragment, s.round), set()).add(tuple(e.packet for e in s.entries))
    return sum(len(sets) > 1 for sets in found.values())


def _are_confirmed(anchors: Sequence[dict[str, str]], records: Sequence[ledger.Record], run: RunDir) -> bool:
    """Every peer ends on an anchor that is confirmed."""
    known = {(f, digest) for f, digest in run.manifest().genesis.items()}
    known |= {(r.fragment, r.anchor) for r in records if isinstance(r, ledger.Confirmed)}
    return all(held and all((f, digest) in known for f, digest in held.items()) for held in anchors)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=at_least_one, default=20)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    found = measure(args.kills, args.peers, args.seed, teller())
    summary = (
        f"{found['kills']} kills: {found['settlements_lost']} settlements lost, {found['settlements_doubled']} doubled,"
        f" next round confirmed after {found['next_settlement_p50_s']:.1f} s (p95 {found['next_settlement_p95_s']:.1f} s)"
    )
    return end(
        found,
        summary,
        as_json=args.json,
        holds=bool(not found["settlements_lost"] and not found["settlements_doubled"] and found["anchors_equal"]),
    )


if __name__ == "__main__":
    raise SystemExit(main())
