"""The averaging service over ports: pumps RoundBook, writes its records before anybody hears of them, and hands views to mailboxes. No grpc, no tensors."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from decentra.config import Manifest
from decentra.errors import Refused, Unreachable
from decentra.ids import Digest, FragmentId, PeerId, RunId, is_digest, short
from decentra.ports import Clock, Compute, Events, Journal
from decentra.protocol import ledger
from decentra.protocol.duties import witness_of
from decentra.protocol.fragment import Write
from decentra.protocol.ledger import Confirmed, Ledger, Record, RolledBack
from decentra.protocol.messages import (
    DRAINED,
    FragmentView,
    Goodbye,
    Hello,
    MemberMessage,
    Outcome,
    Phase,
    Rejected,
    Role,
    SwarmView,
    Told,
)
from decentra.protocol.round import Reject
from decentra.protocol.rounds import (
    Certify,
    Detached,
    Effect,
    Event,
    Revoke,
    RollBack,
    RoundBook,
    Stop,
    Succeed,
    SwarmChanged,
    Tick,
    ViewChanged,
)
from decentra.service.copies import Copies
from decentra.service.mailbox import Mailbox
from decentra.service.news import News, of_own
from decentra.wire.ledgers import open_record

MAX_TICK_S = 1.0
REFRESH_S = 2.0  # news that nobody acts on at once (a receipt, one more holder) waits this long for company
NUM_PUSHED_OUTCOMES = 3  # confirmed ones, enough for whoever follows closely; a new stream gets all that the view has
MAX_BATCH = 256
MAX_OUTCOMES = 4096  # of the newest rounds, answered from memory; older ones are in the ledger
SENT_AWAY = "the organiser sent this peer away; it may come again, as long as its admission is not revoked"
LOOK_S = 10.0  # for an answer about the status
RETIRED_S = 5.0  # a service that was told to go still lets its ledger be read for so long

Seal = Callable[[bytes], bytes]  # 64-byte signature of the service key over a ledger line


Status = tuple[SwarmView, tuple[FragmentView, ...]]


@dataclass
class _Work:
    """One event on its way through the machine; ``done`` resolves when its records are durable."""

    event: Event | None
    admission: tuple[PeerId, Role, str, str | None, int] | None = None
    newcomer: Mailbox | None = None  # gets every view when the event's records are durable
    looks: asyncio.Future[Status] | None = None  # gets every view then, too
    done: asyncio.Future[None] | None = None


@dataclass
class Driver:
    """Owns the RoundBook. Every change goes through one queue, so the machine sees one thing at a time; a batch shares one fsync."""

    manifest: Manifest
    journal: Journal
    clock: Clock
    compute: Compute
    events: Events
    seal: Seal
    vouch: Callable[[bytes, bytes, Record], None] | None = (
        None  # judges (line, signature, record) of what the journal holds; raises IntegrityError
    )
    certificate: tuple[int, bytes] | None = None  # (term, sealed) of this service
    on_read: Callable[[], None] = lambda: None  # the journal was read and nothing written yet; may raise IntegrityError
    vow: Callable[[Told], Told] = lambda told: told  # signs what members are told of confirmed anchors
    book: RoundBook = field(init=False)
    _ledger: Ledger = field(init=False, default_factory=Ledger)
    _told: dict[FragmentId, Told] = field(init=False, default_factory=dict)
    _outcomes: dict[tuple[FragmentId, int], Outcome] = field(init=False, default_factory=dict)
    _mailboxes: dict[PeerId, Mailbox] = field(init=False, default_factory=dict)
    _pushed: dict[FragmentId, News] = field(init=False, default_factory=dict)
    _waiting: dict[FragmentId, None] = field(init=False, default_factory=dict)
    _refreshed_at: float = field(init=False, default=0.0)
    _queue: asyncio.Queue[_Work] = field(init=False, default_factory=asyncio.Queue)
    _copies: Copies = field(init=False)
    _retired: str = field(init=False, default="")
    _sent_away: deque[str] = field(init=False, default_factory=lambda: deque(maxlen=1024))  # nonces of processes

    def __post_init__(self) -> None:
        self._copies = Copies(self.clock, self.events)

    def recover(self) -> None:
        """Read the journal, or begin it. Raises IntegrityError when it is not this run's or was edited. Call before ``run``."""
        now = self.clock.now()
        records: list[Record] = []
        for raw in self.journal.load():
            signature, line = open_record(raw)
            records.append(self._ledger.accept(line))
            if self.vouch is not None:
                self.vouch(line, signature, records[-1])
            self._note(records[-1])
            if isinstance(newest := records[-1], Confirmed | RolledBack):
                self._told[newest.fragment] = self._word(newest)
        self.on_read()
        if records:
            self.book = RoundBook.restore(self.manifest, records, now)
            self.events.emit("service-resumed", num_records=len(records), run=self.book.run)
        else:
            self.book, effects = RoundBook.start(self.manifest, now)
            self._append(effects)
            self.events.emit("service-started", run=self.book.run)
        if self.certificate is not None:
            before, (term, sealed) = self.book.term, self.certificate
            self._append(self.book.handle(Certify(term, sealed), now))
            if 0 < before < term:
                self.events.emit("took-over", term=term, num_records=len(records))
        self._copies.num_records += len(records)
        term = self._term
        first = {f: Told(f, term, 0, ledger.FIRST, 0, anchor) for f, anchor in self.manifest.genesis.items()}
        self._told = {f: self.vow(told) for f, told in (first | self._told).items()}

    async def run(self) -> None:
        """Pump until cancelled. Raises Refused when another service took over."""
        while True:
            batch = await self._next_batch()
            if self._retired:
                await self._retire(batch)
            effects: list[Effect] = []
            refusals: list[tuple[_Work, Refused]] = []
            now = self.clock.now()
            for work in batch:
                try:
                    effects += self._apply(work, now)
                except Refused as error:
                    refusals.append((work, error))
            lines, records = self._lines(effects)
            if lines:
                await self.compute.run(self.journal.append, lines)
                await self._copies.written(len(lines))
            for record in records:
                self._note(record)
            self._publish(effects, now)
            self._welcome([work.newcomer for work in batch if work.newcomer is not None], now)
            if lookers := [work.looks for work in batch if work.looks is not None and not work.looks.done()]:
                shown = self.book.swarm(), tuple(self._view(f, now) for f in sorted(self.book.fragments))
                for looker in lookers:
                    looker.set_result(shown)
            for work, refusal in refusals:
                if work.done is not None and not work.done.done():
                    work.done.set_exception(refusal)
            for work in batch:
                if work.done is not None and not work.done.done():
                    work.done.set_result(None)

    # ------------------------------------------------------------ the door (what adapters call)

    async def join(self, peer: PeerId, role: Role, nonce: str, token_id: str | None, token_uses: int) -> None:
        """Admit a peer. Raises Refused."""
        await self._submit(_Work(None, (peer, role, nonce, token_id, token_uses)))

    async def attend(self, hello: Hello, mailbox: Mailbox) -> None:
        """Take a member's stream in: from now on its mailbox gets every view. Raises Refused."""
        if hello.nonce in self._sent_away:
            raise Refused(SENT_AWAY)
        self.book.check_hello(hello, self.clock.now())
        if (old := self._mailboxes.pop(hello.peer, None)) is not None:
            old.close("another stream of this peer took over")
        self._mailboxes[hello.peer] = mailbox
        mailbox.nonce = hello.nonce
        await self._submit(_Work(hello, newcomer=mailbox))

    async def deliver(self, message: MemberMessage) -> None:
        self._queue.put_nowait(_Work(message))

    async def leave(self, peer: PeerId, mailbox: Mailbox, why: str) -> None:
        """A stream ended."""
        if self._mailboxes.get(peer) is mailbox:
            del self._mailboxes[peer]
            self._queue.put_nowait(_Work(Detached(peer, mailbox.nonce)))
        mailbox.close(None)

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None:
        return self._outcomes.get((fragment, round))

    async def status(self) -> Status:
        """Every view, when what it says is durable: it carries signed words. Raises Unreachable."""
        if self._retired:
            raise Unreachable(f"{self._retired}; nothing is decided here any more")
        work = _Work(None, looks=asyncio.get_running_loop().create_future())
        assert work.looks is not None
        self._queue.put_nowait(work)
        try:
            async with asyncio.timeout(LOOK_S):
                return await work.looks
        except TimeoutError:
            raise Unreachable(f"the averaging service wrote no record for {LOOK_S:g} s; its disk may be full or slow") from None

    async def ledger(self, after_seq: int, limit: int) -> list[bytes]:
        """Sealed journal records from position ``after_seq`` (0 = all) on."""
        return await self.compute.run(self.journal.read, after_seq, limit)

    async def copied(self, name: str, num_records: int, wait_s: float) -> None:
        """A copy of the ledger has this many records on its disk; on return there are more, or ``wait_s`` are over."""
        await self._copies.heard(name, num_records, wait_s)

    async def command(self, kind: str, argument: str) -> str:
        """Carry out an organiser's command; its authority was checked at the door."""
        if kind in ("stop", "pass-on"):
            await self._submit(_Work(Stop(argument or "the organiser ended it", kind == "pass-on")))
            return f"stopping: {self.book.stopping}"
        if kind == "roll-back":
            return await self._roll_back(argument)
        if kind in ("drain", "kick"):
            return await self._send_away(kind, argument)
        if kind == "retire":
            if not argument.isdecimal() or int(argument) <= self.book.term:
                raise Refused(f"this order is for a service before term {argument[:20]}, this one is of term {self.book.term}")
            self.retire(f"another machine took the run over (term {argument}); this one's copy of it is out of date from now on")
            await self._submit(_Work(Tick(self.clock.wall())))
            return f"run {self.book.run[:12]} is no longer served here"
        raise Refused(f"unknown command {kind[:40]!r}; known: stop, pass-on, roll-back, drain, kick, retire")

    async def _roll_back(self, argument: str) -> str:
        """``argument``: fragment, height, anchor digest and why, with spaces between them."""
        fragment, height, anchor, why = [*argument.split(" ", 3), "", "", "", ""][:4]
        if fragment not in self.book.fragments or not height.isdecimal() or len(height) > 12 or not is_digest(anchor):
            raise Refused(f"expected a fragment of this run, a height and an anchor's digest, got {argument[:120]!r}")
        if self.book.is_over:
            raise Refused("the run is over; go on from its model as another run: 'decentra init NEW --after RUN_DIR --model ...'")
        await self._submit(_Work(RollBack(FragmentId(fragment), int(height), Digest(anchor), why or "by the organiser")))
        return f"{fragment} goes on from anchor {anchor[:12]}, height {height}"

    async def revoke(self, subject: str) -> str:
        """Take back a token or an admission; the id that is revoked now. Raises Refused."""
        name = self._to_revoke(subject)
        await self._submit(_Work(Revoke(name, "by the organiser")))
        if (mailbox := self._mailboxes.pop(PeerId(name), None)) is not None:
            mailbox.close("the organiser revoked this peer")
        return name

    def _to_revoke(self, who: str) -> str:
        """A token id, or the peer id of the member with this id or, where only one has it, this name."""
        if PeerId(who) in self.book.members or _is_token_id(who):
            return who
        named = [m.peer for m in self.book.members.values() if who and m.name == who and m.peer not in self.book.revoked]
        if len(named) != 1:
            what = "the name of several members" if named else "neither a member's name or peer id nor a token id (16 hex characters)"
            raise Refused(f"{who[:60]!r} is {what}; 'decentra status INVITE --json' has peer ids")
        return named[0]

    async def _send_away(self, kind: str, who: str) -> str:
        """By name or peer id. Drained: the member is asked to leave, which it does like at Ctrl-C. Kicked: it is out at once."""
        live = [m for m in self.book.members.values() if m.is_live and who in (m.peer, m.name)]
        if len(live) != 1:
            there = ", ".join(sorted(m.name for m in self.book.members.values() if m.is_live)) or "nobody"
            raise Refused(
                f"{who[:60]!r} is {'the name of several members, give a peer id' if live else 'no member that is here'}; here: {there}"
            )
        member, mailbox = live[0], self._mailboxes.get(live[0].peer)
        if kind == "drain" and mailbox is not None:
            mailbox.put(Rejected(member.peer, DRAINED, "the organiser asks this peer to leave"))
            return f"{member.name} is asked to leave; it takes its time to finish what is due"
        await self._submit(_Work(Goodbye(member.peer, "sent away by the organiser", False)))
        if mailbox is not None:
            del self._mailboxes[member.peer]
            self._sent_away.append(mailbox.nonce)
            mailbox.close(SENT_AWAY)
        return f"{member.name} is out; what it trained alone has other holders at once. It may come again: 'decentra revoke' keeps it out"

    async def succeed(self, run: RunId, successor: str) -> str:
        """The run is over and goes on as another one; who said so was checked at the door. Raises Refused while it is not over."""
        if not self.book.is_over:
            raise Refused(f"run {self.book.run[:12]} is not over yet; end it with 'decentra stop RUN_DIR --pass-on'")
        if self.book.successor_run not in (None, run):
            raise Refused(
                f"run {self.book.run[:12]} goes on as {self.book.successor_run} already; say 'decentra stop RUN_DIR --pass-on' again to name another"
            )
        await self._submit(_Work(Succeed(run, successor)))
        return f"run {run[:12]} goes on where {self.book.run[:12]} ended"

    # ------------------------------------------------------------ parts

    def retire(self, why: str) -> None:
        """Nothing is written any more; ``run`` ends with Refused."""
        self._retired = why

    async def _retire(self, batch: Sequence[_Work]) -> None:
        """Nothing is written any more; whoever takes over gets the time to read the last records."""
        queued = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for work in (*batch, *queued):
            if work.looks is not None and not work.looks.done():
                work.looks.set_exception(Unreachable(f"{self._retired}; nothing is decided here any more"))
            if work.done is not None and not work.done.done():
                if isinstance(work.event, Tick):  # the order itself
                    work.done.set_result(None)
                else:
                    work.done.set_exception(Unreachable(f"{self._retired}; nothing is decided here any more"))
        for mailbox in self._mailboxes.values():
            mailbox.close(None)
        await self.clock.sleep(RETIRED_S)
        raise Refused(self._retired)

    async def _submit(self, work: _Work) -> None:
        if self._retired and not isinstance(work.event, Tick):
            raise Unreachable(f"{self._retired}; nothing is decided here any more")
        work.done = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(work)
        await work.done

    async def _next_batch(self) -> list[_Work]:
        now = self.clock.now()
        deadline = self.book.next_deadline(now)
        # a deadline that is past has been acted on: what it waits for now is a message or the next one
        wait_s = MAX_TICK_S if deadline is None or deadline <= now else min(MAX_TICK_S, deadline - now)
        batch = []
        try:
            async with asyncio.timeout(wait_s):
                batch.append(await self._queue.get())
        except TimeoutError:
            pass
        while not self._queue.empty() and len(batch) < MAX_BATCH:
            batch.append(self._queue.get_nowait())
        return [*batch, _Work(Tick(self.clock.wall()))]

    def _apply(self, work: _Work, now: float) -> list[Effect]:
        if work.admission is not None:
            peer, role, nonce, token, uses = work.admission
            return self.book.admit(peer, role, nonce, token, uses, now)
        if work.looks is not None:
            return []
        assert work.event is not None
        return self.book.handle(work.event, now)

    def _append(self, effects: Iterable[Effect]) -> None:
        lines, records = self._lines(effects)
        self.journal.append(lines)
        self._copies.num_records += len(lines)
        for record in records:
            self._note(record)

    def _lines(self, effects: Iterable[Effect]) -> tuple[list[bytes], list[Record]]:
        """Sealed lines of the records among the effects, and the records; the ledger has moved on to them."""
        lines: list[bytes] = []
        records: list[Record] = []
        for effect in effects:
            if isinstance(effect, Write):
                record = self._ledger.heads_record() if isinstance(effect.record, ledger.Heads) else effect.record
                line = self._ledger.append(record)
                lines.append(self.seal(line) + line)
                records.append(record)
                if isinstance(record, Confirmed | RolledBack):
                    self._told[record.fragment] = self.vow(self._word(record))
        return lines, records

    def _word(self, record: Confirmed | RolledBack) -> Told:
        """What this record, the newest line of its chain, makes of the fragment's anchor."""
        seq, line = self._ledger.heads[record.fragment]
        return Told(record.fragment, self._term, seq, line, record.height, record.anchor)

    @property
    def _term(self) -> int:
        return 1 if self.certificate is None else self.certificate[0]

    def _view(self, fragment: FragmentId, now: float) -> FragmentView:
        return replace(self.book.view(fragment, now), told=self._told.get(fragment))

    def _welcome(self, newcomers: Sequence[Mailbox], now: float) -> None:
        """Every view, whole. Not later: the book may be a batch ahead of the journal by then."""
        for mailbox in newcomers:
            for fragment in sorted(self.book.fragments):
                mailbox.put(self._view(fragment, now))
            mailbox.put(self.book.swarm())

    def _note(self, record: Record) -> None:
        """Keep how each round ended, for members that come back late."""
        match record:
            case ledger.Settled(s):
                self._outcomes[s.fragment, s.round] = Outcome(s.round, Phase.SETTLED, s.why, s)
            case ledger.Confirmed():
                settled = self._outcomes.get((record.fragment, record.round))
                settlement = settled.settlement if settled else None
                self._outcomes[record.fragment, record.round] = Outcome(
                    record.round, Phase.CONFIRMED, record.why, settlement, record.anchor, record.thin
                )
            case ledger.GaveUp():
                self._outcomes[record.fragment, record.round] = Outcome(record.round, record.phase, record.why)
        while len(self._outcomes) > MAX_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]

    def _publish(self, effects: Sequence[Effect], now: float) -> None:
        fragments: dict[FragmentId, None] = {}
        swarm_changed = False
        for effect in effects:
            match effect:
                case ViewChanged(fragment):
                    fragments[fragment] = None
                case SwarmChanged():
                    swarm_changed = True
                case Reject(peer, reason, detail):
                    self.events.emit("rejected", peer=short(peer), reason=reason, detail=detail)
                    if (mailbox := self._mailboxes.get(peer)) is not None:
                        mailbox.put(Rejected(peer, reason, detail))
                case Write(record):
                    self._tell(record)
        if swarm_changed:
            swarm = self.book.swarm()
            for mailbox in self._mailboxes.values():
                mailbox.put(swarm)
        for fragment, audience in self._due(fragments, now):
            self._push(self._short_view(fragment, now), audience)

    def _due(self, changed: Iterable[FragmentId], now: float) -> list[tuple[FragmentId, frozenset[PeerId] | None]]:
        """Which of the changed fragments to push now, and to whom, None: to all. Those with something to act on, and every two seconds the rest.

        An offer concerns reducers, where there are some, and not hundreds of others; its sender hears when somebody has it.
        """
        due: list[tuple[FragmentId, frozenset[PeerId] | None]] = []
        for fragment in changed:
            book = self.book.fragments[fragment]
            before, news = self._pushed.get(fragment), News.of(book)
            self._pushed[fragment] = news
            if before is not None and before.to_all == news.to_all:
                self._waiting[fragment] = None
                if before.offers == news.offers and before.arrived == news.arrived:
                    continue
                if before.offers == news.offers and not news.audience:
                    continue  # a receipt: nobody acts on it
                due.append((fragment, news.audience | (news.arrived - before.arrived) if news.audience else None))
            else:
                self._waiting.pop(fragment, None)
                due.append((fragment, None))
        if self._waiting and now >= self._refreshed_at + REFRESH_S:
            due += [(fragment, None) for fragment in self._waiting]
            self._waiting.clear()
            self._refreshed_at = now
        return due

    def _push(self, view: FragmentView, audience: frozenset[PeerId] | None) -> None:
        """Whole to who acts on offers, to others with what concerns their own."""
        hears_all = frozenset((*view.reducers, *view.keepers, *filter(None, [witness_of(view)]))) if view.reducers else None
        for peer in self._mailboxes if audience is None else sorted((audience | (hears_all or frozenset())) & self._mailboxes.keys()):
            is_whole = hears_all is None or peer in hears_all
            self._mailboxes[peer].put(view if is_whole else of_own(view, peer))

    def _short_view(self, fragment: FragmentId, now: float) -> FragmentView:
        view = self._view(fragment, now)
        confirmed = [o for o in view.recent if o.phase is Phase.CONFIRMED][-NUM_PUSHED_OUTCOMES:]
        return replace(view, recent=tuple(o for o in view.recent if o in confirmed or o is view.recent[-1]))

    def _tell(self, record: Record) -> None:
        match record:
            case ledger.Opened():
                num = len(record.holders), len(record.keepers)
                self.events.emit("round-opened", fragment=record.fragment, round=record.round, num_holders=num[0], num_keepers=num[1])
            case ledger.Settled(s):
                self.events.emit("round-settled", fragment=s.fragment, round=s.round, num_offers=len(s.entries), why=s.why)
            case ledger.Confirmed():
                self.events.emit(
                    "round-confirmed", fragment=record.fragment, round=record.round, height=record.height, thin=record.thin, why=record.why
                )
            case ledger.GaveUp():
                self.events.emit(f"round-{record.phase}", fragment=record.fragment, round=record.round, why=record.why)
            case ledger.RolledBack():
                self.events.emit("rolled-back", fragment=record.fragment, height=record.height, why=record.why)
            case ledger.Stopping():
                self.events.emit("run-over" if record.is_over else "run-stopping", why=record.why)
            case ledger.Quarantined():
                self.events.emit("quarantined", peer=short(record.peer), until_height=record.until_height, why=record.why)
            case ledger.Succeeded():
                self.events.emit("succeeded", run=record.run)
            case ledger.Admitted():
                self.events.emit("admitted", peer=short(record.peer), role=str(record.role))
            case ledger.Placed():
                self.events.emit("placed", peer=short(record.peer), experts=list(record.experts))


def _is_token_id(text: str) -> bool:
    return len(text) == 16 and all(c in "0123456789abcdef" for c in text)
