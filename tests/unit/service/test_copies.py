"""Copies of the ledger, on virtual time: a record counts when the copies in step have it; one that is slow or gone holds nobody up for long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from decentra.errors import Refused
from decentra.service.copies import COPY_S, FORGOTTEN_S, MAX_COPIES, MAX_LAG, Copies
from decentra.sim.adapters import SimClock, SimEvents
from decentra.sim.loop import run_virtual


def made() -> tuple[Copies, list[tuple[float, str, str, dict[str, Any]]]]:
    log: list[tuple[float, str, str, dict[str, Any]]] = []
    return Copies(SimClock(), SimEvents("service", log), num_records=10), log


def elapsed_s() -> float:
    return asyncio.get_running_loop().time()


def test_nobody_copies() -> None:
    async def job() -> None:
        copies, log = made()
        await copies.written(3)
        assert (copies.num_records, elapsed_s(), log) == (13, 0.0, [])

    run_virtual(job())


def test_a_record_counts_when_the_copy_has_it() -> None:
    async def job() -> None:
        copies, log = made()

        async def copy() -> None:
            held = 4
            while True:
                await copies.heard("b", held, 5.0)
                await asyncio.sleep(0.3)  # the way and the disk
                held = copies.num_records

        task = asyncio.create_task(copy())
        await asyncio.sleep(1)
        assert [event for _, _, event, _ in log] == ["copy-in-step"]
        before = elapsed_s()
        await copies.written(2)
        assert elapsed_s() - before == pytest.approx(0.3)
        assert len(log) == 1
        task.cancel()

    run_virtual(job())


def test_a_copy_that_is_gone_is_waited_for_once_and_taken_in_again() -> None:
    async def job() -> None:
        copies, log = made()
        await asyncio.gather(copies.heard("b", 10, 0.0))
        before = elapsed_s()
        await copies.written(1)
        assert elapsed_s() - before == pytest.approx(COPY_S)
        await copies.written(1)
        assert elapsed_s() - before == pytest.approx(COPY_S)
        await copies.heard("b", 12, 0.0)
        assert [event for _, _, event, _ in log] == ["copy-in-step", "copy-behind", "copy-in-step"]

    run_virtual(job())


def test_a_copy_that_lags_from_the_start_is_not_waited_for() -> None:
    async def job() -> None:
        copies, _ = made()
        copies.num_records = 3 + MAX_LAG + 1
        await copies.heard("b", 3, 0.0)
        await copies.written(1)
        assert elapsed_s() == 0.0

    run_virtual(job())


def test_a_copy_that_is_always_a_little_late_is_waited_for() -> None:
    """On a busy run there is always a record more: it is in step all the same, and then there is none more until it has it."""

    async def job() -> None:
        copies, log = made()
        held = 0

        async def copy() -> None:
            nonlocal held
            while True:
                await copies.heard("b", held, 5.0)
                news = copies.num_records
                await asyncio.sleep(0.12)
                held = news

        task = asyncio.create_task(copy())
        for _ in range(50):
            await asyncio.sleep(0.08)
            await copies.written(1)
            assert held >= copies.num_records - 1 or not log
        assert [event for _, _, event, _ in log] == ["copy-in-step"]
        task.cancel()

    run_virtual(job())


def test_a_reader_is_woken_by_news_and_sent_away_with_more_than_there_is() -> None:
    async def job() -> None:
        copies, _ = made()
        waiting = asyncio.create_task(copies.heard("b", 10, 60.0))
        await asyncio.sleep(2)
        assert not waiting.done()
        await copies.written(1)
        await waiting
        assert elapsed_s() < 60
        with pytest.raises(Refused, match="two stories"):
            await copies.heard("b", 12, 0.0)

    run_virtual(job())


def test_copies_that_ended_do_not_keep_a_place() -> None:
    """A standby that is restarted again and again, and the machine that takes over then, come under new names."""

    async def job() -> None:
        copies, _ = made()
        for number in range(3 * MAX_COPIES):
            await copies.heard(str(number), 10, 0.0)
            await asyncio.sleep(FORGOTTEN_S / 4)

    run_virtual(job())


def test_only_so_many_copies_are_kept() -> None:
    async def job() -> None:
        copies, _ = made()
        for number in range(MAX_COPIES):
            await copies.heard(str(number), 0, 0.0)
        with pytest.raises(Refused, match="kept already"):
            await copies.heard("one more", 0, 0.0)
        await copies.heard("0", 5, 0.0)

    run_virtual(job())
