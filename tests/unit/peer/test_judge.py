"""Judging a packet by its loss: what it measures, that it leaves no trace in the trainer, and what it objects to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
import torch
from small_run import LAYOUT, MANIFEST
from torch import Tensor

from decentra.config import JudgeSpec, PeerConfig
from decentra.data.windows import source_for
from decentra.delta.decoded import Decoded
from decentra.ids import FragmentId, PeerId
from decentra.model.decoder import build_model
from decentra.peer.inner import InnerLoop
from decentra.peer.judge import Judge, Packet

torch.set_num_threads(1)

TRUNK = FragmentId("trunk/0")


def loop_of(peer: str) -> InnerLoop:
    source = source_for(MANIFEST, PeerConfig(), PeerId(peer))
    return InnerLoop(
        MANIFEST, LAYOUT, build_model(MANIFEST.model, 0), source, torch.device("cpu"), frozenset(f.id for f in LAYOUT.fragments)
    )


def test_gains_tell_progress_from_its_opposite_and_from_noise_and_leave_no_trace() -> None:
    judge, other, undisturbed = loop_of("judge"), loop_of("other"), loop_of("judge")
    anchor_N = other.snapshot(TRUNK).live_N
    for _ in range(10):
        other.step()
    delta_N = anchor_N - other.snapshot(TRUNK).live_N
    noise_N = torch.randn(delta_N.shape, generator=torch.Generator().manual_seed(0))
    noise_N *= delta_N.norm() / noise_N.norm()
    judge.step()
    undisturbed.step()
    before = judge.record()
    gains = judge.gains(TRUNK, anchor_N, [delta_N, -delta_N, noise_N, 0.0 * delta_N], 0.25, 7, 4)
    assert gains.shape == (4, 4)
    honest, flipped, noise, nothing = gains.mean(1).tolist()
    assert honest > 0.0 > flipped
    assert abs(noise) < 0.2 * honest
    assert nothing == 0.0
    assert torch.equal(judge.gains(TRUNK, anchor_N, [delta_N], 0.25, 7, 4)[0], gains[0]), "equal numbers mean equal text"
    assert not torch.equal(judge.gains(TRUNK, anchor_N, [delta_N], 0.25, 8, 4)[0], gains[0])
    assert judge.record() == before
    judge.step()
    undisturbed.step()
    assert all(torch.equal(judge.snapshot(f.id).live_N, undisturbed.snapshot(f.id).live_N) for f in LAYOUT.fragments)


class Scale:
    """Gains that are written into the deltas: [mean, difference between windows]; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float, int]] = []

    async def gains(
        self, fragment: FragmentId, anchor_N: Tensor, deltas: Sequence[Tensor], step: float, number: int, num_windows: int
    ) -> Tensor:
        self.asked.append((len(deltas), step, number))
        return torch.stack([delta_N[0] + delta_N[1] * torch.tensor([-1.0, 1.0, -1.0, 1.0]) for delta_N in deltas])


class Told:
    def __init__(self) -> None:
        self.events: list[str] = []

    def emit(self, event: str, **fields: object) -> None:
        self.events.append(f"{event} {fields['peer']}: {fields['why']}")


def packet(gain: float, spread: float = 0.01, *, num_tokens: int = 100, sender: str = "other") -> Packet:
    return Packet(PeerId(sender), Decoded.of(torch.tensor([gain, spread])), num_tokens)


@pytest.mark.parametrize(
    ("gain", "num_tokens", "objects"),
    [
        (0.3, 100, False),
        (0.1, 100, True),
        (0.0, 100, True),
        (-1.0, 100, True),
        (0.08, 25, False),
        (0.0, 25, True),
        (0.3, 900, False),
        (math.nan, 100, True),
    ],
)
def test_a_packet_has_to_bring_a_share_of_what_ones_own_brings_per_token(gain: float, num_tokens: int, objects: bool) -> None:
    async def story() -> None:
        scale, told = Scale(), Told()
        judge = Judge(JudgeSpec(share=0.2), scale, told, salt=1000)
        anchor_N, own = torch.zeros(1), packet(1.0, sender="me")
        assert await judge.objects(TRUNK, 3, anchor_N, packet(gain, num_tokens=num_tokens), own, 4) is objects
        assert await judge.objects(TRUNK, 3, anchor_N, packet(0.5, sender="third"), own, 4) is False
        assert scale.asked == [(2, 0.25, 1003), (1, 0.25, 1003)], "one's own is measured once a round"
        assert len(told.events) == objects

    asyncio.run(story())


def test_what_is_not_clear_is_let_pass_until_several_rounds_make_it_clear() -> None:
    async def story() -> None:
        judge, anchor_N, own = Judge(JudgeSpec(share=0.2), Scale(), Told(), salt=0), torch.zeros(1), packet(1.0, 0.0, sender="me")
        said = [await judge.objects(TRUNK, number, anchor_N, packet(0.0, 0.2), own, 4) for number in range(6)]
        assert said[0] is False
        assert said[-1] is True
        assert said == sorted(said), "an objection is not taken back while nothing gets better"
        again = [await judge.objects(TRUNK, number, anchor_N, packet(0.5, 0.2), own, 4) for number in range(6, 9)]
        assert again[-1] is False, "and forgiven when it does"

    asyncio.run(story())


def test_a_good_beginning_buys_two_rounds_of_harm_at_most() -> None:
    async def story() -> None:
        judge, anchor_N, own = Judge(JudgeSpec(share=0.2), Scale(), Told(), salt=0), torch.zeros(1), packet(1.0, sender="me")
        for number in range(30):
            assert not await judge.objects(TRUNK, number, anchor_N, packet(1.0), own, 4)
        said = [await judge.objects(TRUNK, number, anchor_N, packet(-1.0), own, 4) for number in range(30, 34)]
        assert said == [False, False, True, True]

    asyncio.run(story())


def test_without_an_own_packet_and_where_ones_own_does_not_help_any_progress_will_do() -> None:
    async def story() -> None:
        for own in (None, packet(-2.0, sender="me")):
            judge, anchor_N = Judge(JudgeSpec(share=0.5), Scale(), Told(), salt=0), torch.zeros(1)
            assert await judge.objects(TRUNK, 1, anchor_N, packet(0.1), own, 3) is False
            assert await judge.objects(TRUNK, 1, anchor_N, packet(0.0, 0.0, sender="idle"), own, 3) is False
            assert await judge.objects(TRUNK, 1, anchor_N, packet(-0.1, sender="third"), own, 3) is True

    asyncio.run(story())


def test_what_is_far_too_long_is_objected_to_even_where_it_helps() -> None:
    async def story() -> None:
        told = Told()
        judge, anchor_N, own = Judge(JudgeSpec(share=0.2), Scale(), told, salt=0), torch.zeros(1), packet(1.0, sender="me")
        assert await judge.objects(TRUNK, 1, anchor_N, packet(100.0), own, 4) is True
        assert "8 times as long" in told.events[0]
        assert await judge.objects(TRUNK, 1, anchor_N, packet(4.0, sender="quick", num_tokens=400), own, 4) is False
        assert await judge.objects(TRUNK, 1, anchor_N, packet(20.0, sender="quicker", num_tokens=400), own, 4) is False, (
            "of four times the tokens"
        )

    asyncio.run(story())
