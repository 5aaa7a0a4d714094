"""A run with a real gRPC server on loopback and a small averaging service in memory behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from decentra.averaging.client import AveragingClient
from decentra.averaging.server import AveragingServer, ServiceIdentity
from decentra.averaging.streams import StreamRules
from decentra.averaging.tls import ServerTls, create_tls
from decentra.config import AdmissionSpec, Manifest
from decentra.errors import AlreadyHere, Refused
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, PeerId, RunId
from decentra.protocol.messages import FragmentView, Hello, MemberMessage, Outcome, Phase, Role, SwarmView, Told
from decentra.service.mailbox import Mailbox
from decentra.wire import trust
from decentra.wire.frames import sign_told
from decentra.wire.trust import ServiceCertificate, Token, TrustChain

T = TypeVar("T")
FRAGMENT = FragmentId("trunk/0")
HASH = Digest("a" * 64)
DEADLINE_S = 20.0
RUN_KEY, SERVICE_KEY, ALICE, BOB, MALLORY = (Keypair.from_seed(bytes([i]) * 32) for i in range(1, 6))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; hanging is a failure."""

    async def bounded() -> T:
        async with asyncio.timeout(2 * DEADLINE_S):
            return await coroutine

    return asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, at most DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - conditions are about other tasks' state, there is no event to wait for
            await asyncio.sleep(0.005)


