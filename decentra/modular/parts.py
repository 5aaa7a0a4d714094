"""Experts as parts of a checkpoint: take one out, put one in, keep some, and number what is left without holes. Pure.

A router row belongs to its expert: in this file alone are the two moved together. State dicts have Qwen3-MoE checkpoint names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decentra.config import ModelSpec, parse_config
from decentra.errors import ConfigError

State = dict[str, Tensor]

EXPERT = re.compile(r"^(?P<layer>(?:.*\.)?layers\.\d+\.mlp)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
ROUTER = re.compile(r"^(?P<layer>(?:.*\.)?layers\.\d+\.mlp)\.gate\.weight$")


@dataclass(frozen=True)
class Part:
    """One expert without its number: FFN weights by ``LAYER.REST`` and its router row of every layer."""

    weights: dict[str, Tensor]
    rows: dict[str, Tensor]  # LAYER -> [D]


def experts_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The numbers of the experts in a state dict. Raises ConfigError when layers differ or router rows do not fit."""
    by_layer: dict[str, set[int]] = {}
    for name in state:
        if found := EXPERT.match(name):
            by_layer.setdefault(found["layer"], set()).add(int(found["expert"]))
    if not by_layer:
        raise ConfigError("there is no expert in this checkpoint: expected names such as model.layers.0.mlp.experts.0.gate_proj.weight")
    numbers = next(iter(by_layer.values()))
    for layer, mine in by_layer.items():
        if mine != numbers:
            raise ConfigError(f"{layer} has experts {sorted(mine)}, another layer {sorted(numbers)}; every layer needs the same ones")
        gate = state.get(f"{layer}.gate.weight")
        if gate is None or gate.shape[0] <= max(mine):
            raise ConfigError(f"{layer}.gate.weight has {0 if gate is None else gate.shape[0]} rows, for experts up to {max(mine)}")
    return tuple(sorted(numbers))


def select(state: Mapping[str, Tensor], experts: Sequence[int]) -> State:
    """The same model with these experts only, in this order, numbered from 0; rows move with them. Equal tensors are shared, not copied."""
    known = experts_of(state)
    if missing := [e for e in experts if e not in known]:
        raise ConfigError(f"expert {missing[0]} is not there: this model has experts {', '.join(map(str, known))}")
    if not experts or len(set(experts)) != len(experts):
        raise ConfigError(f"expected one or more different experts, got {list(experts)}")
    place = {old: new for new, old in enumerate(experts)}
    chosen: State = {}
    for name, value in state.items():
        if found := EXPERT.match(name):
            if (old := int(found["expert"])) in place:
                chosen[f"{found['layer']}.experts.{place[old]}.{found['rest']}"] = value
        elif ROUTER.match(name):
            chosen[name] = value[list(experts)].clone()
        else:
            chosen[name] = value
    return chosen


def check_numbering(state: Mapping[str, Tensor], num_experts: int) -> None:
    """Raise ConfigError for holes: a loader would compact experts 0, 2, 3 silently, and give 2's router row to another."""
    numbers = experts_of(state)
    if numbers != tuple(range(num_experts)):
        missing = sorted(set(range(num_experts)) - set(numbers))
        raise ConfigError(
            f"experts {list(numbers)} in a model of {num_experts}"
            + (f": number {missing[0]} is missing" if missing else ": there are more than it says")
            + "; a half download, or one that was cut by hand?"
        )
    for name, value in state.items():
        if ROUTER.match(name) and value.shape[0] != num_experts:
            raise ConfigError(f"{name} has {value.shape[0]} rows, the model {num_experts} experts")


def extract(state: Mapping[str, Tensor], expert: int) -> Part:
    """One expert, to be carried elsewhere."""
    if expert not in experts_of(state):
        raise ConfigError(f"expert {expert} is not there: this model has experts {', '.join(map(str, experts_of(state)))}")
    weights, rows = {}, {}
    for name, value in state.items():
        if (found := EXPERT.match(name)) and int(found["expert"]) == expert:
            weights[f"{found['layer']}.{found['rest']}"] = value.clone()
        elif found := ROUTER.match(name):
            rows[found["layer"]] = value[expert].clone()
    return Part(weights, rows)


def insert(state: Mapping[str, Tensor], part: Part) -> State:
    """The model with one expert more, the last number. Raises ConfigError when the part is of another architecture."""
    number = len(experts_of(state))
    check_numbering(state, number)
    grown: State = {}
    layers = {found["layer"] for name in state if (found := ROUTER.match(name))}
    if layers != set(part.rows):
        raise ConfigError(f"the expert has {len(part.rows)} layers, the model {len(layers)}; they are of different architectures")
    for name, value in state.items():
        if found := ROUTER.match(name):
            row = part.rows[found["layer"]]
            if row.shape != value.shape[1:]:
                raise ConfigError(f"{name}: rows have {value.shape[1]} elements, the expert's {row.numel()}; hidden sizes differ")
            grown[name] = torch.cat([value, row.to(value.dtype)[None]])
        else:
            grown[name] = value
    for key, value in part.weights.items():
        layer, rest = _split(key)
        like = state.get(f"{layer}.experts.0.{rest}")
        if like is None or like.shape != value.shape:
            shown = "none" if like is None else str(tuple(like.shape))
            raise ConfigError(f"{key}: the model's experts have shape {shown}, this one {tuple(value.shape)}; widths differ")
        grown[f"{layer}.experts.{number}.{rest}"] = value
    return grown


def _split(key: str) -> tuple[str, str]:
    layer, _, rest = key.partition(".mlp.")
    return f"{layer}.mlp", rest


def spec_with(spec: ModelSpec, num_experts: int, num_chosen: int | None = None, **changes: Any) -> ModelSpec:
    """The spec of a model with so many experts; fewer than are chosen per token lowers that number. Raises ConfigError.

    A model that was dense gets the usual weight of the balancing loss: it had no use for one.
    """
    chosen = min(num_chosen or spec.num_experts_per_token, num_experts)
    raw = spec.model_dump() | {"num_experts": num_experts, "num_experts_per_token": chosen} | changes
    if chosen == 1 and num_experts > 1:
        raw["norm_topk_prob"] = False  # a weight of 1 has no gradient
    if spec.num_experts == 1 and num_experts > 1:
        raw["norm_topk_prob"] = chosen > 1
        raw["aux_loss_weight"] = spec.aux_loss_weight or ModelSpec.model_fields["aux_loss_weight"].default
    return parse_config(ModelSpec, raw, "model")
