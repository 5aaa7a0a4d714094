"""Upcycling, splitting and expanding: exact where they say so, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.model.decoder import build_model
from decentra.modular import upcycle as up
from decentra.modular.parts import State, check_numbering

DENSE = ModelSpec(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, expert_hidden_size=24, num_experts=1,
    num_experts_per_token=1, max_seq_len=32,
)  # fmt: skip
STATE: State = {k: v.detach() * 3 for k, v in build_model(DENSE, 3).state_dict().items()}
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(state: State, spec: ModelSpec) -> torch.Tensor:
    model = build_model(spec, 0)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(TOKENS).logits_BTV


EXACT: dict[str, Callable[[], up.Upcycled]] = {
    "copy": lambda: up.upcycle(STATE, DENSE, 4),
    "copy, three chosen": lambda: up.upcycle(STATE, DENSE, 5, 3),
    "virtual groups": lambda: up.virtual_groups(STATE, DENSE, 6, 3),
    "moefy with all": lambda: up.moefy(STATE, DENSE, 6, 6, cluster="kmeans"),
    "branch-train-mix of copies": lambda: up.branch_train_mix([STATE, STATE, STATE], DENSE),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_exact_at_the_start(name: str) -> None:
    made = EXACT[name]()
    check_numbering(made.state, made.spec.num_experts)
    torch.testing.assert_close(logits(made.state, made.spec), logits(STATE, DENSE), atol=1e-5, rtol=1e-5)
    assert made.is_exact or name.startswith("branch")


def test_expanded_with_all_copies_chosen_is_exact_and_with_as_many_as_before_is_not_more_work() -> None:
    small = up.upcycle(STATE, DENSE, 3, noise=0.2)
    large = up.expand(small.state, small.spec, 2)
    assert (large.spec.num_experts, large.spec.num_experts_per_token, large.is_exact) == (6, 4, True)
    torch.testing.assert_close(logits(large.state, large.spec), logits(small.state, small.spec), atol=1e-5, rtol=1e-5)
    cheap = up.expand(small.state, small.spec, 2, keep_chosen=True, noise=0.01)
    assert (cheap.spec.num_experts_per_token, cheap.is_exact) == (2, False)
    loose = ModelSpec(**small.spec.model_dump() | {"norm_topk_prob": False})
    wide = up.expand(small.state, loose, 2)
    assert not wide.spec.norm_topk_prob, "weights that do not add up to one stay such"
    torch.testing.assert_close(logits(wide.state, wide.spec), logits(small.state, loose), atol=1e-5, rtol=1e-5)


def test_a_dense_model_gets_a_balancing_loss_with_its_experts() -> None:
    imported = ModelSpec(**DENSE.model_dump() | {"aux_loss_weight": 0.0})
    assert up.upcycle(STATE, imported, 4).spec.aux_loss_weight > 0
    assert not up.upcycle(STATE, imported, 4, 1).is_exact


def test_one_chosen_alone_still_speaks_with_its_whole_voice() -> None:
    made = up.upcycle(STATE, DENSE, 4, 1)
    quiet = {k: v / 4 if "experts" in k and "down_proj" in k else v for k, v in made.state.items()}
    gap, before = ((logits(state, made.spec) - logits(STATE, DENSE)).norm() for state in (made.state, quiet))
    assert float(gap) < 0.5 * float(before), "its weight is about 1/4, its output four times as large"


def test_dropped_experts_differ_and_say_that_they_are_not_exact() -> None:
    copies, dropped = up.upcycle(STATE, DENSE, 4), up.drop_upcycle(STATE, DENSE, 4, ratio=0.5)
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    assert copies.state[name.format(0)].equal(copies.state[name.format(1)])
    kept = (dropped.state[name.format(0)] == STATE[name.format(0)]).all(1)
    assert int(kept.sum()) == 12, "half of the columns are the dense model's"
    assert not dropped.state[name.format(0)].equal(dropped.state[name.format(1)])
    assert not dropped.is_exact


def test_clusters_are_balanced_and_find_what_belongs_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    features = torch.nn.functional.normalize(centres.repeat(6, 1) + 0.05 * torch.randn(18, 8, generator=generator), dim=1)
    groups = up.balanced_clusters(features, 3, generator)
    assert [len(g) for g in groups] == [6, 6, 6]
    assert sorted(torch.cat(groups).tolist()) == list(range(18))
    assert all(len({int(p) % 3 for p in group}) == 1 for group in groups)


def test_the_predictor_ranks_groups_by_what_they_contribute() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=generator)
    gate, upw = STATE["model.layers.0.mlp.experts.0.gate_proj.weight"], STATE["model.layers.0.mlp.experts.0.up_proj.weight"]
    seen = {f"model.layers.{n}.mlp": up.Calibration(x, torch.nn.functional.silu(x @ gate.T) * (x @ upw.T)) for n in range(2)}
    made = up.moefy(STATE, DENSE, 4, 2, seen)
    rows = made.state["model.layers.0.mlp.gate.weight"]
    assert float((x @ rows.T).std()) == pytest.approx(0.01, rel=0.2), "small, so that chosen groups count alike"
    assert made.spec.expert_hidden_size == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: up.upcycle(STATE, DENSE, 1), "two experts or more"),
        (lambda: up.upcycle(STATE, DENSE, 4, 5), "as many chosen"),
        (lambda: up.upcycle(up.upcycle(STATE, DENSE, 4).state, up.upcycle(STATE, DENSE, 4).spec, 8), "has 4 experts already"),
        (lambda: up.virtual_groups(STATE, DENSE, 8, 5), "have to divide"),
        (lambda: up.moefy(STATE, DENSE, 5, 2, cluster="random"), "have to divide"),
        (lambda: up.moefy(STATE, DENSE, 4, 2), "calibration text"),
        (lambda: up.moefy(STATE, DENSE, 4, 2, cluster="magic"), "coact, kmeans or random"),
        (lambda: up.drop_upcycle(STATE, DENSE, 4, ratio=2.0), "above 0 and at most 1"),
        (lambda: up.expand(STATE, DENSE, 1), "factor of 2"),
        (lambda: up.expand(STATE, DENSE, 2, keep_chosen=True), "needs noise"),
        (lambda: up.upcycle(STATE, DENSE, 4, noise=float("nan")), "0 or more"),
        (lambda: up.virtual_groups(STATE, DENSE, 4, 1), "two or more"),
        (lambda: up.upcycle(STATE, DENSE, 5000), "num_experts"),
        (lambda: up.branch_train_mix([STATE, {"x": torch.zeros(1)}], DENSE), "model 2 is of another architecture"),
    ],
)
def test_what_cannot_be_done_is_said(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
