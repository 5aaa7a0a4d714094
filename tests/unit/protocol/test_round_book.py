"""The averaging service as a machine: who may come in, who is here, who trains what, and a restart from the ledger at any point."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import PEERS, TOKEN, House, attestation, digest, manifest, offer, receipt, rejects

from decentra.config import AdmissionSpec, PlacementSpec, StopSpec
from decentra.errors import ConfigError, IntegrityError, Refused
from decentra.ids import FragmentId, PeerId, RunId
from decentra.protocol import ledger
from decentra.protocol.fragment import Write
from decentra.protocol.messages import Attestation, Counters, Goodbye, Heartbeat, Hello, Holding, Offer, Receipt, Role
from decentra.protocol.rounds import KEEPER_S, Detached, Effect, Revoke, RoundBook, Stop, Succeed, SwarmChanged, Tick, ViewChanged

A, B, C, D, E = PEERS
TRUNK, EXPERT_0 = FragmentId("trunk/0"), FragmentId("expert.0/0")
GENESIS_OF_FOUR = ("expert.0/0", "expert.1/0", "expert.2/0", "expert.3/0", "trunk/0")


# ---------------------------------------------------------------- the door


def test_a_token_has_so_many_uses_and_a_member_uses_it_once() -> None:
    house = House()
    house.admit(A, uses=1)
    house.admit(A, uses=1)
    with pytest.raises(Refused, match="used up"):
        house.admit(B, uses=1)
    house.admit(B, token="token-2", uses=1)
    assert house.book.token_uses == {TOKEN: {A}, "token-2": {B}}


def test_a_member_that_comes_again_with_another_invite_uses_none_of_it_up() -> None:
    house = House()
    house.admit(A)
    house.admit(A, token="token-2", uses=1)
    house.admit(B, token="token-2", uses=1)
    house.admit(A, token="token-2", uses=1)
    assert house.book.token_uses == house.restored().token_uses == {TOKEN: {A}, "token-2": {B}}


def test_invited_means_invited_and_open_means_open() -> None:
    with pytest.raises(Refused, match="invited peers only"):
        House().admit(A, token=None)
    House(admission=AdmissionSpec(mode="open")).admit(A, token=None)


def test_revoked_tokens_and_peers_stay_out() -> None:
    house = House()
    house.admit(A)
    house.enter(B)
    house.handle(Revoke(TOKEN, "leaked"))
    with pytest.raises(Refused, match="revoked this invite"):
        house.admit(C)
    effects = house.handle(Revoke(str(B), "spam"))
    assert SwarmChanged() in effects
    assert rejects(house.handle(Heartbeat(B, 1, Counters()))) == ["revoked"]
    with pytest.raises(Refused, match="revoked"):
        house.admit(B, token="token-2")
    with pytest.raises(Refused, match="not a member"):
        house.book.check_hello(Hello(B, Role.TRAINER, "b", "n"), house.now)
    assert house.handle(Revoke(str(B), "again")) == [], "revoking twice writes nothing"
    assert house.restored().revoked == {TOKEN, str(B)}


def test_a_full_run() -> None:
    house = House(admission=AdmissionSpec(max_members=2))
    house.admit(A)
    house.admit(B)
    with pytest.raises(Refused, match="full: 2 members"):
        house.admit(C)
    house.admit(A)
    house.admit(C, Role.WATCHER)


def test_a_copied_identity_is_noticed_by_its_nonce() -> None:
    house = House()
    house.enter(A)
    with pytest.raises(Refused, match="in use by a running process"):
        house.admit(A, nonce="another")
    with pytest.raises(Refused, match="in use by another running process"):
        house.book.check_hello(Hello(A, Role.TRAINER, "a", "another"), house.now)
    house.book.check_hello(Hello(A, Role.TRAINER, "a", "n"), house.now)
    house.now += 2 * house.manifest.rounds.heartbeat_s
    house.admit(A, nonce="another")
    house.book.check_hello(Hello(A, Role.TRAINER, "a", "another"), house.now)


def test_a_stream_that_ended_frees_the_identity_at_once() -> None:
    house = House()
    house.enter(A)
    house.handle(Detached(A, "other"))
    with pytest.raises(Refused):
        house.admit(A, nonce="another")
    house.handle(Detached(A, "n"))
    house.admit(A, nonce="another")


def test_roles_are_kept() -> None:
    house = House()
    house.admit(A)
    with pytest.raises(Refused, match=r"is a trainer .* asks to be a keeper"):
        house.admit(A, Role.KEEPER)
    with pytest.raises(Refused, match="admitted as trainer"):
        house.book.check_hello(Hello(A, Role.KEEPER, "a", "n"), house.now)
    with pytest.raises(Refused, match="experts 0 to 1"):
        house.book.check_hello(Hello(A, Role.TRAINER, "a", "n", experts=(7,)), house.now)


def test_a_watcher_is_no_member() -> None:
    house = House()
    assert house.admit(A, Role.WATCHER) == []
    assert house.book.members == {}


def test_nobody_joins_a_run_that_is_over() -> None:
    house = House()
    house.handle(Stop("enough"))
    assert house.book.is_over
    with pytest.raises(Refused, match=r"over \(enough\)"):
        house.admit(A)


def test_a_run_that_goes_on_names_its_successor_once() -> None:
    house, following = House(), RunId("5" * 64)
    assert house.handle(Succeed(following, "the way")) == [], "not before it is over"
    house.handle(Stop("it gets experts", awaits_successor=True))
    house.handle(Stop("again", awaits_successor=True))
    assert (house.book.swarm().is_stopped, house.book.swarm().awaits_successor) == (True, True)
    assert house.restored().swarm().awaits_successor
    for _ in range(2):
        house.handle(Succeed(following, "the way"))
    assert house.book.swarm().successor == "the way"
    assert [r for r in house.records if isinstance(r, ledger.Succeeded)] == [ledger.Succeeded(following)]
    after = house.restored()
    assert (after.successor_run, after.swarm().awaits_successor) == (following, True)
    assert after.swarm().successor == "", "the way lets in who reads it, so it is not in the ledger"


def test_a_run_that_was_ended_can_still_be_passed_on() -> None:
    house = House()
    house.handle(Stop("enough"))
    assert not house.book.swarm().awaits_successor
    house.handle(Stop("it goes on after all", awaits_successor=True))
    assert (house.book.swarm().awaits_successor, house.book.swarm().why) == (True, "enough")
    assert house.restored().is_over


def test_frozen_experts_are_given_to_nobody() -> None:
    rules = PlacementSpec(holders=1, experts_per_peer=4, adopt_s=10, frozen_experts=(1, 3))
    house = House(num_experts=4, placement=rules, genesis=GENESIS_OF_FOUR)
    house.enter(A)
    assert house.book.members[A].experts == (0, 2)
    stay(house, A, seconds=30)
    assert house.book.members[A].experts == (0, 2), "an expert that nobody trains is no orphan"
    assert house.book.fragments[FragmentId("expert.1/0")].active is None
    house.admit(B)
    with pytest.raises(Refused, match="expert 3 is frozen"):
        house.book.check_hello(Hello(B, Role.TRAINER, "b", "n", experts=(2, 3)), house.now)


def test_a_manifest_without_genesis_is_refused() -> None:
    with pytest.raises(ConfigError, match="genesis"):
        RoundBook.start(manifest(genesis=()), 0.0)


# ---------------------------------------------------------------- presence and rounds


def test_strangers_and_unknown_fragments_are_rejected() -> None:
    house = House()
    assert rejects(house.handle(Hello(A, Role.TRAINER, "a", "n"))) == ["not-a-member"]
    house.enter(A)
    assert rejects(house.handle(Holding(A, FragmentId("expert.9/0"), digest("x")))) == ["fragment"]
    assert rejects(house.handle(offer(A, fragment=FragmentId("nowhere/0")))) == ["fragment"]


def confirm_trunk(house: House) -> list[Effect]:
    """One round of the trunk, from its opening to its confirmation, with everybody who is here; what the last word led to."""
    house.handle(Tick(0.0), wait_s=3)
    trunk = house.book.fragments[TRUNK]
    assert trunk.active is not None
    roster = sorted(trunk.active.roster)
    for peer in sorted(trunk.active.holders):
        house.handle(offer(peer, trunk.number, base=trunk.anchor, fragment=TRUNK))
        for other in roster:
            if other != peer:
                house.handle(receipt(other, peer, trunk.number, fragment=TRUNK))
    effects: list[Effect] = []
    for peer in roster:
        effects += house.handle(attestation(peer, digest(f"anchor {trunk.number}"), trunk.number, fragment=TRUNK))
    assert house.book.fragments[TRUNK].anchor == digest(f"anchor {trunk.number}")
    for peer in roster:
        house.handle(Holding(peer, TRUNK, house.book.fragments[TRUNK].anchor))
    return effects


def test_two_trainers_and_a_keeper_confirm_a_round() -> None:
    house = House()
    for peer, role in ((A, Role.TRAINER), (B, Role.TRAINER), (C, Role.KEEPER)):
        house.enter(peer, role)
    effects = confirm_trunk(house)
    assert house.book.fragments[TRUNK].height == 1
    assert ViewChanged(TRUNK) in effects
    kinds = [type(e.record).__name__ for e in effects if isinstance(e, Write)]
    assert kinds[:2] == ["Confirmed", "Heads"]


def test_silence_is_suspected_after_a_lease_and_a_word_brings_back() -> None:
    house = House()
    house.enter(A)
    house.enter(B)
    house.handle(Heartbeat(B, 1, Counters()), wait_s=5)
    house.handle(Tick(0.0), wait_s=1.5)
    assert not house.book.members[A].is_live
    assert house.book.members[B].is_live
    house.handle(Heartbeat(A, 2, Counters(num_steps=7)))
    assert house.book.members[A].is_live
    assert house.book.members[A].counters.num_steps == 7


def test_a_goodbye_is_heard_at_once_and_a_late_detach_does_not_hurt_a_new_process() -> None:
    house = House()
    house.enter(A)
    house.handle(Goodbye(A, "bye"))
    assert not house.book.members[A].is_live
    house.handle(Hello(A, Role.TRAINER, "a", "second"))
    house.handle(Detached(A, "n"))
    assert house.book.members[A].nonce == "second"
    assert house.book.members[A].is_live


def test_placement_spreads_sticks_and_gives_way_to_wishes() -> None:
    house = House()
    house.enter(A)
    house.enter(B)
    assert {house.book.members[p].experts for p in (A, B)} == {(0,), (1,)}
    mine = house.book.members[A].experts
    house.enter(A)
    assert house.book.members[A].experts == mine
    house.enter(A, experts=(0, 1))
    assert house.book.members[A].experts == (0, 1)
    assert dict(house.book.coverage()) in ({0: 2, 1: 1}, {0: 1, 1: 2})
    assert house.restored().members[A].experts == (0, 1)


def stay(house: House, *peers: PeerId, seconds: float) -> list[Effect]:
    """Time passes while these peers speak and the others do not."""
    effects: list[Effect] = []
    for _ in range(int(seconds / 2)):
        for peer in peers:
            house.handle(Heartbeat(peer, 1, Counters()))
        effects += house.handle(Tick(0.0), wait_s=2)
    return effects


def test_an_expert_whose_holders_are_gone_gets_another_one_and_its_old_holder_keeps_it() -> None:
    house = House(placement=PlacementSpec(holders=2, experts_per_peer=1, adopt_s=30))
    house.enter(A)
    house.enter(B)
    (orphan,), (mine,) = house.book.members[A].experts, house.book.members[B].experts
    house.handle(Goodbye(A, "paused", comes_back=True))
    stay(house, B, seconds=28)
    assert house.book.members[B].experts == (mine,), "it may come back"
    effects = stay(house, B, seconds=6)
    assert house.book.members[B].experts == (0, 1)
    assert SwarmChanged() in effects
    assert ledger.Placed(B, (0, 1)) in house.records
    assert house.restored().members[B].experts == (0, 1)
    house.enter(A)
    assert house.book.members[A].experts == (orphan,)
    house.enter(B)
    assert house.book.members[B].experts == (0, 1), "a new stream of the adopter changes nothing"


def test_orphans_are_adopted_after_so_many_rounds_where_the_run_says_so() -> None:
    house = House(placement=PlacementSpec(holders=1, experts_per_peer=1, adopt_s=600, adopt_rounds=2))
    for peer, role in ((A, Role.TRAINER), (B, Role.TRAINER), (C, Role.KEEPER)):
        house.enter(peer, role)
    house.handle(Goodbye(A, "paused", comes_back=True))
    held = []
    for _ in range(3):
        confirm_trunk(house)
        house.handle(Tick(0.0))
        held.append(len(house.book.members[B].experts))
    assert house.book.fragments[TRUNK].height == 3
    assert held == [1, 2, 2], "nobody waits for a holder longer than two rounds, and nobody takes its experts before"


def test_who_leaves_for_good_hands_its_experts_over_at_once() -> None:
    house = House(num_experts=4, placement=PlacementSpec(holders=1, experts_per_peer=2, adopt_s=600), genesis=GENESIS_OF_FOUR)
    house.enter(A)
    house.enter(B, max_experts=3)
    left = house.book.members[A].experts
    effects = house.handle(Goodbye(A, "Ctrl-C"))
    now = house.book.members[B].experts
    assert len(now) == 3, "no more fit into its machine"
    assert set(now) - {e for e in range(4) if e not in left} == {min(left)}
    assert ledger.Placed(B, now) in house.records
    assert SwarmChanged() in effects
    house.enter(C)
    house.handle(Goodbye(C, "Ctrl-C"))
    assert house.book.members[B].experts == now, "there is still no room, and the run goes on"


def test_a_machine_with_little_memory_is_given_fewer_experts() -> None:
    house = House(num_experts=4, placement=PlacementSpec(holders=1, experts_per_peer=3, adopt_s=10), genesis=GENESIS_OF_FOUR)
    house.enter(A, max_experts=1)
    assert len(house.book.members[A].experts) == 1
    house.enter(B)
    assert len(house.book.members[B].experts) == 3
    house.enter(A, max_experts=2)
    assert len(house.book.members[A].experts) == 2, "its owner gave it more"
    house.enter(B, max_experts=1)
    assert len(house.book.members[B].experts) == 1


def test_orphans_are_spread_and_wishes_are_respected() -> None:
    house = House(num_experts=4, placement=PlacementSpec(holders=1, experts_per_peer=1, adopt_s=10), genesis=GENESIS_OF_FOUR)
    house.enter(A, experts=(0,))
    house.enter(B)
    house.enter(C)
    stay(house, A, B, C, seconds=20)
    assert house.book.members[A].experts == (0,), "it asked for this one"
    assert sorted(house.book.members[B].experts + house.book.members[C].experts) == [1, 2, 3]
    assert all(house.book.coverage()[e] == 1 for e in range(4))
    house.handle(Stop("over"))
    house.handle(Goodbye(B, "off"))
    before = house.book.members[C].experts
    stay(house, A, C, seconds=20)
    assert house.book.members[C].experts == before, "a run that ends adopts nothing"


def test_a_trainer_follows_what_it_does_not_train() -> None:
    house = House()
    house.enter(A, experts=(1,))
    house.enter(C, Role.KEEPER)
    assert house.book.view(EXPERT_0, house.now).ready == (A, C)
    assert house.book.fragments[EXPERT_0].active is None


@pytest.mark.parametrize(
    ("stop", "why"),
    [(StopSpec(tokens=100), "100 tokens"), (StopSpec(rounds=1), "1 rounds of the trunk"), (StopSpec(date=500.0), "last day")],
)
def test_the_run_ends_by_itself(stop: StopSpec, why: str) -> None:
    house = House(stop=stop)
    house.enter(A)
    house.enter(B)
    assert house.book.stopping is None
    confirm_trunk(house)
    house.handle(Tick(500.0))
    assert house.book.stopping is not None
    assert why in house.book.stopping
    again = house.restored()
    assert (again.stopping, again.is_over) == (house.book.stopping, house.book.is_over)
    for _ in range(20):
        house.handle(Tick(500.0), wait_s=5)
    assert house.book.is_over, "its last rounds have an end, too"


def test_another_runs_ledger_is_refused() -> None:
    house = House()
    with pytest.raises(IntegrityError, match="this manifest is run"):
        RoundBook.restore(house.manifest, [ledger.Started(RunId("0" * 64), ())], 0.0)
    with pytest.raises(IntegrityError, match="fragment"):
        RoundBook.restore(house.manifest, [ledger.RolledBack(FragmentId("x/0"), 0, digest("a"), "")], 0.0)


# ---------------------------------------------------------------- any story, restarted anywhere

members = st.sampled_from(PEERS)
words = st.one_of(
    st.tuples(st.just("admit"), members, st.sampled_from(["t1", "t2"])),
    st.tuples(st.just("enter"), members, st.sampled_from([None, (0,), (0, 1), (1,)])),
    st.tuples(st.just("work"), members, st.sampled_from([TRUNK, EXPERT_0])),
    st.tuples(st.just("work"), members, st.sampled_from([TRUNK, EXPERT_0])),
    st.tuples(st.just("goodbye"), members, st.just(None)),
    st.tuples(st.just("revoke"), st.sampled_from(["t2", E]), st.just(None)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 7.0, 25.0]), st.just(None)),
    st.tuples(st.just("garbage"), members, st.integers(0, 3)),
    st.tuples(st.just("stop"), st.just(None), st.just(None)),
)


def role_of(peer: PeerId) -> Role:
    return Role.KEEPER if peer == C else Role.TRAINER


def act(house: House, word: tuple[str, object, object]) -> list[Effect]:
    kind, who, what = word
    match kind:
        case "admit":
            try:
                return house.admit(who, role_of(who), token=what, uses=2)  # type: ignore[arg-type]
            except Refused:
                return []
        case "enter":
            holdings = tuple(Holding(who, f, b.anchor) for f, b in house.book.fragments.items())  # type: ignore[arg-type]
            experts = what if role_of(who) is Role.TRAINER else None  # type: ignore[arg-type]
            return house.handle(Hello(who, role_of(who), "x", "n", experts=experts, holdings=holdings))  # type: ignore[arg-type]
        case "work":
            return work(house, who, what)  # type: ignore[arg-type]
        case "goodbye":
            return house.handle(Goodbye(who, "bye"))  # type: ignore[arg-type]
        case "revoke":
            return house.handle(Revoke(str(who), "why"))
        case "wait":
            return house.handle(Tick(0.0), wait_s=who)  # type: ignore[arg-type]
        case "stop":
            return house.handle(Stop("enough")) if len(house.records) > 12 else []
    lies: list[Offer | Receipt | Attestation] = [offer(who, 99), offer(who), receipt(who, A), attestation(who, digest("lie"))]  # type: ignore[arg-type]
    return house.handle(lies[what])  # type: ignore[index]


def work(house: House, peer: PeerId, fragment: FragmentId) -> list[Effect]:
    """What an honest member would say next about a fragment."""
    book = house.book.fragments[fragment]
    active = book.active
    if active is None:
        return house.handle(Holding(peer, fragment, book.anchor))
    if active.settlement is not None:
        return house.handle(attestation(peer, digest(f"{fragment} {book.number} of {book.anchor}"), book.number, fragment=fragment))
    effects = house.handle(offer(peer, book.number, base=book.anchor, fragment=fragment)) if peer in active.holders else []
    for known in active.offers:
        effects += house.handle(receipt(peer, known.peer, book.number, fragment=fragment))
    return effects


@given(st.lists(words, max_size=60))
@settings(max_examples=120)
def test_a_restart_after_any_story_gives_an_equal_book(story: list[tuple[str, object, object]]) -> None:
    house = House()
    for word in story:
        effects = act(house, word)
        check_effects(house, effects)
    check_restart(house)


@given(st.lists(words, min_size=10, max_size=40), st.lists(words, max_size=20))
@settings(max_examples=60)
def test_a_story_goes_on_after_a_restart(before: list[tuple[str, object, object]], after: list[tuple[str, object, object]]) -> None:
    house = House()
    for word in before:
        act(house, word)
    house.book = house.restored()
    for word in after:
        check_effects(house, act(house, word))
    check_restart(house)


def check_effects(house: House, effects: Sequence[Effect]) -> None:
    changed = {e.fragment for e in effects if isinstance(e, ViewChanged)}
    for effect in effects:
        if isinstance(effect, Write) and isinstance(effect.record, ledger.Opened | ledger.Confirmed | ledger.GaveUp):
            assert effect.record.fragment in changed, "whatever is decided is told"
    for fragment, book in house.book.fragments.items():
        numbers = [r.round for r in house.records if isinstance(r, ledger.Opened) and r.fragment == fragment]
        assert numbers == list(range(1, book.number + 1))
        if book.active is not None:
            assert not house.book.is_over
    assert all(len(peers) <= 2 for peers in house.book.token_uses.values())
    assert len(house.book.members.keys() - house.book.revoked) <= house.manifest.admission.max_members
    assert house.book.swarm().version >= 0


def check_restart(house: House) -> None:
    again = house.restored()
    for fragment, book in house.book.fragments.items():
        other = again.fragments[fragment]
        assert (other.anchor, other.height, other.number, other.tally) == (book.anchor, book.height, book.number, book.tally)
        assert (other.active is None) == (book.active is None)
    assert again.token_uses == house.book.token_uses
    assert again.revoked == house.book.revoked
    assert (again.stopping, again.is_over) == (house.book.stopping, house.book.is_over)
    assert {p: (m.role, m.experts) for p, m in again.members.items()} == {p: (m.role, m.experts) for p, m in house.book.members.items()}


def _ending_with_a_keeper_that_is_not_back() -> House:
    """Service and keeper were one process that died and started again; the service is back first, and the run ends just then."""
    house = House()
    house.enter(C, Role.KEEPER)
    house.book = house.restored()
    house.handle(Stop("the last day is over"))
    for _ in range(6):
        house.handle(Tick(0.0), wait_s=5)
    assert not house.book.is_over, "trainers may leave when it is, and nobody would have its result"
    return house


def test_the_end_waits_for_a_keeper_that_is_not_back_since_the_service_is() -> None:
    house = _ending_with_a_keeper_that_is_not_back()
    house.enter(C, Role.KEEPER)
    assert house.book.is_over


def test_the_end_waits_longer_for_the_only_keeper_than_for_trainers() -> None:
    house = House()
    house.enter(A)
    house.enter(C, Role.KEEPER, holds=False)  # it is fetching the anchors
    confirm_trunk(house)
    house.handle(Stop("enough"))
    house.handle(Goodbye(A, "off"))
    for _ in range(6):
        house.handle(Heartbeat(C, 1, Counters()), wait_s=3)
        house.handle(Tick(0.0))
    assert not house.book.is_over
    for fragment, book in house.book.fragments.items():
        house.handle(Holding(C, fragment, book.anchor))
    assert house.book.is_over


def test_the_end_does_not_wait_for_a_keeper_for_ever() -> None:
    house = _ending_with_a_keeper_that_is_not_back()
    house.handle(Tick(0.0), wait_s=KEEPER_S)
    assert house.book.is_over
