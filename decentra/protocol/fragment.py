"""The averaging service's book of one fragment: its confirmed anchor, who holds it, its rounds, when the next one opens. Pure values.

The law: at most one active round; a round opens on the confirmed anchor with those who hold it; round numbers never repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from decentra.ids import Digest, FragmentId, PeerId, short
from decentra.protocol import ledger
from decentra.protocol import round as rounds
from decentra.protocol.deadline import cut_off_s
from decentra.protocol.messages import Abstention, Attestation, FragmentView, Holding, Merge, Offer, Outcome, Phase, Receipt, Tally
from decentra.protocol.placement import rendezvous
from decentra.protocol.round import DidCondemn, Reject, Round, Rules

NUM_RECENT = 8
NUM_HISTORY = 256
NUM_ARRIVALS = 20
NUM_REDUCERS = 2
NUM_MERGES_MISSED = 2  # in a row: then the residual is given up, since nobody seems to have it
MAX_PATIENCE = 6
CUT_SHORT = 1.5  # a round that its cut-off ended would have taken so many times as long
TERM_GAP = 1000  # rounds of a new term begin so many numbers later: the old service may have opened some that nobody knows of here
IDLE_PATIENCE = 5  # times the roll-back time while nobody present trains the fragment


@dataclass(frozen=True, slots=True)
class Timing:
    """Parts of the manifest's RoundSpec that concern opening. Seconds."""

    cut_off_s: float
    gather_s: float
    rollback_s: float
    reduce_from: int | None = None  # holders


@dataclass(frozen=True, slots=True)
class Present:
    """Members that are here: trainers that hold the module, keepers, and trainers that only follow it.

    Followers are never in a roster, but they have anchors like everybody: others recover from them, and what they hold is not lost.
    """

    holders: frozenset[PeerId] = frozenset()
    keepers: frozenset[PeerId] = frozenset()
    followers: frozenset[PeerId] = frozenset()
    limited: frozenset[PeerId] = frozenset()  # of these: not asked to reduce
    awaited: frozenset[PeerId] = frozenset()  # here when the service stopped, and not heard of since it started again

    @property
    def roster(self) -> frozenset[PeerId]:
        """Who may be in a round."""
        return self.holders | self.keepers

    @property
    def all(self) -> frozenset[PeerId]:
        return self.holders | self.keepers | self.followers


@dataclass(frozen=True, slots=True)
class FragmentBook:
    """State of one fragment at the service."""

    fragment: FragmentId
    anchor: Digest
    height: int = 0
    number: int = 0  # of the newest round
    gap: int = 0  # numbers that the next round leaves out
    may_lack: bool = False  # rounds: another service took over from a copy, and no round was confirmed since
    round: Round | None = None
    holdings: Mapping[PeerId, Digest] = field(default_factory=dict)  # what each member last said it holds
    history: tuple[tuple[Digest, int], ...] = ()  # (anchor, height), oldest first
    recent: tuple[Outcome, ...] = ()
    arrivals_s: tuple[float, ...] = ()
    patience: int = 0  # how often the gathering time is doubled: somebody present was not ready when it was over
    idle_since: float = 0.0
    orphan_since: float | None = None
    version: int = 0
    tally: Tally = field(default_factory=Tally)
    reducers: tuple[PeerId, ...] = ()  # of the newest round that had some
    residual: Digest | None = None  # of the newest confirmed merge
    failed_reducers: frozenset[PeerId] = frozenset()  # of the newest round with reducers: who did not do their part
    num_merges_missed: int = 0  # in a row

    def ready(self, present: Present) -> Present:
        """Those present who hold the confirmed anchor."""
        has = frozenset(p for p, digest in self.holdings.items() if digest == self.anchor)
        return Present(present.holders & has, present.keepers & has, present.followers & has, present.limited)

    @property
    def active(self) -> Round | None:
        return self.round if self.round is not None and self.round.is_active else None


@dataclass(frozen=True, slots=True)
class Write:
    """Put a record on the ledger before anybody hears of it."""

    record: ledger.Record


FragmentEffect = Write | Reject | DidCondemn
Step = tuple[FragmentBook, tuple[FragmentEffect, ...]]


