"""The driver: records before words, one journal per run, refusals to the one who asked, a restart that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from decentra.bits import ONE_BITS
from decentra.config import Manifest, ModelSpec, RoundSpec
from decentra.errors import IntegrityError, Refused, Unreachable
from decentra.ids import Digest, FragmentId, PeerId, digest_of
from decentra.protocol import ledger
from decentra.protocol.messages import (
    Attestation,
    FragmentView,
    Goodbye,
    Hello,
    Holding,
    Offer,
    Phase,
    Rejected,
    Role,
    ServiceMessage,
    SwarmView,
)
from decentra.service.driver import Driver
from decentra.service.mailbox import Mailbox
from decentra.sim.adapters import InlineCompute, SimClock, SimEvents, SimJournal
from decentra.sim.loop import run_virtual
from decentra.wire.ledgers import SIGNATURE_BYTES, open_record

A, B = PeerId("peer-a"), PeerId("peer-b")
TRUNK = FragmentId("trunk/0")
GENESIS = digest_of(b"genesis")
MANIFEST = Manifest(
    name="test", model=ModelSpec(num_experts=2), genesis={TRUNK: GENESIS},
    rounds=RoundSpec(cut_off_s=10, grace_s=5, attest_s=8, gather_s=2, heartbeat_s=2, lease_s=6, rollback_s=20),
)  # fmt: skip
SEAL = bytes(range(SIGNATURE_BYTES))


class SlowCompute(InlineCompute):
    """Appending takes a while, so that much else happens before a record is durable."""

    def __init__(self) -> None:
        super().__init__(Random(0), 0.0)
        self.delay_s = 0.5

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(self.delay_s)
        return function(*args)


def new_driver(journal: SimJournal, check: Callable[[bytes, bytes], bool] | None = None) -> Driver:
    driver = Driver(MANIFEST, journal, SimClock(), SlowCompute(), SimEvents("service", []), lambda _: SEAL, check)
    driver.recover()
    return driver


@asynccontextmanager
async def running(journal: SimJournal) -> AsyncIterator[Driver]:
    driver = new_driver(journal)
    task = asyncio.get_running_loop().create_task(driver.run())
    try:
        yield driver
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def hello(peer: PeerId, nonce: str = "n", anchor: Digest = GENESIS) -> Hello:
    return Hello(peer, Role.TRAINER, peer, nonce, holdings=(Holding(peer, TRUNK, anchor),))


async def enter(driver: Driver, peer: PeerId, nonce: str = "n", anchor: Digest = GENESIS) -> Mailbox:
    await driver.join(peer, Role.TRAINER, nonce, f"token-{peer}", 1)
    mailbox = Mailbox()
    await driver.attend(hello(peer, nonce, anchor), mailbox)
    return mailbox


async def until(mailbox: Mailbox, holds: Callable[[ServiceMessage], bool]) -> ServiceMessage:
    async with asyncio.timeout(60):
        while True:
            for message in await mailbox.get():
                if holds(message):
                    return message


def records_of(journal: SimJournal) -> list[ledger.Record]:
    return ledger.replay(open_record(r)[1] for r in journal.records)[1]


def run(job: Coroutine[Any, Any, None]) -> None:
    run_virtual(job)


async def lone_round(driver: Driver, mailbox: Mailbox, anchor: Digest) -> None:
    """A round of one member, from its opening to its end."""
    view = await until(mailbox, lambda v: isinstance(v, FragmentView) and v.phase is Phase.OPEN)
    assert isinstance(view, FragmentView)
    await driver.deliver(Offer(TRUNK, view.round, A, view.anchor, digest_of(b"packet"), 6, 10, 1, ONE_BITS))
    await driver.deliver(Attestation(TRUNK, view.round, A, anchor))
    await until(mailbox, lambda v: isinstance(v, FragmentView) and v.anchor == anchor)


def test_nobody_hears_of_what_is_not_durable() -> None:
    """Whatever a mailbox holds was on the journal before, also for one who comes in between two batches."""

    async def later(driver: Driver, index: int) -> None:
        """Newcomers arrive all the time, so that some find the book ahead of the journal."""
        await asyncio.sleep(0.17 * index)
        await enter(driver, PeerId(f"newcomer-{index}"), anchor=digest_of(b"old"))

    async def job() -> None:
        journal = SimJournal()
        heard: list[tuple[FragmentId, int, Digest]] = []
        honest = Mailbox.put

        def put(self: Mailbox, message: ServiceMessage) -> None:
            if isinstance(message, FragmentView):
                known = records_of(journal)
                opened = {r.round for r in known if isinstance(r, ledger.Opened)} | {0}
                anchors = {r.anchor for r in known if isinstance(r, ledger.Confirmed)} | {GENESIS}
                settled = {r.settlement.round for r in known if isinstance(r, ledger.Settled)}
                assert message.round in opened, "told of a round that is not on the journal"
                assert message.anchor in anchors, "told of an anchor that is not on the journal"
                assert message.settlement is None or message.round in settled
                heard.append((message.fragment, message.round, message.anchor))
            honest(self, message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mailbox, "put", put)
            async with running(journal) as driver:
                mailbox = await enter(driver, A)
                coming = [asyncio.create_task(later(driver, i)) for i in range(24)]
                for number in range(3):
                    await lone_round(driver, mailbox, digest_of(b"anchor %d" % number))
                await asyncio.gather(*coming)
        assert len({anchor for _, _, anchor in heard}) == 4

    run(job())


def test_a_newcomer_gets_every_view_and_the_swarm() -> None:
    async def job() -> None:
        async with running(SimJournal()) as driver:
            mailbox = await enter(driver, A)
            messages = await mailbox.get()
            assert {type(m) for m in messages} == {FragmentView, SwarmView}
            assert isinstance(messages[-1], SwarmView), "the swarm comes last"

    run(job())


def test_the_refused_hears_why_and_the_others_get_on() -> None:
    async def job() -> None:
        async with running(SimJournal()) as driver:
            await driver.join(A, Role.TRAINER, "n", "token", 1)
            results = await asyncio.gather(
                driver.join(B, Role.TRAINER, "n", "token", 1), driver.join(A, Role.TRAINER, "n", "token", 1), return_exceptions=True
            )
            assert isinstance(results[0], Refused)
            assert results[1] is None
            with pytest.raises(Refused, match="not a member"):
                await driver.attend(hello(B), Mailbox())
            with pytest.raises(Refused, match="known: stop, pass-on, roll-back"):
                await driver.command("dance", "")

    run(job())


def test_a_restart_goes_on_where_the_journal_ends() -> None:
    async def job() -> None:
        journal = SimJournal()
        async with running(journal) as driver:
            await lone_round(driver, await enter(driver, A), digest_of(b"one"))
        num_records = len(journal.records)
        async with running(journal) as driver:
            assert driver.book.fragments[TRUNK].anchor == digest_of(b"one")
            outcome = await driver.outcome(TRUNK, 1)
            assert outcome is not None
            assert (outcome.phase, outcome.anchor) == (Phase.CONFIRMED, digest_of(b"one"))
            assert await driver.ledger(0, 1000) == journal.records[:num_records]
            assert await driver.ledger(1, 2) == journal.records[1:3]
            await lone_round(driver, await enter(driver, A, "second", digest_of(b"one")), digest_of(b"two"))
        assert [r.height for r in records_of(journal) if isinstance(r, ledger.Confirmed)] == [1, 2]

    run(job())


def test_an_outcome_is_told_only_when_it_is_durable() -> None:
    async def job() -> None:
        journal = SimJournal()
        async with running(journal) as driver:
            mailbox = await enter(driver, A)
            view = await until(mailbox, lambda v: isinstance(v, FragmentView) and v.phase is Phase.OPEN)
            assert isinstance(view, FragmentView)
            await driver.deliver(Offer(TRUNK, view.round, A, view.anchor, digest_of(b"packet"), 6, 10, 1, ONE_BITS))
            async with asyncio.timeout(30):
                while (outcome := await driver.outcome(TRUNK, view.round)) is None:
                    assert not any(isinstance(r, ledger.Settled) for r in records_of(journal))
                    await asyncio.sleep(0.05)
            assert outcome.phase is Phase.SETTLED
            assert any(isinstance(r, ledger.Settled) for r in records_of(journal))

    run(job())


def vouch(_line: bytes, signature: bytes, _record: ledger.Record) -> None:
    if signature != SEAL:
        raise IntegrityError("nobody's")


def test_an_edited_journal_is_refused() -> None:
    async def job() -> None:
        journal = SimJournal()
        async with running(journal) as driver:
            await lone_round(driver, await enter(driver, A), digest_of(b"one"))
        new_driver(journal, vouch)
        with pytest.raises(IntegrityError, match="nobody's"):
            new_driver(SimJournal([*journal.records[:-1], bytes(SIGNATURE_BYTES) + journal.records[-1][SIGNATURE_BYTES:]]), vouch)
        with pytest.raises(IntegrityError, match="too short"):
            new_driver(SimJournal([b"x"]))
        with pytest.raises(IntegrityError, match="broken"):
            new_driver(SimJournal([journal.records[0], *journal.records[2:]]))

    run(job())


def test_a_second_stream_takes_over_and_a_revoked_peer_is_shown_out() -> None:
    async def job() -> None:
        async with running(SimJournal()) as driver:
            first = await enter(driver, A)
            second = Mailbox()
            await driver.attend(hello(A), second)
            assert first.is_closed
            assert "took over" in (first.reason or "")
            await driver.leave(A, first, "closed")
            assert driver.book.members[A].nonce == "n", "the old stream's end is not the member's"
            with pytest.raises(Refused, match="neither a member's name or peer id nor a token id"):
                await driver.revoke("nobody")
            assert await driver.revoke(driver.book.members[A].name) == A
            assert second.is_closed
            with pytest.raises(Refused):
                await driver.join(A, Role.TRAINER, "n", "token", 1)

    run(job())


def test_a_mistake_is_told_to_its_author_and_to_nobody_else() -> None:
    async def job() -> None:
        async with running(SimJournal()) as driver:
            mine, others = await enter(driver, A), await enter(driver, B)
            await driver.deliver(Offer(TRUNK, 99, A, GENESIS, digest_of(b"p"), 1, 1, 1, ONE_BITS))
            rejected = await until(mine, lambda v: isinstance(v, Rejected))
            assert isinstance(rejected, Rejected)
            assert rejected.reason == "future"
            await driver.deliver(Goodbye(A, "bye"))
            heard: list[ServiceMessage] = []
            async with asyncio.timeout(60):
                while not any(isinstance(m, SwarmView) and not all(v.is_live for v in m.members) for m in heard):
                    heard += await others.get()
            assert not any(isinstance(m, Rejected) for m in heard)

    run(job())


def test_stop_ends_the_run_when_the_open_round_is_over() -> None:
    async def job() -> None:
        journal = SimJournal()
        async with running(journal) as driver:
            mailbox = await enter(driver, A)
            await driver.command("stop", "enough")
            over = await until(mailbox, lambda v: isinstance(v, SwarmView) and v.is_stopped)
            assert isinstance(over, SwarmView)
            assert over.why == "enough"
            assert driver.book.fragments[TRUNK].active is None
        assert [r.is_over for r in records_of(journal) if isinstance(r, ledger.Stopping)] == [False, True]

    run(job())


def test_an_order_to_go_back_is_looked_at_and_everybody_is_told() -> None:
    async def job() -> None:
        journal = SimJournal()
        other = digest_of(b"another anchor")
        async with running(journal) as driver:
            mailbox = await enter(driver, A)
            for wrong in ("", f"{TRUNK} 3", f"nowhere/0 3 {other} why", f"{TRUNK} -1 {other} why", f"{TRUNK} 3 {other[:-1]} why"):
                with pytest.raises(Refused, match="expected a fragment of this run, a height and an anchor's digest"):
                    await driver.command("roll-back", wrong)
            await driver.command("roll-back", f"{TRUNK} 3 {other} a liar was in")
            view = await until(mailbox, lambda v: isinstance(v, FragmentView) and v.anchor == other)
            assert isinstance(view, FragmentView)
            assert view.height == 3
        assert [(r.height, r.anchor, r.why) for r in records_of(journal) if isinstance(r, ledger.RolledBack)] == [
            (3, other, "a liar was in")
        ]
        async with running(journal) as driver:
            assert driver.book.fragments[TRUNK].anchor == other
            mailbox = await enter(driver, A)
            await driver.command("stop", "enough")
            await until(mailbox, lambda v: isinstance(v, SwarmView) and v.is_stopped)
            with pytest.raises(Refused, match="the run is over; go on from its model as another run"):
                await driver.command("roll-back", f"{TRUNK} 0 {GENESIS} too late")

    run(job())


def test_nobody_is_shown_a_word_that_a_kill_could_take_back() -> None:
    """Words are signed: one that was shown and is not in the ledger would make the service a liar after its restart."""

    async def job() -> None:
        other = digest_of(b"another anchor")
        async with running(SimJournal()) as driver:
            await enter(driver, A)
            _, (first, *_) = await driver.status()
            assert first.told is not None
            assert (first.told.seq, first.told.anchor) == (0, GENESIS)
            order = asyncio.create_task(driver.command("roll-back", f"{TRUNK} 3 {other} why"))
            while driver.book.fragments[TRUNK].anchor != other:  # noqa: ASYNC110  (on virtual time looking is free)
                await asyncio.sleep(0.01)
            assert not order.done(), "the record is on its way to the disk"
            _, (view, *_) = await driver.status()
            assert order.done()
            assert view.told is not None
            assert (view.anchor, view.told.anchor) == (other, other)
            assert any(isinstance(r, ledger.RolledBack) for r in records_of(driver.journal))  # type: ignore[arg-type]

    run(job())


def test_a_status_that_waits_for_a_stuck_disk_says_so() -> None:
    async def job() -> None:
        async with running(SimJournal()) as driver:
            await enter(driver, A)
            assert isinstance(driver.compute, SlowCompute)
            driver.compute.delay_s = 1e6
            await driver.deliver(Goodbye(A, "bye"))
            order = asyncio.create_task(driver.command("stop", "enough"))
            await asyncio.sleep(5)
            with pytest.raises(Unreachable, match="its disk may be full or slow"):
                await driver.status()
            order.cancel()

    run(job())
