"""Copies of the ledger and taking over from them, with real services on loopback in this process: what may go wrong leaves one service and its ledger."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from decentra.averaging.client import AveragingClient
from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.cli import standby
from decentra.cli.create import create
from decentra.cli.rundir import RunDir
from decentra.cli.service import Service, averaging_service, check_before_take_over
from decentra.errors import ConfigError, DecentraError, IntegrityError, PortTaken, Refused, Unreachable
from decentra.ids import RunId
from decentra.protocol import ledger
from decentra.wire.trust import TrustChain

T = TypeVar("T")
DEADLINE_S = 60.0
SMALL = (
    "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16",
    "model.expert_hidden_size=8", "model.num_experts=2",
)  # fmt: skip


@dataclass
class Recorder:
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def run(job: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(DEADLINE_S):
            return await job

    return asyncio.run(bounded())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create(tmp_path_factory.mktemp("standby") / "run", None, ['name="standby"', *SMALL])[0].root


@pytest.fixture
def folders(template: Path, tmp_path: Path) -> tuple[RunDir, RunDir]:
    """The run's folder on two machines, before any start."""
    made = tuple(RunDir(tmp_path / name) for name in ("first", "second"))
    for one in made:
        shutil.copytree(template, one.root)
    return made[0], made[1]


@asynccontextmanager
async def served(run: RunDir, term: int | None = None) -> AsyncIterator[tuple[Service, str]]:
    async with averaging_service(run, run.manifest(), "127.0.0.1:0", Recorder(), term) as service:
        try:
            yield service, f"127.0.0.1:{service.port}"
        finally:
            with suppress(Refused):
                if service.pump.done():
                    service.pump.result()


def records_of(run: RunDir) -> list[ledger.Record]:
    return standby.verify_ledger(run)[1]


def chain_of(run: RunDir) -> TrustChain:
    return TrustChain(RunId(run.manifest().run_id()), run.run_key().public)


async def revoke(run: RunDir, where: str, subject: str) -> None:
    client = AveragingClient((where,), chain_of(run), Recorder())
    try:
        await client.command(run.run_key(), "revoke", subject)
    finally:
        await client.close()


def test_taking_over_brings_every_record_and_sends_the_service_home(folders: tuple[RunDir, RunDir]) -> None:
    first, second = folders

    async def job() -> None:
        async with served(first) as (service, where):
            await revoke(first, where, "0011223344556677")
            term = await standby.take_over(second, (where,), Recorder())
            assert term > time.time() - 60
            async with served(second, term) as (new, new_where):
                with pytest.raises(Refused, match="another machine took the run over"):
                    await asyncio.wait_for(asyncio.shield(service.pump), 20)
                assert new.driver.book.revoked == {"0011223344556677"}
                chain = chain_of(first)
                client = AveragingClient((new_where, where), chain, Recorder(), token=standby._token(first))
                await client.describe()
                assert chain.term == term
                await client.close()

    run(job())
    before, after = records_of(first), records_of(second)
    assert after[: len(before)] == before
    assert isinstance(after[len(before)], ledger.Certified)


def test_a_copy_is_kept_in_step_and_goes_on_after_the_service_is_gone(folders: tuple[RunDir, RunDir]) -> None:
    first, second = folders

    async def job() -> None:
        events = Recorder()
        async with served(first) as (service, where):
            async with standby.copying(second, (where,), events) as copy:
                following = asyncio.create_task(standby._follow(copy, events))
                while not events.named("copy-in-step"):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                await revoke(first, where, "0011223344556677")  # answered when the copy has it
                assert service.driver._ledger.heads == copy.reader.ledger.heads
                following.cancel()
        events = Recorder()
        term = await standby.take_over(second, None, events)
        assert "no service of this run answers" in events.named("taking-over")[0]["why"]
        assert "in step" in events.named("taking-over")[0]["why"]
        async with served(second, term) as (new, _):
            assert new.driver.book.revoked == {"0011223344556677"}

    run(job())


