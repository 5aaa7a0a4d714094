"""Real decentra processes for tests: start, wait for what they say, kill, interrupt, and prove that nothing is left. Judges nothing about runs."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cli_world import decentra

from decentra.cli.create import create
from decentra.cli.rundir import RunDir
from decentra.cli.running import die_with_parent
from decentra.identity import load_key
from decentra.invite import parse_invite
from decentra.protocol import ledger
from decentra.wire.ledgers import open_record

READY_S = 60.0  # a loaded machine imports torch slowly
LEFTOVER_S = 6.0  # p2pd ends by itself within 3 s of our kill -9
POLL_S = 0.1

# A model of 30 thousand parameters, so that a test's time is the protocol's.
TINY = (
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16", "model.num_experts=4",
    "model.expert_hidden_size=32", "model.max_seq_len=64", "data.seq_len=64", "data.bytes_per_domain=60000", "data.held_out_bytes=2048",
    "train.batch_size=4", "train.warmup_steps=5", "train.lr=0.005", "placement.experts_per_peer=2", "rounds.inner_steps=5",
    "rounds.heartbeat_s=1", "rounds.lease_s=4", "rounds.gather_s=2", "rounds.cut_off_s=8", "rounds.grace_s=8", "rounds.attest_s=8",
)  # fmt: skip


@dataclass
class Command:
    """One decentra command as a process of its own session; stdout and stderr go to files and are kept over restarts."""

    name: str
    args: tuple[str, ...]
    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None
    num_old_chars: int = 0  # of stdout, from before the last start
    prefix: tuple[str, ...] = (sys.executable,)  # what starts the module
    limits: dict[int, int] = field(default_factory=dict)  # resource.RLIMIT_* -> the most the kernel gives it

    def start(self) -> Command:
        self.folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.env}
        self.num_old_chars = len(self.out)
        with open(self.folder / f"{self.name}.out", "ab") as out, open(self.folder / f"{self.name}.err", "ab") as err:
            self.popen = subprocess.Popen(
                [*self.prefix, "-m", "decentra.cli.main", *self.args], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env,
                start_new_session=True, preexec_fn=self._before_exec,
            )  # fmt: skip
        return self

    def _before_exec(self) -> None:
        die_with_parent()
        for kind, most in self.limits.items():
            resource.setrlimit(kind, (most, most))

    @property
    def out(self) -> str:
        path = self.folder / f"{self.name}.out"
        return path.read_text() if path.exists() else ""

    @property
    def err(self) -> str:
        return (self.folder / f"{self.name}.err").read_text()

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def signal(self, number: int) -> None:
        assert self.popen is not None
        self.popen.send_signal(number)

    def group_signal(self, number: int) -> None:
        """To the command and all it started, as a terminal's Ctrl-C goes."""
        assert self.popen is not None
        os.killpg(self.popen.pid, number)

    def kill(self) -> None:
        """kill -9."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()

    def exit_code(self, deadline_s: float) -> int:
        """Wait for the end. Fails with the tail of its log when it does not come."""
        assert self.popen is not None
        try:
            return self.popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {deadline_s:g} s:\n{self.tail()}") from None

    def last_json(self) -> dict[str, Any]:
        """The JSON object of the last line of stdout since the last start; empty when there is none yet."""
        lines = self.out[self.num_old_chars :].splitlines()
        if not lines or not lines[-1].startswith("{"):
            return {}
        value: dict[str, Any] = json.loads(lines[-1])
        return value

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event, oldest first; needs ``--log-json``."""
        found = []
        for line in self.err.splitlines():
            if line.startswith("{") and f'"event": "{name}"' in line:
                found.append(json.loads(line))
        return found

    def heights(self) -> dict[str, int]:
        """A service's newest confirmed height of every fragment, from its log."""
        return {e["fragment"]: e["height"] for e in self.events("round-confirmed")}

    def has_advanced(self, before: Mapping[str, int], num_rounds: int, num_fragments: int) -> bool:
        """A service has confirmed so many more rounds of each of its fragments."""
        return sum(h >= before.get(f, 0) + num_rounds for f, h in self.heights().items()) == num_fragments

    def tail(self, num_lines: int = 25) -> str:
        return f"--- {self.name} stderr\n" + "\n".join(self.err.splitlines()[-num_lines:])


