"""Copies of the ledger that other machines keep: a record counts as written when every copy that is in step has it on its disk, too."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from decentra.errors import Refused
from decentra.ports import Clock, Events

COPY_S = 2.0  # a copy that does not have a record after this time is not waited for until it has caught up
MAX_COPIES = 8
MAX_LAG = 256  # records; a copy that lacks no more is waited for, and has them in a moment
FORGOTTEN_S = 30.0  # a copy asks every few seconds; a process that was started again has another name


@dataclass
class _Copy:
    num_records: int
    heard_at: float
    is_in_step: bool = False


@dataclass
class Copies:
    """The service's side. ``num_records``: of its own ledger."""

    clock: Clock
    events: Events
    num_records: int = 0
    _copies: dict[str, _Copy] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def written(self, num: int) -> None:
        """So many more records are durable here; returns when they are in every copy that was in step, or ``COPY_S`` are over."""
        async with self._changed:
            self.num_records += num
            self._changed.notify_all()
            try:
                async with asyncio.timeout(COPY_S):
                    await self._changed.wait_for(lambda: not self._late())
            except TimeoutError:
                for name in self._late():
                    self._copies[name].is_in_step = False
                    self.events.emit(
                        "copy-behind",
                        copy=name,
                        why=f"no word within {COPY_S:g} s that it has the newest records; rounds go on without it",
                    )

    async def heard(self, name: str, num_records: int, wait_s: float) -> None:
        """A copy has this many records on its disk; returns when there are more, or ``wait_s`` are over. Raises Refused."""
        if num_records > self.num_records:
            raise Refused(
                f"this copy has {num_records} records, the service's own ledger {self.num_records}: two stories of one run. If the service lost its disk,"
                " stop it and take over from the copy"
            )
        now = self.clock.now()
        async with self._changed:
            self._copies = {n: c for n, c in self._copies.items() if c.heard_at > now - FORGOTTEN_S}
            if name not in self._copies and len(self._copies) >= MAX_COPIES:
                raise Refused(f"{MAX_COPIES} copies of this ledger are kept already")
            copy = self._copies.setdefault(name, _Copy(num_records, now))
            copy.num_records, copy.heard_at = num_records, now
            is_near = num_records >= self.num_records - MAX_LAG
            if is_near and not copy.is_in_step:
                self.events.emit("copy-in-step", copy=name, num_records=num_records)
            copy.is_in_step = is_near
            self._changed.notify_all()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self.num_records > num_records)
            except TimeoutError:
                return

    def _late(self) -> list[str]:
        return [name for name, copy in self._copies.items() if copy.is_in_step and copy.num_records < self.num_records]
