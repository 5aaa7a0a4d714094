"""The member's side of the averaging service over gRPC. It checks who answers and who signed; it decides nothing about rounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc

from decentra.averaging import link as links
from decentra.averaging import rpc
from decentra.averaging.link import Link, LinkRules, RunDescription, describe_over, open_link
from decentra.averaging.mapping import calling, ending_of
from decentra.errors import DecentraError, IntegrityError, NotAMember, Refused, RejectedPayload, Unreachable
from decentra.identity import Keypair
from decentra.ids import FragmentId
from decentra.pb import averaging_pb2 as pb
from decentra.ports import Events
from decentra.protocol.messages import FragmentView, Hello, MemberMessage, Outcome, Role, ServiceMessage, SwarmView
from decentra.wire import limits, trust
from decentra.wire.convert import digest_bytes, dump, from_wire, parse, role_to_wire
from decentra.wire.frames import ProofChecker, check_told, is_welcome, member_frame, parse_service_frame
from decentra.wire.signed import seal
from decentra.wire.trust import Admission, TrustChain

CLOSE_S = 1.0


async def describe(addresses: Sequence[str], trust: TrustChain, token: bytes | None = None) -> RunDescription:
    """The manifest and certificate of the run at the first address that answers, both checked against the run key.

    Raises Unreachable, Refused, IntegrityError, VersionMismatch, ManifestMismatch.
    """
    return await links.describe(addresses, trust, token, rules=LinkRules(time.time))


async def meet(addresses: Sequence[str], trust: TrustChain) -> None:
    """Let ``trust`` know of the term that the first service to answer is of. Raises what ``open_link`` raises."""
    await (await open_link(addresses, trust, LinkRules(time.time))).close()


class GrpcSession:
    """One open stream; implements ports.Session. What the service says others offered, and they did not sign, is left out and reported."""

    def __init__(self, link: Link, call: Any, key: Keypair, trust: TrustChain, events: Events) -> None:
        self._link, self._call, self._key, self._trust, self._events = link, call, key, trust, events
        self._run = trust.run_id
        self._proofs = ProofChecker(self._run)
        self._reading: asyncio.Task[Any] | None = None

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def certificate(self) -> bytes:
        return self._link.sealed_certificate

    @property
    def is_over(self) -> bool:
        return bool(self._call.done())

    async def send(self, message: MemberMessage) -> None:
        """Raises Unreachable when the stream broke or is stuck, Refused when the service ended it on purpose."""
        await self._write(member_frame(self._key, self._run, message))

    async def messages(self) -> AsyncIterator[ServiceMessage]:
        """Views and refusals, for one reader; ends when the service closes in peace. Raises Unreachable, Refused and IntegrityError."""
        while (data := await self._read()) is not None:
            self._check_term()
            try:
                message = parse_service_frame(data)
            except RejectedPayload as error:
                self._events.emit("view-unreadable", address=self.address, why=error.detail, run=self._run)
                continue
            if isinstance(message, FragmentView):
                check_told(message, self._run, self._link.certificate.term, self._link.certificate.service_public)
                message, errors = self._proofs.check(message)
                for bad in errors:
                    self._events.emit("offer-forged", address=self.address, fragment=message.fragment, why=str(bad), run=self._run)
            yield message

    async def close(self) -> None:
        """End the stream; what was sent before is given a moment to arrive."""
        with suppress(DecentraError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                with calling(self.address, self._call):
                    await self._call.done_writing()
                while await self._read() is not None:
                    pass
        self._call.cancel()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._link.close()

    async def _greet(self, hello: Hello) -> None:
        expiry_s = self._link.service_time_s + limits.FRESH_S
        await self._write(member_frame(self._key, self._run, hello, not_after_s=expiry_s))
        try:
            async with asyncio.timeout(self._link.rules.call_s):
                data = await self._read()
        except TimeoutError:
            raise Unreachable(f"the averaging service at {self.address} did not answer the hello in time") from None
        if data is None or not is_welcome(data):
            raise Unreachable(f"the averaging service at {self.address} ended the stream before its welcome; attend again")

    def _check_term(self) -> None:
        """Another service may have been met meanwhile."""
        if (replaced := self._trust.why_replaced(self._link.certificate)) is not None:
            self._call.cancel()
            raise Unreachable(f"the averaging service at {self.address} was replaced: {replaced}")

    async def _write(self, frame: bytes) -> None:
        self._check_term()
        if self._call.done():
            raise await ending_of(self._call, self.address)
        try:
            async with asyncio.timeout(self._link.rules.call_s):
                with calling(self.address, self._call):
                    await self._call.write(frame)
        except Unreachable as error:  # gRPC may know no more here than that it could not write; the call's own status says why
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    raise await ending_of(self._call, self.address) from None
            raise error from None
        except TimeoutError:
            self._call.cancel()
            raise Unreachable(f"the averaging service at {self.address} took no message for {self._link.rules.call_s:.0f} s") from None

    async def _read(self) -> bytes | None:
        """The next frame, None at the end. Whoever waits here may be cancelled: gRPC would end the stream with it, so a task reads."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_one())
        reading = self._reading
        await asyncio.wait([reading])
        if self._reading is reading:
            self._reading = None
        data: bytes | None = reading.result()
        return data

    async def _read_one(self) -> bytes | None:
        with calling(self.address, self._call):
            data = await self._call.read()
            return None if data is grpc.aio.EOF else bytes(data)


