"""What the logs of a run's processes tell about its rounds: events as they come, and where the time of a round goes. No processes, no clock."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Round = tuple[str, int]  # fragment, number


class Log:
    """The events of some names in a JSON-lines log that grows; each line is read once. ``at_s`` is added: Unix time."""

    def __init__(self, path: Path, *names: str) -> None:
        self._path, self._names, self._num_read_bytes = path, names, 0
        self._marks = [f'"{name}"'.encode() for name in names]
        self.events: list[Event] = []

    def read(self) -> list[Event]:
        """All events so far; none while there is no file."""
        if not self._path.exists():
            return self.events
        with open(self._path, "rb") as log:
            log.seek(self._num_read_bytes)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._num_read_bytes += len(whole + newline)
        for line in whole.splitlines():
            if line.startswith(b"{") and any(mark in line for mark in self._marks):
                event = json.loads(line)
                if event["event"] in self._names:
                    event["at_s"] = datetime.fromisoformat(event["timestamp"]).timestamp()
                    self.events.append(event)
        return self.events

    def named(self, name: str) -> list[Event]:
        return [e for e in self.events if e["event"] == name]


def lines(path: Path) -> list[Event]:
    """Every JSON object of a file of them; the last line may be half written."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


ROUND_EVENTS = ("round-opened", "encoded", "round-settled", "round-confirmed", "committed")


def phases(events: Iterable[Event], *, since_s: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each part of every whole round that opened after ``since_s`` and was followed by another, in the order of a round.

    ``events`` are those of the host and of all members; a part that ends before the one before it (a settlement that did not wait) counts as 0.
    """
    at: dict[Round, dict[str, list[float]]] = {}
    for event in events:
        if event["event"] in ROUND_EVENTS and "round" in event:
            at.setdefault((event["fragment"], event["round"]), {}).setdefault(event["event"], []).append(event["at_s"])
    found: dict[str, list[float]] = {}
    for (fragment, number), seen in sorted(at.items()):
        following = at.get((fragment, number + 1), {}).get("round-opened")
        if len(seen) < len(ROUND_EVENTS) or following is None or seen["round-opened"][0] < since_s:
            continue
        marks = [
            ("opened", seen["round-opened"][0]), ("first offer encoded", min(seen["encoded"])), ("last offer encoded", max(seen["encoded"])),
            ("settled", seen["round-settled"][0]), ("confirmed", seen["round-confirmed"][0]), ("next opened", following[0]),
        ]  # fmt: skip
        for (before, start), (after, end) in itertools.pairwise(marks):
            found.setdefault(f"{before} -> {after}", []).append(max(0.0, end - start))
        found.setdefault("confirmed -> last committed", []).append(max(0.0, max(seen["committed"]) - seen["round-confirmed"][0]))
        found.setdefault("opened -> next opened", []).append(following[0] - seen["round-opened"][0])
    return found


def in_ms(parts: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """(median, 95th percentile) in milliseconds of each part."""
    return {name: (1000 * statistics.median(times), 1000 * percentile(times, 0.95)) for name, times in parts.items()}


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
