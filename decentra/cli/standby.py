"""A second machine for the averaging service: it keeps a copy of the ledger, and takes the run over when the first one is gone.

The copy is in step: what the service tells members is on this machine's disk as well. Taking over needs the run key, since nobody else can say
that the first machine is not to be followed any more; its term is one higher, and members follow no service of an earlier term from then on.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from decentra.averaging.client import AveragingClient
from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.cli.members import KNOWN_FILE
from decentra.cli.rundir import RunDir
from decentra.cli.running import StopRequest, locked_dir
from decentra.errors import ConfigError, ManifestMismatch, Refused, Unreachable
from decentra.identity import Keypair, load_or_create_key
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.protocol.ledger import Confirmed, Record, RolledBack
from decentra.wire import limits
from decentra.wire.ledgers import LedgerReader
from decentra.wire.trust import TrustChain

LEDGER_FILE, COPY_FILE = "ledger.db", "copy.json"
WAIT_S, RETRY_S, NOTE_S, ADDRESSES_S = 5.0, 2.0, 5.0, 30.0
GONE_S = 15.0  # after so long without an answer it is said what can be done


def ledger_file(run: RunDir) -> Path:
    return run.host / LEDGER_FILE


def reader_of(run: RunDir, public: bytes) -> LedgerReader:
    """For this run's ledger; ``public``: the run key's."""
    return LedgerReader(TrustChain(run.manifest().run_id(), public), str(ledger_file(run)))


def verify_ledger(run: RunDir) -> tuple[LedgerReader, list[Record]]:
    """Read the whole ledger of a run directory whose host does not run. Raises IntegrityError, ConfigError."""
    path = ledger_file(run)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: no host of this run has run here, and it is no copy")
    disk = RealDisk(run.host)
    public = run.run_key().public if run.has_run_key() else disk.read("run.public")
    if public is None:
        raise ConfigError(f"{run.root} has neither run.key nor run.public: nothing says whose signatures count")
    reader, journal = reader_of(run, public), SqliteJournal(path)
    try:
        records = [reader.accept(sealed) for sealed in journal.load()]
    finally:
        journal.close()
    if reader.newest is None and (run.host / "service.key").is_file():
        reader.finish(load_or_create_key(run.host / "service.key").public)
    return reader, records


def describe_ledger(folder: Path) -> dict[str, Any]:
    """What ``verify`` says of a run's folder. Raises IntegrityError where a line, a signature or a settlement's arithmetic is wrong."""
    from decentra.status.history import check_settlements

    run = RunDir(folder)
    reader, records = verify_ledger(run)
    check_settlements(run.manifest(), records)
    done = [r for r in records if isinstance(r, Confirmed)]
    heights = {r.fragment: r.height for r in records if isinstance(r, Confirmed | RolledBack)}
    return {
        "ok": True, "dir": str(folder), "run": run.manifest().run_id(), "term": reader.newest.term if reader.newest else None,
        "num_records": len(records), "rounds_confirmed": len(done), "heights": heights,
    }  # fmt: skip


class Copy:
    """This machine's copy of a run's ledger, and the line to the service that writes it."""

    def __init__(self, run: RunDir, key: Keypair, journal: SqliteJournal, services: Sequence[str], events: Events) -> None:
        self.run, self.key, self.journal, self.events = run, key, journal, events
        self.reader = reader_of(run, key.public)
        self.trust = TrustChain(self.reader.chain.run_id, key.public)
        self.client = AveragingClient(services, self.trust, events, token=_token(run))
        self.name = load_or_create_key(run.host / "copy.key").peer_id
        self.in_step_at = 0.0
        self._noted_at = 0.0

    async def load(self) -> None:
        """Read and check what is here."""

        def read() -> None:
            for sealed in self.journal.load():
                self.reader.accept(sealed)

        await asyncio.to_thread(read)
        self.trust.term = self.reader.newest.term if self.reader.newest is not None else 0

    async def check(self) -> None:
        """The service's run is ours. Raises ManifestMismatch, Unreachable."""
        theirs = (await self.client.describe()).manifest
        if theirs.run_id() != self.trust.run_id:
            raise ManifestMismatch(self.trust.run_id[:12], theirs.run_id()[:12])

    async def step(self, wait_s: float) -> int:
        """Fetch what is new; how many records that were. Raises Unreachable, Refused, IntegrityError."""
        page = await self.client.copy(self.key, self.name, self.reader.num_records, wait_s)
        for sealed in page:
            self.reader.accept(sealed)
        await asyncio.to_thread(self.journal.append, page)
        if len(page) < limits.MAX_LEDGER_RECORDS:  # that was all it had
            self.in_step_at = time.time()
        self._note()
        return len(page)

    async def learn_addresses(self) -> None:
        """Who is in, for the day this machine has to be found without the first one."""
        swarm, _ = await self.client.status()
        known = [address for m in swarm.members if m.is_live for address in m.addresses]
        if known:
            write_atomic(RealDisk(self.run.host), KNOWN_FILE, json.dumps(sorted(set(known))).encode())

    def _note(self) -> None:
        if time.time() < self._noted_at + NOTE_S:
            return
        self._noted_at = time.time()
        term = self.reader.newest.term if self.reader.newest is not None else 0
        body = {
            "num_records": self.reader.num_records,
            "in_step_at": self.in_step_at,
            "term": term,
            "services": list(self.client.addresses),
        }
        write_atomic(RealDisk(self.run.host), COPY_FILE, json.dumps(body).encode())


