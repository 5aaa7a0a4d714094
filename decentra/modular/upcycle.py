"""A mixture of experts out of dense models, and more experts out of fewer. Pure: state dicts in, a state dict and its spec out.

A dense model is one with a single expert per layer (``num_experts = 1``): its router has no choice. Shapes: E experts, D hidden, I expert hidden, G groups,
N calibration tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.modular.parts import EXPERT, ROUTER, State, spec_with

ROW_STD = 0.02
PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
RIDGE = 1e-2


@dataclass(frozen=True)
class Upcycled:
    """What came out: weights, their spec, and whether it computes what the dense model did."""

    state: State
    spec: ModelSpec
    is_exact: bool


def upcycle(
    state: Mapping[str, Tensor], spec: ModelSpec, num_experts: int, num_chosen: int = 2, *, noise: float = 0.0, seed: int = 0
) -> Upcycled:
    """Every expert a copy of the FFN, a random router (arXiv 2212.05055). Exact without noise: chosen weights add up to one.

    ``noise``: standard deviation of what is added to each expert, in units of the tensor's own.
    """
    _check_dense(spec, num_experts, num_chosen)
    if not 0 <= noise < float("inf"):
        raise ConfigError(f"noise: expected a number of 0 or more, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    out = _frame(state, spec, num_experts, generator)
    for name, value in _ffn(state):
        for expert in range(num_experts):
            copy = value.clone()
            if noise:
                copy += noise * value.std() * torch.randn(value.shape, generator=generator)
            out[_named(name, expert)] = _alone(name, copy, num_experts, num_chosen)
    return Upcycled(out, _moe(spec, num_experts, num_chosen), is_exact=noise == 0.0 and num_chosen > 1)


def drop_upcycle(
    state: Mapping[str, Tensor], spec: ModelSpec, num_experts: int, num_chosen: int = 2, *, ratio: float = 0.5, seed: int = 0
) -> Upcycled:
    """Copies in which a share ``ratio`` of the intermediate columns is drawn anew, other ones in each expert (arXiv 2502.19261). Not exact, but they differ."""
    _check_dense(spec, num_experts, num_chosen)
    if not 0 < ratio <= 1:
        raise ConfigError(f"drop: expected a share above 0 and at most 1, got {ratio:g}")
    generator = torch.Generator().manual_seed(seed)
    out = _frame(state, spec, num_experts, generator)
    ffn = _by_layer(state)
    for layer, weights in ffn.items():
        width = weights["gate_proj.weight"].shape[0]
        for expert in range(num_experts):
            fresh = torch.randperm(width, generator=generator)[: int(ratio * width)]
            for rest, value in weights.items():
                copy = value.clone()
                across = copy.T if rest == "down_proj.weight" else copy  # rows are intermediate columns
                across[fresh] = value.mean() + value.std() * torch.randn(len(fresh), across.shape[1], generator=generator)
                out[f"{layer}.experts.{expert}.{rest}"] = _alone(rest, copy, num_experts, num_chosen)
    return Upcycled(out, _moe(spec, num_experts, num_chosen), is_exact=False)


def virtual_groups(state: Mapping[str, Tensor], spec: ModelSpec, num_experts: int, num_groups: int, *, seed: int = 0) -> Upcycled:
    """Fine-grained upcycling (arXiv 2410.07524): the FFN in G shards, each E / G times; the G experts of a copy share one router row.

    Equal rows are chosen together, so a token goes to the G shards of one copy, each with weight 1 / G; ``down_proj`` times G makes it exact.
    """
    if num_groups < 2 or num_experts % num_groups or spec.expert_hidden_size % num_groups:
        raise ConfigError(
            f"virtual groups: two or more, and {num_groups} have to divide {num_experts} experts and the FFN's {spec.expert_hidden_size} columns"
        )
    _check_dense(spec, num_experts, num_groups)
    generator = torch.Generator().manual_seed(seed)
    out = _frame(state, spec, num_experts, generator)
    for name in [n for n in out if ROUTER.match(n)]:
        copies = out[name][: num_experts // num_groups]
        out[name] = copies.repeat_interleave(num_groups, 0)
    width = spec.expert_hidden_size // num_groups
    for name, value in _ffn(state):
        for expert in range(num_experts):
            shard = expert % num_groups
            columns = slice(shard * width, (shard + 1) * width)
            out[_named(name, expert)] = value[:, columns] * num_groups if name.endswith("down_proj.weight") else value[columns].clone()
    return Upcycled(out, _moe(spec, num_experts, num_groups, width), is_exact=True)


def branch_train_mix(states: Sequence[Mapping[str, Tensor]], spec: ModelSpec, num_chosen: int = 2, *, seed: int = 0) -> Upcycled:
    """Dense models that were trained apart: their FFNs become experts, everything else their mean, and the router is new (arXiv 2403.07816)."""
    _check_dense(spec, len(states), num_chosen)
    generator = torch.Generator().manual_seed(seed)
    names = set(states[0])
    for number, other in enumerate(states[1:], 2):
        if set(other) != names or any(other[n].shape != states[0][n].shape for n in names):
            raise ConfigError(f"model {number} is of another architecture than the first")
    mean = {n: torch.stack([s[n].float() for s in states]).mean(0).to(states[0][n].dtype) for n in names}
    out = _frame(mean, spec, len(states), generator)
    for name, _ in _ffn(states[0]):
        for expert, state in enumerate(states):
            out[_named(name, expert)] = _alone(name, state[name].clone(), len(states), num_chosen)
    return Upcycled(out, _moe(spec, len(states), num_chosen), is_exact=False)


# ---------------------------------------------------------------- splitting one FFN


@dataclass(frozen=True)
class Calibration:
    """What one layer's FFN saw and did on some text: inputs [N, D] and activations silu(gate) * up [N, I]."""

    x_ND: Tensor
    h_NI: Tensor


