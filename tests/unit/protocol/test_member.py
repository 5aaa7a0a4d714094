"""A peer's life as a machine: what it does about each view, and that a view is state, not an order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import BASE, FRAGMENT, PEERS, digest, offer, packet_of

from decentra.bits import ONE_BITS, float_bits
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol import duties as do
from decentra.protocol import member as m
from decentra.protocol.duties import Ending, FragmentLife, Self, reconcile
from decentra.protocol.member import MemberMachine
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    Counters,
    Entry,
    FragmentView,
    Holding,
    MemberView,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Role,
    Settlement,
    SwarmView,
)

ME, B, C, D, E = PEERS
H = 3
SELF = Self(ME, Role.TRAINER, H)
NEXT = digest("next")
CLIP = float_bits(0.25)


def settlement_of(number: int, base: Digest, *peers: PeerId) -> Settlement:
    entries = tuple(Entry(p, packet_of(p, number), 64, 100, 0, ONE_BITS, CLIP) for p in sorted(peers))
    return Settlement(FRAGMENT, number, number, base, entries, 0, 0, "")


def view(phase: Phase = Phase.OPEN, number: int = 1, anchor: Digest = BASE, **changes: object) -> FragmentView:
    base = FragmentView(FRAGMENT, 1, 0, anchor, number, phase, "", holders=(ME, B), keepers=(C,), cut_off_in_s=10.0, ready=(ME, B, C))
    return replace(base, **changes)  # type: ignore[arg-type]


def confirmed(number: int, base: Digest, anchor: Digest, *peers: PeerId) -> Outcome:
    return Outcome(number, Phase.CONFIRMED, "", settlement_of(number, base, *peers), anchor)


def machine(role: Role = Role.TRAINER, **life: object) -> MemberMachine:
    values: dict[str, object] = {"anchor": BASE, "trains": role is Role.TRAINER, **life}
    found = MemberMachine(Self(ME, role, H), {FRAGMENT: FragmentLife(FRAGMENT, **values)})  # type: ignore[arg-type]
    assert found.handle(m.Connected(), 0.0) == []
    return found


def said(effects: list[do.Effect], kind: type) -> list[object]:
    return [e.message for e in effects if isinstance(e, do.Say) and isinstance(e.message, kind)]


def of(effects: list[do.Effect], kind: type) -> list[do.Effect]:
    return [e for e in effects if isinstance(e, kind)]


def test_one_round_from_offer_to_commit() -> None:
    peer = machine()
    assert said(peer.handle(m.Viewed(view()), 0.0), Holding) == [Holding(ME, FRAGMENT, BASE)]
    assert peer.handle(m.Stepped(H - 1), 0.0) == []
    assert peer.handle(m.Stepped(H), 0.0) == [do.Encode(FRAGMENT, 1, BASE)]
    mine = offer(ME)
    assert peer.handle(m.Encoded(mine), 0.0) == [do.Say(mine)]
    (fetch,) = peer.handle(m.Viewed(view(version=2, offers=(mine, offer(B)))), 0.0)
    assert isinstance(fetch, do.Fetch)
    assert (fetch.sender, fetch.packet, fetch.norm_bits, set(fetch.sources)) == (B, packet_of(B), ONE_BITS, {B, C})
    assert said(peer.handle(m.Fetched(FRAGMENT, packet_of(B)), 0.0), Receipt) == [Receipt(FRAGMENT, 1, ME, B, packet_of(B))]
    settled = settlement_of(1, BASE, ME, B)
    assert peer.handle(m.Viewed(view(Phase.SETTLED, version=3, settlement=settled)), 0.0) == [do.Apply(settled)]
    assert said(peer.handle(m.Applied(FRAGMENT, 1, NEXT), 0.0), Attestation) == [Attestation(FRAGMENT, 1, ME, NEXT)]
    over = view(Phase.OPEN, 2, NEXT, recent=(confirmed(1, BASE, NEXT, ME, B),))
    assert peer.handle(m.Viewed(over), 0.0) == [do.Commit(FRAGMENT, 1, NEXT, Ending.APPLIED, CLIP)]
    assert said(peer.handle(m.Committed(FRAGMENT, NEXT), 0.0), Holding) == [Holding(ME, FRAGMENT, NEXT)]
    life = peer.lives[FRAGMENT]
    assert (life.anchor, life.pending, life.tentative, life.busy) == (NEXT, None, None, "")


def test_settled_without_me_is_excluded_and_without_a_packet_followed() -> None:
    for pending, ending in ((offer(ME), Ending.EXCLUDED), (None, Ending.FOLLOWED)):
        peer = machine(pending=pending, tentative=(1, NEXT))
        effects = peer.handle(m.Viewed(view(Phase.CONFIRMED, 1, NEXT, recent=(confirmed(1, BASE, NEXT, B),))), 0.0)
        assert of(effects, do.Commit) == [do.Commit(FRAGMENT, 1, NEXT, ending)]


def test_a_round_given_up_cancels_the_packet() -> None:
    for phase in (Phase.ABANDONED, Phase.VOID):
        peer = machine(pending=offer(ME))
        effects = peer.handle(m.Viewed(view(phase, recent=(Outcome(1, phase, "no quorum"),))), 0.0)
        assert of(effects, do.Cancel) == [do.Cancel(FRAGMENT, 1, "no quorum")]
        assert not of(peer.handle(m.Tick(), 0.0), do.Cancel), "it is under way"


def test_a_cancelled_packet_is_offered_anew_only_in_another_round() -> None:
    peer = machine(pending=offer(ME), encoded_at_steps=H)
    peer.num_steps = H
    peer.handle(m.Viewed(view(Phase.ABANDONED, recent=(Outcome(1, Phase.ABANDONED, ""),))), 0.0)
    assert not of(peer.handle(m.Cancelled(FRAGMENT), 0.0), do.Encode)
    assert of(peer.handle(m.Viewed(view(Phase.OPEN, 2, recent=(Outcome(1, Phase.ABANDONED, ""),))), 0.0), do.Encode)


def test_a_restart_offers_the_same_packet_again() -> None:
    peer = machine(pending=offer(ME), packets=frozenset({packet_of(ME)}))
    assert said(peer.handle(m.Viewed(view()), 0.0), Offer) == [offer(ME)]
    assert said(peer.handle(m.Viewed(view(version=2)), 0.0), Offer) == []
    peer.handle(m.Disconnected("x"), 0.0)
    peer.handle(m.Connected(), 0.0)
    assert said(peer.handle(m.Viewed(view()), 0.0), Offer) == [offer(ME)], "a new stream may lead to a service that forgot"


def test_a_newcomer_recovers_and_a_peer_far_behind_does_too() -> None:
    for anchor in (None, digest("long ago")):
        peer = machine(anchor=anchor)
        (recover,) = of(peer.handle(m.Viewed(view()), 0.0), do.Recover)
        assert isinstance(recover, do.Recover)
        assert (recover.anchor, set(recover.sources)) == (BASE, {B, C})
        assert of(peer.handle(m.Tick(), 0.0), do.Recover) == []
        assert said(peer.handle(m.Recovered(FRAGMENT, BASE), 0.0), Holding) == [Holding(ME, FRAGMENT, BASE)]


def test_a_peer_a_little_behind_replays_the_rounds() -> None:
    peer = machine(Role.KEEPER)
    last = digest("last")
    recent = (confirmed(1, BASE, NEXT, B), confirmed(2, NEXT, last, B))
    effects = peer.handle(m.Viewed(view(Phase.OPEN, 3, last, recent=recent)), 0.0)
    assert [e.packet for e in effects if isinstance(e, do.Fetch)] == [packet_of(B, 1)]
    assert peer.handle(m.Fetched(FRAGMENT, packet_of(B, 1)), 0.0) == [do.Apply(settlement_of(1, BASE, B))]
    assert peer.handle(m.Applied(FRAGMENT, 1, NEXT), 0.0) == [do.Commit(FRAGMENT, 1, NEXT, Ending.FOLLOWED)]
    effects = peer.handle(m.Committed(FRAGMENT, NEXT), 0.0)
    assert [e.packet for e in effects if isinstance(e, do.Fetch)] == [packet_of(B, 2)]


def test_a_failed_fetch_holds_back_fetches_only() -> None:
    """The fragment's other duties go on at once; the packet is asked for again after a moment."""
    peer = machine()
    peer.handle(m.Viewed(view(Phase.OPEN, 1, offers=(offer(B), offer(C)))), 0.0)
    peer.handle(m.FetchFailed(FRAGMENT, packet_of(B), False), 0.0)
    assert said(peer.handle(m.Fetched(FRAGMENT, packet_of(C)), 0.1), Receipt)
    assert of(peer.handle(m.Tick(), 0.5), do.Fetch) == []
    assert [e.packet for e in of(peer.handle(m.Tick(), 2.0), do.Fetch)] == [packet_of(B)]


