"""A small swarm over the real machines as a graph of states: FragmentBook at the service, MemberMachine at each member, one fragment.

It knows what may happen next in a state and computes it; it searches nothing and judges nothing. Transitions: a message arrives, a local operation
ends, time passes, a stream breaks and comes back, a member is falsely suspected, restarts or dies, the service restarts. Views reach a connected
member at once; its messages and operations are as late as can be. Anchors are chains written as strings, so equal strings are equal bits. What is
on disk (anchor, pending packet, packets, computed anchors) survives a restart, a death takes it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from decentra.bits import ONE_BITS
from decentra.config import OuterSpec
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol import duties as do
from decentra.protocol import fragment as books
from decentra.protocol import ledger
from decentra.protocol import member as m
from decentra.protocol.duties import FragmentLife, Self
from decentra.protocol.fragment import FragmentBook, Present, Timing, Write
from decentra.protocol.member import MemberMachine
from decentra.protocol.messages import FragmentView, Holding, Merge, Offer, Role, Settlement, Tally
from decentra.protocol.round import Reject, Round, Rules

FRAGMENT = FragmentId("trunk/0")
GENESIS = Digest("g")
RULES = Rules(cut_off_s=1.0, grace_s=1.0, attest_s=1.0, outer=OuterSpec(lr=1.0, momentum=0.0), merge_s=1.0)
TIMING = Timing(cut_off_s=1.0, gather_s=1.0, rollback_s=1e9)
LATE_S, VERY_LATE_S = 1e6, 1e12  # past every deadline of a round; past the roll-back, too


@dataclass(frozen=True)
class Case:
    """A swarm and its faults. Members named in ``joiners`` come without an anchor and connect at any time."""

    holders: int = 2
    keepers: int = 0
    joiners: int = 0  # further holders
    confirmed: int = 1  # rounds to confirm
    given_up: int = 1  # rounds that may fail on the way; the bound is the check's, not the protocol's
    deaths: int = 0
    suspicions: int = 0
    restarts: int = 0
    service_restarts: int = 0
    breaks: int = 0  # of a stream
    reduces: bool = False  # two of the roster merge the packets

    @property
    def members(self) -> tuple[PeerId, ...]:
        names = [f"h{i}" for i in range(self.holders)] + [f"k{i}" for i in range(self.keepers)] + [f"j{i}" for i in range(self.joiners)]
        return tuple(PeerId(n) for n in names)

    @property
    def budget(self) -> Budget:
        return Budget(self.deaths, self.suspicions, self.restarts, self.service_restarts, self.breaks)


class Budget(NamedTuple):
    """Faults that may still happen."""

    deaths: int
    suspicions: int
    restarts: int
    service_restarts: int
    breaks: int


@dataclass(frozen=True)
class Service:
    """The book, who is here, and the book that its ledger alone gives."""

    book: FragmentBook
    present: frozenset[PeerId]
    shadow: FragmentBook
    lone: frozenset[int]  # rounds opened with a roster of one: thin by the rule


@dataclass(frozen=True)
class Member:
    """One member: its machine's fragment, what it has under way, its disk, its stream."""

    life: FragmentLife
    jobs: tuple[do.Effect, ...] = ()
    packets: frozenset[Digest] = frozenset()  # on disk
    anchors: frozenset[Digest] = frozenset()  # on disk
    queue: tuple[object, ...] = ()  # messages on their way to the service, oldest first
    is_connected: bool = False


class State(NamedTuple):
    """Indices into the tables of ``Swarm``; member -1 is dead."""

    service: int
    members: tuple[int, ...]
    budget: Budget


def _plain_round(round_: Round | None) -> Round | None:
    if round_ is None:
        return None
    settlement = None if round_.settlement is None else replace(round_.settlement, why="")
    return replace(round_, opened_at=0.0, cut_off_at=1.0, settled_at=0.0, why="", settlement=settlement)


def _plain_book(book: FragmentBook) -> FragmentBook:
    """The book without what only counts or tells: clock readings, versions, words."""
    recent = tuple(
        replace(o, why="", settlement=None if o.settlement is None else replace(o.settlement, why="")) for o in book.recent
    )  # fmt: skip
    orphan = None if book.orphan_since is None else 0.0
    return replace(
        book, round=_plain_round(book.round), recent=recent, arrivals_s=(), patience=0, idle_since=0.0, orphan_since=orphan, version=0, tally=Tally()
    )  # fmt: skip


def _book_key(book: FragmentBook) -> object:
    return (
        book.anchor, book.height, book.number, book.round, tuple(sorted(book.holdings.items())), book.history, book.recent, book.orphan_since,
        book.reducers, book.residual, book.failed_reducers, book.num_merges_missed,
    )  # fmt: skip


def packet_name(offer_round: int, peer: PeerId) -> Digest:
    return Digest(f"{peer}@{offer_round}")


