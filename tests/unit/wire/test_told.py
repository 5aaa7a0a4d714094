"""What the service says is confirmed carries its signature, and is in the ledger that it shows to others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decentra.errors import IntegrityError
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, PeerId, RunId
from decentra.protocol import ledger
from decentra.protocol.messages import FragmentView, Phase, Told
from decentra.wire.convert import decode, encode
from decentra.wire.frames import check_told, sign_told
from decentra.wire.ledgers import LedgerReader
from decentra.wire.signed import purpose_of
from decentra.wire.trust import LEDGER, ServiceCertificate, TrustChain, seal_certificate

RUN = RunId("a" * 64)
RUN_KEY, SERVICE, OTHER = (Keypair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
TRUNK = FragmentId("trunk/0")
PEER = PeerId("12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo")
WORD = Told(TRUNK, 2, 5, Digest("b" * 64), 7, Digest("c" * 64))


def view(told: Told | None, **changes: object) -> FragmentView:
    shown = {"height": 7, "anchor": Digest("c" * 64), **changes}
    return FragmentView(TRUNK, 1, round=1, phase=Phase.IDLE, why="", told=told, **shown)  # type: ignore[arg-type]


def test_a_signed_word_travels_and_holds() -> None:
    signed = sign_told(SERVICE, RUN, WORD)
    there = decode(FragmentView, encode(view(signed)))
    assert there.told == signed
    check_told(there, RUN, 2, SERVICE.public)


@pytest.mark.parametrize(
    "wrong",
    [
        view(None), view(None, height=0), view(WORD), view(sign_told(OTHER, RUN, WORD)), view(sign_told(SERVICE, RunId("e" * 64), WORD)),
        view(sign_told(SERVICE, RUN, replace(WORD, term=3))), view(sign_told(SERVICE, RUN, WORD), height=8),
        view(sign_told(SERVICE, RUN, WORD), anchor=Digest("d" * 64)), view(replace(sign_told(SERVICE, RUN, WORD), seq=6)),
        view(replace(sign_told(SERVICE, RUN, WORD), line=Digest("d" * 64))), view(sign_told(SERVICE, RUN, replace(WORD, fragment=FragmentId("router/0")))),
    ],
    ids=["missing", "missing at first", "unsigned", "another key", "another run", "another term", "height", "anchor", "place", "line", "fragment"],
)  # fmt: skip
def test_a_view_whose_anchor_is_not_the_services_word_is_not_believed(wrong: FragmentView) -> None:
    with pytest.raises(IntegrityError, match="does not sign that; nothing it says is believed"):
        check_told(wrong, RUN, 2, SERVICE.public)


# ---------------------------------------------------------------- against a whole ledger


def shown(*anchors: str, term: int = 1) -> tuple[list[bytes], list[Told]]:
    """A ledger that confirms these anchors one after the other, and the words that its service gives for them."""
    book, sealed, words = ledger.Ledger(), [], []
    certificate = seal_certificate(RUN_KEY, RUN, ServiceCertificate(SERVICE.public, b"\7" * 32, 1, term))
    begin = ledger.Started(RUN, ((TRUNK, Digest("0" * 64)),)), ledger.Certified(term, certificate)
    moves = [ledger.Confirmed(TRUNK, n, n, Digest(a * 64), (PEER,), True, "") for n, a in enumerate(anchors, 1)]
    for record in (*begin, *moves):
        line = book.append(record)
        sealed.append(SERVICE.sign(purpose_of(LEDGER, RUN), line) + line)
        if isinstance(record, ledger.Confirmed):
            seq, digest = book.heads[TRUNK]
            words.append(sign_told(SERVICE, RUN, Told(TRUNK, term, seq, digest, record.height, record.anchor)))
    return sealed, words


def compared(sealed: list[bytes], heard: list[Told]) -> int:
    reader = LedgerReader(TrustChain(RUN, RUN_KEY.public), "this ledger", heard=[(PEER, told) for told in heard])
    for one in sealed:
        reader.accept(one)
    reader.finish(SERVICE.public)
    reader.compare()
    return reader.num_compared


def test_words_that_the_ledger_holds_are_counted() -> None:
    sealed, words = shown("b", "c", "d")
    assert compared(sealed, words) == 3
    first = Told(TRUNK, 1, 0, ledger.FIRST, 0, Digest("0" * 64))
    assert compared(sealed, [sign_told(SERVICE, RUN, first)]) == 1
    with pytest.raises(IntegrityError, match="line 0 of trunk/0 made anchor 0000"):
        compared(sealed, [sign_told(SERVICE, RUN, replace(first, anchor=Digest("e" * 64)))])
    assert compared(sealed, [replace(words[0], anchor=Digest("e" * 64)), sign_told(OTHER, RUN, words[1])]) == 0  # nobody's, or another's


def test_a_ledger_that_is_not_the_one_members_were_told_of() -> None:
    sealed, _ = shown("b", "c", "d")
    for others in (("b", "e"), ("b", "c", "d", "e")):  # it took another way, or the newest lines are held back
        with pytest.raises(IntegrityError, match="told two stories: line"):
            compared(sealed, shown(*others)[1])
    spread = shown("b", "c", "e")[1][2]
    elsewhere = sign_told(SERVICE, RUN, replace(spread, seq=9))  # a second story that avoids the places of the first
    with pytest.raises(IntegrityError, match="line 9 of trunk/0 is none that moves an anchor"):
        compared(sealed, [elsewhere])


def test_words_of_another_term_say_nothing() -> None:
    assert compared(shown("b", term=2)[0], shown("e", term=1)[1]) == 0
