"""The instruments of the chaos runs see what they are to see."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from decentra.bits import ONE_BITS
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol import ledger
from decentra.protocol.messages import Entry, Settlement
from tests.chaos import all as all_trials
from tests.chaos import annals
from tests.chaos.annals import percentile
from tests.chaos.failover import _doubled, _missing
from tests.chaos.harm import TRIALS, why_not

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
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert percentile([3.0, 1.0], 0.95) == 3.0


# ---------------------------------------------------------------- annals


def event(name: str, number: int, at_s: float, fragment: str = "trunk/0") -> dict[str, object]:
    return {"event": name, "fragment": fragment, "round": number, "timestamp": datetime.fromtimestamp(at_s, UTC).isoformat()}


def told() -> list[annals.Round]:
    """Three rounds of the trunk: both are in, then only a, then one is given up."""
    a, b = PeerId("a"), PeerId("b")
    records: list[ledger.Record] = []
    events = []
    for number in (1, 2, 3):
        records.append(ledger.Opened(FRAGMENT, number, number - 1, Digest("0" * 64), (a, b), ()))
        events.append(event("round-opened", number, 10.0 * number))
    for number, peers in ((1, (a, b)), (2, (a,))):
        entries = tuple(Entry(p, Digest(p * 64), 1, 100, ONE_BITS, ONE_BITS, ONE_BITS) for p in peers)
        records.append(ledger.Settled(Settlement(FRAGMENT, number, number, Digest("0" * 64), entries, 0, 0, "")))
        events += [event("round-settled", number, 10.0 * number + 6), event("round-confirmed", number, 10.0 * number + 7)]
    events.append(event("round-abandoned", 3, 39.0))
    return annals.rounds_of(records, events, {"a": "anna", "b": "bert"})


def test_tokens_and_ratios_are_of_what_ended_between_the_times() -> None:
    rounds = told()
    assert annals.confirmed_tokens(rounds, 0, 100) == 300
    assert annals.confirmed_tokens(rounds, 20, 100) == 100
    assert annals.settled_ratio(rounds, 0, 100) == pytest.approx(2 / 3)
    assert annals.settled_ratio(rounds, 0, 35) == 1.0


def test_who_was_away_while_the_round_was_open_need_not_be_in_it() -> None:
    rounds, names = told(), ("anna", "bert")
    assert annals.participation(rounds, names, [], 0, 100) == pytest.approx((1 + 0.5) / 2)
    assert annals.participation(rounds, names, [annals.Outage("bert", "kill", 18.0, 21.0)], 0, 100) == 1.0
    assert annals.participation(rounds, names, [annals.Outage("bert", "kill", 16.5, 19.5)], 0, 100) == pytest.approx(0.75), (
        "between two rounds"
    )


def test_after_a_kill() -> None:
    rounds = told()
    assert annals.contributed_at(rounds, "bert", 5.0) == 16.0
    assert annals.contributed_at(rounds, "bert", 11.0) is None, "the round was open already when it was killed"
    assert annals.settled_after(rounds, 16.0) == 26.0
    assert annals.settled_before(rounds, 17.0) == 16.0


def test_forks_and_foreign_anchors_are_seen() -> None:
    def confirmed(height: int, anchor: str) -> ledger.Confirmed:
        return ledger.Confirmed(FRAGMENT, height, height, Digest(anchor * 64), (), False, "")

    assert annals.num_forks([confirmed(1, "a"), confirmed(2, "b")]) == 0
    assert annals.num_forks([confirmed(1, "a"), confirmed(2, "b"), confirmed(2, "c")]) == 1
    rolled = ledger.RolledBack(FRAGMENT, 1, Digest("a" * 64), "")
    assert annals.num_forks([confirmed(1, "a"), confirmed(2, "b"), rolled, confirmed(2, "c")]) == 0
    assert annals.are_confirmed([{"trunk/0": "b" * 64}], [confirmed(2, "b")], {})
    assert not annals.are_confirmed([{"trunk/0": "d" * 64}], [confirmed(2, "b")], {})
    assert not annals.are_confirmed([{}], [confirmed(2, "b")], {}), "who holds nothing proves nothing"


def test_the_page_says_what_held_and_what_did_not() -> None:
    base = {"took_s": 1, "command": "x", "day": "today", "is_quick": False}
    rows = [{"attack": "flip", "loss_ratio": 1.01, "loss_ratio_trimmed": 1.04, "loss_ratio_undefended": 1.1, "false_quarantines": 0}]
    results = {
        "simulate": base | {"violations": 1}, "fuzz": base | {"failed": "exit code 3; <b>no"}, "byzantine": base | {"rows": rows},
        "partition": base | {"forks": 0, "settled_alone": 0, "healed_p95_s": 12.0, "anchors_equal": True, "healed_s": [12.0], "away": [2], "peers": 5},
        "failover": base | {"settlements_lost": 0, "settlements_doubled": 0, "next_settlement_p95_s": 12.0, "anchors_equal": True, "waits_s": [12.0]},
        "harm": base | {"all_named": True, "lost": 0, "back_worst_s": 11.1},
        "churn": base | {
            "throughput_ratio": 0.97, "bound_ratio": 0.96, "settled_ratio": 0.995, "participation": 0.95, "survivor_p95_s": 3.0, "victim_p95_s": 15.0,
            "forks": 0, "anchors_equal": True, "curve": [[1.0, 2], [2.0, 4]], "marks": [[1.5, "kill p1"]], "parts_s": [0.0, 1.0, 2.0],
        },
    }  # fmt: skip
    held = {(t.name, what): holds for t in all_trials.TRIALS for what, _, _, holds in all_trials.rows_of(t, results[t.name])}
    assert [key for key, holds in held.items() if not holds] == [
        ("simulate", "promises broken"), ("fuzz", all_trials.TRIALS[1].about), ("failover", "next confirmed round after the start, p95"),
    ]  # fmt: skip
    text = all_trials.page(results)
    assert text.count("data:image/png") == 4
    assert "&lt;b&gt;no" in text


def test_harm_that_cannot_be_done_here_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert {name: why_not(name) for name in TRIALS} == {
        "peer-disk": "it needs root", "host-disk": "it needs root", "memory": "it needs root", "clock": "there is no C compiler",
    }  # fmt: skip