def hear(book: FragmentBook, message: Offer | Receipt | Merge | Abstention | Attestation, now: float, rules: Rules) -> Step:
    """A member's message about a round of this fragment."""
    if book.active is not None and message.round == book.active.number:
        return _advance(book, message, now, rules)
    if isinstance(message, Attestation) and message.anchor == book.anchor:
        return _hold(book, Holding(message.peer, book.fragment, message.anchor)), ()
    return book, _late(book, message)


def hold(book: FragmentBook, holding: Holding) -> FragmentBook:
    """A member says which anchor it has on disk."""
    return _hold(book, holding)


def forget(book: FragmentBook, peer: PeerId) -> FragmentBook:
    """A member came anew: what it held before is what it says now."""
    if peer not in book.holdings:
        return book
    return replace(book, holdings={p: d for p, d in book.holdings.items() if p != peer}, version=book.version + 1)


def gone(book: FragmentBook, peer: PeerId, now: float, rules: Rules) -> Step:
    """A member is suspected or has left."""
    if book.active is None or peer not in book.active.roster:
        return book, ()
    return _advance(book, rounds.Suspected(peer), now, rules)


def back(book: FragmentBook, peer: PeerId, now: float, rules: Rules) -> Step:
    """A suspected member speaks again."""
    if book.active is None or peer not in book.active.suspects:
        return book, ()
    return _advance(book, rounds.Returned(peer), now, rules)


def taken_over(book: FragmentBook, now: float) -> Step:
    """The service is another one, from a copy of the ledger. What was settled is settled; an open round may have ended otherwise at the old service."""
    book = skip_numbers(book)
    if book.active is None or book.active.phase is not Phase.OPEN:
        return book, ()
    why = "another averaging service took over while the round was open"
    over = replace(book.active, phase=Phase.ABANDONED, why=why)
    return _close(replace(book, round=over), now, book.anchor, book.height), (
        Write(ledger.GaveUp(book.fragment, over.number, Phase.ABANDONED, why)),
    )


def roll_back(book: FragmentBook, height: int, anchor: Digest, why: str, now: float) -> Step:
    """The organiser sends the fragment to another anchor. A round under way is given up; whoever has another anchor recovers this one."""
    if (book.anchor, book.height) == (anchor, height):
        return book, ()
    effects: list[FragmentEffect] = []
    if (over := book.active) is not None:
        phase = Phase.ABANDONED if over.phase is Phase.OPEN else Phase.VOID
        effects.append(Write(ledger.GaveUp(book.fragment, over.number, phase, why)))
        book = _close(replace(book, round=replace(over, phase=phase, why=why)), now, book.anchor, book.height)
    return _rolled_back(book, height, anchor, now), (*effects, Write(ledger.RolledBack(book.fragment, height, anchor, why)))


def _rolled_back(book: FragmentBook, height: int, anchor: Digest, now: float) -> FragmentBook:
    """What was the anchor stays known: if nobody has the other one, the fragment returns to what members hold."""
    history = (*book.history, (book.anchor, book.height))[-NUM_HISTORY:]
    return replace(
        book, anchor=anchor, height=height, history=history, orphan_since=None, residual=None, may_lack=False, idle_since=now,
        version=book.version + 1, failed_reducers=frozenset(), num_merges_missed=0,  # it was not their fault
    )  # fmt: skip


def skip_numbers(book: FragmentBook) -> FragmentBook:
    """The next round gets a number that no round of an earlier term can have."""
    return replace(book, gap=book.gap + TERM_GAP, may_lack=True)


def tick(book: FragmentBook, present: Present, now: float, rules: Rules, timing: Timing, *, may_open: bool) -> Step:
    """Time passed or somebody became ready: deadlines, opening, roll-back."""
    if book.active is not None:
        return _advance(book, rounds.Tick(), now, rules)
    ready = book.ready(present)
    if not ready.all:
        return _consider_rollback(book, present, now, timing)
    if book.orphan_since is not None:
        book = replace(book, orphan_since=None)
    if not may_open or not ready.holders or not _is_gathered(book, ready, present, now, timing):
        return book, ()
    patience = _patience(book, ready, present, now, timing)
    return _open(replace(book, patience=patience), ready, now, timing)


