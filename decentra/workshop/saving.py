"""Checkpoints in and out of every operation: opened models compared, results saved with what they were made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decentra.config import Manifest, ModelSpec
from decentra.errors import ConfigError
from decentra.hf.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from decentra.modular.parts import State

Say = Callable[[str], None]
Result = dict[str, Any]
NUM_WINDOWS = 64


def with_spec(manifest: Manifest, spec: ModelSpec, name: str | None = None) -> Manifest:
    """The manifest of a model that is no run's any more."""
    per_peer = min(manifest.placement.experts_per_peer, spec.num_experts)
    placement = manifest.placement.model_copy(update={"experts_per_peer": per_peer})
    return manifest.model_copy(update={"model": spec, "genesis": {}, "placement": placement, "name": (name or manifest.name)[:64]})


KEPT = ("experts", "public_model", "public_top_k", "run")  # of a lineage, by whatever leaves the experts as they are
MAX_STEPS_BEFORE = 12


def lineage_of(source: Checkpoint, how: str, *, keeps: bool = False, **more: Any) -> Result:
    """What a model was made of: the steps before, by name and hash, newest first. ``keeps``: its experts are still the same."""
    before = source.lineage
    step = {"made_by": before.get("made_by"), "files": source.hashes} | {key: before[key] for key in ("run",) if key in before}
    earlier = before.get("steps_before")
    steps = [step, *(earlier if isinstance(earlier, list) else [])][:MAX_STEPS_BEFORE]
    kept = {key: before[key] for key in KEPT if keeps and key in before}
    return {"made_by": how, "from": source.folder.resolve().name, "steps_before": steps, "at": int(time.time())} | kept | more


def known_experts(lineage: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Number -> what is known of an added expert. What is not as it should be is left out: a card is a foreign file."""
    found = lineage.get("experts")
    known: dict[int, dict[str, Any]] = {}
    for number, card in found.items() if isinstance(found, dict) else ():
        if str(number).isdecimal() and isinstance(card, dict) and isinstance(card.get("about"), dict):
            known[int(number)] = card
    return known


def save(target: Path, source: Checkpoint, spec: ModelSpec, state: Mapping[str, Tensor], lineage: Result) -> None:
    save_checkpoint(target, with_spec(source.manifest, spec), state.items(), lineage, tokenizer=source.folder)


def kind_of(spec: ModelSpec) -> str:
    return "dense" if spec.num_experts == 1 else f"{spec.num_experts} experts, {spec.num_experts_per_token} per token"


def check_same_function(folder: Path, first: Checkpoint) -> None:
    """Raise ConfigError for a model whose numbers, or whose tokens, mean something else than the first one's."""
    spec, words = first.spec, first.manifest.data.tokenizer
    with open_checkpoint(folder) as other:
        for key, ours in spec.model_dump(exclude={"aux_loss_weight", "z_loss_weight", "max_seq_len", "code"}).items():
            if (theirs := getattr(other.spec, key)) != ours:
                raise ConfigError(
                    f"{folder}: {key} is {theirs}, {first.folder} has {ours}; they are of different architectures and do not merge"
                )
        own = other.manifest.data.tokenizer
        if words is not None and own is not None and own != words:
            raise ConfigError(
                f"{folder}: its tokenizer.json is {own[:12]}, {first.folder} has {words[:12]}: equal numbers would be other words, so they do not merge"
            )


def state_of_same_shape(folder: Path, first: Checkpoint) -> State:
    check_same_function(folder, first)
    with open_checkpoint(folder) as other:
        return other.state()
