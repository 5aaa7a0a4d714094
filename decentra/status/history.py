"""What a ledger says a run did, round by round: rows for a table, and the tokens each expert was trained with. Records in, values out; no I/O."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from decentra.config import Manifest
from decentra.errors import IntegrityError
from decentra.ids import TRUNK, Digest, FragmentId, PeerId, expert_of, module_of_fragment
from decentra.protocol import ledger
from decentra.protocol.messages import Settlement
from decentra.protocol.settling import what_is_wrong

FIRST_OF_TRUNK = FragmentId(f"{TRUNK}/0")


@dataclass(frozen=True, slots=True)
class Round:
    """One confirmed round."""

    fragment: FragmentId
    round: int
    height: int  # of the anchor it led to
    trunk_height: int  # of the trunk's newest confirmed anchor then: the run's clock, since a ledger holds no times
    num_tokens: int
    num_bytes: int  # of its packets, each counted once
    num_contributors: int
    is_thin: bool
    anchor: Digest


def rounds(records: Iterable[ledger.Record]) -> list[Round]:
    """Confirmed rounds in the ledger's order; those that a rollback took back are left out."""
    heights: dict[FragmentId, int] = {}
    found: list[Round] = []
    for record, settlement in _with_settlements(records):
        match record:
            case ledger.Confirmed(fragment, number, height, anchor) if settlement is not None:
                if module_of_fragment(fragment) == TRUNK:
                    heights[fragment] = height
                entries = settlement.entries
                found.append(
                    Round(
                        fragment, number, height, min(heights.values(), default=0), sum(e.num_tokens for e in entries),
                        sum(e.num_bytes for e in entries), len(entries), record.thin, anchor,
                    )
                )  # fmt: skip
            case ledger.RolledBack(fragment, height):
                found = [r for r in found if r.fragment != fragment or r.height <= height]
                if fragment in heights:
                    heights[fragment] = height
            case _:
                pass
    return found


def check_settlements(manifest: Manifest, records: Iterable[ledger.Record]) -> None:
    """Raise IntegrityError for the first settlement whose weights, clips or outer scalars are not those that the manifest gives."""
    for record in records:
        if isinstance(record, ledger.Settled):
            settled = record.settlement
            if wrong := what_is_wrong(settled, manifest.outer_of(settled.fragment)):
                raise IntegrityError(
                    f"round {settled.round} of {settled.fragment} was settled otherwise than the manifest says: {wrong}; the averaging service or"
                    " its ledger is not to be trusted, ask the organiser over another channel"
                )


def tokens_per_peer(records: Iterable[ledger.Record]) -> dict[PeerId, int]:
    """Tokens of the trunk that each peer had inside confirmed rounds: what it contributed, by the service's signed word."""
    kept: list[tuple[int, Settlement]] = []
    for record, settlement in _with_settlements(records):
        if isinstance(record, ledger.Confirmed) and settlement is not None and record.fragment == FIRST_OF_TRUNK:
            kept.append((record.height, settlement))
        elif isinstance(record, ledger.RolledBack) and record.fragment == FIRST_OF_TRUNK:
            kept = [(height, settlement) for height, settlement in kept if height <= record.height]
    found: dict[PeerId, int] = {}
    for _, settlement in kept:
        for entry in settlement.entries:
            found[entry.peer] = found.get(entry.peer, 0) + entry.num_tokens
    return found


def _with_settlements(records: Iterable[ledger.Record]) -> Iterator[tuple[ledger.Record, Settlement | None]]:
    """Each record; beside a confirmation the settlement that it confirms, in its last writing."""
    settled: dict[tuple[FragmentId, int], Settlement] = {}
    for record in records:
        if isinstance(record, ledger.Settled):
            settled[record.settlement.fragment, record.settlement.round] = record.settlement
        if isinstance(record, ledger.Confirmed | ledger.GaveUp):
            yield record, settled.pop((record.fragment, record.round), None)
        else:
            yield record, None


def expert_curves(done: Sequence[Round], num_experts: int) -> list[list[tuple[float, float]]]:
    """Of each expert: (trunk rounds, tokens inside its confirmed rounds until then), beginning at (0, 0)."""
    curves: list[list[tuple[float, float]]] = [[(0.0, 0.0)] for _ in range(num_experts)]
    for one in done:
        expert = expert_of(module_of_fragment(one.fragment))
        if expert is not None and expert < num_experts:
            curves[expert].append((float(one.trunk_height), curves[expert][-1][1] + one.num_tokens))
    return curves


def to_csv(done: Sequence[Round]) -> str:
    """The rows with a header; a spreadsheet reads it."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Round)])
    writer.writeheader()
    writer.writerows(asdict(one) for one in done)
    return out.getvalue()
