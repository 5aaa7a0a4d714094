"""One member's stream on the server: hello, then facts in and views out, each bounded. It decides nothing about rounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import grpc

from decentra.averaging import rpc
from decentra.averaging.door import OutboxT, ServiceDoor
from decentra.averaging.limiter import Limiter
from decentra.errors import Expired, Refused, RejectedPayload
from decentra.ids import PeerId, RunId
from decentra.ports import Events
from decentra.protocol.messages import FragmentView, Goodbye, Hello, Rejected, ServiceMessage
from decentra.wire import limits
from decentra.wire.frames import open_hello, parse_member_frame, service_frame, welcome_frame
from decentra.wire.trust import Admission


@dataclass(frozen=True)
class StreamRules:
    """How much one member may ask of the service."""

    messages_per_s: float = 200.0
    burst_messages: float = 1000.0
    max_malformed: int = 20  # in one stream, before it is ended
    first_frame_s: float = rpc.FIRST_FRAME_S


class FrameCache:
    """Encodes a view once for all members: the service puts the same value into every mailbox. One entry per fragment and swarm."""

    def __init__(self) -> None:
        self._frames: dict[str, tuple[ServiceMessage, bytes]] = {}

    def frame(self, message: ServiceMessage) -> bytes:
        if isinstance(message, Rejected):
            return service_frame(message)
        key = message.fragment if isinstance(message, FragmentView) else "swarm"
        known = self._frames.get(key)
        if known is None or known[0] is not message:
            known = self._frames[key] = (message, service_frame(message))
        return known[1]


class Stream(Generic[OutboxT]):
    """Serves one Attend call. Every message of the member is checked against the stream's own peer."""

    def __init__(
        self,
        run: RunId,
        admission: Admission,
        door: ServiceDoor[OutboxT],
        mailbox: OutboxT,
        events: Events,
        limiter: Limiter,
        frames: FrameCache,
        rules: StreamRules,
    ) -> None:
        self._run, self._admission, self._peer = run, admission, admission.peer
        self._door, self._mailbox, self._events = door, mailbox, events
        self._limiter, self._frames, self._rules = limiter, frames, rules
        self._goodbye = ""

    async def serve(self, context: Any, wall: Callable[[], float]) -> None:
        """Until one side ends it. Raises Refused when the service ends it on purpose."""
        hello = await self._greet(context, wall)
        why = ""
        try:
            await self._door.attend(hello, self._mailbox)
            await context.write(welcome_frame(wall()))
            await self._converse(context)
        except Refused as error:
            why = str(error)
            raise
        finally:
            # gRPC reports a cut connection as a cancelled call or as the end of the stream, whichever it sees first.
            why = why or self._mailbox.reason or self._goodbye or "the stream ended without a goodbye"
            await self._door.leave(self._peer, self._mailbox, why)
        if self._mailbox.reason is not None:
            raise Refused(self._mailbox.reason)

    async def _greet(self, context: Any, wall: Callable[[], float]) -> Hello:
        try:
            async with asyncio.timeout(self._rules.first_frame_s):
                data = await context.read()
        except TimeoutError:
            raise Refused(f"expected a hello within {self._rules.first_frame_s:.0f} s of opening the stream, none came") from None
        if data is grpc.aio.EOF:
            raise RejectedPayload("malformed", "expected a hello, the stream ended before it", peer=self._peer)
        try:
            hello = open_hello(data, self._run, self._peer, wall())
        except RejectedPayload as error:
            if error.reason in ("malformed", "size"):
                raise
            refusal = Expired if error.reason == "expired" else Refused
            raise refusal(f"hello ({error.reason}): {error.detail}") from None
        if hello.role != self._admission.role:
            raise Refused(f"this peer was admitted as a {self._admission.role} and says hello as a {hello.role}; join again")
        return hello

    async def _converse(self, context: Any) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._listen(context))
                group.create_task(self._speak(context, reader))
        except BaseExceptionGroup as errors:
            # One of the two tasks failed and the group cancelled the other: there is exactly one story to tell.
            raise errors.exceptions[0] from None

    async def _speak(self, context: Any, reader: asyncio.Task[None]) -> None:
        while messages := await self._mailbox.get():
            for message in messages:
                frame = self._frames.frame(message)
                if len(frame) > limits.MAX_MESSAGE_BYTES:
                    self._events.emit("view-too-large", peer=self._peer, kind=type(message).__name__, num_bytes=len(frame), run=self._run)
                else:
                    await context.write(frame)
        reader.cancel()

    async def _listen(self, context: Any) -> None:
        num_malformed = 0
        while (data := await context.read()) is not grpc.aio.EOF:
            await self._pace()
            try:
                message = parse_member_frame(data, self._run, self._peer)
                if isinstance(message, Goodbye):
                    self._goodbye = f"goodbye: {message.why}"
                await self._door.deliver(message)
            except RejectedPayload as error:
                num_malformed += 1
                self._reject(error.reason, error.detail)
                if num_malformed >= self._rules.max_malformed:
                    raise Refused(f"{num_malformed} messages of this stream were refused, the last one: {error}") from None
        self._mailbox.close(None)

    async def _pace(self) -> None:
        """Wait while the member is over its rate: gRPC's flow control then slows the sender down."""
        now_s = time.monotonic()
        wait_s = self._limiter.of(self._peer, now_s).take(now_s)
        if wait_s > 0:
            per_s = self._rules.messages_per_s
            self._reject("rate", f"more than {per_s:.0f} messages a second; the service reads this stream more slowly now")
            await asyncio.sleep(wait_s)

    def _reject(self, reason: str, detail: str) -> None:
        message: ServiceMessage = Rejected(PeerId(self._peer), reason, detail)
        self._mailbox.put(message)
        self._events.emit("rejected", peer=self._peer, reason=reason, detail=detail, run=self._run)
