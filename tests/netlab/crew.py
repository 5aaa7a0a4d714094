"""One run in a lab: the organiser's host and its peers as real ``decentra`` processes, their logs and the ledger. Decides nothing about networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lab import Lab

from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.cli.create import create
from decentra.cli.running import die_with_parent
from decentra.model.custom import model_code_digest
from decentra.protocol.ledger import Confirmed, Opened, Record, Settled, replay
from decentra.wire.ledgers import open_record

ROOT = Path(__file__).parents[2]
LOOK_S = 0.2
END_S = 20.0
ORGANISER = "org"
BOOTSTRAP_PORT, SERVICE_PORT = 7410, 7411

TINY = (
    "name=netlab", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "model.expert_hidden_size=32", "model.num_experts=4", "data.seq_len=64", "data.bytes_per_domain=65536", "data.held_out_bytes=4096",
    "train.batch_size=4", "train.warmup_steps=2", "rounds.inner_steps=5", "rounds.cut_off_s=15", "rounds.grace_s=15", "rounds.attest_s=15",
    "rounds.gather_s=3", "rounds.heartbeat_s=1", "rounds.lease_s=5", "rounds.rollback_s=30",
)  # fmt: skip


@dataclass
class Child:
    """One process with its output in files. ``events`` is its structured log so far."""

    name: str
    command: Sequence[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    _events: list[dict[str, Any]] = field(default_factory=list)
    _num_read_bytes: int = 0

    def start(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HOME": str(self.folder)}
        with open(self.out, "ab") as out, open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=env, cwd=ROOT, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name}.out"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs or before it was started."""
        return self.process.poll() if self.process is not None else None

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, patience_s: float = END_S) -> int | None:
        """Ask it to leave, insist after ``patience_s``."""
        if self.process is None:
            return None
        self.send(signal.SIGINT)
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.process.wait(patience_s)

    def end_now(self) -> None:
        """Kill it: it has no time to say or save anything."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(END_S)
        self.out.unlink(missing_ok=True)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Log lines whose event is one of ``names``, all when none is given."""
        with open(self.log, "rb") as log:
            log.seek(self._num_read_bytes)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._num_read_bytes += len(whole + newline)
        self._events += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return [event for event in self._events if not names or event["event"] in names]

    def said(self) -> dict[str, Any]:
        """The last JSON object on its stdout, empty when there is none."""
        lines = (
            [line for line in self.out.read_text().splitlines() if line.startswith("{") and line.endswith("}")] if self.out.exists() else []
        )
        return dict(json.loads(lines[-1])) if lines else {}

    def story(self, num_lines: int = 15) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-num_lines:] if self.log.exists() else []
        return "\n".join([f"--- {self.name} (status {self.status})", *lines])


