"""A peer's life as a machine over all fragments: ``handle(event, now) -> [effect]``. What follows for one fragment is ``duties.reconcile``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from decentra.ids import ROUTER, TRUNK, Digest, FragmentId, expert_of, module_of_fragment
from decentra.protocol.duties import Effect, Finish, FragmentLife, Self, SetTrained, needs, reconcile
from decentra.protocol.messages import FragmentView, Merge, Offer, Role, SwarmView

RETRY_S = 1.0
CUT_OFF_SHARE = 0.2  # of the announced time is kept for encoding and sending


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
    objects: bool = False  # judged by its loss it does not help


@dataclass(frozen=True, slots=True)
class FetchFailed:
    fragment: FragmentId
    packet: Digest
    is_bad: bool  # the packet itself was refused; asking again is useless


@dataclass(frozen=True, slots=True)
class Reduced:
    """The settled packets are one packet, which is on disk."""

    merge: Merge

    @property
    def fragment(self) -> FragmentId:
        return self.merge.fragment


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
class Held:
    """This peer has room for a fragment now: what its files say of it. Of a peer that holds only what it trains."""

    life: FragmentLife

    @property
    def fragment(self) -> FragmentId:
        return self.life.fragment


@dataclass(frozen=True, slots=True)
class Failed:
    """A local operation failed; it is tried again later."""

    fragment: FragmentId
    why: str


Event = (
    Connected | Disconnected | Viewed | SwarmViewed | Stepped | Tick | Encoded | Skipped | Fetched | FetchFailed | Reduced | Applied | Committed
    | Cancelled | Recovered | Held | Failed
)  # fmt: skip


# ---------------------------------------------------------------- all fragments


@dataclass
class MemberMachine:
    """All fragments of one peer. ``handle(event, now) -> [effect]``; effects of one fragment never run twice at once.

    A peer that holds only what it trains begins with the fragments it trained before and takes others in when it is given them (``Held``);
    ``fragments`` are all of the run.
    """

    me: Self
    lives: dict[FragmentId, FragmentLife]
    num_steps: int = 0
    fragments: tuple[FragmentId, ...] = ()
    unheld: dict[FragmentId, FragmentView] = field(default_factory=dict)  # newest views of what it does not hold
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

    @property
    def step_limit(self) -> int | None:
        """How many inner steps may be done by now if training waits for rounds: up to H after each fragment's last encode, none while it is out."""
        at = [
            life.encoded_at_steps + (0 if life.pending is not None or life.busy == "encode" else self.me.inner_steps)
            for life in self.lives.values()
            if life.trains
        ]
        return min(at, default=None)

    @property
    def run_tokens(self) -> int | None:
        """Tokens inside the run's confirmed rounds, by the newest views of the trunk; None before they are here."""
        trunk = [life.view for life in self.lives.values() if _is_trunk(life.fragment)]
        return min((v.tally.num_tokens for v in trunk if v is not None), default=None) if None not in trunk else None

    def _take(self, event: Event, now: float, effects: list[Effect]) -> tuple[FragmentId, ...] | None:
        """Take the event in; the fragments it concerns, None for all."""
        match event:
            case Connected():
                self.is_connected = True
                self.unheld.clear()
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
            case Held(life):
                self.lives.setdefault(life.fragment, replace(life, trains=life.fragment in (self._trained or ())))
                waiting = self.unheld.pop(life.fragment, None)
                return (life.fragment,) if waiting is None else self._see(waiting, now)
            case Encoded(offer):
                life = self.lives[offer.fragment]
                self.lives[offer.fragment] = replace(life, busy="", pending=offer, packets=life.packets | {offer.packet})
                return (offer.fragment,)
            case _:
                return self._take_result(event, now)
        return None

    def _take_result(self, event: Event, now: float) -> tuple[FragmentId, ...]:
        assert not isinstance(event, Connected | Disconnected | Viewed | SwarmViewed | Stepped | Tick | Encoded | Held)
        life = self.lives[event.fragment]
        match event:
            case Skipped(_, number, why):
                self.skipped_rounds += 1
                life = replace(life, busy="", sat_out=number, why_sat_out=why)
            case Fetched(_, packet, objects):
                objected = life.objected | ({packet} if objects else set())
                life = replace(life, fetching=life.fetching - {packet}, packets=life.packets | {packet}, objected=objected)
            case FetchFailed(_, packet, is_bad):
                bad = life.bad_packets | ({packet} if is_bad else set())
                if life.view is not None and needs(life, life.view, packet):
                    life = replace(life, no_replay_to=life.view.anchor)  # nobody has the old packet any more: fetch the anchor whole
                life = replace(
                    life, fetching=life.fetching - {packet}, bad_packets=bad, refetch_at=life.refetch_at if is_bad else now + RETRY_S
                )
            case Reduced(merge):
                life = replace(life, busy="", merge=merge, packets=life.packets | {merge.packet})
            case Applied(_, number, anchor):
                life = replace(life, busy="", tentative=(number, anchor))
            case Committed(_, anchor):
                life = replace(
                    life, busy="", anchor=anchor, tentative=None, pending=None, packets=frozenset(), bad_packets=frozenset(),
                    objected=frozenset(), told=frozenset(),
                )  # fmt: skip
            case Cancelled():
                life = replace(life, busy="", pending=None, encoded_at_steps=life.encoded_before_steps)
            case Recovered(_, anchor):
                dropped = life.pending is not None
                self.skipped_rounds += dropped
                life = replace(
                    life, busy="", anchor=anchor, tentative=None, pending=None, packets=frozenset(), bad_packets=frozenset(),
                    objected=frozenset(), told=frozenset(), no_replay_to=None, encoded_at_steps=self.num_steps, encoded_before_steps=self.num_steps,
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
            known = self.unheld.get(view.fragment)
            if known is None or (view.round, view.version) >= (known.round, known.version):
                self.unheld[view.fragment] = view
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
        trained = frozenset(f for f in self.fragments or self.lives if _trains(f, mine))
        if trained != self._trained:
            self._trained = trained
            for name, life in self.lives.items():
                self.lives[name] = replace(life, trains=name in trained)
            effects.append(SetTrained(trained))

    def _is_settled_down(self) -> bool:
        return all(not life.busy and life.view is not None and life.view.anchor == life.anchor for life in self.lives.values())


def _is_trunk(fragment: FragmentId) -> bool:
    return module_of_fragment(fragment) == TRUNK


def _trains(fragment: FragmentId, experts: tuple[int, ...]) -> bool:
    module = module_of_fragment(fragment)
    return module in (TRUNK, ROUTER) or expert_of(module) in experts
