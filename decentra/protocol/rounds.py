"""RoundBook: the averaging service as one machine, ``handle(event, now) -> [effect]``. No I/O, no clock, no randomness, no keys.

It owns who is in, who is here, who trains which experts, and one FragmentBook per fragment. Time first, then the event, then the decision.
A foreign mistake is an effect (``Reject``), never an exception; ``Refused`` is raised only to somebody who asks to come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from decentra.config import Manifest
from decentra.errors import ConfigError, IntegrityError, RunOver
from decentra.ids import Digest, FragmentId, PeerId, RunId, expert_of, module_of_fragment
from decentra.protocol import fragment as books
from decentra.protocol import ledger, membership, placement
from decentra.protocol.fragment import FragmentBook, Present, Timing, Write
from decentra.protocol.membership import Member
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    FragmentView,
    Goodbye,
    Heartbeat,
    Hello,
    Holding,
    MemberMessage,
    MemberView,
    Merge,
    Offer,
    Phase,
    Receipt,
    Role,
    SwarmView,
)
from decentra.protocol.round import DidCondemn, Reject, Rules

KNOCKS_S = 8.0  # whoever waits for a restarted service knocks every five seconds: nobody is suspected before
MAX_DOUBLINGS = 6  # of a quarantine
KEEPER_S = (
    60.0  # so long the end of a run waits for a keeper to have its last anchors, and for one to come back after the service started again
)
DETACHED_S = 3.0  # a member whose stream ended is suspected after this


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. ``wall_s`` is Unix time, for the manifest's stop date only."""

    wall_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    why: str
    awaits_successor: bool = False


@dataclass(frozen=True, slots=True)
class Succeed:
    """The run that is over goes on as another one: ``run``. ``successor``: the way there, which is for members' eyes only."""

    run: RunId
    successor: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """Take back a token or a peer's admission."""

    subject: str
    why: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """One fragment goes on from another anchor, an earlier one or one that was computed anew; whoever holds it has to be here."""

    fragment: FragmentId
    height: int
    anchor: Digest
    why: str


@dataclass(frozen=True, slots=True)
class Certify:
    """This service's certificate. Of a higher term than the ledger's: it took the run over."""

    term: int
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Detached:
    """A member's stream ended; it may come back within its lease, in the same process or a new one."""

    peer: PeerId
    nonce: str


Event = MemberMessage | Tick | Stop | Succeed | Revoke | RollBack | Certify | Detached
_OWN = Tick | Stop | Succeed | Revoke | RollBack | Certify  # of the service and its organiser, not of a member


@dataclass(frozen=True, slots=True)
class ViewChanged:
    fragment: FragmentId


@dataclass(frozen=True, slots=True)
class SwarmChanged:
    """Membership, placement or the end of the run changed."""


Effect = Write | Reject | ViewChanged | SwarmChanged


