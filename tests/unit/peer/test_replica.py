"""One fragment at a peer: packets and orders refused by name, damaged files, blobs kept and dropped."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from replica_bench import (
    FRAGMENT,
    GENESIS,
    GENESIS_BLOB,
    GENESIS_DIGEST,
    LR,
    ME,
    MU,
    OTHER,
    Bench,
    N,
    image,
    norm_bits,
    play,
    run,
    vector,
)

from decentra.bits import ONE_BITS, float_bits
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.raw import float_bytes
from decentra.errors import IntegrityError, RejectedPayload, TrainingError
from decentra.ids import Digest, digest_of
from decentra.modules import build_layout
from decentra.peer.kept import NUM_KEPT_ROUNDS
from decentra.protocol.duties import Ending
from decentra.protocol.messages import Entry, Settlement
from decentra.sim.adapters import SimExchange


def test_bad_packets_are_refused_by_name_and_not_stored() -> None:
    good = encode_packet(FRAGMENT, vector(5), "int8", peer=OTHER, round=3)
    alien = build_layout([("a.norm", (4,)), ("b.weight", (8, 5))]).fragments[0]
    infinite = bytearray(encode_packet(FRAGMENT, vector(5), "fp32", peer=OTHER, round=3))
    bad = {
        "size": good[:-40] if len(good) > 40 else b"",
        "malformed": good[:-1] + bytes([good[-1] ^ 1]),
        "shape": encode_packet(alien, vector(5), "int8", peer=OTHER, round=3),
        "relabelled": encode_packet(FRAGMENT, vector(5), "int8", peer=ME, round=3),
        "replayed": encode_packet(FRAGMENT, vector(5), "int8", peer=OTHER, round=2),
        "not-finite": _with_nan(bytes(infinite)),
    }

    async def job() -> None:
        bench = Bench()
        for reason, data in bad.items():
            with pytest.raises(RejectedPayload) as caught:
                await bench.replica.check_packet(digest_of(data), data, OTHER, 3, ONE_BITS)
            assert caught.value.reason in (reason, "malformed")
            assert (caught.value.peer, caught.value.round) == (OTHER, 3)
            assert not await bench.exchange.has(digest_of(data))
        with pytest.raises(RejectedPayload, match="size"):
            await bench.replica.check_packet(digest_of(b""), b"", OTHER, 3, ONE_BITS)
        await bench.replica.check_packet(digest_of(good), good, OTHER, 3, norm_bits(good))
        assert await bench.exchange.has(digest_of(good))

    run(job())


def test_a_norm_that_is_not_the_packets_is_refused_and_nothing_stored() -> None:
    good = encode_packet(FRAGMENT, vector(5), "int8", peer=OTHER, round=3)

    async def job() -> None:
        bench = Bench()
        for lie in (0, ONE_BITS, norm_bits(good) + 1, 0x7F800000):
            with pytest.raises(RejectedPayload) as caught:
                await bench.replica.check_packet(digest_of(good), good, OTHER, 3, lie)
            assert (caught.value.reason, caught.value.peer, caught.value.round) == ("norm", OTHER, 3)
            assert not await bench.exchange.has(digest_of(good))
        await play(bench, 2)
        offer = bench.replica.pending_offer
        assert offer is not None
        assert offer.norm_bits == norm_bits(await bench.exchange.read(offer.packet) or b""), "what we state ourselves is true"

    run(job())


def test_a_clip_cuts_the_packet_for_everybody_and_brings_the_rest_home() -> None:
    async def job() -> None:
        bench = Bench()
        await play(bench, 2)
        clip_bits = float_bits(0.25)
        settlement = await bench.settle(1, ME, OTHER, clip_bits=clip_bits)
        deltas = {e.peer: decode_packet(await bench.exchange.read(e.packet) or b"", FRAGMENT) for e in settlement.entries}
        mean_N = deltas[ME].dense() * 0.5 * 0.25 + deltas[OTHER].dense() * 0.5
        expected = outer_step(GENESIS, mean_N, rule="nesterov", lr_bits=LR, momentum_bits=MU)
        after_N = bench.account.pending.residual_after_N  # type: ignore[union-attr]
        anchor = await bench.replica.apply(settlement)
        await bench.replica.commit(1, anchor, Ending.APPLIED, clip_bits)
        assert torch.allclose(bench.account.anchor_state.anchor_N, expected.anchor_N, atol=1e-6)
        assert float_bytes(bench.account.residual_N) == float_bytes(after_N + deltas[ME].dense() * 0.75)

    run(job())


def _with_nan(packet: bytes) -> bytes:
    """The same packet with its last value NaN and a right checksum."""
    body = packet[:-8] + struct.pack("<f", float("nan"))
    return body + struct.pack("<I", zlib.crc32(body))


def test_a_recovered_anchor_must_have_its_digest() -> None:
    async def job() -> None:
        bench = Bench()
        with pytest.raises(RejectedPayload) as caught:
            await bench.replica.recover(Digest("0" * 64), 0, GENESIS_BLOB)
        assert caught.value.reason == "digest"
        assert bench.replica.anchor is None
        with pytest.raises(RejectedPayload):
            await bench.replica.recover(digest_of(b"rubbish"), 0, b"rubbish")
        assert bench.disk.list() == [], "nothing was kept of it"

    run(job())


def test_orders_that_do_not_fit_are_refused_and_change_nothing() -> None:
    async def job() -> None:
        bench = Bench()
        with pytest.raises(IntegrityError, match="no anchor"):
            await bench.replica.encode(1, GENESIS_DIGEST)
        await play(bench, 2)
        before = image(bench.account)
        wrong: list[Coroutine[Any, Any, Any]] = [
            bench.replica.encode(2, Digest("0" * 64)),
            bench.replica.commit(1, Digest("0" * 64), Ending.APPLIED),
            bench.replica.cancel(7),
            bench.replica.apply(
                Settlement(FRAGMENT.id, 1, 1, GENESIS_DIGEST, (Entry(OTHER, Digest("1" * 64), 1, 1, 0, ONE_BITS, ONE_BITS),), LR, MU, "")
            ),
        ]
        for order in wrong:
            with pytest.raises(IntegrityError):
                await order
        with pytest.raises(TrainingError, match="no outcome yet"):
            await bench.replica.encode(2, GENESIS_DIGEST)
        assert image(bench.account) == before

    run(job())


def test_a_loss_that_was_not_finite_is_not_offered() -> None:
    async def job() -> None:
        bench = Bench()
        await play(bench, 1)
        bench.live.has_bad_steps = True
        with pytest.raises(TrainingError, match="not finite"):
            await bench.encode(1)
        assert float_bytes(bench.live.live_N) != float_bytes(GENESIS.anchor_N), "a few bad steps were skipped, live is sound"
        bench.live.is_diverged = True
        with pytest.raises(TrainingError):
            await bench.encode(1)
        assert float_bytes(bench.live.live_N) == float_bytes(GENESIS.anchor_N)
        bench.live.has_bad_steps = bench.live.is_diverged = False
        bench.live.live_N = torch.full((N,), float("inf"))
        with pytest.raises(TrainingError):
            await bench.replica.encode(1, GENESIS_DIGEST)
        assert float_bytes(bench.live.live_N) == float_bytes(GENESIS.anchor_N), "live that diverged starts again at the anchor"
        assert bench.account.pending is None

    run(job())


def test_a_round_that_moved_nothing_is_committed_after_a_restart() -> None:
    """Its anchor is the one we have, so the tentative result that the restart forgot is not needed."""

    async def job() -> None:
        bench = Bench()
        await play(bench, 2)
        bench.disk.crash()
        bench.start()
        await bench.replica.load()
        await bench.replica.commit(1, GENESIS_DIGEST, Ending.APPLIED)
        assert bench.account.pending is None
        assert bench.replica.anchor == GENESIS_DIGEST

    run(job())


def test_damaged_files_are_reported_and_left_behind() -> None:
    async def job() -> None:
        for name, num_steps in (("trunk-0.record", 2), ("trunk-0.note", 3)):
            bench = Bench()
            await play(bench, num_steps)
            bench.disk.crash()
            data = bytearray(bench.disk.durable[name])
            data[len(data) // 2] ^= 0x40
            bench.disk.durable[name] = bytes(data) if name.endswith("record") else b"{" + bytes(data)
            bench.start()
            await bench.replica.load()
            assert [(e, f["file"]) for _, _, e, f in bench.log if e == "damaged-file"] == [("damaged-file", name)]
            await bench.recover(9, seed=90)
            await bench.encode(10)
            assert bench.replica.pending_offer is not None

    run(job())


def test_old_blobs_go_and_the_anchor_stays() -> None:
    async def job() -> None:
        bench = Bench()
        await bench.recover(0)
        num_rounds = NUM_KEPT_ROUNDS + 4
        for number in range(1, num_rounds + 1):
            await bench.encode(number)
            await bench.finish(number, Ending.APPLIED, ME, OTHER)
            assert await bench.exchange.has(bench.account.anchor_digest)
        blobs = [n for n in bench.disk.list() if n.startswith("blob-")]
        assert len(blobs) <= 3 * NUM_KEPT_ROUNDS + 1, "two packets and an anchor a round"

    run(job())


def test_a_blob_that_cannot_be_dropped_does_not_undo_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stubborn(self: SimExchange, digest: Digest) -> None:
        raise OSError(30, "Read-only file system")

    async def job() -> None:
        bench = Bench()
        await bench.recover(0)
        for number in range(1, NUM_KEPT_ROUNDS + 3):
            await bench.encode(number)
            await bench.finish(number, Ending.APPLIED, ME)
        assert bench.account.pending is None
        assert any(event == "not-dropped" for _, _, event, _ in bench.log)

    monkeypatch.setattr(SimExchange, "drop", stubborn)
    run(job())


def test_run_virtual_really_ran() -> None:
    async def job() -> float:
        await asyncio.sleep(5)
        return asyncio.get_running_loop().time()

    assert run(job()) >= 5


@pytest.mark.parametrize("is_restarted", [False, True])
def test_an_archive_keeps_all_packets_and_every_third_anchor(is_restarted: bool) -> None:
    """What is left of old rounds may be evicted, so it is not pinned."""

    async def job() -> None:
        bench = Bench(archive_every=3)
        pins = _counted_pins(bench)
        await bench.recover(0)
        anchors, packets = [GENESIS_DIGEST], []
        for number in range(1, 13):
            await bench.encode(number)
            settlement = await bench.settle(number, ME, OTHER)
            anchors.append(await bench.replica.apply(settlement))
            await bench.replica.commit(number, anchors[-1], Ending.APPLIED)
            packets += [e.packet for e in settlement.entries]
            if is_restarted and number == 6:
                bench.start()
                pins = _counted_pins(bench)
                await bench.replica.load()
        assert all([await bench.exchange.has(p) for p in packets])
        kept = [height for height, anchor in enumerate(anchors) if await bench.exchange.has(anchor)]
        assert {0, 3, 6, 9, 12} <= set(kept)
        assert set(kept) - {0, 3, 6, 9, 12} <= set(range(12 - NUM_KEPT_ROUNDS, 13)), "the others go with their rounds"
        pinned = {digest for digest, num in pins.items() if num > 0}
        assert not pinned & {*packets[: 2 * (12 - NUM_KEPT_ROUNDS)], *anchors[: 12 - NUM_KEPT_ROUNDS]}

    run(job())


def _counted_pins(bench: Bench) -> Counter[Digest]:
    """How often each blob is pinned from now on."""
    pins: Counter[Digest] = Counter()
    bench.exchange.pin = lambda digest: pins.update([digest])  # type: ignore[method-assign]
    bench.exchange.unpin = lambda digest: pins.subtract([digest])  # type: ignore[method-assign]
    return pins
