"""A peer's life as a machine: compares what the service's views say with what it has, and says what to do next. No I/O, no clock, no randomness.

The law: a fragment's anchor moves only to a confirmed digest; at most one local operation per fragment is in flight (``busy``); at most one packet
is pending, and it ends in exactly one of applied, cancelled, excluded, dropped. Views are state, not orders: reconciling twice changes nothing,
so lost messages, restarts of either side and newcomers need no code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from decentra.ids import ROUTER, TRUNK, Digest, FragmentId, PeerId, expert_of, module_of_fragment
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    FragmentView,
    Holding,
    MemberMessage,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Role,
    Settlement,
    SwarmView,
)
from decentra.protocol.placement import rendezvous

RETRY_S = 1.0
CUT_OFF_SHARE = 0.2  # of the announced time is kept for encoding and sending


class Ending(StrEnum):
    """How a pending packet's account is closed when the anchor moves."""

    APPLIED = "applied"  # confirmed with my packet
    EXCLUDED = "excluded"  # confirmed without it
    FOLLOWED = "followed"  # I had none


# ---------------------------------------------------------------- events (what happened)


@dataclass(frozen=True, slots=True)
class Connected:
    """A new stream: the service may have forgotten what it heard."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    why: str


@dataclass(frozen=True, slots=True)
class Viewed:
    view: FragmentView


@dataclass(frozen=True, slots=True)
class SwarmViewed:
    view: SwarmView


@dataclass(frozen=True, slots=True)
class Stepped:
    """The trainer has done this many inner steps in all."""

    num_steps: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Encoded:
    offer: Offer


@dataclass(frozen=True, slots=True)
class Skipped:
    """Nothing can be offered in this round."""

    fragment: FragmentId
    round: int
    why: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """The packet is on disk, has its digest and passed the screen."""

    fragment: FragmentId
    packet: Digest


@dataclass(frozen=True, slots=True)
class FetchFailed:
    fragment: FragmentId
    packet: Digest
    is_bad: bool  # the packet itself was refused; asking again is useless


@dataclass(frozen=True, slots=True)
class Applied:
    """The settlement's result is computed and on disk."""

    fragment: FragmentId
    round: int
    anchor: Digest


@dataclass(frozen=True, slots=True)
class Committed:
    fragment: FragmentId
    anchor: Digest


@dataclass(frozen=True, slots=True)
class Cancelled:
    fragment: FragmentId


@dataclass(frozen=True, slots=True)
class Recovered:
    fragment: FragmentId
    anchor: Digest


@dataclass(frozen=True, slots=True)
class Failed:
    """A local operation failed; it is tried again later."""

    fragment: FragmentId
    why: str


Event = (
    Connected | Disconnected | Viewed | SwarmViewed | Stepped | Tick | Encoded | Skipped | Fetched | FetchFailed | Applied | Committed | Cancelled
    | Recovered | Failed
)  # fmt: skip


# ---------------------------------------------------------------- effects (what to do)


@dataclass(frozen=True, slots=True)
class Encode:
    fragment: FragmentId
    round: int
    base: Digest


@dataclass(frozen=True, slots=True)
class Say:
    message: MemberMessage


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get a packet; ``sources`` are peers that should have it, best first."""

    fragment: FragmentId
    round: int
    sender: PeerId
    packet: Digest
    num_bytes: int
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the tentative anchor the confirmed one and close the account's pending packet."""

    fragment: FragmentId
    round: int
    anchor: Digest
    ending: Ending


@dataclass(frozen=True, slots=True)
class Cancel:
    fragment: FragmentId
    round: int
    why: str


@dataclass(frozen=True, slots=True)
class Recover:
    """Fetch the whole anchor; local progress since the old one is dropped and counted."""

    fragment: FragmentId
    anchor: Digest
    round: int  # the newest round at the time
    sources: tuple[PeerId, ...]
    why: str


