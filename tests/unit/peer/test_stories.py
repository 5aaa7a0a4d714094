"""A service that tells two stories is found out by what members say in public; one that tells one is not, whatever others make up."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from decentra.errors import IntegrityError
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, PeerId, RunId
from decentra.peer.stories import EVIDENCE_FILE, FIRST_TELL_S, NUM_KEPT, NUM_TOLD, TELL_S, WORDS_FILE, Stories
from decentra.protocol.messages import FragmentView, Heard, Phase, Told
from decentra.sim.adapters import InlineCompute, SimClock, SimDisk, SimEvents, SimExchange, SimNet
from decentra.sim.loop import run_virtual
from decentra.wire.convert import encode
from decentra.wire.frames import is_told, sign_told
from decentra.wire.trust import ServiceCertificate, TrustChain, seal_certificate

RUN = RunId("a" * 64)
RUN_KEY, SERVICE, MALLORY = (Keypair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
TRUNK = FragmentId("trunk/0")
GENESIS = Digest("0" * 64)
A, B = PeerId("a"), PeerId("b")


def word(seq: int, anchor: str, *, term: int = 1, fragment: FragmentId = TRUNK, by: Keypair = SERVICE) -> Told:
    return sign_told(by, RUN, Told(fragment, term, seq, Digest(anchor * 64), seq, Digest(anchor * 64)))


def view(told: Told) -> FragmentView:
    return FragmentView(told.fragment, 1, told.height, told.anchor, 1, Phase.IDLE, "", told=told)


def certificate(service: Keypair, term: int) -> bytes:
    return seal_certificate(RUN_KEY, RUN, ServiceCertificate(service.public, b"\7" * 32, 1, term))


class Swarm:
    """Members that hear each other, without any service."""

    def __init__(self, *peers: PeerId, term: int = 1) -> None:
        self.net, self.exchanges = SimNet(Random(1)), dict[PeerId, SimExchange]()
        self.log: list[tuple[float, str, str, dict[str, Any]]] = []
        self.disks = {p: SimDisk(Random(2)) for p in peers}
        self.trusts: dict[PeerId, TrustChain] = {}
        self.stories = {p: self._member(p, term) for p in peers}

    def _member(self, peer: PeerId, term: int) -> Stories:
        exchange = SimExchange(peer, self.disks[peer], self.net, self.exchanges)
        fragments = {TRUNK: GENESIS} | {FragmentId(f"expert.{n}/0"): GENESIS for n in range(20)}
        self.trusts[peer] = trust = TrustChain(RUN, RUN_KEY.public)
        trust.note(trust.check_certificate(certificate(SERVICE, term), None))
        return Stories(
            peer, fragments, exchange, self.disks[peer], SimClock(), InlineCompute(Random(3)), SimEvents(peer, self.log), trust.is_told,
            trust.contradicts, lambda: certificate(SERVICE, term),
        )  # fmt: skip

    def ends(self, within_s: float = 10 * TELL_S) -> dict[PeerId, str]:
        """Who ends within that time, and why."""

        async def story() -> dict[PeerId, str]:
            tasks = {p: asyncio.create_task(_life(s)) for p, s in self.stories.items()}
            await asyncio.wait(tasks.values(), timeout=within_s)
            ended = {p: str(t.exception()) for p, t in tasks.items() if t.done()}
            for task in tasks.values():
                task.cancel()
            return ended

        return run_virtual(story())


def tell(stories: Stories, *words: Told) -> None:
    """As a member's loop does: what is a second story ends the stream, not the member."""
    for told in words:
        with suppress(IntegrityError):
            stories.saw(view(told))


async def _life(stories: Stories) -> None:
    await stories.load()
    await stories.run()


def test_two_members_that_were_told_differently_both_find_out_and_have_the_proof() -> None:
    swarm = Swarm(A, B)
    for peer, last in ((A, "e"), (B, "f")):
        for told in (word(3, "d"), word(6, last)):
            swarm.stories[peer].saw(view(told))
    ended = swarm.ends()
    assert ended.keys() == {A, B}
    assert all("told two stories: line 6 of trunk/0" in why and "ask the organiser" in why.lower() for why in ended.values())
    evidence = json.loads(swarm.disks[A].read(EVIDENCE_FILE) or b"")
    words = [Told(**{**one, "proof": bytes.fromhex(one["proof"])}) for one in evidence["told"]]
    assert {w.anchor[0] for w in words} == {"e", "f"}
    assert {w.seq for w in words} == {6}
    assert all(is_told(w, RUN, SERVICE.public) for w in words), "anybody who knows the service's key can check it"
    assert set(evidence["heard_by"]) == {A, B}


def test_a_service_that_came_back_with_an_older_ledger_is_found_out_by_one_member_alone() -> None:
    swarm = Swarm(A)
    tell(swarm.stories[A], word(3, "d"), word(6, "e"), word(6, "f"))
    assert "as it was told another time" in swarm.ends()[A]


def test_a_service_that_tells_one_story_is_believed_by_members_of_different_speed() -> None:
    swarm = Swarm(A, B)
    for seq in range(3, 3 * 400, 3):
        swarm.stories[A].saw(view(word(seq, f"{seq % 10}")))
        if seq % 9 == 0:
            swarm.stories[B].saw(view(word(seq, f"{seq % 10}")))
    assert swarm.ends() == {}
    assert len(swarm.stories[A]._words[TRUNK]) == NUM_KEPT


