"""What happened in a swarm, told by two witnesses: the host's log knows when, its ledger knows who. Pure functions over both; starts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from decentra.protocol import ledger

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """One round of one fragment; times are seconds of the Unix clock, None for what did not come about."""

    fragment: str
    number: int
    holders: frozenset[str]  # by name
    tokens: Mapping[str, int]  # who was settled -> tokens of its offer
    opened_s: float
    settled_s: float | None
    confirmed_s: float | None
    given_up_s: float | None

    @property
    def is_over(self) -> bool:
        return self.confirmed_s is not None or self.given_up_s is not None


@dataclass(frozen=True)
class Outage:
    """One peer's misfortune: from the fault until the machine, or its link, is as before. What its process needs to start is not in it."""

    peer: str
    kind: str
    began_s: float
    ended_s: float


def rounds_of(records: Sequence[ledger.Record], events: Iterable[Event], names: Mapping[str, str]) -> list[Round]:
    """Rounds in the order they opened. ``events`` are the host's log lines, ``records`` its ledger, ``names`` those of peer ids.

    Rounds whose opening was not logged are left out.
    """
    when: dict[tuple[str, str, int], float] = {}
    for event in events:
        if event["event"].startswith("round-") and "round" in event:
            when.setdefault((event["event"], event["fragment"], event["round"]), unix_s(event))
    settled = {(r.settlement.fragment, r.settlement.round): r.settlement for r in records if isinstance(r, ledger.Settled)}
    found = []
    for record in records:
        if not isinstance(record, ledger.Opened) or ("round-opened", record.fragment, record.round) not in when:
            continue
        key = record.fragment, record.round
        times = {kind: when.get((f"round-{kind}", *key)) for kind in ("opened", "settled", "confirmed", "abandoned", "void")}
        tokens = {names[e.peer]: e.num_tokens for e in settled[key].entries} if key in settled else {}
        given_up_s = times["abandoned"] if times["abandoned"] is not None else times["void"]
        opened_s = times["opened"]
        assert opened_s is not None
        holders = frozenset(names[p] for p in record.holders)
        found.append(Round(*key, holders, tokens, opened_s, times["settled"], times["confirmed"], given_up_s))
    return found


def unix_s(event: Event) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def confirmed_tokens(rounds: Iterable[Round], start_s: float, end_s: float) -> int:
    """Tokens of offers in rounds of the trunk that were confirmed between the two times."""
    return sum(sum(r.tokens.values()) for r in of_trunk(rounds) if r.confirmed_s is not None and start_s <= r.confirmed_s < end_s)


def of_trunk(rounds: Iterable[Round]) -> list[Round]:
    return [r for r in rounds if r.fragment == "trunk/0"]


def settled_ratio(rounds: Iterable[Round], start_s: float, end_s: float) -> float:
    """Of all rounds of all fragments that ended between the two times, how many were confirmed."""
    ended = [r for r in rounds if r.is_over and start_s <= (r.confirmed_s or r.given_up_s or 0.0) < end_s]
    return sum(r.confirmed_s is not None for r in ended) / max(1, len(ended))


def participation(rounds: Iterable[Round], peers: Sequence[str], away: Sequence[Outage], start_s: float, end_s: float) -> float:
    """Mean over the trunk's settled rounds of contributors over live peers: those whom nothing befell between the round's opening and its settlement."""
    shares = []
    for r in of_trunk(rounds):
        if r.settled_s is None or not start_s <= r.settled_s < end_s:
            continue
        live = [p for p in peers if not any(o.peer == p and o.began_s < r.settled_s and o.ended_s > r.opened_s for o in away)]
        if live:
            shares.append(sum(p in r.tokens for p in live) / len(live))
    return sum(shares) / max(1, len(shares))


def contributed_at(rounds: Iterable[Round], peer: str, after_s: float) -> float | None:
    """When the first round of the trunk that opened after a time was settled with this peer's packet."""
    return min(
        (r.settled_s for r in of_trunk(rounds) if r.settled_s is not None and r.opened_s > after_s and peer in r.tokens), default=None
    )


def settled_after(rounds: Iterable[Round], after_s: float) -> float | None:
    """When the trunk's next round was settled."""
    return min((r.settled_s for r in of_trunk(rounds) if r.settled_s is not None and r.settled_s > after_s), default=None)


def settled_before(rounds: Iterable[Round], before_s: float) -> float | None:
    return max((r.settled_s for r in of_trunk(rounds) if r.settled_s is not None and r.settled_s <= before_s), default=None)


def num_forks(records: Iterable[ledger.Record]) -> int:
    """Heights of a fragment for which two anchors were confirmed, without a rollback in between."""
    found: dict[tuple[str, int], str] = {}
    num = 0
    for record in records:
        if isinstance(record, ledger.RolledBack):
            found = {key: anchor for key, anchor in found.items() if key[0] != record.fragment or key[1] <= record.height}
        elif isinstance(record, ledger.Confirmed):
            num += found.setdefault((record.fragment, record.height), record.anchor) != record.anchor
    return num


def are_confirmed(anchors: Iterable[Mapping[str, str]], records: Iterable[ledger.Record], genesis: Mapping[str, str]) -> bool:
    """Whatever peers hold was confirmed by the ledger once; and they hold something."""
    known = set(genesis.items()) | {(r.fragment, r.anchor) for r in records if isinstance(r, ledger.Confirmed)}
    return all(held and set(held.items()) <= known for held in anchors)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; nan of nothing."""
    return sorted(values)[max(0, -(-round(100 * share) * len(values) // 100) - 1)] if values else float("nan")
