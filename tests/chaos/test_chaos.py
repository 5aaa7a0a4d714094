"""The instruments of the chaos runs see what they are to see."""

from __future__ import annotations

from dataclasses import replace

from decentra.bits import ONE_BITS
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol import ledger
from decentra.protocol.messages import Entry, Settlement
from tests.chaos.failover import _doubled, _missing, _p95

FRAGMENT = FragmentId("trunk/0")


def settled(number: int, packet: str) -> ledger.Settled:
    entry = Entry(PeerId("a"), Digest(packet * 64), 1, 1, ONE_BITS, ONE_BITS, ONE_BITS)
    return ledger.Settled(Settlement(FRAGMENT, number, number, Digest("0" * 64), (entry,), 0, 0, ""))


def test_a_settlement_that_is_gone_or_changed_is_lost_and_one_that_is_written_again_is_not_doubled() -> None:
    before = [settled(1, "a"), settled(2, "b")]
    assert _missing(before, [*before, settled(3, "c")]) == 0
    assert _missing(before, before[:1]) == 1
    assert _missing(before, [settled(1, "a"), settled(2, "c")]) == 1
    merged = replace(before[0], settlement=replace(before[0].settlement, why="merged"))
    assert _doubled([before[0], merged]) == 0
    assert _doubled([before[0], settled(1, "b")]) == 1


def test_p95_is_the_nearest_rank() -> None:
    assert _p95([float(n) for n in range(1, 101)]) == 95.0
    assert _p95([3.0, 1.0]) == 3.0
