"""A LoRA adapter as an expert: the sum that PEFT computes, and adapters that are no expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.model.decoder import build_model
from decentra.modular.adapter import expert_from, scale_of

DENSE = ModelSpec(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, expert_hidden_size=24, num_experts=1,
    num_experts_per_token=1, max_seq_len=32,
)  # fmt: skip
STATE = {k: v.detach() for k, v in build_model(DENSE, 3).state_dict().items()}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def adapter(part: str = "up_proj", rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    at = f"base_model.model.model.layers.0.mlp.{part}"
    return {
        f"{at}.lora_A.weight": torch.randn(rank, 16, generator=generator),
        f"{at}.lora_B.weight": torch.randn(24, rank, generator=generator),
    }


def test_it_is_the_base_and_a_scaled_product() -> None:
    found = expert_from(STATE, adapter(), scale_of(CONFIG))
    a, b = adapter().values()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found.weights[name], STATE["model.layers.0.mlp.experts.0.up_proj.weight"] + 2.0 * b @ a)
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert found.weights[untouched].equal(STATE["model.layers.1.mlp.experts.0.up_proj.weight"])
    assert scale_of(CONFIG | {"use_rslora": True}) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "reads LORA"), ({**CONFIG, "use_dora": True}, "use_dora"), ({**CONFIG, "r": 0}, "r and lora_alpha"),
        ({**CONFIG, "lora_alpha": "x"}, "r and lora_alpha"), ({**CONFIG, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scale_of(config)


def test_adapters_that_are_no_expert() -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        expert_from(STATE, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16)}, 1.0)
    with pytest.raises(ConfigError, match="has A of it"):
        expert_from(STATE, dict(list(adapter().items())[:1]), 1.0)
    with pytest.raises(ConfigError, match=r"shape \(24, 16\)"):
        expert_from(STATE, adapter("down_proj"), 1.0)
    with pytest.raises(ConfigError, match="no tensors"):
        expert_from(STATE, {}, 1.0)


def test_the_same_as_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the oracles extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    from decentra.config import DataSpec, Manifest
    from decentra.hf.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "base", Manifest(name="m", model=DENSE, data=DataSpec(seq_len=24)), STATE.items(), {})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    import safetensors.torch

    scale = scale_of(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()))
    part = expert_from(STATE, safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors"), scale)
    for name, value in part.weights.items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-6)
