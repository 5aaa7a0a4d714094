"""The averaging service's gRPC server: checks who speaks and whether it is well-formed, then asks the ServiceDoor. It decides nothing."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Generic

import grpc
from google.protobuf.message import Message

from decentra.averaging import rpc
from decentra.averaging.door import OutboxT, ServiceDoor
from decentra.averaging.limiter import Limiter
from decentra.averaging.mapping import answering
from decentra.averaging.probe import Prober
from decentra.averaging.streams import FrameCache, Stream, StreamRules
from decentra.averaging.tls import ServerTls
from decentra.config import Manifest
from decentra.errors import ConfigError, Expired, ManifestMismatch, PortTaken, Refused, RejectedPayload, Unreachable, VersionMismatch
from decentra.identity import Keypair
from decentra.ids import RunId
from decentra.invite import split_address
from decentra.pb import averaging_pb2 as pb
from decentra.ports import Events
from decentra.protocol.messages import Role
from decentra.wire import limits, trust
from decentra.wire.convert import digest_bytes, dump, parse, role_from_wire, take_digest, take_fragment, take_text, to_wire
from decentra.wire.frames import service_frame
from decentra.wire.signed import Opened, open_sealed
from decentra.wire.trust import TrustChain

Metadata = dict[str, str | bytes]

ADMISSION_S = 90 * 86400.0  # and never longer than the service's certificate
LEDGER_PAGE = 256
MAX_COPY_WAIT_S = 10.0
MAX_COMMANDS_REMEMBERED = 10_000


@dataclass(frozen=True)
class ServiceIdentity:
    """Who a service is: the run it serves, the papers the run key gave it, and its own two keys."""

    chain: TrustChain
    manifest: Manifest
    sealed_manifest: bytes
    sealed_certificate: bytes
    service_key: Keypair
    tls: ServerTls

    @property
    def run(self) -> RunId:
        return self.chain.run_id

    def check(self, now_s: float) -> trust.ServiceCertificate:
        """The certificate's content. Raises ConfigError when the papers do not belong together or have expired."""
        try:
            certificate = self.chain.check_certificate(self.sealed_certificate, now_s)
        except Refused as error:
            raise ConfigError(f"{error}") from None
        if (certificate.service_public, certificate.tls_fingerprint) != (self.service_key.public, self.tls.fingerprint):
            raise ConfigError("the service certificate is for another service or TLS key; issue a new one with the run key")
        return certificate


