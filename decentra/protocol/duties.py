"""One fragment in a peer's life: what it has, and the next things to do about what the service's view says. No I/O, no clock, no randomness.

The law: a fragment's anchor moves only to a confirmed digest; at most one local operation per fragment is in flight (``busy``); at most one packet
is pending, and it ends in exactly one of applied, cancelled, excluded, dropped. Views are state, not orders: reconciling twice changes nothing,
so lost messages, restarts of either side and newcomers need no code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from decentra.bits import ONE_BITS
from decentra.ids import MERGED, Digest, FragmentId, PeerId
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    FragmentView,
    Holding,
    MemberMessage,
    Merge,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Role,
    Settlement,
)
from decentra.protocol.placement import rendezvous


class Ending(StrEnum):
    """How a pending packet's account is closed when the anchor moves."""

    APPLIED = "applied"  # confirmed with my packet
    EXCLUDED = "excluded"  # confirmed without it
    FOLLOWED = "followed"  # I had none


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
    """Get a packet and screen it, its norm as well; ``sources`` are peers that should have it, best first."""

    fragment: FragmentId
    round: int
    sender: PeerId
    packet: Digest
    num_bytes: int
    sources: tuple[PeerId, ...]
    norm_bits: int | None  # that it has to have; None: nobody said
    is_residual: bool = False  # what earlier merges left out, no packet


@dataclass(frozen=True, slots=True)
class Reduce:
    """Make one packet of the settled ones and of the residual, if there is one; all of them are here."""

    settlement: Settlement


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
    clip_bits: int = ONE_BITS  # applied: of my entry


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


Effect = Encode | Say | Fetch | Reduce | Apply | Commit | Cancel | Recover | SetTrained | Finish


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
    merge: Merge | None = None  # the newest this peer made as a reducer
    packets: frozenset[Digest] = frozenset()  # held and screened
    fetching: frozenset[Digest] = frozenset()
    norms: frozenset[tuple[Digest, int]] = frozenset()  # (packet, float32 bits of the norm it is or was screened for)
    bad_packets: frozenset[Digest] = frozenset()
    objected: frozenset[Digest] = frozenset()  # of ``packets``: those that do not help, judged by their loss
    busy: str = ""
    encoded_at_steps: int = 0
    encoded_before_steps: int = 0
    sat_out: int = 0  # newest round this peer abstained from
    why_sat_out: str = ""
    no_replay_to: Digest | None = None  # replaying towards this anchor failed: fetch it whole
    told: frozenset[tuple[str, str]] = frozenset()  # said on this stream
    retry_at: float = 0.0  # a local operation failed: nothing before
    refetch_at: float = 0.0  # a fetch failed: no other before


@dataclass(frozen=True, slots=True)
class Self:
    """Who reconciles."""

    peer: PeerId
    role: Role
    inner_steps: int


Result = tuple[FragmentLife, tuple[Effect, ...]]
FAN_OUT, TREE_FROM = 8, 16  # to how many each passes a merged packet on; with fewer peers everybody asks everybody


def reconcile(life: FragmentLife, me: Self, num_steps: int, now: float) -> Result:
    """The next things to do for one fragment; calling it again without news gives nothing."""
    view = life.view
    if view is None or now < life.retry_at:
        return life, ()
    if life.anchor is None or view.anchor != life.anchor:
        return _catch_up(life, view, me, now)
    life, effects = _tell_holding(life, me)
    life = _forget_stale_tentative(life, view)
    life, more = _close_pending(life, view, me)
    effects += more
    if view.phase is Phase.OPEN:
        life, more = _take_part(life, view, me, num_steps, now)
    elif view.settlement is not None:
        life, more = _adopt(life, view, me, now)
    else:
        more = ()
    return life, effects + more


def _catch_up(life: FragmentLife, view: FragmentView, me: Self, now: float) -> Result:
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
        return _catch_up(replace(life, no_replay_to=view.anchor, tentative=None), view, me, now)  # we computed another digest: fetch theirs
    if any(packet in life.bad_packets for packet in link.settlement.packets):
        return _catch_up(replace(life, no_replay_to=view.anchor), view, me, now)
    life, fetches = _fetch_settled(life, view, link.settlement, me, now)
    if life.packets.issuperset(link.settlement.packets):
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