def test_replay_gives_way_to_recovery() -> None:
    """When a packet is gone, when it is bad, when applying fails, and when we compute another digest."""
    behind = view(Phase.OPEN, 2, NEXT, recent=(confirmed(1, BASE, NEXT, B),))
    peer = machine()
    peer.handle(m.Viewed(behind), 0.0)
    assert of(peer.handle(m.FetchFailed(FRAGMENT, packet_of(B), False), 0.0), do.Recover)
    peer = machine()
    peer.handle(m.Viewed(behind), 0.0)
    assert of(peer.handle(m.FetchFailed(FRAGMENT, packet_of(B), True), 0.0), do.Recover)
    peer = machine(packets=frozenset({packet_of(B)}))
    assert of(peer.handle(m.Viewed(behind), 0.0), do.Apply)
    peer.handle(m.Failed(FRAGMENT, "disk full"), 0.0)
    assert of(peer.handle(m.Tick(), 5.0), do.Recover)
    peer = machine(tentative=(1, digest("our own result")))
    assert of(peer.handle(m.Viewed(behind), 0.0), do.Recover)
    peer = machine(bad_packets=frozenset({packet_of(B)}))
    assert of(peer.handle(m.Viewed(behind), 0.0), do.Recover)


def test_a_confirmed_round_that_was_rolled_back_is_not_committed() -> None:
    """The service fell back to our anchor: the round we offered in is over, and its result is nobody's."""
    for tentative in (None, (1, NEXT)):
        peer = machine(pending=offer(ME), tentative=tentative)
        effects = peer.handle(m.Viewed(view(Phase.CONFIRMED, 1, BASE, recent=(confirmed(1, BASE, NEXT, ME, B),))), 0.0)
        assert of(effects, do.Commit) == []
        assert len(of(effects, do.Cancel)) == 1


