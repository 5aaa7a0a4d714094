"""Every forgery at the service's door is refused with its own reason, nothing of it reaches the service, and the service goes on."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from averaging_world import ALICE, BOB, FRAGMENT, HASH, MALLORY, RUN_KEY, SERVICE_KEY, World, hello, run, until, view, within, world

from decentra.averaging import client as client_module
from decentra.averaging import rpc
from decentra.averaging.client import GrpcSession
from decentra.averaging.tls import create_tls
from decentra.bits import ONE_BITS
from decentra.errors import ConfigError, DecentraError, IntegrityError, ManifestMismatch, Refused, RejectedPayload, VersionMismatch
from decentra.identity import Keypair
from decentra.ids import Digest, RunId
from decentra.pb import averaging_pb2, messages_pb2
from decentra.protocol.messages import Counters, Heartbeat, Hello, Holding, Offer, Rejected, Role
from decentra.wire import limits, trust
from decentra.wire.convert import digest_bytes, dump, encode, role_to_wire
from decentra.wire.frames import member_frame, seal_fact
from decentra.wire.signed import seal
from decentra.wire.trust import Admission, TrustChain

OTHER_RUN = RunId("f" * 64)


def soon_s() -> float:
    return time.time() + 60


# ---------------------------------------------------------------- join


def join_request(w: World, **changes: Any) -> Any:
    usual = {
        "protocol_version": limits.PROTOCOL_VERSION,
        "manifest": digest_bytes(w.manifest.run_id()),
        "role": role_to_wire(Role.TRAINER),
        "nonce": "n",
        "name": "alice",
        "token": w.token(),
    }
    return averaging_pb2.JoinRequest(**{**usual, **changes})


def sealed_join(w: World, key: Keypair = ALICE, kind: str = "join", run_id: RunId | None = None, in_s: float = 60, **changes: Any) -> bytes:
    return seal(key, kind, run_id or w.manifest.run_id(), join_request(w, **changes), not_after_s=time.time() + in_s)


def unsigned_join(w: World) -> bytes:
    statement = messages_pb2.SignedStatement.FromString(sealed_join(w))
    statement.signature = bytes(64)
    return dump(statement)


def anothers_join(w: World) -> bytes:
    statement = messages_pb2.SignedStatement.FromString(sealed_join(w, MALLORY))
    statement.signer = ALICE.public
    return dump(statement)


JOINS: list[tuple[str, Callable[[World], bytes], type[DecentraError], str]] = [
    ("no signature", unsigned_join, Refused, "signature"),
    ("another's name", anothers_join, Refused, "signature"),
    ("other run", lambda w: sealed_join(w, run_id=OTHER_RUN), Refused, "run"),
    ("other purpose", lambda w: sealed_join(w, kind="hello"), Refused, "purpose"),
    ("expired", lambda w: sealed_join(w, in_s=-5), Refused, "expired"),
    ("without expiry", lambda w: seal(ALICE, "join", w.manifest.run_id(), join_request(w)), Refused, "has to expire"),
    ("valid for a year", lambda w: sealed_join(w, in_s=3e7), Refused, "has to expire"),
    ("rubbish", lambda w: b"\xff\xff\xff", RejectedPayload, "malformed"),
    ("rubbish inside", lambda w: seal(ALICE, "join", w.manifest.run_id(), b"\xff", not_after_s=soon_s()), RejectedPayload, "malformed"),
    ("no role", lambda w: sealed_join(w, role=0), RejectedPayload, "role"),
    ("endless name", lambda w: sealed_join(w, name="x" * 65), RejectedPayload, "64"),
    ("other manifest", lambda w: sealed_join(w, manifest=bytes(32)), ManifestMismatch, "ours is 0000"),
    ("other version", lambda w: sealed_join(w, protocol_version=99), VersionMismatch, "99"),
    ("no token", lambda w: sealed_join(w, token=b""), Refused, "by invitation"),
    ("own token", lambda w: sealed_join(w, token=w.token(key=MALLORY)), Refused, "forged"),
    ("expired token", lambda w: sealed_join(w, token=w.token(expires_in_s=-5)), Refused, "expired"),
    ("token for another role", lambda w: sealed_join(w, token=w.token(role=Role.KEEPER)), Refused, "for a keeper"),
]


@pytest.mark.parametrize(("make", "error", "says"), [row[1:] for row in JOINS], ids=[row[0] for row in JOINS])
def test_forged_joins(make: Callable[[World], bytes], error: type[DecentraError], says: str) -> None:
    async def story() -> None:
        async with world() as w:
            client = w.client()
            async with client_module._Using(client) as link:
                with pytest.raises(error, match=says):
                    await link.call("Join", make(w))
            assert not w.door.joined
            await client.join(Role.TRAINER, "n", "alice")
            assert len(w.door.joined) == 1

    run(story())


def test_a_used_up_token() -> None:
    async def story() -> None:
        async with world() as w:
            token = w.token(uses=1)
            await w.client(ALICE, token=token).join(Role.TRAINER, "n", "alice")
            with pytest.raises(Refused, match="used 1 times of 1"):
                await w.client(BOB, token=token).join(Role.TRAINER, "n", "bob")
            await w.client(ALICE, token=token).join(Role.TRAINER, "n2", "alice")  # once more, after a restart

    run(story())


# ---------------------------------------------------------------- hello


async def attend_with(w: World, frame: bytes, *, credentials: bytes) -> None:
    """Open a stream with a first frame of our own making and wait for the service's answer."""
    async with client_module._Using(w.client()) as link:
        call = rpc.multicallable(link.channel, "Attend")(metadata=rpc.metadata_of(credentials))
        session = GrpcSession(link, call, MALLORY, w.chain, w.events)
        await session._write(frame)
        await within(session._read())