def needs(life: FragmentLife, view: FragmentView, packet: Digest) -> bool:
    """True when catching up with the view's anchor goes through this packet."""
    link = _next_link(life, view) if view.anchor != life.anchor else None
    return link is not None and link.settlement is not None and packet in link.settlement.packets


def _commit(life: FragmentLife, settlement: Settlement, anchor: Digest) -> Result:
    pending = life.pending
    if pending is not None and pending.round != settlement.round:
        return replace(life, busy="cancel"), (Cancel(life.fragment, pending.round, "its round ended without a result"),)
    ending, clip_bits = Ending.FOLLOWED, ONE_BITS
    if pending is not None:
        mine = next((e for e in settlement.entries if e.packet == pending.packet and e.peer == pending.peer), None)
        ending, clip_bits = (Ending.EXCLUDED, ONE_BITS) if mine is None else (Ending.APPLIED, mine.clip_bits)
    return replace(life, busy="commit"), (Commit(life.fragment, settlement.round, anchor, ending, clip_bits),)


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
    if me.peer in view.reducers:
        life, more = _fetch_residual(life, view, me, view.residual, now)
        effects += more
    for offer in view.offers:
        if offer.base != life.anchor:
            continue
        if _fetches(view, me, offer):
            life, more = _fetch_from(life, view, me, offer.packet, offer.num_bytes, offer.norm_bits, view.round, offer.peer, (), now)
            effects += more
            is_vouched = offer.packet in life.packets and (offer.packet, offer.norm_bits) in life.norms
            if is_vouched and offer.peer != me.peer:
                receipt = Receipt(life.fragment, view.round, me.peer, offer.peer, offer.packet, offer.packet in life.objected)
                life, more = _say(life, ("receipt", f"{view.round} {offer.packet}"), receipt)
                effects += more
    return life, effects


def _fetches(view: FragmentView, me: Self, offer: Offer) -> bool:
    """Reducers, if there are some, fetch all packets; a witness holds theirs, since they may not reach each other."""
    if not view.reducers:
        return me.peer in view.holders or me.peer in view.keepers
    return me.peer in view.reducers or (offer.peer in view.reducers and me.peer == witness_of(view))


def witness_of(view: FragmentView) -> PeerId | None:
    """Who holds the reducers' own packets besides them; a keeper where there is one."""
    others = [p for p in (view.keepers or view.holders) if p not in view.reducers]
    return min(others, key=lambda p: rendezvous(view.fragment, p), default=None)


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


def _adopt(life: FragmentLife, view: FragmentView, me: Self, now: float) -> Result:
    """The round is settled: have its packets, compute the result, attest it."""
    settlement = view.settlement
    assert settlement is not None
    if not settlement.is_final:
        return _merge(life, view, settlement, me, now) if me.peer in settlement.reducers else (life, ())
    life, effects = _fetch_settled(life, view, settlement, me, now)
    if me.peer not in view.holders and me.peer not in view.keepers:
        return life, effects
    if life.tentative is not None and life.tentative[0] == view.round:
        attestation = Attestation(life.fragment, view.round, me.peer, life.tentative[1])
        life, more = _say(life, ("attest", str(view.round)), attestation)
        return life, effects + more
    if not life.busy and settlement.base == life.anchor and life.packets.issuperset(settlement.packets):
        return replace(life, busy="apply"), (*effects, Apply(settlement))
    return life, effects


def _merge(life: FragmentLife, view: FragmentView, settlement: Settlement, me: Self, now: float) -> Result:
    """A reducer's part: have all packets, make one of them, say which."""
    if life.merge is not None and life.merge.round == settlement.round:
        return _say(life, ("merge", str(settlement.round)), life.merge)
    life, effects = _fetch_settled(life, view, settlement, me, now)
    life, more = _fetch_residual(life, view, me, settlement.residual, now)
    effects += more
    needed = {*settlement.packets, *(() if settlement.residual is None else (settlement.residual,))}
    if not life.busy and settlement.base == life.anchor and life.packets >= needed:
        return replace(life, busy="merge"), (*effects, Reduce(settlement))
    return life, effects


