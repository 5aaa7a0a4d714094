"""Checkpoints of Hugging Face's layout in and out: exact, in shards, and every damage named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from decentra.config import DataSpec, Manifest, ModelSpec
from decentra.errors import ConfigError, IntegrityError
from decentra.hf import files
from decentra.hf.checkpoint import open_checkpoint, save_checkpoint, verify
from decentra.hf.convert import config_of, parameter_shapes, spec_from
from decentra.model.decoder import build_model
from decentra.modules import module_of_parameter
from decentra.workshop.making import convert
from tests.unit import tiny

MOE = tiny.SPEC.model_copy(update={"vocab_size": 64})
DENSE = ModelSpec(**MOE.model_dump() | {"num_experts": 1, "num_experts_per_token": 1, "aux_loss_weight": 0.0})
LLAMA = DENSE.model_copy(update={"qk_norm": "none"})
MIXTRAL = MOE.model_copy(update={"qk_norm": "none"})
OLMOE = MOE.model_copy(update={"qk_norm": "all", "num_heads": 2, "norm_topk_prob": False})
ALL = {"moe": MOE, "dense": DENSE, "llama": LLAMA, "mixtral": MIXTRAL, "olmoe": OLMOE}
every_kind = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())
TOKENS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, spec: ModelSpec, seed: int = 3, *, per_module: bool = False) -> Path:
    state = build_model(spec, seed).state_dict()
    tensors = ((name, state[name]) for name in (sorted(state, key=module_of_parameter) if per_module else state))
    manifest = Manifest(name="m", model=spec, data=DataSpec(seq_len=24))
    save_checkpoint(folder, manifest, tensors, {"made_by": "a test"}, per_module=per_module)
    return folder


@every_kind
def test_shapes_and_config_there_and_back(spec: ModelSpec) -> None:
    assert parameter_shapes(spec) == {k: tuple(v.shape) for k, v in build_model(spec, 0).named_parameters()}
    back = spec_from(config_of(spec))
    assert back.model_dump() == spec.model_dump() | {"z_loss_weight": 0.001}


@every_kind
def test_saved_and_opened_is_the_same(tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 4096)
    monkeypatch.setattr(files.ShardWriter.__init__, "__defaults__", (4096,))
    state = build_model(spec, 3).state_dict()
    with open_checkpoint(saved(tmp_path, spec)) as opened:
        assert len(opened.hashes) > 1, "it is in shards"
        found = opened.state()
        assert all(found[k].equal(v) for k, v in state.items() if not (spec.num_experts == 1 and "gate.weight" in k))
        assert opened.lineage == {"made_by": "a test"}
    assert verify(tmp_path).keys() == opened.hashes.keys()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="nothing is written over"):
        saved(tmp_path, spec, seed=4)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@every_kind
def test_a_file_of_each_module(tmp_path: Path, spec: ModelSpec) -> None:
    saved(tmp_path, spec, per_module=True)
    modules = ["trunk", *(["router"] if spec.num_experts > 1 else []), *(f"expert-{e}" for e in range(spec.num_experts))]
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {f"model-{m}.safetensors" for m in modules}
    assert set(verify(tmp_path)) == {f"model-{m}.safetensors" for m in modules}
    state = build_model(spec, 3).state_dict()
    with open_checkpoint(tmp_path) as opened:
        assert all(v.equal(opened(k)) for k, v in state.items() if spec.num_experts > 1 or "gate.weight" not in k)
    (tmp_path / "model-expert-0.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"half a download: model-expert-0\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_what_goes_wrong_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "lm_head.weight", torch.zeros(64, 16)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "out", Manifest(name="m", model=MOE, data=DataSpec(seq_len=24)), broken(), {})
    assert not list(tmp_path.iterdir())


@every_kind
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, spec: ModelSpec) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    saved(tmp_path, spec, per_module=spec is OLMOE)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(build_model(spec, 3)(TOKENS).logits_BTV, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as back:  # no card of ours: as a stranger's model
        model = build_model(back.spec, 0)
        model.load_state_dict(back.state())
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits_BTV, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    saved(tmp_path, DENSE)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "decentra.json").unlink()
    with pytest.raises(IntegrityError, match=r"no tensor lm_head\.weight"):
        open_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as opened:
        assert opened("lm_head.weight").equal(opened("model.embed_tokens.weight"))
        save_checkpoint(tmp_path / "out", opened.manifest, ((n, opened(n)) for n in opened.names), {})
    with open_checkpoint(tmp_path / "out") as written:
        assert written("lm_head.weight").equal(written("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "biases in attention"),
        ({"model_type": "deepseek_v3"}, "latent vectors"),
        ({"model_type": "gpt2"}, "imports qwen3, qwen3_moe, llama"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [0]}, "without experts"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": "x"}, "another kind"),
        ({"num_attention_heads": 0, "head_dim": None}, "another kind"),
    ],
)
def test_what_cannot_be_imported_says_why(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_from(config_of(MOE) | change)


def test_a_sliding_window_is_as_far_as_the_model_reads() -> None:
    config = config_of(LLAMA) | {"model_type": "mistral", "sliding_window": 16}
    assert spec_from(config).max_seq_len == 16
    assert spec_from(config | {"sliding_window": None}).max_seq_len == LLAMA.max_seq_len


@pytest.mark.parametrize(
    ("change", "words"),
    [({"qk_norm": "none", "norm_topk_prob": False}, "no stock class"), ({"qk_norm": "all"}, "not the hidden size")],
)
def test_what_no_stock_class_computes_is_kept_under_our_names_and_not_exported(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    spec = MOE.model_copy(update=change)
    saved(tmp_path / "ours", spec)
    with open_checkpoint(tmp_path / "ours") as opened:
        assert opened.spec == spec
        assert all(torch.equal(value, opened(name)) for name, value in build_model(spec, 3).state_dict().items())
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path / "ours", tmp_path / "out", "export")
    assert not (tmp_path / "out").exists()


def test_every_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no finished model"):
        open_checkpoint(tmp_path)
    saved(tmp_path, MOE)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="changed or damaged"):
        verify(tmp_path)
    weights.write_bytes(whole)
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k.replace("experts.3.", "experts.6."): v for k, v in tensors.items()}, weights)
    with pytest.raises(IntegrityError, match=r"has no tensor .*experts.3"):
        open_checkpoint(tmp_path)
    safetensors.torch.save_file(tensors | {"model.layers.0.mlp.experts.9.up_proj.weight": torch.zeros(12, 16)}, weights)
    with pytest.raises(ConfigError, match="numbered with holes"):
        open_checkpoint(tmp_path)
    weights.write_bytes(whole)
    safetensors.torch.save_file(tensors, tmp_path / "evil.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "evil.safetensors")}))
    with pytest.raises(IntegrityError, match=r"read from evil.safetensors, which decentra.json does not name"):
        verify(tmp_path)
    card = json.loads((tmp_path / "decentra.json").read_text())
    (tmp_path / "decentra.json").write_text(json.dumps(card | {"files": {"../secret": "00"}}))
    with pytest.raises(IntegrityError, match="no file of its folder"):
        verify(tmp_path)
    (tmp_path / "decentra.json").write_text(json.dumps(card))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="half a download"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(IntegrityError, match="weight_map of file names"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(IntegrityError, match="not JSON"):
        open_checkpoint(tmp_path)