class Lab:
    """All processes of one test under one folder. On leaving it kills what still runs, by pid."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commands: list[Command] = []
        self._sockets: set[Path] = set()

    def command(self, name: str, *args: str) -> Command:
        """A command that is not started yet. User state goes below the lab's folder."""
        made = Command(name, args, self.root / "logs", {"XDG_STATE_HOME": str(self.root / "state")})
        self.commands.append(made)
        return made

    def run(self, *args: str) -> tuple[int, dict[str, Any], str]:
        """A short command to its end, inside this process, which has torch already: exit code, JSON of the last line of stdout, stderr."""
        said = decentra(*args)
        self.note_sockets()
        return said.code, said.json if said.out.strip() else {}, said.err

    def init(self, *settings: str) -> RunDir:
        """A run of the tiny model."""
        sets = [f'name="{self.root.name[:40]}"', *TINY, *settings]
        return create(self.root / "run", None, sets)[0]

    def host(self, run: RunDir, *args: str, bootstrap_port: int = 0, service_port: int = 0) -> Command:
        """``host`` on loopback; not started yet."""
        ports = ("--bootstrap-port", str(bootstrap_port), "--service-port", str(service_port))
        where = ("--address", "127.0.0.1", "--listen", "127.0.0.1", *ports)
        return self.command("host", "host", str(run.root), *where, "--json", "--log-json", *args)

    def host_again(self, host: Command, run: RunDir, invite: str) -> None:
        """Start a host that has ended once more, on the ports that its invite names."""
        line = parse_invite(invite)
        bootstrap_port, service_port = int(line.bootstrap[0].split("/")[4]), int(line.services[0].rpartition(":")[2])
        host.args = self.host(run, bootstrap_port=bootstrap_port, service_port=service_port).args
        host.start()

    def member(self, verb: str, invite: str, name: str, *args: str) -> Command:
        """``join`` or ``keep`` on loopback with a state directory of its own; not started yet."""
        where = ("--dir", str(self.root / name), "--listen", "/ip4/127.0.0.1/tcp/0")
        return self.command(name, verb, invite, "--name", name, *where, "--json", "--log-json", *args)

    def wait_for(self, what: str, condition: Callable[[], Any], deadline_s: float = READY_S) -> Any:
        """Poll until ``condition`` is true and return its value. Fails with everybody's last words."""
        deadline = time.monotonic() + deadline_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {deadline_s:g} s: {what}\n" + "\n".join(c.tail() for c in self.commands))
            time.sleep(POLL_S)
        self.note_sockets()
        return value

    def invite_of(self, host: Command) -> str:
        def ready() -> str:
            assert host.is_running, f"the host ended before it was ready\n{host.tail()}"
            return str(host.last_json().get("invite", ""))

        return str(self.wait_for("the host's invite", ready))

    # ------------------------------------------------------------ what is left

    def processes(self) -> list[psutil.Process]:
        """Living processes that name our folder: our commands, and p2pd with a key below it."""
        mark, found = str(self.root), []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or ())
            is_ours = mark in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if is_ours and ("decentra.cli.main" in line or "p2pd" in line):
                found.append(process)
        return found

    def note_sockets(self) -> None:
        """Remember the socket folders of our p2p daemons, from their command lines."""
        for process in self.processes():
            for text in process.info["cmdline"] or ():
                if folder := re.search(r"/tmp/decentra-p2p-[A-Za-z0-9_]+", text):
                    self._sockets.add(Path(folder.group(0)))

    def assert_nothing_left(self) -> None:
        """No process of ours is alive (p2pd gets the few seconds it needs after a kill -9) and no socket folder stays."""
        deadline = time.monotonic() + LEFTOVER_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        assert not left, f"still alive: {[(p.pid, p.info['cmdline']) for p in left]}"
        assert self._sockets, "no p2p daemon of ours was ever seen: this check proves nothing"
        assert not (stay := [p for p in self._sockets if p.exists()]), f"socket folders of ended processes: {stay}"
        self.assert_no_secret_told()

    def secrets(self) -> dict[str, str]:
        """What a log must not hold -> what it is: every private key below the lab's folder and every invite's token, in the usual spellings."""
        raw: dict[bytes, str] = {}
        for path in self.root.rglob("*.key"):
            raw[load_key(path).seed] = str(path)
        found: dict[str, str] = {}
        for command in self.commands:
            if invite := command.last_json().get("invite"):
                found[invite] = f"the invite of {command.name}"
                raw[parse_invite(invite).token] = f"the token of {command.name}'s invite"
        for data, what in raw.items():
            plain = (base64.b64encode(data), base64.urlsafe_b64encode(data))
            spellings = [data.hex(), repr(data)[2:-1], *(one.decode().rstrip("=") for one in plain)]
            found |= dict.fromkeys(spellings, what)
        return found

    def assert_no_secret_told(self) -> None:
        """No key and no invite is in any log, however talkative it was asked to be."""
        secrets = self.secrets()
        assert secrets, "there is no key at all: this check proves nothing"
        for command in self.commands:
            log = command.folder / f"{command.name}.err"
            text = log.read_text() if log.exists() else ""
            told = sorted({what for secret, what in secrets.items() if secret in text})
            assert not told, f"the log of {command.name} holds {told}"

    def close(self) -> None:
        for command in self.commands:
            if command.is_running:
                command.kill()


@contextmanager
def lab(root: Path) -> Iterator[Lab]:
    """A lab whose processes end with the block."""
    made = Lab(root)
    try:
        yield made
    finally:
        made.close()


def ctrl_c(command: Command, deadline_s: float = 30.0, number: int = signal.SIGINT) -> tuple[int, float]:
    """Ask a command to leave; (exit code, seconds to its last word). Python's own end after that takes a second of CPU, more when others compute."""
    began = time.time()
    command.signal(number)
    code = command.exit_code(deadline_s)
    return code, (command.folder / f"{command.name}.err").stat().st_mtime - began


def ledger_records(run: RunDir, scratch: Path) -> list[ledger.Record]:
    """The ledger as it lies on disk, hash chains checked. Reads a copy: the original is locked while a service runs, and stays as it was."""
    from decentra.averaging.journal_sqlite import SqliteJournal

    scratch.mkdir(parents=True, exist_ok=True)
    for path in run.host.glob("ledger.db*"):
        shutil.copy(path, scratch / path.name)
    journal = SqliteJournal(scratch / "ledger.db")
    try:
        return ledger.replay(open_record(raw)[1] for raw in journal.load())[1]
    finally:
        journal.close()


def confirmed(records: list[ledger.Record]) -> list[tuple[str, int, int, str]]:
    """(fragment, round, height, anchor) of every confirmed round, in the ledger's order."""
    return [(r.fragment, r.round, r.height, r.anchor) for r in records if isinstance(r, ledger.Confirmed)]
