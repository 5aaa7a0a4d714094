"""What regmean is told of a model: the moments of every matrix's inputs."""

from __future__ import annotations

import torch

from decentra.config import ModelSpec
from decentra.model.decoder import build_model
from decentra.workshop.looking import grams_of

SPEC = ModelSpec(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, expert_hidden_size=12, num_experts=4, num_experts_per_token=2, max_seq_len=32
)  # fmt: skip
TEXT = bytes(range(256)) * 20


def test_every_matrix_has_the_moments_of_what_it_reads() -> None:
    model = build_model(SPEC, 1).eval()
    grams = grams_of(model, TEXT, 32, num_windows=8)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
    assert grams.keys() == matrices.keys()
    for name, matrix in matrices.items():
        gram = grams[name]
        assert tuple(gram.shape) == (matrix.shape[1],) * 2
        assert gram.equal(gram.T)
        assert torch.linalg.eigvalsh(gram).min() > -1e-6 * max(1.0, float(gram.trace()))


def test_a_token_counts_for_as_many_experts_as_it_goes_to() -> None:
    model = build_model(SPEC, 1).eval()
    grams = grams_of(model, TEXT, 32, num_windows=8)
    for layer in range(SPEC.num_layers):
        start = f"model.layers.{layer}.mlp"
        of_experts = torch.stack([grams[f"{start}.experts.{e}.gate_proj.weight"] for e in range(4)]).sum(0)
        torch.testing.assert_close(of_experts, 2 * grams[f"{start}.gate.weight"])
        assert grams[f"{start}.experts.0.up_proj.weight"] is grams[f"{start}.experts.0.gate_proj.weight"]