@dataclass
class RoundBook:
    """The state of a run at its averaging service. Built with ``RoundBook.start`` or ``RoundBook.restore``."""

    manifest: Manifest
    run: RunId
    rules: Rules
    timing: Timing
    fragments: dict[FragmentId, FragmentBook] = field(default_factory=dict)
    members: dict[PeerId, Member] = field(default_factory=dict)
    token_uses: dict[str, set[PeerId]] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    stopping: str | None = None
    last_rounds: dict[FragmentId, int] = field(default_factory=dict)  # while stopping: no round after this number is opened
    is_over: bool = False
    awaits_successor: bool = False
    successor_run: RunId | None = None
    successor: str = ""  # the way to it; only in memory, the successor's host tells it again
    orphaned_at: dict[int, placement.Since] = field(default_factory=dict)  # experts that no present member trains
    restored_at: float | None = None  # when the service started again; None: it is the first one
    swarm_version: int = 0
    term: int = 0  # of the service that wrote last; 0: none said so
    certificate: bytes = b""

    @staticmethod
    def start(manifest: Manifest, now: float) -> tuple[RoundBook, list[Effect]]:
        """A new run at its genesis anchors, and the record that begins its ledger."""
        run = manifest.run_id()
        spec = manifest.rounds
        rules = Rules(
            spec.cut_off_s,
            spec.grace_s,
            spec.attest_s,
            manifest.outer,
            spec.merge_s,
            manifest.outer_experts,
            manifest.judging.share is not None,
        )
        reduce_from = None if rules.is_judged else spec.reduce_from  # who judges has to have every packet
        book = RoundBook(manifest, run, rules, Timing(spec.cut_off_s, spec.gather_s, spec.rollback_s, reduce_from))
        for fragment, digest in sorted(manifest.genesis.items()):
            book.fragments[fragment] = FragmentBook(fragment, digest, idle_since=now)
        if not book.fragments:
            raise ConfigError("the manifest names no genesis anchors; make the run with 'decentra init'")
        return book, [Write(ledger.Started(run, tuple(sorted(manifest.genesis.items()))))]

    @staticmethod
    def restore(manifest: Manifest, records: Iterable[ledger.Record], now: float) -> RoundBook:
        """The book after a restart. Members have one lease to speak before they are suspected, at least ``KNOCKS_S``."""
        book, _ = RoundBook.start(manifest, now)
        for record in records:
            book._restore_one(record, now)
        book.restored_at = now
        return book

    @property
    def _trunk(self) -> list[FragmentBook]:
        return [book for fragment, book in self.fragments.items() if module_of_fragment(fragment) == "trunk"]

    @property
    def num_trunk_rounds(self) -> int:
        """Confirmed rounds of the trunk, of its slowest fragment."""
        return min((book.height for book in self._trunk), default=0)

    # ------------------------------------------------------------ coming in

    def admit(self, peer: PeerId, role: Role, nonce: str, token: str | None, token_uses: int, now: float) -> list[Effect]:
        """Let a peer in, or raise Refused with the reason. Admitting somebody again is no change."""
        if self.is_over and role is not Role.WATCHER and peer not in self.revoked:
            raise RunOver(f"the run is over ({self.stopping}); 'decentra pull' gets its result")
        membership.check_admissible(self.manifest, self.members, self.revoked, self.token_uses, peer, role, token, token_uses, now)
        known = self.members.get(peer)
        if known is not None:
            membership.check_alone(self.manifest, known, nonce, now)
        if role is Role.WATCHER:
            return []
        if known is not None:
            membership.check_role(known, role)
            return []
        if token is not None:
            self.token_uses.setdefault(token, set()).add(peer)
        self.members[peer] = Member(peer, role, "", heard_at=now)
        return [Write(ledger.Admitted(peer, role, "", token or ""))]

    def check_hello(self, hello: Hello, now: float) -> None:
        """Raise Refused for a Hello that cannot be taken."""
        membership.check_hello(self.manifest, self.members, self.revoked, hello, now)

    # ------------------------------------------------------------ the machine

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Everything that follows from ``event``. Records come before the views that depend on them."""
        effects: list[Effect] = []
        if not isinstance(event, _OWN) and event.peer in self.revoked:
            return [Reject(event.peer, "revoked", "the organiser took this peer's admission back")]
        match event:
            case Tick(wall_s):
                self._check_stop(wall_s, effects)
                self._suspect_silent(now, effects)
                self._adopt_orphans(now, effects)
            case Hello():
                self._greet(event, now, effects)
            case Goodbye(peer, why, comes_back):
                self._lose(peer, why, now, effects)
                if member := self.members.get(peer):
                    self.members[peer] = replace(member, nonce="")
                if not comes_back:
                    self._adopt_orphans(now, effects, leaving=peer)
            case Heartbeat(peer, _, counters):
                if member := self.members.get(peer):
                    self.members[peer] = replace(member, counters=counters)
            case Holding():
                self._hold(event, effects)
            case Offer() | Receipt() | Merge() | Abstention() | Attestation():
                self._hear(event, now, effects)
            case Detached(peer, nonce):
                if (member := self.members.get(peer)) and member.nonce == nonce:
                    # a killed process closes its stream at once: give it a moment to come back instead of its whole lease
                    heard_at = min(member.heard_at, now - self.manifest.rounds.lease_s + DETACHED_S)
                    self.members[peer] = replace(member, nonce="", heard_at=heard_at)
            case Stop(why, awaits_successor):
                self._stop(why, effects, awaits_successor=awaits_successor)
            case Succeed(run, successor):
                self._succeed(run, successor, effects)
            case Revoke(subject, why):
                self._revoke(subject, why, now, effects)
            case RollBack(fragment, height, anchor, why) if fragment in self.fragments and not self.is_over:
                self._put(fragment, books.roll_back(self.fragments[fragment], height, anchor, why, now), effects)
            case Certify(term, certificate):
                self._certify(term, certificate, now, effects)
                return effects
        version = self.swarm_version
        if not isinstance(event, _OWN | Goodbye | Detached):
            self._mark_alive(event.peer, now, effects)
        if isinstance(event, Offer | Receipt | Merge | Abstention | Attestation | Holding) and version == self.swarm_version:
            self._tick_fragments(now, effects, [event.fragment] if event.fragment in self.fragments else [])  # it concerns no other
        elif not isinstance(event, Heartbeat) or version != self.swarm_version:
            self._tick_fragments(now, effects, sorted(self.fragments))
        if self.manifest.placement.adopt_rounds is not None and not isinstance(event, Heartbeat):
            self._adopt_orphans(now, effects)  # rounds may be shorter than the time between two ticks
        self._consider_end(now, effects)
        return effects

    def next_deadline(self, now: float) -> float | None:
        """When a Tick may change something without any message."""
        times = [
            t
            for b in self.fragments.values()
            if (t := books.next_deadline(b, self._present(b.fragment), self.rules, self.timing)) is not None
        ]
        times += [m.heard_at + self.manifest.rounds.lease_s for m in self.members.values() if m.is_live]
        return min(times, default=None)

    def view(self, fragment: FragmentId, now: float) -> FragmentView:
        return books.view(self.fragments[fragment], self._present(fragment), now, may_open=self._may_open(self.fragments[fragment]))

    def swarm(self) -> SwarmView:
        members = tuple(
            MemberView(m.peer, m.name, m.role, m.is_live, m.addresses, m.experts, m.counters, m.is_partial, self._quarantine_of(m))
            for _, m in sorted(self.members.items())
            if m.has_greeted or m.name
        )
        revoked = tuple(sorted(p for p in self.members if p in self.revoked))
        is_stopping, why = self.stopping is not None, self.stopping or ""
        return SwarmView(
            self.swarm_version, members, is_stopping, self.is_over, why, revoked, self.awaits_successor or self.successor_run is not None, self.successor,
        )  # fmt: skip

    # ------------------------------------------------------------ parts

    def _present(self, fragment: FragmentId) -> Present:
        expert = expert_of(module_of_fragment(fragment))
        live = [m for m in self.members.values() if m.is_live and m.has_greeted]
        trainers, height = frozenset(m.peer for m in live if m.role is Role.TRAINER), self.num_trunk_rounds
        holders = frozenset(
            m.peer for m in live if m.peer in trainers and (expert is None or expert in m.experts) and m.quarantined_until <= height
        )
        limited = frozenset(m.peer for m in live if not m.may_reduce)
        awaited = frozenset(m.peer for m in self.members.values() if m.is_live and not m.has_greeted)
        return Present(holders, frozenset(m.peer for m in live if m.role is Role.KEEPER), trainers - holders, limited, awaited)

    def _each(self, change: Callable[[FragmentBook], books.Step], effects: list[Effect]) -> None:
        for name in sorted(self.fragments):
            self._put(name, change(self.fragments[name]), effects)

    def _put(self, name: FragmentId, step: books.Step, effects: list[Effect]) -> None:
        book, found = step
        changed = book.version != self.fragments[name].version
        self._set(name, book)
        effects.extend(e for e in found if not isinstance(e, DidCondemn))
        for condemned in (e for e in found if isinstance(e, DidCondemn)):
            self._quarantine(condemned, effects)
        if any(isinstance(e, Write) and isinstance(e.record, ledger.Confirmed) for e in found):
            effects.append(Write(ledger.Heads(())))  # the driver fills in the heads it has just written
        if changed:
            effects.append(ViewChanged(name))

    def _set(self, name: FragmentId, book: FragmentBook) -> None:
        """Where the trunk goes back, what counts its rounds goes back with it: a quarantine lasts as many more as before."""
        goes_back, before = book.height < self.fragments[name].height, self.num_trunk_rounds
        self.fragments[name] = book
        if goes_back and (by := before - self.num_trunk_rounds) > 0:
            self.members = {p: replace(m, quarantined_until=max(0, m.quarantined_until - by)) for p, m in self.members.items()}
            self.orphaned_at = {
                e: since if since.num_rounds is None else since._replace(num_rounds=since.num_rounds - by)
                for e, since in self.orphaned_at.items()
            }

    def _quarantine(self, condemned: DidCondemn, effects: list[Effect]) -> None:
        """Longer each time. Until then it follows and attests nothing: it is in no roster."""
        member = self.members[condemned.peer]
        until = self.num_trunk_rounds + 1 + (self.manifest.judging.quarantine_rounds << min(member.num_quarantines, MAX_DOUBLINGS))
        effects.append(Write(ledger.Quarantined(condemned.peer, until, condemned.why)))
        self._note_quarantine(condemned.peer, until, condemned.why)
        self._swarm_changed(effects)

    def _note_quarantine(self, peer: PeerId, until: int, why: str) -> None:
        member = self.members[peer]
        self.members[peer] = replace(member, quarantined_until=until, num_quarantines=member.num_quarantines + 1, why_quarantined=why)

    def _quarantine_of(self, member: Member) -> str:
        left = member.quarantined_until - self.num_trunk_rounds
        return f"{member.why_quarantined}; for {left} more rounds of the trunk" if left > 0 else ""

    def _tick_fragments(self, now: float, effects: list[Effect], names: Iterable[FragmentId]) -> None:
        for name in names:
            book = self.fragments[name]
            self._put(name, books.tick(book, self._present(name), now, self.rules, self.timing, may_open=self._may_open(book)), effects)

    def _may_open(self, book: FragmentBook) -> bool:
        """While the run ends, each fragment gets one last round, so that what was trained since the one before is not lost."""
        if self.is_over:
            return False
        return self.stopping is None or book.number < self.last_rounds.get(book.fragment, 0)

    def _greet(self, hello: Hello, now: float, effects: list[Effect]) -> None:
        member = self.members.get(hello.peer)
        if member is None:
            effects.append(Reject(hello.peer, "not-a-member", "join first"))
            return
        experts = member.experts
        if hello.role is Role.TRAINER:
            experts = self._experts_for(hello, member)
            if experts != member.experts:
                effects.append(Write(ledger.Placed(hello.peer, experts)))
        self.members[hello.peer] = replace(
            member,
            name=hello.name,
            nonce=hello.nonce,
            addresses=hello.addresses,
            experts=experts,
            may_reduce=hello.may_reduce,
            is_partial=hello.is_partial,
            max_experts=hello.max_experts,
            insists=hello.experts is not None or hello.num_experts is not None,
            heard_at=now,
            has_greeted=True,
            is_live=True,
        )
        for name in sorted(self.fragments):  # what it no longer names, it no longer has
            self._put(name, (books.forget(self.fragments[name], hello.peer), ()), effects)
        for holding in hello.holdings:
            self._hold(holding, effects)
        if not member.is_live:
            self._each(lambda b: books.back(b, hello.peer, now, self.rules), effects)
        self._swarm_changed(effects)
        effects.extend(ViewChanged(f) for f in sorted(self.fragments))

    def _experts_for(self, hello: Hello, member: Member) -> tuple[int, ...]:
        frozen = self.manifest.placement.frozen_experts
        num_experts = self.manifest.model.num_experts - len(set(frozen))
        if hello.experts is not None:
            return self._checked(hello.experts)
        most = num_experts if hello.max_experts is None else min(num_experts, hello.max_experts)
        count = min(most, self.manifest.placement.experts_per_peer if hello.num_experts is None else hello.num_experts)
        keeps = len(member.experts) if hello.num_experts is None and len(member.experts) > count else count
        if len(member.experts) == keeps <= most:
            return member.experts  # sticky: optimizer state lives with the peer, and what it adopted stays with it
        present = {m.peer: m.experts for m in self.members.values() if m.is_live and m.peer != hello.peer}
        if len(member.experts) > min(keeps, most):
            return placement.part_of(member.experts, min(keeps, most), present)
        return placement.place(hello.peer, count, self.manifest.model.num_experts, present, frozen)

    def _checked(self, experts: tuple[int, ...]) -> tuple[int, ...]:
        return placement.check_experts(experts, self.manifest.model.num_experts, self.manifest.placement.frozen_experts)

    def _adopt_orphans(self, now: float, effects: list[Effect], leaving: PeerId | None = None) -> None:
        """An expert whose holders are gone for ``adopt_s`` or ``adopt_rounds`` gets another one; who comes back keeps it, too.

        Experts of who is ``leaving`` for good do not wait: nobody is expected back.
        """
        if self.stopping is not None:
            return
        present = {m.peer: m for m in self.members.values() if m.is_live and m.has_greeted and m.role is Role.TRAINER}
        held = {e for m in present.values() for e in m.experts}
        rules, at = self.manifest.placement, placement.Since(now, self.num_trunk_rounds)
        were_held = {e for m in self.members.values() for e in m.experts}
        orphans = [e for e in range(self.manifest.model.num_experts) if e not in held and e not in rules.frozen_experts]
        self.orphaned_at = {e: self.orphaned_at.get(e, at if e in were_held else placement.Since(now, None)) for e in orphans}
        left = self.members[leaving].experts if leaving is not None and leaving in self.members else ()
        due = [e for e, since in self.orphaned_at.items() if e in left or placement.is_late(rules, since, at)]
        willing = {p: m.experts for p, m in present.items() if not m.insists}
        most = {p: m.max_experts for p, m in present.items() if m.max_experts is not None}
        for peer, experts in placement.adopted(due, willing, most).items():
            self.members[peer] = replace(self.members[peer], experts=experts)
            effects.append(Write(ledger.Placed(peer, experts)))
            self._swarm_changed(effects)
            effects.extend(ViewChanged(f) for f in sorted(self.fragments) if expert_of(module_of_fragment(f)) in due)

    def _hold(self, holding: Holding, effects: list[Effect]) -> None:
        book = self.fragments.get(holding.fragment)
        if book is None:
            effects.append(Reject(holding.peer, "fragment", f"this run has no fragment {holding.fragment[:40]!r}"))
        elif book.holdings.get(holding.peer) != holding.anchor:
            self._put(holding.fragment, (books.hold(book, holding), ()), effects)

    def _hear(self, message: Offer | Receipt | Merge | Abstention | Attestation, now: float, effects: list[Effect]) -> None:
        book = self.fragments.get(message.fragment)
        if book is None:
            effects.append(Reject(message.peer, "fragment", f"this run has no fragment {message.fragment[:40]!r}"))
        else:
            self._put(message.fragment, books.hear(book, message, now, self.rules), effects)

    def _mark_alive(self, peer: PeerId, now: float, effects: list[Effect]) -> None:
        member = self.members.get(peer)
        if member is None or not member.nonce:  # a word that was under way when it said goodbye
            return
        self.members[peer] = replace(member, heard_at=now, is_live=True)
        if not member.is_live:
            self._each(lambda b: books.back(b, peer, now, self.rules), effects)
            self._swarm_changed(effects)

    def _suspect_silent(self, now: float, effects: list[Effect]) -> None:
        lease_s = self.manifest.rounds.lease_s
        for member in list(self.members.values()):
            if member.is_live and now - member.heard_at >= lease_s:
                self._lose(member.peer, f"silent for {lease_s:g} s", now, effects)

    def _lose(self, peer: PeerId, why: str, now: float, effects: list[Effect]) -> None:
        member = self.members.get(peer)
        if member is None or not member.is_live:
            return
        self.members[peer] = replace(member, is_live=False, counters=replace(member.counters, state=why))
        self._each(lambda b: books.gone(b, peer, now, self.rules), effects)
        self._swarm_changed(effects)

    def _revoke(self, subject: str, why: str, now: float, effects: list[Effect]) -> None:
        if subject in self.revoked:
            return
        self.revoked.add(subject)
        effects.append(Write(ledger.Revoked(subject, why)))
        self._lose(PeerId(subject), f"revoked: {why}", now, effects)

    def _certify(self, term: int, certificate: bytes, now: float, effects: list[Effect]) -> None:
        if certificate == self.certificate:
            return
        effects.append(Write(ledger.Certified(term, certificate)))
        if self._is_later(term):
            were_open = {f for f, b in self.fragments.items() if b.active is not None and b.active.phase is Phase.OPEN}
            self._each(lambda b: books.taken_over(b, now), effects)
            if self.stopping is not None:  # each fragment still gets its last round
                self.last_rounds |= {f: self.fragments[f].number + 1 for f in were_open}
        self.term, self.certificate = term, certificate

    def _is_later(self, term: int) -> bool:
        """Than that of the service before, which was 1 where a ledger is older than certificates."""
        return (self.term or (1 if self.members else 0)) not in (0, term) and term > self.term

    def _stop(self, why: str, effects: list[Effect], *, awaits_successor: bool = False) -> None:
        if self.stopping is None or awaits_successor:
            if self.stopping is None:
                self._begin_stopping(why)
            self.successor_run, self.successor = None, ""  # said again: another one may follow
            self.awaits_successor = awaits_successor
            effects.append(Write(ledger.Stopping(self.stopping or why, self.is_over, awaits_successor)))
            self._swarm_changed(effects)

    def _succeed(self, run: RunId, successor: str, effects: list[Effect]) -> None:
        if not self.is_over:
            return
        if run != self.successor_run:
            self.successor_run = run
            effects.append(Write(ledger.Succeeded(run)))
        if successor != self.successor:
            self.successor = successor
            self._swarm_changed(effects)

    def _begin_stopping(self, why: str) -> None:
        self.stopping = why
        self.last_rounds = {f: b.number + (b.active is None or b.active.phase is not Phase.OPEN) for f, b in self.fragments.items()}

    def _check_stop(self, wall_s: float, effects: list[Effect]) -> None:
        stop = self.manifest.stop
        num_tokens = min((b.tally.num_tokens for b in self._trunk), default=0)
        if stop.rounds is not None and self.num_trunk_rounds >= stop.rounds:
            self._stop(f"{stop.rounds} rounds of the trunk are confirmed", effects)
        elif stop.tokens is not None and num_tokens >= stop.tokens:
            self._stop(f"{num_tokens} tokens are trained", effects)
        elif stop.date is not None and wall_s >= stop.date:
            self._stop("the run's last day is over", effects)

    def _consider_end(self, now: float, effects: list[Effect]) -> None:
        """Over when no round is active and everybody present has the last anchors: whoever confirmed them may leave then.

        A keeper serves them to who comes late. It is waited for, also while it is not back yet: a host's begins some seconds after its service.
        """
        if self.stopping is None or self.is_over or any(self._is_draining(b, now) for b in self.fragments.values()):
            return
        keepers = [m for m in self.members.values() if m.role is Role.KEEPER and m.peer not in self.revoked]
        is_one_here = any(m.is_live and m.has_greeted for m in keepers)
        if keepers and not is_one_here and self.restored_at is not None and now < self.restored_at + KEEPER_S:
            return
        self.is_over = True
        effects.append(Write(ledger.Stopping(self.stopping, True, self.awaits_successor)))
        self._swarm_changed(effects)

    def _is_draining(self, book: FragmentBook, now: float) -> bool:
        if book.active is not None:
            return True
        if (
            self._may_open(book)
            and now < book.idle_since + self.manifest.rounds.attest_s
            and book.ready(self._present(book.fragment)).holders
        ):
            return True  # its last round is about to open
        present = self._present(book.fragment)
        ready = book.ready(present)
        wait_s = max(KEEPER_S, self.manifest.rounds.attest_s) if present.keepers and not ready.keepers else self.manifest.rounds.attest_s
        return not present.roster <= ready.roster and now < book.idle_since + wait_s

    def _swarm_changed(self, effects: list[Effect]) -> None:
        self.swarm_version += 1
        effects.append(SwarmChanged())

    def _restore_one(self, record: ledger.Record, now: float) -> None:
        match record:
            case ledger.Started(run):
                if run != self.run:
                    raise IntegrityError(
                        f"the ledger is of run {run[:12]}, this manifest is run {self.run[:12]}; use the run's own directory"
                    )
            case ledger.Certified(term, certificate):
                if self._is_later(term):
                    self.fragments = {f: books.skip_numbers(b) for f, b in self.fragments.items()}
                self.term, self.certificate = term, certificate
            case ledger.Admitted(peer, role, name, token):
                grace_s = max(0.0, KNOCKS_S - self.manifest.rounds.lease_s)
                self.members[peer] = Member(peer, role, name, heard_at=now + grace_s, is_live=True)
                if token:
                    self.token_uses.setdefault(token, set()).add(peer)
            case ledger.Placed(peer, experts) if peer in self.members:
                self.members[peer] = replace(self.members[peer], experts=experts)
            case ledger.Quarantined(peer, until, why) if peer in self.members:
                self._note_quarantine(peer, until, why)
            case ledger.Revoked(subject):
                self.revoked.add(subject)
            case ledger.Stopping(why, is_over, awaits_successor):
                self._begin_stopping(why)
                self.is_over, self.awaits_successor, self.successor_run = is_over, awaits_successor, None
            case ledger.Succeeded(run):
                self.successor_run = run
            case ledger.Opened() | ledger.Confirmed() | ledger.GaveUp() | ledger.RolledBack():
                self._restore_fragment(record.fragment, record, now)
            case ledger.Settled(settlement):
                self._restore_fragment(settlement.fragment, record, now)

    def _restore_fragment(self, fragment: FragmentId, record: ledger.Record, now: float) -> None:
        if fragment not in self.fragments:
            raise IntegrityError(f"the ledger speaks of fragment {fragment[:40]!r}, which the manifest does not have")
        self._set(fragment, books.restore(self.fragments[fragment], record, now, self.timing))

    def coverage(self) -> Mapping[int, int]:
        """Present holders of each expert."""
        present = {m.peer: m.experts for m in self.members.values() if m.is_live and m.role is Role.TRAINER}
        return dict(enumerate(placement.coverage(self.manifest.model.num_experts, present)))