def next_deadline(book: FragmentBook, present: Present, rules: Rules, timing: Timing) -> float | None:
    """When ``tick`` may change something without any message."""
    if book.active is not None:
        return rounds.next_deadline(book.active, rules)
    if book.orphan_since is not None:
        return book.orphan_since + timing.rollback_s
    if book.ready(present).holders:
        return book.idle_since + _gather_s(book, timing)
    return None


def waits_for(book: FragmentBook, present: Present, *, may_open: bool = True) -> str:
    """Why this fragment is not further, in words."""
    if book.active is not None:
        return rounds.waits_for(book.active)
    ready = book.ready(present)
    if not ready.all:
        return "nobody present holds its anchor" if present.all else "nobody is present"
    if not ready.holders:
        return "no holder has its anchor yet" if present.holders else "nobody present trains it"
    if not may_open:
        return "the run is ending"
    late = ", ".join(sorted(short(p) for p in _expected(book, present) - ready.roster))
    return f"gathers; {late} not on the newest anchor yet" if late else "opens at once"


def view(book: FragmentBook, present: Present, now: float, *, may_open: bool = True) -> FragmentView:
    """What members are told."""
    active, ready = book.active, book.ready(present)
    base = FragmentView(
        book.fragment, book.version, book.height, book.anchor, book.number, book.round.phase if book.round else Phase.IDLE,
        waits_for(book, present, may_open=may_open), ready=tuple(sorted(ready.all)), recent=book.recent, tally=book.tally,
    )  # fmt: skip
    if active is None:
        return base
    return replace(
        base, holders=tuple(sorted(active.holders)), keepers=tuple(sorted(active.keepers)), reducers=active.live_reducers, residual=active.residual,
        quorum=active.quorum,
        cut_off_in_s=round(active.cut_off_at - now, 3), offers=active.offers, receipts=tuple(sorted(active.receipts)),
        settlement=active.settlement, attesters=tuple(a.peer for a in active.attestations),
    )  # fmt: skip


def restore(book: FragmentBook, record: ledger.Record, now: float, timing: Timing) -> FragmentBook:
    """The book after one ledger record, when the service starts again. Offers and receipts are heard anew from the members."""
    match record:
        case ledger.Opened():
            opened = _new_round(book, Present(frozenset(record.holders), frozenset(record.keepers)), record.round, now, timing)
            opened = replace(opened, reducers=record.reducers, residual=record.residual)
            return replace(book, number=record.round, gap=0, round=opened, reducers=record.reducers or book.reducers)
        case ledger.Settled(settlement) if book.round is not None:
            settled = replace(book.round, phase=Phase.SETTLED, settlement=settlement, settled_at=now)
            return replace(book, round=settled)
        case ledger.Confirmed() if book.round is not None:
            confirmed = replace(book.round, phase=Phase.CONFIRMED, anchor=record.anchor, thin=record.thin, why=record.why)
            return _close(replace(book, round=confirmed), now, record.anchor, record.height)
        case ledger.GaveUp() if book.round is not None:
            return _close(replace(book, round=replace(book.round, phase=record.phase, why=record.why)), now, book.anchor, book.height)
        case ledger.RolledBack():
            return _rolled_back(book, record.height, record.anchor, now)
    return book


def _late(book: FragmentBook, message: Offer | Receipt | Merge | Abstention | Attestation) -> tuple[FragmentEffect, ...]:
    if isinstance(message, Offer) and message.round > book.number:
        return (Reject(message.peer, "future", f"round {message.round} of {book.fragment}, the newest is {book.number}"),)
    return ()  # about a round that is over: the view that is on its way says so


def _hold(book: FragmentBook, holding: Holding) -> FragmentBook:
    return replace(book, holdings={**book.holdings, holding.peer: holding.anchor}, version=book.version + 1)