@dataclass(frozen=True, slots=True)
class SetTrained:
    fragments: frozenset[FragmentId]


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over and this peer has its last anchors."""

    why: str


Effect = Encode | Say | Fetch | Apply | Commit | Cancel | Recover | SetTrained | Finish


# ---------------------------------------------------------------- one fragment


@dataclass(frozen=True, slots=True)
class FragmentLife:
    """What this peer has of one fragment. ``anchor`` and ``pending`` are on disk, the rest is not."""

    fragment: FragmentId
    anchor: Digest | None  # last confirmed anchor it holds; None before the first
    trains: bool = False
    view: FragmentView | None = None
    cut_off_at: float = 0.0
    pending: Offer | None = None
    tentative: tuple[int, Digest] | None = None
    packets: frozenset[Digest] = frozenset()  # held and screened
    fetching: frozenset[Digest] = frozenset()
    bad_packets: frozenset[Digest] = frozenset()
    busy: str = ""
    encoded_at_steps: int = 0
    encoded_before_steps: int = 0
    sat_out: int = 0  # newest round this peer abstained from
    why_sat_out: str = ""
    no_replay_to: Digest | None = None  # replaying towards this anchor failed: fetch it whole
    told: frozenset[tuple[str, str]] = frozenset()  # said on this stream
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Self:
    """Who reconciles."""

    peer: PeerId
    role: Role
    inner_steps: int


Result = tuple[FragmentLife, tuple[Effect, ...]]


def reconcile(life: FragmentLife, me: Self, num_steps: int, now: float) -> Result:
    """The next things to do for one fragment; calling it again without news gives nothing."""
    view = life.view
    if view is None or now < life.retry_at:
        return life, ()
    if life.anchor is None or view.anchor != life.anchor:
        return _catch_up(life, view, me)
    life, effects = _tell_holding(life, me)
    life = _forget_stale_tentative(life, view)
    life, more = _close_pending(life, view, me)
    effects += more
    if view.phase is Phase.OPEN:
        life, more = _take_part(life, view, me, num_steps, now)
    elif view.settlement is not None:
        life, more = _adopt(life, view, me)
    else:
        more = ()
    return life, effects + more


def _catch_up(life: FragmentLife, view: FragmentView, me: Self) -> Result:
    """The confirmed anchor is another one: replay settlements while they connect, else recover the whole anchor."""
    if life.busy:
        return life, ()
    link = _next_link(life, view)
    if link is not None and life.tentative is not None and life.tentative[1] == link.anchor and link.settlement is not None:
        return _commit(life, link.settlement, life.tentative[1])
    if link is None or link.settlement is None or link.anchor is None or life.no_replay_to == view.anchor:
        sources = _ordered(me, view.ready, life.fragment, view.anchor)
        why = "first anchor" if life.anchor is None else "its rounds do not connect to ours"
        return replace(life, busy="recover"), (Recover(life.fragment, view.anchor, view.round, sources, why),)
    if life.tentative is not None and life.tentative[0] == link.settlement.round:
        return _catch_up(replace(life, no_replay_to=view.anchor, tentative=None), view, me)  # we computed another digest: fetch theirs
    if any(e.packet in life.bad_packets for e in link.settlement.entries):
        return _catch_up(replace(life, no_replay_to=view.anchor), view, me)
    life, fetches = _fetch_entries(life, view, link.settlement, me)
    if all(e.packet in life.packets for e in link.settlement.entries):
        return replace(life, busy="apply"), (*fetches, Apply(link.settlement))
    return life, fetches


def _next_link(life: FragmentLife, view: FragmentView) -> Outcome | None:
    """The confirmed round that starts at our anchor, if the view still knows it and the chain reaches the confirmed anchor."""
    links = {o.settlement.base: o for o in view.recent if o.phase is Phase.CONFIRMED and o.settlement is not None}
    at, first = life.anchor, links.get(life.anchor) if life.anchor is not None else None
    for _ in range(len(links)):
        link = links.get(at) if at is not None else None
        if link is None:
            return None
        at = link.anchor
        if at == view.anchor:
            return first
    return None


def _needs(life: FragmentLife, view: FragmentView, packet: Digest) -> bool:
    """True when catching up with the view's anchor goes through this packet."""
    link = _next_link(life, view) if view.anchor != life.anchor else None
    return link is not None and link.settlement is not None and any(e.packet == packet for e in link.settlement.entries)