def _token(run: RunDir) -> bytes:
    return run.make_invite(1, 365.0, bootstrap=(), services=(), role="watcher").token


@asynccontextmanager
async def copying(run: RunDir, services: Sequence[str] | None, events: Events) -> AsyncIterator[Copy]:
    """A checked copy. Raises ConfigError without run.key, IntegrityError for a damaged one."""
    if not run.has_run_key():
        raise ConfigError(
            f"{run.run_key_file} is missing; a machine that is to take the run over needs it: keep this folder as safe as the first"
        )
    where = tuple(services or _noted(run).get("services", ())) or (run.addresses()[1] if run.has_addresses() else ())
    if not where and not ledger_file(run).is_file():
        raise ConfigError(f"{run.root} has no ledger, and no service is known to copy it from; give one with --service HOST:PORT")
    journal = await asyncio.to_thread(SqliteJournal, ledger_file(run))
    copy = Copy(run, run.run_key(), journal, where, events)
    try:
        await copy.load()
        yield copy
    finally:
        await copy.client.close()
        journal.close()


async def run_standby(run: RunDir, *, services: Sequence[str] | None, stop: StopRequest, events: Events) -> str:
    """Keep the copy in step until Ctrl-C. Raises IntegrityError when the service tells another story than before, Refused when it sends us away."""
    with locked_dir(run.host):
        async with copying(run, services, events) as copy:
            following = asyncio.create_task(_follow(copy, events))
            stopped = asyncio.create_task(stop.event.wait())
            try:
                await asyncio.wait((following, stopped), return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                for task in (following, stopped):
                    task.cancel()
                await asyncio.gather(following, stopped, return_exceptions=True)
            return f"{stop.why}; the copy has {copy.reader.num_records} records"


async def _follow(copy: Copy, events: Events) -> None:
    answered_at, learned_at, is_checked, was_in_step, said = time.monotonic(), 0.0, False, False, ""
    while True:
        try:
            if not is_checked:
                await copy.check()
                is_checked = True
            is_in_step = await copy.step(WAIT_S) < limits.MAX_LEDGER_RECORDS
            if is_in_step and not was_in_step:
                events.emit("copy-in-step", num_records=copy.reader.num_records, why="what members hear from now on is on this disk, too")
            was_in_step, answered_at, said = is_in_step, time.monotonic(), ""
            if time.monotonic() > learned_at + ADDRESSES_S:
                await copy.learn_addresses()
                learned_at = time.monotonic()
        except Unreachable as error:
            was_in_step = False
            silent_s = time.monotonic() - answered_at
            why = (
                str(error)
                if silent_s < GONE_S
                else f"no answer for {silent_s:.0f} s; if that machine is gone: decentra host RUN_DIR --take-over"
            )
            if why[:20] != said[:20]:
                events.emit("waiting", why=why)
                said = why
            await asyncio.sleep(RETRY_S)


async def take_over(run: RunDir, services: Sequence[str] | None, events: Events) -> int:
    """Make this folder's ledger the run's: fetch what is missing and send the other service home, if it answers. The new term.

    Raises ConfigError where there is nothing to take over from, IntegrityError for a damaged copy.
    """
    async with copying(run, services, events) as copy:
        if copy.reader.num_records == 0 and copy.reader.newest is None:
            await copy.check()  # nothing here yet: the service has to answer, or there is nothing to go on from
        try:
            await copy.check()
            while await copy.step(0.0):
                pass
            await copy.learn_addresses()
            answer = await copy.client.command(copy.key, "retire", f"term {copy.trust.term + 1}")
            while await copy.step(0.0):
                pass
            why = f"{answer}; its last record is here"
        except (Unreachable, Refused) as error:
            why = (
                f"the other service could not be told ({error}); members follow the higher term as soon as they meet it. {_how_fresh(run)}"
            )
        events.emit("taking-over", num_records=copy.reader.num_records, why=why)
        return (copy.reader.newest.term if copy.reader.newest is not None else 1) + 1


def _how_fresh(run: RunDir) -> str:
    """What is known of how much this copy lacks."""
    at = _noted(run).get("in_step_at")
    if not isinstance(at, float):
        return "This folder's ledger was not kept in step: rounds that it lacks are lost, and members go back to its newest anchors"
    return f"This copy was in step {time.time() - at:.0f} s ago"


def _noted(run: RunDir) -> dict[str, Any]:
    """What the copy wrote of itself; empty where nothing can be read."""
    try:
        found = json.loads(RealDisk(run.host).read(COPY_FILE) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
