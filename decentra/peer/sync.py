"""The only loop of a peer: pumps the member machine, turns its effects into work, and hands each result back as an event. Decides nothing.

The way of one delta: trainer -> snapshot -> encode -> offer -> (service settles) -> fetch and screen -> aggregate -> attest -> commit. Everything that
waits runs in its own task and ends as an event in the one inbox; the machine sees one event at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from decentra.delta.anchor import max_anchor_bytes
from decentra.delta.decoded import Decoded
from decentra.delta.reduce import max_residual_bytes
from decentra.errors import DecentraError, IntegrityError, Refused, RejectedPayload, TrainingError, Unreachable, VersionMismatch
from decentra.ids import TRUNK, FragmentId, PeerId, module_of_fragment, short
from decentra.peer.fetch import Fetcher
from decentra.peer.judge import Judge, Packet
from decentra.peer.link import RateControl
from decentra.peer.replica import Replica
from decentra.peer.stories import Stories
from decentra.ports import AveragingService, Clock, Events, Exchange, Session
from decentra.protocol import duties as do
from decentra.protocol import member as m
from decentra.protocol.messages import (
    DRAINED,
    Counters,
    FragmentView,
    Goodbye,
    Heartbeat,
    Hello,
    Holding,
    MemberMessage,
    MemberView,
    Phase,
    Rejected,
    SwarmView,
)
from decentra.protocol.settling import what_is_wrong

TICK_S = 0.5
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 5.0  # well inside a lease: whoever only waits to come back is not suspected
GOODBYE_S = 2.0


@dataclass
class PeerLoop:
    """One peer at work. ``run`` returns why it ended; cancel it to stop at once."""

    me: do.Self
    hello: Callable[[], Hello]  # without holdings; they are added here
    heartbeat_s: float
    service: AveragingService
    exchange: Exchange
    replicas: Mapping[FragmentId, Replica]  # ``on_trained`` may add some
    clock: Clock
    events: Events
    counters: Callable[[], Counters] = Counters
    on_trained: Callable[[frozenset[FragmentId]], Coroutine[Any, Any, None]] | None = None
    on_recovered: Callable[[], None] = lambda: None
    on_revoked: Callable[[PeerId], None] = lambda _: None
    rate: RateControl | None = None
    on_limit: Callable[[int | None], None] | None = None  # told how far training may go, where it waits for rounds
    on_run_tokens: Callable[[int], None] | None = None  # told how many tokens the run has confirmed, where training follows it
    judge: Judge | None = None  # where the run's holders judge each other's packets
    stories: Stories | None = None  # whether the service tells everybody the same
    num_steps: int = 0
    head_start: int = 0  # inner steps over which the fragments' first rounds are spread
    fragments: tuple[FragmentId, ...] = ()  # all of the run, where this peer does not hold all of them
    machine: m.MemberMachine = field(init=False)
    members: dict[PeerId, MemberView] = field(init=False, default_factory=dict)
    fetcher: Fetcher = field(init=False)
    _inbox: asyncio.Queue[m.Event] = field(init=False, default_factory=asyncio.Queue)
    _outbox: asyncio.Queue[MemberMessage] | None = field(init=False, default=None)
    _group: asyncio.TaskGroup = field(init=False)
    _finished: asyncio.Future[str] | None = field(init=False, default=None)
    _why_left: str | None = field(init=False, default=None)
    _has_believed: bool = field(init=False, default=False)  # a view of this stream
    _has_said_goodbye: bool = field(init=False, default=False)  # a word after it would bring this member back
    _jobs: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _seq: int = field(init=False, default=0)
    _training: frozenset[FragmentId] = field(init=False, default=frozenset())
    _placing: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        # a fragment that starts with steps to its account is due earlier, and from then on always
        everywhere = sorted(self.fragments or self.replicas)
        ahead = {f: self.head_start * i // len(everywhere) for i, f in enumerate(everywhere)}
        lives = {f: _life(f, r, self.num_steps - ahead[f]) for f, r in self.replicas.items()}
        self.machine = m.MemberMachine(self.me, lives, num_steps=self.num_steps, fragments=self.fragments)
        self.fetcher = Fetcher(self.exchange, self._addresses, self.events)

    # ------------------------------------------------------------ from outside

    def stepped(self, num_steps: int) -> None:
        """The trainer finished an inner step."""
        self._inbox.put_nowait(m.Stepped(num_steps))

    def leave(self, why: str, *, comes_back: bool = False) -> None:
        """Say goodbye and end."""
        self._say(Goodbye(self.me.peer, why, comes_back))
        self._finish(why)

    async def run(self) -> str:
        """Take part until the run is over or ``leave``. Raises Refused when the service turns this peer away for good."""
        finished: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._finished = finished
        if self._why_left is not None:
            return self._why_left
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                tasks = [group.create_task(c) for c in (self._pump(), self._attend_forever(), self._beat(), self._ticks())]
                why = await finished
                await self._say_last(why)
                for task in tasks:
                    task.cancel()
                self._cancel_work()
        except* DecentraError as failures:
            raise failures.exceptions[0] from None
        return why

    def _finish(self, why: str) -> None:
        self._why_left = self._why_left or why
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(why)

    # ------------------------------------------------------------ loops

    async def _pump(self) -> None:
        while True:
            event = await self._inbox.get()
            for effect in self.machine.handle(event, self.clock.now()):
                self._start(effect)
            if self.on_limit is not None:
                self.on_limit(self.machine.step_limit)
            if self.on_run_tokens is not None and isinstance(event, m.Viewed) and (run_tokens := self.machine.run_tokens) is not None:
                self.on_run_tokens(run_tokens)

    async def _ticks(self) -> None:
        while True:
            await self.clock.sleep(TICK_S)
            self._inbox.put_nowait(m.Tick())

    async def _beat(self) -> None:
        while True:
            await self.clock.sleep(self.heartbeat_s)
            self._seq += 1
            self._say(Heartbeat(self.me.peer, self._seq, self.counters()))

    async def _attend_forever(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                session = await self.service.attend(self._full_hello())
                self.events.emit("service-connected")
                self._has_believed = False
                await self._attend(session)
                why = "the service closed the stream"
            except (Refused, VersionMismatch):
                raise
            except (Unreachable, DecentraError) as error:
                why = str(error)
            self._outbox = None
            if self._has_believed:  # who tells what nobody can believe is asked less and less often
                backoff_s = FIRST_BACKOFF_S
            if self.rate is not None:
                self.rate.disconnected()
            self._inbox.put_nowait(m.Disconnected(why))
            self.events.emit("service-away", why=why, retry_s=backoff_s)
            await self.clock.sleep(backoff_s)
            backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)

    async def _attend(self, session: Session) -> None:
        self._outbox = asyncio.Queue()
        self._inbox.put_nowait(m.Connected())
        sender = asyncio.create_task(self._send_all(session, self._outbox))
        try:
            async for message in session.messages():
                match message:
                    case FragmentView():
                        if self.stories is not None:
                            self.stories.saw(message)
                        self._has_believed = True
                        if self.rate is not None:
                            self.rate.saw(message, self.clock.now())
                        self._inbox.put_nowait(m.Viewed(message))
                    case SwarmView():
                        self.members = {v.peer: v for v in message.members}
                        for peer in message.revoked:
                            self.on_revoked(peer)
                        self._inbox.put_nowait(m.SwarmViewed(message))
                    case Rejected(_, reason, detail):
                        self.events.emit("service-rejected", reason=reason, detail=detail)
                        if reason == DRAINED:
                            self.leave(detail)
        finally:
            sender.cancel()
            with suppress(asyncio.CancelledError, DecentraError):
                await sender
            await session.close()

    async def _send_all(self, session: Session, outbox: asyncio.Queue[MemberMessage]) -> None:
        while True:
            message = await outbox.get()
            await session.send(message)
            outbox.task_done()

    # ------------------------------------------------------------ effects

    def _start(self, effect: do.Effect) -> None:
        match effect:
            case do.Say(message):
                self._say(message)
            case do.Finish(why):
                self._finish(why)
            case do.SetTrained(fragments):
                self._work(self._set_trained(fragments))
            case do.Fetch():
                self._work(self._fetch(effect))
            case do.Encode(fragment):
                self._work(self._encode(effect))
            case do.Reduce(settlement):
                self._work(self._guard(settlement.fragment, self._reduce(effect)))
            case do.Apply(settlement):
                self._work(self._guard(settlement.fragment, self._apply(effect)))
            case do.Commit(fragment) | do.Cancel(fragment) | do.Recover(fragment):
                self._work(self._guard(fragment, self._close(effect)))

    def _work(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def _cancel_work(self) -> None:
        for task in list(self._jobs):
            task.cancel()

    async def _guard(self, fragment: FragmentId, job: Coroutine[Any, Any, None]) -> None:
        """Every failure of a local operation becomes an event with its story; only the pump touches the machine."""
        try:
            await job
        except (DecentraError, OSError) as error:
            self.events.emit("operation-failed", fragment=fragment, why=str(error))
            self._inbox.put_nowait(m.Failed(fragment, str(error)))

    async def _encode(self, effect: do.Encode) -> None:
        try:
            offer = await self.replicas[effect.fragment].encode(effect.round, effect.base)
        except TrainingError as error:
            self.events.emit("round-skipped", fragment=effect.fragment, round=effect.round, why=str(error))
            self._inbox.put_nowait(m.Skipped(effect.fragment, effect.round, str(error)))
        except (DecentraError, OSError) as error:
            self.events.emit("operation-failed", fragment=effect.fragment, why=str(error))
            self._inbox.put_nowait(m.Failed(effect.fragment, str(error)))
        else:
            self.events.emit("encoded", fragment=offer.fragment, round=offer.round, num_bytes=offer.num_bytes, num_tokens=offer.num_tokens)
            if self.rate is not None:
                self.rate.encoded(offer, self.clock.now())
            self._inbox.put_nowait(m.Encoded(offer))

    async def _fetch(self, effect: do.Fetch) -> None:
        if effect.is_residual:
            await self._fetch_residual(effect)
            return
        try:
            self.replicas[effect.fragment].check_size(effect.num_bytes, effect.sender, effect.round)
        except RejectedPayload as error:
            self._fetch_failed(effect, "packet-refused", error, is_bad=True)
            return
        try:
            data = await self.fetcher.fetch(effect.packet, effect.num_bytes, effect.sources)
        except (DecentraError, OSError) as error:  # wrong bytes are the fault of who sent them, not of the packet: it is asked for again
            self._fetch_failed(effect, "fetch-failed", error)
            return
        try:
            if len(data) != effect.num_bytes:
                raise RejectedPayload(
                    "size", f"{len(data)} bytes, the offer said {effect.num_bytes}", peer=effect.sender, round=effect.round
                )
            delta = await self.replicas[effect.fragment].check_packet(effect.packet, data, effect.sender, effect.round, effect.norm_bits)
            objects = await self._objects(effect, delta)
        except RejectedPayload as error:
            self._fetch_failed(effect, "packet-refused", error, is_bad=True)
        except (DecentraError, OSError) as error:
            self._fetch_failed(effect, "fetch-failed", error)
        else:
            self._inbox.put_nowait(m.Fetched(effect.fragment, effect.packet, objects))

    async def _objects(self, effect: do.Fetch, delta: Decoded) -> bool:
        """Judge a packet of the open round, where this peer is one of its holders and the run judges."""
        view, replica = self.machine.lives[effect.fragment].view, self.replicas[effect.fragment]
        if self.judge is None or module_of_fragment(effect.fragment) != TRUNK or view is None or replica.account is None:
            return False
        offer = next((o for o in view.offers if o.packet == effect.packet), None)
        is_open = view.phase is Phase.OPEN and view.round == effect.round and offer is not None and offer.base == replica.anchor
        if not is_open or offer is None or self.me.peer not in view.holders:
            return False
        packet = Packet(effect.sender, delta, offer.num_tokens)
        own = await replica.own_packet(effect.round)
        return await self.judge.objects(
            effect.fragment, effect.round, replica.account.anchor_state.anchor_N, packet, own, len(view.holders)
        )

    async def _fetch_residual(self, effect: do.Fetch) -> None:
        replica = self.replicas[effect.fragment]
        try:
            if not await self.exchange.has(effect.packet):
                blob = await self.fetcher.fetch(effect.packet, max_residual_bytes(replica.fragment), effect.sources)
                await replica.keep_residual(effect.packet, blob)
        except (DecentraError, OSError) as error:
            self._fetch_failed(effect, "fetch-failed", error)
        else:
            self._inbox.put_nowait(m.Fetched(effect.fragment, effect.packet))

    def _fetch_failed(self, effect: do.Fetch, event: str, error: Exception, *, is_bad: bool = False) -> None:
        self.events.emit(event, fragment=effect.fragment, round=effect.round, peer=short(effect.sender), why=str(error))
        self._inbox.put_nowait(m.FetchFailed(effect.fragment, effect.packet, is_bad))

    async def _reduce(self, effect: do.Reduce) -> None:
        settlement = effect.settlement
        merge = await self.replicas[settlement.fragment].reduce(settlement)
        self.events.emit(
            "merged", fragment=merge.fragment, round=merge.round, num_offers=len(settlement.entries), num_bytes=merge.num_bytes
        )
        self._inbox.put_nowait(m.Reduced(merge))

    async def _apply(self, effect: do.Apply) -> None:
        settlement = effect.settlement
        replica = self.replicas[settlement.fragment]
        if wrong := what_is_wrong(settlement, replica.manifest.outer_of(settlement.fragment)):
            raise IntegrityError(
                f"the averaging service settled round {settlement.round} of {settlement.fragment} otherwise than the manifest says: {wrong}; it is"
                " neither applied nor attested here, tell the organiser"
            )
        anchor = await replica.apply(settlement)
        self._inbox.put_nowait(m.Applied(settlement.fragment, settlement.round, anchor))

    async def _close(self, effect: do.Commit | do.Cancel | do.Recover) -> None:
        replica = self.replicas[effect.fragment]
        match effect:
            case do.Commit(fragment, number, anchor, ending, clip_bits):
                await replica.commit(number, anchor, ending, clip_bits)
                self.events.emit("committed", fragment=fragment, round=number, anchor=anchor[:12], ending=str(ending))
                self._inbox.put_nowait(m.Committed(fragment, anchor))
            case do.Cancel(fragment, number, why):
                await replica.cancel(number)
                self.events.emit("cancelled", fragment=fragment, round=number, why=why)
                self._inbox.put_nowait(m.Cancelled(fragment))
            case do.Recover(fragment, anchor, number, sources, why):
                blob = await self.fetcher.fetch(anchor, max_anchor_bytes(replica.fragment), sources)
                await replica.recover(anchor, number, blob)
                self.events.emit("recovered", fragment=fragment, anchor=anchor[:12], num_bytes=len(blob), why=why)
                self._inbox.put_nowait(m.Recovered(fragment, anchor))
                self.on_recovered()

    async def _set_trained(self, fragments: frozenset[FragmentId]) -> None:
        async with self._placing:  # one placement after the other, in their order
            await self._train(fragments)

    async def _train(self, fragments: frozenset[FragmentId]) -> None:
        held = set(self.replicas)
        if self.on_trained is not None:
            await self.on_trained(fragments)
        for fragment in sorted(set(self.replicas) - held):
            self._inbox.put_nowait(m.Held(_life(fragment, self.replicas[fragment], self.machine.num_steps)))
        for fragment in sorted(fragments - self._training):  # the others go on counting their tokens
            await self.replicas[fragment].begin_training()
        self._training = fragments
        if self.rate is not None:
            self.rate.trained = fragments

    # ------------------------------------------------------------ words

    def _say(self, message: MemberMessage) -> None:
        if self._outbox is not None and not self._has_said_goodbye:
            self._has_said_goodbye = isinstance(message, Goodbye)
            self._outbox.put_nowait(message)

    async def _say_last(self, why: str) -> None:
        """Let the goodbye leave, for at most two seconds."""
        if self._outbox is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._outbox.join()

    def _full_hello(self) -> Hello:
        held = {f: life.anchor for f, life in self.machine.lives.items() if life.anchor is not None}
        return replace(self.hello(), holdings=tuple(Holding(self.me.peer, f, a) for f, a in sorted(held.items())))

    def _addresses(self, peer: PeerId) -> Sequence[str]:
        member = self.members.get(peer)
        return member.addresses if member is not None else ()


def _life(fragment: FragmentId, replica: Replica, num_steps: int) -> do.FragmentLife:
    """A fragment as its files left it; ``num_steps``: done when it was last encoded."""
    offer = replica.pending_offer
    packets = frozenset({offer.packet} if offer else ())
    return do.FragmentLife(
        fragment, replica.anchor, pending=offer, packets=packets, encoded_at_steps=num_steps, encoded_before_steps=num_steps
    )
