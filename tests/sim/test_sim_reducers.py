"""Reducers in a whole simulated swarm: everybody ends at the same anchors, downloads stay flat, and a dead reducer costs a deadline and no round."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from decentra.config import CodecName
from decentra.ids import FragmentId
from decentra.protocol import ledger
from decentra.protocol.messages import Role
from decentra.sim.loop import run_virtual
from decentra.sim.scenario import Scenario
from decentra.sim.world import World, simulate
from tests.bench.downlink import layout_of_size, measure

TRUNK = FragmentId("trunk/0")
CALM = Scenario(3, num_trainers=9, num_faults=0, fault_s=1.0, reduce_from=9)


def final_settlements(world: World) -> dict[int, ledger.Settled]:
    """The trunk's settlements that stand, of confirmed rounds."""
    records = world.promises.records
    settled = {r.settlement.round: r for r in records if isinstance(r, ledger.Settled) and r.settlement.fragment == TRUNK}
    return {r.round: settled[r.round] for r in records if isinstance(r, ledger.Confirmed) and r.fragment == TRUNK}


@pytest.mark.parametrize("codec", ["int8", "topk64"])
def test_sixteen_holders_download_little_more_than_four(codec: CodecName) -> None:
    few, many = (measure(n, layout_of_size(64), codec, num_rounds=3) for n in (4, 16))
    assert (few["num_merged"], many["num_merged"]) == (0, 3)
    assert few["anchors_equal"]
    assert many["anchors_equal"]
    assert few["broken_promises"] + many["broken_promises"] == []
    assert many["rx_bytes_per_peer_round"] <= 1.5 * few["rx_bytes_per_peer_round"]


def test_with_faults_everybody_still_agrees() -> None:
    """The checker looks at every anchor; some rounds are merged and some are not."""
    report = simulate(replace(CALM, num_faults=10, fault_s=40.0, reduce_from=3))
    assert report.num_confirmed > 10


@pytest.mark.parametrize("has_keeper", [True, False])
def test_trainers_that_cannot_reach_each_other_go_on(has_keeper: bool) -> None:
    """Behind routers they exchange through the keeper; where there is none, two that reach nobody must not hold up the others for ever."""
    world = World(replace(CALM, num_trainers=6, has_keeper=has_keeper, reduce_from=4))
    trainers = [p for p, h in world.hosts.items() if h.role is Role.TRAINER]
    hidden = trainers if has_keeper else trainers[:2]

    async def story() -> None:
        world.net.cut |= {frozenset({a, b}) for a in hidden for b in trainers if a != b}
        world.start_service()
        for host in world.hosts.values():
            world.start(host)
        async with asyncio.timeout(600):
            while len(final_settlements(world)) < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        for host in list(world.hosts.values()):
            world._bury(host)
        world.kill_service()

    run_virtual(story())
    assert not world.promises.broken
    given_up = [r for r in world.promises.records if isinstance(r, ledger.GaveUp) and r.fragment == TRUNK]
    assert len(given_up) <= (0 if has_keeper else 3)
    if has_keeper:
        assert any(s.settlement.merged for s in final_settlements(world).values())


def test_a_dead_reducer_costs_a_deadline_and_no_round() -> None:
    world = World(replace(CALM, step_s=0.4))

    async def story() -> None:
        world.start_service()
        for host in world.hosts.values():
            world.start(host)

        def merging() -> bool:
            round_ = world.driver.book.fragments[TRUNK].round if world.driver is not None else None
            return round_ is not None and round_.is_merging

        async with asyncio.timeout(300):
            while not merging():  # noqa: ASYNC110  (on virtual time looking is free)
                await asyncio.sleep(0.01)
        assert world.driver is not None
        round_ = world.driver.book.fragments[TRUNK].round
        assert round_ is not None
        world.kill(world.hosts[round_.reducers[0]])
        async with asyncio.timeout(60):
            while round_.number not in final_settlements(world):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        settlement = final_settlements(world)[round_.number].settlement
        assert (settlement.merged, settlement.reducers) == (None, ())
        assert "everybody fetches every packet" in settlement.why
        for host in list(world.hosts.values()):
            world._bury(host)
        world.kill_service()

    run_virtual(story())
    assert not world.promises.broken
