from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.ids import ROUTER, TRUNK, expert_module
from decentra.model.decoder import Decoder, build_model
from decentra.modular.parts import select, spec_with
from decentra.modules import build_layout
from tests.unit.tiny import SPEC

torch.set_num_threads(1)


def tokens(num_batch: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SPEC.vocab_size, (num_batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def test_parameter_names_are_the_checkpoint_keys() -> None:
    names = set(build_model(SPEC, 0).state_dict())
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        at = f"model.layers.{layer}"
        expected |= {f"{at}.self_attn.{p}_proj.weight" for p in "qkvo"} | {f"{at}.self_attn.{p}_norm.weight" for p in "qk"}
        expected |= {f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight", f"{at}.mlp.gate.weight"}
        expected |= {f"{at}.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")}
    assert names == expected
    layout = build_layout((name, tuple(p.shape)) for name, p in build_model(SPEC, 0).named_parameters())
    assert layout.modules == (TRUNK, ROUTER, *(expert_module(e) for e in range(4)))


def test_output_shapes_and_counts() -> None:
    output = build_model(SPEC, 0)(tokens(3, 7))
    assert output.logits_BTV.shape == (3, 7, SPEC.vocab_size)
    assert output.tokens_per_expert_E.shape == (4,)
    assert output.tokens_per_expert_E.dtype == torch.int64
    assert output.tokens_per_expert_E.sum() == 3 * 7 * 2 * 2  # top-2, two layers
    assert output.aux_loss.ndim == output.z_loss.ndim == 0


def test_a_balanced_router_scores_k_and_its_z_loss_is_known() -> None:
    model = build_model(SPEC, 0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    output = model(tokens(2, 9))
    assert output.aux_loss.item() == pytest.approx(2.0, rel=1e-5)  # mean probability 1/E each, whatever the ties chose
    assert output.z_loss.item() == pytest.approx(torch.tensor(4.0).log().item() ** 2, rel=1e-5)


def test_loss_adds_the_weighted_router_losses() -> None:
    model, batch = build_model(SPEC, 0), tokens(2, 9)
    output, loss = model(batch[:, :-1]), model.loss(batch)
    expected = F.cross_entropy(output.logits_BTV.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(loss.cross_entropy, expected)
    torch.testing.assert_close(loss.total, expected + 0.01 * output.aux_loss + 0.001 * output.z_loss)


@settings(max_examples=10)
@given(length=st.integers(2, 20), at=st.integers(0, 18))
def test_a_token_never_sees_the_future(length: int, at: int) -> None:
    at = min(at, length - 2)
    model, batch = build_model(SPEC, 0), tokens(1, length)
    changed = batch.clone()
    changed[0, at + 1 :] = (changed[0, at + 1 :] + 1) % SPEC.vocab_size
    before, after = model(batch).logits_BTV, model(changed).logits_BTV
    torch.testing.assert_close(before[:, : at + 1], after[:, : at + 1], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, at + 1 :], after[:, at + 1 :])


def test_init_is_seeded_scaled_and_the_same_for_a_subset() -> None:
    whole, again, other = build_model(SPEC, 7), build_model(SPEC, 7), build_model(SPEC, 8)
    some = build_model(SPEC, 7, experts=[3, 1])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if value.ndim == 2:
            assert not torch.equal(value, other.state_dict()[name])
    for name, value in some.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
    big = build_model(ModelSpec(), 0).state_dict()
    assert big["model.layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert big["model.layers.0.self_attn.o_proj.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_a_subset_of_experts_exists_runs_and_routes_among_itself() -> None:
    model = build_model(SPEC, 0, experts=[1, 3])
    assert not any(f"experts.{e}." in name for name in model.state_dict() for e in (0, 2))
    assert model.model.layers[0].mlp.gate.weight.shape[0] == 4  # all router rows
    output = model(tokens(2, 9))
    assert output.tokens_per_expert_E.tolist() == [0, 36, 0, 36]
    model.loss(tokens(2, 9)).total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_subset_equals_the_whole_model_whose_other_rows_are_never_chosen() -> None:
    whole, some = build_model(SPEC, 0), build_model(SPEC, 0, experts=[0, 2])
    with torch.no_grad():  # every token's first channel is large and positive, so a negative column there forbids a row
        for model in (whole, some):
            model.model.embed_tokens.weight[:, 0] = 5.0
            for layer in model.model.layers:
                layer.mlp.gate.weight[[1, 3], 0] = -100.0
                layer.mlp.gate.weight[[0, 2], 0] = 0.0
    batch = tokens(2, 9)
    assert whole(batch).tokens_per_expert_E[[1, 3]].sum() == 0
    torch.testing.assert_close(whole(batch).logits_BTV, some(batch).logits_BTV, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("experts", [[4], [-1, 0]])
def test_impossible_subsets_are_refused(experts: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        Decoder(SPEC, experts)


def test_top_1_with_renormalisation_is_refused() -> None:
    with pytest.raises(ValidationError, match="no gradient"):
        ModelSpec(num_experts_per_token=1)
    top_1 = SPEC.model_copy(update={"num_experts_per_token": 1, "norm_topk_prob": False})
    model = build_model(top_1, 0)
    loss = model.loss(tokens(2, 9))
    loss.cross_entropy.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-6


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="32"):
        build_model(SPEC, 0)(tokens(1, 33))


def test_logits_and_aux_loss_equal_the_transformers_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    from safetensors.torch import save_file

    model = build_model(SPEC, 0)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 12, "intermediate_size": 12,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = tokens(3, 20)
    with torch.no_grad():
        ours, reference = model(batch), theirs(batch, output_router_logits=True)
    torch.testing.assert_close(ours.logits_BTV, reference.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(ours.aux_loss, reference.aux_loss, atol=1e-6, rtol=1e-5)


def test_a_model_that_takes_experts_in_is_the_model_built_with_them() -> None:
    grown, built = build_model(SPEC, 0, experts=[1]), build_model(SPEC, 0, experts=[0, 1, 3])
    names = grown.add_experts([3, 0, 1])
    assert {name.split(".experts.")[1].split(".")[0] for name in names} == {"0", "3"}, "what it has is left alone"
    assert not any(grown.state_dict()[name].any() for name in names)
    grown.load_state_dict(built.state_dict())
    assert list(grown.state_dict()) == list(built.state_dict())
    batch = tokens(2, 9)
    assert torch.equal(grown(batch).logits_BTV, built(batch).logits_BTV)
    assert grown.present == (0, 1, 3)
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        grown.add_experts([4])


def test_a_model_without_experts_holds_weights_until_it_gets_some() -> None:
    empty = build_model(SPEC, 0, experts=[])
    assert not any(".experts." in name for name in empty.state_dict())
    empty.add_experts([2])
    assert empty(tokens(1, 5)).tokens_per_expert_E.tolist() == [0, 0, 10, 0]  # two layers, one expert per token


@pytest.mark.parametrize("num_chosen", [1, 3])
def test_experts_are_left_out_and_taken_in_again_between_two_forwards(num_chosen: int) -> None:
    """The same as the model that never had them, with fewer chosen per token where too few are left; and with all again, bit for bit what it was."""
    spec = SPEC.model_copy(update={"num_experts_per_token": num_chosen, "norm_topk_prob": num_chosen > 1})
    model, batch = build_model(spec, 0), tokens(2, 9)
    state = model.state_dict()
    smaller = Decoder(spec_with(spec, 2, min(2, num_chosen)))
    smaller.load_state_dict(select(state, [1, 3]))
    whole = model(batch)
    model.leave_out([2, 0, 2])
    without = model(batch)
    torch.testing.assert_close(without.logits_BTV, smaller(batch).logits_BTV, atol=1e-6, rtol=1e-5)
    assert without.tokens_per_expert_E[[0, 2]].sum() == 0
    model.leave_out([])
    assert torch.equal(model(batch).logits_BTV, whole.logits_BTV)
    with pytest.raises(ConfigError, match="expert 4 is not in this model"):
        model.leave_out([4])
    with pytest.raises(ConfigError, match="all 4 experts would be left out"):
        model.leave_out(range(4))
