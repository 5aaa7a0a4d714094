"""Merging checkpoints tensor by tensor: averages, task vectors and their sparse forms. Pure: tensors in, a tensor out.

Each method takes the same parameter of M models (and of their common base) and gives the merged one, so a merge never holds more than one parameter of
each model. Where mergekit has a method of the name, results are its results (tested against it). Shapes: M models, N elements.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decentra.errors import ConfigError

Pick = Callable[[str], Tensor]  # a parameter of one model by name
Statistics = Callable[[str], Tensor | None]  # what one model's own text says of a parameter; None: nothing


@dataclass(frozen=True)
class Recipe:
    """What to do. ``weights`` and ``densities`` per model; empty: 1 each, or all alike."""

    method: str = "linear"
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()  # share of each task vector that is kept
    t: float = 0.5  # slerp: 0 is the first model, 1 the second
    scale: float = 1.0  # lambda: what the merged task vector is multiplied with
    gamma: float = 0.01  # breadcrumbs: share of the largest elements that is dropped, too
    alpha: float = 0.9  # regmean: what correlations between inputs count
    is_normalised: bool | None = None  # divide by the weights' sum; None: as the method usually does
    seed: int = 0  # dare: of its random masks
    only: tuple[str, ...] = ()  # patterns of parameter names; the others come from the base, else from the first model
    weight_rules: tuple[tuple[str, tuple[float, ...]], ...] = field(default=())  # (pattern, weights): the last that fits counts

    def weights_of(self, name: str, num_models: int) -> tuple[float, ...]:
        found = self.weights or (1.0,) * num_models
        for pattern, weights in self.weight_rules:
            if fnmatch.fnmatchcase(name, pattern):
                found = weights
        if len(found) != num_models:
            raise ConfigError(f"weights: {num_models} models need as many weights, got {len(found)}")
        return found

    def density_of(self, index: int) -> float:
        density = self.densities[index if len(self.densities) > 1 else 0] if self.densities else 1.0
        if not 0 < density <= 1:
            raise ConfigError(f"density: expected above 0 and at most 1, got {density:g}")
        return density

    def concerns(self, name: str) -> bool:
        return not self.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.only)


def merged(
    shapes: Mapping[str, tuple[int, ...]], models: Sequence[Pick], base: Pick | None, recipe: Recipe, seen: Sequence[Statistics] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the merged model, one after the other, fp32. ``seen``: of each model, for methods in ``STATISTICAL``.

    Raises ConfigError, for what cannot be done at all before the first one.
    """
    check(recipe, len(models), base is not None)
    recipe.weights_of("", len(models))
    if (recipe.method in STATISTICAL) != bool(seen):
        raise ConfigError(f"{recipe.method} {'needs' if not seen else 'has no use for'} text of each model; give it with --text")
    return _merged(shapes, models, base, recipe, seen)


def _merged(
    shapes: Mapping[str, tuple[int, ...]], models: Sequence[Pick], base: Pick | None, recipe: Recipe, seen: Sequence[Statistics]
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        if not recipe.concerns(name):
            yield name, (base or models[0])(name).float()
            continue
        tensors = [pick(name).float() for pick in models]
        origin = None if base is None else base(name).float()
        for index, tensor in enumerate([*tensors, *([] if origin is None else [origin])]):
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"{name}: expected shape {shape} in every model, number {index + 1} has {tuple(tensor.shape)}")
        statistics = [found for found in (one(name) for one in seen) if found is not None]
        yield name, merge_tensors(name, tensors, origin, recipe, statistics)


def merge_tensors(name: str, tensors: Sequence[Tensor], base: Tensor | None, recipe: Recipe, statistics: Sequence[Tensor] = ()) -> Tensor:
    """One parameter. ``name`` seeds random masks and finds its weights; ``statistics``: fisher [N] or regmean [I, I] of each model, or of none
    (then it is averaged). Raises ConfigError."""
    weights = recipe.weights_of(name, len(tensors))
    if recipe.method == "fisher" and statistics:
        return fisher(tensors, statistics, weights)
    if recipe.method == "regmean" and statistics:
        return regmean(tensors, [w * gram for w, gram in zip(weights, statistics, strict=True)], recipe.alpha)
    if recipe.method == "linear" or recipe.method in STATISTICAL:
        return _weighted(tensors, weights, True if recipe.is_normalised is None else recipe.is_normalised)
    if recipe.method == "slerp":
        return slerp(tensors[0], tensors[1], recipe.t)
    if recipe.method == "karcher":
        return karcher(tensors, weights)
    assert base is not None, "check() has refused this"
    if recipe.method == "model_stock":
        return model_stock(tensors, base)
    return base + recipe.scale * _task_vector(name, [t - base for t in tensors], weights, recipe)


