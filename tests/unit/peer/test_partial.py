"""An inner loop that holds a part of the experts: what moves, what must not, and what a snapshot says of it."""

from __future__ import annotations

import pytest
import torch
from small_run import LAYOUT, MANIFEST

from decentra.config import PeerConfig
from decentra.data.windows import source_for
from decentra.delta.flat import with_untouched
from decentra.errors import ConfigError
from decentra.ids import FragmentId, PeerId, expert_of
from decentra.model.decoder import build_model
from decentra.peer.inner import InnerLoop

torch.set_num_threads(1)

ROUTER, EXPERT_3 = FragmentId("router/0"), FragmentId("expert.3/0")
HELD = (0, 2)


def fragments_of(experts: tuple[int, ...]) -> frozenset[FragmentId]:
    return frozenset(f.id for f in LAYOUT.fragments if (e := expert_of(f.module)) is None or e in experts)


def loop_of(held: tuple[int, ...]) -> InnerLoop:
    source = source_for(MANIFEST, PeerConfig(), PeerId("p"))
    return InnerLoop(MANIFEST, LAYOUT, build_model(MANIFEST.model, 0, held), source, torch.device("cpu"), fragments_of(held))


def rows(flat_N: torch.Tensor) -> torch.Tensor:
    """[layers, experts, hidden] of the router's vector."""
    return flat_N.view(2, 4, 24)


def test_router_rows_of_absent_experts_stay_bit_equal() -> None:
    inner = loop_of(HELD)
    before = rows(inner.snapshot(ROUTER).live_N)
    for _ in range(3):
        inner.step()
    after = rows(inner.snapshot(ROUTER).live_N)
    assert torch.equal(after[:, [1, 3]], before[:, [1, 3]]), "neither gradients nor weight decay move them"
    assert (after[:, list(HELD)] != before[:, list(HELD)]).any(-1).all()


def test_a_snapshot_names_what_its_peer_does_not_train() -> None:
    inner = loop_of(HELD)
    snapshot = inner.snapshot(ROUTER)
    assert snapshot.untouched == tuple(slice(at, at + 24) for at in (24, 72, 120, 168))
    assert inner.snapshot(FragmentId("trunk/0")).untouched == ()
    anchor_N = snapshot.live_N + 1e-6
    inner.step()
    delta = rows(anchor_N - with_untouched(inner.snapshot(ROUTER).live_N, anchor_N, snapshot.untouched))
    assert not delta[:, [1, 3]].any(), "not even rounding is sent as progress"
    assert delta[:, list(HELD)].any()


def test_an_expert_that_is_taken_in_trains_once_it_is_loaded() -> None:
    inner = loop_of(HELD)
    inner.step()
    moments = len(inner._optimizer.state)
    inner.hold([3])
    assert not inner.snapshot(EXPERT_3).live_N.any()
    inner.load(EXPERT_3, torch.randn(LAYOUT[EXPERT_3].num_elements, generator=torch.Generator().manual_seed(0)) * 0.05)
    inner.set_trained(fragments_of((*HELD, 3)))
    assert len(inner._optimizer.state) == moments, "the others keep their moments"
    before = inner.snapshot(EXPERT_3).live_N
    assert inner.step() > 0
    assert (inner.snapshot(EXPERT_3).live_N != before).any()
    assert {s.start // 24 % 4 for s in inner.snapshot(ROUTER).untouched} == {1}
    assert inner.totals(0.0).expert_tokens[3] > 0


def test_a_record_of_a_partial_peer_is_restored_bit_for_bit() -> None:
    inner, again = loop_of(HELD), loop_of(HELD)
    for _ in range(2):
        inner.step()
    again.restore(inner.record())
    for loop in (inner, again):
        loop.step()
    for fragment in fragments_of(HELD):
        assert torch.equal(inner.snapshot(fragment).live_N, again.snapshot(fragment).live_N)


def test_a_record_that_holds_more_experts_than_the_process_gives_the_rest() -> None:
    inner, fewer = loop_of((0, 2, 3)), loop_of(HELD)
    for _ in range(2):
        inner.step()
    fewer.restore(inner.record())
    assert fewer.totals(0.0).num_steps == 2
    assert torch.equal(fewer.snapshot(FragmentId("expert.2/0")).live_N, inner.snapshot(FragmentId("expert.2/0")).live_N)
    more = loop_of((0, 1, 2, 3))
    more.restore(inner.record())
    assert torch.equal(more.snapshot(EXPERT_3).live_N, inner.snapshot(EXPERT_3).live_N)
    assert more.step() > 0


def test_a_model_of_ones_own_is_held_whole() -> None:
    inner = loop_of((0, 1, 2, 3))
    inner._model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="join with --mode mirror"):
        inner.hold([1])


class Windows:
    """Batches as they are given, one after the other."""

    def __init__(self, *batches: torch.Tensor) -> None:
        self.batches = list(batches)

    def next_batch(self, batch_size: int, *_: object) -> torch.Tensor:
        return self.batches.pop(0)

    def cursor(self) -> bytes:
        return b""


def test_what_is_only_read_moves_nothing_and_counts_for_nobody() -> None:
    """A batch of prompts alone would move the router by its own losses; and an expert is credited with what it learnt, not with what it read."""
    shape = (MANIFEST.train.batch_size, MANIFEST.data.seq_len + 1)
    text = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0))
    half = torch.where(torch.arange(shape[1]) <= shape[1] // 2, ~text, text)
    inner = loop_of((0, 1, 2, 3))
    inner._source = Windows(~text, half, text)  # type: ignore[assignment]
    before = {f.id: inner.snapshot(f.id).live_N for f in LAYOUT.fragments}
    assert inner.step() == 0
    assert inner.num_skipped_steps == 0, "nothing is wrong with it"
    assert all(torch.equal(inner.snapshot(name).live_N, values_N) for name, values_N in before.items())
    assert not inner.totals(1.0).expert_tokens
    num_learnt = inner.step()
    assert 0 < num_learnt < text[:, 1:].numel()
    slots = sum(inner.totals(1.0).expert_tokens.values())
    assert abs(slots - MANIFEST.model.num_experts_per_token * num_learnt) <= 4, "rounded for each expert"
    assert inner.step() == text[:, 1:].numel()
