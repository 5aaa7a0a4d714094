"""What a Hugging Face ``config.json`` means here, and what its tensors are called. No files.

A dense Qwen3 model is a mixture of one expert: ``mlp.gate_proj`` is expert 0's, and its router has one row. Both ways are exact: numbers are only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from decentra.config import ModelSpec, parse_config
from decentra.errors import ConfigError

_FFN = re.compile(r"^(model\.layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)\.weight$")
_FIRST_EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp)\.experts\.0\.(gate_proj|up_proj|down_proj)\.weight$")
_ROUTER = re.compile(r"^model\.layers\.\d+\.mlp\.gate\.weight$")

# What makes a model another function than this decoder's, with the values that are ours.
_OURS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None), "use_sliding_window": (False, None),
    "rope_scaling": (None,), "decoder_sparse_step": (1, None), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
}  # fmt: skip
_REASONS = {
    "llama": "it has no RMSNorm on queries and keys, which this decoder always has",
    "mistral": "it has no RMSNorm on queries and keys, which this decoder always has",
    "mixtral": "it has no RMSNorm on queries and keys, which this decoder always has",
    "olmoe": "its RMSNorm on queries and keys is over all heads at once, this decoder's over each",
    "qwen2_moe": "it has a shared expert with a gate, and biases in attention",
}


def spec_from(config: Mapping[str, Any]) -> ModelSpec:
    """The shape of a Qwen3 or Qwen3-MoE model. Raises ConfigError: another architecture, with the reason why it is not the same function."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "qwen3_moe"):
        reason = _REASONS.get(str(kind), "decentra imports Qwen3 (qwen3) and Qwen3-MoE (qwen3_moe)")
        raise ConfigError(f"model_type {kind!r} cannot be imported exactly: {reason}")
    for key, ours in _OURS.items():
        if config.get(key, ours[0]) not in ours:
            raise ConfigError(f"config.json: {key} = {config[key]!r}, this decoder computes {ours[0]!r}")
    if config.get("mlp_only_layers"):
        raise ConfigError(f"config.json: mlp_only_layers = {config['mlp_only_layers']}: layers without experts are not imported")
    try:
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_type {rope['rope_type']!r}, this decoder has the default one")
        num_heads = config["num_attention_heads"]
        is_moe = kind == "qwen3_moe"
        raw = {
            "vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"], "num_layers": config["num_hidden_layers"],
            "num_heads": num_heads, "num_kv_heads": config.get("num_key_value_heads") or num_heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // num_heads,
            "expert_hidden_size": config["moe_intermediate_size"] if is_moe else config["intermediate_size"],
            "num_experts": config.get("num_experts", config.get("num_local_experts")) if is_moe else 1,
            "num_experts_per_token": config["num_experts_per_tok"] if is_moe else 1,
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)) if is_moe else True,
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6), "max_seq_len": config.get("max_position_embeddings", 32768),
            "aux_loss_weight": config.get("router_aux_loss_coef", 0.001) if is_moe else 0.0,
        }  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}; is it the file of a whole model?") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json: a value is of another kind than expected ({error})") from None
    return parse_config(ModelSpec, raw, "config.json")


def names_of(spec: ModelSpec, ours: Iterable[str], *, has_head: bool = True) -> dict[str, str | None]:
    """Our parameter name -> the checkpoint's. None: not in it, and made here (a router with one row, zeros).

    Without a head of its own (tied) the head is the embedding.
    """
    found: dict[str, str | None] = {}
    for name in ours:
        theirs: str | None = name
        if spec.num_experts == 1:
            if expert := _FIRST_EXPERT.match(name):
                theirs = f"{expert[1]}.{expert[2]}.weight"
            elif _ROUTER.match(name):
                theirs = None
        if name == "lm_head.weight" and not has_head:
            theirs = "model.embed_tokens.weight"
        found[name] = theirs
    return found


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """``config.json`` of a checkpoint: Qwen3-MoE, or Qwen3 where there is one expert."""
    config = qwen3_moe_config(spec)
    if spec.num_experts > 1:
        return config
    moe_only = {"moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
    dense = {key: value for key, value in config.items() if key not in moe_only | {"router_aux_loss_coef"}}
    return dense | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder of ``spec``, under its Qwen3-MoE checkpoint name."""
    hidden, wide, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        at = f"model.layers.{layer}"
        attention = {"q_proj": (wide, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, wide)}
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}.self_attn.{name}.weight": (spec.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{at}.mlp.gate.weight"] = (spec.num_experts, hidden)
        for expert in range(spec.num_experts):
            ffn = {"gate_proj": (spec.expert_hidden_size, hidden), "up_proj": (spec.expert_hidden_size, hidden)}
            ffn["down_proj"] = (hidden, spec.expert_hidden_size)
            shapes |= {f"{at}.mlp.experts.{expert}.{name}.weight": shape for name, shape in ffn.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (spec.vocab_size, hidden)}


def qwen3_moe_config(spec: ModelSpec) -> dict[str, Any]:
    """``config.json`` under which transformers loads the weights as Qwen3MoeForCausalLM (parameter names are the same)."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim, "moe_intermediate_size": spec.expert_hidden_size, "intermediate_size": spec.expert_hidden_size,
        "num_experts": spec.num_experts, "num_experts_per_tok": spec.num_experts_per_token, "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu", "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.max_seq_len, "router_aux_loss_coef": spec.aux_loss_weight, "tie_word_embeddings": False,
        "attention_bias": False, "use_cache": True, "dtype": "float32",
    }  # fmt: skip
