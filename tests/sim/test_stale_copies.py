"""The service's machine is lost, and the run goes on from a copy of the ledger that lacks the newest records: rounds are lost then, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from decentra.protocol import ledger
from decentra.protocol.fragment import TERM_GAP
from decentra.sim.loop import run_virtual
from decentra.sim.scenario import Scenario
from decentra.sim.world import World
from decentra.wire.ledgers import open_record

CALM = Scenario(3, num_trainers=3, has_keeper=True, num_faults=0, step_s=0.4, inner_steps=2, max_delay_s=0.02, max_compute_s=0.05)


@dataclass
class Stale(World):
    """The copy lacks ``lacks`` records; another machine takes over from it."""

    lacks: int = 0
    lost: list[ledger.Record] = field(init=False, default_factory=list)

    async def _misfortune(self) -> None:
        await asyncio.sleep(12)
        self.kill_service()
        self.lost = self.promises.records[len(self.journal.records) - self.lacks :]
        del self.journal.records[len(self.journal.records) - self.lacks :]
        del self.promises.records[len(self.journal.records) :]
        book = ledger.Ledger()  # the auditor goes on from there, too; what was confirmed once stays known to it
        for sealed in self.journal.records:
            book.accept(open_record(sealed)[1])
        self.promises._ledger = book
        for record in self.promises.records:
            if isinstance(record, ledger.Confirmed):
                self.promises._current[record.fragment] = (record.anchor, True)
        for fragment in {r.fragment for r in self.lost if isinstance(r, ledger.Confirmed)}:
            self.promises._used -= {(f, p) for f, p in self.promises._used if f == fragment}
        await asyncio.sleep(1)
        self.term += 1
        self.start_service()


@pytest.mark.parametrize("lacks", [1, 3, 12, 30, 90])
def test_the_run_goes_on_from_a_copy_that_lacks_records(lacks: int) -> None:
    world = Stale(CALM, lacks=lacks)
    run_virtual(world.run())  # everybody is back, every fragment confirms rounds, all end on one anchor
    opened = [r for r in world.promises.records if isinstance(r, ledger.Opened)]
    old = {(r.fragment, r.round) for r in world.lost if isinstance(r, ledger.Opened)}
    assert not old & {(r.fragment, r.round) for r in opened}, "a round number that the lost records used means another round now"
    assert max(r.round for r in opened) > TERM_GAP
