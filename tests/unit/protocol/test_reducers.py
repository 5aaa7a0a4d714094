"""Reducers: two of the roster make one packet of a round's packets; when they cannot, the round goes on without them and loses one deadline."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from protocol_world import BASE, FRAGMENT, PEERS, RULES, attestation, digest, merge, new_round, offer, packet_of, receipt

from decentra.ids import PeerId
from decentra.protocol import duties as do
from decentra.protocol import fragment as books
from decentra.protocol import ledger
from decentra.protocol import member as m
from decentra.protocol.duties import FragmentLife, Self
from decentra.protocol.fragment import FragmentBook, Present, Timing
from decentra.protocol.member import MemberMachine
from decentra.protocol.messages import FragmentView, Holding, Merge, Merged, Phase, Receipt, Role, Settlement
from decentra.protocol.round import DidSettle, Reject, Round, Suspected, Tick, next_deadline, step, waits_for

A, B, C, D, E = PEERS
PAIR = (B, C)
ANCHOR = digest("anchor a")
TIMING = Timing(cut_off_s=10.0, gather_s=2.0, rollback_s=20.0, reduce_from=3)


def settled(now: float = 1.0) -> Round:
    """Three holders' offers are in and held by the reducers, the last two of them."""
    round_ = new_round(3, has_reducers=True)
    assert round_.reducers == PAIR
    for event in (*(offer(p) for p in (A, B, C)), *(receipt(r, s) for r in PAIR for s in (A, B, C) if r != s)):
        round_, _ = step(round_, event, now, RULES)
    assert round_.phase is Phase.SETTLED
    return round_


def settlement_of(round_: Round) -> Settlement:
    assert round_.settlement is not None
    return round_.settlement


def test_what_both_made_is_the_rounds_packet() -> None:
    round_ = settled()
    assert settlement_of(round_).reducers == PAIR
    assert not settlement_of(round_).is_final
    assert next_deadline(round_, RULES) == 1.0 + RULES.merge_s
    early, effects = step(round_, attestation(A, ANCHOR), 1.5, RULES)
    assert [e.reason for e in effects if isinstance(e, Reject)] == ["early"]
    round_, effects = step(early, replace(merge(B), proof=b"said by B"), 2.0, RULES)
    assert effects == ()
    assert "merged packet of" in waits_for(round_)
    round_, effects = step(round_, replace(merge(C), proof=b"said by C"), 2.0, RULES)
    final = settlement_of(round_)
    assert effects == (DidSettle(final, (b"said by B", b"said by C")),)
    assert final.merged == Merged(merge(B).packet, 32, merge(B).residual)
    assert final.packets == (merge(B).packet,)
    for peer in PAIR:
        round_, effects = step(round_, attestation(peer, ANCHOR), 3.0, RULES)
    assert round_.phase is Phase.TENTATIVE, "the pair alone does not decide what it made"
    lonely, _ = step(round_, Suspected(A), 3.0, RULES)
    assert lonely.phase is Phase.CONFIRMED, "unless nobody else is here"
    round_, effects = step(round_, attestation(A, ANCHOR), 3.0, RULES)
    assert round_.phase is Phase.CONFIRMED


@pytest.mark.parametrize(
    ("events", "now", "why", "failed"),
    [
        ((merge(B), merge(C, variant=1)), 2.0, "different packets", PAIR),
        ((merge(B), Suspected(C)), 2.0, "is gone", (C,)),
        ((Suspected(C),), 2.0, "is gone", (C,)),
        ((merge(B), Tick()), 1.0 + RULES.merge_s, "merged nothing", (C,)),
        ((Tick(),), 1.0 + RULES.merge_s, "merged nothing", PAIR),
    ],
)
def test_without_their_packet_everybody_fetches_all(events: tuple[object, ...], now: float, why: str, failed: tuple[PeerId, ...]) -> None:
    round_, effects = settled(), list[object]()
    for event in events:
        round_, more = step(round_, event, now, RULES)  # type: ignore[arg-type]
        effects += more
    final = settlement_of(round_)
    assert effects == [DidSettle(final)]
    assert (final.reducers, final.merged, final.failed) == ((), None, failed)
    assert why in final.why
    assert final.packets == tuple(packet_of(p) for p in (A, B, C))
    assert next_deadline(round_, RULES) == now + RULES.attest_s + 10, "the time to attest begins anew, with time to fetch"
    assert step(round_, merge(C), now, RULES)[1] == (), "a late merge is no mistake"


