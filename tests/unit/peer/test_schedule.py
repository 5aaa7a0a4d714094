"""The learning rate follows the whole run's tokens, so that peers of all speeds are on one schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import LAYOUT, MANIFEST

from decentra.config import PeerConfig, TrainSpec
from decentra.data.windows import source_for
from decentra.ids import PeerId
from decentra.model.decoder import build_model
from decentra.peer.inner import InnerLoop, resolve_device


@given(st.integers(0, 10_000), st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.sampled_from(["linear", "cosine"]))
def test_it_never_rises_and_ends_at_its_share(num_steps: int, a: int, b: int, schedule: str) -> None:
    train = TrainSpec(lr=1e-3, warmup_steps=0, schedule=schedule, decay_tokens=1 << 30, final_share=0.1)  # type: ignore[arg-type]
    early, late = sorted((a, b))
    assert train.lr_at(num_steps, late) <= train.lr_at(num_steps, early) <= 1e-3
    assert train.lr_at(num_steps, 1 << 41) == pytest.approx(1e-4)
    assert train.lr_at(num_steps, 1 << 29) == pytest.approx(5.5e-4)


def test_constant_is_warmup_only() -> None:
    train = TrainSpec(lr=1e-3, warmup_steps=10)
    assert [train.lr_at(n, 10**12) for n in (0, 4, 9, 50)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3])


def test_a_schedule_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_tokens"):
        TrainSpec(schedule="cosine")


def test_the_inner_loop_follows_it_and_remembers_it() -> None:
    train = MANIFEST.train.model_copy(update={"schedule": "linear", "decay_tokens": 1000, "final_share": 0.0, "weight_decay": 0.0})
    manifest = MANIFEST.model_copy(
        update={"train": train, "data": MANIFEST.data.model_copy(update={"bytes_per_domain": 20_000, "held_out_bytes": 1024})}
    )
    trained = frozenset(f.id for f in LAYOUT.fragments)

    def loop() -> InnerLoop:
        source = source_for(manifest, PeerConfig(), PeerId("p"))
        return InnerLoop(manifest, LAYOUT, build_model(manifest.model, 0), source, resolve_device("cpu"), trained)

    inner = loop()
    trunk = LAYOUT.fragments[0].id
    before_N = inner.snapshot(trunk).live_N
    inner.set_run_tokens(1000)
    inner.step()
    assert inner.snapshot(trunk).live_N.equal(before_N), "the schedule is at its end"
    again = loop()
    again.restore(inner.record())
    again.step()
    assert again.snapshot(trunk).live_N.equal(before_N), "also after a restart, before the service is heard"