def check(recipe: Recipe, num_models: int, has_base: bool) -> None:
    """Raise ConfigError for a recipe that cannot be followed with so many models."""
    if recipe.method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {recipe.method!r}")
    if recipe.method == "slerp" and num_models != 2:
        raise ConfigError(f"slerp lies between two models, got {num_models}")
    if num_models < 1 or (recipe.method == "model_stock" and num_models < 2):
        raise ConfigError(f"{recipe.method} needs {'two models' if num_models else 'a model'} or more, got {num_models}")
    if METHODS[recipe.method] and not has_base:
        raise ConfigError(f"{recipe.method} merges what models learned since a common base; give it with --base")


# method -> whether it needs a base
METHODS: dict[str, bool] = {
    "linear": False, "slerp": False, "karcher": False, "task_arithmetic": True, "ties": True, "dare_linear": True, "dare_ties": True,
    "breadcrumbs": True, "breadcrumbs_ties": True, "model_stock": True, "fisher": False, "regmean": False,
}  # fmt: skip
STATISTICAL = ("fisher", "regmean")  # those that read text


# ---------------------------------------------------------------- between whole weights


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float], is_normalised: bool) -> Tensor:
    total = sum(weights) if is_normalised else 1.0
    if total == 0:
        raise ConfigError("weights add up to zero, and are divided by their sum; give others")
    if all(w == weights[0] for w in weights) and is_normalised and all(t.equal(tensors[0]) for t in tensors[1:]):
        return tensors[0].clone()  # the mean of equals is that, to the bit
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0) / total


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Along the great circle through both directions (Shoemake 1985); nearly parallel ones in a straight line."""
    cosine = float((first * second).sum() / (first.norm() * second.norm()).clamp_min(1e-12))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    a, b = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    return float(a) * first + float(b) * second


def karcher(tensors: Sequence[Tensor], weights: Sequence[float], num_steps: int = 50, tolerance: float = 1e-9) -> Tensor:
    """Mean direction on the sphere (Karcher 1977, by its fixed point), with the weighted mean of the norms; zero tensors have no direction."""
    total = sum(weights)
    parts = [(w / total, t.double() / norm, norm) for w, t in zip(weights, tensors, strict=True) if (norm := float(t.double().norm())) > 0]
    if not parts:
        return torch.zeros_like(tensors[0])
    mean = sum((w * unit for w, unit, _ in parts), torch.zeros_like(parts[0][1]))
    if float(mean.norm()) < 1e-12:
        mean = parts[0][1]
    mean = mean / mean.norm()
    for _ in range(num_steps):
        tangent = torch.zeros_like(mean)
        for w, unit, _ in parts:
            cosine = (mean * unit).sum().clamp(-1.0, 1.0)
            angle = torch.acos(cosine)
            if float(angle) > 1e-12:
                tangent += w * angle / torch.sin(angle).clamp_min(1e-12) * (unit - cosine * mean)
        length = float(tangent.norm())
        if length < tolerance:
            break
        mean = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / length
        mean = mean / mean.norm()
    norm = sum(w * n for w, _, n in parts) / sum(w for w, _, _ in parts)
    scaled: Tensor = norm * mean
    return scaled.to(tensors[0].dtype)


def model_stock(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Between the base and the mean, by how much the models agree (arXiv 2403.19522, eq. 6): t = M cos / (1 + (M - 1) cos)."""
    offsets, num_models = [t - base for t in tensors], len(tensors)
    cosines = [float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)) for i, a in enumerate(offsets) for b in offsets[i + 1 :]]
    cosine = sum(cosines) / len(cosines)
    below = 1 + (num_models - 1) * cosine
    t = num_models * cosine / below if abs(below) > 1e-6 else 0.0  # opposite offsets agree on nothing: the base
    return t * torch.stack(list(tensors)).mean(0) + (1 - t) * base


# ---------------------------------------------------------------- task vectors