def test_reducers_that_give_no_receipts_lose_their_part_at_the_cut_off() -> None:
    """They may not reach anybody: two machines behind routers."""
    round_ = new_round(3, has_reducers=True)
    for event in (offer(A), offer(B), offer(C)):
        round_, _ = step(round_, event, 1.0, RULES)
    assert round_.live_reducers == PAIR
    round_, effects = step(round_, Tick(), 10.0, RULES)
    assert (round_.phase, round_.live_reducers, effects) == (Phase.OPEN, (), ())
    for event in (receipt(A, B), receipt(A, C), receipt(B, A)):
        round_, _ = step(round_, event, 11.0, RULES)
    assert settlement_of(round_).is_final
    assert round_.phase is Phase.SETTLED


def test_a_reducer_that_is_gone_at_settling_is_not_waited_for() -> None:
    round_ = new_round(3, has_reducers=True)
    round_, _ = step(round_, Suspected(C), 1.0, RULES)
    for event in (offer(A), offer(B), receipt(B, A), receipt(A, B)):
        round_, _ = step(round_, event, 1.0, RULES)
    assert settlement_of(round_).is_final
    assert round_.live_reducers == ()


def test_only_reducers_merge_and_each_says_one_thing() -> None:
    round_ = settled()
    for event, reason in ((merge(A), "not-a-reducer"), (replace(merge(B), num_bytes=0), "malformed")):
        after, effects = step(round_, event, 2.0, RULES)
        assert after == round_
        assert [e.reason for e in effects if isinstance(e, Reject)] == [reason]
    round_, _ = step(round_, merge(B), 2.0, RULES)
    after, effects = step(round_, merge(B, variant=1), 2.0, RULES)
    assert after == round_
    assert [e.reason for e in effects if isinstance(e, Reject)] == ["two-digests"]


# ---------------------------------------------------------------- the service's book


class Book:
    """Four holders and a book that asks for reducers from three on."""

    def __init__(self) -> None:
        self.book, self.records = FragmentBook(FRAGMENT, BASE), list[ledger.Record]()
        self.present = Present(frozenset((A, B, C, D)))
        self.now = 0.0

    def do(self, step: books.Step) -> None:
        self.book, effects = step
        self.records += [e.record for e in effects if isinstance(e, books.Write)]

    def open(self) -> Round:
        for peer in sorted(self.present.roster):
            self.book = books.hold(self.book, Holding(peer, FRAGMENT, self.book.anchor))
        self.do(books.tick(self.book, self.present, self.now, RULES, TIMING, may_open=True))
        assert self.book.active is not None
        return self.book.active

    def finish(self, *, merged_by: tuple[object, ...]) -> None:
        """The open round to its confirmation; ``merged_by``: reducers that do their part."""
        round_ = self.open()
        holders, number, base = sorted(round_.holders), round_.number, round_.base
        pair = round_.reducers or tuple(holders[:2])
        messages: list[object] = [offer(p, number, base=base) for p in holders]
        messages += [receipt(r, s, number) for r in pair for s in holders if s != r]
        messages += [merge(p, number) for p in pair if p in merged_by]
        for message in messages:
            self.do(books.hear(self.book, message, self.now, RULES))  # type: ignore[arg-type]
        self.now += RULES.merge_s
        self.do(books.tick(self.book, self.present, self.now, RULES, TIMING, may_open=False))
        for peer in holders:
            self.do(books.hear(self.book, attestation(peer, digest(f"anchor {number}"), number), self.now, RULES))
        assert self.book.active is None
        assert self.book.height == number


def test_the_pair_is_sticky_and_its_residual_goes_on() -> None:
    b = Book()
    pair = b.open().reducers
    assert len(pair) == 2
    b.finish(merged_by=pair)
    second = b.open()
    assert (second.reducers, second.residual) == (pair, merge(A, 1).residual)
    b.finish(merged_by=pair)
    assert b.book.residual == merge(A, 2).residual
    restored = FragmentBook(FRAGMENT, BASE)
    for record in b.records:
        restored = books.restore(restored, record, b.now, TIMING)
    assert (restored.reducers, restored.residual, restored.height) == (b.book.reducers, b.book.residual, 2)


