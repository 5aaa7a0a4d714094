"""The reference decoder: attention and mixture-of-experts layers, named by Qwen3-MoE checkpoint keys. No optimizer, no I/O.

Every expert is a module of its own, so a peer may build any subset of them. Shapes: B batch, T tokens, V vocabulary, D hidden, H heads,
G key/value heads, C channels of one head, E experts of the run, P experts present.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import sqrt
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.model.kernels import RMSNorm, rotate
from decentra.model.moe import Linear, MoE, RouterStats
from decentra.model.output import ForwardOutput, LossOutput, loss_of

INIT_STD = 0.02


class Routing(Protocol):
    """Chooses experts in the place of the model's own routers, while text is read; training does not use it."""

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        """A forward over these tokens begins; ``num_before`` tokens of each text were read before (with a cache)."""
        ...

    def logits(self, layer: int, x_TD: Tensor) -> Tensor | None:
        """[T, E] for what the layer's router sees, texts one after the other; None: the model's own."""
        ...


class KeyValueCache:
    """Keys and values of the tokens a model has read, one pair [B, G, max_tokens, C] per layer; filled in place."""

    def __init__(self, spec: ModelSpec, batch_size: int, max_tokens: int, like: Tensor) -> None:
        shape = (batch_size, spec.num_kv_heads, max_tokens, spec.head_dim)
        self.num_tokens, self.max_tokens = 0, max_tokens
        self._pairs = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(spec.num_layers)]

    def extend(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer and return all keys and values so far; ``num_tokens`` moves after the last layer."""
        end = self.num_tokens + k_BGTC.shape[2]
        keys, values = self._pairs[layer]
        keys[:, :, self.num_tokens : end], values[:, :, self.num_tokens : end] = k_BGTC, v_BGTC
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal grouped-query attention: RMSNorm on queries and keys as ``spec.qk_norm`` says, then rotary positions (arXiv 2104.09864)."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.q_proj = Linear(spec.hidden_size, spec.num_heads * spec.head_dim)
        self.k_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim)
        self.v_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, spec.hidden_size)
        if spec.qk_norm != "none":
            is_each = spec.qk_norm == "head"
            self.q_norm = RMSNorm(spec.head_dim * (1 if is_each else spec.num_heads), spec.rms_norm_eps)
            self.k_norm = RMSNorm(spec.head_dim * (1 if is_each else spec.num_kv_heads), spec.rms_norm_eps)
        self.norm = spec.qk_norm
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer = spec.num_heads, spec.num_kv_heads, spec.head_dim, layer

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        num_batch, num_tokens, _ = x_BTD.shape
        q_BTHC, k_BTGC = self._queries_and_keys(x_BTD)
        q_BHTC, k_BGTC = rotate(q_BTHC.transpose(1, 2), rope), rotate(k_BTGC.transpose(1, 2), rope)
        v_BGTC = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BHTC, k_BGTC = q_BHTC.to(v_BGTC.dtype), k_BGTC.to(v_BGTC.dtype)
        num_before = 0
        if cache is not None:
            num_before = cache.num_tokens
            k_BGTC, v_BGTC = cache.extend(self.layer, k_BGTC, v_BGTC)
        mask = None
        if num_before and num_tokens > 1:  # is_causal aligns to the top left, which is wrong behind a cache
            ones = torch.ones(num_tokens, num_before + num_tokens, dtype=torch.bool, device=x_BTD.device)
            mask = ones.tril(num_before)
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BGTC, v_BGTC, attn_mask=mask, is_causal=not num_before, enable_gqa=self.num_heads != self.num_kv_heads
        )
        out_BTD: Tensor = self.o_proj(y_BHTC.transpose(1, 2).reshape(num_batch, num_tokens, -1))
        return out_BTD

    def _queries_and_keys(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        q, k, each = self.q_proj(x_BTD), self.k_proj(x_BTD), (-1, self.head_dim)
        if self.norm == "all":
            return self.q_norm(q).unflatten(-1, each), self.k_norm(k).unflatten(-1, each)
        q_BTHC, k_BTGC = q.unflatten(-1, each), k.unflatten(-1, each)
        return (self.q_norm(q_BTHC), self.k_norm(k_BTGC)) if self.norm == "head" else (q_BTHC, k_BTGC)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int, present: Sequence[int]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MoE(spec, present)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KeyValueCache | None, routing: Routing | None = None
    ) -> tuple[Tensor, RouterStats]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        h_TD = self.post_attention_layernorm(x_BTD).flatten(0, 1)
        y_TD, stats = self.mlp(h_TD, None if routing is None else routing.logits(self.self_attn.layer, h_TD))
        return x_BTD + y_TD.view(x_BTD.shape), stats


class _Body(nn.Module):
    """Holds everything below the output head, so that names start with ``model.`` as in the checkpoint format."""

    def __init__(self, spec: ModelSpec, present: Sequence[int]) -> None:
        super().__init__()
        self.embed_tokens = Linear(spec.hidden_size, spec.vocab_size)
        self.layers = nn.ModuleList(Layer(spec, layer, present) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """The decoder of ``spec`` with the experts in ``experts`` (None: all). Parameters are uninitialised; see ``build_model``.

    Absent experts do not exist in memory; all router rows do, and the choice is made among present experts only. With none it holds
    weights but cannot run until ``add_experts``. Raises ConfigError.
    """

    def __init__(self, spec: ModelSpec, experts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.routing: Routing | None = None
        self.spec, self.present = spec, _checked_experts(spec, experts)
        self.model = _Body(spec, self.present)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size)
        cos_TC2, sin_TC2 = _rope_tables(spec)
        self.register_buffer("rope_cos_TC2", cos_TC2, persistent=False)
        self.register_buffer("rope_sin_TC2", sin_TC2, persistent=False)

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> ForwardOutput:
        """Logits and router losses for int64 tokens; with ``cache`` the tokens continue what the cache holds. Raises ConfigError."""
        start = 0 if cache is None else cache.num_tokens
        end = start + tokens_BT.shape[1]
        if end > self.spec.max_seq_len:
            raise ConfigError(f"the model reads at most {self.spec.max_seq_len} tokens (model.max_seq_len), got {end}; give fewer")
        rope = (self.rope_cos_TC2[start:end], self.rope_sin_TC2[start:end])  # type: ignore[index]
        x_BTD = F.embedding(tokens_BT, self.model.embed_tokens.weight)
        stats: list[RouterStats] = []
        if self.routing is not None:
            self.routing.start(tokens_BT, start)
        for layer in self.model.layers:
            x_BTD, layer_stats = layer(x_BTD, rope, cache, self.routing)
            stats.append(layer_stats)
        if cache is not None:
            cache.num_tokens = end
        logits_BTV = self.lm_head(self.model.norm(x_BTD))
        return ForwardOutput(logits_BTV, *self._pooled(stats, tokens_BT.numel()))

    def loss(self, tokens_BT1: Tensor) -> LossOutput:
        """Training loss of int64 tokens [B, T + 1]; see ``output.loss_of``."""
        return loss_of(self, self.spec, tokens_BT1)

    def add_experts(self, experts: Sequence[int]) -> list[str]:
        """Make room for experts that are absent, on the model's device and filled with zeros. Returns the names of their parameters."""
        new = sorted(set(_checked_experts(self.spec, experts)) - set(self.present))
        device = self.model.embed_tokens.weight.device
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.mlp.add(new, device)
        self.present = tuple(sorted({*self.present, *new}))
        parts = tuple(f".experts.{expert}." for expert in new)
        added = {name: parameter for name, parameter in self.named_parameters() if any(part in name for part in parts)}
        with torch.no_grad():
            for parameter in added.values():
                parameter.zero_()
        return list(added)

    def leave_out(self, experts: Sequence[int]) -> None:
        """From the next forward on answer without these experts, as if the model never had them; none: with all again. Nothing is loaded or moved.

        Raises ConfigError for experts that are not here, and when none would be left.
        """
        left_out = tuple(sorted(set(experts)))
        if unknown := set(left_out) - set(self.present):
            raise ConfigError(
                f"expert {min(unknown)} is not in this model, which has {', '.join(map(str, self.present))}; leave out one of these"
            )
        if left_out and len(left_out) == len(self.present):
            raise ConfigError(f"all {len(left_out)} experts would be left out; a model needs one to answer")
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.mlp.left_out = left_out

    def router_rows(self, layer: int) -> Tensor:
        """One layer's router [E, D]."""
        found = self.model.layers[layer]
        assert isinstance(found, Layer)
        return found.mlp.gate.weight

    def new_cache(self, batch_size: int, max_tokens: int) -> KeyValueCache:
        return KeyValueCache(self.spec, batch_size, max_tokens, self.lm_head.weight)

    def _pooled(self, stats: list[RouterStats], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """(aux loss, z-loss, tokens per expert) over all layers.

        aux = P * sum_i f_i * p_i (arXiv 2101.03961, eq. 4-6), with f_i the share of tokens sent to expert i and p_i its mean
        probability, both pooled over layers; the f_i sum to K as in Qwen3-MoE, so a balanced router scores K.
        """
        mean_prob_P = torch.stack([s.mean_prob_P for s in stats]).mean(0)
        num_slots_P = torch.stack([s.num_slots_P for s in stats]).sum(0)
        share_P = num_slots_P.to(mean_prob_P.dtype) / (num_tokens * len(stats))
        aux_loss = len(self.present) * (share_P * mean_prob_P).sum()
        z_loss = torch.stack([s.z_loss for s in stats]).mean()
        num_slots_E = num_slots_P.new_zeros(self.spec.num_experts)
        num_slots_E[list(self.present)] = num_slots_P
        return aux_loss, z_loss, num_slots_E


def build_model(spec: ModelSpec, seed: int, experts: Sequence[int] | None = None) -> Decoder:
    """A fresh decoder: normal(0, 0.02), projections into the residual stream divided by sqrt(2 * layers), norms 1.

    Each parameter is drawn from (seed, its name), so a subset of experts has the same values as in the whole model.
    """
    model = Decoder(spec, experts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = INIT_STD / sqrt(2 * spec.num_layers) if is_residual else INIT_STD
            parameter.normal_(0.0, std, generator=_generator(seed, name))
    return model


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _checked_experts(spec: ModelSpec, experts: Sequence[int] | None) -> tuple[int, ...]:
    if experts is None:
        return tuple(range(spec.num_experts))
    present = tuple(sorted(set(experts)))
    if present and (present[0] < 0 or present[-1] >= spec.num_experts):
        raise ConfigError(f"expected experts out of 0..{spec.num_experts - 1}, got {list(experts)}")
    return present


def _rope_tables(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """cos and sin [max_seq_len, C/2]; the angle of channel pair c at position t is t * theta^(-2c/C) (arXiv 2104.09864)."""
    # on the CPU even under torch.device("meta"): arithmetic on meta tensors makes torch load 800 modules first
    exponent_C2 = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim
    angle_TC2 = torch.arange(spec.max_seq_len, dtype=torch.float32, device="cpu")[:, None] / spec.rope_theta**exponent_C2
    return angle_TC2.cos(), angle_TC2.sin()