def test_a_round_that_moved_nothing_is_committed() -> None:
    peer = machine(pending=offer(ME), tentative=(1, BASE))
    effects = peer.handle(m.Viewed(view(Phase.CONFIRMED, 1, BASE, recent=(confirmed(1, BASE, BASE, ME, B),))), 0.0)
    assert of(effects, do.Commit) == [do.Commit(FRAGMENT, 1, BASE, Ending.APPLIED, CLIP)]


def test_an_abstention_is_repeated_on_a_new_stream() -> None:
    peer = machine()
    peer.handle(m.Viewed(view()), 0.0)
    assert of(peer.handle(m.Stepped(H), 0.0), do.Encode)
    expected = [Abstention(FRAGMENT, 1, ME, "loss not finite")]
    assert said(peer.handle(m.Skipped(FRAGMENT, 1, "loss not finite"), 0.0), Abstention) == expected
    assert peer.handle(m.Stepped(9 * H), 0.0) == [], "it sat out this round"
    peer.handle(m.Connected(), 0.0)
    assert said(peer.handle(m.Viewed(view()), 0.0), Abstention) == expected
    assert of(peer.handle(m.Viewed(view(number=2)), 0.0), do.Encode)


def test_near_the_cut_off_a_peer_offers_what_it_has() -> None:
    peer = machine()
    peer.handle(m.Viewed(view()), 0.0)
    assert peer.handle(m.Stepped(1), 7.9) == []
    assert of(peer.handle(m.Tick(), 8.0), do.Encode)
    nothing = machine()
    nothing.handle(m.Viewed(view()), 0.0)
    assert nothing.handle(m.Tick(), 9.0) == [], "no step, no offer"


def test_followers_and_keepers_do_not_offer_but_keepers_give_receipts() -> None:
    for role, trains in ((Role.TRAINER, False), (Role.KEEPER, False)):
        peer = machine(role, trains=trains)
        effects = peer.handle(m.Viewed(view(holders=(B,), keepers=(ME, C), offers=(offer(B),))), 0.0)
        peer.num_steps = 100
        assert of(effects + peer.handle(m.Tick(), 9.0), do.Encode) == []
        assert said(peer.handle(m.Fetched(FRAGMENT, packet_of(B)), 0.0), Receipt)
    outsider = machine()
    assert of(outsider.handle(m.Viewed(view(holders=(B,), offers=(offer(B),))), 0.0), do.Fetch) == []


