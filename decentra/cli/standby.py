"""A second machine for the averaging service: it keeps a copy of the ledger, and takes the run over when the first one is gone.

The copy is in step: what the service tells members is on this machine's disk as well. Taking over needs the run key, since nobody else can say
that the first machine is not to be followed any more; its term is one higher, and members follow no service of an earlier term from then on.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.averaging.client import AveragingClient
from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.cli.members import KNOWN_FILE
from decentra.cli.rundir import RunDir
from decentra.cli.running import StopRequest, locked_dir
from decentra.errors import ConfigError, DecentraError, Expired, IntegrityError, ManifestMismatch, Refused, Unreachable, VersionMismatch
from decentra.identity import Keypair, load_key
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.protocol.ledger import Confirmed, Record, RolledBack, Started
from decentra.service.copies import MAX_LAG
from decentra.wire.ledgers import LedgerReader, check_words
from decentra.wire.trust import TrustChain

LEDGER_FILE, COPY_FILE = "ledger.db", "copy.json"
WAIT_S, RETRY_S, NOTE_S, ADDRESSES_S = 5.0, 2.0, 5.0, 30.0
NUM_LAST_TRIES = 20
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
    if not records or not isinstance(records[0], Started):
        raise IntegrityError(
            f"{path} has {len(records)} records and does not begin with the run's first one: it was emptied or cut; restore it and serve it with --take-over"
        )
    if len(records) < (noted := _noted(run).num_records):
        raise IntegrityError(
            f"{path} has {len(records)} records, this copy had {noted} once: some were taken away; restore it and serve it with --take-over"
        )
    if reader.newest is None:  # begun before services wrote their certificates down
        sealed = disk.read("certificate")
        if sealed is None:
            raise IntegrityError(f"{path} names no service, and {run.host / 'certificate'} is missing: nobody vouches for its lines")
        try:
            reader.finish(reader.chain.check_certificate(sealed, None).service_public)
        except Refused as error:
            raise IntegrityError(f"{run.host / 'certificate'}: {error}") from None
    return reader, records


def describe_ledger(folder: Path) -> dict[str, Any]:
    """What ``verify`` says of a run's folder. Raises IntegrityError where a line, anybody's signature or a settlement's arithmetic is wrong."""
    from decentra.status.history import check_settlements

    run = RunDir(folder)
    reader, records = verify_ledger(run)
    check_settlements(run.manifest(), records)
    words = check_words(records, run.manifest().run_id())
    done = [r for r in records if isinstance(r, Confirmed)]
    heights = {r.fragment: r.height for r in records if isinstance(r, Confirmed | RolledBack)}
    return {
        "ok": True, "dir": str(folder), "run": run.manifest().run_id(), "term": reader.newest.term if reader.newest else None,
        "num_records": len(records), "num_signed": words.num_signed, "num_unsigned": words.num_unsigned, "rounds_confirmed": len(done),
        "heights": heights,
    }  # fmt: skip


@dataclass(frozen=True)
class Noted:
    """What a copy wrote of itself. ``in_step_at``: Unix seconds, None: never."""

    num_records: int = 0
    in_step_at: float | None = None
    services: tuple[str, ...] = ()


def _noted(run: RunDir) -> Noted:
    """As far as it can be read."""
    try:
        found = json.loads(RealDisk(run.host).read(COPY_FILE) or b"{}")
        services = tuple(line for line in found.get("services", ()) if isinstance(line, str))
        at = found.get("in_step_at")
        return Noted(int(found.get("num_records", 0)), float(at) if at else None, services)
    except (ValueError, TypeError, AttributeError, OSError):
        return Noted()


class Copy:
    """This machine's copy of a run's ledger, and the line to the service that writes it."""

    def __init__(self, run: RunDir, key: Keypair, journal: SqliteJournal, services: Sequence[str], events: Events) -> None:
        self.run, self.key, self.journal, self.events = run, key, journal, events
        self.reader = reader_of(run, key.public)
        self.trust = TrustChain(self.reader.chain.run_id, key.public)
        self.client = AveragingClient(services, self.trust, events, token=_token(run))
        self.name = os.urandom(8).hex()  # of this process: what another one has is not what this one has
        self.in_step_at: float | None = None
        self._num_small = 0  # pages in a row
        self._noted_at = 0.0

    @property
    def term(self) -> int:
        """The newest that this ledger or a service that was met names; 0: none."""
        return max(self.trust.term, self.reader.newest.term if self.reader.newest is not None else 0)

    async def load(self) -> None:
        """Read and check what is here. Raises IntegrityError."""

        def read() -> None:
            for sealed in self.journal.load():
                self.reader.accept(sealed)

        await asyncio.to_thread(read)
        if self.reader.newest is not None:
            self.trust.note(self.reader.newest)

    async def check(self) -> None:
        """The service answers. Raises Unreachable, and what ``open_link`` raises when somebody else does."""
        await self.client.describe()

    async def step(self, wait_s: float) -> int:
        """Fetch what is new; how many records that were. Raises Unreachable, Refused, IntegrityError."""
        page = await self.client.copy(self.key, self.name, self.reader.num_records, wait_s)
        for sealed in page:
            self.reader.accept(sealed)
        await asyncio.to_thread(self.journal.append, page)
        self._num_small = self._num_small + 1 if len(page) <= MAX_LAG else 0
        if self.is_in_step:
            self.in_step_at = time.time()
        self._note()
        return len(page)

    @property
    def is_in_step(self) -> bool:
        """The service waits for this copy: the request before the last one said that it has nearly everything."""
        return self._num_small >= 2

    def fell_behind(self) -> None:
        self._num_small = 0

    async def learn_addresses(self) -> None:
        """Who is in, for the day this machine has to be found without the first one."""
        swarm, _ = await self.client.status()
        known = [address for m in swarm.members if m.is_live for address in m.addresses]
        if known:
            with suppress(OSError):
                write_atomic(RealDisk(self.run.host), KNOWN_FILE, json.dumps(sorted(set(known))).encode())

    def _note(self) -> None:
        if time.time() < self._noted_at + NOTE_S:
            return
        self._noted_at = time.time()
        body = {"num_records": self.reader.num_records, "in_step_at": self.in_step_at, "services": list(self.client.addresses)}
        with suppress(OSError):  # a full disk is the journal's to report
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
    where = tuple(services or _noted(run).services) or (run.addresses()[1] if run.has_addresses() else ())
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
    run.manifest()  # a directory that is no run is the first thing to say, before anything is made in it
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
    learning = asyncio.create_task(
        _keep_learning(copy)
    )  # beside: an answer about the status waits for copies that are in step, this one too
    try:
        await _keep_in_step(copy, events)
    finally:
        learning.cancel()
        await asyncio.gather(learning, return_exceptions=True)