def test_a_reducer_that_failed_or_left_is_replaced_and_a_residual_nobody_merges_is_given_up() -> None:
    b = Book()
    pair = b.open().reducers
    b.finish(merged_by=pair)
    b.finish(merged_by=pair[:1])
    third = b.open()
    assert pair[0] in third.reducers
    assert pair[1] not in third.reducers
    assert third.residual == merge(A, 1).residual, "the newcomer fetches it"
    b.finish(merged_by=())
    assert b.open().residual == merge(A, 1).residual, "it may have been bad luck"
    b.finish(merged_by=())
    assert b.open().residual is None, "twice in a row: nobody seems to have it"
    b.present = Present(b.present.holders - {third.reducers[0]})
    b.finish(merged_by=b.open().reducers)
    assert third.reducers[0] not in b.open().reducers


def test_a_pair_that_nobody_hears_of_is_replaced_and_keepers_come_first() -> None:
    b = Book()
    first = b.open()
    b.now = first.cut_off_at
    for _ in range(2):
        b.do(books.tick(b.book, b.present, b.now, RULES, TIMING, may_open=False))
        b.now += RULES.grace_s
    assert b.book.recent[-1].phase is Phase.ABANDONED
    assert not set(b.open().reducers) & set(first.reducers)
    b = Book()
    b.finish(merged_by=b.open().reducers)
    b.present = Present(b.present.holders, frozenset((E,)))
    assert E in b.open().reducers, "it can be reached by all"
    b = Book()
    b.present = Present(b.present.holders, limited=frozenset(first.reducers))
    assert not set(b.open().reducers) & set(first.reducers), "their owners limit the uplink"


def test_a_restarted_service_judges_alike() -> None:
    b = Book()
    pair = b.open().reducers
    b.finish(merged_by=pair)
    b.finish(merged_by=pair[:1])
    restored = FragmentBook(FRAGMENT, BASE)
    for record in b.records:
        restored = books.restore(restored, record, b.now, TIMING)
    assert restored.failed_reducers == b.book.failed_reducers == {pair[1]}
    assert (restored.residual, restored.num_merges_missed) == (b.book.residual, b.book.num_merges_missed)


def test_few_holders_need_no_reducers() -> None:
    b = Book()
    b.present = Present(frozenset((A, B)), frozenset((C,)))
    assert b.open().reducers == ()


# ---------------------------------------------------------------- a member's part


