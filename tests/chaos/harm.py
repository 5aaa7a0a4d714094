"""Machines that are not as they should be: a full disk, the host's and a peer's, memory that a control group takes away, clocks that are wrong.

    python -m tests.chaos.harm --json [--only peer-disk,host-disk,memory,clock] [--clock-s 30]

Real processes on loopback. peer-disk and host-disk need root (a small file system in memory is mounted), memory needs root and control groups of
version 1, clock needs a C compiler; what cannot be tried is left out and said. A wrong clock is one for the whole process, gRPC's core included, and not
for p2pd.

rows[].named      it said what is wrong, in words that name it; peer-disk: or went on contributing (went_on), with what its store could give up
rows[].others_s   seconds until the others confirmed their next round of the trunk while it lasted
rows[].back_s     seconds until it contributed again after it was over; clock: while it lasts
rows[].lost       settlements of its ledger that are gone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from processes import TINY, Command, Lab, ctrl_c, lab, ledger_records

from decentra.cli.create import create
from decentra.cli.rundir import RunDir
from decentra.model.custom import model_code_digest
from decentra.protocol import ledger
from tests.bench.padded import model_code
from tests.chaos.telling import end, teller

READY_S, PAD_S, LAST_S, DISK_MB, GROUP_MB = 120.0, 0.1, 10.0, 64, 200
WRONG = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long off(void) { static long s; static int known; if (!known) { const char *t = getenv("CLOCK_OFF_S"); s = t ? atol(t) : 0; known = 1; } return s; }
int clock_gettime(clockid_t id, struct timespec *t) {
    long r = syscall(SYS_clock_gettime, id, t);
    if (r == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += off();
    return r;
}
int gettimeofday(struct timeval *restrict t, void *restrict z) { long r = syscall(SYS_gettimeofday, t, z); if (r == 0 && t) t->tv_sec += off(); return r; }
time_t time(time_t *t) { struct timespec n; clock_gettime(CLOCK_REALTIME, &n); if (t) *t = n.tv_sec; return n.tv_sec; }
"""
GROUPS = Path("/sys/fs/cgroup/memory")
Row = dict[str, Any]


