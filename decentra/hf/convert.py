"""What a Hugging Face ``config.json`` means here, and what its tensors are called. No files.

A dense model is a mixture of one expert: ``mlp.gate_proj`` is expert 0's, and its router has one row. Both ways are exact: numbers are only renamed. Which
stock class a model is, follows from its norm on queries and keys: of each head, Qwen3 or Qwen3-MoE; none, Llama or Mixtral; over all heads, OLMoE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

from decentra.config import ModelSpec, parse_config
from decentra.errors import ConfigError

_FIRST_EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp)\.experts\.0\.(gate_proj|up_proj|down_proj)\.weight$")
_EXPERT = re.compile(r"^(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_ROUTER = re.compile(r"^(model\.layers\.\d+)\.mlp\.gate\.weight$")
_MIXTRAL_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

_NORMS: dict[str, Literal["head", "all", "none"]] = {
    "qwen3": "head", "qwen3_moe": "head", "llama": "none", "mistral": "none", "mixtral": "none", "olmoe": "all",
}  # fmt: skip
_DENSE = ("qwen3", "llama", "mistral")

# What makes a model another function than this decoder's, with the values that are ours.
_OURS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "clip_qkv": (None,), "attention_bias": (False, None), "mlp_bias": (False, None), "use_sliding_window": (False, None),
    "rope_scaling": (None,), "decoder_sparse_step": (1, None), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
}  # fmt: skip
_REASONS = {
    "qwen2": "it has biases in attention",
    "qwen2_moe": "it has a shared expert with a gate, and biases in attention",
    "deepseek_v3": "its attention is over latent vectors (MLA)",
    "gpt_oss": "it has biases, and sinks in attention",
}


def spec_from(config: Mapping[str, Any]) -> ModelSpec:
    """The shape of a model of a stock class. Raises ConfigError: another architecture, with the reason why it is not the same function."""
    kind = str(config.get("model_type"))
    if kind not in _NORMS:
        reason = _REASONS.get(kind, f"decentra imports {', '.join(_NORMS)}")
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
        kv_heads = config.get("num_key_value_heads") if kind in ("llama", "olmoe") else config["num_key_value_heads"]
        head_dim = config["head_dim"] if kind.startswith("qwen3") else config.get("head_dim")
        is_moe = kind not in _DENSE
        longest = config["max_position_embeddings"]
        window = config.get("sliding_window", 4096 if kind == "mistral" else None)
        if kind in ("mistral", "mixtral") and window:
            longest = min(longest, window)  # up to the window, attention is over everything
        raw = {
            "vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"], "num_layers": config["num_hidden_layers"],
            "num_heads": num_heads, "num_kv_heads": kv_heads or num_heads, "head_dim": head_dim or config["hidden_size"] // num_heads,
            "qk_norm": _NORMS[kind],
            "expert_hidden_size": config["moe_intermediate_size"] if kind == "qwen3_moe" else config["intermediate_size"],
            "num_experts": config.get("num_experts", config.get("num_local_experts")) if is_moe else 1,
            "num_experts_per_token": config["num_experts_per_tok"] if is_moe else 1,
            "norm_topk_prob": kind == "mixtral" or bool(config.get("norm_topk_prob", False)) if is_moe else True,
            "rope_theta": float(rope.get("rope_theta") or config["rope_theta"]),
            "rms_norm_eps": config["rms_norm_eps"], "max_seq_len": longest,
            "aux_loss_weight": config.get("router_aux_loss_coef", 0.001) if is_moe else 0.0,
        }  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}; is it the file of a whole model?") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json: a value is of another kind than expected ({error})") from None
    return parse_config(ModelSpec, raw, "config.json")


def stock_class(spec: ModelSpec) -> str:
    """The ``model_type`` under which transformers computes the same. Raises ConfigError where there is none."""
    is_dense = spec.num_experts == 1
    if spec.qk_norm == "head":
        return "qwen3" if is_dense else "qwen3_moe"
    if spec.qk_norm == "none":
        if not is_dense and not spec.norm_topk_prob:
            raise ConfigError(
                "norm_topk_prob = false without a norm on queries and keys: no stock class computes that, Mixtral's weights add up to one;"
                " use two experts per token or more"
            )
        return "llama" if is_dense else "mixtral"
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        raise ConfigError(
            f"{spec.num_heads} heads of {spec.head_dim} are not the hidden size {spec.hidden_size}, which OLMoE's class takes for granted"
        )
    return "olmoe"


def names_of(spec: ModelSpec, ours: Iterable[str], *, has_head: bool = True) -> dict[str, str | None]:
    """Our parameter name -> that of a checkpoint of its stock class. None: not in it, and made here (a router with one row, zeros).

    Without a head of its own (tied) the head is the embedding.
    """
    kind = stock_class(spec)
    found = {name: _their_name(kind, name) for name in ours}
    if not has_head:
        found["lm_head.weight"] = "model.embed_tokens.weight"
    return found


def _their_name(kind: str, name: str) -> str | None:
    if kind in _DENSE:
        if _ROUTER.match(name):
            return None
        return f"{expert[1]}.{expert[2]}.weight" if (expert := _FIRST_EXPERT.match(name)) else name
    if kind == "mixtral":
        if router := _ROUTER.match(name):
            return f"{router[1]}.block_sparse_moe.gate.weight"
        if expert := _EXPERT.match(name):
            return f"{expert[1]}.block_sparse_moe.experts.{expert[2]}.{_MIXTRAL_PARTS[expert[3]]}.weight"
    return name


_CLASSES = {
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM",
}  # fmt: skip


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """``config.json`` under which transformers loads the weights. Raises ConfigError where no stock class computes the same."""
    kind = stock_class(spec)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]], "model_type": kind, "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim, "intermediate_size": spec.expert_hidden_size, "hidden_act": "silu", "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta, "max_position_embeddings": spec.max_seq_len, "tie_word_embeddings": False, "attention_bias": False,
        "use_cache": True, "dtype": "float32",
    }  # fmt: skip
    if kind in _DENSE:
        return config
    config |= {"num_experts_per_tok": spec.num_experts_per_token, "router_aux_loss_coef": spec.aux_loss_weight}
    if kind == "mixtral":
        return config | {"num_local_experts": spec.num_experts, "sliding_window": None}
    config |= {"num_experts": spec.num_experts, "norm_topk_prob": spec.norm_topk_prob}
    if kind == "olmoe":
        return config | {"clip_qkv": None}
    return config | {"moe_intermediate_size": spec.expert_hidden_size, "decoder_sparse_step": 1, "mlp_only_layers": []}


def layout_of(spec: ModelSpec, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """config.json and names in the file; a model that is of no stock class keeps its own, and decentra alone reads it."""
    if spec.code == "decoder":
        with suppress(ConfigError):
            return config_of(spec), names_of(spec, names)
    return {"model_type": "decentra"}, {name: name for name in names}


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder of ``spec``, under our name for it, which is Qwen3-MoE's."""
    hidden, wide, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        at = f"model.layers.{layer}"
        attention = {"q_proj": (wide, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, wide)}
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        norms = {"head": (spec.head_dim, spec.head_dim), "all": (wide, kv), "none": ()}[spec.qk_norm]
        shapes |= {f"{at}.self_attn.{name}.weight": (size,) for name, size in zip(("q_norm", "k_norm"), norms, strict=False)}
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{at}.mlp.gate.weight"] = (spec.num_experts, hidden)
        for expert in range(spec.num_experts):
            ffn = {"gate_proj": (spec.expert_hidden_size, hidden), "up_proj": (spec.expert_hidden_size, hidden)}
            ffn["down_proj"] = (hidden, spec.expert_hidden_size)
            shapes |= {f"{at}.mlp.experts.{expert}.{name}.weight": shape for name, shape in ffn.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (spec.vocab_size, hidden)}
