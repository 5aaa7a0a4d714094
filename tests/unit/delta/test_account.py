from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decentra.delta.account import Account, account_from_record, to_record
from decentra.delta.aggregate import aggregate, float_bits
from decentra.delta.anchor import AnchorState, decode_anchor, encode_anchor
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet
from decentra.errors import IntegrityError, RejectedPayload, TrainingError
from decentra.ids import Digest, FragmentId, PeerId
from decentra.modules import build_layout

from .helpers import CODEC_NAMES, digest_of_state, dyadic, same_bits, small_fragment, vector

FRAGMENT = small_fragment()
N = FRAGMENT.num_elements
ONE = float_bits(1.0)


def account(seed: int = 1) -> Account:
    state = AnchorState(dyadic(N, seed))
    return Account(FRAGMENT, state, digest_of_state(FRAGMENT, state))


def next_state(seed: int) -> tuple[AnchorState, Digest]:
    state = AnchorState(dyadic(N, seed))
    return state, digest_of_state(FRAGMENT, state)


def restored(account: Account) -> Account:
    record = to_record(account)
    back = account_from_record(FRAGMENT, record, account.anchor_state)
    assert to_record(back) == record
    return back


# ---------------------------------------------------------------- random stories


@dataclass
class Peer:
    account: Account
    live_N: Tensor
    trained_N: Tensor = field(default_factory=lambda: torch.zeros(N, dtype=torch.float64))  # all progress ever, as a descent direction

    def train(self, seed: int) -> None:
        step_N = dyadic(N, seed)
        self.live_N = self.live_N - step_N
        self.trained_N = self.trained_N + step_N.double()

    def at_home_N(self) -> Tensor:
        """What of the progress is still in live or in the residual."""
        return self.account.residual_N.double() + (self.account.anchor_state.anchor_N.double() - self.live_N.double())


@dataclass(frozen=True)
class Round:
    """What happens in one round: who trains before, who encodes, who trains after encoding, who restarts, and how it ends."""

    trains: frozenset[int]
    offers: frozenset[int]
    trains_on: frozenset[int]
    restarts: frozenset[int]
    settled: frozenset[int]  # of those who offered; empty: the round is abandoned or void
    clips: tuple[float, float, float] = (1.0, 1.0, 1.0)


some_peers = st.frozensets(st.integers(0, 2))
clips = st.sampled_from([1.0, 1.0, 0.5, 0.0])  # halves keep dyadic sums exact
rounds = st.builds(Round, some_peers, some_peers, some_peers, some_peers, some_peers, st.tuples(clips, clips, clips))


def play(codec_name: str, story: list[Round]) -> tuple[Tensor, AnchorState, list[Peer]]:
    """The first anchor, the last one and the peers. Weights are 1, so an anchor holds every settled delta whole, but for what was clipped."""
    first, digest = next_state(1)
    state, peers = first, [Peer(Account(FRAGMENT, first, digest), first.anchor_N.clone()) for _ in range(3)]
    for number, now in enumerate(story, start=1):
        for i in now.trains:
            peers[i].train(100 * number + i)
        for i in now.offers:
            peers[i].account.encode(number, peers[i].live_N, codec_name, 1.0, 10, 2)
        for i in now.trains_on:
            peers[i].train(100 * number + 50 + i)
        for i in now.restarts:
            peers[i].account = restored(peers[i].account)
        settled = now.settled & now.offers
        if not settled:
            for i in now.offers:
                peers[i].account.cancelled()
            continue
        deltas = {PeerId(str(i)): decode_packet(pending.packet, FRAGMENT) for i in settled if (pending := peers[i].account.pending)}
        assert len(deltas) == len(settled)
        clip_bits = {PeerId(str(i)): float_bits(now.clips[i]) for i in settled}
        merged_N = aggregate(deltas, dict.fromkeys(deltas, ONE), clip_bits)
        state = outer_step(state, merged_N, rule="average", lr_bits=ONE, momentum_bits=0)
        digest = digest_of_state(FRAGMENT, state)
        for i, peer in enumerate(peers):
            if i in settled:
                shift_N = peer.account.applied(state, digest, clip_bits[PeerId(str(i))])
            else:
                shift_N = (peer.account.excluded if i in now.offers else peer.account.followed)(state, digest)
            peer.live_N = peer.live_N + shift_N
    return first.anchor_N, state, peers