def moefy(
    state: Mapping[str, Tensor], spec: ModelSpec, num_experts: int, num_chosen: int, calibration: Mapping[str, Calibration] | None = None, *,
    cluster: str = "coact", shared: int | None = None, seed: int = 0,
) -> Upcycled:  # fmt: skip
    """The FFN's neurons in E groups of equal size, of which each token uses k (arXiv 2110.01786). Exact with k = E.

    ``cluster``: coact (neurons that fire together, needs calibration), kmeans (similar input weights) or random. ``shared``: so many experts get the
    neurons that contribute most on any text, and are chosen for nearly every token (as in CMoE, arXiv 2502.04416); None: half of the chosen with
    coact. Router rows predict by ridge regression how much a group contributes; they are small, so that chosen groups count nearly alike, and
    ``down_proj`` times k undoes the weights' sum of one.
    """
    _check_dense(spec, num_experts, num_chosen)
    if spec.expert_hidden_size % num_experts:
        raise ConfigError(f"moefy: {num_experts} experts have to divide the FFN's {spec.expert_hidden_size} neurons")
    if cluster not in ("coact", "kmeans", "random"):
        raise ConfigError(f"cluster: expected coact, kmeans or random, got {cluster!r}")
    if cluster == "coact" and not calibration:
        raise ConfigError("cluster coact looks at activations; give calibration text")
    num_shared = (num_chosen // 2 if cluster == "coact" else 0) if shared is None else shared
    if not 0 <= num_shared < num_chosen or (num_shared and not calibration):
        raise ConfigError(f"shared: expected fewer than the {num_chosen} experts that are chosen, and calibration text, got {num_shared}")
    generator = torch.Generator().manual_seed(seed)
    out = _frame(state, spec, num_experts, generator)
    ffn = _by_layer(state)
    width = spec.expert_hidden_size // num_experts
    scale = num_chosen if num_chosen > 1 else num_experts  # of one alone the weight is its probability, which is about 1 / E
    for layer, weights in ffn.items():
        seen = None if calibration is None else calibration.get(layer)
        groups = _groups(cluster, weights, seen, num_experts, width, num_shared, generator)
        for expert, columns in enumerate(groups):
            for rest in PARTS:
                value = weights[rest]
                out[f"{layer}.experts.{expert}.{rest}"] = (
                    value[:, columns] * scale if rest == "down_proj.weight" else value[columns].clone()
                )
        out[f"{layer}.gate.weight"] = _predictor(groups, weights, seen, num_chosen < num_experts, generator)
    return Upcycled(out, _moe(spec, num_experts, num_chosen, width), is_exact=num_chosen == num_experts)


def _groups(
    cluster: str, weights: Mapping[str, Tensor], seen: Calibration | None, num_groups: int, width: int, num_shared: int, generator: torch.Generator
) -> list[Tensor]:  # fmt: skip
    """Which neurons form which expert: the shared ones first, the strongest first."""
    left, hot = torch.arange(num_groups * width), []
    if num_shared:
        assert seen is not None
        order = _strength(weights, seen).mean(0).argsort(descending=True)
        hot, left = list(order[: num_shared * width].view(num_shared, width)), order[num_shared * width :].sort().values
    if cluster == "random":
        return [*hot, *left[torch.randperm(len(left), generator=generator)].view(-1, width)]
    if cluster == "kmeans" or seen is None:
        features = weights["gate_proj.weight"].float()[left]
    else:
        strength = _strength(weights, seen)[:, left]
        features = (strength - strength.mean(0)).T
    groups = balanced_clusters(torch.nn.functional.normalize(features, dim=1), num_groups - num_shared, generator)
    return [*hot, *(left[group] for group in groups)]


def _strength(weights: Mapping[str, Tensor], seen: Calibration) -> Tensor:
    """[N, I]: how much each neuron adds to the layer's output for each token."""
    strength_NI: Tensor = seen.h_NI.float().abs() * weights["down_proj.weight"].float().norm(dim=0)
    return strength_NI


def balanced_clusters(features: Tensor, num_groups: int, generator: torch.Generator, num_rounds: int = 20) -> list[Tensor]:
    """k-means into groups of equal size: in each round points choose in the order of how much the choice matters to them."""
    size = len(features)
    width = size // num_groups
    centres = features[torch.randperm(size, generator=generator)[:num_groups]]
    owner = torch.zeros(size, dtype=torch.int64)
    for _ in range(num_rounds):
        likeness = features @ centres.T
        best = likeness.topk(min(2, num_groups), dim=1).values
        order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True)
        free, new = [width] * num_groups, owner.clone()
        ranked = likeness.argsort(dim=1, descending=True, stable=True).tolist()
        for point in order.tolist():
            group = next(g for g in ranked[point] if free[g])
            new[point], free[group] = group, free[group] - 1
        if bool((new == owner).all()):
            break
        owner = new
        centres = torch.stack([torch.nn.functional.normalize(features[owner == g].mean(0), dim=0) for g in range(num_groups)])
    return [torch.nonzero(owner == g).flatten() for g in range(num_groups)]


