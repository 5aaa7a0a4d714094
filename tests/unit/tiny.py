"""The smallest mixture of experts that has everything: grouped-query attention, two layers, experts narrower than the model."""

from __future__ import annotations

from decentra.config import ModelSpec

SPEC = ModelSpec(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, expert_hidden_size=12, num_experts=4, max_seq_len=32
)  # fmt: skip
