"""Server and client over real TLS on loopback: the usual way of a member, restarts, limits."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from averaging_world import ALICE, BOB, FRAGMENT, HASH, RUN_KEY, hello, run, until, view, within, world

from decentra.averaging import client as client_module
from decentra.averaging import rpc
from decentra.averaging.client import AveragingClient, GrpcSession
from decentra.averaging.streams import StreamRules
from decentra.averaging.tls import create_tls, load_or_create_tls
from decentra.bits import ONE_BITS
from decentra.errors import ConfigError, PortTaken, Refused, RejectedPayload, Unreachable
from decentra.ids import Digest, RunId
from decentra.invite import Invite
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    Counters,
    Entry,
    Goodbye,
    Heartbeat,
    Holding,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Rejected,
    Role,
    Settlement,
    SwarmView,
)
from decentra.wire.frames import is_proven
from decentra.wire.trust import seal_successor


def offer(key: Any = ALICE, round: int = 1) -> Offer:
    return Offer(FRAGMENT, round, key.peer_id, HASH, Digest("b" * 64), 100, 2000, 10, ONE_BITS)


async def first_of(session: GrpcSession, kind: type) -> Any:
    async for message in session.messages():
        if isinstance(message, kind):
            return message
    raise AssertionError(f"the stream ended without a {kind.__name__}")


async def collect(session: GrpcSession, seen: list[Any]) -> None:
    async for message in session.messages():
        seen.append(message)


def test_the_way_of_a_member() -> None:
    async def story() -> None:
        async with world() as w:
            client = w.client()
            assert (await client.describe()).manifest == w.manifest
            admission = await client.join(Role.TRAINER, "n", "alice")
            assert (admission.peer, admission.role) == (ALICE.peer_id, Role.TRAINER)
            assert w.chain.check_credentials(client.credentials, ALICE.peer_id, admission.expires_at_s - 1) == admission
            assert [one[:3] for one in w.door.joined] == [(ALICE.peer_id, Role.TRAINER, "n")]

            session = await client.attend(hello(holdings=(Holding(ALICE.peer_id, FRAGMENT, HASH),)))
            facts = [
                offer(),
                Receipt(FRAGMENT, 1, ALICE.peer_id, BOB.peer_id, HASH),
                Abstention(FRAGMENT, 1, ALICE.peer_id, "loss is not finite"),
                Attestation(FRAGMENT, 1, ALICE.peer_id, HASH),
                Holding(ALICE.peer_id, FRAGMENT, HASH),
                Heartbeat(ALICE.peer_id, 1, Counters(num_steps=3, expert_tokens=((1, 20),))),
                Goodbye(ALICE.peer_id, "enough"),
            ]
            for fact in facts:
                await session.send(fact)
            await until(lambda: len(w.door.delivered) == len(facts))
            assert w.door.delivered == facts
            received = w.door.delivered[0]
            assert isinstance(received, Offer)
            assert is_proven(replace(offer(), proof=received.proof), w.manifest.run_id())  # the proof stands by itself

            assert await within(first_of(session, SwarmView)) == SwarmView(1, ())
            await session.close()
            await until(lambda: w.door.left)
            assert w.door.left == [(ALICE.peer_id, "goodbye: enough")]

    run(story())


def test_views_travel_with_offers_others_can_check() -> None:
    async def story() -> None:
        async with world() as w:
            alice, bob = await w.member(ALICE), await w.member(BOB)
            sender, reader = await alice.attend(hello()), await bob.attend(hello(BOB))
            await sender.send(offer())
            await until(lambda: w.door.delivered)
            received: Any = w.door.delivered[0]
            forged = Offer(FRAGMENT, 1, BOB.peer_id, HASH, HASH, 1, 10**9, 1, ONE_BITS, proof=received.proof)
            w.door.mailboxes[BOB.peer_id].put(view(offers=(received, forged), receipts=((ALICE.peer_id, BOB.peer_id),)))
            seen = await within(first_of(reader, type(view())))
            assert seen == view(offers=(offer(),), receipts=((ALICE.peer_id, BOB.peer_id),))
            assert seen.offers[0].proof == received.proof
            assert len(w.events.named("offer-forged")) == 1
            entry = Entry(
                ALICE.peer_id,
                received.packet,
                received.num_bytes,
                received.num_tokens,
                1,
                received.norm_bits,
                1,
                received.num_steps,
                received.proof,
            )
            true = Settlement(FRAGMENT, received.round, 1, received.base, (entry,), 1, 1, "")
            false = replace(true, entries=(replace(entry, num_tokens=10**9),))
            for settlement, shown in ((true, true), (false, None)):
                w.door.mailboxes[BOB.peer_id].put(replace(view(), version=9, round=9, settlement=settlement))
                seen = await within(first_of(reader, type(view())))
                assert seen.settlement == shown
            assert len(w.events.named("offer-forged")) == 2
            await sender.close()
            await reader.close()

    run(story())


def test_reading_doors() -> None:
    async def story() -> None:
        async with world() as w:
            w.door.views = tuple(view(i) for i in range(3))
            w.door.outcomes[FRAGMENT, 4] = Outcome(4, Phase.ABANDONED, "nobody came")
            w.door.records = [f"record {i}".encode() for i in range(1000)]
            member = await w.member()
            watcher = w.client(None)  # an invite's token, no identity
            for client in (member, watcher):
                assert await client.status() == (SwarmView(7, ()), w.door.views)
                assert await client.outcome(FRAGMENT, 4) == Outcome(4, Phase.ABANDONED, "nobody came")
                assert await client.outcome(FRAGMENT, 5) is None
                assert await client.ledger() == w.door.records
                assert await client.ledger(after_seq=10, limit=3) == w.door.records[10:13]
                assert await client.ledger(after_seq=1000) == []
            stranger = w.client(None, token=b"")
            for reading in (stranger.status(), stranger.outcome(FRAGMENT, 4), stranger.ledger(), stranger.describe()):
                with pytest.raises(Refused, match="invit"):
                    await reading
            with pytest.raises(RejectedPayload, match="limit"):
                await member.ledger(limit=0)

    run(story())


def test_the_way_to_a_successor_is_told_to_members_only() -> None:
    """It lets in who reads it: those who only watch, or hold an invite they have not used, do not get it."""

    async def story() -> None:
        async with world() as w:
            line = Invite(RunId("5" * 64), RUN_KEY.public, (), ("127.0.0.1:1",), b"secret").encode()
            organiser = w.client(None)
            with pytest.raises(Refused, match="not named by its organiser's key"):
                await organiser.command(RUN_KEY, "succeed", line)
            sealed = seal_successor(RUN_KEY, w.manifest.run_id(), line)
            assert await organiser.command(RUN_KEY, "succeed", sealed) == f"goes on as {'5' * 64}"
            assert not any("secret" in str(e) or line in str(e) for e in w.events.seen)
            assert (await (await w.member()).status())[0].successor == sealed
            watcher = w.client(BOB)
            await watcher.join(Role.WATCHER, "n", "bob")
            for reader in (w.client(None), watcher):
                assert (await reader.status())[0].successor == ""

    run(story())


def test_an_open_run_asks_for_no_token() -> None:
    async def story() -> None:
        async with world(mode="open") as w:
            stranger = w.client(BOB, token=b"")
            assert (await stranger.describe()).manifest == w.manifest
            assert (await stranger.status())[0] == SwarmView(7, ())
            await stranger.join(Role.KEEPER, "n", "bob")
            assert w.door.joined == [(BOB.peer_id, Role.KEEPER, "n", None, 0)]
            session = await stranger.attend(hello(BOB, role=Role.KEEPER))
            await session.close()

    run(story())


def test_describe_before_anything_is_known() -> None:
    async def story() -> None:
        async with world() as w:
            found = await client_module.describe(["127.0.0.1:1", w.address], w.chain, w.token())
            assert (found.manifest, found.address) == (w.manifest, w.address)
            assert abs(found.clock_offset_s) < 5
            with pytest.raises(Refused, match="invited peers only"):
                await client_module.describe([w.address], w.chain, None)

    run(story())


def test_the_service_ends_a_stream_on_purpose() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            w.door.mailboxes[ALICE.peer_id].put(Rejected(ALICE.peer_id, "digest", "last words"))
            w.door.mailboxes[ALICE.peer_id].close("revoked by the organiser")
            seen: list[Any] = []
            with pytest.raises(Refused, match="revoked by the organiser"):
                await collect(session, seen)
            assert set(seen) == {Rejected(ALICE.peer_id, "digest", "last words"), SwarmView(1, ())}
            with pytest.raises(Refused, match="revoked by the organiser"):
                await session.send(offer())
            await session.close()
            assert w.door.left[0][1] == "revoked by the organiser"

    run(story())


def test_a_reader_may_give_up_waiting_and_read_on_later() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            assert await within(first_of(session, SwarmView)) == SwarmView(1, ())
            for version in range(1, 6):
                impatient = asyncio.create_task(collect(session, []))
                await asyncio.sleep(0)
                impatient.cancel()
                await asyncio.wait([impatient])
                w.door.mailboxes[ALICE.peer_id].put(view(version))
                assert await within(first_of(session, type(view()))) == view(version)
            await session.close()

    run(story())


def test_closing_while_somebody_reads_ends_the_reader() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            seen: list[Any] = []
            reader = asyncio.create_task(collect(session, seen))
            await until(lambda: seen)
            await session.send(Goodbye(ALICE.peer_id, "enough"))
            await session.close()
            await within(reader)  # in peace: the service saw the end of the stream and closed too
            assert w.door.delivered == [Goodbye(ALICE.peer_id, "enough")]

    run(story())


def test_everybody_gets_the_newest_view() -> None:
    async def story() -> None:
        async with world() as w:
            sessions = {key: await (await w.member(key)).attend(hello(key)) for key in (ALICE, BOB)}
            for version in (1, 2, 3):
                one = view(version, why=f"version {version}")
                for mailbox in w.door.mailboxes.values():
                    mailbox.put(one)
                for session in sessions.values():
                    assert await within(first_of(session, type(one))) == one
            for session in sessions.values():
                await session.close()

    run(story())


def test_the_service_ends_a_stream_in_peace() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            w.door.mailboxes[ALICE.peer_id].close(None)
            assert [message async for message in session.messages()] == [SwarmView(1, ())]
            await session.close()

    run(story())


def test_a_second_process_with_the_same_identity_is_refused() -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member()
            session = await client.attend(hello())
            with pytest.raises(Refused, match="in use by another process"):
                await client.attend(hello(nonce="other"))
            await session.send(offer())  # the first one is not disturbed
            await until(lambda: w.door.delivered)
            await session.close()

    run(story())


@pytest.mark.parametrize("has_new_tls", [False, True])
def test_restart_of_the_service(has_new_tls: bool) -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member(call_s=5.0)
            session = await client.attend(hello())
            port = w.address.rpartition(":")[2]
            await w.stop()
            with pytest.raises(Unreachable, match=w.address):
                await collect(session, [])
            with pytest.raises(Unreachable):
                await session.send(offer())
            await session.close()
            for attempt in (client.attend(hello()), client.status(), client.join(Role.TRAINER, "n", "a")):
                with pytest.raises(Unreachable, match=w.address):
                    await attempt
            await w.start(f"127.0.0.1:{port}", tls=create_tls() if has_new_tls else None)
            again = await client.attend(hello())  # the old credentials are still good
            await again.send(offer())
            await until(lambda: w.door.delivered)
            assert (await client.status())[0] == SwarmView(7, ())
            await again.close()

    run(story())


def test_a_member_that_vanishes_is_seen_to_leave() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            await session._link.channel.close()  # no goodbye, no end of stream
            await until(lambda: w.door.left)
            assert w.door.left == [(ALICE.peer_id, "the stream ended without a goodbye")]

    run(story())


class Proxy:
    """Forwards TCP to an address until it is told to swallow everything without closing: a cable that was pulled."""

    def __init__(self, target: str) -> None:
        self.host, _, port = target.rpartition(":")
        self.port, self.is_pulled, self.tasks = int(port), False, set[asyncio.Task[None]]()

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self.tasks.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if not self.is_pulled:
                sink.write(data)
        if not self.is_pulled:
            sink.close()

    def stop(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()


def test_a_dead_connection_is_noticed_on_both_sides() -> None:
    async def story() -> None:
        async with world(keepalive_s=1.0) as w:
            proxy = Proxy(w.address)
            client = w.client(address=await proxy.start(), keepalive_s=1.0)
            await client.join(Role.TRAINER, "n", "alice")
            session = await client.attend(hello())
            proxy.is_pulled = True
            with pytest.raises(Unreachable):
                await collect(session, [])
            await until(lambda: w.door.left)
            await session.close()
            proxy.stop()

    run(story())


# ---------------------------------------------------------------- limits


def test_an_oversized_message_is_a_clean_error_and_the_service_goes_on() -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member()
            session = await client.attend(hello())
            await session._write(bytes(5 << 20))
            with pytest.raises(RejectedPayload, match="larger than max") as caught:
                await collect(session, [])
            assert caught.value.reason == "size"
            await until(lambda: w.door.left)
            await session.close()
            async with client_module._Using(client) as link:
                with pytest.raises(RejectedPayload, match="larger than max"):
                    await link.call("Join", bytes(5 << 20))
            again = await client.attend(hello())
            await again.send(offer())
            await until(lambda: w.door.delivered)
            await again.close()

    run(story())


def test_a_frame_over_the_limit_of_a_stream_is_refused_alone() -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            await session._write(bytes(300 << 10))
            assert (await within(first_of(session, Rejected))).reason == "size"
            await session.send(offer())
            await until(lambda: w.door.delivered)
            await session.close()

    run(story())


def test_oversized_metadata_is_a_clean_error() -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member()
            async with client_module._Using(client) as link:
                with pytest.raises((Unreachable, Refused, RejectedPayload)):
                    await link.call("FindOutcome", b"", credentials=bytes(20_000))
            assert (await client.status())[0] == SwarmView(7, ())

    run(story())


def test_a_stream_of_rubbish_is_ended() -> None:
    async def story() -> None:
        async with world(rules=StreamRules(max_malformed=5)) as w:
            session = await (await w.member()).attend(hello())
            for _ in range(5):
                await session._write(b"\xff\xff")
            with pytest.raises(Refused, match="5 messages of this stream were refused"):
                await collect(session, [])
            assert not w.door.delivered
            await session.close()

    run(story())


def test_a_flood_is_slowed_down_and_loses_nothing() -> None:
    async def story() -> None:
        async with world(rules=StreamRules(messages_per_s=20.0, burst_messages=5.0)) as w:
            session = await (await w.member()).attend(hello())
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            for seq in range(25):
                await session.send(Heartbeat(ALICE.peer_id, seq, Counters()))
            await until(lambda: len(w.door.delivered) == 25)
            assert loop.time() - began_s >= 0.9  # 20 over the burst at 20 a second
            assert [one.seq for one in w.door.delivered if isinstance(one, Heartbeat)] == list(range(25))
            assert (await within(first_of(session, Rejected))).reason == "rate"
            await session.close()

    run(story())


def test_a_silent_stream_is_ended() -> None:
    async def story() -> None:
        async with world(rules=StreamRules(first_frame_s=0.1)) as w:
            client = await w.member()
            async with client_module._Using(client) as link:
                call = rpc.multicallable(link.channel, "Attend")(metadata=rpc.metadata_of(client.credentials))
                session = GrpcSession(link, call, ALICE, w.chain, w.events)
                with pytest.raises(Refused, match="expected a hello within"):
                    await collect(session, [])

    run(story())


def test_a_bug_in_the_service_tells_the_caller_nothing() -> None:
    async def story() -> None:
        async with world() as w:
            with pytest.raises(Unreachable, match="its log says why") as caught:
                await w.client().command(RUN_KEY, "fail")
            assert "secret" not in str(caught.value)
            assert "a secret of the service" in w.events.named("service-fault")[0]["story"]
            w.events.seen.clear()

    run(story())


# ---------------------------------------------------------------- addresses, ports, files


def test_port_taken() -> None:
    async def story() -> None:
        async with world() as w, world(is_started=False) as second:
            with pytest.raises(PortTaken, match=w.address):
                await second.start(w.address)

    run(story())


def test_nobody_there_and_somebody_else_there() -> None:
    async def story() -> None:
        async with world(is_started=False) as w:
            with socket.socket() as silent:
                silent.bind(("127.0.0.1", 0))
                silent.listen()
                address = f"127.0.0.1:{silent.getsockname()[1]}"
                with pytest.raises(Unreachable, match="did not answer within"):
                    await w.client(address=address, call_s=0.3).status()
            with pytest.raises(Unreachable, match="cannot be reached"):
                await w.client(address=address).status()

            async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"220 mail.example.org ready\r\n")
                await writer.drain()

            async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
                with pytest.raises(Unreachable, match="not with TLS"):
                    await w.client(address=f"127.0.0.1:{other.sockets[0].getsockname()[1]}").status()
            for wrong in ("", "nowhere"):
                with pytest.raises(ConfigError):
                    await AveragingClient([wrong] if wrong else [], w.chain, w.events).status()

    run(story())


def test_the_tls_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "averaging.pem"
    made = load_or_create_tls(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_tls(path) == made
    assert len(made.fingerprint) == 32
    path.write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="private key and a certificate"):
        load_or_create_tls(path)


def test_it_runs_under_uvloop() -> None:
    async def story() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with world() as w:
            session = await (await w.member()).attend(hello())
            await session.send(offer())
            await until(lambda: w.door.delivered)
            await session.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(story(), 30))
