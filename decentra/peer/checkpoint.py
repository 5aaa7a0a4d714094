"""A model on disk: assemble anchors into one safetensors file with a config, and read it back verified. Knows no network.

The folder is a Hugging Face checkpoint of the built-in decoder (model.safetensors, config.json) plus ``decentra.json``: the manifest, the anchors'
digests and heights it was assembled from, and the sha256 of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from decentra.config import Manifest, manifest_from_bytes
from decentra.data.tokens import TOKENIZER_FILE
from decentra.delta.anchor import decode_anchor
from decentra.delta.flat import scatter
from decentra.errors import ConfigError, IntegrityError
from decentra.hf.checkpoint import open_checkpoint, verify
from decentra.hf.convert import layout_of
from decentra.hf.files import read_json
from decentra.ids import Digest, FragmentId, digest_of
from decentra.model.custom import layout_for, model_for
from decentra.peer.disk import RealDisk, write_atomic

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "decentra.json"
TOKENIZER_CONFIG = "tokenizer_config.json"  # so that transformers knows what reads the tokenizer


@dataclass(frozen=True)
class Assembled:
    """A model built from the anchors of one moment."""

    manifest: Manifest
    state: dict[str, Tensor]
    anchors: dict[FragmentId, Digest]
    heights: dict[FragmentId, int]


def assemble(
    manifest: Manifest, blobs: Mapping[FragmentId, bytes], heights: Mapping[FragmentId, int], model_code: Path | None = None
) -> Assembled:
    """Weights by parameter name from anchor blobs. Raises RejectedPayload for a blob of another layout, ConfigError for a missing one."""
    state: dict[str, Tensor] = {}
    anchors: dict[FragmentId, Digest] = {}
    for fragment in layout_for(manifest, model_code).fragments:
        if fragment.id not in blobs:
            raise ConfigError(f"anchor of {fragment.id} is missing; a model is assembled from all its fragments")
        anchor = decode_anchor(fragment, blobs[fragment.id])
        state |= {name: values.clone() for name, values in scatter(anchor.anchor_N, fragment).items()}
        anchors[fragment.id] = digest_of(blobs[fragment.id])
    return Assembled(manifest, state, anchors, dict(heights))


def save_model(path: Path, model: Assembled, extra: Mapping[str, Any] = {}, tokenizer: bytes | None = None) -> None:
    """Write the checkpoint folder; decentra.json is last, so a folder without it is not finished. ``tokenizer``: the run's tokenizer.json."""
    disk = RealDisk(path)
    if tokenizer is not None:
        write_atomic(disk, TOKENIZER_FILE, tokenizer)
        write_atomic(disk, TOKENIZER_CONFIG, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode())
    config, names = layout_of(model.manifest.model, model.state)
    state = {theirs: model.state[ours] for ours, theirs in names.items() if theirs is not None}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    write_atomic(disk, WEIGHTS, weights)
    write_atomic(disk, CONFIG, json.dumps(config, indent=2).encode())
    run = {"id": model.manifest.run_id(), "name": model.manifest.name, "heights": model.heights, **extra}
    card = {
        "format": 1, "run": model.manifest.run_id(), "manifest": json.loads(model.manifest.canonical_bytes()), "anchors": model.anchors,
        "heights": model.heights, "weights_sha256": digest_of(weights), "lineage": {"made_by": "swarm", "run": run}, **extra,
    }  # fmt: skip
    write_atomic(disk, CARD, json.dumps(card, indent=1).encode())


def load_model(path: Path, model_code: Path | None = None) -> tuple[Manifest, nn.Module]:
    """The manifest and the model in a checkpoint folder. Raises ConfigError (no checkpoint), IntegrityError (damaged)."""
    card_file = path / CARD
    if not card_file.is_file():
        raise ConfigError(f"{path} holds no finished checkpoint ({CARD} is missing); get one with 'decentra pull' or 'decentra import'")
    verify(path)
    manifest = manifest_from_bytes(json.dumps(read_json(card_file).get("manifest")).encode(), str(card_file))
    if manifest.model.code == "decoder":
        with open_checkpoint(path) as opened:
            return manifest, model_from_state(manifest, opened.state(), model_code)
    return manifest, model_from_state(manifest, safetensors.torch.load((path / WEIGHTS).read_bytes()), model_code)


def model_from_state(manifest: Manifest, state: Mapping[str, Tensor], model_code: Path | None = None) -> nn.Module:
    """The run's model with these weights, in evaluation mode."""
    build, _ = model_for(manifest, model_code)
    model = build(manifest.model, manifest.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                raise IntegrityError(f"weights of {name} are missing or have another shape; this checkpoint is of another model")
            parameter.copy_(state[name])
    return model.eval()
