"""A model's folder as one thing: Hugging Face's layout, and ``decentra.json`` beside it where decentra made it. Tensors are read when asked for.

``decentra.json``: the manifest (of the run, or made for an import), the sha256 of every weights file, and the lineage: what it was made of and how.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decentra.config import DataSpec, Manifest, ModelSpec, manifest_from_bytes
from decentra.data.tokens import BYTES, TOKENIZER_FILE, Tokenizer, check_vocabulary, load_tokenizer
from decentra.errors import ConfigError, IntegrityError
from decentra.hf.convert import layout_of, names_of, parameter_shapes, spec_from
from decentra.hf.files import CONFIG, ONE, ShardWriter, Weights, read_json, sha256_of
from decentra.ids import Digest
from decentra.modules import module_of_parameter

CARD, README = "decentra.json", "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


@dataclass
class Checkpoint:
    """An opened folder. ``names``: our parameter names -> the files'; None: made here."""

    folder: Path
    manifest: Manifest
    weights: Weights
    names: dict[str, str | None]
    lineage: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # of its files, as the card says

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.spec)

    def __call__(self, name: str) -> Tensor:
        """One parameter under our name, in the file's dtype."""
        theirs = self.names[name]
        return torch.zeros(self.shapes[name]) if theirs is None else self.weights(theirs)

    def state(self) -> dict[str, Tensor]:
        """All of them, fp32."""
        return {name: self(name).float() for name in self.names}

    def tokenizer(self) -> Tokenizer:
        """What its text is read with. Raises ConfigError, IntegrityError."""
        return tokenizer_of(self.folder, self.manifest)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.__exit__()


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder made by decentra, or a model of Hugging Face of a class that ``convert`` knows. Raises ConfigError, IntegrityError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one that 'decentra pull' or 'decentra import' made, or a Hugging Face model's")
    card = read_json(folder / CARD) if (folder / CARD).is_file() else None
    weights = Weights(folder)
    weights.check()
    if card is not None:
        manifest = manifest_from_bytes(json.dumps(card.get("manifest")).encode(), str(folder / CARD))
        if manifest.model.code != "decoder":
            raise ConfigError(
                f"{folder} is a model of its own code ({manifest.model.code[:19]}); parts are known of the built-in decoder only"
            )
    else:
        spec = spec_from(read_json(folder / CONFIG))
        own = folder / TOKENIZER_FILE
        digest = load_tokenizer(own).digest if own.is_file() else None
        data = DataSpec(seq_len=min(128, spec.max_seq_len), tokenizer=digest)
        manifest = Manifest(name=folder.resolve().name[:64] or "import", model=spec, data=data, licence="unknown")
    shapes = parameter_shapes(manifest.model)
    names: dict[str, str | None] = {n: n for n in shapes}
    first = "model.layers.0.mlp.experts.0.gate_proj.weight"
    is_renamed = first not in weights  # else the names are ours
    if is_renamed or "lm_head.weight" not in weights:
        is_tied = "lm_head.weight" not in weights and bool(read_json(folder / CONFIG).get("tie_word_embeddings"))
        names = names_of(manifest.model, shapes, has_head=not is_tied)
    for name, theirs in names.items():
        if theirs is None:
            continue
        if theirs not in weights:
            raise IntegrityError(f"{folder} has no tensor {theirs}; half a download, or another architecture than its config.json says")
        if weights.shape(theirs) != shapes[name]:
            raise IntegrityError(f"{folder}: {theirs} has shape {weights.shape(theirs)}, its config.json means {shapes[name]}")
    if extra := sorted(set(weights) - {t for t in names.values() if t is not None}):
        raise ConfigError(
            f"{folder} has {len(extra)} tensors that this architecture does not, {extra[0]} for one; experts numbered with holes?"
        )
    hashes, lineage = _hashes_in(card or {}), (card or {}).get("lineage")
    return Checkpoint(folder, manifest, weights, names, lineage if isinstance(lineage, dict) else {}, hashes)


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of the model in a folder. Raises ConfigError, IntegrityError."""
    digest = manifest.data.tokenizer
    tokenizer = BYTES if digest is None else load_tokenizer(folder / TOKENIZER_FILE, digest)
    check_vocabulary(tokenizer, manifest.model.vocab_size, str(folder))
    return tokenizer


def _hashes_in(card: Mapping[str, Any]) -> dict[str, str]:
    files = card.get("files")
    if isinstance(files, dict):
        if outside := [k for k in files if not isinstance(k, str) or Path(k).name != k]:
            raise IntegrityError(f"{CARD} names {str(outside[0])[:60]!r}, which is no file of its folder")
        return {str(k): str(v) for k, v in files.items()}
    return {ONE: str(card["weights_sha256"])} if "weights_sha256" in card else {}


def verify(folder: Path) -> dict[str, str]:
    """File -> sha256, compared with the card. Raises IntegrityError, ConfigError."""
    card = read_json(folder / CARD)
    found = {}
    for name, expected in _hashes_in(card).items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, {CARD} names it")
        if (digest := sha256_of(path)) != expected:
            raise IntegrityError(
                f"{path} has sha256 {digest[:12]}, {CARD} says {expected[:12]}: it was changed or damaged; pull the model again"
            )
        found[name] = digest
    manifest = card.get("manifest")
    data = manifest.get("data") if isinstance(manifest, dict) else None
    if isinstance(data, dict) and isinstance(data.get("tokenizer"), str):
        found[TOKENIZER_FILE] = load_tokenizer(folder / TOKENIZER_FILE, Digest(data["tokenizer"])).digest
    if not found:
        raise ConfigError(f"{folder / CARD} names no file with a hash; it was made by another program")
    with Weights(folder) as weights:
        if unnamed := sorted(weights.files - set(found)):
            raise IntegrityError(
                f"{folder}: its tensors would be read from {unnamed[0]}, which {CARD} does not name; somebody put it there"
            )
    return found


def save_checkpoint(
    folder: Path, manifest: Manifest, tensors: Iterable[tuple[str, Tensor]], lineage: Mapping[str, Any], *, dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None, per_module: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a new folder; transformers loads it where a stock class computes the same. Returns the card.

    Tensors come under our names, in any order, one at a time; with ``per_module`` module by module, and each module (trunk, router, an expert) gets a file of
    its own, so that one can be fetched, compared or replaced alone. A model of one expert is written as the dense one it is. The folder is made under another
    name and gets its own when it is whole: what was there before is never touched. Raises ConfigError when there is something.
    """
    check_target(folder)
    if tokenizer is not None:
        tokenizer_of(tokenizer, manifest)  # a model goes nowhere without what its text is read with
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        card = _write(made, manifest, tensors, lineage, dtype, per_module)
        for name in TOKENIZER_FILES:
            if tokenizer is not None and (tokenizer / name).is_file():
                (made / name).write_bytes((tokenizer / name).read_bytes())
        if folder.exists():
            folder.rmdir()  # it is empty
        made.rename(folder)
    return card