def _commit(life: FragmentLife, settlement: Settlement, anchor: Digest) -> Result:
    pending = life.pending
    if pending is not None and pending.round != settlement.round:
        return replace(life, busy="cancel"), (Cancel(life.fragment, pending.round, "its round ended without a result"),)
    ending = Ending.FOLLOWED
    if pending is not None:
        is_in = any(e.packet == pending.packet and e.peer == pending.peer for e in settlement.entries)
        ending = Ending.APPLIED if is_in else Ending.EXCLUDED
    return replace(life, busy="commit"), (Commit(life.fragment, settlement.round, anchor, ending),)


def _tell_holding(life: FragmentLife, me: Self) -> Result:
    assert life.anchor is not None
    return _say(life, ("holding", life.anchor), Holding(me.peer, life.fragment, life.anchor))


def _forget_stale_tentative(life: FragmentLife, view: FragmentView) -> FragmentLife:
    if life.tentative is None or life.busy:
        return life
    is_current = life.tentative[0] == view.round and view.phase in (Phase.SETTLED, Phase.TENTATIVE)
    is_same = life.tentative[1] == view.anchor  # a round that moved nothing: its commit is still due
    return life if is_current or is_same else replace(life, tentative=None)


def _close_pending(life: FragmentLife, view: FragmentView, me: Self) -> Result:
    """End a pending packet whose round is over although our anchor is the confirmed one: given up, or confirmed without moving anything."""
    pending = life.pending
    if pending is None or life.busy:
        return life, ()
    if pending.round == view.round and view.phase in (Phase.OPEN, Phase.SETTLED, Phase.TENTATIVE):
        return life, ()
    for outcome in view.recent:
        is_here = outcome.phase is Phase.CONFIRMED and outcome.anchor == life.anchor  # else it was rolled back since
        if outcome.round == pending.round and is_here and outcome.settlement and outcome.anchor:
            return _commit(life, outcome.settlement, outcome.anchor)
    why = next((o.why for o in view.recent if o.round == pending.round), "its round ended without a result")
    return replace(life, busy="cancel"), (Cancel(life.fragment, pending.round, why),)


def _take_part(life: FragmentLife, view: FragmentView, me: Self, num_steps: int, now: float) -> Result:
    effects: tuple[Effect, ...] = ()
    if me.peer in view.holders and life.trains and view.round > life.sat_out:
        life, effects = _offer(life, view, me, num_steps, now)
    elif me.peer in view.holders and view.round == life.sat_out:
        abstention = Abstention(life.fragment, view.round, me.peer, life.why_sat_out)
        life, effects = _say(life, ("abstain", str(view.round)), abstention)
    for offer in view.offers:
        if offer.base != life.anchor:
            continue
        if me.peer in view.holders or me.peer in view.keepers:
            life, more = _fetch(life, view, me, offer.peer, offer.packet, offer.num_bytes)
            effects += more
            if offer.packet in life.packets and offer.peer != me.peer:
                receipt = Receipt(life.fragment, view.round, me.peer, offer.peer, offer.packet)
                life, more = _say(life, ("receipt", offer.packet), receipt)
                effects += more
    return life, effects


def _offer(life: FragmentLife, view: FragmentView, me: Self, num_steps: int, now: float) -> Result:
    if life.pending is not None and life.pending.round == view.round:
        return _say(life, ("offer", str(view.round)), life.pending)
    if life.pending is not None or life.busy:
        return life, ()
    done = num_steps - life.encoded_at_steps
    is_due = done >= me.inner_steps or (done > 0 and now >= life.cut_off_at)
    if not is_due:
        return life, ()
    life = replace(life, busy="encode", encoded_before_steps=life.encoded_at_steps, encoded_at_steps=num_steps)
    return life, (Encode(life.fragment, view.round, view.anchor),)


