"""The book of one fragment: one active round, numbers that never repeat, opening, roll-back, and a restart that loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import BASE, FRAGMENT, PEERS, RULES, attestation, digest, offer, packet_of, receipt

from decentra.ids import PeerId
from decentra.protocol import fragment as books
from decentra.protocol import ledger
from decentra.protocol.fragment import FragmentBook, Present, Timing, Write
from decentra.protocol.messages import Abstention, Holding, Phase
from decentra.protocol.round import Reject

A, B, C, D, E = PEERS
TIMING = Timing(cut_off_s=10.0, gather_s=2.0, rollback_s=20.0)


@dataclass
class Desk:
    """A book with its clock and everything it wrote; each call checks the law."""

    book: FragmentBook
    present: Present
    now: float = 0.0
    may_open: bool = True

    def __post_init__(self) -> None:
        self.records: list[ledger.Record] = []
        self.rejects: list[Reject] = []

    def take(self, step: books.Step) -> None:
        before, (self.book, effects) = self.book, step
        self.records += [e.record for e in effects if isinstance(e, Write)]
        self.rejects += [e for e in effects if isinstance(e, Reject)]
        assert self.book.version >= before.version
        assert before == self.book or self.book.version > before.version or self.book.orphan_since != before.orphan_since
        assert self.book.number - before.number == sum(isinstance(e, Write) and isinstance(e.record, ledger.Opened) for e in effects)

    def hear(self, *messages: object) -> None:
        for message in messages:
            self.take(books.hear(self.book, message, self.now, RULES))  # type: ignore[arg-type]
            self.tick()

    def hold(self, *peers: PeerId, anchor: str | None = None) -> None:
        for peer in peers:
            self.book = books.hold(self.book, Holding(peer, FRAGMENT, anchor or self.book.anchor))  # type: ignore[arg-type]
        self.tick()

    def tick(self, wait_s: float = 0.0) -> None:
        self.now += wait_s
        self.take(books.tick(self.book, self.present, self.now, RULES, TIMING, may_open=self.may_open))

    def lose(self, peer: PeerId) -> None:
        p = self.present
        self.present = Present(p.holders - {peer}, p.keepers - {peer}, p.followers - {peer})
        self.take(books.gone(self.book, peer, self.now, RULES))
        self.tick()

    def confirm_round(self, anchor: str) -> None:
        """Everybody present takes part in the active round."""
        assert self.book.active is not None
        number, active = self.book.number, self.book.active
        for peer in sorted(active.holders):
            self.hear(offer(peer, number, base=self.book.anchor))
        for peer in sorted(active.holders):
            if other := next((p for p in sorted(active.roster) if p != peer), None):
                self.hear(receipt(other, peer, number))
        for peer in sorted(active.roster):
            self.hear(attestation(peer, digest(anchor), number))

    def kinds(self) -> list[str]:
        return [type(r).__name__ for r in self.records]


def desk(holders: Sequence[PeerId] = (A, B), keepers: Sequence[PeerId] = (), followers: Sequence[PeerId] = ()) -> Desk:
    return Desk(FragmentBook(FRAGMENT, BASE), Present(frozenset(holders), frozenset(keepers), frozenset(followers)))


def restored(desk: Desk) -> FragmentBook:
    book = FragmentBook(FRAGMENT, BASE)
    for record in desk.records:
        book = books.restore(book, record, desk.now, TIMING)
    return book


def test_the_first_round_waits_for_all_then_for_the_gathering_time() -> None:
    d = desk((A, B), (C,))
    d.hold(A)
    assert d.book.active is None
    assert "gathers" in books.waits_for(d.book, d.present)
    d.tick(2.0)
    assert d.book.active is not None
    assert d.book.active.roster == {A}
    d = desk((A, B), (C,))
    d.hold(A, B, C)
    assert d.book.active is not None
    assert (d.book.active.holders, d.book.active.keepers) == ({A, B}, {C})


def test_who_is_late_is_waited_for_longer_the_next_time() -> None:
    """A slow line that needs more than the gathering time must not be left behind for ever."""
    d = desk((A, B))
    d.hold(A, B)
    waits = []
    for number in range(1, 5):
        assert d.book.active is not None
        for peer, other in ((A, B), (B, A)):
            d.hear(offer(peer, number, base=d.book.anchor), receipt(other, peer, number))
        d.book = replace(d.book, holdings={A: d.book.anchor, B: d.book.anchor})
        anchor = digest(f"anchor {number}")
        d.present = Present(frozenset((A, B)), frozenset((C,)))
        d.hear(attestation(A, anchor, number))
        d.take(books.hear(d.book, attestation(B, anchor, number), d.now, RULES))
        d.book = replace(d.book, holdings={A: anchor, B: BASE if number == 1 else d.book.history[-1][0]})  # B is still at it
        start = d.now
        while d.book.active is None:
            d.tick(0.5)
        waits.append(d.now - start)
        d.book = replace(d.book, round=replace(d.book.round, holders=frozenset((A, B))))
    assert waits == [2.0, 4.0, 8.0, 10.0], "up to the time of a round"


def test_a_follower_is_in_no_roster_and_nobody_waits_for_it() -> None:
    d = desk((A,), (C,), (D,))
    d.hold(A, C)
    assert d.book.active is not None
    assert d.book.active.roster == {A, C}
    d.hold(D)
    assert books.view(d.book, d.present, d.now).ready == (A, C, D), "but others may fetch from it"


def test_a_confirmed_round_moves_the_anchor_and_opens_the_next_on_it() -> None:
    d = desk((A, B))
    d.hold(A, B)
    d.confirm_round("one")
    assert (d.book.anchor, d.book.height) == (digest("one"), 1)
    assert d.book.active is not None, "both attested, so both are ready"
    assert (d.book.number, d.book.active.base) == (2, digest("one"))
    assert d.kinds() == ["Opened", "Settled", "Confirmed", "Opened"]
    assert d.book.tally.num_confirmed == 1
    assert d.book.tally.num_tokens == 200


def test_without_a_holder_no_round_opens() -> None:
    d = desk((), (C,))
    d.hold(C)
    d.tick(100)
    assert d.book.active is None
    assert "nobody present trains it" in books.waits_for(d.book, d.present)


def test_an_ending_run_finishes_its_round_and_opens_no_other() -> None:
    d = desk((A, B))
    d.hold(A, B)
    d.may_open = False
    d.confirm_round("one")
    d.tick(100)
    assert d.book.height == 1
    assert d.book.active is None


def test_an_offer_of_the_future_is_rejected_and_one_of_the_past_is_not_heard() -> None:
    d = desk((A, B))
    d.hold(A, B)
    d.hear(offer(A, 7))
    assert [r.reason for r in d.rejects] == ["future"]
    d.confirm_round("one")
    before = d.book
    d.hear(offer(A, 1))
    assert d.book == before
    assert len(d.rejects) == 1


def test_a_late_attester_is_ready() -> None:
    d = desk((A, B), (C,))
    d.hold(A, B, C)
    for message in (offer(A), offer(B), receipt(B, A), receipt(A, B), attestation(A, digest("x")), attestation(B, digest("x"))):
        d.hear(message)
    assert d.book.anchor == digest("x")
    assert C not in d.book.ready(d.present).all
    d.hear(attestation(C, digest("x")))
    assert C in d.book.ready(d.present).all
    d.hear(attestation(D, digest("y")))
    assert D not in d.book.holdings


def test_rolled_back_when_nobody_has_the_anchor_and_not_before_the_time() -> None:
    d = desk((A, B), (), (D,))
    d.hold(A, B)
    d.hold(D)
    d.confirm_round("one")
    d.lose(A)
    d.lose(B)
    d.tick(TIMING.rollback_s - 1)
    assert d.book.height == 1
    d.tick(5)
    assert d.book.height == 1, "with nobody to train it there is no hurry"
    d.present = replace(d.present, holders=frozenset({E}))
    d.tick()
    assert (d.book.anchor, d.book.height) == (BASE, 0), "the follower still has the genesis anchor"
    assert d.kinds()[-1] == "RolledBack"
    number = d.book.number
    d.hold(E)
    assert (d.book.number, d.book.active and d.book.active.base) == (number + 1, BASE), "round numbers go on"


def test_an_anchor_that_nobody_trains_is_rolled_back_later() -> None:
    d = desk((A, B), (), (D,))
    d.hold(A, B)
    d.hold(D)
    d.confirm_round("one")
    d.lose(A)
    d.lose(B)
    d.tick(books.IDLE_PATIENCE * TIMING.rollback_s - 1)
    assert d.book.height == 1
    d.tick(1)
    assert d.book.height == 0


def test_a_follower_that_has_the_anchor_saves_it() -> None:
    d = desk((A, B), (), (D,))
    d.hold(A, B)
    d.confirm_round("one")
    d.hold(D)
    d.lose(A)
    d.lose(B)
    d.present = replace(d.present, holders=frozenset({E}))
    d.tick(100)
    d.tick(100)
    assert d.book.height == 1


def test_nothing_to_roll_back_to_waits() -> None:
    d = desk((A, B))
    d.hold(A, B)
    d.confirm_round("one")
    d.lose(A)
    d.lose(B)
    d.present = Present(frozenset({E}))
    d.tick(100)
    d.tick(100)
    assert d.book.height == 1
    assert books.waits_for(d.book, d.present) == "nobody present holds its anchor"


def test_after_an_abandoned_round_the_next_has_a_longer_cut_off() -> None:
    d = desk((A, B))
    d.hold(A, B)
    d.tick(TIMING.cut_off_s + RULES.grace_s)
    d.tick()
    assert d.book.recent[-1].phase is Phase.ABANDONED
    assert d.book.active is not None
    assert d.book.active.cut_off_at - d.now == 2 * TIMING.cut_off_s


# ---------------------------------------------------------------- any story

peers = st.sampled_from(PEERS[:4])
moves = st.one_of(
    st.tuples(st.just("hold"), peers, st.booleans()),
    st.tuples(st.just("offer"), peers, st.integers(0, 1)),
    st.tuples(st.just("receipt"), peers, peers),
    st.tuples(st.just("attest"), peers, st.sampled_from("aab")),
    st.tuples(st.just("abstain"), peers, st.just(0)),
    st.tuples(st.just("gone"), peers, st.just(0)),
    st.tuples(st.just("back"), peers, st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 11.0, 30.0]), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)
MEMBERS = Present(frozenset({A, B}), frozenset({C}), frozenset({D}))


def act(d: Desk, move: tuple[str, object, object]) -> None:
    kind, who, what = move
    number, base = d.book.number, d.book.anchor
    match kind:
        case "hold":
            d.hold(who, anchor=None if what else BASE)  # type: ignore[arg-type]
        case "offer":
            d.hear(offer(who, number, base=base, variant=what))  # type: ignore[arg-type]
        case "receipt":
            known = d.book.active.offer_of(what) if d.book.active is not None else None  # type: ignore[arg-type]
            d.hear(replace(receipt(who, what, number), packet=known.packet if known else packet_of(what, number)))  # type: ignore[arg-type]
        case "attest":
            d.hear(attestation(who, digest(f"{base} {number} {what}"), number))  # type: ignore[arg-type]
        case "abstain":
            d.hear(Abstention(FRAGMENT, number, who, "why"))  # type: ignore[arg-type]
        case "gone":
            d.lose(who)  # type: ignore[arg-type]
        case "back":
            p = d.present
            d.present = Present(
                *(
                    now | ({who} & all_)
                    for now, all_ in zip(
                        (p.holders, p.keepers, p.followers), (MEMBERS.holders, MEMBERS.keepers, MEMBERS.followers), strict=True
                    )
                )
            )  # type: ignore[arg-type]
            d.take(books.back(d.book, who, d.now, RULES))  # type: ignore[arg-type]
            d.tick()
        case "wait":
            d.tick(who)  # type: ignore[arg-type]
        case "restart":
            d.book = restored(d)
            d.tick()


@given(st.lists(moves, max_size=60))
@settings(max_examples=200)
def test_any_story_keeps_the_law_and_survives_a_restart_at_its_end(story: list[tuple[str, object, object]]) -> None:
    d = Desk(FragmentBook(FRAGMENT, BASE), MEMBERS)
    for move in story:
        act(d, move)
        check_book(d)
    again = restored(d)
    for name in ("anchor", "height", "number", "history", "tally"):
        assert getattr(again, name) == getattr(d.book, name), name
    assert [(o.round, o.phase, o.anchor, o.settlement) for o in again.recent] == [
        (o.round, o.phase, o.anchor, o.settlement) for o in d.book.recent
    ]
    assert (again.active is None) == (d.book.active is None)
    if again.active is not None and d.book.active is not None:
        assert (again.active.roster, again.active.base, again.active.settlement) == (
            d.book.active.roster, d.book.active.base, d.book.active.settlement,
        )  # fmt: skip


def check_book(d: Desk) -> None:
    opened = [r.round for r in d.records if isinstance(r, ledger.Opened)]
    assert opened == list(range(1, len(opened) + 1)), "numbers never repeat"
    ended = [r.round for r in d.records if isinstance(r, ledger.Confirmed | ledger.GaveUp)]
    assert ended == opened[: len(ended)], "a round opens when the one before it is over"
    assert len(opened) - len(ended) == (d.book.active is not None)
    if (active := d.book.active) is not None:
        assert (active.base, active.number) == (d.book.anchor, d.book.number)
    assert d.book.height == len(d.book.history) or any(isinstance(r, ledger.RolledBack) for r in d.records)
    deadline = books.next_deadline(d.book, d.present, RULES, TIMING)
    assert deadline is not None or not d.book.ready(d.present).holders
    view = books.view(d.book, d.present, d.now)
    assert (view.anchor, view.height, view.round) == (d.book.anchor, d.book.height, d.book.number)
    assert view.why


def test_the_organiser_sends_it_to_another_anchor_and_the_round_under_way_is_given_up() -> None:
    d = desk((A, B), (C,))
    d.hold(A, B, C)
    d.confirm_round("one")
    d.confirm_round("two")
    assert d.book.active is not None
    number = d.book.number
    d.take(books.roll_back(d.book, 1, digest("one"), "a liar was in", d.now))
    assert d.kinds()[-2:] == ["GaveUp", "RolledBack"]
    assert (d.book.anchor, d.book.height, d.book.active) == (digest("one"), 1, None)
    assert (d.book.round.phase if d.book.round else None, d.records[-1].why) == (Phase.ABANDONED, "a liar was in")  # type: ignore[union-attr]
    assert restored(d).anchor == d.book.anchor
    assert restored(d).history == d.book.history
    before = d.book
    d.take(books.roll_back(d.book, 1, digest("one"), "said again", d.now))
    assert d.book == before, "an order that is done is done"
    d.hold(A, B, C)
    assert d.book.active is not None
    assert (d.book.active.base, d.book.active.height, d.book.number) == (digest("one"), 1, number + 1), "round numbers go on"
    offers = [offer(p, d.book.number, base=d.book.anchor) for p in (A, B)]
    d.hear(*offers, receipt(B, A, d.book.number), receipt(A, B, d.book.number))
    assert d.book.active.phase is Phase.SETTLED
    d.take(books.roll_back(d.book, 1, digest("other"), "", d.now))
    assert d.records[-2].phase is Phase.VOID, "settled, and not confirmed"  # type: ignore[union-attr]


def test_an_anchor_that_nobody_brings_leads_back_to_what_members_hold() -> None:
    d = desk((A, B), (C,))
    d.hold(A, B, C)
    d.confirm_round("one")
    d.take(books.roll_back(d.book, 1, digest("computed anew"), "by the organiser", d.now))
    d.tick()
    assert "nobody present holds its anchor" in books.waits_for(d.book, d.present)
    d.tick(TIMING.rollback_s)
    assert (d.book.anchor, d.book.height) == (digest("one"), 1)
    assert restored(d).anchor == digest("one")
    d.tick()
    assert d.book.active is not None
    assert d.book.active.base == digest("one")


def test_what_was_left_is_no_way_back_from_a_newer_branch() -> None:
    """The organiser went back to height 1; when the newest anchor of that branch is lost, its own anchors count before the higher ones that were left."""
    d = desk((A, B), (C,), (D,))
    d.hold(A, B, C)
    for name in ("one", "two", "three"):
        d.confirm_round(name)
    d.hold(D)  # keeps the anchor that was left
    left = d.book.anchor
    d.take(books.roll_back(d.book, 1, digest("one"), "", d.now))
    d.hold(A, B, C)
    d.may_open = False
    d.confirm_round("other two")
    d.hold(A, B, C, anchor=digest("one"))
    d.tick(TIMING.rollback_s)
    assert d.book.holdings[D] == left
    assert (d.book.anchor, d.book.height) == (digest("one"), 1)
