"""A swarm that just runs, for long: does anything grow that should not?

    python -m tests.chaos.soak --json [--minutes 60] [--peers 3] [--stubs 200] [--seed 1]

Real processes on loopback (host, trainers), and in one process more ``--stubs`` members that only say that they are alive: the service's streams and views are
theirs, too. Every 20 s each process is looked at; what it was in the first third is left out, where caches fill.

rss_mb_per_hour   slope of a straight line through resident memory, of the process where it is steepest; rss_mb: where it ended
fds, threads, children, files   growth of the count between the middle of the run and its end, the largest of any process or folder
confirm_p95_s     time between two confirmed rounds of the trunk; ledger_mb_per_day: at the pace of this run
cpu_share         of one core, host and its p2p daemon
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from processes import TINY, Command, ctrl_c, lab

from decentra.averaging.client import AveragingClient
from decentra.cli.console import LogEvents
from decentra.cli.create import create
from decentra.identity import Keypair
from decentra.invite import parse_invite
from decentra.model.custom import model_code_digest
from decentra.protocol.messages import Counters, Heartbeat, Hello, Role
from decentra.wire.trust import TrustChain
from tests.bench.padded import model_code
from tests.chaos import annals
from tests.chaos.telling import end, teller

LOOK_S, READY_S, PAD_S = 20.0, 120.0, 0.2
SETTINGS = ("rounds.inner_steps=10", "admission.max_members=1000", "rounds.heartbeat_s=5", "rounds.lease_s=15")


@dataclass(frozen=True)
class Look:
    at_s: float
    rss_mb: float
    fds: int
    threads: int
    children: int
    cpu_s: float


def look(process: psutil.Process, began: float) -> Look:
    family = [process, *process.children(recursive=True)]
    cpu_s = sum(sum(p.cpu_times()[:2]) for p in family)
    return Look(time.monotonic() - began, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads(), len(family) - 1, cpu_s)


def measure(minutes: float, num_peers: int, num_stubs: int, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="decentra-soak-") as name, lab(Path(name)) as world:
        code = model_code(Path(name) / "model.py", pad_s=PAD_S)
        run = create(world.root / "run", None, ['name="soak"', *TINY, *SETTINGS, f'model.code="{model_code_digest(code)}"'], code)[0]
        host = world.host(run, "--model-code", str(code), "--uses", str(num_peers + num_stubs + 8)).start()
        invite = world.invite_of(host)
        peers = [world.member("join", invite, f"peer-{i}", "--model-code", str(code)).start() for i in range(num_peers)]
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 2, READY_S)
        line = [sys.executable, "-m", "tests.chaos.soak", "--as-stubs", invite, "--stubs", str(num_stubs)]
        stubs = subprocess.Popen(line, stdout=subprocess.PIPE, text=True) if num_stubs else None
        try:
            if stubs is not None:
                assert stubs.stdout is not None
                say(f"stubs: {stubs.stdout.readline().strip()}")
            found = _watch([host, *peers], Path(name), minutes, say)
            code_now, status, _ = world.run("status", invite, "--json")
            num_live = sum(m["is_live"] for m in status["members"]) if code_now == 0 else 0
        finally:
            if stubs is not None:
                stubs.terminate()
                stubs.wait(20)
        ended = [ctrl_c(p)[0] for p in peers]
        ctrl_c(host)
        world.assert_nothing_left()
        times = [annals.unix_s(e) for e in host.events("round-confirmed") if e["fragment"] == "trunk/0"]
        gaps = [b - a for a, b in pairwise(times)]
        ledger_bytes = sum(p.stat().st_size for p in run.host.glob("ledger.db*"))
        return found | {
            "minutes": minutes, "peers": num_peers, "stubs": num_stubs, "members_live": num_live, "rounds": len(times),
            "rounds_given_up": len(host.events("round-abandoned")) + len(host.events("round-void")),
            "confirm_p50_s": statistics.median(gaps), "confirm_p95_s": annals.percentile(gaps, 0.95),
            "ledger_mb_per_day": ledger_bytes / 1e6 / (times[-1] - times[0]) * 86_400, "exit_codes": ended,
        }  # fmt: skip


def _watch(commands: Sequence[Command], folder: Path, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.monotonic()
    processes = {c.name: psutil.Process(c.popen.pid) for c in commands if c.popen is not None}
    looks: dict[str, list[Look]] = {name: [] for name in processes}
    files: list[int] = []
    while time.monotonic() < began + 60 * minutes:
        time.sleep(LOOK_S)
        for name, process in processes.items():
            looks[name].append(look(process, began))
        files.append(sum(len(names) for _, _, names in os.walk(folder)))
        if len(files) % 15 == 0:
            say(", ".join(f"{name} {seen[-1].rss_mb:.0f} MB" for name, seen in looks.items()) + f", {files[-1]} files")
    slopes = {name: _slope(seen[len(seen) // 3 :]) for name, seen in looks.items()}
    steepest = max(slopes, key=lambda n: slopes[n])
    half = len(files) // 2
    host = looks["host"]
    return {
        "rss_mb_per_hour": slopes[steepest], "steepest": steepest, "rss_mb": {name: round(seen[-1].rss_mb) for name, seen in looks.items()},
        "rss_mb_per_hour_each": {name: round(s, 1) for name, s in slopes.items()},
        "fds": max(seen[-1].fds - seen[half].fds for seen in looks.values()), "threads": max(s[-1].threads - s[half].threads for s in looks.values()),
        "children": max(s[-1].children - s[half].children for s in looks.values()), "files": files[-1] - files[half], "files_now": files[-1],
        "cpu_share": (host[-1].cpu_s - host[0].cpu_s) / max(1.0, host[-1].at_s - host[0].at_s),
    }  # fmt: skip


def _slope(looks: Sequence[Look]) -> float:
    """MB per hour, least squares."""
    if len(looks) < 3:
        return float("nan")
    return 3600 * statistics.linear_regression([one.at_s for one in looks], [one.rss_mb for one in looks]).slope


# ---------------------------------------------------------------- members that only say that they are alive


async def _stub(line: str, number: int) -> None:
    invite, key = parse_invite(line), Keypair.from_seed(number.to_bytes(32, "big"))
    client = AveragingClient(invite.services, TrustChain(invite.run_id, invite.run_public), LogEvents(), key=key, token=invite.token)
    await client.join(Role.KEEPER, f"stub-{number}", f"stub-{number}")
    session = await client.attend(Hello(key.peer_id, Role.KEEPER, f"stub-{number}", f"stub-{number}"))

    async def beat() -> None:
        for seq in range(1, 1 << 30):
            await asyncio.sleep(5)
            await session.send(Heartbeat(key.peer_id, seq, Counters()))

    beating = asyncio.create_task(beat())
    try:
        async for _ in session.messages():
            pass
    finally:
        beating.cancel()


async def _stubs(line: str, num: int) -> None:
    tasks = []
    for number in range(1, num + 1):
        tasks.append(asyncio.create_task(_stub(line, number)))
        await asyncio.sleep(0.05)
    await asyncio.sleep(5)
    print(f"{sum(not t.done() for t in tasks)} of {num} attend", flush=True)
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--stubs", type=int, default=200)
    parser.add_argument("--as-stubs", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.as_stubs:
        asyncio.run(_stubs(args.as_stubs, args.stubs))
        return 0
    found = measure(args.minutes, args.peers, args.stubs, teller())
    summary = (
        f"{found['minutes']:g} minutes: {found['rss_mb_per_hour']:+.1f} MB an hour ({found['steepest']}), fds {found['fds']:+d}, threads"
        f" {found['threads']:+d}, files {found['files']:+d}, {found['rounds']} rounds, host at {found['cpu_share']:.0%} of a core"
    )
    return end(found, summary, as_json=args.json)


if __name__ == "__main__":
    raise SystemExit(main())