def _advance(book: FragmentBook, event: rounds.RoundEvent, now: float, rules: Rules) -> Step:
    assert book.round is not None
    was_open = book.round.phase is Phase.OPEN
    after, effects = rounds.step(book.round, event, now, rules)
    if after == book.round and not effects:
        return book, ()
    book = replace(book, round=after, version=book.version + 1)
    out: list[FragmentEffect] = []
    for effect in effects:
        match effect:
            case Reject():
                out.append(effect)
            case rounds.DidSettle(settlement, proofs):
                out.append(Write(ledger.Settled(settlement, proofs)))
                if was_open:
                    took_s = (now - after.opened_at) * (CUT_SHORT if after.due - {e.peer for e in settlement.entries} else 1.0)
                    book = replace(book, arrivals_s=(*book.arrivals_s, took_s)[-NUM_ARRIVALS:])
            case rounds.DidCondemn():
                out.append(effect)
            case rounds.DidConfirm(anchor, attestations, thin, why):
                attesters, proofs = tuple(a.peer for a in attestations), tuple(a.proof for a in attestations)
                height = after.height + 1
                out.append(Write(ledger.Confirmed(book.fragment, after.number, height, anchor, attesters, thin, why, proofs)))
                book = _close(book, now, anchor, height)
                for peer in attesters:
                    book = _hold(book, Holding(peer, book.fragment, anchor))
            case rounds.DidGiveUp(phase, why):
                out.append(Write(ledger.GaveUp(book.fragment, after.number, phase, why)))
                book = _close(book, now, book.anchor, book.height)
    return book, tuple(out)


def _close(book: FragmentBook, now: float, anchor: Digest, height: int) -> FragmentBook:
    over = book.round
    assert over is not None
    is_confirmed = over.phase is Phase.CONFIRMED
    outcome = Outcome(over.number, over.phase, over.why, over.settlement if is_confirmed else None, over.anchor, over.thin)
    book = _noted_merge(book, over) if over.reducers else book
    return replace(
        book,
        anchor=anchor,
        height=height,
        history=(*book.history, (book.anchor, book.height))[-NUM_HISTORY:] if is_confirmed else book.history,
        may_lack=book.may_lack and not is_confirmed,
        recent=(*book.recent, outcome)[-NUM_RECENT:],
        tally=_counted(book.tally, over),
        idle_since=now,
        version=book.version + 1,
    )


def _noted_merge(book: FragmentBook, over: Round) -> FragmentBook:
    """What a round with reducers means for the next one; from what the ledger holds, so that a restarted service judges alike."""
    settlement = over.settlement
    if settlement is None:  # nobody got what it takes to settle
        return replace(book, failed_reducers=frozenset(over.reducers))
    if settlement.merged is None:
        failed = frozenset(settlement.failed)
        missed = book.num_merges_missed + (failed >= set(over.reducers))  # one of them merged: it has the residual
        return replace(
            book, residual=None if missed >= NUM_MERGES_MISSED else book.residual, failed_reducers=failed, num_merges_missed=missed
        )  # fmt: skip
    if over.phase is not Phase.CONFIRMED:
        return book
    return replace(book, residual=settlement.merged.residual, failed_reducers=frozenset(), num_merges_missed=0)


def _pair(book: FragmentBook, ready: Present, timing: Timing) -> tuple[PeerId, ...]:
    """Who merges the next round: the pair of the last one, as far as it is here and did its part; none where everybody may fetch everything.

    Keepers come first: they can be reached, which two trainers behind routers cannot.
    """
    if timing.reduce_from is None or len(ready.holders) < timing.reduce_from:
        return ()
    able = ready.roster - ready.limited
    kept = [p for p in book.reducers if p in able and p not in book.failed_reducers]
    if len(kept) == NUM_REDUCERS and able & ready.keepers and not ready.keepers & set(kept):
        kept = kept[:1]  # a keeper has come
    others = sorted(able - set(kept), key=lambda p: (p in book.failed_reducers, p not in ready.keepers, rendezvous(book.fragment, p)))
    pair = tuple(sorted([*kept, *others][:NUM_REDUCERS]))
    return pair if len(pair) == NUM_REDUCERS else ()


def _counted(tally: Tally, over: Round) -> Tally:
    num_tokens = sum(e.num_tokens for e in over.settlement.entries) if over.settlement is not None else 0
    match over.phase:
        case Phase.CONFIRMED:
            return replace(
                tally, num_confirmed=tally.num_confirmed + 1, num_thin=tally.num_thin + over.thin, num_tokens=tally.num_tokens + num_tokens
            )
        case Phase.ABANDONED:
            return replace(tally, num_abandoned=tally.num_abandoned + 1)
    return replace(tally, num_void=tally.num_void + 1)