@pytest.mark.parametrize("codec_name", CODEC_NAMES)
@settings(max_examples=40)
@given(story=st.lists(rounds, max_size=8))
def test_all_that_was_trained_is_in_one_place_exactly_once(codec_name: str, story: list[Round]) -> None:
    first_N, last, peers = play(codec_name, story)
    for peer in peers:
        assert same_bits(peer.account.anchor_state.anchor_N, last.anchor_N)
        assert peer.account.pending is None
    trained_N = sum((p.trained_N for p in peers), torch.zeros(N, dtype=torch.float64))
    found_N = (first_N.double() - last.anchor_N.double()) + sum((p.at_home_N() for p in peers), torch.zeros(N, dtype=torch.float64))
    # dyadic steps make every fp32 sum exact: with a lossless codec not one bit may be lost or counted twice
    tolerance = 0.0 if codec_name == "fp32" else 1e-4
    assert float((trained_N - found_N).abs().max()) <= tolerance


@settings(max_examples=40)
@given(story=st.lists(rounds, max_size=8))
def test_a_lossless_codec_leaves_nothing_in_the_residual_of_those_who_were_in(story: list[Round]) -> None:
    everyone = frozenset(range(3))
    _, _, peers = play("fp32", [*story, Round(everyone, everyone, frozenset(), frozenset(), everyone)])
    for peer in peers:
        assert not bool(peer.account.residual_N.any())
        assert torch.equal(peer.live_N, peer.account.anchor_state.anchor_N)


# ---------------------------------------------------------------- single outcomes


@pytest.mark.parametrize("codec_name", CODEC_NAMES)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_cancelled_is_as_if_never_encoded(codec_name: str, beta: float) -> None:
    tried, fresh = account(), account()
    for a in (tried, fresh):
        a.residual_N = vector(N, 9, 0.01)
    before_N, live_N = tried.residual_N, vector(N, 3)
    for attempt in (1, 2, 3):
        tried.encode(attempt, live_N, codec_name, beta, 5, 1)
        tried.cancelled()
    assert tried.residual_N is before_N
    later_N = live_N - dyadic(N, 4)  # new progress meanwhile
    again, once = tried.encode(4, later_N, codec_name, beta, 5, 1), fresh.encode(4, later_N, codec_name, beta, 5, 1)
    assert again.packet == once.packet
    assert same_bits(again.residual_after_N, once.residual_after_N)


def test_raw_is_progress_plus_a_share_of_the_residual() -> None:
    a = account()
    a.residual_N = dyadic(N, 5)
    live_N = dyadic(N, 6)
    pending = a.encode(1, live_N, "fp32", 0.5, 7, 3)
    raw_N = 0.5 * dyadic(N, 5) + (dyadic(N, 1) - live_N)
    assert same_bits(decode_packet(pending.packet, FRAGMENT).dense(), raw_N)
    assert (pending.round, pending.base, pending.num_tokens, pending.num_steps) == (1, a.anchor_digest, 7, 3)
    assert not bool(pending.residual_after_N.any())
    assert torch.equal(a.residual_N, dyadic(N, 5))  # moves at the outcome only


def test_applied_keeps_only_what_encoding_lost() -> None:
    a = account()
    live_N = vector(N, 2)
    pending = a.encode(1, live_N, "int8", 1.0, 1, 1)
    state, digest = next_state(8)
    shift_N = a.applied(state, digest)
    assert same_bits(shift_N, state.anchor_N - live_N)
    assert a.residual_N is pending.residual_after_N
    assert 0 < float(a.residual_N.abs().max()) < 0.03
    assert (a.anchor_state, a.anchor_digest, a.pending) == (state, digest, None)