def _task_vector(name: str, deltas: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    kind, _, rule = recipe.method.partition("_")
    if kind == "task":
        kind, rule = "all", "linear"
    elif kind == "ties":
        kind, rule = "largest", "ties"
    thin = [_thinned(kind, f"{recipe.seed}:{index}:{name}", d, recipe.density_of(index), recipe.gamma) for index, d in enumerate(deltas)]
    weighted_MN = torch.stack([w * d for w, d in zip(weights, thin, strict=True)])
    if rule != "ties":
        return weighted_MN.sum(0) / (sum(weights) if recipe.is_normalised else 1.0)
    # elect the sign with the larger total, add up those who agree with it (arXiv 2306.01708)
    sign_N = torch.where(weighted_MN.sum(0) >= 0, 1.0, -1.0)
    agrees_MN = weighted_MN.sign() == sign_N
    total_N = (weighted_MN * agrees_MN).sum(0)
    if not (recipe.method == "ties" if recipe.is_normalised is None else recipe.is_normalised):
        return total_N
    share_N = (torch.tensor(weights, dtype=total_N.dtype).view(-1, *[1] * total_N.ndim) * agrees_MN).sum(0)
    return total_N / torch.where(share_N.abs() < 1e-8, 1.0, share_N)


def _thinned(kind: str, key: str, delta: Tensor, density: float, gamma: float) -> Tensor:
    """A share ``density`` of the task vector: its largest elements, a random choice that keeps its expectation, or all but the largest and smallest."""
    if density >= 1.0 and kind != "breadcrumbs":
        return delta
    if kind == "all":
        return delta
    if kind == "dare":  # drop and rescale (arXiv 2311.03099)
        import hashlib

        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
        keep = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < density
        return delta * keep / density
    num_elements, num_kept = delta.numel(), int(density * delta.numel())
    num_top = int(gamma * num_elements) if kind == "breadcrumbs" else 0  # arXiv 2312.06795
    num_low = num_elements - num_kept - num_top
    if num_low < 0:
        num_top, num_low = num_top + num_low, 0
    order = delta.abs().flatten().argsort()
    keep = torch.zeros(num_elements, dtype=torch.bool)
    keep[order[num_low : num_elements - num_top]] = True
    return delta * keep.view(delta.shape)


# ---------------------------------------------------------------- with statistics of the data


def fisher(tensors: Sequence[Tensor], informations: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """sum F_i theta_i / sum F_i with the diagonals of the models' Fisher information (arXiv 2111.09832, eq. 2); where all are zero, the mean."""
    weights = weights or (1.0,) * len(tensors)
    total = sum((w * f for w, f in zip(weights, informations, strict=True)), torch.zeros_like(informations[0]))
    summed = sum((w * f * t for w, f, t in zip(weights, informations, tensors, strict=True)), torch.zeros_like(tensors[0]))
    return torch.where(total > 0, summed / total.clamp_min(1e-30), torch.stack(list(tensors)).mean(0))


def regmean(weights_OI: Sequence[Tensor], grams_II: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """Linear layers W [O, I] whose outputs are nearest to each model's own on its own inputs (arXiv 2212.09849, eq. 2).

    ``grams_II``: X^T X of each model's inputs; ``alpha`` shrinks their off-diagonal elements. Where no model has seen an input (an expert without
    tokens), the mean: it is the distance from the mean that is solved for, with the least norm.
    """
    mean_OI = torch.stack([w.double() for w in weights_OI]).mean(0)
    shrunk = [alpha * g.double() + (1 - alpha) * torch.diag(g.double().diagonal()) for g in grams_II]
    total = sum(shrunk, torch.zeros_like(shrunk[0]))
    right = sum((g @ (w.double() - mean_OI).T for g, w in zip(shrunk, weights_OI, strict=True)), torch.zeros_like(mean_OI.T))
    solved: Tensor = (
        torch.linalg.lstsq(total, right, driver="gelsd").solution if total.device.type == "cpu" else torch.linalg.solve(total, right)
    )
    return (mean_OI + solved.T).to(weights_OI[0].dtype)


# ---------------------------------------------------------------- recipes in mergekit's YAML


def recipe_from(raw: Any) -> tuple[Recipe, list[str], str | None]:
    """(recipe, model paths, base path) of a parsed mergekit configuration with ``models``. Raises ConfigError for what it has beyond that."""
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), list):
        raise ConfigError("expected a mergekit configuration with merge_method and models")
    known = {"merge_method", "models", "base_model", "parameters", "dtype"}
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"{unknown[0]}: decentra reads {', '.join(sorted(known))} of a mergekit configuration")
    base, common = raw.get("base_model"), raw.get("parameters") or {}
    if not (base is None or isinstance(base, str)) or not isinstance(common, dict):
        raise ConfigError("expected base_model to be a path and parameters to be a table")
    models = [
        m for m in raw["models"] if isinstance(m, dict) and isinstance(m.get("model"), str) and isinstance(m.get("parameters") or {}, dict)
    ]
    if len(models) != len(raw["models"]):
        raise ConfigError("models: expected entries with 'model: PATH' and perhaps a table of parameters")
    method = str(raw.get("merge_method", "linear"))
    learned = [m for m in models if m["model"] != base or not METHODS.get(method, True)]  # of task vectors the base has none
    weights = tuple(_number(m, common, "weight", 1.0) for m in learned)
    densities = tuple(_number(m, common, "density", 1.0) for m in learned)
    normalise = common.get("normalize")
    t, scale, gamma = (_number({}, common, key, usual) for key, usual in (("t", 0.5), ("lambda", 1.0), ("gamma", 0.01)))
    recipe = Recipe(method, weights, densities, t=t, scale=scale, gamma=gamma, is_normalised=None if normalise is None else bool(normalise))
    check(recipe, len(learned), base is not None)
    return recipe, [m["model"] for m in learned], base


def _number(model: dict[str, Any], common: dict[str, Any], key: str, usual: float) -> float:
    value = (model.get("parameters") or {}).get(key, common.get(key, usual))
    if not isinstance(value, int | float):
        raise ConfigError(f"{key}: expected a number (gradients over layers are not read), got {str(value)[:60]!r}")
    return float(value)