def test_a_bad_packet_is_not_asked_for_again_and_a_lost_one_is() -> None:
    for is_bad in (True, False):
        peer = machine()
        peer.handle(m.Viewed(view(offers=(offer(B),))), 0.0)
        assert peer.handle(m.FetchFailed(FRAGMENT, packet_of(B), is_bad), 0.0) == []
        assert bool(of(peer.handle(m.Tick(), m.RETRY_S), do.Fetch)) is not is_bad


def test_a_packet_offered_again_with_another_norm_gets_no_receipt() -> None:
    """It was screened with the norm of the round before, which was given up: a receipt would vouch for a lie."""
    peer = machine()
    peer.handle(m.Viewed(view(offers=(offer(B),))), 0.0)
    assert said(peer.handle(m.Fetched(FRAGMENT, packet_of(B)), 0.0), Receipt)
    again = replace(offer(B), round=2)
    for norm_bits, is_vouched in ((float_bits(1e-6), False), (ONE_BITS, True)):
        other = machine()
        other.lives = dict(peer.lives)
        effects = other.handle(m.Viewed(view(number=2, offers=(replace(again, norm_bits=norm_bits),))), 0.0)
        assert of(effects, do.Fetch) == []
        expected = [Receipt(FRAGMENT, 2, ME, B, packet_of(B))] if is_vouched else []
        assert said(effects, Receipt) == expected


def test_an_old_view_is_ignored_until_the_stream_is_new() -> None:
    peer = machine()
    peer.handle(m.Viewed(view(number=2, version=7)), 0.0)
    peer.handle(m.Viewed(view(number=1, version=9, anchor=NEXT)), 0.0)
    assert peer.lives[FRAGMENT].view == view(number=2, version=7)
    peer.handle(m.Connected(), 0.0)
    peer.handle(m.Viewed(view(number=1, version=1)), 0.0)
    assert peer.lives[FRAGMENT].view == view(number=1, version=1)


def test_placement_and_the_end() -> None:
    peer = MemberMachine(
        SELF, {f: FragmentLife(f, BASE) for f in (FragmentId("trunk/0"), FragmentId("expert.0/0"), FragmentId("expert.1/0"))}
    )
    peer.handle(m.Connected(), 0.0)
    mine = MemberView(ME, "me", Role.TRAINER, True, (), (1,), Counters())
    (placed,) = peer.handle(m.SwarmViewed(SwarmView(1, (mine,))), 0.0)
    assert placed == do.SetTrained(frozenset({FragmentId("trunk/0"), FragmentId("expert.1/0")}))
    assert peer.handle(m.SwarmViewed(SwarmView(2, (mine,))), 0.0) == [], "placed as before"
    over = SwarmView(3, (mine,), is_stopping=True, is_stopped=True, why="enough")
    assert of(peer.handle(m.SwarmViewed(over), 0.0), do.Finish) == [], "it has seen no view yet"
    effects: list[do.Effect] = []
    for f in peer.lives:
        effects += peer.handle(m.Viewed(replace(view(Phase.IDLE, 0), fragment=f)), 0.0)
    assert of(effects, do.Finish) == [do.Finish("enough")]


# ---------------------------------------------------------------- a view is state, not an order

ANCHORS = (BASE, NEXT, digest("third"))
digests = st.sampled_from(ANCHORS)
senders = st.sets(st.sampled_from(PEERS[:3]), min_size=1)
numbers = st.integers(1, 3)
settlements = st.builds(lambda n, b, p: settlement_of(n, b, *p), numbers, digests, senders)
outcomes = st.builds(
    lambda n, phase, s, a: Outcome(n, phase, "why", replace(s, round=n) if phase is Phase.CONFIRMED else None, a if phase is Phase.CONFIRMED else None),
    numbers, st.sampled_from([Phase.CONFIRMED, Phase.VOID, Phase.ABANDONED]), settlements, digests,
)  # fmt: skip
offers = st.builds(lambda p, n, b: offer(p, n, base=b), st.sampled_from(PEERS[:3]), numbers, digests)


@st.composite
def views(draw: st.DrawFn) -> FragmentView:
    number, phase = draw(numbers), draw(st.sampled_from([Phase.OPEN, Phase.SETTLED, Phase.TENTATIVE, Phase.CONFIRMED, Phase.VOID]))
    anchor = draw(digests)
    settlement = settlement_of(number, anchor, *draw(senders)) if phase in (Phase.SETTLED, Phase.TENTATIVE) else None
    found = {o.peer: replace(o, round=number, base=anchor) for o in draw(st.lists(offers, max_size=3))}
    return view(
        phase, number, anchor, version=draw(st.integers(1, 5)), offers=tuple(found.values()),
        holders=tuple(sorted(draw(st.sets(st.sampled_from(PEERS[:3]))))), settlement=settlement, recent=tuple(draw(st.lists(outcomes, max_size=4))),
    )  # fmt: skip