def view(phase: Phase, **changes: object) -> FragmentView:
    base = FragmentView(
        FRAGMENT, 1, 0, BASE, 1, phase, "", holders=(A, B, C, D), reducers=PAIR, cut_off_in_s=10.0, ready=(A, B, C, D),
        offers=tuple(offer(p) for p in (A, B, C, D)),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def machine(me: PeerId) -> MemberMachine:
    found = MemberMachine(Self(me, Role.TRAINER, 3), {FRAGMENT: FragmentLife(FRAGMENT, BASE, trains=True)})
    found.handle(m.Connected(), 0.0)
    return found


def of(effects: list[do.Effect], kind: type) -> list[do.Effect]:
    return [e for e in effects if isinstance(e, kind)]


def in_view(round_: Round) -> FragmentView:
    return view(Phase.SETTLED, settlement=settlement_of(round_), version=2)


def test_only_reducers_fetch_offered_packets() -> None:
    others = [of(machine(p).handle(m.Viewed(view(Phase.OPEN)), 0.0), do.Fetch) for p in (A, D)]
    assert sorted(map(len, others)) == [0, 2], "one witness holds the reducers' own packets: they may not reach each other"
    assert {f.sender for fetched in others for f in fetched if isinstance(f, do.Fetch)} == set(PAIR)
    fetches = of(machine(B).handle(m.Viewed(view(Phase.OPEN)), 0.0), do.Fetch)
    assert {f.sender for f in fetches if isinstance(f, do.Fetch)} == {A, B, C, D}
    assert len(of(machine(A).handle(m.Viewed(view(Phase.OPEN, reducers=())), 0.0), do.Fetch)) == 4


def test_a_reducer_merges_says_so_and_applies_the_merged_packet() -> None:
    reducer, round_ = machine(B), settled()
    reducer.handle(m.Viewed(view(Phase.OPEN)), 0.0)
    for peer in (A, B, C):
        effects = reducer.handle(m.Fetched(FRAGMENT, packet_of(peer)), 0.0)
    assert {e.message.sender for e in of(effects, do.Say) if isinstance(e, do.Say) and isinstance(e.message, Receipt)} == {C}
    effects = reducer.handle(m.Viewed(in_view(round_)), 1.0)
    assert of(effects, do.Reduce) == [], "what earlier merges left out is not here"
    (fetch,) = of(effects, do.Fetch)
    assert isinstance(fetch, do.Fetch)
    assert (fetch.packet, fetch.is_residual, fetch.sources[0]) == (settlement_of(round_).residual, True, C)
    effects = reducer.handle(m.Fetched(FRAGMENT, fetch.packet), 1.0)
    assert of(effects, do.Reduce) == [do.Reduce(settlement_of(round_))]
    assert of(effects, do.Apply) == []
    assert do.Say(merge(B)) in reducer.handle(m.Reduced(merge(B)), 1.0)
    reducer.handle(m.Disconnected("cut"), 1.0)
    reducer.handle(m.Connected(), 1.0)
    assert do.Say(merge(B)) in reducer.handle(m.Viewed(in_view(round_)), 1.0), "said again on a new stream"
    for event in (merge(B), merge(C)):
        round_, _ = step(round_, event, 1.0, RULES)
    assert of(reducer.handle(m.Viewed(in_view(round_)), 2.0), do.Apply) == [do.Apply(settlement_of(round_))]


def test_a_residual_is_fetched_while_the_round_is_open_and_hinders_nothing() -> None:
    reducer, residual = machine(B), digest("left 0 0")
    effects = reducer.handle(m.Viewed(view(Phase.OPEN, residual=residual)), 0.0)
    assert [f.packet for f in of(effects, do.Fetch) if isinstance(f, do.Fetch) and f.is_residual] == [residual]
    assert reducer.lives[FRAGMENT].busy == ""


def test_the_others_wait_for_the_merged_packet_and_fetch_nothing_else() -> None:
    other, round_ = machine(A), settled()
    assert of(other.handle(m.Viewed(in_view(round_)), 1.0), do.Fetch) == []
    for event in (merge(B), merge(C)):
        round_, _ = step(round_, event, 1.0, RULES)
    final = settlement_of(round_)
    effects = other.handle(m.Viewed(replace(in_view(round_), version=3)), 1.0)
    assert [f.packet for f in of(effects, do.Fetch) if isinstance(f, do.Fetch)] == [merge(B).packet]
    assert of(other.handle(m.Fetched(FRAGMENT, merge(B).packet), 1.0), do.Apply) == [do.Apply(final)]


def test_a_merge_of_an_old_round_is_not_said() -> None:
    reducer = machine(B)
    reducer.lives[FRAGMENT] = replace(reducer.lives[FRAGMENT], merge=merge(B, 7))
    effects = reducer.handle(m.Viewed(in_view(settled())), 1.0)
    assert not any(isinstance(e, do.Say) and isinstance(e.message, Merge) for e in effects)


def test_a_merged_packet_goes_down_a_tree() -> None:
    """Nobody is asked first by more than eight, everybody's way ends at who made it, and nobody asks itself."""
    peers = [PeerId(f"p{i:03}") for i in range(100)]
    makers = (peers[3], peers[50])
    view = FragmentView(FRAGMENT, 1, 3, BASE, 4, Phase.SETTLED, "", holders=tuple(peers), reducers=makers, ready=tuple(peers))
    first: Counter[PeerId] = Counter()
    for peer in peers:
        sources = do._sources(view, Self(peer, Role.TRAINER, 1), digest("merged"), makers, is_merged=True)
        assert sorted((*sources, peer)) == peers, "in the end everybody may be asked"
        assert min(sources.index(m) for m in makers if m != peer) <= 3, "soon those who surely have it"
        first[sources[0]] += 1
    assert max(first[p] for p in peers if p not in makers) <= do.FAN_OUT
    assert sum(first[m] for m in makers) <= do.FAN_OUT + len(makers)


def test_reducers_ask_the_sender_first_and_whoever_gave_a_receipt() -> None:
    peers = [PeerId(f"p{i:03}") for i in range(30)]
    view = FragmentView(
        FRAGMENT, 1, 3, BASE, 4, Phase.OPEN, "", holders=tuple(peers), reducers=(A, B), ready=tuple(peers), receipts=((peers[7], B),)
    )
    sources = do._sources(view, Self(A, Role.TRAINER, 1), digest("packet"), (peers[7],), is_merged=False)
    assert sources[:2] == (peers[7], B)