def _expected(book: FragmentBook, present: Present) -> frozenset[PeerId]:
    """Whom the next opening waits for: everybody the first time, then the last roster and all who are one anchor behind.

    Without the latter a roster that started small would stay small: those who follow it are always a moment later than those who attest.
    """
    if book.round is None:
        return present.roster
    previous = book.history[-1][0] if book.history else None
    behind = {p for p, digest in book.holdings.items() if digest == previous}
    return (book.round.roster & (present.roster | present.awaited)) | (behind & present.roster)


def _is_gathered(book: FragmentBook, ready: Present, present: Present, now: float, timing: Timing) -> bool:
    return _expected(book, present) <= ready.roster or now >= book.idle_since + _gather_s(book, timing)


def _gather_s(book: FragmentBook, timing: Timing) -> float:
    """How long the next opening waits for who is expected: longer each time it was too short, at most as long as a round."""
    return max(timing.gather_s, min(timing.gather_s * (1 << book.patience), timing.cut_off_s))


def _patience(book: FragmentBook, ready: Present, present: Present, now: float, timing: Timing) -> int:
    if book.round is None:
        return book.patience  # who comes to the first round has no anchor to be late with
    if _expected(book, present) - ready.roster:
        return min(MAX_PATIENCE, book.patience + 1)
    was_quick = now - book.idle_since < _gather_s(book, timing) / 4
    return max(0, book.patience - was_quick)


def _open(book: FragmentBook, ready: Present, now: float, timing: Timing) -> Step:
    number = book.number + 1 + book.gap
    pair = _pair(book, ready, timing)
    residual = book.residual if pair else None
    opened = replace(_new_round(book, ready, number, now, timing), reducers=pair, residual=residual)
    holders, keepers = tuple(sorted(ready.holders)), tuple(sorted(ready.keepers))
    record = ledger.Opened(book.fragment, number, book.height, book.anchor, holders, keepers, pair, residual)
    opened_book = replace(book, number=number, gap=0, round=opened, reducers=pair or book.reducers, version=book.version + 1)
    return opened_book, (Write(record),)


def _new_round(book: FragmentBook, roster: Present, number: int, now: float, timing: Timing) -> Round:
    wait_s = cut_off_s(book.arrivals_s, timing.cut_off_s)
    if book.recent and book.recent[-1].phase is Phase.ABANDONED:
        wait_s *= 2  # nobody is late twice without a longer deadline
    return Round(book.fragment, number, book.height, book.anchor, roster.holders, roster.keepers, opened_at=now, cut_off_at=now + wait_s)


def _consider_rollback(book: FragmentBook, present: Present, now: float, timing: Timing) -> Step:
    """Nobody present holds the confirmed anchor: after ``rollback_s`` fall back to the newest earlier one that somebody present has.

    With nobody here to train it there is no hurry, and its holders may come back: it takes ``IDLE_PATIENCE`` times as long then.
    """
    places = {digest: place for place, (digest, _) in enumerate(book.history)}  # the newest, which after going back is not the highest
    known = [(places[d], book.history[places[d]][1], d) for p, d in sorted(book.holdings.items()) if p in present.all and d in places]
    if not known and book.may_lack:
        known = [(0, height, digest) for height, digest in _most_held(book, present)]
    if not known:
        return (replace(book, orphan_since=None) if book.orphan_since is not None else book), ()
    if book.orphan_since is None:
        return replace(book, orphan_since=now, version=book.version + 1), ()
    wait_s = timing.rollback_s * (1 if present.holders else IDLE_PATIENCE)
    if now < book.orphan_since + wait_s:
        return book, ()
    _, height, anchor = max(known)
    why = f"nobody present has held anchor {book.anchor[:12]} of height {book.height} for {wait_s:g} s; back to height {height}"
    if anchor not in places:
        why = f"this ledger is a copy that lacks the newest rounds; its anchor {book.anchor[:12]} is gone, most who are here hold {anchor[:12]}"
    return _rolled_back(book, height, anchor, now), (Write(ledger.RolledBack(book.fragment, height, anchor, why)),)


def _most_held(book: FragmentBook, present: Present) -> list[tuple[int, Digest]]:
    """An anchor that this ledger does not know: what most of those present hold, and at least two, as they would confirm one. Its height is taken as ours."""
    held = [digest for peer, digest in sorted(book.holdings.items()) if peer in present.all]
    return [(book.height, digest) for digest in sorted(set(held)) if held.count(digest) >= max(2, len(held) // 2 + 1)]