def hello_frame(w: World, key: Keypair = ALICE, *, run_id: RunId | None = None, in_s: float = 60, **changes: Any) -> bytes:
    return member_frame(key, run_id or w.manifest.run_id(), hello(key, **changes), not_after_s=time.time() + in_s)


def frame_of(sealed: bytes) -> bytes:
    return dump(messages_pb2.MemberFrame(hello=sealed))


def mallorys_hello_as_alice(w: World) -> bytes:
    return frame_of(seal(MALLORY, "hello", w.manifest.run_id(), encode(hello(ALICE)), not_after_s=soon_s()))


def relabelled_hello(w: World) -> bytes:
    statement = messages_pb2.SignedStatement.FromString(seal(ALICE, "offer", w.manifest.run_id(), encode(hello()), not_after_s=soon_s()))
    statement.purpose = f"hello/{w.manifest.run_id()}"
    return frame_of(dump(statement))


HELLOS: list[tuple[str, Callable[[World], bytes], type[DecentraError], str]] = [
    ("another peer's credentials", lambda w: hello_frame(w, MALLORY), Refused, "signer"),
    ("another peer's name", mallorys_hello_as_alice, Refused, "signer"),
    ("relabelled", relabelled_hello, Refused, "signature"),
    ("other run", lambda w: hello_frame(w, run_id=OTHER_RUN), Refused, "run"),
    ("expired", lambda w: hello_frame(w, in_s=-5), Refused, "expired"),
    ("without expiry", lambda w: frame_of(seal_fact(ALICE, w.manifest.run_id(), hello())), Refused, "has to expire"),
    ("another role than admitted", lambda w: hello_frame(w, role=Role.KEEPER), Refused, "admitted as a trainer"),
    ("not signed", lambda w: frame_of(encode(hello())), RejectedPayload, "signed with Ed25519"),
    ("not a hello", lambda w: member_frame(ALICE, w.manifest.run_id(), Holding(ALICE.peer_id, FRAGMENT, HASH)), RejectedPayload, "hello"),
    ("empty", lambda w: b"", RejectedPayload, "hello"),
    ("rubbish", lambda w: b"\xff\xff", RejectedPayload, "MemberFrame"),
]


@pytest.mark.parametrize(("make", "error", "says"), [row[1:] for row in HELLOS], ids=[row[0] for row in HELLOS])
def test_forged_hellos(make: Callable[[World], bytes], error: type[DecentraError], says: str) -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member()
            with pytest.raises(error, match=says):
                await attend_with(w, make(w), credentials=client.credentials)
            assert not w.door.mailboxes
            session = await client.attend(hello())
            assert ALICE.peer_id in w.door.mailboxes
            await session.close()

    run(story())


def credentials(w: World, *, service_key: Keypair = SERVICE_KEY, run_id: RunId | None = None, in_s: float = 60) -> bytes:
    admission = Admission(run_id or w.manifest.run_id(), ALICE.peer_id, Role.TRAINER, int(time.time() + in_s))
    return trust.pack_credentials(w.certificate(), trust.seal_admission(service_key, admission))


PAPERS: list[tuple[str, Callable[[World], bytes], str]] = [
    ("none", lambda w: b"", "join the run first"),
    ("rubbish", lambda w: b"\xff\xff", "Credentials"),
    ("self made", lambda w: credentials(w, service_key=MALLORY), "signed by"),
    ("other run", lambda w: credentials(w, run_id=OTHER_RUN), "of run ffff"),
    ("expired", lambda w: credentials(w, in_s=-5), "expired"),
]


