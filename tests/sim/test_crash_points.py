"""A small run is ended at every operation that makes something durable, of trainer, keeper and service; each time it goes on and keeps every promise.

Trainers and keeper: each write, sync, rename and delete of their disks, with what was not synced lost or torn. Service: each commit of the ledger, just
before and just after it. The trial with random crashes is test_seeds; one fragment alone, with every bit compared, is tests/unit/peer/test_replica_crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from decentra.sim.adapters import Crash, SimJournal
from decentra.sim.loop import run_virtual
from decentra.sim.scenario import Report, Scenario
from decentra.sim.world import World

SMALL = Scenario(
    1, num_trainers=2, has_keeper=True, num_faults=0, fault_s=3.5, step_s=0.4, inner_steps=2, max_delay_s=0.02, max_compute_s=0.05,
    outer_rule="nesterov",
)  # fmt: skip
RESTART_S = 1.0
HOSTS = ("trainer-1", "keeper-0")
STRIDE = 8  # chunks of one host's operations, so that two test processes share them


@dataclass
class Once(World):
    """Nothing happens but one crash, at a given operation of one machine; its process is back a second later."""

    victim: str = ""
    operation: int = 0
    counted: int = field(init=False, default=0)  # operations of the victim until the faults end

    def start(self, host: Any) -> None:
        if host.peer == self.victim and host.num_starts == 0:
            host.disk.crash_in = self.operation or None
        super().start(host)

    async def _misfortune(self) -> None:
        loop = asyncio.get_running_loop()
        host = next((h for h in self.hosts.values() if h.peer == self.victim), None)
        end = loop.time() + self.scenario.fault_s
        while loop.time() < end:
            await asyncio.sleep(0.1)
            if host is not None and host.disk.is_dead:
                self._bury(host)
                self.promises.check_disks(f"the crash of {host.peer} at operation {self.operation}")
                await asyncio.sleep(RESTART_S)
                self._restart(host)
            if self.driver is not None and self._driver_task is not None and self._driver_task.done():
                self.kill_service()
                await asyncio.sleep(RESTART_S)
                self._restart_service()
        self.counted = host.disk.num_operations if host is not None else 0
        for each in self.hosts.values():
            each.disk.crash_in = None
        if isinstance(self.journal, CrashingJournal):
            self.journal.crash_at, self.counted = 0, self.journal.num_commits


@dataclass
class CrashingJournal(SimJournal):
    """The process ends just before, or just after, its n-th commit is durable. Commits are atomic: SQLite's transactions are."""

    crash_at: int = 0
    is_after: bool = False
    num_commits: int = 0

    def append(self, records: Sequence[bytes]) -> None:
        if not records:
            return
        self.num_commits += 1
        is_due = self.num_commits == self.crash_at
        if is_due and not self.is_after:
            raise Crash("ledger commit")
        super().append(records)
        if is_due:
            raise Crash("ledger commit")


def play(victim: str, operation: int) -> tuple[Report, Once]:
    world = Once(SMALL, victim=victim, operation=operation)
    return run_virtual(world.run()), world


def play_service(crash_at: int, *, is_after: bool) -> tuple[Report, Once]:
    world = Once(SMALL)
    world.journal = CrashingJournal(on_append=world.promises.on_records, crash_at=crash_at, is_after=is_after)
    return run_virtual(world.run()), world


def test_without_a_crash() -> None:
    report, world = play("trainer-1", 0)
    assert report.num_crashes == 0
    assert report.num_given_up == 0
    assert world.counted > 100, "the small run is too small to be worth it"


@pytest.mark.parametrize("part", range(STRIDE))
@pytest.mark.parametrize("victim", HOSTS)
def test_every_disk_operation(victim: str, part: int) -> None:
    num = play(victim, 0)[1].counted
    for operation in range(1 + part, num + 1, STRIDE):
        report, _ = play(victim, operation)
        assert report.num_crashes >= 1, f"operation {operation} of {victim} was not reached"
        assert report.num_rolled_back == 0, f"a crash of {victim} at operation {operation} cost a confirmed round"


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_every_commit_of_the_ledger(is_after: bool) -> None:
    num = play_service(0, is_after=False)[1].counted
    assert num > 20
    for crash_at in range(3, num + 1):  # the first two are written before the service runs
        report, _ = play_service(crash_at, is_after=is_after)
        assert report.num_crashes == 1, f"commit {crash_at} was not reached"
        assert report.num_rolled_back == 0
