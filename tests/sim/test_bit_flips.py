"""One bit of one peer's anchor turns over, in memory or on its disk: the next round shows it, nobody else is harmed, and the peer fetches a sound one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.ids import FragmentId
from decentra.sim.loop import run_virtual
from decentra.sim.scenario import Scenario
from decentra.sim.world import World

TRUNK = FragmentId("trunk/0")
CALM = Scenario(
    1, num_trainers=3, has_keeper=True, num_faults=0, fault_s=30.0, step_s=0.4, inner_steps=2, max_delay_s=0.02, max_compute_s=0.05, outer_rule="nesterov"
)  # fmt: skip


def flipped(values_N: torch.Tensor, bit: int, at: int = 2) -> torch.Tensor:
    bits = values_N.clone().view(torch.int32)
    bits[at] ^= 1 << bit
    return bits.view(torch.float32)


@dataclass
class Flip(World):
    """A bit of the trunk's anchor turns over at one machine, between two rounds."""

    victim: str = ""
    bit: int = 0
    where: str = "memory"
    rounds_until_sound: int | None = field(init=False, default=None)

    async def _misfortune(self) -> None:
        await asyncio.sleep(5)
        host = self.hosts[self.victim]  # type: ignore[index]
        assert host.loop is not None
        replica = host.loop.replicas[TRUNK]
        while replica._tentative is not None:  # noqa: ASYNC110  (what is computed already replaces the anchor in a moment)
            await asyncio.sleep(0.01)
        account = replica.account
        assert account is not None
        state = account.anchor_state
        height = self._heights()[TRUNK]
        if self.where == "memory":
            replica._base_N = None  # the auditor's sums would show the bit, too
            account.anchor_state = AnchorState(flipped(state.anchor_N, self.bit), state.momentum_N)
        else:
            name = f"blob-{account.anchor_digest}"
            data = bytearray(host.disk.durable[name])
            data[len(data) // 2] ^= 1 << (self.bit % 8)
            host.disk.durable[name] = bytes(data)
            host.disk.volatile.pop(name, None)
            self.kill(host)  # what lies on a disk is read at the next start
            await asyncio.sleep(1)
            self._restart(host)
        for _ in range(200):
            await asyncio.sleep(0.1)
            if self._is_sound() and self._heights()[TRUNK] > height:
                self.rounds_until_sound = self._heights()[TRUNK] - height
                return

    def _is_sound(self) -> bool:
        """What the machine computes with is the anchor that is confirmed."""
        host: Any = self.hosts[self.victim]  # type: ignore[index]
        replica = host.loop.replicas.get(TRUNK) if host.loop is not None else None
        if replica is None or replica.account is None or self.driver is None:
            return False
        held = anchor_digest(encode_anchor(self.layout[TRUNK], replica.account.anchor_state))
        return bool(held == replica.account.anchor_digest == self.driver.book.fragments[TRUNK].anchor)


@pytest.mark.parametrize("victim", ["trainer-1", "keeper-0"])
def test_of_two_that_disagree_each_looks_at_its_own_anchor(victim: str) -> None:
    """Nobody else can say who is right: the round is void, and the next one is sound."""
    world = Flip(replace(CALM, num_trainers=1), victim=victim, where="memory", bit=23)
    report = run_virtual(world.run())
    assert any(event == "damaged-anchor" for _, _, event, _ in world.log)
    assert world.rounds_until_sound is not None
    assert report.num_given_up <= 2


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("victim", ["trainer-1", "keeper-0"])
@pytest.mark.parametrize("bit", [0, 23, 31], ids=["last", "exponent", "sign"])
def test_a_flipped_bit_is_found_and_healed(victim: str, where: str, bit: int) -> None:
    world = Flip(CALM, victim=victim, where=where, bit=bit)
    report = run_virtual(world.run())
    assert report.num_rolled_back == 0
    if where == "memory":
        assert world.rounds_until_sound is not None, "it was never healed"
        assert world.rounds_until_sound == 1
    else:
        assert world.rounds_until_sound is not None
