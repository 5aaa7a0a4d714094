"""One fragment at a peer, crashed at every disk operation of every step and refused every write: the account is the one before or after."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from replica_bench import (
    FRAGMENT,
    GENESIS,
    GENESIS_DIGEST,
    LR,
    ME,
    MU,
    NUM_POWER_CUTS,
    OTHER,
    STORY,
    Bench,
    image,
    play,
    run,
    vector,
)
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.aggregate import aggregate
from decentra.delta.anchor import anchor_digest, encode_anchor
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet
from decentra.delta.raw import float_bytes
from decentra.protocol.duties import Ending
from decentra.sim.adapters import Crash, SimDisk


def test_the_story_is_not_trivial() -> None:
    images = run(play(Bench(), len(STORY)))
    assert all(a != b for a, b in pairwise(images)), "every step changes the account"
    assert images[4] == images[6], "a cancelled encode leaves no trace"


@pytest.mark.parametrize("index", range(len(STORY)), ids=[name for name, _ in STORY])
def test_a_crash_at_any_operation_leaves_the_account_before_or_after(index: int) -> None:
    """And going on from there ends where an uninterrupted run ends, bit by bit."""

    async def crashed(crash_in: int, seed: int, expected: list[object]) -> bool:
        bench = Bench(seed)
        await play(bench, index)
        bench.disk.crash_in = crash_in
        try:
            await STORY[index][1](bench)
        except Crash:
            has_crashed = True
        else:
            has_crashed = False
            bench.disk.crash()
        bench.start()
        await bench.replica.load()
        found, (before, after) = image(bench.replica.account), expected[index : index + 2]
        assert found in (before, after), f"crash at operation {crash_in}, power cut {seed}"
        assert has_crashed or found == after, "what a call returned for is durable"
        if found == before:
            await STORY[index][1](bench)
        for number, (name, step) in enumerate(STORY[index + 1 :], index + 1):
            await step(bench)
            assert image(bench.replica.account) == expected[number + 1], f"{name} after a crash in {STORY[index][0]}"
        return has_crashed

    async def all_crashes() -> int:
        expected = await play(Bench(), len(STORY))
        for seed in range(NUM_POWER_CUTS):
            crash_in = 1
            while await crashed(crash_in, seed, expected):
                crash_in += 1
        return crash_in

    assert run(all_crashes()) > 3, "there were operations to crash at"


def test_a_restart_offers_the_same_bytes() -> None:
    async def job() -> None:
        bench = Bench()
        await play(bench, 2)
        offer = bench.replica.pending_offer
        bench.disk.crash()
        bench.start()
        await bench.replica.load()
        assert bench.replica.pending_offer == offer
        assert offer is not None
        assert await bench.exchange.has(offer.packet)
        live_N = bench.replica.initial_live()
        assert live_N is not None
        assert bench.account.pending is not None
        assert float_bytes(live_N) == float_bytes(bench.account.pending.live_N), "training goes on from the encode"

    run(job())


def test_applying_is_the_documented_arithmetic() -> None:
    async def job() -> None:
        bench = Bench()
        await play(bench, 2)
        settlement = await bench.settle(1, ME, OTHER)
        deltas = {e.peer: decode_packet(await bench.exchange.read(e.packet) or b"", FRAGMENT) for e in settlement.entries}
        mean_N = aggregate(deltas, {e.peer: e.weight_bits for e in settlement.entries})
        expected = outer_step(GENESIS, mean_N, rule="nesterov", lr_bits=LR, momentum_bits=MU)
        digest = await bench.replica.apply(settlement)
        assert digest == anchor_digest(encode_anchor(FRAGMENT, expected))
        assert bench.replica.anchor == GENESIS_DIGEST, "until it is confirmed the old anchor stays"
        assert f"blob-{digest}" in bench.disk.durable, "what is attested is on the platter"
        before_N, moved_N = bench.live.live_N, vector(77)
        bench.live.live_N = bench.live.live_N + moved_N
        pending_N = bench.account.pending.live_N  # type: ignore[union-attr]
        await bench.replica.commit(1, digest, Ending.APPLIED)
        expected_N = (before_N + moved_N) + (expected.anchor_N - pending_N)
        assert float_bytes(bench.live.live_N) == float_bytes(expected_N), "z <- A' + (z - y)"

    run(job())


# ---------------------------------------------------------------- a disk that refuses


class FullDisk(SimDisk):
    """Refuses the write that is due, once."""

    refuse_in: int | None = None

    def write(self, name: str, *parts: Buffer) -> None:
        if self.refuse_in is not None:
            self.refuse_in -= 1
            if self.refuse_in <= 0:
                self.refuse_in = None
                raise OSError(28, "No space left on device")
        super().write(name, *parts)


@pytest.mark.parametrize("index", range(len(STORY)), ids=[name for name, _ in STORY])
def test_a_full_disk_changes_nothing_and_the_second_try_succeeds(index: int) -> None:
    async def refused(refuse_in: int, expected: list[object]) -> bool:
        bench = Bench()
        bench.disk = FullDisk(Random(0))
        bench.start()
        await play(bench, index)
        live_N = bench.live.live_N
        assert isinstance(bench.disk, FullDisk)
        bench.disk.refuse_in = refuse_in
        try:
            await STORY[index][1](bench)
        except OSError:
            was_refused = True
            assert image(bench.replica.account) == expected[index], "memory does not run ahead of the disk"
            bench.live.live_N = live_N
            await STORY[index][1](bench)
        else:
            was_refused = False
        assert image(bench.replica.account) == expected[index + 1]
        assert float_bytes(bench.live.live_N) == float_bytes(await uninterrupted_live(index)), "and live moved once"
        return was_refused

    async def uninterrupted_live(index: int) -> Tensor:
        bench = Bench()
        await play(bench, index + 1)
        return bench.live.live_N

    async def all_refusals() -> int:
        expected = await play(Bench(), len(STORY))
        refuse_in = 1
        while await refused(refuse_in, expected):
            refuse_in += 1
        return refuse_in

    assert run(all_refusals()) > 1 or STORY[index][0].startswith("nothing")