async def _keep_learning(copy: Copy) -> None:
    while True:
        with suppress(DecentraError):  # the line to the service is watched by who copies
            await copy.learn_addresses()
        await asyncio.sleep(ADDRESSES_S)


async def _keep_in_step(copy: Copy, events: Events) -> None:
    answered_at, was_in_step, said = time.monotonic(), False, ""
    while True:
        try:
            await copy.step(WAIT_S)
            if copy.is_in_step and not was_in_step:
                events.emit("copy-in-step", num_records=copy.reader.num_records, why="what members hear from now on is on this disk, too")
            was_in_step, answered_at, said = copy.is_in_step, time.monotonic(), ""
        except (Unreachable, Expired) as error:  # an order that is too old: the clock was set, or the machine slept
            await copy.client.close()  # also where a clock was set: a new link compares them again
            copy.fell_behind()
            was_in_step = False
            silent_s = time.monotonic() - answered_at
            kind = "gone" if silent_s > GONE_S else "away"
            why = f"{error}; asked again" if kind == "away" else (
                f"no answer for {silent_s:.0f} s. If that machine is gone: decentra host RUN_DIR --take-over. If another one has taken over: --service THAT"
            )  # fmt: skip
            if kind != said:
                events.emit("waiting", why=why)
                said = kind
            await asyncio.sleep(RETRY_S)


async def take_over(run: RunDir, services: Sequence[str] | None, events: Events) -> int:
    """Make this folder's ledger the run's: fetch what is missing and send the other service home, if it answers. The new term.

    Terms are Unix seconds, so that two machines which know nothing of each other do not take the same one. Raises Refused and Unreachable where a
    service answers and does not let it be done in order, ConfigError where there is nothing to go on from, IntegrityError for a damaged copy.
    """
    async with copying(run, services, events) as copy:
        why_not, term = await _why_nobody_there(copy), 0
        if why_not is None:
            await copy.learn_addresses()  # first: an answer about the status waits for copies that are in step
            while await copy.step(0.0) > MAX_LAG:  # the service goes on writing meanwhile
                pass
            term = max(copy.term + 1, int(time.time()))
            why = await copy.client.command(copy.key, "retire", str(term))
            await _complete_at_last(copy)
            why += "; its last record is here"
        else:
            why = f"no service of this run answers ({why_not}); members follow the higher term as soon as they meet it. {_how_fresh(run)}"
        if copy.reader.num_records == 0:
            raise ConfigError(f"{ledger_file(run)} is empty and {why_not}: there is nothing to go on from")
        newest = copy.reader.newest
        if newest is not None and newest.service_public == _own_public(run):
            _set_keys_aside(run, is_other_alive=why_not is None)
        (run.host / COPY_FILE).unlink(missing_ok=True)
        events.emit("taking-over", num_records=copy.reader.num_records, why=why)
        return term or max(copy.term + 1, int(time.time()))


async def _why_nobody_there(copy: Copy) -> str | None:
    """None when the run's service answers. Whoever else does so at its address is nobody to us."""
    if not copy.client.addresses:
        return "none is known"
    try:
        await copy.check()
    except (Unreachable, IntegrityError, ManifestMismatch, VersionMismatch) as error:
        return str(error)
    return None


async def _complete_at_last(copy: Copy) -> None:
    """The last records of a service that was sent home; it lets them be read for some seconds. Raises Unreachable."""
    for _ in range(NUM_LAST_TRIES):
        try:
            while await copy.step(0.0):
                pass
            return
        except Unreachable:
            await asyncio.sleep(0.2)
    raise Unreachable(
        "the other service was sent home, but its last records did not arrive; start it there again ('decentra host'), and take over again"
    )


def _own_public(run: RunDir) -> bytes | None:
    path = run.host / "service.key"
    return load_key(path).public if path.is_file() else None


def _set_keys_aside(run: RunDir, *, is_other_alive: bool) -> None:
    """This folder was copied with the other machine's keys: two services with one key could not be told apart, and two nodes with one id not found.

    Where that machine is gone the node's id stays: invites and members know this bootstrap node by it.
    """
    for name in ("service.key", "tls.pem", "certificate", "invite", *(("identity.key",) if is_other_alive else ())):
        if (path := run.host / name).exists():
            path.rename(path.with_name(f"{name}.of-the-other-machine"))


def _how_fresh(run: RunDir) -> str:
    """What is known of how much this copy lacks."""
    at = _noted(run).in_step_at
    if at is None:
        return "This folder's ledger was not kept in step: rounds that it lacks are lost"
    return f"This copy was in step {time.time() - at:.0f} s ago"