def next_anchor(settlement: Settlement) -> Digest:
    return Digest(f"{settlement.base}>{'+'.join(settlement.packets)}")


def merge_of(peer: PeerId, settlement: Settlement) -> Merge:
    what = "+".join(e.packet for e in settlement.entries)
    return Merge(FRAGMENT, settlement.round, peer, Digest(f"({what})"), 1, Digest(f"left of {what}"))


class Swarm:
    """All that may happen to one case. Steps of the service and of one member are remembered by index, so a state costs a few look-ups."""

    def __init__(self, case: Case) -> None:
        self.case, self.names = case, case.members
        self.timing = replace(TIMING, reduce_from=2) if case.reduces else TIMING
        self.keepers = frozenset(n for n in self.names if n.startswith("k"))
        self.selves = {n: Self(n, Role.KEEPER if n in self.keepers else Role.TRAINER, 1) for n in self.names}
        self.max_number = case.confirmed + case.given_up
        self.services: list[Service] = []
        self.members: list[Member] = []
        self._service_index: dict[object, int] = {}
        self._member_index: dict[Member, int] = {}
        self._service_memo: dict[object, tuple[int, bool]] = {}
        self._member_memo: dict[object, int] = {}
        self._view_index: dict[FragmentView, int] = {}
        self._view_of_service: dict[int, int] = {}
        self._views: list[FragmentView] = []
        self.num_rolled_back = 0

    # ------------------------------------------------------------ tables

    def put_service(self, book: FragmentBook, present: frozenset[PeerId], shadow: FragmentBook, lone: frozenset[int]) -> int:
        book, shadow = _plain_book(book), _plain_book(shadow)
        if self.case.service_restarts == 0:
            shadow = FragmentBook(FRAGMENT, GENESIS)
        key = (_book_key(book), present, _book_key(shadow), lone)
        if key not in self._service_index:
            self._service_index[key] = len(self.services)
            self.services.append(Service(book, present, shadow, lone))
        return self._service_index[key]

    def put_member(self, member: Member) -> int:
        if member not in self._member_index:
            self._member_index[member] = len(self.members)
            self.members.append(member)
        return self._member_index[member]

    def view(self, service: int) -> int:
        if service not in self._view_of_service:
            s = self.services[service]
            view = books.view(s.book, self._present(s.present), 0.0)
            view = replace(view, why="", cut_off_in_s=0.0)
            if view not in self._view_index:
                self._view_index[view] = len(self._views)
                self._views.append(view)
            self._view_of_service[service] = self._view_index[view]
        return self._view_of_service[service]

    def _present(self, names: frozenset[PeerId]) -> Present:
        return Present(names - self.keepers, names & self.keepers)

    # ------------------------------------------------------------ the service's steps

    def serve(self, service: int, event: object) -> tuple[int, bool]:
        """The service after an event, and whether it rolled back."""
        key = (service, event)
        if key not in self._service_memo:
            self._service_memo[key] = self._serve(self.services[service], event)
        return self._service_memo[key]

    def _serve(self, s: Service, event: object) -> tuple[int, bool]:
        book, present, shadow, lone, now, effects = s.book, s.present, s.shadow, s.lone, 0.0, []
        match event:
            case ("hear", peer, message):
                if peer not in present:
                    present |= {peer}
                    book, more = books.back(book, peer, now, RULES)
                    effects += more
                if isinstance(message, Holding):
                    book, more = books.hold(book, message), ()
                else:
                    book, more = books.hear(book, message, now, RULES)
                effects += more
            case ("beat", peer):
                present |= {peer}
                book, more = books.back(book, peer, now, RULES)
                effects += more
            case ("greet", peer, anchor):
                present |= {peer}
                book, more = books.back(book, peer, now, RULES)
                effects += more
                if anchor is not None:
                    book = books.hold(book, Holding(peer, FRAGMENT, anchor))
            case ("suspect", peer):
                present -= {peer}
                book, more = books.gone(book, peer, now, RULES)
                effects += more
            case "late":
                now = LATE_S
            case "very late":
                now = VERY_LATE_S
            case "restart":
                book, present = shadow, frozenset()
        may_open = book.number < self.max_number and book.height < self.case.confirmed
        if event != "restart":  # RoundBook looks at every fragment after every event
            book, more = books.tick(book, self._present(present), now, RULES, self.timing, may_open=may_open)
            effects += more
        for effect in effects:
            assert isinstance(effect, Write | Reject)
            if isinstance(effect, Write):
                record = effect.record
                shadow = books.restore(shadow, record, 0.0, self.timing)
                if isinstance(record, ledger.Opened) and len(record.holders) + len(record.keepers) == 1:
                    lone |= {record.round}
        rolled = any(isinstance(e, Write) and isinstance(e.record, ledger.RolledBack) for e in effects)
        if self.case.service_restarts:
            assert (shadow.anchor, shadow.height, shadow.number) == (book.anchor, book.height, book.number), "a restart loses nothing"
        return self.put_service(book, present, shadow, lone), rolled

    # ------------------------------------------------------------ a member's steps

    def tell(self, name: PeerId, member: int, event: object) -> int:
        """A member after an event of its machine; what it says goes into its queue, what it starts into its jobs."""
        key = (name, member, event)
        if key not in self._member_memo:
            self._member_memo[key] = self._tell(name, self.members[member], event)
        return self._member_memo[key]

    def _tell(self, name: PeerId, member: Member, event: object) -> int:
        life, jobs, queue = member.life, list(member.jobs), list(member.queue)
        if isinstance(event, tuple):  # the end of a job: its result was computed by _finish
            job, result, disk = event
            jobs.remove(job)
            member = replace(member, packets=member.packets | disk[0], anchors=member.anchors | disk[1])
            happened = result
        else:
            happened = m.Viewed(self._views[event]) if isinstance(event, int) else event
        machine = MemberMachine(self.selves[name], {FRAGMENT: life}, num_steps=1, is_connected=member.is_connected)
        effects = machine.handle(happened, 0.0)  # type: ignore[arg-type]
        if isinstance(happened, m.Failed | m.FetchFailed):
            effects += machine.handle(m.Tick(), 2 * m.RETRY_S)
        for effect in effects:
            if isinstance(effect, do.Say):
                queue.append(effect.message)
            else:
                jobs.append(effect)
        life = machine.lives[FRAGMENT]
        # another step is always done, and what failed was tried again
        life = replace(life, encoded_at_steps=0, encoded_before_steps=0, retry_at=0.0, refetch_at=0.0, cut_off_at=0.0)
        anchors = member.anchors
        if isinstance(happened, m.Committed | m.Recovered):
            anchors = frozenset({happened.anchor})  # the older ones may be collected: the check counts on nothing more
        return self.put_member(
            Member(
                life,
                tuple(sorted(jobs, key=repr)),
                member.packets,
                anchors,
                tuple(queue) if machine.is_connected else (),
                machine.is_connected,
            )
        )

    def connect(self, name: PeerId, member: int) -> int:
        key = (name, member, "connect")
        if key not in self._member_memo:
            me = replace(self.members[member], is_connected=True, queue=())
            self._member_memo[key] = self._tell(name, me, m.Connected())
        return self._member_memo[key]

    def disconnect(self, member: int, *, restarts: bool) -> int:
        me = self.members[member]
        life, jobs = me.life, me.jobs
        if restarts:  # a new process: what the loop builds from the disk
            mine = frozenset({life.pending.packet} if life.pending is not None else ())
            life, jobs = FragmentLife(FRAGMENT, life.anchor, trains=life.trains, pending=life.pending, packets=mine), ()
        return self.put_member(Member(life, jobs, me.packets, me.anchors))

    def finish(self, state: State, index: int, job: do.Effect) -> tuple[object, tuple[frozenset[Digest], frozenset[Digest]]]:
        """The event that a job ends with, and what it left on disk."""
        me, nothing = self.members[state.members[index]], (frozenset[Digest](), frozenset[Digest]())
        match job:
            case do.Encode(fragment, number, base):
                packet = packet_name(number, self.names[index])
                offer = Offer(fragment, number, self.names[index], base, packet, 1, 1, 1, ONE_BITS)
                return m.Encoded(offer), (frozenset({packet}), nothing[1])
            case do.Fetch(fragment, _, _, packet, _, sources):
                if packet in me.packets or any(packet in self.members[i].packets for i in self._sources(state, sources)):
                    return m.Fetched(fragment, packet), (frozenset({packet}), nothing[1])
                return m.FetchFailed(fragment, packet, False), nothing
            case do.Reduce(settlement):
                assert settlement.residual is None or settlement.residual in me.packets
                merge = merge_of(self.names[index], settlement)
                return m.Reduced(merge), (frozenset({merge.packet, merge.residual}), nothing[1])
            case do.Apply(settlement):
                anchor = next_anchor(settlement)
                return m.Applied(FRAGMENT, settlement.round, anchor), (nothing[0], frozenset({anchor}))
            case do.Commit(fragment, _, anchor, _):
                return m.Committed(fragment, anchor), nothing
            case do.Cancel(fragment, _, _):
                return m.Cancelled(fragment), nothing
            case do.Recover(fragment, anchor, _, sources, _):
                if anchor in me.anchors or any(anchor in self.members[i].anchors for i in self._sources(state, sources)):
                    return m.Recovered(fragment, anchor), (nothing[0], frozenset({anchor}))
                return m.Failed(fragment, "nobody has it"), nothing
        raise AssertionError(f"unknown job {job}")

    def _sources(self, state: State, sources: tuple[PeerId, ...]) -> Iterator[int]:
        return (i for n, i in zip(self.names, state.members, strict=True) if n in sources and i >= 0)

    # ------------------------------------------------------------ the whole

    def start(self) -> State:
        here = frozenset(n for n in self.names if not n.startswith("j"))  # all but the joiners are here when the story begins
        book = FragmentBook(FRAGMENT, GENESIS, holdings=dict.fromkeys(here, GENESIS))
        service = self.put_service(book, here, FragmentBook(FRAGMENT, GENESIS), frozenset())
        members = []
        for name in self.names:
            anchor = None if name.startswith("j") else GENESIS
            life = FragmentLife(FRAGMENT, anchor, trains=name not in self.keepers)
            member = Member(life, anchors=frozenset() if anchor is None else frozenset({anchor}))
            index = self.put_member(member)
            members.append(self.connect(name, index) if name in here else index)
        return self._served(State(service, tuple(members), self.case.budget), "begin")

    def _connected(self, state: State, index: int) -> State:
        name, member = self.names[index], self.connect(self.names[index], state.members[index])
        service, rolled = self.serve(state.service, ("greet", name, self.members[member].life.anchor))
        self.num_rolled_back += rolled
        return self._published(self._put(state, index, member), service)

    def _put(self, state: State, index: int, member: int) -> State:
        members = list(state.members)
        members[index] = member
        return state._replace(members=tuple(members))

    def _published(self, state: State, service: int) -> State:
        """The service moved on: everybody connected sees its view."""
        view = self.view(service)
        members = tuple(
            self.tell(n, i, view) if i >= 0 and self.members[i].is_connected else i for n, i in zip(self.names, state.members, strict=True)
        )  # fmt: skip
        return State(service, members, state.budget)

    def _served(self, state: State, event: object) -> State:
        service, rolled = self.serve(state.service, event)
        self.num_rolled_back += rolled
        return state if service == state.service else self._published(state, service)

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """What may happen next; names of faults are in capitals."""
        for index, i in enumerate(state.members):
            if i < 0:
                continue
            name, me = self.names[index], self.members[i]
            if me.queue:
                rest = self._put(state, index, self.put_member(replace(me, queue=me.queue[1:])))
                yield "hear", self._served(rest, ("hear", name, me.queue[0]))
            for job in me.jobs:
                result, disk = self.finish(state, index, job)
                yield type(job).__name__, self._put(state, index, self.tell(name, i, (job, result, disk)))
            if me.is_connected and name not in self.services[state.service].present:
                yield "beat", self._served(state, ("beat", name))
            if not me.is_connected:
                yield "connect", self._connected(state, index)
        yield "late", self._served(state, "late")
        if self._is_quiet(state):
            yield "very late", self._served(state, "very late")
        for index, name in enumerate(self.names):  # a member whose stream is gone is suspected in the end
            i = state.members[index]
            if name in self.services[state.service].present and (i < 0 or not self.members[i].is_connected):
                yield "suspect", self._served(state, ("suspect", name))
        yield from self._faults(state)

    def _is_quiet(self, state: State) -> bool:
        """No message is on its way, nobody is about to come back, and no operation can succeed: a roll-back waits for that long."""
        for index, i in enumerate(state.members):
            if i < 0:
                continue
            me = self.members[i]
            if me.queue or not me.is_connected:
                return False
            if any(not isinstance(self.finish(state, index, job)[0], m.Failed | m.FetchFailed) for job in me.jobs):
                return False
        return True

    def _faults(self, state: State) -> Iterator[tuple[str, State]]:
        b, present = state.budget, self.services[state.service].present
        for index, i in enumerate(state.members):
            if i < 0:
                continue
            name = self.names[index]
            if b.deaths:
                yield "DEATH", self._put(state, index, -1)._replace(budget=b._replace(deaths=b.deaths - 1))
            if b.suspicions and name in present and self.members[i].is_connected:
                after = self._served(state, ("suspect", name))
                yield "SUSPECT", after._replace(budget=b._replace(suspicions=b.suspicions - 1))
            if b.restarts:
                after = self._put(state, index, self.disconnect(i, restarts=True))
                yield "RESTART", after._replace(budget=b._replace(restarts=b.restarts - 1))
            if b.breaks and self.members[i].is_connected:
                after = self._put(state, index, self.disconnect(i, restarts=False))
                yield "BREAK", after._replace(budget=b._replace(breaks=b.breaks - 1))
        if b.service_restarts:
            service, _ = self.serve(state.service, "restart")
            members = tuple(i if i < 0 else self.disconnect(i, restarts=False) for i in state.members)
            yield "SERVICE", State(service, members, b._replace(service_restarts=b.service_restarts - 1))
