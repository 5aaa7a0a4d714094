from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decentra.config import Manifest, ModelSpec
from decentra.errors import ConfigError, ManifestMismatch
from decentra.ids import ROUTER, TRUNK, FragmentId
from decentra.model.custom import layout_for, load_model_code, model_code_digest, model_for
from decentra.model.decoder import build_model
from decentra.model.output import loss_of
from decentra.modules import build_layout

torch.set_num_threads(1)

CODE = """
from dataclasses import dataclass

import torch
from torch import nn
from decentra.model.output import ForwardOutput


@dataclass
class Size:
    vocab: int


class Bigram(nn.Module):
    def __init__(self, spec, seed):
        super().__init__()
        self.spec = spec
        self.size = Size(spec.vocab_size)
        self.table = nn.Parameter(torch.randn(spec.vocab_size, spec.vocab_size, generator=torch.Generator().manual_seed(seed)))
        self.tail = nn.Linear(spec.vocab_size, spec.vocab_size)

    def forward(self, tokens_BT):
        zero = self.table.new_zeros(())
        counts = torch.zeros(self.spec.num_experts, dtype=torch.int64)
        counts[0] = tokens_BT.numel() * self.spec.num_layers
        return ForwardOutput(self.tail(self.table[tokens_BT]), zero, zero, counts)


def build(spec, seed):
    return Bigram(spec, seed)


def module_of(name):
    return "expert.0" if name.startswith("tail") else "trunk"
"""


def manifest_with(code: str, **model: int) -> Manifest:
    return Manifest(name="own", model=ModelSpec(code=code, **{"vocab_size": 256, **model}))


def written(tmp_path: Path, text: str = CODE) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(text)
    return path


def test_own_code_builds_trains_and_is_laid_out_by_its_own_map(tmp_path: Path) -> None:
    path = written(tmp_path)
    manifest = manifest_with(model_code_digest(path))
    build, module_of = model_for(manifest, path)
    model = build(manifest.model, 5)
    assert module_of("tail.bias") == "expert.0"
    batch = torch.randint(0, 256, (2, 9))
    loss_of(model, manifest.model, batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    layout = layout_for(manifest, path)
    assert [f.id for f in layout.fragments] == ["trunk/0", "expert.0/0"]
    assert layout[FragmentId("expert.0/0")].num_elements == 256 * 257


def test_another_file_is_refused_by_its_hash_and_never_run(tmp_path: Path) -> None:
    path = written(tmp_path)
    manifest = manifest_with(model_code_digest(path))
    path.write_text(CODE + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ManifestMismatch, match="model code differs") as caught:
        model_for(manifest, path)
    assert caught.value.theirs == manifest.model.code
    assert not (tmp_path / "ran").exists()


def test_no_bytecode_cache_is_written_or_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    load_model_code(path, model_code_digest(path))
    assert [p.name for p in tmp_path.iterdir()] == ["my_model.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no build"),
        ("def build(:\n", "SyntaxError"),
        ("raise OSError('no')\n", "OSError"),
        ("import surely_not_installed_anywhere\n", "ModuleNotFoundError"),
    ],
)
def test_broken_files_are_config_errors(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        load_model_code(path, model_code_digest(path))


def test_build_must_give_a_module_and_its_failure_names_the_file(tmp_path: Path) -> None:
    for body, message in (("return 3", "torch.nn.Module, got int"), ("return spec.nothing", "AttributeError")):
        path = written(tmp_path, f"def build(spec, seed):\n    {body}\n")
        manifest = manifest_with(model_code_digest(path))
        with pytest.raises(ConfigError, match=message):
            layout_for(manifest, path)


@pytest.mark.parametrize("name", ["expert.99", "expert.-1", "expert.x", "expert.01", "expert", "head", ""])
def test_module_names_outside_the_run_are_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, CODE.replace('"expert.0"', repr(name)))
    with pytest.raises(ConfigError, match="module_of"):
        layout_for(manifest_with(model_code_digest(path)), path)


def test_code_and_file_must_agree(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(ConfigError, match="built-in decoder"):
        model_for(manifest_with("decoder"), path)
    with pytest.raises(ConfigError, match="--model-code"):
        model_for(manifest_with(model_code_digest(path)))
    with pytest.raises(ConfigError, match="expected 'decoder'"):
        model_for(manifest_with("banana"))
    with pytest.raises(ConfigError, match="cannot be read"):
        model_for(manifest_with(model_code_digest(path)), tmp_path / "absent.py")


def test_the_layout_of_the_decoder_needs_no_weights_and_fits_them() -> None:
    manifest = Manifest(name="own")
    layout = layout_for(manifest)
    model = build_model(manifest.model, 0)
    real = build_layout((name, tuple(p.shape)) for name, p in model.named_parameters())
    assert layout.digest() == real.digest()
    assert layout.modules[:2] == (TRUNK, ROUTER)
    huge = Manifest(name="huge", model=ModelSpec(hidden_size=8192, num_layers=64, expert_hidden_size=8192))
    assert layout_for(huge).num_elements > 10**11  # 400 GB of weights: only shapes can have been made