def _fetch_residual(life: FragmentLife, view: FragmentView, me: Self, residual: Digest | None, now: float) -> Result:
    """A reducer gets it from whoever reduced before, while the round is still open."""
    if residual is None or now < life.refetch_at or residual in life.packets | life.fetching | life.bad_packets:
        return life, ()
    sources = tuple(dict.fromkeys(p for p in (*view.reducers, *_ordered(me, view.ready, life.fragment, residual)) if p != me.peer))
    fetch = Fetch(life.fragment, view.round, MERGED, residual, 0, sources, None, is_residual=True)
    return replace(life, fetching=life.fetching | {residual}), (fetch,)


def _fetch_settled(life: FragmentLife, view: FragmentView, settlement: Settlement, me: Self, now: float) -> Result:
    """The packets the settlement needs that are not here yet."""
    if (merged := settlement.merged) is not None:
        return _fetch_from(life, view, me, merged.packet, merged.num_bytes, None, settlement.round, MERGED, settlement.reducers, now)
    effects: tuple[Effect, ...] = ()
    for entry in settlement.entries:
        life, more = _fetch_from(life, view, me, entry.packet, entry.num_bytes, entry.norm_bits, settlement.round, entry.peer, (), now)
        effects += more
    return life, effects


def _fetch_from(
    life: FragmentLife, view: FragmentView, me: Self, packet: Digest, num_bytes: int, norm_bits: int | None, number: int, sender: PeerId,
    makers: tuple[PeerId, ...], now: float,
) -> Result:  # fmt: skip
    """Fetch one packet of round ``number`` from its sender (``makers`` where that is no peer) and from whoever else should have it."""
    if now < life.refetch_at or packet in life.packets | life.fetching | life.bad_packets:
        return life, ()
    sources = _sources(view, me, packet, makers or (sender,), is_merged=bool(makers))
    fetch = Fetch(life.fragment, number, sender, packet, num_bytes, sources, norm_bits)
    norms = frozenset(n for n in life.norms if n[0] in life.packets | life.fetching)
    norms |= set() if norm_bits is None else {(packet, norm_bits)}
    return replace(life, fetching=life.fetching | {packet}, norms=norms), (fetch,)


def _sources(view: FragmentView, me: Self, packet: Digest, makers: tuple[PeerId, ...], *, is_merged: bool) -> tuple[PeerId, ...]:
    """Whom to ask for a packet, in this order: everybody who may have it, spread so that not all ask its sender.

    In rounds with reducers few have an offered packet: they are asked first. The merged one has a tree whose root is those who made it: each asks the
    peer above it, then the one above that, so nobody asks hundreds that do not have it. Who asks early comes to the root nevertheless.
    """
    havers = dict.fromkeys((*makers, *(holder for s, holder in view.receipts if s in makers), *view.attesters))
    others = _ordered(me, tuple({*havers, *view.ready}), view.fragment, packet)
    if not view.reducers and not is_merged:
        return others
    first: tuple[PeerId, ...] = tuple(havers)
    if is_merged and me.peer not in makers and len(others) > TREE_FROM:
        below = sorted((p for p in {me.peer, *others} if p not in makers), key=lambda p: rendezvous(view.fragment, packet, p))
        place, above = below.index(me.peer), []
        while place >= FAN_OUT:
            place = place // FAN_OUT - 1
            above.append(below[place])
        first = (*above, *_ordered(me, makers, view.fragment, packet), *first)
    return tuple(dict.fromkeys(p for p in (*first, *others) if p != me.peer))


def _ordered(me: Self, peers: tuple[PeerId, ...], fragment: FragmentId, what: Digest) -> tuple[PeerId, ...]:
    """Everybody but me, spread by rendezvous so that the load of a blob does not fall on its first holder."""
    return tuple(sorted((p for p in peers if p != me.peer), key=lambda p: rendezvous(me.peer, p, fragment, what)))


def _say(life: FragmentLife, key: tuple[str, str], message: MemberMessage) -> Result:
    if key in life.told:
        return life, ()
    return replace(life, told=life.told | {key}), (Say(message),)