def test_a_service_that_refuses_is_not_taken_for_one_that_is_gone(folders: tuple[RunDir, RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = folders
    monkeypatch.setattr("decentra.service.copies.MAX_COPIES", 0)

    async def job() -> None:
        async with served(first) as (service, where):
            with pytest.raises(Refused, match="kept already"):
                await standby.take_over(second, (where,), Recorder())
            assert not service.pump.done()
            await revoke(first, where, "0011223344556677")  # it serves on

    run(job())


def test_nothing_to_take_over_from(folders: tuple[RunDir, RunDir]) -> None:
    _, second = folders
    with pytest.raises(ConfigError, match="nothing to go on from"):
        run(standby.take_over(second, ("127.0.0.1:9",), Recorder()))
    with pytest.raises(IntegrityError, match="emptied or cut"):
        standby.verify_ledger(second)


def test_a_copy_that_is_simply_started_is_no_second_service(folders: tuple[RunDir, RunDir]) -> None:
    first, second = folders

    async def job() -> None:
        async with served(first) as (_, where):
            async with standby.copying(second, (where,), Recorder()) as copy:
                while await copy.step(0.0):
                    pass
        with pytest.raises(ConfigError, match="is a copy"):
            async with served(second):
                pass

    run(job())
    before = records_of(second)
    assert records_of(first)[: len(before)] == before


def test_a_copied_folder_gets_keys_of_its_own(folders: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    first, _ = folders
    third = RunDir(tmp_path / "third")

    async def job() -> None:
        async with served(first):
            pass
        shutil.copytree(first.root, third.root)  # with everything the host keeps
        async with served(first) as (_, where):
            term = await standby.take_over(third, (where,), Recorder())
            async with served(third, term):
                pass

    run(job())
    assert (first.host / "service.key").read_bytes() != (third.host / "service.key").read_bytes()
    assert {r.term for r in records_of(third) if isinstance(r, ledger.Certified)} > {1}


def test_an_order_to_go_does_not_count_for_who_came_after(folders: tuple[RunDir, RunDir]) -> None:
    """The service that was sent home could show the order to the new one."""
    first, _ = folders

    async def job() -> None:
        async with served(first, 50) as (service, where):
            client = AveragingClient((where,), chain_of(first), Recorder())
            for argument in ("50", "7", "soon"):
                with pytest.raises(Refused, match="this order is for a service before term"):
                    await client.command(first.run_key(), "retire", argument)
            assert not service.pump.done()
            await client.close()

    run(job())


def test_who_is_being_sent_home_decides_nothing_any_more(folders: tuple[RunDir, RunDir]) -> None:
    first, _ = folders

    async def job() -> None:
        async with served(first) as (_, where):
            client = AveragingClient((where,), chain_of(first), Recorder())
            await client.command(first.run_key(), "retire", "99")
            with pytest.raises(Unreachable, match="nothing is decided here any more"):
                await client.command(first.run_key(), "revoke", "0011223344556677")
            await client.close()

    run(job())
    assert not any(isinstance(r, ledger.Revoked) for r in records_of(first))


def test_what_would_keep_the_new_machine_from_serving_is_said_first(folders: tuple[RunDir, RunDir]) -> None:
    first, second = folders

    async def job() -> None:
        async with served(first) as (service, _):
            with pytest.raises(PortTaken, match="nothing was taken over"):
                check_before_take_over(second, second.manifest(), "127.0.0.1", (service.port,), Recorder())
            for path in second.genesis.iterdir():
                path.unlink()
            with pytest.raises(IntegrityError, match="genesis anchor"):
                check_before_take_over(second, second.manifest(), "127.0.0.1", (0,), Recorder())

    run(job())


def test_notes_that_cannot_be_read_are_none(folders: tuple[RunDir, RunDir]) -> None:
    _, second = folders
    second.host.mkdir()
    for data in (b"", b"[5]", b'{"services": 5}', b'{"services": "abc", "num_records": "x"}', b'{"in_step_at": 0.0}', b"\xff"):
        (second.host / standby.COPY_FILE).write_bytes(data)
        assert standby._noted(second).in_step_at is None
    assert standby._how_fresh(second).startswith("This folder's ledger was not kept in step")


def test_a_ledger_that_nobody_vouches_for(folders: tuple[RunDir, RunDir]) -> None:
    _, second = folders
    journal = SqliteJournal(standby.ledger_file(second))
    book = ledger.Ledger()
    journal.append([bytes(64) + book.append(ledger.Started(second.manifest().run_id(), tuple(sorted(second.manifest().genesis.items()))))])
    journal.close()
    with pytest.raises(IntegrityError, match="nobody vouches"):
        standby.verify_ledger(second)


def test_a_ledger_that_lost_its_end(folders: tuple[RunDir, RunDir]) -> None:
    first, second = folders

    async def job() -> None:
        async with served(first) as (_, where):
            await revoke(first, where, "0011223344556677")
            async with standby.copying(second, (where,), Recorder()) as copy:
                while await copy.step(0.0):
                    pass
                copy._noted_at = 0.0
                copy._note()

    run(job())
    whole = records_of(second)
    journal = SqliteJournal(standby.ledger_file(second))
    journal._db.execute("DELETE FROM record WHERE seq = (SELECT max(seq) FROM record)")
    journal.close()
    with pytest.raises(IntegrityError, match=f"this copy had {len(whole)} once"):
        standby.verify_ledger(second)


def test_every_error_says_what_to_do(folders: tuple[RunDir, RunDir]) -> None:
    first, _ = folders
    first.run_key_file.unlink()
    with pytest.raises(DecentraError, match="keep this folder as safe as the first"):
        run(standby.take_over(first, ("127.0.0.1:9",), Recorder()))