def _adopt(life: FragmentLife, view: FragmentView, me: Self) -> Result:
    """The round is settled: have its packets, compute the result, attest it."""
    settlement = view.settlement
    assert settlement is not None
    life, effects = _fetch_entries(life, view, settlement, me)
    if me.peer not in view.holders and me.peer not in view.keepers:
        return life, effects
    if life.tentative is not None and life.tentative[0] == view.round:
        attestation = Attestation(life.fragment, view.round, me.peer, life.tentative[1])
        life, more = _say(life, ("attest", str(view.round)), attestation)
        return life, effects + more
    if not life.busy and settlement.base == life.anchor and all(e.packet in life.packets for e in settlement.entries):
        return replace(life, busy="apply"), (*effects, Apply(settlement))
    return life, effects


def _fetch_entries(life: FragmentLife, view: FragmentView, settlement: Settlement, me: Self) -> Result:
    effects: tuple[Effect, ...] = ()
    for entry in settlement.entries:
        life, more = _fetch(life, view, me, entry.peer, entry.packet, entry.num_bytes)
        effects += more
    return life, effects


def _fetch(life: FragmentLife, view: FragmentView, me: Self, sender: PeerId, packet: Digest, num_bytes: int) -> Result:
    if packet in life.packets | life.fetching | life.bad_packets:
        return life, ()
    havers = {sender, *(holder for s, holder in view.receipts if s == sender), *view.ready, *view.attesters}
    sources = _ordered(me, tuple(havers), life.fragment, packet)
    return replace(life, fetching=life.fetching | {packet}), (Fetch(life.fragment, view.round, sender, packet, num_bytes, sources),)


def _ordered(me: Self, peers: tuple[PeerId, ...], fragment: FragmentId, what: Digest) -> tuple[PeerId, ...]:
    """Everybody but me, spread by rendezvous so that the load of a blob does not fall on its first holder."""
    return tuple(sorted((p for p in peers if p != me.peer), key=lambda p: rendezvous(me.peer, p, fragment, what)))


def _say(life: FragmentLife, key: tuple[str, str], message: MemberMessage) -> Result:
    if key in life.told:
        return life, ()
    return replace(life, told=life.told | {key}), (Say(message),)


# ---------------------------------------------------------------- all fragments


