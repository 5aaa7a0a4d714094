from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_run import LAYOUT, MANIFEST
from torch import Tensor, nn

from decentra.config import PeerConfig
from decentra.data.windows import WindowSource, source_for
from decentra.errors import ConfigError, IntegrityError, TrainingError
from decentra.ids import FragmentId, PeerId
from decentra.model.decoder import build_model
from decentra.model.output import ForwardOutput
from decentra.peer.trainer import Trainer

torch.set_num_threads(1)

ALL = frozenset(f.id for f in LAYOUT.fragments)
TRUNK, ROUTER, EXPERT_0, EXPERT_1 = (FragmentId(f) for f in ("trunk/0", "router/0", "expert.0/0", "expert.1/0"))
DEADLINE_S = 30.0


class Harness:
    """A trainer in a running loop, and a way to wait for it without sleeping."""

    def __init__(
        self, *, trained: frozenset[FragmentId] = ALL, model: nn.Module | None = None, max_steps: int | None = None, peer: str = "p"
    ):
        self.model = build_model(MANIFEST.model, 0) if model is None else model
        self.num_calls, self._waiting = 0, asyncio.Event()
        self.trainer = Trainer(
            MANIFEST, LAYOUT, self.model, source_for(MANIFEST, PeerConfig(), PeerId(peer)), device="cpu", threads=1, trained=trained,
            on_steps=self._on_steps, max_steps=max_steps,
        )  # fmt: skip

    def _on_steps(self) -> None:
        self.num_calls += 1
        self._waiting.set()

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                self._waiting.clear()
                await self._waiting.wait()

    async def train(self) -> None:
        """Run to ``max_steps``."""
        self.trainer.resume()
        await self.until(lambda: self.trainer.is_finished)
        await self.trainer.set_trained(self.trainer.trained)  # runs after the last step has been told

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def running(test: Callable[[Harness], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        harness = Harness(**options)
        harness.trainer.start(asyncio.get_running_loop())
        try:
            await test(harness)
        finally:
            await harness.trainer.stop()

    run(main())


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await coroutine

    asyncio.run(bounded())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_falls_and_totals_add_up() -> None:
    async def test(h: Harness) -> None:
        await h.until(lambda: True)
        assert h.num_calls == 0  # paused until resumed
        await h.train()
        totals = h.trainer.totals()
        num_steps, num_tokens, tokens_per_s, loss_ema, expert_tokens = totals
        assert num_steps == 60
        assert num_tokens == 60 * 4 * 24
        assert tokens_per_s > 0
        assert loss_ema is not None
        assert loss_ema < 4.0  # log 256 = 5.55 at the start
        assert abs(sum(expert_tokens.values()) - 2 * num_tokens) <= 4  # top-2, rounded down per expert
        assert h.num_calls == 60

    running(test, max_steps=60)


def test_resume_is_bit_equal() -> None:
    final: list[dict[str, Tensor]] = []

    async def whole(h: Harness) -> None:
        await h.train()
        final.append(h.parameters())

    async def first_half(h: Harness) -> None:
        await h.train()
        records.append(await h.trainer.state_record())

    async def second_half(h: Harness) -> None:
        await h.trainer.load_state(records[0])
        assert h.trainer.totals().num_steps == 12
        await h.train()
        final.append(h.parameters())
        records.append(await h.trainer.state_record())

    records: list[bytes] = []
    running(whole, max_steps=24)
    running(first_half, max_steps=12)
    torch.manual_seed(12345)  # another process has another random state
    running(second_half, max_steps=24, model=build_model(MANIFEST.model, 99))
    assert equal(final[0], final[1])


def test_a_record_restores_itself_exactly_before_the_start() -> None:
    async def main() -> None:
        one = Harness(max_steps=7)
        one.trainer.start(asyncio.get_running_loop())
        await one.train()
        await one.trainer.stop()
        record = await one.trainer.state_record()  # no thread any more
        other = Harness(model=build_model(MANIFEST.model, 99))
        torch.rand(3)  # moves the random state on
        await other.trainer.load_state(record)  # no thread yet
        assert await other.trainer.state_record() == record
        assert other.trainer.totals()[:2] == one.trainer.totals()[:2]

    run(main())


def test_damaged_or_foreign_records_are_refused_and_change_nothing() -> None:
    async def main() -> None:
        h = Harness()
        before, record = h.parameters(), await h.trainer.state_record()
        tail = record[:-1], record[:100], b"", b"\xff" * 64
        foreign = record.replace(b"live/model.norm.weight", b"live/model.norm.weighs")
        swapped = record.replace(b'"format": 1', b'"format": 7')
        nowhere = record.replace(b'\\"index\\": 0', b'\\"index\\":-1')
        assert record not in (foreign, swapped, nowhere)
        for bad in (*tail, foreign, swapped, nowhere):
            with pytest.raises(IntegrityError, match="trainer record"):
                await h.trainer.load_state(bad)
        assert equal(h.parameters(), before)
        assert await h.trainer.state_record() == record

    run(main())


def test_snapshot_shift_and_load_between_steps_while_training() -> None:
    async def test(h: Harness) -> None:
        h.trainer.resume()
        await h.until(lambda: h.num_calls > 3)
        await h.trainer.snapshot(TRUNK)
        h.trainer.pause()
        before = await h.trainer.snapshot(TRUNK)
        assert before.num_steps == h.trainer.totals().num_steps
        assert before.num_tokens == before.num_steps * 4 * 24
        assert not before.has_bad_steps
        delta_N = torch.linspace(-1, 1, LAYOUT[TRUNK].num_elements)
        await h.trainer.shift(TRUNK, delta_N)
        after = await h.trainer.snapshot(TRUNK)
        assert torch.equal(after.live_N, before.live_N + delta_N)
        assert after.num_steps == before.num_steps  # paused: nothing moved in between
        await h.trainer.load(EXPERT_1, torch.zeros(LAYOUT[EXPERT_1].num_elements))
        assert not (await h.trainer.snapshot(EXPERT_1)).live_N.any()
        h.trainer.resume()
        await h.until(lambda: h.trainer.totals().num_steps > before.num_steps + 2)
        assert not torch.equal((await h.trainer.snapshot(TRUNK)).live_N, after.live_N)

    running(test)


def test_a_snapshot_owns_its_numbers_and_an_experts_tokens_are_its_own() -> None:
    async def test(h: Harness) -> None:
        await h.train()
        snapshot = await h.trainer.snapshot(EXPERT_0)
        copy_N = snapshot.live_N.clone()
        await h.trainer.shift(EXPERT_0, torch.ones_like(copy_N))
        assert torch.equal(snapshot.live_N, copy_N)
        experts = [(await h.trainer.snapshot(FragmentId(f"expert.{e}/0"))).num_tokens for e in range(4)]
        assert experts == [h.trainer.totals().expert_tokens[e] for e in range(4)]
        assert abs(sum(experts) - 2 * h.trainer.totals().num_tokens) <= 4
        other = Harness()
        await other.trainer.load_state(await h.trainer.state_record())
        assert (await other.trainer.snapshot(ROUTER)).cursor == snapshot.cursor

    running(test, max_steps=5)


def test_frozen_fragments_stay_bitwise_and_earn_no_tokens() -> None:
    trained = frozenset({TRUNK, EXPERT_0})

    async def test(h: Harness) -> None:
        before = h.parameters()
        await h.train()
        for name, value in h.parameters().items():
            is_trained = name in {slot.name for f in trained for slot in LAYOUT[f].slots}
            assert torch.equal(value, before[name]) != is_trained, name
        assert list(h.trainer.totals().expert_tokens) == [0]
        assert (await h.trainer.snapshot(EXPERT_1)).num_tokens == 0

    running(test, trained=trained, max_steps=10)


def test_changing_what_is_trained_keeps_the_moments_of_what_stays() -> None:
    def moments(record: bytes) -> dict[str, Tensor]:
        from safetensors.torch import load

        return {k: v for k, v in load(record).items() if k.startswith("exp_avg/")}

    async def test(h: Harness) -> None:
        await h.train()
        old = moments(await h.trainer.state_record())
        await h.trainer.set_trained(frozenset({TRUNK, EXPERT_1}))
        kept = moments(await h.trainer.state_record())
        names = {f"exp_avg/{slot.name}" for f in (TRUNK, EXPERT_1) for slot in LAYOUT[f].slots}
        assert kept.keys() == names < old.keys()
        assert equal(kept, {name: old[name] for name in names})
        await h.trainer.set_trained(ALL)
        assert moments(await h.trainer.state_record()).keys() == names  # what came back starts without moments
        await h.trainer.load(EXPERT_1, torch.zeros(LAYOUT[EXPERT_1].num_elements))
        left = moments(await h.trainer.state_record()).keys()
        assert left == {f"exp_avg/{slot.name}" for slot in LAYOUT[TRUNK].slots}

    running(test, max_steps=6)


def test_with_nothing_to_train_it_waits_and_still_serves() -> None:
    async def test(h: Harness) -> None:
        h.trainer.resume()
        assert (await h.trainer.snapshot(TRUNK)).num_steps == 0
        await h.trainer.set_trained(ALL)
        await h.until(lambda: h.num_calls >= 2)

    running(test, trained=frozenset())


class Scripted(nn.Module):
    """A model that fails as told at its n-th forward: a number to multiply the logits with, or an exception."""

    def __init__(self, script: Callable[[int], float]) -> None:
        super().__init__()
        self.inner, self.script, self.num_calls = build_model(MANIFEST.model, 0), script, 0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, tokens_BT: Tensor) -> ForwardOutput:
        self.num_calls += 1
        output = self.inner(tokens_BT)
        return output._replace(logits_BTV=output.logits_BTV * self.script(self.num_calls))


def test_steps_that_are_not_finite_are_skipped_counted_and_told() -> None:
    model = Scripted(lambda n: float("nan") if n in (3, 4) else 1.0)

    async def test(h: Harness) -> None:
        await h.train()
        assert h.trainer.num_skipped_steps == 2
        assert not h.trainer.is_diverged
        totals = h.trainer.totals()
        assert (totals.num_steps, totals.num_tokens) == (6, 4 * 4 * 24)
        assert h.num_calls == 6
        assert all(p.isfinite().all() for p in h.parameters().values())
        assert (await h.trainer.snapshot(TRUNK)).has_bad_steps
        assert not (await h.trainer.snapshot(TRUNK)).has_bad_steps  # told once
        assert (await h.trainer.snapshot(EXPERT_0)).has_bad_steps  # per fragment

    running(test, model=model, max_steps=6)


def test_five_bad_steps_in_a_row_are_divergence_and_a_good_one_ends_it() -> None:
    model = Scripted(lambda n: float("inf") if n <= 5 else 1.0)

    async def test(h: Harness) -> None:
        await h.train()
        assert h.trainer.is_diverged
        before = h.parameters()
        assert equal(before, dict(build_model(MANIFEST.model, 0).named_parameters()))

    running(test, model=model, max_steps=5)

    async def recovered(h: Harness) -> None:
        await h.train()
        assert not h.trainer.is_diverged

    running(recovered, model=Scripted(lambda n: float("inf") if n <= 5 else 1.0), max_steps=6)


def broken_at(step: int) -> Callable[[int], float]:
    def script(number: int) -> float:
        if number == step:
            raise RuntimeError("out of memory, said the model")
        return 1.0

    return script


def test_a_dead_thread_fails_every_waiting_and_later_call() -> None:
    async def test(h: Harness) -> None:
        h.trainer.resume()
        await h.until(lambda: h.trainer.failure is not None)
        for call in (h.trainer.snapshot(TRUNK), h.trainer.state_record(), h.trainer.set_trained(ALL)):
            with pytest.raises(TrainingError, match="out of memory, said the model") as caught:
                await call
            assert isinstance(caught.value.__cause__, RuntimeError)

    running(test, model=Scripted(broken_at(3)))


def test_commands_that_wait_while_the_thread_dies_are_failed_too() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def script(number: int) -> float:
        entered.set()
        assert go_on.wait(DEADLINE_S)
        raise RuntimeError("broken for good")

    async def test(h: Harness) -> None:
        h.trainer.resume()
        await asyncio.to_thread(entered.wait, DEADLINE_S)
        calls = [asyncio.ensure_future(h.trainer.snapshot(TRUNK)) for _ in range(3)]
        await asyncio.sleep(0)  # let them queue
        go_on.set()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, TrainingError)

    running(test, model=Scripted(script))


