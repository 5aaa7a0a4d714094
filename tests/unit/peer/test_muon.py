"""Muon beside AdamW: who moves what, moments kept and restored, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decentra.config import Manifest, PeerConfig, parse_config
from decentra.data.windows import source_for
from decentra.errors import ConfigError
from decentra.ids import PeerId
from decentra.model.decoder import build_model
from decentra.modules import build_layout
from decentra.peer.inner import InnerLoop
from decentra.peer.muon import MUON_MOMENTS, MuonWithAdamW, is_hidden_matrix

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "expert_hidden_size": 16, "num_experts": 2}


def manifest(optimizer: str) -> Manifest:
    raw = {"name": "muon", "model": TINY, "train": {"optimizer": optimizer, "batch_size": 4, "lr": 3e-3, "warmup_steps": 0}}
    return parse_config(Manifest, raw | {"data": {"seq_len": 32, "bytes_per_domain": 60000, "held_out_bytes": 2048}}, "test")


def loop(optimizer: str) -> InnerLoop:
    torch.set_num_threads(1)
    m = manifest(optimizer)
    model = build_model(m.model, 0)
    layout = build_layout([(n, tuple(p.shape)) for n, p in model.named_parameters()])
    source = source_for(m, PeerConfig(), PeerId("p"))
    return InnerLoop(m, layout, model, source, torch.device("cpu"), frozenset(f.id for f in layout.fragments))


def test_matrices_inside_layers_are_muons_and_nothing_else() -> None:
    model = build_model(manifest("muon").model, 0)
    chosen = {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
    assert "model.layers.0.self_attn.q_proj.weight" in chosen
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in chosen
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight", "lm_head.weight"):
        assert name not in chosen


def test_a_step_is_torch_muons_step() -> None:
    weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    twin = nn.Parameter(weight.detach().clone())
    ours = MuonWithAdamW({"model.layers.0.w.weight": weight}, beta1=0.9, beta2=0.95, weight_decay=0.1)
    theirs = torch.optim.Muon([twin], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 + step))
        weight.grad, twin.grad = gradient.clone(), gradient.clone()
        ours.step(0.01)
        theirs.step()
    assert torch.equal(weight, twin)
    assert set(ours.state[weight]) == set(MUON_MOMENTS)


def test_a_record_brings_the_moments_back_bit_for_bit() -> None:
    one, two = loop("muon"), loop("muon")
    for _ in range(3):
        one.step()
    two.restore(one.record())
    one.step()
    two.step()
    assert one.record() == two.record()


def test_it_learns() -> None:
    inner = loop("muon")
    for _ in range(30):
        inner.step()
    last = inner.totals(0.0).loss_ema
    assert last is not None
    assert last < 4.6, "from 5.5 nats per byte"


def test_the_manifest_knows_two_optimizers() -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        manifest("sgd")