def test_another_machine_may_say_otherwise_in_a_later_term_and_words_of_earlier_ones_count_for_nothing() -> None:
    swarm = Swarm(A, B, term=2)
    swarm.stories[A].saw(view(word(6, "e")))
    swarm.stories[A].saw(view(word(3, "f", term=2)))
    swarm.stories[A].saw(view(word(6, "d")))  # arrived late
    swarm.stories[B].saw(view(word(6, "e")))  # B never heard of the second machine
    assert swarm.ends() == {}


@pytest.mark.parametrize(
    "lie", [word(6, "f", by=MALLORY), replace(word(6, "e"), anchor=Digest("f" * 64)), replace(word(6, "f"), proof=b"")]
)
def test_a_member_cannot_make_up_a_second_story(lie: Told) -> None:
    swarm = Swarm(A, B)
    swarm.stories[A].saw(view(word(6, "e")))
    swarm.exchanges[B].said = encode(Heard((lie, word(6, "e"))))
    assert swarm.ends().keys() == set()
    swarm.exchanges[B].said = b"\xff no words"
    assert swarm.ends().keys() == set()
    assert any(event == "record-ignored" for _, _, event, _ in swarm.log)


def test_all_fragments_have_their_turn_and_nothing_is_said_before_there_is_something() -> None:
    swarm = Swarm(A)
    assert swarm.ends(10 * FIRST_TELL_S) == {}
    assert swarm.exchanges[A].said == b""
    fragments = [FragmentId(f"expert.{n}/0") for n in range(20)]
    for fragment in fragments:
        swarm.stories[A].saw(view(word(3, "d", fragment=fragment)))
    said = [swarm.stories[A]._newest(turn) for turn in range(5)]
    assert {told.fragment for words in said for told in words} == set(fragments)
    assert max(map(len, said)) == NUM_TOLD


def test_a_beginning_that_is_not_the_manifests_is_refused() -> None:
    stories = Swarm(A).stories[A]
    stories.saw(view(word(0, "0")))
    with pytest.raises(IntegrityError, match="begins with anchor dddd"):
        stories.saw(view(word(0, "d")))
    with pytest.raises(IntegrityError, match="nothing it says is believed"):
        stories.saw(replace(view(word(0, "0")), told=None))
    with pytest.raises(IntegrityError, match="has no such fragment"):
        stories.saw(view(word(3, "d", fragment=FragmentId("trunk/7"))))


def test_a_service_does_not_go_back_within_its_term() -> None:
    swarm = Swarm(A)
    tell(swarm.stories[A], word(3, "d"), word(6, "e"), word(6, "e"))
    with pytest.raises(IntegrityError, match="now line 3 is said to be the newest"):
        swarm.stories[A].saw(view(word(3, "d")))
    assert "line 6 of trunk/0 made anchor eeee" in swarm.ends()[A]


def test_what_was_found_and_what_was_told_outlive_the_process() -> None:
    swarm = Swarm(A)
    swarm.stories[A].saw(view(word(6, "e")))
    assert swarm.ends() == {}
    swarm.stories[A] = swarm._member(A, 1)  # the next process is told otherwise
    disk = swarm.disks[A]

    async def goes_on() -> None:
        await swarm.stories[A].load()
        tell(swarm.stories[A], told)

    told = word(6, "f")
    run_virtual(goes_on())
    assert "told two stories" in swarm.ends()[A]
    evidence = disk.read(EVIDENCE_FILE)
    for told, is_over in ((word(9, "f"), True), (word(3, "d", term=2), False)):  # the same service speaks; another machine took over
        swarm.stories[A] = swarm._member(A, told.term)
        run_virtual(goes_on())
        assert ("an earlier process of this peer found out" in swarm.ends().get(A, "")) == is_over
        assert disk.read(EVIDENCE_FILE) == evidence
    swarm.stories[A] = swarm._member(A, 2)
    for name in (EVIDENCE_FILE, WORDS_FILE):
        disk.write(name, b"{ damaged")
    assert swarm.ends() == {}
    assert {fields["file"] for _, _, event, fields in swarm.log if event == "damaged-file"} == {EVIDENCE_FILE, WORDS_FILE}


def test_two_services_of_one_term_are_found_out_and_of_two_terms_the_later_one_counts() -> None:
    swarm = Swarm(A, B)
    for peer in (A, B):
        swarm.stories[peer].saw(view(word(3, "d")))
    swarm.exchanges[B].said = encode(Heard((word(3, "d"),), certificate(MALLORY, 1)))
    swarm.stories.pop(B)
    assert "another service of term 1" in swarm.ends()[A]
    swarm = Swarm(A)
    other = SimExchange(B, SimDisk(Random(4)), swarm.net, swarm.exchanges)
    other.said = encode(Heard((word(3, "e", term=9, by=MALLORY),), certificate(MALLORY, 9)))
    swarm.stories[A].saw(view(word(3, "d")))
    assert swarm.ends() == {}
    assert swarm.trusts[A].term == 9, "it looks for that one now, and leaves its own"
    other.said = encode(Heard((), b"no certificate"))
    assert swarm.ends() == {}