def test_what_a_clip_cut_off_comes_home() -> None:
    live_N = vector(N, 2)
    for clip in (1.0, 0.75, 2.0**-30, 0.0):
        a, (state, digest) = account(), next_state(8)
        pending = a.encode(1, live_N, "int8", 1.0, 1, 1)
        sent_N = decode_packet(pending.packet, FRAGMENT).dense()
        assert same_bits(a.applied(state, digest, float_bits(clip)), state.anchor_N - live_N)
        home_N = pending.residual_after_N if clip == 1 else pending.residual_after_N + sent_N * (1 - clip)
        assert same_bits(a.residual_N, home_N)
        assert torch.allclose(a.residual_N + clip * sent_N, dyadic(N, 1) - live_N, atol=1e-6)
    kept = account()
    pending = kept.encode(1, live_N, "int8", 1.0, 1, 1)
    residual_N = pending.residual_after_N.clone()
    kept.applied(state, digest, float_bits(0.5))
    assert same_bits(pending.residual_after_N, residual_N), "a pending's tensors are values"


def test_a_clip_that_is_none_changes_nothing() -> None:
    a, (state, digest) = account(), next_state(8)
    a.encode(1, vector(N, 2), "int8", 1.0, 1, 1)
    before = to_record(a)
    for bits in (float_bits(-0.5), ONE + 1, 0x7FC00000):
        with pytest.raises(RejectedPayload):
            a.applied(state, digest, bits)
        assert to_record(a) == before


def test_the_stated_norm_is_the_packets() -> None:
    a = account()
    for number, codec_name in enumerate(CODEC_NAMES):
        pending = a.encode(number, vector(N, number, 10.0**-number), codec_name, 1.0, 1, 1)
        norm = decode_packet(pending.packet, FRAGMENT).norm()
        assert pending.norm_bits == float_bits(norm)
        assert math.isclose(norm, float(decode_packet(pending.packet, FRAGMENT).dense().double().norm()), rel_tol=1e-6)
        assert (back := restored(a).pending) is not None
        assert back.norm_bits == pending.norm_bits
        a.cancelled()
    nothing = a.encode(99, a.anchor_state.anchor_N, "int8", 1.0, 1, 1)
    assert nothing.norm_bits == 0


def test_a_norm_beyond_float32_is_not_offered() -> None:
    a = account()
    with pytest.raises(TrainingError, match="more than a float32 holds"):
        a.encode(1, torch.full((N,), 3e38), "fp32", 1.0, 1, 1)
    assert a.pending is None


def test_excluded_brings_all_of_it_home() -> None:
    a = account()
    live_N = vector(N, 2)
    a.encode(1, live_N, "int8", 1.0, 1, 1)
    state, digest = next_state(8)
    assert same_bits(a.excluded(state, digest), state.anchor_N - live_N)
    assert torch.allclose(a.residual_N, dyadic(N, 1) - live_N, atol=1e-6)


def test_followed_shifts_by_the_anchors_own_move() -> None:
    a = account()
    a.residual_N = vector(N, 5)
    state, digest = next_state(8)
    assert same_bits(a.followed(state, digest), state.anchor_N - dyadic(N, 1))
    assert same_bits(a.residual_N, vector(N, 5))


def test_reset_forgets_pending_and_residual() -> None:
    a = account()
    a.residual_N = vector(N, 5)
    a.encode(1, vector(N, 2), "int8", 1.0, 1, 1)
    state, digest = next_state(8)
    a.reset(state, digest)
    assert (a.anchor_state, a.anchor_digest, a.pending) == (state, digest, None)
    assert not bool(a.residual_N.any())