class AveragingClient:
    """Implements ports.AveragingService. Without ``key`` it can only read. ``credentials`` of an earlier join may be handed in."""

    def __init__(
        self,
        addresses: Sequence[str],
        trust: TrustChain,
        events: Events,
        *,
        key: Keypair | None = None,
        token: bytes = b"",
        credentials: bytes = b"",
        wall: Callable[[], float] = time.time,
        call_s: float = rpc.CALL_S,
        keepalive_s: float = rpc.KEEPALIVE_S,
    ) -> None:
        self._addresses, self._trust, self._events, self._key, self._token = tuple(addresses), trust, events, key, token
        self._rules = LinkRules(wall, call_s, keepalive_s)
        self._credentials = credentials
        self._link: Link | None = None
        self._session: GrpcSession | None = None
        self._lock = asyncio.Lock()

    @property
    def credentials(self) -> bytes:
        """What this member shows at every door; empty before ``join``."""
        return self._credentials

    @property
    def certificate(self) -> bytes:
        """Of the service of the last stream, sealed by the run key; empty before the first one."""
        return b"" if self._session is None else self._session.certificate

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def is_attached(self) -> bool:
        """Whether the last stream that was opened is still open."""
        return self._session is not None and not self._session.is_over

    def use_addresses(self, addresses: Sequence[str]) -> None:
        """Where to look from the next connection on; whoever answers there still has to show the run's certificate."""
        self._addresses = tuple(addresses)

    async def describe(self) -> RunDescription:
        async with _Using(self) as link:
            return await describe_over(link, self._trust, credentials=self._credentials, token=self._token)

    async def join(self, role: Role, nonce: str, name: str) -> Admission:
        """Ask to be admitted; keeps the credentials. ``nonce`` differs per process. Raises Refused, Unreachable, ManifestMismatch."""
        key, run = self._own_key(), self._trust.run_id
        request = pb.JoinRequest(
            protocol_version=limits.PROTOCOL_VERSION,
            manifest=digest_bytes(run),
            role=role_to_wire(role),
            nonce=nonce,
            name=name,
            token=self._token,
        )
        async with _Using(self) as link:
            sealed = seal(key, trust.JOIN, run, request, not_after_s=link.service_time_s + limits.FRESH_S)
            reply = parse(pb.JoinReply, await link.call("Join", sealed))
            credentials = trust.pack_credentials(link.sealed_certificate, reply.admission)
            try:
                admission = self._trust.check_credentials(credentials, key.peer_id, link.service_time_s)
            except Refused as error:
                raise IntegrityError(f"the averaging service at {link.address} gave an admission that does not hold: {error}") from None
        self._credentials = credentials
        return admission

    async def attend(self, hello: Hello) -> GrpcSession:
        """Open the stream; on return the service has taken the hello. Raises Refused, Unreachable, IntegrityError.

        A service that took over from a copy may not know of us: then the invite's token is shown once more.
        """
        try:
            return await self._attend(hello)
        except NotAMember:
            if not self._token:
                raise
        await self.join(hello.role, hello.nonce, hello.name)
        return await self._attend(hello)

    async def _attend(self, hello: Hello) -> GrpcSession:
        key = self._own_key()
        if not self._credentials:
            raise Refused("this peer has no credentials yet; join the run first")
        # A link of its own: a stream must not die because some other call found the service slow.
        link = await self._open()
        call = rpc.multicallable(link.channel, "Attend")(metadata=rpc.metadata_of(self._credentials))
        session = GrpcSession(link, call, key, self._trust, self._events)
        try:
            await session._greet(hello)
        except BaseException:
            call.cancel()
            await asyncio.shield(link.close())
            raise
        self._session = session
        return session

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None:
        """How a round ended, or None when the ledger does not know it. Raises Refused, Unreachable."""
        async with _Using(self) as link:
            request = dump(pb.OutcomeRequest(fragment=fragment, round=round))
            reply = parse(pb.OutcomeReply, await link.call("FindOutcome", request, **self._papers()))
        outcome: Outcome | None = from_wire(reply.outcome) if reply.HasField("outcome") else None
        return outcome

    async def status(self) -> tuple[SwarmView, tuple[FragmentView, ...]]:
        """The swarm and every fragment as the service sees them. Raises Refused, Unreachable, IntegrityError."""
        async with _Using(self) as link:
            frames = await link.read_all("ReadStatus", dump(pb.StatusRequest()), limits.MAX_LIST_ITEMS, **self._papers())
        views = [parse_service_frame(frame) for frame in frames]
        for view in views:
            if isinstance(view, FragmentView):
                check_told(view, self._trust.run_id, link.certificate.term, link.certificate.service_public)
        swarm = next((view for view in views if isinstance(view, SwarmView)), None)
        if swarm is None:
            raise RejectedPayload("malformed", "the averaging service sent a status without the swarm", peer="the averaging service")
        return swarm, tuple(view for view in views if isinstance(view, FragmentView))

    async def probe(self, port: int = 0, nonce: bytes = b"", num_filler_bytes: int = 0) -> pb.ProbeReply:
        """This machine's address as the service sees it and, with a port, whether it can connect there. Raises Refused, Unreachable."""
        async with _Using(self) as link:
            request = dump(pb.ProbeRequest(port=port, nonce=nonce, filler=bytes(num_filler_bytes)))
            return parse(pb.ProbeReply, await link.call("Probe", request, **self._papers()))

    async def ledger(self, after_seq: int = 0, limit: int = 1000) -> list[bytes]:
        """At most ``limit`` sealed ledger records after position ``after_seq`` (0: from the first). Raises Refused, Unreachable."""
        limit = min(limit, limits.MAX_LEDGER_RECORDS)
        async with _Using(self) as link:
            request = dump(pb.LedgerRequest(after_seq=after_seq, limit=limit))
            frames = await link.read_all("ReadLedger", request, limit, **self._papers())
        return [parse(pb.LedgerRecord, frame).record for frame in frames]

    async def copy(self, run_key: Keypair, name: str, num_records: int, wait_s: float) -> list[bytes]:
        """What follows the ``num_records`` that this machine has on its disk, after at most ``wait_s`` s without news. Raises Refused, Unreachable."""
        async with _Using(self) as link:
            said = f"{name} {num_records}"
            sealed = trust.seal_command(run_key, self._trust.run_id, "copy", said, expires_at_s=link.service_time_s + limits.FRESH_S)
            most = limits.MAX_LEDGER_RECORDS
            request = dump(pb.LedgerRequest(after_seq=num_records, limit=most, copy=sealed, wait_s=wait_s))
            frames = await link.read_all("ReadLedger", request, most)
        return [parse(pb.LedgerRecord, frame).record for frame in frames]

    async def command(self, run_key: Keypair, kind: str, argument: str = "") -> str:
        """Give an order of the organiser (``stop`` why, ``revoke`` a token id or peer) and return what was done. Raises Refused."""
        async with _Using(self) as link:
            expiry_s = link.service_time_s + limits.FRESH_S
            sealed = trust.seal_command(run_key, self._trust.run_id, kind, argument, expires_at_s=expiry_s)
            return parse(pb.CommandReply, await link.call("Command", sealed)).answer

    async def close(self) -> None:
        """Close the connection used for single calls; sessions are closed by their owners."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _open(self) -> Link:
        """A new link. Whoever answered last is asked first from then on: a machine that is gone costs its whole deadline."""
        link = await open_link(self._addresses, self._trust, self._rules)
        self._addresses = (link.address, *(one for one in self._addresses if one != link.address))
        return link

    def _papers(self) -> dict[str, bytes]:
        return {"credentials": self._credentials} if self._credentials else {"token": self._token}

    def _own_key(self) -> Keypair:
        assert self._key is not None, "a client without a key can only read"
        return self._key


class _Using:
    """The client's link for single calls, opened when needed and dropped once it turned out dead."""

    def __init__(self, client: AveragingClient) -> None:
        self._client = client

    async def __aenter__(self) -> Link:
        client = self._client
        async with client._lock:
            if client._link is not None and client._trust.why_replaced(client._link.certificate) is not None:
                await client.close()
            if client._link is None:
                client._link = await client._open()
            return client._link

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # A restarted service may have another certificate: only a new link finds out.
        if isinstance(error, Unreachable):
            await self._client.close()