class AveragingServer(Generic[OutboxT]):
    """Serves one run. ``make_mailbox`` makes the outbox of a new stream; ``wall`` is Unix time in seconds."""

    def __init__(
        self,
        identity: ServiceIdentity,
        door: ServiceDoor[OutboxT],
        make_mailbox: Callable[[], OutboxT],
        events: Events,
        *,
        wall: Callable[[], float] = time.time,
        rules: StreamRules | None = None,
        keepalive_s: float = rpc.KEEPALIVE_S,
    ) -> None:
        self.identity, self.door, self._make_mailbox, self._events, self._wall = identity, door, make_mailbox, events, wall
        self._rules = rules or StreamRules()
        max_members = identity.manifest.admission.max_members
        self._limiter = Limiter(self._rules.messages_per_s, self._rules.burst_messages, 2 * max_members)
        self._frames = FrameCache()
        self._prober = Prober()
        self._options = rpc.server_options(keepalive_s)
        self._max_calls = 64 + 2 * max_members
        self._certificate_expiry_s = 0
        self._server: Any = None
        self._commands: dict[bytes, int] = {}  # sealed command -> expiry, so that each counts once

    async def start(self, listen: str) -> int:
        """Listen on ``host:port`` (port 0: any) and return the port. Raises PortTaken and ConfigError."""
        self._certificate_expiry_s = self.identity.check(self._wall()).not_after_s
        split_address(listen)
        tls = self.identity.tls
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._max_calls)
        server.add_generic_rpc_handlers((rpc.generic_handler(self._handlers()),))
        try:
            port = server.add_secure_port(listen, grpc.ssl_server_credentials([(tls.key_pem, tls.certificate_pem)]))
        except RuntimeError:
            port = 0
        if port == 0:
            raise PortTaken(
                f"cannot listen on {listen}: the port is in use or the address is not this machine's; choose another (--service-port of host)"
            )
        await server.start()
        self._server = server
        self._events.emit("service-listening", address=listen, port=port, run=self.identity.run)
        return int(port)

    async def close(self, grace_s: float = 0.2) -> None:
        """Stop listening and end every stream; members see Unreachable and come back when a service listens again."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace_s)

    # ---------------------------------------------------------------- calls

    async def _describe(self, _data: bytes, metadata: Metadata) -> Message:
        run = self.identity
        reply = pb.DescribeReply(
            protocol_version=limits.PROTOCOL_VERSION,
            run=digest_bytes(run.run),
            certificate=run.sealed_certificate,
            server_time_s=self._wall(),
        )
        if self._is_open or rpc.CREDENTIALS_KEY in metadata or rpc.TOKEN_KEY in metadata:
            self._check_reader(metadata)
            reply.manifest = run.sealed_manifest
        return reply

    async def _join(self, data: bytes, _metadata: Metadata) -> Message:
        now_s = self._wall()
        opened = self._open_fresh(data, trust.JOIN, now_s)
        request = parse(pb.JoinRequest, opened.body)
        self._check_contract(request)
        role = role_from_wire(request.role, "JoinRequest.role")
        nonce, name = (take_text(text, limits.MAX_NAME_CHARS, "JoinRequest") for text in (request.nonce, request.name))
        token = self._check_token(request.token, role, now_s)
        await self.door.join(opened.peer, role, nonce, token.id if token else None, token.uses if token else 0)
        expiry_s = min(int(now_s + ADMISSION_S), self._certificate_expiry_s)  # nobody can check it once the certificate has expired
        admission = trust.Admission(self.identity.run, opened.peer, role, expiry_s)
        self._events.emit("joined", peer=opened.peer, name=name, role=str(role), run=self.identity.run)
        return pb.JoinReply(admission=trust.seal_admission(self.identity.service_key, admission))

    async def _find_outcome(self, data: bytes, metadata: Metadata) -> Message:
        self._check_reader(metadata)
        request = parse(pb.OutcomeRequest, data)
        outcome = await self.door.outcome(take_fragment(request.fragment, "OutcomeRequest.fragment"), request.round)
        reply = pb.OutcomeReply()
        if outcome is not None:
            found: Any = to_wire(outcome)
            reply.outcome.CopyFrom(found)
        return reply

    async def _command(self, data: bytes, _metadata: Metadata) -> Message:
        now_s = self._wall()
        command = self.identity.chain.check_command(data, now_s)
        self._remember(data, command.expires_at_s, now_s)
        if command.kind == "copy":
            raise Refused("an order to copy belongs to a reading of the ledger")
        if command.kind == "succeed":
            answer = await self.door.succeed(self.identity.chain.check_successor(command.argument).run_id, command.argument)
            self._events.emit("command", kind=command.kind, answer=answer, run=self.identity.run)  # its argument lets in who reads it
            return pb.CommandReply(answer=answer)
        if command.kind == "revoke":
            self.identity.chain.revoke(subject := await self.door.revoke(command.argument))
            answer = f"revoked {subject}"
        else:
            answer = await self.door.command(command.kind, command.argument)
        self._events.emit("command", kind=command.kind, argument=command.argument, answer=answer, run=self.identity.run)
        return pb.CommandReply(answer=answer[: limits.MAX_WHY_CHARS])

    async def _probe(self, data: bytes, metadata: Metadata, context: Any) -> Message:
        self._check_reader(metadata)
        return await self._prober.answer(parse(pb.ProbeRequest, data), str(context.peer()))

    async def _read_ledger(self, data: bytes, metadata: Metadata, context: Any) -> None:
        request, most = parse(pb.LedgerRequest, data), limits.MAX_LEDGER_RECORDS
        if not request.copy:
            self._check_reader(metadata)
        if request.after_seq < 0 or not 0 < request.limit <= most:
            raise RejectedPayload(
                "malformed", f"expected after_seq >= 0 and a limit in 1..{most}, got {request.after_seq}, {request.limit}"
            )
        if request.copy:
            command = self.identity.chain.check_command(request.copy, self._wall())  # not remembered: said again it changes nothing
            if command.kind != "copy":
                raise Refused(f"this reader shows an order to {command.kind!r}, expected one to copy")
            name, _, said = command.argument.partition(" ")
            if said != str(request.after_seq):
                raise Refused(f"this order to copy is of somebody with {said[:20]} records, not of one with {request.after_seq}")
            await self.door.copied(name, request.after_seq, min(max(request.wait_s, 0.0), MAX_COPY_WAIT_S))
        seq, end = request.after_seq, request.after_seq + request.limit
        while seq < end and (page := await self.door.ledger(seq, min(LEDGER_PAGE, end - seq))):
            for record in page:
                await context.write(dump(pb.LedgerRecord(record=record)))
            seq += len(page)

    async def _read_status(self, _data: bytes, metadata: Metadata, context: Any) -> None:
        is_member = self._check_reader(metadata)
        swarm, fragments = await self.door.status()
        await context.write(
            service_frame(swarm if is_member else replace(swarm, successor=""))
        )  # the way to the next run lets its bearer in
        for view in fragments:
            await context.write(service_frame(view))

    async def _attend(self, metadata: Metadata, context: Any) -> None:
        papers = rpc.papers_of(metadata, rpc.CREDENTIALS_KEY)
        admission = self.identity.chain.check_bearer(papers, self._wall())  # the hello then has to be signed by this peer
        mailbox = self._make_mailbox()
        stream = Stream(self.identity.run, admission, self.door, mailbox, self._events, self._limiter, self._frames, self._rules)
        await stream.serve(context, self._wall)

    # ---------------------------------------------------------------- from gRPC to the methods above

    def _handlers(self) -> dict[str, Any]:
        return {
            "Describe": self._unary(self._describe, is_version_checked=False),  # its answer tells our version
            "Join": self._unary(self._join),
            "Attend": self._stream(lambda _requests, metadata, context: self._attend(metadata, context)),
            "FindOutcome": self._unary(self._find_outcome),
            "Probe": self._unary(self._probe, with_context=True),
            "ReadLedger": self._stream(self._read_ledger),
            "ReadStatus": self._stream(self._read_status),
            "Command": self._unary(self._command),
        }

    def _unary(self, method: Callable[..., Awaitable[Message]], *, is_version_checked: bool = True, with_context: bool = False) -> Any:
        async def serve(data: bytes, context: Any) -> bytes:
            reply = b""
            async with answering(context, self._on_bug):
                try:
                    async with asyncio.timeout(rpc.CALL_S):
                        more = (context,) if with_context else ()
                        reply = dump(await method(data, self._metadata(context, is_version_checked), *more))
                except TimeoutError:
                    raise Unreachable(f"the averaging service took more than {rpc.CALL_S:.0f} s for this call; try again") from None
            return reply

        return serve

    def _stream(self, method: Callable[[Any, Metadata, Any], Awaitable[None]]) -> Any:
        async def serve(request: Any, context: Any) -> None:
            async with answering(context, self._on_bug):
                await method(request, self._metadata(context, True), context)

        return serve

    def _metadata(self, context: Any, is_version_checked: bool) -> Metadata:
        metadata = rpc.read_metadata(context.invocation_metadata())
        theirs = metadata.get(rpc.PROTOCOL_KEY)
        if is_version_checked and theirs != str(limits.PROTOCOL_VERSION):
            raise VersionMismatch(f"the service speaks protocol {limits.PROTOCOL_VERSION}, the caller {str(theirs)[:20]}")
        return metadata

    def _on_bug(self, error: Exception) -> None:
        story = "".join(traceback.format_exception(error))[-4000:]
        self._events.emit("service-fault", error=repr(error)[:500], story=story, run=self.identity.run)

    # ---------------------------------------------------------------- checks

    @property
    def _is_open(self) -> bool:
        return self.identity.manifest.admission.mode == "open"

    def _check_reader(self, metadata: Metadata) -> bool:
        """A member's credentials or an invite's token open the reading doors; a run with open admission has none. True for a trainer's or keeper's."""
        credentials = rpc.papers_of(metadata, rpc.CREDENTIALS_KEY)
        try:
            if credentials:
                return self.identity.chain.check_bearer(credentials, self._wall()).role is not Role.WATCHER
        except Refused:
            if not self._is_open:
                raise
        if self._is_open:
            return False
        if token := rpc.papers_of(metadata, rpc.TOKEN_KEY):
            self.identity.chain.check_token(token, self._wall())
            return False
        raise Refused("this run is by invitation: show an admission or an invite's token")

    def _open_fresh(self, data: bytes, kind: str, now_s: float) -> Opened:
        try:
            opened = open_sealed(data, kind, self.identity.run, signer=None, now_s=now_s)
        except RejectedPayload as error:
            if error.reason in ("malformed", "size"):
                raise
            refusal = Expired if error.reason == "expired" else Refused
            raise refusal(f"{kind} ({error.reason}): {error.detail}") from None
        if not now_s <= opened.not_after_s <= now_s + limits.MAX_FRESH_S:
            raise Expired(f"a {kind} has to expire within {limits.MAX_FRESH_S:.0f} s; check the clocks of both machines")
        return opened

    def _check_contract(self, request: pb.JoinRequest) -> None:
        if request.protocol_version != limits.PROTOCOL_VERSION:
            raise VersionMismatch(f"the service speaks protocol {limits.PROTOCOL_VERSION}, the caller {request.protocol_version}")
        theirs = take_digest(request.manifest, "JoinRequest.manifest")
        if RunId(theirs) != self.identity.run:
            raise ManifestMismatch(self.identity.run, theirs)

    def _check_token(self, sealed: bytes, role: Role, now_s: float) -> trust.Token | None:
        if not sealed and self._is_open:
            return None
        if not sealed:
            raise Refused("this run is by invitation: join with an invite that holds a token")
        token = self.identity.chain.check_token(sealed, now_s)
        if token.role is not None and token.role != role:
            raise Refused(f"this invite is for a {token.role}, not for a {role}; join as a {token.role} or ask for another invite")
        return token

    def _remember(self, sealed: bytes, expires_at_s: int, now_s: float) -> None:
        self._commands = {known: expiry for known, expiry in self._commands.items() if expiry >= now_s}
        if sealed in self._commands:
            raise Refused("this command was carried out already; give the order again to repeat it")
        if len(self._commands) >= MAX_COMMANDS_REMEMBERED:
            raise Refused("too many commands in a short time; wait some minutes")
        self._commands[sealed] = expires_at_s