def test_an_outcome_is_taken_once() -> None:
    a, (state, digest) = account(), next_state(8)
    for outcome in (lambda: a.applied(state, digest), lambda: a.excluded(state, digest), a.cancelled):
        with pytest.raises(TrainingError, match="nothing is pending"):
            outcome()
    a.encode(1, vector(N, 2), "int8", 1.0, 1, 1)
    with pytest.raises(TrainingError, match="round 1 has no outcome"):
        a.encode(2, vector(N, 2), "int8", 1.0, 1, 1)
    with pytest.raises(TrainingError, match="pending"):
        a.followed(state, digest)
    assert a.anchor_state is not state


def test_a_diverged_live_is_refused_and_changes_nothing() -> None:
    a = account()
    before = to_record(a)
    live_N = vector(N, 2)
    live_N[5] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        a.encode(1, live_N, "int8", 1.0, 1, 1)
    assert to_record(a) == before


def test_a_pending_does_not_follow_the_callers_tensor() -> None:
    a, live_N = account(), vector(N, 2)
    pending = a.encode(1, live_N, "int8", 1.0, 1, 1)
    live_N.zero_()
    assert same_bits(pending.live_N, vector(N, 2))


# ---------------------------------------------------------------- the record


@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize("has_pending", [False, True])
def test_a_record_restores_every_bit(has_momentum: bool, has_pending: bool) -> None:
    state = AnchorState(vector(N, 1), vector(N, 2) if has_momentum else None)
    a = Account(FRAGMENT, state, digest_of_state(FRAGMENT, state), residual_N=vector(N, 3), extra=b'{"cursor": 12}')
    if has_pending:
        a.encode(2**40, vector(N, 4), "int8", 0.9, 2**50, 77)
    back = restored(a)
    assert back.extra == a.extra
    assert back.anchor_digest == a.anchor_digest
    assert encode_anchor(FRAGMENT, back.anchor_state) == encode_anchor(FRAGMENT, state)
    assert same_bits(back.residual_N, a.residual_N)
    if a.pending is None:
        assert back.pending is None
    else:
        assert back.pending is not None
        assert (back.pending.round, back.pending.base, back.pending.packet) == (2**40, a.anchor_digest, a.pending.packet)
        assert (back.pending.num_tokens, back.pending.num_steps) == (2**50, 77)
        for name in ("live_N", "residual_before_N", "residual_after_N"):
            assert same_bits(getattr(back.pending, name), getattr(a.pending, name))
        new, digest = next_state(8)
        assert same_bits(back.excluded(new, digest), a.excluded(new, digest))
        assert same_bits(back.residual_N, a.residual_N)


def pending_record() -> bytes:
    a = account()
    a.encode(1, vector(N, 2), "int8", 1.0, 1, 1)
    return to_record(a)


@given(st.data())
def test_a_damaged_record_is_refused(data: st.DataObject) -> None:
    record = bytearray(pending_record())
    at = data.draw(st.integers(0, len(record) - 1))
    if data.draw(st.booleans()):
        del record[at:]
    else:
        record[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        account_from_record(FRAGMENT, bytes(record), account().anchor_state)


@given(st.binary(max_size=400))
def test_random_records_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        account_from_record(FRAGMENT, data, account().anchor_state)


def test_a_record_of_another_fragment_is_refused() -> None:
    other = build_layout([("x.weight", (N,))])[FragmentId("trunk/0")]
    with pytest.raises(IntegrityError, match="another fragment"):
        account_from_record(other, pending_record(), account().anchor_state)


def test_a_record_needs_a_real_digest() -> None:
    a = Account(FRAGMENT, AnchorState(dyadic(N, 1)), Digest("abc"))
    with pytest.raises(IntegrityError, match="abc"):
        to_record(a)


def test_the_anchor_in_a_record_is_the_anchor_blob() -> None:
    a = account()
    blob = encode_anchor(FRAGMENT, account_from_record(FRAGMENT, to_record(a), a.anchor_state).anchor_state)
    assert same_bits(decode_anchor(FRAGMENT, blob).anchor_N, a.anchor_state.anchor_N)