@pytest.mark.parametrize(("make", "says"), [row[1:] for row in PAPERS], ids=[row[0] for row in PAPERS])
def test_forged_credentials(make: Callable[[World], bytes], says: str) -> None:
    async def story() -> None:
        async with world() as w:
            with pytest.raises(Refused, match=says):
                await attend_with(w, hello_frame(w), credentials=make(w))
            assert not w.door.mailboxes
            if papers := make(w):
                reader = w.client(None, token=b"", credentials=papers)
                with pytest.raises(Refused, match=says):
                    await reader.status()

    run(story())


# ---------------------------------------------------------------- facts


def offer(key: Keypair = ALICE) -> Offer:
    return Offer(FRAGMENT, 1, key.peer_id, HASH, Digest("b" * 64), 100, 2000, 10, ONE_BITS)


def offer_frame(sealed: bytes) -> bytes:
    return dump(messages_pb2.MemberFrame(offer=sealed))


FACTS: list[tuple[str, Callable[[RunId], bytes], str]] = [
    ("another peer's offer", lambda r: member_frame(BOB, r, offer(BOB)), "signer"),
    ("an offer in another's name", lambda r: offer_frame(seal(BOB, "offer", r, encode(offer()))), "signer"),
    ("own signature, another's name", lambda r: offer_frame(seal(ALICE, "offer", r, encode(offer(BOB)))), "signer"),
    ("offer of another run", lambda r: member_frame(ALICE, OTHER_RUN, offer()), "run"),
    ("a receipt as an offer", lambda r: offer_frame(seal(ALICE, "receipt", r, encode(offer()))), "purpose"),
    ("unsigned", lambda r: offer_frame(encode(offer())), "malformed"),
    ("heartbeat in another's name", lambda r: member_frame(BOB, r, Heartbeat(BOB.peer_id, 1, Counters())), "signer"),
    ("holding in another's name", lambda r: member_frame(BOB, r, Holding(BOB.peer_id, FRAGMENT, HASH)), "signer"),
    ("a second hello", lambda r: member_frame(ALICE, r, hello(), not_after_s=soon_s()), "malformed"),
    ("nothing", lambda r: b"", "malformed"),
]


@pytest.mark.parametrize(("make", "reason"), [row[1:] for row in FACTS], ids=[row[0] for row in FACTS])
def test_forged_facts_are_rejected_one_by_one(make: Callable[[RunId], bytes], reason: str) -> None:
    async def story() -> None:
        async with world() as w:
            session = await (await w.member()).attend(hello())
            await session._write(make(w.manifest.run_id()))
            await session.send(offer())
            async for message in session.messages():
                if isinstance(message, Rejected):
                    assert (message.peer, message.reason) == (ALICE.peer_id, reason)
                    break
            await until(lambda: w.door.delivered)
            assert w.door.delivered == [offer()]
            await session.close()

    run(story())


# ---------------------------------------------------------------- commands


async def give(w: World, sealed: bytes) -> Any:
    async with client_module._Using(w.client()) as link:
        return averaging_pb2.CommandReply.FromString(await link.call("Command", sealed)).answer


def test_commands() -> None:
    async def story() -> None:
        async with world() as w:
            run_id = w.manifest.run_id()
            assert await w.client(None).command(RUN_KEY, "stop", "enough") == "stop done"
            sealed = trust.seal_command(RUN_KEY, run_id, "stop", "again", expires_at_s=soon_s())
            assert await give(w, sealed) == "stop done"
            with pytest.raises(Refused, match="carried out already"):
                await give(w, sealed)
            table = [
                (trust.seal_command(MALLORY, run_id, "stop", "", expires_at_s=soon_s()), "signed by"),
                (trust.seal_command(SERVICE_KEY, run_id, "stop", "", expires_at_s=soon_s()), "signed by"),
                (trust.seal_command(RUN_KEY, OTHER_RUN, "stop", "", expires_at_s=soon_s()), "of run ffff"),
                (trust.seal_command(RUN_KEY, run_id, "stop", "", expires_at_s=time.time() - 5), "expired"),
                (trust.seal_command(RUN_KEY, run_id, "stop", "", expires_at_s=time.time() + 86400), "has to expire"),
                (trust.seal_manifest(RUN_KEY, w.manifest), "command"),
                (b"", "command"),
            ]
            for forged, says in table:
                with pytest.raises(Refused, match=says):
                    await give(w, forged)
            assert w.door.commands == [("stop", "enough"), ("stop", "again")]

    run(story())