@dataclass
class Crew:
    """``with Crew(lab, folder, settings) as crew``: makes the run; every process ends with the block."""

    lab: Lab
    folder: Path
    settings: Sequence[str] = ()
    model_code: Path | None = None
    host: Child = field(init=False)
    peers: dict[str, Child] = field(init=False, default_factory=dict)

    def __enter__(self) -> Crew:
        pinned = [] if self.model_code is None else [f'model.code="{model_code_digest(self.model_code)}"']
        create(self.run, None, [*TINY, *self.settings, *pinned], self.model_code)
        where = ["--address", self.lab.address(ORGANISER), "--bootstrap-port", str(BOOTSTRAP_PORT), "--service-port", str(SERVICE_PORT)]
        self.host = self._child(ORGANISER, ["host", str(self.run), *where, "--json", *self._own_code()])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self.children():
            child.send(signal.SIGINT)
        for child in self.children():
            child.end(5.0 if error else END_S)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def children(self) -> Iterator[Child]:
        yield self.host
        yield from self.peers.values()

    # ------------------------------------------------------------ processes

    def start_host(self) -> str:
        """Start the organiser's host and return its invite once it is ready."""
        self.host.start()
        self.until(lambda: "invite" in self.host.said(), 60, "the host prints an invite")
        return str(self.host.said()["invite"])

    def join(self, name: str, invite: str, *options: str) -> Child:
        """A trainer on the host of the lab that has its name."""
        args = ["join", invite, "--name", name, "--dir", str(self.folder / name), "--json", *self._own_code(), *options]
        child = self.peers.setdefault(name, self._child(name, args))
        child.start()
        return child

    def stop_run(self) -> None:
        """The organiser ends the run."""
        line = self.lab.command(ORGANISER, [sys.executable, "-m", "decentra.cli.main", "stop", str(self.run)])
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def _own_code(self) -> list[str]:
        return [] if self.model_code is None else ["--model-code", str(self.model_code)]

    def _child(self, name: str, args: Sequence[str]) -> Child:
        line = [sys.executable, "-m", "decentra.cli.main", *args, "--verbose", "--log-json"]
        return Child(name, self.lab.command(name, line), self.folder)

    # ------------------------------------------------------------ waiting

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for ``condition``; fails at the deadline, or at once when a process failed, with everybody's last words."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            failed = [child.name for child in self.children() if (child.status or 0) > 0]
            stories = "\n".join(child.story() for child in self.children())
            assert not failed, f"{', '.join(failed)} failed while waiting until {what}\n{stories}"
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{stories}"
            time.sleep(LOOK_S)

    def num_confirmed(self, fragment: str = "trunk/0") -> int:
        return sum(event["fragment"] == fragment for event in self.host.events("round-confirmed"))

    def until_confirmed(self, num_rounds: int, timeout_s: float) -> None:
        """Wait until so many rounds of the trunk have been confirmed since the first start of the host."""
        self.until(lambda: self.num_confirmed() >= num_rounds, timeout_s, f"{num_rounds} rounds of the trunk are confirmed")

    def until_over(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Wait until every peer left by itself; what each says it did. Ends the host."""
        peers = self.peers.values()
        self.until(lambda: all(child.status is not None for child in peers), timeout_s, "every peer has left")
        assert {child.name: child.status for child in peers} == dict.fromkeys(self.peers, 0)
        assert self.host.end() == 0, self.host.story()
        return {name: child.said() for name, child in self.peers.items()}

    # ------------------------------------------------------------ afterwards

    def ledger(self) -> list[Record]:
        """The checked ledger of the host, which must have ended."""
        journal = SqliteJournal(self.run / "host" / "ledger.db")
        try:
            records: list[Record] = replay(open_record(raw)[1] for raw in journal.load())[1]
            return records
        finally:
            journal.close()


@dataclass(frozen=True)
class Tale:
    """What the ledger says about one fragment's confirmed rounds: who contributed, and the last anchor."""

    contributors: dict[int, frozenset[str]]  # round -> peers
    anchor: str
    rosters: dict[int, frozenset[str]]  # every round, however it ended -> holders

    def num_contributed(self) -> Counter[str]:
        return Counter(peer for peers in self.contributors.values() for peer in peers)


def tales_of(records: Sequence[Record]) -> dict[str, Tale]:
    """The tale of every fragment; each must have a confirmed round."""
    return {fragment: _tale_of(records, fragment) for fragment in sorted({r.fragment for r in records if isinstance(r, Opened)})}


def _tale_of(records: Sequence[Record], fragment: str) -> Tale:
    settled = {r.settlement.round: r.settlement for r in records if isinstance(r, Settled) and r.settlement.fragment == fragment}
    confirmed = [r for r in records if isinstance(r, Confirmed) and r.fragment == fragment]
    assert confirmed, f"no round of {fragment} was confirmed"
    opened = {r.round: frozenset(r.holders) for r in records if isinstance(r, Opened) and r.fragment == fragment}
    contributors = {r.round: frozenset(e.peer for e in settled[r.round].entries) for r in confirmed}
    return Tale(contributors, confirmed[-1].anchor, opened)
