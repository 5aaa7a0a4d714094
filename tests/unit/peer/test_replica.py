"""One fragment at a peer: every way a round can end, a crash at every disk operation of it, a full disk, and packets refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from decentra.bits import float_bits
from decentra.config import CodecSpec, Manifest, ModelSpec, OuterSpec
from decentra.delta.account import Account
from decentra.delta.aggregate import aggregate
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.raw import float_bytes
from decentra.errors import IntegrityError, RejectedPayload, TrainingError
from decentra.ids import Digest, PeerId, digest_of
from decentra.modules import build_layout
from decentra.peer.disk import sweep
from decentra.peer.replica import NUM_KEPT_ROUNDS, Replica
from decentra.protocol.member import Ending
from decentra.protocol.messages import Entry, Settlement
from decentra.sim.adapters import Crash, InlineCompute, SimDisk, SimEvents, SimExchange, SimNet, SimSnapshot
from decentra.sim.loop import run_virtual

torch.set_num_threads(1)

ME, OTHER = PeerId("me"), PeerId("other")
LAYOUT = build_layout([("a.norm", (4,)), ("b.weight", (5, 8))])
FRAGMENT = LAYOUT.fragments[0]
N = FRAGMENT.num_elements
GENESIS = AnchorState(torch.linspace(-1, 1, N))
GENESIS_BLOB = encode_anchor(FRAGMENT, GENESIS)
GENESIS_DIGEST = anchor_digest(GENESIS_BLOB)
MANIFEST = Manifest(
    name="test", model=ModelSpec(num_experts=2), codec=CodecSpec(name="int8"), outer=OuterSpec(rule="nesterov", lr=0.7, momentum=0.9)
)
LR, MU = float_bits(0.7), float_bits(0.9)


def vector(seed: int, scale: float = 0.1) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


@dataclass
class Live:
    """The trainer's side: the test says where live is."""

    live_N: Tensor = field(default_factory=lambda: torch.zeros(N))
    num_tokens: int = 0
    has_bad_steps: bool = False
    is_diverged: bool = False

    async def snapshot(self, fragment: object) -> SimSnapshot:
        return SimSnapshot(self.live_N.clone(), self.num_tokens // 100, self.num_tokens, b"cursor", self.has_bad_steps)

    async def shift(self, fragment: object, delta_N: Tensor) -> None:
        self.live_N = self.live_N + delta_N

    async def load(self, fragment: object, values_N: Tensor) -> None:
        self.live_N = values_N.clone()


class Bench:
    """A replica on a disk that may crash, and what the others of its rounds would have sent."""

    def __init__(self, seed: int = 0) -> None:
        self.disk = SimDisk(Random(seed))
        self.peers: dict[PeerId, SimExchange] = {}
        self.log: list[Any] = []
        self.start()

    def start(self) -> None:
        """A new process on the same disk."""
        self.disk.revive()
        sweep(self.disk)
        self.live = Live()
        self.exchange = SimExchange(ME, self.disk, SimNet(Random(1)), self.peers)
        compute, events = InlineCompute(Random(2), 0.0), SimEvents("me", self.log)
        self.replica = Replica(FRAGMENT, MANIFEST, ME, self.exchange, self.disk, compute, events, live=self.live)

    @property
    def account(self) -> Account:
        assert self.replica.account is not None
        return self.replica.account

    async def settle(self, number: int, *peers: PeerId) -> Settlement:
        """A settlement of this round on our anchor; the other's packet is fetched and screened."""
        packets: dict[PeerId, bytes] = {}
        if ME in peers:
            assert self.account.pending is not None
            packets[ME] = self.account.pending.packet
        if OTHER in peers:
            packets[OTHER] = encode_packet(FRAGMENT, vector(1000 + number), "int8")
            await self.replica.check_packet(digest_of(packets[OTHER]), packets[OTHER], OTHER, number)
        weight = float_bits(1 / len(packets))
        entries = tuple(Entry(p, digest_of(d), len(d), 100, weight) for p, d in sorted(packets.items()))
        return Settlement(FRAGMENT.id, number, number, self.account.anchor_digest, entries, LR, MU, "")

    async def encode(self, number: int) -> None:
        """Some training, the same whenever this round is encoded."""
        self.live.live_N = self.account.anchor_state.anchor_N + vector(number)
        self.live.num_tokens += 500
        await self.replica.encode(number, self.account.anchor_digest)

    async def finish(self, number: int, ending: Ending, *peers: PeerId) -> None:
        anchor = await self.replica.apply(await self.settle(number, *peers))
        await self.replica.commit(number, anchor, ending)

    async def recover(self, number: int, seed: int | None = None) -> None:
        blob = GENESIS_BLOB if seed is None else encode_anchor(FRAGMENT, AnchorState(vector(seed), vector(seed + 1)))
        await self.replica.recover(anchor_digest(blob), number, blob)


Step = Callable[[Bench], Awaitable[None]]

# every way a round ends here, in an order that leaves a residual, a pending packet or nothing behind each
STORY: tuple[tuple[str, Step], ...] = (
    ("first anchor", lambda b: b.recover(0)),
    ("encode 1", lambda b: b.encode(1)),
    ("applied 1", lambda b: b.finish(1, Ending.APPLIED, ME, OTHER)),
    ("followed 2 with a residual", lambda b: b.finish(2, Ending.FOLLOWED, OTHER)),
    ("encode 3", lambda b: b.encode(3)),
    ("cancel 3", lambda b: b.replica.cancel(3)),
    ("followed 4 after a cancel", lambda b: b.finish(4, Ending.FOLLOWED, OTHER)),
    ("encode 5", lambda b: b.encode(5)),
    ("excluded 5", lambda b: b.finish(5, Ending.EXCLUDED, OTHER)),
    ("encode 6", lambda b: b.encode(6)),
    ("reset in 6", lambda b: b.recover(6, seed=70)),
    ("followed 7 without a residual", lambda b: b.finish(7, Ending.FOLLOWED, OTHER)),
    ("encode 8", lambda b: b.encode(8)),
    ("cancel 8", lambda b: b.replica.cancel(8)),
    ("reset in 8", lambda b: b.recover(8, seed=80)),
    ("encode 9", lambda b: b.encode(9)),
    ("applied 9", lambda b: b.finish(9, Ending.APPLIED, ME)),
    ("encode 10", lambda b: b.encode(10)),
)
NUM_POWER_CUTS = 3


def image(account: Account | None) -> object:
    """Everything an account holds, bit by bit."""
    if account is None:
        return None
    state, pending = account.anchor_state, account.pending
    tensors = [state.anchor_N, state.momentum_N, account.residual_N]
    tensors += [] if pending is None else [pending.live_N, pending.residual_before_N, pending.residual_after_N]
    bits = tuple(None if x_N is None else float_bytes(x_N) for x_N in tensors)
    return account.anchor_digest, bits, None if pending is None else (pending.round, pending.packet)


def run(job: Coroutine[Any, Any, Any]) -> Any:
    return run_virtual(job)


async def play(bench: Bench, num_steps: int) -> list[object]:
    images = [image(None)]
    for _, step in STORY[:num_steps]:
        await step(bench)
        images.append(image(bench.replica.account))
    return images


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

    def write(self, name: str, data: bytes) -> None:
        if self.refuse_in is not None:
            self.refuse_in -= 1
            if self.refuse_in <= 0:
                self.refuse_in = None
                raise OSError(28, "No space left on device")
        super().write(name, data)


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


# ---------------------------------------------------------------- mistakes


def test_bad_packets_are_refused_by_name_and_not_stored() -> None:
    good = encode_packet(FRAGMENT, vector(5), "int8")
    alien = build_layout([("a.norm", (4,)), ("b.weight", (8, 5))]).fragments[0]
    infinite = bytearray(encode_packet(FRAGMENT, vector(5), "fp32"))
    bad = {
        "size": good[:-40] if len(good) > 40 else b"",
        "malformed": good[:-1] + bytes([good[-1] ^ 1]),
        "shape": encode_packet(alien, vector(5), "int8"),
        "not-finite": _with_nan(bytes(infinite)),
    }

    async def job() -> None:
        bench = Bench()
        for reason, data in bad.items():
            with pytest.raises(RejectedPayload) as caught:
                await bench.replica.check_packet(digest_of(data), data, OTHER, 3)
            assert caught.value.reason in (reason, "malformed")
            assert (caught.value.peer, caught.value.round) == (OTHER, 3)
            assert not await bench.exchange.has(digest_of(data))
        with pytest.raises(RejectedPayload, match="size"):
            await bench.replica.check_packet(digest_of(b""), b"", OTHER, 3)
        await bench.replica.check_packet(digest_of(good), good, OTHER, 3)
        assert await bench.exchange.has(digest_of(good))

    run(job())


def _with_nan(packet: bytes) -> bytes:
    """The same packet with its last value NaN and a right checksum."""
    import struct
    import zlib

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
            bench.replica.apply(Settlement(FRAGMENT.id, 1, 1, GENESIS_DIGEST, (Entry(OTHER, Digest("1" * 64), 1, 1, 0),), LR, MU, "")),
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


def test_a_blob_that_cannot_be_dropped_does_not_undo_the_round() -> None:
    class Stubborn(SimExchange):
        async def drop(self, digest: Digest) -> None:
            raise OSError(30, "Read-only file system")

    async def job() -> None:
        bench = Bench()
        await bench.recover(0)
        bench.replica.exchange = Stubborn(ME, bench.disk, SimNet(Random(1)), bench.peers)
        for number in range(1, NUM_KEPT_ROUNDS + 3):
            await bench.encode(number)
            await bench.finish(number, Ending.APPLIED, ME)
        assert bench.account.pending is None
        assert any(event == "not-dropped" for _, _, event, _ in bench.log)

    run(job())


def test_run_virtual_really_ran() -> None:
    async def job() -> float:
        await asyncio.sleep(5)
        return asyncio.get_running_loop().time()

    assert run(job()) >= 5
