"""The real averaging service behind the real server: a round of two members over gRPC and SQLite, and a restart that loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
from averaging_world import ALICE, BOB, DEADLINE_S, FRAGMENT, HASH, RUN_KEY, SERVICE_KEY, Recorder, hello, run

from decentra.averaging.client import AveragingClient, GrpcSession
from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.averaging.server import AveragingServer, ServiceIdentity
from decentra.averaging.tls import ServerTls, create_tls
from decentra.bits import ONE_BITS
from decentra.config import Manifest
from decentra.errors import IntegrityError
from decentra.identity import Keypair
from decentra.ids import Digest, PeerId
from decentra.peer.stories import Stories
from decentra.protocol.messages import Abstention, Attestation, FragmentView, Holding, Offer, Phase, Receipt, Role
from decentra.service.driver import Driver
from decentra.service.mailbox import Mailbox
from decentra.sim.adapters import SimClock, SimDisk, SimExchange, SimNet
from decentra.wire import trust
from decentra.wire.frames import sign_told
from decentra.wire.trust import ServiceCertificate, Token, TrustChain

T = TypeVar("T")
MANIFEST = Manifest(name="test", genesis={FRAGMENT: HASH})
CHAIN = TrustChain(MANIFEST.run_id(), RUN_KEY.public)
NEXT = Digest("c" * 64)
PEERS = (ALICE, BOB)


class WallClock:
    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Threads:
    async def run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.to_thread(function, *args)


@asynccontextmanager
async def service(path: Path, tls: ServerTls) -> AsyncIterator[tuple[str, Driver]]:
    journal, events = SqliteJournal(path), Recorder()
    driver = Driver(
        manifest=MANIFEST,
        journal=journal,  # type: ignore[arg-type]
        clock=WallClock(),
        compute=Threads(),
        events=events,
        seal=lambda line: SERVICE_KEY.sign("ledger", line),
        vow=lambda told: sign_told(SERVICE_KEY, MANIFEST.run_id(), told),
    )
    driver.recover()
    pump = asyncio.create_task(driver.run())
    certificate = ServiceCertificate(SERVICE_KEY.public, tls.fingerprint, int(time.time()) + 3600)
    sealed = trust.seal_certificate(RUN_KEY, MANIFEST.run_id(), certificate)
    identity = ServiceIdentity(CHAIN, MANIFEST, trust.seal_manifest(RUN_KEY, MANIFEST), sealed, SERVICE_KEY, tls)
    server = AveragingServer(identity, driver, Mailbox, events)
    try:
        yield f"127.0.0.1:{await server.start('127.0.0.1:0')}", driver
    finally:
        await server.close()
        pump.cancel()
        await asyncio.wait([pump])
        journal.close()
    assert not events.named("service-fault"), events.named("service-fault")[0]["story"]


async def view_where(session: GrpcSession, condition: Callable[[FragmentView], bool]) -> FragmentView:
    async with asyncio.timeout(DEADLINE_S):
        async for message in session.messages():
            if isinstance(message, FragmentView) and condition(message):
                return message
    raise AssertionError("the stream ended")


def offer_of(key: Keypair, view: FragmentView) -> Offer:
    return Offer(FRAGMENT, view.round, key.peer_id, view.anchor, Digest(key.public.hex()), 1000, 500, 10, ONE_BITS)


def is_of_both(view: FragmentView) -> bool:
    return view.phase == Phase.OPEN and len(view.holders) == 2


async def one_round(sessions: dict[Keypair, GrpcSession], first: FragmentView) -> FragmentView:
    """Both offer, have each other's packets and agree on the result. ``first``: the view Alice has read already."""
    opened = {key: await view_where(session, is_of_both) for key, session in sessions.items() if key is BOB or not is_of_both(first)}
    opened.setdefault(ALICE, first)
    for key, session in sessions.items():
        await session.send(offer_of(key, opened[key]))
    for key, session in sessions.items():
        other = next(one for one in sessions if one is not key)
        seen = await view_where(session, lambda v, other=other: other.peer_id in {one.peer for one in v.offers})  # type: ignore[misc]
        packet = next(one.packet for one in seen.offers if one.peer == other.peer_id)
        await session.send(Receipt(FRAGMENT, seen.round, key.peer_id, other.peer_id, packet))
    for key, session in sessions.items():
        settled = await view_where(session, lambda v: v.settlement is not None)
        await session.send(Attestation(FRAGMENT, settled.round, key.peer_id, NEXT))
    return await view_where(sessions[BOB], lambda v: v.anchor == NEXT)


