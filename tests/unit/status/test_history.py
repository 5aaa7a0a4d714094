"""A ledger told as rounds: what was confirmed, with whose tokens; what was rolled back or given up is not in it."""

from __future__ import annotations

from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol import ledger
from decentra.protocol.messages import Entry, Phase, Settlement
from decentra.status.history import expert_curves, rounds, to_csv, tokens_per_peer
from decentra.status.plot import experts_text

A, B = PeerId("12D3KooA"), PeerId("12D3KooB")
TRUNK, EXPERT = FragmentId("trunk/0"), FragmentId("expert.1/0")
HASH = Digest("a" * 64)


def settled(fragment: FragmentId, number: int, **tokens: int) -> ledger.Settled:
    entries = tuple(Entry(PeerId(f"12D3Koo{p}"), HASH, 100, n, 0, 0, 0) for p, n in sorted(tokens.items()))
    return ledger.Settled(Settlement(fragment, number, number, HASH, entries, 0, 0, ""))


def confirmed(fragment: FragmentId, number: int, height: int, thin: bool = False) -> ledger.Confirmed:
    return ledger.Confirmed(fragment, number, height, HASH, (A,), thin, "")


RECORDS = [
    settled(TRUNK, 1, A=10, B=20), settled(EXPERT, 1, A=4), confirmed(EXPERT, 1, 1, thin=True), confirmed(TRUNK, 1, 1),
    settled(EXPERT, 2, A=6), ledger.GaveUp(EXPERT, 2, Phase.VOID, "nobody attested"), settled(TRUNK, 2, B=5), confirmed(TRUNK, 2, 2),
    settled(EXPERT, 3, A=7), settled(EXPERT, 3, A=7, B=1), confirmed(EXPERT, 3, 2),
]  # fmt: skip


def test_confirmed_rounds_with_their_last_settlement() -> None:
    told = rounds(RECORDS)
    assert [(r.fragment, r.round, r.trunk_height, r.num_tokens, r.num_contributors, r.is_thin) for r in told] == [
        (EXPERT, 1, 0, 4, 1, True), (TRUNK, 1, 1, 30, 2, False), (TRUNK, 2, 2, 5, 1, False), (EXPERT, 3, 2, 8, 2, False),
    ]  # fmt: skip
    assert tokens_per_peer(RECORDS) == {A: 10, B: 25}


def test_what_was_rolled_back_is_gone() -> None:
    told = rounds([*RECORDS, ledger.RolledBack(EXPERT, 1, HASH, "lost")])
    assert [(r.fragment, r.height) for r in told if r.fragment == EXPERT] == [(EXPERT, 1)]


def test_curves_and_table() -> None:
    curves = expert_curves(rounds(RECORDS), 3)
    assert curves == [[(0.0, 0.0)], [(0.0, 0.0), (0.0, 4.0), (2.0, 12.0)], [(0.0, 0.0)]]
    lines = to_csv(rounds(RECORDS)).splitlines()
    assert lines[0].startswith("fragment,round,height,trunk_height,num_tokens")
    assert len(lines) == 5
    assert "expert 1" in experts_text(curves, "tokens")