@dataclass
class MemberMachine:
    """All fragments of one peer. ``handle(event, now) -> [effect]``; effects of one fragment never run twice at once."""

    me: Self
    lives: dict[FragmentId, FragmentLife]
    num_steps: int = 0
    swarm: SwarmView | None = None
    is_connected: bool = False
    is_finished: bool = False
    skipped_rounds: int = 0
    _trained: frozenset[FragmentId] | None = field(default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects: list[Effect] = []
        touched = self._take(event, now, effects)
        for name in sorted(self.lives) if touched is None else touched:
            self._reconcile(name, now, effects)
        if self.swarm is not None and self.swarm.is_stopped and not self.is_finished and self._is_settled_down():
            self.is_finished = True
            effects.append(Finish(self.swarm.why))
        return effects

    def _take(self, event: Event, now: float, effects: list[Effect]) -> tuple[FragmentId, ...] | None:
        """Take the event in; the fragments it concerns, None for all."""
        match event:
            case Connected():
                self.is_connected = True
                for name, life in self.lives.items():
                    self.lives[name] = replace(life, told=frozenset(), view=None)
            case Disconnected():
                self.is_connected = False
            case Stepped(num_steps):
                self.num_steps = num_steps
            case SwarmViewed(view):
                self.swarm = view
                if view.is_stopping:
                    self.me = replace(self.me, inner_steps=1)  # the last rounds take what there is
                self._place(view, effects)
            case Viewed(view):
                return self._see(view, now)
            case Tick():
                pass
            case Encoded(offer):
                life = self.lives[offer.fragment]
                self.lives[offer.fragment] = replace(life, busy="", pending=offer, packets=life.packets | {offer.packet})
                return (offer.fragment,)
            case _:
                return self._take_result(event, now)
        return None

    def _take_result(self, event: Event, now: float) -> tuple[FragmentId, ...]:
        assert not isinstance(event, Connected | Disconnected | Viewed | SwarmViewed | Stepped | Tick | Encoded)
        life = self.lives[event.fragment]
        match event:
            case Skipped(_, number, why):
                self.skipped_rounds += 1
                life = replace(life, busy="", sat_out=number, why_sat_out=why)
            case Fetched(_, packet):
                life = replace(life, fetching=life.fetching - {packet}, packets=life.packets | {packet})
            case FetchFailed(_, packet, is_bad):
                bad = life.bad_packets | ({packet} if is_bad else set())
                if life.view is not None and _needs(life, life.view, packet):
                    life = replace(life, no_replay_to=life.view.anchor)  # nobody has the old packet any more: fetch the anchor whole
                life = replace(
                    life, fetching=life.fetching - {packet}, bad_packets=bad, retry_at=life.retry_at if is_bad else now + RETRY_S
                )
            case Applied(_, number, anchor):
                life = replace(life, busy="", tentative=(number, anchor))
            case Committed(_, anchor):
                life = replace(
                    life, busy="", anchor=anchor, tentative=None, pending=None, packets=frozenset(), bad_packets=frozenset(), told=frozenset()
                )  # fmt: skip
            case Cancelled():
                life = replace(life, busy="", pending=None, encoded_at_steps=life.encoded_before_steps)
            case Recovered(_, anchor):
                dropped = life.pending is not None
                self.skipped_rounds += dropped
                life = replace(
                    life, busy="", anchor=anchor, tentative=None, pending=None, packets=frozenset(), bad_packets=frozenset(), told=frozenset(),
                    no_replay_to=None, encoded_at_steps=self.num_steps, encoded_before_steps=self.num_steps,
                )  # fmt: skip
            case Failed():
                undo = life.encoded_before_steps if life.busy == "encode" else life.encoded_at_steps
                no_replay = life.view.anchor if life.busy == "apply" and life.view is not None else life.no_replay_to
                life = replace(life, busy="", retry_at=now + RETRY_S, encoded_at_steps=undo, no_replay_to=no_replay)
        self.lives[event.fragment] = life
        return (event.fragment,)

    def _see(self, view: FragmentView, now: float) -> tuple[FragmentId, ...]:
        life = self.lives.get(view.fragment)
        if life is None:
            return ()
        old = life.view
        if old is not None and (view.round, view.version) < (old.round, old.version):
            return ()
        cut_off_at = life.cut_off_at
        if old is None or old.round != view.round:
            cut_off_at = now + view.cut_off_in_s * (1 - CUT_OFF_SHARE)
        self.lives[view.fragment] = replace(life, view=view, cut_off_at=cut_off_at)
        return (view.fragment,)

    def _reconcile(self, name: FragmentId, now: float, effects: list[Effect]) -> None:
        if self.is_connected:
            self.lives[name], more = reconcile(self.lives[name], self.me, self.num_steps, now)
            effects.extend(more)

    def _place(self, view: SwarmView, effects: list[Effect]) -> None:
        if self.me.role is not Role.TRAINER:
            return
        mine = next((m.experts for m in view.members if m.peer == self.me.peer), None)
        if mine is None:
            return
        trained = frozenset(f for f in self.lives if _trains(f, mine))
        if trained != self._trained:
            self._trained = trained
            for name, life in self.lives.items():
                self.lives[name] = replace(life, trains=name in trained)
            effects.append(SetTrained(trained))

    def _is_settled_down(self) -> bool:
        return all(not life.busy and life.view is not None and life.view.anchor == life.anchor for life in self.lives.values())


def _trains(fragment: FragmentId, experts: tuple[int, ...]) -> bool:
    module = module_of_fragment(fragment)
    return module in (TRUNK, ROUTER) or expert_of(module) in experts
