"""Uploads share what the owner allows, on virtual time: never faster than the rate beyond one burst, in the order they asked."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.gossip.pace import BURST_S, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, Pacer
from decentra.sim.loop import run_virtual

RATE = 10_000.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=8), min_size=1, max_size=4))
def test_all_uploads_together_keep_to_the_rate(uploads: list[list[int]]) -> None:
    sent: list[tuple[float, int]] = []

    async def upload(pacer: Pacer, chunks: list[int]) -> None:
        for chunk in chunks:
            await pacer.take(chunk)
            sent.append((asyncio.get_running_loop().time(), chunk))

    async def story() -> float:
        pacer, begin_s = Pacer(RATE), asyncio.get_running_loop().time()
        await asyncio.gather(*(upload(pacer, chunks) for chunks in uploads))
        return begin_s

    begin_s = run_virtual(story())
    total = 0
    for at_s, chunk in sent:
        total += chunk
        assert total <= RATE * (at_s - begin_s + BURST_S) + 1e-6 * total
    assert sent[-1][0] - begin_s <= total / RATE + 1e-6, "and not slower"


def test_an_idle_uplink_saves_up_one_burst_and_no_more() -> None:
    async def story() -> float:
        pacer, loop = Pacer(RATE), asyncio.get_running_loop()
        await asyncio.sleep(100)
        begin_s = loop.time()
        for _ in range(10):
            await pacer.take(1000)
        return loop.time() - begin_s

    assert abs(run_virtual(story()) - (10_000 / RATE - BURST_S)) < 1e-6


def test_without_a_limit_nothing_waits() -> None:
    async def story() -> float:
        pacer, begin_s = Pacer(None), asyncio.get_running_loop().time()
        for _ in range(10):
            await pacer.take(1 << 30)
        return asyncio.get_running_loop().time() - begin_s

    assert run_virtual(story()) == 0.0
    assert Pacer(None).chunk_bytes == MAX_CHUNK_BYTES
    assert Pacer(8e3).chunk_bytes == MIN_CHUNK_BYTES
    assert MIN_CHUNK_BYTES < Pacer(5e6 / 8).chunk_bytes < MAX_CHUNK_BYTES