class Trial:
    """A host and three peers, one of which has a folder that can be made full."""

    def __init__(self, world: Lab, *, small: str | None = None) -> None:
        """``small``: whose folder lies on a small disk, "host" or "peer-0"."""
        self.world, code = world, model_code(world.root / "model.py", pad_s=PAD_S)
        self.own = ("--model-code", str(code))
        self.run: RunDir = create(
            world.root / "run", None, ['name="harm"', *TINY, "rounds.inner_steps=5", f'model.code="{model_code_digest(code)}"'], code
        )[0]
        self.disk = {None: None, "host": self.run.root / "host", "peer-0": world.root / "peer-0"}[small]
        if self.disk is not None:
            self.disk.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "decentra-harm", str(self.disk)], check=True)
        self.host = world.host(self.run, *self.own, "--archive-every", "0", service_port=_free_port(), bootstrap_port=_free_port())
        self.invite = world.invite_of(self.host.start())
        self.peers = [world.member("join", self.invite, f"peer-{i}", *self.own, "--verbose") for i in range(3)]

    def start(self) -> None:
        for peer in self.peers:
            peer.start()
        self.world.wait_for("rounds with everybody", lambda: self.heights() >= 4 and all(p.events("training") for p in self.peers), READY_S)

    def heights(self) -> int:
        return self.host.heights().get("trunk/0", 0)

    def contributions(self, peer: Command) -> int:
        """How often the peer's packets counted, as it says itself: a commit of its own packet."""
        return sum(1 for e in peer.events("committed") if e["ending"] == "applied" and e["fragment"] == "trunk/0")

    def until_next_round(self) -> float:
        return _took(self.world, "the next round", lambda before=self.heights(): self.heights() > before)

    def until_contribution(self, peer: Command) -> float:
        return _took(self.world, f"{peer.name} contributes", lambda before=self.contributions(peer): self.contributions(peer) > before + 1)

    def fill(self) -> Path:
        """Use all space that is left on the small disk."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass
        return filler

    def close(self) -> None:
        for command in (*self.peers, self.host):
            if command.is_running:
                ctrl_c(command)
        if self.disk is not None:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)


def _took(world: Lab, what: str, holds: Callable[[], bool], deadline_s: float = READY_S) -> float:
    began = time.monotonic()
    world.wait_for(what, holds, deadline_s)
    return round(time.monotonic() - began, 1)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peer_disk(trial: Trial) -> Row:
    """Its disk is full for ten seconds: it trains on, says why nothing is offered, and offers again when there is room."""
    victim = trial.peers[0]
    trial.start()
    filler, before = trial.fill(), trial.contributions(victim)
    others_s = trial.until_next_round()
    time.sleep(LAST_S)
    said = [e for e in victim.events("operation-failed") if "No space left" in json.dumps(e)]
    went_on, is_alive = trial.contributions(victim) - before, victim.is_running
    filler.unlink()
    back_s = trial.until_contribution(victim)
    # a store gives up what it may evict before a write fails: then there is nothing to say
    return {
        "named": bool(said) or went_on > 1, "said": len(said), "went_on": went_on, "is_alive": is_alive, "others_s": others_s, "back_s": back_s, "lost": 0,
    }  # fmt: skip


def host_disk(trial: Trial) -> Row:
    """The ledger cannot be written: the host ends and says so, and goes on where it was when there is room."""
    trial.start()
    before = trial.heights()
    filler = trial.fill()
    trial.world.wait_for("the host ends", lambda: not trial.host.is_running, READY_S)
    named, code = "full" in trial.host.err or "No space left" in trial.host.err, trial.host.exit_code(10)
    filler.unlink()
    trial.host.start()
    back_s = _took(trial.world, "rounds again", lambda: trial.heights() > before + 1)
    for peer in trial.peers:
        ctrl_c(peer)
    ctrl_c(trial.host)
    heights = [
        r.height
        for r in ledger_records(trial.run, trial.world.root / "copy")
        if isinstance(r, ledger.Confirmed) and r.fragment == "trunk/0"
    ]
    return {
        "named": named,
        "exit_code": code,
        "others_s": None,
        "back_s": back_s,
        "lost": len(set(range(1, max(heights) + 1)) - set(heights)),
    }


def memory(trial: Trial) -> Row:
    """A control group gives a peer too little memory: it says so before it begins; started again without, it takes part."""
    victim = trial.peers[0]
    for peer in trial.peers[1:]:
        peer.start()
    trial.world.wait_for("rounds without it", lambda: trial.heights() >= 4, READY_S)
    with _group(GROUP_MB) as group:
        victim.prefix = ("sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh", *victim.prefix)
        victim.start()
        code = victim.exit_code(READY_S)
        named = "memory" in victim.err and code > 0
        others_s = trial.until_next_round()
    victim.prefix = victim.prefix[4:]
    victim.start()
    return {"named": named, "exit_code": code, "others_s": others_s, "back_s": trial.until_contribution(victim), "lost": 0}


@contextmanager
def _group(limit_mb: int) -> Iterator[Path]:
    group = GROUPS / f"decentra-harm-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit_mb << 20))
    try:
        yield group
    finally:
        for _ in range(50):  # the process that ended is in it for a moment
            with suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.1)


def clock(trial: Trial, clock_s: float = 30.0) -> Row:
    """One peer's clock is ahead, one's is behind; then the host's is ahead, too. Everybody takes part all the time."""
    shim = trial.world.root / "wrong-clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(shim)], input=WRONG, text=True, check=True)

    def set_off(command: Command, off_s: float) -> None:
        command.env |= {"LD_PRELOAD": str(shim), "CLOCK_OFF_S": f"{off_s:.0f}"}

    set_off(trial.peers[0], clock_s)
    set_off(trial.peers[1], -clock_s)
    trial.start()
    back_s = [trial.until_contribution(peer) for peer in trial.peers]
    ctrl_c(trial.host)
    set_off(trial.host, clock_s)
    trial.host.start()
    back_s += [trial.until_contribution(peer) for peer in trial.peers]
    return {"named": True, "others_s": trial.until_next_round(), "back_s": max(back_s), "lost": 0}


TRIALS: dict[str, tuple[Callable[[Trial], Row], str | None]] = {
    "peer-disk": (peer_disk, "peer-0"), "host-disk": (host_disk, "host"), "memory": (memory, None), "clock": (clock, None),
}  # fmt: skip


def why_not(name: str) -> str:
    """Why this cannot be tried on this machine; empty: it can."""
    if name != "clock" and os.geteuid() != 0:
        return "it needs root"
    if name == "memory" and not (GROUPS / "memory.limit_in_bytes").exists():
        return f"there are no control groups at {GROUPS}"
    return "there is no C compiler" if name == "clock" and shutil.which("cc") is None else ""


def measure(names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    rows, skipped = [], {}
    for name in names:
        if why := why_not(name):
            skipped[name] = why
            say(f"{name}: left out, {why}")
            continue
        work, small = TRIALS[name]
        with tempfile.TemporaryDirectory(prefix="decentra-harm-") as folder, lab(Path(folder)) as world:
            trial = Trial(world, small=small)
            try:
                row = {"harm": name, **work(trial)}
            finally:
                trial.close()
        rows.append(row)
        say(f"{name}: {row}")
    return {
        "rows": rows, "skipped": skipped, "all_named": all(r["named"] for r in rows), "lost": sum(r["lost"] for r in rows),
        "back_worst_s": max((r["back_s"] for r in rows), default=0.0),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(TRIALS))
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - set(TRIALS):
        parser.error(f"no trial {sorted(unknown)}; there are {', '.join(TRIALS)}")
    found = measure(names, teller())
    summary = f"{len(found['rows'])} kinds, all named: {found['all_named']}, settlements lost: {found['lost']}, back after {found['back_worst_s']} s"
    return end(found, summary, as_json=args.json, holds=found["all_named"] and not found["lost"])


if __name__ == "__main__":
    raise SystemExit(main())