async def join(address: str, key: Keypair, token: bytes, papers: dict[Keypair, bytes]) -> GrpcSession:
    client = AveragingClient([address], CHAIN, Recorder(), key=key, token=token)
    await client.join(Role.TRAINER, "n", "somebody")
    papers[key] = client.credentials
    await client.close()
    return await client.attend(hello(key, holdings=(Holding(key.peer_id, FRAGMENT, HASH),)))


def test_a_round_over_grpc_and_a_restart_that_loses_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        path, tls = tmp_path / "ledger.db", create_tls()
        token = trust.seal_token(RUN_KEY, MANIFEST.run_id(), Token.generate(2, int(time.time()) + 60))
        papers: dict[Keypair, bytes] = {}
        async with service(path, tls) as (address, _):
            sessions = {key: await join(address, key, token, papers) for key in PEERS}
            # A first round that opened while Alice was alone: she has nothing to offer there, so the next one opens with both.
            first = await view_where(sessions[ALICE], lambda v: v.phase == Phase.OPEN)
            if len(first.holders) == 1:
                await sessions[ALICE].send(Abstention(FRAGMENT, first.round, ALICE.peer_id, "waiting for Bob"))
            confirmed = await one_round(sessions, first)
            assert confirmed.height == 1
            for session in sessions.values():
                await session.close()
        async with service(path, tls) as (address, driver):
            client = AveragingClient([address], CHAIN, Recorder(), key=ALICE, credentials=papers[ALICE])
            _, views = await client.status()
            assert [(one.fragment, one.height, one.anchor) for one in views] == [(FRAGMENT, 1, NEXT)]
            outcome = await client.outcome(FRAGMENT, confirmed.recent[-1].round)
            assert outcome is not None
            assert (outcome.phase, outcome.anchor, outcome.thin) == (Phase.CONFIRMED, NEXT, False)
            assert await client.ledger() == list(driver.journal.load())
            assert await client.command(RUN_KEY, "stop", "enough") == "stopping: enough"
            await client.close()

    run(story())


def test_a_service_that_keeps_two_ledgers_is_exposed_by_its_own_signatures(tmp_path: Path) -> None:
    """Alice is shown one copy, Bob the other; each sees a whole, signed, consistent run."""
    anchors = {ALICE: Digest("d" * 64), BOB: Digest("e" * 64)}
    swarm: dict[PeerId, SimExchange] = {}

    async def alone(address: str, key: Keypair, papers: bytes) -> Stories:
        """One round of this member with nobody else."""
        disk = SimDisk(Random(1))
        exchange = SimExchange(key.peer_id, disk, SimNet(Random(1)), swarm)
        stories = Stories(key.peer_id, MANIFEST.genesis, exchange, disk, SimClock(), Threads(), Recorder(), CHAIN.is_told)
        client = AveragingClient([address], CHAIN, Recorder(), key=key, credentials=papers)
        session = await client.attend(hello(key, holdings=(Holding(key.peer_id, FRAGMENT, HASH),)))
        opened = await view_where(session, lambda v: v.phase == Phase.OPEN and v.holders == (key.peer_id,))
        await session.send(offer_of(key, opened))
        settled = await view_where(session, lambda v: v.settlement is not None)
        await session.send(Attestation(FRAGMENT, settled.round, key.peer_id, anchors[key]))
        stories.saw(await view_where(session, lambda v: v.anchor == anchors[key]))
        await session.close()
        return stories

    async def story() -> None:
        tls, papers = create_tls(), dict[Keypair, bytes]()
        token = trust.seal_token(RUN_KEY, MANIFEST.run_id(), Token.generate(2, int(time.time()) + 60))
        async with service(tmp_path / "one.db", tls) as (address, _):
            for key in PEERS:
                client = AveragingClient([address], CHAIN, Recorder(), key=key, token=token)
                await client.join(Role.TRAINER, "n", "somebody")
                papers[key] = client.credentials
                await client.close()
        shutil.copy(tmp_path / "one.db", tmp_path / "two.db")
        async with service(tmp_path / "one.db", tls) as (one, _), service(tmp_path / "two.db", tls) as (two, _):
            first, second = await alone(one, ALICE, papers[ALICE]), await alone(two, BOB, papers[BOB])
        hears = asyncio.create_task(first.run())
        with pytest.raises(IntegrityError, match="told two stories"):
            await second.run()
        hears.cancel()

    run(story())