@st.composite
def lives(draw: st.DrawFn) -> FragmentLife:
    packet_sets = st.frozensets(st.builds(packet_of, st.sampled_from(PEERS[:3]), numbers))
    return FragmentLife(
        FRAGMENT, draw(st.none() | digests), trains=draw(st.booleans()), view=draw(views()),
        pending=draw(st.none() | numbers.map(lambda n: offer(ME, n))), tentative=draw(st.none() | st.tuples(numbers, digests)),
        packets=draw(packet_sets), bad_packets=draw(packet_sets), busy=draw(st.sampled_from(["", "", "encode", "apply", "recover"])),
        sat_out=draw(st.integers(0, 2)), no_replay_to=draw(st.none() | digests),
    )  # fmt: skip


@given(lives(), st.integers(0, 2 * H), st.floats(0, 20))
@settings(max_examples=250)
def test_reconciling_twice_is_reconciling_once(life: FragmentLife, num_steps: int, now: float) -> None:
    once, effects = reconcile(life, SELF, num_steps, now)
    twice, none = reconcile(once, SELF, num_steps, now)
    assert none == ()
    assert twice == once
    operations = [e for e in effects if isinstance(e, do.Encode | do.Apply | do.Commit | do.Cancel | do.Recover)]
    assert len(operations) <= 1, "at most one local operation of a fragment"
    assert not operations or not life.busy
    assert bool(once.busy) == bool(life.busy or operations)
    for effect in effects:
        if isinstance(effect, do.Commit):
            assert life.view is not None
            assert (effect.round, effect.anchor) in {(o.round, o.anchor) for o in life.view.recent if o.phase is Phase.CONFIRMED}
        if isinstance(effect, do.Fetch):
            assert ME not in effect.sources
        if isinstance(effect, do.Encode):
            assert effect.base == life.anchor == life.view.anchor  # type: ignore[union-attr]
            assert life.pending is None


# ---------------------------------------------------------------- a peer that holds only what it trains


def test_a_partial_peer_takes_in_what_it_is_given_at_the_view_it_last_saw() -> None:
    trunk, mine, others = (FragmentId(f) for f in ("trunk/0", "expert.1/0", "expert.0/0"))
    peer = MemberMachine(SELF, {trunk: FragmentLife(trunk, BASE)}, fragments=(trunk, others, mine))
    peer.handle(m.Connected(), 0.0)
    for fragment in (mine, others):
        assert peer.handle(m.Viewed(replace(view(Phase.IDLE, 0), fragment=fragment, ready=(B,))), 0.0) == []
    placed = SwarmView(1, (MemberView(ME, "me", Role.TRAINER, True, (), (1,), Counters()),))
    (trained,) = peer.handle(m.SwarmViewed(placed), 0.0)
    assert trained == do.SetTrained(frozenset({trunk, mine})), "also what it has no room for yet"
    assert mine not in peer.lives
    (recover,) = peer.handle(m.Held(FragmentLife(mine, None)), 1.0)
    assert isinstance(recover, do.Recover)
    assert (recover.fragment, recover.anchor, recover.sources) == (mine, BASE, (B,))
    assert peer.lives[mine].trains
    assert others not in peer.lives
    peer.handle(m.Held(FragmentLife(mine, NEXT)), 1.0)
    assert peer.lives[mine].anchor is None, "it is held once"


def test_a_partial_peer_forgets_views_of_the_stream_before() -> None:
    trunk, mine = FragmentId("trunk/0"), FragmentId("expert.1/0")
    peer = MemberMachine(SELF, {trunk: FragmentLife(trunk, BASE)}, fragments=(trunk, mine))
    peer.handle(m.Connected(), 0.0)
    peer.handle(m.Viewed(replace(view(Phase.IDLE, 0), fragment=mine, version=7)), 0.0)
    peer.handle(m.Viewed(replace(view(Phase.IDLE, 0), fragment=mine, version=6)), 0.0)
    assert peer.unheld[mine].version == 7
    peer.handle(m.Connected(), 1.0)
    assert not peer.unheld