async def within(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(DEADLINE_S):
        return await awaitable


class Recorder:
    """Events, kept."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.seen.append((event, fields))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.seen if name == event]


class MemoryDoor:
    """An averaging service that remembers what it was told and says what the test puts into mailboxes."""

    def __init__(self) -> None:
        self.joined: list[tuple[PeerId, Role, str, str | None, int]] = []
        self.delivered: list[MemberMessage] = []
        self.left: list[tuple[PeerId, str]] = []
        self.mailboxes: dict[PeerId, Mailbox] = {}
        self.nonces: dict[PeerId, str] = {}
        self.outcomes: dict[tuple[FragmentId, int], Outcome] = {}
        self.records: list[bytes] = []
        self.commands: list[tuple[str, str]] = []
        self.views: tuple[FragmentView, ...] = ()
        self.successor = ""

    async def join(self, peer: PeerId, role: Role, nonce: str, token_id: str | None, token_uses: int) -> None:
        others = {known[0] for known in self.joined if known[3] == token_id} - {peer}
        if token_id is not None and len(others) >= token_uses:
            raise Refused(f"this invite was used {len(others)} times of {token_uses}")
        self.joined.append((peer, role, nonce, token_id, token_uses))

    async def attend(self, hello: Hello, mailbox: Mailbox) -> None:
        if self.nonces.get(hello.peer, hello.nonce) != hello.nonce:
            raise AlreadyHere("this identity is in use by another process")
        self.nonces[hello.peer], self.mailboxes[hello.peer] = hello.nonce, mailbox
        mailbox.put(SwarmView(1, ()))

    async def deliver(self, message: MemberMessage) -> None:
        self.delivered.append(message)

    async def leave(self, peer: PeerId, mailbox: Mailbox, why: str) -> None:
        self.left.append((peer, why))
        if self.mailboxes.get(peer) is mailbox:
            del self.mailboxes[peer], self.nonces[peer]

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None:
        return self.outcomes.get((fragment, round))

    async def status(self) -> tuple[SwarmView, tuple[FragmentView, ...]]:
        return SwarmView(7, (), successor=self.successor), self.views

    async def ledger(self, after_seq: int, limit: int) -> list[bytes]:
        return self.records[after_seq : after_seq + limit]

    async def command(self, kind: str, argument: str) -> str:
        if kind == "fail":
            raise ZeroDivisionError("a secret of the service")
        self.commands.append((kind, argument))
        return f"{kind} done"

    async def revoke(self, subject: str) -> str:
        self.commands.append(("revoke", subject))
        return subject

    async def succeed(self, run: RunId, successor: str) -> str:
        self.successor = successor
        return f"goes on as {run}"


@dataclass
class World:
    """One run: its papers, its server, and clients for whoever asks."""

    manifest: Manifest
    tls: ServerTls
    door: MemoryDoor
    events: Recorder
    rules: StreamRules
    keepalive_s: float
    server: AveragingServer[Mailbox] | None = None
    address: str = ""
    clients: list[AveragingClient] = field(default_factory=list)

    @property
    def chain(self) -> TrustChain:
        return TrustChain(self.manifest.run_id(), RUN_KEY.public)

    def certificate(self, tls: ServerTls | None = None, expires_in_s: float = 3600) -> bytes:
        fingerprint = (tls or self.tls).fingerprint
        body = ServiceCertificate(SERVICE_KEY.public, fingerprint, int(time.time() + expires_in_s))
        return trust.seal_certificate(RUN_KEY, self.manifest.run_id(), body)

    def identity(self, *, tls: ServerTls | None = None) -> ServiceIdentity:
        sealed = trust.seal_manifest(RUN_KEY, self.manifest)
        return ServiceIdentity(self.chain, self.manifest, sealed, self.certificate(tls), SERVICE_KEY, tls or self.tls)

    def token(self, uses: int = 5, role: Role | None = None, key: Keypair = RUN_KEY, expires_in_s: float = 3600) -> bytes:
        return trust.seal_token(key, self.manifest.run_id(), Token.generate(uses, int(time.time() + expires_in_s), role))

    async def start(self, listen: str = "127.0.0.1:0", *, tls: ServerTls | None = None) -> None:
        identity = self.identity(tls=tls)
        self.server = AveragingServer(identity, self.door, Mailbox, self.events, rules=self.rules, keepalive_s=self.keepalive_s)
        self.address = f"127.0.0.1:{await self.server.start(listen)}"

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.close()
            self.server = None

    def client(self, key: Keypair | None = ALICE, *, token: bytes | None = None, address: str = "", **options: Any) -> AveragingClient:
        sealed = self.token() if token is None else token
        client = AveragingClient([address or self.address], self.chain, self.events, key=key, token=sealed, **options)
        self.clients.append(client)
        return client

    async def member(self, key: Keypair = ALICE, **options: Any) -> AveragingClient:
        """A client that has joined as a trainer."""
        client = self.client(key, **options)
        await client.join(Role.TRAINER, "n", "somebody")
        return client


def hello(key: Keypair = ALICE, **changes: Any) -> Hello:
    return Hello(**{"peer": key.peer_id, "role": Role.TRAINER, "name": "somebody", "nonce": "n", **changes})


def view(version: int = 1, **changes: Any) -> FragmentView:
    """With the word of the service of an invited run for its anchor."""
    usual = {"height": 0, "anchor": HASH, "round": 1, "phase": Phase.OPEN, "why": "waiting"}
    shown = FragmentView(FRAGMENT, version, **{**usual, **changes})
    told = Told(FRAGMENT, 1, shown.height, HASH, shown.height, shown.anchor)
    return replace(shown, told=sign_told(SERVICE_KEY, manifest_of("invited").run_id(), told))


def manifest_of(mode: str) -> Manifest:
    return Manifest(name="test", admission=AdmissionSpec(mode=mode))  # type: ignore[arg-type]


@asynccontextmanager
async def world(
    *, mode: str = "invited", rules: StreamRules | None = None, keepalive_s: float = 30.0, is_started: bool = True
) -> AsyncIterator[World]:
    one = World(manifest_of(mode), create_tls(), MemoryDoor(), Recorder(), rules or StreamRules(), keepalive_s)
    if is_started:
        await one.start()
    try:
        yield one
    finally:
        for client in one.clients:
            await client.close()
        await one.stop()
    assert not one.events.named("service-fault"), one.events.named("service-fault")[0]["story"]
