"""Merging: endpoints, identities, expectations, closed forms; and where another implementation is installed, its very numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decentra.errors import ConfigError
from decentra.modular.combine import METHODS, Recipe, fisher, karcher, merge_tensors, merged, recipe_from, regmean, slerp


def tensors(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


BASED = [m for m, needs_base in METHODS.items() if needs_base]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "slerp"])
def test_equal_models_merge_into_themselves(method: str) -> None:
    (one, base) = tensors(2, 5, 7)
    found = merge_tensors("w", [one, one.clone(), one.clone()], base, Recipe(method, is_normalised=True))
    torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


def test_the_mean_of_equals_is_equal_to_the_bit() -> None:
    (one,) = tensors(1, 3, 3)
    assert merge_tensors("w", [one, one.clone()], None, Recipe("linear")).equal(one)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_where_it_should(t: float) -> None:
    a, b = tensors(2, 6, 4)
    torch.testing.assert_close(slerp(a, b, t), b if t else a)
    torch.testing.assert_close(slerp(a, a + 1e-6, 0.5), a, atol=1e-5, rtol=1e-5)


def test_karcher_of_two_lies_in_the_middle_and_of_one_is_it() -> None:
    a, b = tensors(2, 6, 4)
    torch.testing.assert_close(karcher([a], [1.0]), a, atol=1e-5, rtol=1e-5)
    middle = karcher([a, b], [1.0, 1.0])
    left, right = (torch.nn.functional.cosine_similarity(middle.flatten(), x.flatten(), 0) for x in (a, b))
    assert float(left) == pytest.approx(float(right), abs=1e-5)
    assert float(middle.norm()) == pytest.approx(float((a.norm() + b.norm()) / 2), rel=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_one_model_whole_is_that_model(method: str) -> None:
    one, base = tensors(2, 6, 4)
    torch.testing.assert_close(merge_tensors("w", [one], base, Recipe(method)), one, atol=1e-6, rtol=1e-6)


def test_ties_elects_the_heavier_sign() -> None:
    base = torch.zeros(3)
    found = merge_tensors("w", [torch.tensor([1.0, 2.0, -1.0]), torch.tensor([3.0, -1.0, -3.0])], base, Recipe("ties"))
    assert found.tolist() == [2.0, 2.0, -2.0], "who disagrees has no say"


def test_dare_keeps_the_expectation_and_drops_what_it_says() -> None:
    (delta,) = tensors(1, 40, 50)
    base = torch.zeros_like(delta)
    drawn = torch.stack([merge_tensors("w", [delta], base, Recipe("dare_linear", densities=(0.25,), seed=s)) for s in range(200)])
    assert float((drawn == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    spread = delta.abs() * (3.0 / 200) ** 0.5  # of a mean of 200 with p = 1/4: variance (1 - p) / p
    assert float(((drawn.mean(0) - delta).abs() <= 3 * spread + 1e-6).float().mean()) > 0.99
    again = merge_tensors("w", [delta], base, Recipe("dare_linear", densities=(0.25,), seed=7))
    assert again.equal(drawn[7]), "a seed is a seed"


@given(st.integers(2, 4), st.integers(1, 6))
def test_regmean_is_pooled_least_squares(num_models: int, seed: int) -> None:
    """Models that are least squares on their own data merge into least squares on all of it."""
    generator = torch.Generator().manual_seed(seed)
    data = [
        (torch.randn(30, 6, generator=generator, dtype=torch.float64), torch.randn(30, 3, generator=generator, dtype=torch.float64))
        for _ in range(num_models)
    ]
    weights = [torch.linalg.lstsq(x, y).solution.T for x, y in data]
    found = regmean(weights, [x.T @ x for x, _ in data])
    pooled = torch.linalg.lstsq(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])).solution.T
    torch.testing.assert_close(found, pooled, atol=1e-4, rtol=1e-4)


def test_regmean_leaves_what_nobody_has_seen_at_the_mean() -> None:
    a, b = tensors(2, 3, 4)
    seen = torch.zeros(4, 4)
    torch.testing.assert_close(regmean([a, b], [seen, seen]), (a + b) / 2)
    seen = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))  # the first model alone has seen the first two inputs
    torch.testing.assert_close(regmean([a, b], [seen, torch.zeros(4, 4)]), torch.cat([a[:, :2], (a + b)[:, 2:] / 2], 1))


def test_methods_that_read_text_say_so() -> None:
    a, b = tensors(2, 3, 4)
    shapes, picks = {"w": (3, 4)}, [lambda _: a, lambda _: b]
    with pytest.raises(ConfigError, match="--text"):
        merged(shapes, picks, None, Recipe("fisher"))
    with pytest.raises(ConfigError, match="no use"):
        merged(shapes, picks, None, Recipe("linear"), [{}.get] * 2)
    found = dict(merged(shapes, picks, None, Recipe("fisher"), [{"w": torch.ones(3, 4)}.get, {"w": torch.zeros(3, 4)}.get]))
    torch.testing.assert_close(found["w"], a)
    assert dict(merged(shapes, picks, None, Recipe("regmean"), [{}.get] * 2))["w"].equal((a + b) / 2), (
        "neither a matrix nor measured: the mean"
    )


def test_fisher_listens_to_who_knows() -> None:
    a, b = tensors(2, 4, 4)
    only_a = fisher([a, b], [torch.ones(4, 4), torch.zeros(4, 4)])
    torch.testing.assert_close(only_a, a)
    torch.testing.assert_close(fisher([a, b], [torch.zeros(4, 4)] * 2), (a + b) / 2)
    torch.testing.assert_close(fisher([a, b], [torch.full((4, 4), 3.0), torch.ones(4, 4)]), 0.75 * a + 0.25 * b)


def test_only_what_is_named_is_merged_and_shapes_are_checked() -> None:
    a, b = ({"x.experts.3.w": t, "other": o} for t, o in zip(tensors(2, 2, 3), tensors(2, 2, 3, seed=9), strict=True))
    shapes = {k: tuple(v.shape) for k, v in a.items()}
    found = dict(merged(shapes, [a.__getitem__, b.__getitem__], None, Recipe("linear", only=("*.experts.3.*",))))
    assert found["other"].equal(a["other"])
    torch.testing.assert_close(found["x.experts.3.w"], (a["x.experts.3.w"] + b["x.experts.3.w"]) / 2)
    with pytest.raises(ConfigError, match=r"number 2 has \(4,\)"):
        dict(merged(shapes, [a.__getitem__, lambda _: torch.zeros(4)], None, Recipe("linear")))


@pytest.mark.parametrize(
    ("recipe", "count", "base", "words"),
    [
        (Recipe("nonsense"), 2, True, "expected one of linear"),
        (Recipe("ties"), 2, False, "--base"),
        (Recipe("slerp"), 3, False, "between two"),
        (Recipe("linear", weights=(1.0,)), 2, False, "as many weights"),
        (Recipe("linear", weights=(1.0, -1.0)), 2, False, "add up to zero"),
        (Recipe("ties", densities=(0.0,)), 2, True, "above 0"),
    ],
)
def test_recipes_that_cannot_be_followed(recipe: Recipe, count: int, base: bool, words: str) -> None:
    ones = tensors(count, 2, 2)
    with pytest.raises(ConfigError, match=words):
        dict(merged({"w": (2, 2)}, [lambda _, t=t: t for t in ones], (lambda _: ones[0] * 0.5) if base else None, recipe))


def test_a_mergekit_configuration() -> None:
    raw = {
        "merge_method": "ties", "base_model": "base", "parameters": {"normalize": True, "density": 0.3},
        "models": [{"model": "base"}, {"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 2, "density": 0.9}}],
    }  # fmt: skip
    slerp_raw = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.2}}
    assert recipe_from(slerp_raw)[1] == ["a", "b"], "there the base is one of the two"
    recipe, models, base = recipe_from(raw)
    assert (models, base) == (["a", "b"], "base")
    assert recipe == Recipe("ties", (0.5, 2.0), (0.3, 0.9), is_normalised=True)
    for bad, words in (
        ({**raw, "slices": []}, "slices"), ({"models": "x"}, "merge_method and models"), ({**raw, "models": [{"model": 3}]}, "model: PATH"),
        ({**raw, "models": [{"model": "a", "parameters": {"weight": [0, 1]}}]}, "gradients"),
        ({**raw, "base_model": 3}, "to be a path"), ({**raw, "parameters": "x"}, "to be a table"), ({**raw, "parameters": {"lambda": [1]}}, "gradients"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            recipe_from(bad)


ORACLE: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "linear": (Recipe("linear", weights=(0.3, 1.2, 0.5)), {"weight": [0.3, 1.2, 0.5]}),
    "task_arithmetic": (Recipe("task_arithmetic", weights=(0.3, 1.2, 0.5)), {"weight": [0.3, 1.2, 0.5]}),
    "ties": (Recipe("ties", weights=(0.3, 1.2, 0.5), densities=(0.5,), is_normalised=True), {"weight": [0.3, 1.2, 0.5], "density": 0.5, "normalize": True}),
    "breadcrumbs": (Recipe("breadcrumbs", densities=(0.5,), gamma=0.1), {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
    "breadcrumbs_ties": (Recipe("breadcrumbs_ties", densities=(0.5,), gamma=0.1), {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
    "model_stock": (Recipe("model_stock"), {}),
    "slerp": (Recipe("slerp", t=0.3), {"t": 0.3}),
    "karcher": (Recipe("karcher"), {"max_iter": 200, "tol": 1e-12}),
}  # fmt: skip


@pytest.mark.parametrize("method", list(ORACLE))
def test_the_same_as_mergekit(method: str) -> None:
    oracle = pytest.importorskip("mergekit.merge_methods", reason="the oracles extra is not installed")
    recipe, parameters = ORACLE[method]
    models = tensors(2 if method == "slerp" else 3, 16, 24)
    (base,) = tensors(1, 16, 24, seed=5)
    models = [base + 0.3 * m for m in models]
    ours = merge_tensors("w", models, base, recipe)
    if METHODS[method]:
        theirs = oracle.merge_tensors([base, *models], method, parameters=parameters, base_index=0)
    else:
        theirs = oracle.merge_tensors(
            [m.double() for m in models], method, parameters=parameters, **({"base_index": 0} if method == "slerp" else {})
        )
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-6, rtol=1e-5)


def test_the_same_as_peft() -> None:
    oracle = pytest.importorskip("peft.utils.merge_utils", reason="the oracles extra is not installed")
    deltas, base = tensors(3, 12, 10), torch.zeros(12, 10)
    ours = merge_tensors("w", deltas, base, Recipe("ties", densities=(0.5,)))
    theirs = oracle.ties(deltas, torch.ones(3), density=0.5, majority_sign_method="total")  # it elects signs without weights
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    plain = merge_tensors("w", deltas, base, Recipe("task_arithmetic", weights=(0.4, 1.1, 0.7)))
    torch.testing.assert_close(plain, oracle.task_arithmetic(deltas, torch.tensor([0.4, 1.1, 0.7])), atol=1e-6, rtol=1e-5)
