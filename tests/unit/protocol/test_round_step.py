"""The round as a value machine: its law holds after any sequence of events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import BASE, PEERS, RULES, attestation, digest, new_round, offer, receipt, round_events

from decentra.bits import ONE_BITS, bits_float, float_bits
from decentra.config import OuterSpec
from decentra.ids import FragmentId, PeerId
from decentra.protocol.messages import Abstention, Phase, Settlement
from decentra.protocol.round import (
    DidCondemn,
    DidConfirm,
    DidGiveUp,
    DidSettle,
    Reject,
    Returned,
    Round,
    RoundEffect,
    Rules,
    Suspected,
    Tick,
    next_deadline,
    step,
    waits_for,
)
from decentra.protocol.settling import what_is_wrong

A, B, C, D, E = PEERS
ANCHOR = digest("anchor a")
timed_events = st.lists(st.tuples(st.floats(0, 6), round_events()), max_size=40)
rosters = st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans())
CLIPPING = replace(RULES, outer=OuterSpec(lr=0.7, momentum=0.9, clip=2.0))
JUDGED = replace(RULES, is_judged=True)
ORDER = {Phase.OPEN: 0, Phase.SETTLED: 1, Phase.TENTATIVE: 2, Phase.CONFIRMED: 3, Phase.ABANDONED: 3, Phase.VOID: 3}


def play(round_: Round, *events: object, now: float = 1.0, rules: Rules = RULES) -> tuple[Round, list[RoundEffect]]:
    out: list[RoundEffect] = []
    for event in events:
        round_, effects = step(round_, event, now, rules)  # type: ignore[arg-type]
        out.extend(effects)
    return round_, out


@given(rosters, timed_events, st.sampled_from([RULES, CLIPPING, JUDGED]))
@settings(max_examples=300)
def test_the_law_holds_after_any_events(roster: tuple[int, int, bool], events: Sequence[tuple[float, object]], rules: Rules) -> None:
    round_, now = new_round(*roster), 0.0
    ends = 0
    for wait_s, event in events:
        now += wait_s
        after, effects = step(round_, event, now, rules)  # type: ignore[arg-type]
        check_step(round_, after, effects, now, rules)
        ends += sum(isinstance(e, DidConfirm | DidGiveUp) for e in effects)
        round_ = after
    assert ends == (not round_.is_active)


def check_step(before: Round, after: Round, effects: Sequence[RoundEffect], now: float, rules: Rules) -> None:
    assert ORDER[after.phase] >= ORDER[before.phase], "phases go one way"
    if not before.is_active:
        assert after == before, "nothing changes a round that is over"
        assert not effects
    assert (after.number, after.height, after.base, after.holders, after.keepers) == (
        before.number, before.height, before.base, before.holders, before.keepers,
    )  # fmt: skip
    assert after.suspects <= after.roster
    assert {o.peer for o in after.offers} <= after.holders
    assert len({o.peer for o in after.offers}) == len(after.offers)
    if before.settlement is not None:
        check_settlement_change(before, after)
        assert after.offers == before.offers, "an offer after settling is too late"
    if (settlement := after.settlement) is not None:
        sound = {o.peer: o for o in after.sound_offers()}
        assert settlement.base == after.base
        assert settlement.height == after.height + 1
        assert settlement.entries, "a settlement has offers"
        assert not {e.peer for e in settlement.entries} & after.condemned.keys(), "nobody is settled to whom most object"
        assert [e.peer for e in settlement.entries] == sorted(e.peer for e in settlement.entries)
        assert all(sound[e.peer].packet == e.packet for e in settlement.entries), "settled only with a receipt of another member"
        weights = [bits_float(e.weight_bits) for e in settlement.entries]
        assert math.isclose(sum(weights), 1.0, abs_tol=1e-6)
        tokens = sum(e.num_tokens for e in settlement.entries)
        assert all(e.weight_bits == float_bits(e.num_tokens / tokens) for e in settlement.entries)
        assert all(sound[e.peer].norm_bits == e.norm_bits for e in settlement.entries)
        clips = rules.outer.clips([bits_float(e.norm_bits) for e in settlement.entries])
        assert [e.clip_bits for e in settlement.entries] == [float_bits(clip) for clip in clips]
        assert what_is_wrong(settlement, rules.outer) == ""
        assert ("clipped" in settlement.why) == any(e.clip_bits != ONE_BITS for e in settlement.entries)
        assert (settlement.lr_bits, settlement.momentum_bits) == (float_bits(RULES.outer.lr), float_bits(RULES.outer.momentum))
    assert not (after.is_merging and after.attestations), "nobody attests what is not merged"
    if after.phase is Phase.CONFIRMED:
        agreeing = {a.peer for a in after.attestations if a.anchor == after.anchor}
        assert len(agreeing) >= min(2, len(after.roster))
        assert after.thin == (len(agreeing) == 1)
        assert agreeing <= after.roster
    assert [type(e) for e in effects if not isinstance(e, Reject | DidCondemn)] == expected_effects(before, after)
    assert {e.peer for e in effects if isinstance(e, DidCondemn)} in (set(), set(after.condemned))
    assert rules.is_judged or not after.objections
    if after.is_active:
        assert next_deadline(after, RULES) is not None
    assert waits_for(after)


def check_settlement_change(before: Round, after: Round) -> None:
    """Frozen, but for what its reducers make of it, once."""
    was, now = before.settlement, after.settlement
    assert was is not None
    assert now is not None
    if was.is_final or now == was:
        assert now == was, "a settlement is frozen"
        return
    assert now.is_final
    assert replace(now, why=was.why, reducers=was.reducers, residual=was.residual, merged=None, failed=()) == was
    assert now.why.startswith(was.why)
    if now.merged is not None:
        assert (now.reducers, now.residual) == (was.reducers, was.residual)
        assert {(m.packet, m.residual) for m in after.merges} == {(now.merged.packet, now.merged.residual)}
        assert {m.peer for m in after.merges} == set(now.reducers), "both said the same"


def expected_effects(before: Round, after: Round) -> list[type]:
    found: list[type] = []
    if before.phase is Phase.OPEN and after.settlement is not None:
        found.append(DidSettle)
    if before.is_merging and not after.is_merging:
        found.append(DidSettle)
    if before.is_active and after.phase is Phase.CONFIRMED:
        found.append(DidConfirm)
    if before.is_active and after.phase in (Phase.ABANDONED, Phase.VOID):
        found.append(DidGiveUp)
    return found


@given(rosters, timed_events)
@settings(max_examples=100)
def test_every_round_ends_by_itself(roster: tuple[int, int, bool], events: Sequence[tuple[float, object]]) -> None:
    round_, now = new_round(*roster), 0.0
    for wait_s, event in events:
        now += wait_s
        round_, _ = step(round_, event, now, RULES)  # type: ignore[arg-type]
    for _ in range(3):  # settling at the deadline, then the deadlines for merging and for attesting
        now += RULES.cut_off_s + RULES.grace_s + RULES.attest_s
        round_, _ = step(round_, Tick(), now, RULES)
    assert not round_.is_active


@given(rosters, timed_events, round_events())
@settings(max_examples=100)
def test_hearing_a_thing_twice_is_hearing_it_once(
    roster: tuple[int, int, bool], events: Sequence[tuple[float, object]], event: object
) -> None:
    round_, now = new_round(*roster), 0.0
    for wait_s, earlier in events:
        now += wait_s
        round_, _ = step(round_, earlier, now, RULES)  # type: ignore[arg-type]
    once, _ = step(round_, event, now, RULES)  # type: ignore[arg-type]
    twice, effects = step(once, event, now, RULES)  # type: ignore[arg-type]
    if once.phase is round_.phase:
        assert twice == once
    assert not any(isinstance(e, DidSettle | DidConfirm | DidGiveUp) for e in effects) or once.phase is not twice.phase


def test_two_holders_settle_and_confirm() -> None:
    round_, effects = play(new_round(2), offer(A, num_tokens=300), offer(B, num_tokens=100), receipt(B, A), receipt(A, B))
    (settled,) = effects
    assert isinstance(settled, DidSettle)
    assert [bits_float(e.weight_bits) for e in settled.settlement.entries] == [0.75, 0.25]
    assert settled.settlement.why == "all 2 due offers are in"
    round_, effects = play(round_, attestation(A, ANCHOR))
    assert round_.phase is Phase.TENTATIVE
    assert effects == []
    round_, effects = play(round_, attestation(B, ANCHOR))
    assert effects == [DidConfirm(ANCHOR, (attestation(A, ANCHOR), attestation(B, ANCHOR)), False, f"2 attested {ANCHOR[:12]}")]


def test_an_offer_without_a_receipt_of_another_is_not_settled() -> None:
    round_, effects = play(new_round(2), offer(A), offer(B), receipt(A, A), receipt(B, B))
    assert round_.phase is Phase.OPEN
    assert effects == []
    assert "second holder" in waits_for(round_)
    round_, _ = step(round_, Tick(), 15.0, RULES)
    assert round_.phase is Phase.ABANDONED


def test_a_lone_holder_is_thin_and_one_keeper_makes_it_sound() -> None:
    round_, effects = play(new_round(1), offer(A), attestation(A, ANCHOR))
    assert [type(e) for e in effects] == [DidSettle, DidConfirm]
    assert round_.thin
    round_, effects = play(new_round(1, 1), offer(A), receipt(B, A), attestation(A, ANCHOR))
    assert round_.phase is Phase.TENTATIVE, "a roster of two needs two attesters"
    round_, _ = play(round_, attestation(B, ANCHOR))
    assert round_.phase is Phase.CONFIRMED
    assert not round_.thin


def test_confirm_does_not_follow_who_is_alive() -> None:
    round_, _ = play(new_round(2), offer(A), offer(B), receipt(B, A), receipt(A, B), Suspected(B), attestation(A, ANCHOR))
    assert round_.phase is Phase.VOID, "one attester of a roster of two never confirms; with the other one gone it is given up"


def test_suspicion_removes_and_a_return_brings_back() -> None:
    round_, effects = play(new_round(3), offer(A), offer(B), receipt(B, A), receipt(A, B))
    assert effects == []
    later, effects = play(round_, Suspected(C))
    assert [type(e) for e in effects] == [DidSettle]
    assert {e.peer for e in effects[0].settlement.entries} == {A, B}  # type: ignore[union-attr]
    lone, _ = play(round_, Suspected(B), Returned(B))
    assert lone.suspects == frozenset()
    assert later.suspects == {C}


def test_quorum_at_the_cut_off() -> None:
    round_, _ = play(new_round(3, 1), offer(A), offer(B), receipt(D, A), receipt(D, B))
    early, effects = step(round_, Tick(), 9.9, RULES)
    assert early.phase is Phase.OPEN
    assert effects == ()
    settled, _ = step(round_, Tick(), 10.0, RULES)
    assert settled.phase is Phase.SETTLED
    one, _ = play(new_round(3, 1), offer(A), receipt(D, A))
    assert step(one, Tick(), 14.9, RULES)[0].phase is Phase.OPEN
    assert step(one, Tick(), 15.0, RULES)[0].phase is Phase.ABANDONED


@pytest.mark.parametrize(("num_holders", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3)])
def test_quorum(num_holders: int, quorum: int) -> None:
    assert replace(new_round(1), holders=frozenset(PEERS[:num_holders])).quorum == quorum


def test_abstentions_are_not_waited_for() -> None:
    round_, _ = play(new_round(2, 1), offer(A), receipt(C, A))
    assert round_.phase is Phase.OPEN
    round_, effects = play(round_, Abstention(round_.fragment, 1, B, "loss not finite"))
    assert [type(e) for e in effects] == [DidSettle]
    given_up, _ = play(new_round(1, 1), Abstention(round_.fragment, 1, A, "no"))
    assert given_up.phase is Phase.ABANDONED


def test_nobody_trained_a_token() -> None:
    round_, effects = play(new_round(1), offer(A, num_tokens=0))
    assert round_.phase is Phase.ABANDONED
    assert round_.settlement is None
    assert [type(e) for e in effects] == [DidGiveUp]


def test_attesters_that_disagree_void_the_round() -> None:
    settled, _ = play(new_round(2), offer(A), offer(B), receipt(B, A), receipt(A, B))
    round_, _ = play(settled, attestation(A, ANCHOR), attestation(B, digest("other")))
    assert round_.phase is Phase.VOID
    assert "disagree" in round_.why
    three, _ = play(
        new_round(2, 1), offer(A), offer(B), receipt(B, A), receipt(A, B), attestation(A, ANCHOR), attestation(B, digest("other"))
    )
    assert three.phase is Phase.TENTATIVE, "the keeper decides"
    three, _ = play(three, attestation(C, ANCHOR))
    assert three.anchor == ANCHOR


def test_attesting_too_slowly_voids() -> None:
    settled, _ = play(new_round(2), offer(A), offer(B), receipt(B, A), receipt(A, B), attestation(A, ANCHOR))
    assert step(settled, Tick(), 1.0 + RULES.attest_s - 0.1, RULES)[0].phase is Phase.TENTATIVE
    assert step(settled, Tick(), 1.0 + RULES.attest_s, RULES)[0].phase is Phase.VOID


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (offer(E), "not-in-roster"),
        (offer(C), "not-in-roster"),  # a keeper does not offer
        (offer(A, base=digest("old")), "base"),
        (offer(B, variant=1), "two-digests"),
        (offer(A, num_tokens=-1), "malformed"),
        (offer(A, norm_bits=0x7F800000), "malformed"),  # infinite
        (offer(A, norm_bits=0x7FC00000), "malformed"),  # not a number
        (offer(A, norm_bits=float_bits(-1.0)), "malformed"),
        (offer(A, norm_bits=-1), "malformed"),
        (offer(A, norm_bits=1 << 32), "malformed"),
        (receipt(E, B), "not-in-roster"),
        (receipt(C, A), "receipt"),
        (receipt(C, B, variant=1), "receipt"),
        (attestation(A, ANCHOR), "early"),
        (attestation(E, ANCHOR), "not-in-roster"),
    ],
)
def test_mistakes_are_rejected_by_name_and_change_nothing(event: object, reason: str) -> None:
    round_, _ = play(new_round(2, 1), offer(B))
    after, effects = step(round_, event, 1.0, RULES)  # type: ignore[arg-type]
    (reject,) = effects
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert reject.detail
    assert after == round_


def test_a_late_offer_says_so() -> None:
    settled, _ = play(new_round(3), offer(A), offer(B), receipt(B, A), receipt(A, B), Suspected(C))
    _, effects = play(settled, Returned(C), offer(C))
    assert [e.reason for e in effects if isinstance(e, Reject)] == ["late"]
    assert settled.base == BASE


def settled_norms(rules: Rules, *norms: float) -> tuple[list[float], str]:
    """The clips of a round of holders with these norms, and what the settlement says about it."""
    holders = PEERS[: len(norms)]
    offers = [offer(p, norm_bits=float_bits(norm)) for p, norm in zip(holders, norms, strict=True)]
    receipts = [receipt(holders[i - 1], p) for i, p in enumerate(holders)] if len(holders) > 1 else []
    round_, _ = play(new_round(len(norms)), *offers, *receipts, rules=rules)
    assert round_.settlement is not None
    assert [e.norm_bits for e in round_.settlement.entries] == [float_bits(norm) for norm in norms]
    return [bits_float(e.clip_bits) for e in round_.settlement.entries], round_.settlement.why


def test_a_delta_out_of_line_is_cut_to_the_manifests_multiple_of_the_median_norm() -> None:
    clips, why = settled_norms(CLIPPING, 1.0, 16.0, 2.0)
    assert clips == [1.0, 0.25, 1.0]
    assert why == "all 3 due offers are in; clipped peer-1 to 0.25"
    clips, why = settled_norms(CLIPPING, 1.0, 40.0, 3.0, 80.0)
    assert clips == [1.0, 1.0, 1.0, bits_float(float_bits(2 * 21.5 / 80))], "the median of an even number is the middle of two"
    assert settled_norms(RULES, 1.0, 16.0, 2.0) == ([1.0] * 3, "all 3 due offers are in"), "off by default"
    experts_only = replace(RULES, outer_experts=CLIPPING.outer)
    assert settled_norms(experts_only, 1.0, 16.0, 2.0)[0] == [1.0] * 3


def test_of_fewer_than_three_nobody_is_clipped() -> None:
    """The median of two lies in their middle: which of them is out of line nobody can tell."""
    for norms in ((5.0,), (1.0, 1000.0), (0.0, 1.0, 1000.0), (0.0, 0.0, 0.0)):
        assert settled_norms(CLIPPING, *norms)[0] == [1.0] * len(norms)


def test_norms_of_zero_clip_nobody() -> None:
    """Were they counted, three idle peers would cut everybody else to nothing."""
    assert settled_norms(CLIPPING, 0.0, 0.0, 1.0, 1.5, 8.0)[0] == [1.0, 1.0, 1.0, 1.0, 0.375]


@given(st.lists(st.floats(0, 2.0**127, width=32), max_size=12), st.floats(1, 100))
def test_clips_leave_the_median_alone_and_cut_to_one_length(norms: list[float], k: float) -> None:
    clips = OuterSpec(clip=k).clips(norms)
    assert OuterSpec().clips(norms) == (1.0,) * len(norms)
    assert len(clips) == len(norms)
    assert all(0 <= clip <= 1 for clip in clips)
    cut = {norm: norm * clip for norm, clip in zip(norms, clips, strict=True) if clip < 1}
    known = sorted(n for n in norms if n > 0)
    assert 2 * len([n for n in norms if n in cut]) <= len(known), "at most half are out of line"
    for length in cut.values():
        assert math.isclose(length, k * (known[len(known) // 2] + known[(len(known) - 1) // 2]) / 2, rel_tol=1e-9, abs_tol=2.0**-149)


def test_the_settlements_scalars_follow_the_manifests_outer_rule() -> None:
    spec = OuterSpec(rule="nesterov", lr=1.0, final_lr=0.5, anneal_rounds=10, momentum=0.9, restart_every=4, shrink_tokens=100)
    assert spec.scalars(1, 100) == (0.5, 0.0)  # half of 1.0 by shrinking; the first round starts a momentum
    assert spec.scalars(2, 300) == (pytest.approx(0.95 * 0.75), 0.9)
    assert spec.scalars(5, 300)[1] == 0.0
    assert spec.scalars(100, 10**9) == (pytest.approx(0.5), 0.9)
    rules = replace(RULES, outer=OuterSpec(lr=0.7), outer_experts=OuterSpec(lr=0.3))
    assert rules.outer_of(FragmentId("trunk/0")).lr == 0.7
    assert rules.outer_of(FragmentId("router/0")).lr == 0.7
    assert rules.outer_of(FragmentId("expert.3/0")).lr == 0.3
    assert replace(RULES, outer_experts=None).outer_of(FragmentId("expert.3/0")) == RULES.outer


# ---------------------------------------------------------------- judging


def judged(
    num_holders: int, *objections: tuple[PeerId, PeerId], num_keepers: int = 0, silent: Sequence[PeerId] = ()
) -> tuple[Round, list[RoundEffect]]:
    """Everybody offers and receipts everything, with these (judge, sender) objections; ``silent`` say nothing of others."""
    round_ = new_round(num_holders, num_keepers)
    events: list[object] = [offer(p) for p in sorted(round_.holders)]
    events += [
        receipt(judge, sender, objects=(judge, sender) in objections)
        for judge in sorted(round_.roster)
        for sender in sorted(round_.holders)
        if judge != sender and judge not in silent
    ]
    return play(round_, *events, rules=JUDGED)


def test_an_offer_to_which_most_holders_object_is_left_out() -> None:
    after, effects = judged(4, (B, A), (C, A), (D, A), (A, B), (A, C), (A, D), (B, C))
    assert after.settlement is not None
    assert [e.peer for e in after.settlement.entries] == [B, C, D], "the liar's objections and a mistake are two of three"
    assert "left out" in after.settlement.why
    (condemned,) = [e for e in effects if isinstance(e, DidCondemn)]
    assert (condemned.peer, condemned.why.startswith("3 of 3 other holders say")) == (A, True)


def test_two_thirds_of_the_judges_are_not_enough_and_keepers_judge_nothing() -> None:
    after, _ = judged(3, (B, A), (C, B))
    assert len(after.settlement.entries if after.settlement else ()) == 3, "one of two judges"
    after, _ = judged(2, (B, A), (C, A), (D, A), num_keepers=2)
    assert len(after.settlement.entries if after.settlement else ()) == 2, "two holders: nobody is condemned, keepers have no text"
    after, _ = judged(3, (B, A), (D, A), (E, A), num_keepers=2)
    assert len(after.settlement.entries if after.settlement else ()) == 3


def test_a_round_waits_for_words_that_could_condemn_and_not_beyond_its_cut_off() -> None:
    after, _ = judged(4, (B, A), (D, A), silent=(C,))
    assert after.phase is Phase.OPEN
    assert waits_for(after).startswith("waits for judgement of")
    objected, _ = play(after, receipt(C, A, objects=True), rules=JUDGED)
    assert [e.peer for e in objected.settlement.entries if objected.settlement] == [B, C, D] if objected.settlement else False
    gone, _ = play(after, Suspected(C), rules=JUDGED)
    assert gone.settlement is not None, "who is gone is not waited for"
    late, _ = play(after, Tick(), now=11.0, rules=JUDGED)
    assert len(late.settlement.entries if late.settlement else ()) == 4


def test_a_round_in_which_everybody_objects_to_everybody_is_given_up() -> None:
    everybody = tuple((a, b) for a in (A, B, C) for b in (A, B, C) if a != b)
    after, effects = judged(3, *everybody)
    assert (after.phase, [type(e) for e in effects]) == (Phase.ABANDONED, [DidGiveUp])
    assert "objected to" in after.why


def test_objections_count_where_the_run_judges_only() -> None:
    round_ = new_round(3)
    events = [offer(p) for p in (A, B, C)] + [receipt(j, s, objects=True) for j in (A, B, C) for s in (A, B, C) if j != s]
    plain, _ = play(round_, *events)
    assert len(plain.settlement.entries if plain.settlement else ()) == 3
    expert = replace(round_, fragment=FragmentId("expert.0/0"))
    assert not JUDGED.judges(expert.fragment)


# ---------------------------------------------------------------- what anybody can check


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, lr_bits=float_bits(0.9)), "outer lr and momentum are 0.9 and 0.9, the manifest gives 0.7 and 0.9"),
        (lambda s: replace(s, entries=()), "its entries are none"),
        (lambda s: replace(s, entries=tuple(reversed(s.entries))), "in their order"),
        (lambda s: replace(s, entries=(s.entries[0], s.entries[0])), "one for each peer"),
        (lambda s: replace(s, entries=(replace(s.entries[0], weight_bits=ONE_BITS), s.entries[1])), "weighs 1, its tokens give 0.5"),
        (
            lambda s: replace(s, entries=(replace(s.entries[0], clip_bits=float_bits(0.5)), s.entries[1])),
            "clipped to 0.5, the norms give 1",
        ),
        (lambda s: replace(s, entries=(replace(s.entries[0], num_tokens=-1), s.entries[1])), "no offer may have"),
        (lambda s: replace(s, entries=(replace(s.entries[0], num_tokens=10**6), s.entries[1])), "weighs 0.5, its tokens give 0.9999"),
        (lambda s: replace(s, entries=tuple(replace(e, num_tokens=0) for e in s.entries)), "nobody trained"),
    ],
)
def test_a_settlement_that_the_manifest_does_not_give_is_told(change: Callable[[Settlement], Settlement], words: str) -> None:
    after, _ = play(new_round(2), offer(A), offer(B), receipt(A, B), receipt(B, A))
    assert after.settlement is not None
    assert what_is_wrong(after.settlement, RULES.outer) == ""
    assert words in what_is_wrong(change(after.settlement), RULES.outer)