def test_a_revoked_peer_and_a_revoked_invite_are_refused() -> None:
    async def story() -> None:
        async with world() as w:
            token = w.token()
            client = w.client(token=token)
            await client.join(Role.TRAINER, "n", "alice")
            await client.command(RUN_KEY, "revoke", ALICE.peer_id)
            for attempt in (client.attend(hello()), client.status()):
                with pytest.raises(Refused, match="revoked"):
                    await attempt
            await client.command(RUN_KEY, "revoke", w.chain.check_token(token, time.time()).id)
            with pytest.raises(Refused, match="revoked this invite"):
                await w.client(BOB, token=token).join(Role.TRAINER, "n", "bob")

    run(story())


# ---------------------------------------------------------------- who is the service?


def test_a_service_with_another_tls_key_is_refused_before_anything_is_sent() -> None:
    async def story() -> None:
        async with world() as w:
            # Somebody in between: shows the real certificate of the run key, but has another TLS key.
            w.server.identity = replace(w.server.identity, sealed_certificate=w.certificate(create_tls()))  # type: ignore[union-attr]
            client = w.client()
            for attempt in (client.join(Role.TRAINER, "n", "a"), client.status(), client.command(RUN_KEY, "stop")):
                with pytest.raises(IntegrityError, match="somebody stands between"):
                    await attempt
            assert (w.door.joined, w.door.commands) == ([], [])

    run(story())


def certificates(w: World) -> list[tuple[bytes, str]]:
    body = trust.ServiceCertificate(MALLORY.public, w.tls.fingerprint, int(time.time() + 60))
    run_id = w.manifest.run_id()
    return [
        (w.certificate(expires_in_s=-5), "expired"),
        (trust.seal_certificate(MALLORY, run_id, body), "signed by"),
        (trust.seal_certificate(RUN_KEY, OTHER_RUN, body), "of run ffff"),
        (b"", "no valid certificate"),
    ]


def test_a_service_without_a_valid_certificate_is_refused() -> None:
    async def story() -> None:
        async with world() as w:
            for sealed, says in certificates(w):
                w.server.identity = replace(w.server.identity, sealed_certificate=sealed)  # type: ignore[union-attr]
                with pytest.raises(IntegrityError, match=says):
                    await w.client().status()

    run(story())


def test_a_server_does_not_start_with_papers_that_do_not_fit() -> None:
    async def story() -> None:
        async with world(is_started=False) as w:
            w.tls, real = create_tls(), w.tls
            assert w.tls != real
            sealed = w.certificate(real)
            w.certificate = lambda *_: sealed  # type: ignore[method-assign, assignment, misc]
            with pytest.raises(ConfigError, match="another service or TLS key"):
                await w.start()

    run(story())


def test_a_service_of_another_run_is_named() -> None:
    async def story() -> None:
        async with world() as w:
            chain = TrustChain(OTHER_RUN, RUN_KEY.public)
            with pytest.raises(ManifestMismatch, match="the run served at") as caught:
                await client_module.describe([w.address], chain, None)
            assert (caught.value.ours, caught.value.theirs) == (OTHER_RUN, w.manifest.run_id())

    run(story())


@pytest.mark.parametrize("version", ["99", "", "x"])
def test_unknown_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with world() as w:
            client = await w.member()
            papers = [(rpc.PROTOCOL_KEY, version), (rpc.CREDENTIALS_KEY, client.credentials)]
            monkeypatch.setattr(rpc, "metadata_of", lambda *_: tuple(papers if version else papers[1:]))
            attempts: list[Awaitable[Any]] = [client.status(), client.outcome(FRAGMENT, 1), client.ledger(), client.attend(hello())]
            for attempt in attempts:
                with pytest.raises(VersionMismatch, match=f"protocol {limits.PROTOCOL_VERSION}"):
                    await attempt
            assert not w.door.mailboxes

    run(story())


def test_a_hello_is_never_sent_without_credentials() -> None:
    async def story() -> None:
        async with world() as w:
            with pytest.raises(Refused, match="join the run first"):
                await w.client().attend(Hello(ALICE.peer_id, Role.TRAINER, "a", "n"))

    run(story())


def test_an_anchor_that_the_service_does_not_sign_for_is_not_believed() -> None:
    """Else it could tell everybody another one, and nobody could prove it."""

    async def story() -> None:
        async with world() as w:
            for forged in (replace(view(), told=None), replace(view(), anchor=Digest("b" * 64)), replace(view(), height=3)):
                client = await w.member()
                session = await client.attend(hello())
                w.door.mailboxes[ALICE.peer_id].put(forged)
                with pytest.raises(IntegrityError, match="does not sign that"):
                    [message async for message in session.messages()]
                await session.close()
                w.door.views = (forged,)
                with pytest.raises(IntegrityError, match="does not sign that"):
                    await client.status()

    run(story())