def check_target(folder: Path) -> None:
    """Raise ConfigError where a model must not be written."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder} is there already; nothing is written over: give a new folder, or remove that one")


def _write(
    folder: Path,
    manifest: Manifest,
    tensors: Iterable[tuple[str, Tensor]],
    lineage: Mapping[str, Any],
    dtype: torch.dtype,
    per_module: bool,
) -> dict[str, Any]:
    spec = manifest.model
    shapes = parameter_shapes(spec)
    config, names = layout_of(spec, shapes)
    writer, left = ShardWriter(folder), set(shapes)
    for name, value in tensors:
        if name not in left or tuple(value.shape) != shapes[name]:
            raise ConfigError(f"{name} of shape {tuple(value.shape)} is not a parameter of this model, or comes twice")
        left.discard(name)
        if (theirs := names[name]) is not None:
            writer.add(theirs, value.detach().to(dtype), module_of_parameter(name).replace(".", "-") if per_module else None)
    if left:
        raise ConfigError(f"{len(left)} parameters are missing, {min(left)} for one")
    hashes = writer.finish()
    (folder / CONFIG).write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2))
    card = {"format": 1, "manifest": json.loads(manifest.canonical_bytes()), "files": hashes, "lineage": dict(lineage)}
    if set(hashes) == {ONE}:
        card["weights_sha256"] = hashes[ONE]
    (folder / README).write_text(model_card(manifest, lineage))
    (folder / CARD).write_text(json.dumps(card, indent=1))
    return card


def model_card(manifest: Manifest, lineage: Mapping[str, Any]) -> str:
    """A README for people and for the Hub: what it is, what it was made of, who contributed."""
    spec, licence = manifest.model, "other" if manifest.licence == "unknown" else manifest.licence.lower()
    lines = [
        "---", f"license: {licence}", "library_name: transformers", "tags: [decentra, mixture-of-experts]", "---", "",
        f"# {manifest.name}", "", manifest.description or "Made with decentra.", "",
        f"{spec.num_layers} layers, hidden size {spec.hidden_size}, {spec.num_experts} experts of width {spec.expert_hidden_size},"
        f" {spec.num_experts_per_token} per token.", "", "## Lineage", "",
    ]  # fmt: skip
    lines += [f"- {key}: {_told(value)}" for key, value in lineage.items()] or ["- unknown"]
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    return json.dumps(value)[:2000] if isinstance(value, dict | list) else str(value)[:2000]