def test_a_mistaken_command_fails_its_caller_only() -> None:
    async def test(h: Harness) -> None:
        with pytest.raises(KeyError):
            await h.trainer.snapshot(FragmentId("expert.77/0"))
        with pytest.raises(AssertionError):
            await h.trainer.shift(TRUNK, torch.zeros(3))
        assert (await h.trainer.snapshot(TRUNK)).num_steps == 0

    running(test)


def test_stop_ends_with_the_step_under_way_and_runs_what_waits() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def script(number: int) -> float:
        if number == 3:
            entered.set()
            assert go_on.wait(DEADLINE_S)
        return 1.0

    async def main() -> None:
        h = Harness(model=Scripted(script))
        h.trainer.start(asyncio.get_running_loop())
        h.trainer.resume()
        await asyncio.to_thread(entered.wait, DEADLINE_S)
        waiting = asyncio.ensure_future(h.trainer.snapshot(TRUNK))
        stopping = asyncio.ensure_future(h.trainer.stop())
        await asyncio.sleep(0)  # both have begun
        go_on.set()
        await stopping
        assert (await waiting).num_steps == 3
        assert h.trainer.totals().num_steps == 3
        assert (await h.trainer.snapshot(TRUNK)).num_steps == 3  # no thread any more

    run(main())


def test_cancelling_a_caller_does_not_disturb_the_trainer() -> None:
    async def test(h: Harness) -> None:
        call = asyncio.ensure_future(h.trainer.snapshot(TRUNK))
        await asyncio.sleep(0)
        call.cancel()
        assert (await h.trainer.snapshot(TRUNK)).num_steps == 0

    running(test)


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ConfigError, match=message):
        yield


def test_impossible_setups_are_config_errors() -> None:
    source = WindowSource([bytes(100)], 24, 0, "p")

    def trainer(device: str, model: nn.Module) -> Trainer:
        return Trainer(MANIFEST, LAYOUT, model, source, device=device, threads=1, trained=ALL, on_steps=lambda: None)

    with refused("'auto', 'cpu'"):
        trainer("abacus", build_model(MANIFEST.model, 0))
    with refused("'auto', 'cpu'"):
        trainer("meta", build_model(MANIFEST.model, 0))
    with refused("CUDA devices"):
        trainer("cuda:999", build_model(MANIFEST.model, 0))
    with refused("model has none of that name"):
        trainer("cpu", build_model(MANIFEST.model, 0, experts=[0, 1]))
