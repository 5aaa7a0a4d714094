"""A run small enough to train in milliseconds; shared by the trainer's tests."""

from __future__ import annotations

from decentra.config import DataSpec, Manifest, ModelSpec, TrainSpec
from decentra.model.custom import layout_for

MANIFEST = Manifest(
    name="small",
    model=ModelSpec(
        hidden_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=12, expert_hidden_size=16, num_experts=4, max_seq_len=32
    ),
    data=DataSpec(seq_len=24),
    train=TrainSpec(batch_size=4, lr=5e-3, warmup_steps=5),
)
LAYOUT = layout_for(MANIFEST)
