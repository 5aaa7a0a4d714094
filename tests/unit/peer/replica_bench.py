"""One replica on a simulated disk and a story in which a round ends in every way it can; shared by the replica tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from decentra.bits import ONE_BITS, float_bits
from decentra.config import CodecSpec, Manifest, ModelSpec, OuterSpec
from decentra.delta.account import Account
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.raw import float_bytes
from decentra.ids import PeerId, digest_of
from decentra.modules import build_layout
from decentra.peer.disk import sweep
from decentra.peer.replica import Replica
from decentra.protocol.duties import Ending
from decentra.protocol.messages import Entry, Settlement
from decentra.sim.adapters import InlineCompute, SimDisk, SimEvents, SimExchange, SimNet, SimSnapshot
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


def norm_bits(packet: bytes) -> int:
    return float_bits(decode_packet(packet, FRAGMENT).norm())


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

    def __init__(self, seed: int = 0, archive_every: int = 0) -> None:
        self.archive_every = archive_every
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
        self.replica = Replica(
            FRAGMENT, MANIFEST, ME, self.exchange, self.disk, compute, events, live=self.live, archive_every=self.archive_every
        )

    @property
    def account(self) -> Account:
        assert self.replica.account is not None
        return self.replica.account

    async def settle(self, number: int, *peers: PeerId, clip_bits: int = ONE_BITS) -> Settlement:
        """A settlement of this round on our anchor; the other's packet is fetched and screened, mine may be clipped."""
        packets: dict[PeerId, bytes] = {}
        if ME in peers:
            assert self.account.pending is not None
            packets[ME] = self.account.pending.packet
        if OTHER in peers:
            packets[OTHER] = encode_packet(FRAGMENT, vector(1000 + number), "int8", peer=OTHER, round=number)
            await self.replica.check_packet(digest_of(packets[OTHER]), packets[OTHER], OTHER, number, norm_bits(packets[OTHER]))
        weight = float_bits(1 / len(packets))
        entries = tuple(
            Entry(p, digest_of(d), len(d), 100, weight, norm_bits(d), clip_bits if p == ME else ONE_BITS)
            for p, d in sorted(packets.items())
        )
        return Settlement(FRAGMENT.id, number, number, self.account.anchor_digest, entries, LR, MU, "")

    async def encode(self, number: int) -> None:
        """Some training, the same whenever this round is encoded."""
        self.live.live_N = self.account.anchor_state.anchor_N + vector(number)
        self.live.num_tokens += 500
        await self.replica.encode(number, self.account.anchor_digest)

    async def finish(self, number: int, ending: Ending, *peers: PeerId, clip_bits: int = ONE_BITS) -> None:
        anchor = await self.replica.apply(await self.settle(number, *peers, clip_bits=clip_bits))
        await self.replica.commit(number, anchor, ending, clip_bits)

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
    ("applied 10 with a clip", lambda b: b.finish(10, Ending.APPLIED, ME, OTHER, clip_bits=float_bits(0.3))),
    ("encode 11", lambda b: b.encode(11)),
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
