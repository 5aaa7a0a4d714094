"""Who may write a ledger: services that the run key vouches for, one after the other, each of a higher term than the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decentra.errors import IntegrityError
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, PeerId, RunId
from decentra.protocol import ledger
from decentra.protocol.messages import Attestation, Entry, Merge, Merged, Offer, Role, Settlement
from decentra.wire.frames import open_fact, seal_fact
from decentra.wire.ledgers import LedgerReader, Words, check_words
from decentra.wire.signed import purpose_of
from decentra.wire.trust import LEDGER, ServiceCertificate, TrustChain, seal_certificate

RUN = RunId("a" * 64)
RUN_KEY, FIRST, SECOND, MALLORY = (Keypair.from_seed(bytes([n]) * 32) for n in range(1, 5))
GENESIS = ((FragmentId("trunk/0"), Digest("c" * 64)),)


def certified(service: Keypair, term: int, *, by: Keypair = RUN_KEY, said: int | None = None) -> ledger.Certified:
    return ledger.Certified(said or term, seal_certificate(by, RUN, ServiceCertificate(service.public, b"\7" * 32, 1, term)))


def admitted(number: int) -> ledger.Admitted:
    return ledger.Admitted(PeerId(f"peer-{number}"), Role.TRAINER, "")


def sealed(*lines: tuple[ledger.Record, Keypair]) -> list[bytes]:
    book = ledger.Ledger()
    found = []
    for record, writer in lines:
        line = book.append(record)
        found.append(writer.sign(purpose_of(LEDGER, RUN), line) + line)
    return found


def read(records: list[bytes], end: Keypair | None = None) -> LedgerReader:
    reader = LedgerReader(TrustChain(RUN, RUN_KEY.public))
    for record in records:
        reader.accept(record)
    if end is not None:
        reader.finish(end.public)
    return reader


STARTED = (ledger.Started(RUN, GENESIS), FIRST)


def test_one_service_then_another_of_a_higher_term() -> None:
    reader = read(
        sealed(
            STARTED, (certified(FIRST, 1), FIRST), (admitted(1), FIRST), (certified(FIRST, 1), FIRST), (certified(SECOND, 2), SECOND),
            (admitted(2), SECOND), (certified(SECOND, 5), SECOND),
        )
    )  # fmt: skip
    assert reader.newest is not None
    assert (reader.newest.term, reader.newest.service_public) == (5, SECOND.public)
    assert reader.num_records == 7


def test_a_ledger_without_certificates_is_its_services() -> None:
    lines = sealed(STARTED, (admitted(1), FIRST))
    read(lines, FIRST)
    with pytest.raises(IntegrityError, match="record 1 is not signed by the run's service"):
        read(lines, SECOND)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([(STARTED[0], MALLORY), (certified(FIRST, 1), FIRST)], "record 1 is not signed"),
        ([STARTED, (certified(FIRST, 1), FIRST), (admitted(1), MALLORY)], "record 3 is not signed"),
        ([STARTED, (certified(FIRST, 1), MALLORY)], "record 1 is not signed|record 2 is not signed"),
        ([STARTED, (certified(FIRST, 1, by=MALLORY), FIRST)], "certificate that does not hold"),
        ([STARTED, (certified(FIRST, 1), FIRST), (certified(SECOND, 1), SECOND)], "two services wrote here"),
        ([STARTED, (certified(FIRST, 3), FIRST), (certified(SECOND, 2), SECOND)], "two services wrote here"),
        ([STARTED, (certified(FIRST, 3), FIRST), (certified(FIRST, 2), FIRST)], "two services wrote here"),
        ([STARTED, (certified(FIRST, 1, said=2), FIRST)], "of term 1"),
        ([STARTED, (certified(FIRST, 1), FIRST), (certified(SECOND, 2), SECOND), (admitted(1), FIRST)], "record 4 is not signed"),
    ],
    ids=["first", "line", "certificate's line", "certificate", "same term", "lower term", "own lower term", "lies of its term", "replaced one writes on"],
)  # fmt: skip
def test_what_nobody_vouches_for(lines: list[tuple[ledger.Record, Keypair]], says: str) -> None:
    with pytest.raises(IntegrityError, match=says):
        read(sealed(*lines))


def test_a_service_of_an_earlier_term_was_replaced() -> None:
    chain = TrustChain(RUN, RUN_KEY.public)
    old, new = (ServiceCertificate(FIRST.public, b"\7" * 32, 1, term) for term in (1, 2))
    assert chain.why_replaced(old) is None
    chain.note(new)
    assert chain.why_replaced(new) is None
    assert "served in term 2" in str(chain.why_replaced(old))
    chain.note(old)
    assert chain.term == 2


def test_of_two_services_of_one_term_the_first_counts() -> None:
    chain = TrustChain(RUN, RUN_KEY.public)
    first, other = (ServiceCertificate(key.public, b"\7" * 32, 1, 5) for key in (FIRST, SECOND))
    chain.note(first)
    assert chain.why_replaced(first) is None
    assert "another service has term 5 as well" in str(chain.why_replaced(other))


# ---------------------------------------------------------------- what members are said to have said

ALICE, BOB = FIRST, SECOND  # keys like any other


def proven(key: Keypair, fact: Offer | Merge | Attestation) -> Offer | Merge | Attestation:
    found: Offer | Merge | Attestation = open_fact(type(fact), seal_fact(key, RUN, fact), RUN, key.peer_id)
    return found


def one_round(*, merged: bool = False) -> list[ledger.Record]:
    fragment, base, anchor = FragmentId("trunk/0"), Digest("c" * 64), Digest("e" * 64)
    entries = []
    for key in sorted((ALICE, BOB), key=lambda k: k.peer_id):
        offered = proven(key, Offer(fragment, 1, key.peer_id, base, Digest("d" * 64), 10, 100, 5, 0x3F800000))
        entries.append(Entry(key.peer_id, Digest("d" * 64), 10, 100, 1, 0x3F800000, 1, 5, offered.proof))
    settlement = Settlement(fragment, 1, 1, base, tuple(entries), 1, 1, "")
    proofs: tuple[bytes, ...] = ()
    if merged:
        pair = tuple(sorted((ALICE.peer_id, BOB.peer_id)))
        keys = {k.peer_id: k for k in (ALICE, BOB)}
        proofs = tuple(proven(keys[p], Merge(fragment, 1, p, Digest("f" * 64), 7, Digest("9" * 64))).proof for p in pair)
        settlement = replace(settlement, reducers=pair, merged=Merged(Digest("f" * 64), 7, Digest("9" * 64)))
    words = tuple(proven(k, Attestation(fragment, 1, k.peer_id, anchor)).proof for k in (ALICE, BOB))
    confirmed = ledger.Confirmed(fragment, 1, 1, anchor, (ALICE.peer_id, BOB.peer_id), False, "", words)
    return [ledger.Settled(settlement, proofs), confirmed]


def test_what_members_signed_counts() -> None:
    assert check_words(one_round(), RUN) == Words(2, 0, 2, 0)
    assert check_words(one_round(merged=True), RUN) == Words(2, 2, 2, 0)


def test_older_ledgers_hold_whole_statements_or_nothing() -> None:
    settled, confirmed = one_round()
    whole = seal_fact(ALICE, RUN, Attestation(confirmed.fragment, 1, ALICE.peer_id, confirmed.anchor))  # type: ignore[union-attr]
    bare = tuple(replace(e, proof=b"", num_steps=0) for e in settled.settlement.entries)  # type: ignore[union-attr]
    old = [ledger.Settled(replace(settled.settlement, entries=bare)), replace(confirmed, proofs=(whole,))]  # type: ignore[union-attr, type-var]
    assert check_words(old, RUN) == Words(0, 0, 1, 3)


def test_a_word_that_its_member_did_not_give_is_found() -> None:
    settled, confirmed = one_round(merged=True)
    s, entries = settled.settlement, settled.settlement.entries  # type: ignore[union-attr]
    lies = {
        "offered": [replace(settled, settlement=replace(s, entries=(replace(entries[0], num_tokens=7), entries[1])))],
        "merged": [replace(settled, settlement=replace(s, merged=replace(s.merged, packet=Digest("8" * 64))))],
        "attested": [replace(confirmed, anchor=Digest("7" * 64))],
    }
    for what, records in lies.items():
        with pytest.raises(IntegrityError, match=f"{what} this in round 1 of trunk/0, and there is no signature of that peer"):
            check_words(records, RUN)
    with pytest.raises(IntegrityError):
        check_words([settled, confirmed], RunId("b" * 64))


def test_a_service_that_keeps_signatures_leaves_none_out() -> None:
    settled, confirmed = one_round(merged=True)
    s = settled.settlement  # type: ignore[union-attr]
    bare = replace(settled, settlement=replace(s, entries=tuple(replace(e, proof=b"") for e in s.entries)))  # type: ignore[type-var]
    with pytest.raises(IntegrityError, match="offered this in round 1"):
        check_words([settled, confirmed, bare], RUN)
    assert check_words([replace(settled, proofs=())], RUN).num_unsigned == 2, "its reducers' words"
