"""Whom most holders object to is in no roster for so many rounds of the trunk, and exactly so many."""

from __future__ import annotations

from dataclasses import replace

from protocol_world import PEERS, House, attestation, digest, offer, receipt, rejects

from decentra.config import AdmissionSpec, JudgeSpec
from decentra.ids import FragmentId, PeerId
from decentra.protocol import ledger
from decentra.protocol.membership import Member
from decentra.protocol.messages import Holding
from decentra.protocol.rounds import RollBack, Tick

A, B, C, D, _ = PEERS
TRUNK = FragmentId("trunk/0")


def judging_house(quarantine_rounds: int) -> House:
    house = House(judging=JudgeSpec(share=0.2, quarantine_rounds=quarantine_rounds), admission=AdmissionSpec(max_members=9))
    for peer in (A, B, C, D):
        house.enter(peer)  # with the first a round opens at once
    return house


def next_round(house: House, objected: PeerId | None = None) -> frozenset[PeerId]:
    """Plays one round of the trunk in which all but one object to ``objected``; who was in it."""
    for peer in (A, B, C, D):
        house.handle(Holding(peer, TRUNK, house.book.fragments[TRUNK].anchor))
    house.handle(Tick(0.0), wait_s=3)
    trunk = house.book.fragments[TRUNK]
    assert trunk.active is not None
    holders = trunk.active.holders
    for peer in sorted(holders):
        house.handle(offer(peer, trunk.number, base=trunk.anchor, fragment=TRUNK))
    for sender in sorted(holders):
        for judge in sorted(holders - {sender}):
            house.handle(receipt(judge, sender, trunk.number, fragment=TRUNK, objects=sender == objected))
    for peer in sorted(holders)[:2]:
        house.handle(attestation(peer, digest(f"anchor {trunk.number}"), trunk.number, fragment=TRUNK))
    return holders


def test_who_was_condemned_is_in_no_roster_for_some_rounds_and_longer_the_next_time() -> None:
    house = judging_house(2)
    assert next_round(house) == {A}
    assert next_round(house, D) == {A, B, C, D}
    assert "does not help; for 2 more rounds" in next(m for m in house.book.swarm().members if m.peer == D).quarantine
    assert rejects(house.handle(offer(D, 3, fragment=TRUNK))) == ["future"]
    before = house.book.members[D]
    assert replace(house.restored().members[D], heard_at=before.heard_at) == replace(before, **_unrestored(before))
    assert [next_round(house) for _ in range(2)] == [{A, B, C}] * 2
    assert next_round(house, D) == {A, B, C, D}, "it is over by itself"
    assert next(m for m in house.book.swarm().members if m.peer == D).quarantine
    assert [next_round(house) for _ in range(5)] == [{A, B, C}] * 4 + [{A, B, C, D}], "twice as long"
    assert [(r.peer, r.until_height) for r in house.records if isinstance(r, ledger.Quarantined)] == [(D, 4), (D, 9)]


def test_a_quarantine_lasts_as_many_rounds_where_the_run_goes_back_meanwhile() -> None:
    house = judging_house(4)
    for _ in range(3):
        next_round(house)
    before = house.book.fragments[TRUNK]
    assert next_round(house, D) == {A, B, C, D}
    assert [next_round(house) for _ in range(2)] == [{A, B, C}] * 2
    assert "for 2 more rounds" in next(m for m in house.book.swarm().members if m.peer == D).quarantine
    house.handle(RollBack(TRUNK, before.height, before.anchor, "the organiser says so"))
    assert "for 2 more rounds" in next(m for m in house.book.swarm().members if m.peer == D).quarantine
    assert house.restored().members[D].quarantined_until == house.book.members[D].quarantined_until
    assert [next_round(house) for _ in range(3)] == [{A, B, C}] * 2 + [{A, B, C, D}]


def _unrestored(member: Member) -> dict[str, object]:
    """What a ledger does not hold of a member."""
    fresh = Member(member.peer, member.role, "", heard_at=member.heard_at, is_live=True)
    names = (
        "name",
        "insists",
        "may_reduce",
        "is_partial",
        "max_experts",
        "addresses",
        "nonce",
        "heard_at",
        "is_live",
        "has_greeted",
        "counters",
    )
    return {name: getattr(fresh, name) for name in names}
