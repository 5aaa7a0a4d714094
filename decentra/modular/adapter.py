"""A LoRA adapter as an expert: the public model's FFN plus the adapter's low-rank change (arXiv 2106.09685). Pure: tensors by PEFT's names in, a part out.

Shapes: r rank, I and O inputs and outputs of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from decentra.errors import ConfigError
from decentra.modular.parts import Part, extract

_NAME = re.compile(r"^base_model\.model\.(model\.layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)\.lora_(A|B)\.weight$")


def scale_of(config: Mapping[str, Any]) -> float:
    """What the product of an adapter's matrices is multiplied with, by its ``adapter_config.json``. Raises ConfigError for other kinds of adapters."""
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"adapter_config.json: peft_type {config.get('peft_type')!r}; decentra reads LORA")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "lora_bias"):
        if config.get(key):
            raise ConfigError(f"adapter_config.json: {key} = {str(config[key])[:60]!r} is not read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ConfigError(f"adapter_config.json: expected r and lora_alpha to be numbers, got {rank!r} and {alpha!r}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def expert_from(state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> Part:
    """The model's only expert with the adapter's change in it. Raises ConfigError for tensors that are not of its FFNs: an expert has nothing else."""
    part = extract(state, 0)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.items():
        found = _NAME.match(name)
        if found is None:
            raise ConfigError(
                f"the adapter changes {name[:90]}; an expert has gate_proj, up_proj and down_proj only, so train it on those (target_modules)"
            )
        pairs.setdefault(f"{found[1]}.{found[2]}.weight", {})[found[3]] = value
    if not pairs:
        raise ConfigError("the adapter has no tensors")
    weights = dict(part.weights)
    for name, pair in pairs.items():
        base = weights.get(name)
        if base is None or pair.keys() != {"A", "B"}:
            raise ConfigError(
                f"{name}: the adapter has {' and '.join(sorted(pair))} of it, the model {'no' if base is None else 'a'} matrix of that name"
            )
        change_OI = scale * (pair["B"].float() @ pair["A"].float())
        if change_OI.shape != base.shape:
            raise ConfigError(f"{name}: the adapter's change has shape {tuple(change_OI.shape)}, the model's matrix {tuple(base.shape)}")
        weights[name] = base + change_OI
    return Part(weights, part.rows)