def _predictor(
    groups: Sequence[Tensor], weights: Mapping[str, Tensor], seen: Calibration | None, has_choice: bool, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Router rows [E, D]: how much each group contributes, as a linear function of the input. Without a choice zeros; without calibration random ones."""
    num_inputs = weights["down_proj.weight"].shape[0]
    if not has_choice:
        return torch.zeros(len(groups), num_inputs)
    if seen is None:
        random_EI: Tensor = 1e-2 / num_inputs**0.5 * torch.randn(len(groups), num_inputs, generator=generator)
        return random_EI
    strength_NI = _strength(weights, seen)
    target_NE = torch.stack([strength_NI[:, g].sum(1) for g in groups], 1)
    target_NE = target_NE - target_NE.mean(1, keepdim=True)
    x_ND = seen.x_ND.float()
    gram = x_ND.T @ x_ND
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0])
    rows_DE = torch.linalg.solve(gram + ridge, x_ND.T @ target_NE)
    spread = (x_ND @ rows_DE).std().clamp_min(1e-12)
    scaled_DE: Tensor = rows_DE / spread * 1e-2
    return scaled_DE.T.contiguous()  # logits of 0.01: the choice is theirs, the weights are nearly equal


# ---------------------------------------------------------------- more experts


def expand(
    state: Mapping[str, Tensor], spec: ModelSpec, factor: int, *, keep_chosen: bool = False, noise: float = 0.0, seed: int = 0
) -> Upcycled:
    """Each expert ``factor`` times, rows too (arXiv 2604.19835). Exact when ``factor`` times as many are chosen: copies share their expert's probability.

    With ``keep_chosen`` a token costs no more; it needs noise, or both places would always go to copies of one expert.
    """
    if factor < 2 or not 0 <= noise < float("inf"):
        raise ConfigError(f"expand: expected a factor of 2 or more and noise of 0 or more, got {factor} and {noise}")
    if keep_chosen and noise == 0.0:
        raise ConfigError("expand with as many active experts as before needs noise: equal copies would always be chosen together")
    numbers, generator = range(spec.num_experts), torch.Generator().manual_seed(seed)
    out: State = {}
    for name, value in state.items():
        if found := EXPERT.match(name):
            for copy in range(factor):
                new = value.clone()
                if noise and copy:
                    new += noise * value.std() * torch.randn(value.shape, generator=generator)
                out[f"{found['layer']}.experts.{int(found['expert']) + copy * len(numbers)}.{found['rest']}"] = new
        elif ROUTER.match(name):
            rows = value.repeat(factor, 1)
            if noise:
                added = rows[len(numbers) :]
                added += noise * (value.std() + 1e-12) * torch.randn(added.shape, generator=generator)
            out[name] = rows
        else:
            out[name] = value
    chosen = spec.num_experts_per_token * (1 if keep_chosen else factor)
    return Upcycled(out, spec_with(spec, factor * len(numbers), chosen), is_exact=not noise)


# ---------------------------------------------------------------- names


def _check_dense(spec: ModelSpec, num_experts: int, num_chosen: int) -> None:
    if spec.num_experts != 1:
        raise ConfigError(
            f"this model has {spec.num_experts} experts already; upcycling starts from a dense one, 'decentra expand' from this"
        )
    if num_experts < 2 or not 1 <= num_chosen <= num_experts:
        raise ConfigError(f"expected two experts or more and 1 to as many chosen, got {num_experts} and {num_chosen}")


def _moe(spec: ModelSpec, num_experts: int, num_chosen: int, width: int | None = None) -> ModelSpec:
    return spec_with(spec, num_experts, num_chosen, expert_hidden_size=width or spec.expert_hidden_size)


def _alone(rest: str, value: Tensor, num_experts: int, num_chosen: int) -> Tensor:
    """Of one chosen alone the weight is its probability, about 1 / E while the router knows nothing: ``down_proj`` times E makes up for it."""
    return value * num_experts if num_chosen == 1 and rest.endswith("down_proj.weight") else value


def _frame(state: Mapping[str, Tensor], spec: ModelSpec, num_experts: int, generator: torch.Generator) -> State:
    """Everything but the FFNs, with random router rows."""
    out: State = {}
    for name, value in state.items():
        if EXPERT.match(name):
            continue
        out[name] = torch.randn(num_experts, spec.hidden_size, generator=generator) * ROW_STD if ROUTER.match(name) else value.clone()
    return out


def _ffn(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in state.items() if EXPERT.match(name)]


def _by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The FFN's matrices of every layer, by what follows the expert's number."""
    ffn: dict[str, dict[str, Tensor]] = {}
    for name, value in _ffn(state):
        layer, rest = _at(name)
        ffn.setdefault(layer, {})[rest] = value
    return ffn


def _at(name: str) -> tuple[str, str]:
    found = EXPERT.match(name)
    assert found is not None
    return found["layer"], found["rest"]


def _named(name: str, expert: int) -> str:
    layer, rest = _at(name)
    return f"{layer}.experts.{expert}.{rest}"
