"""A model out of another architecture: Hugging Face in and out, upcycling, MoE-fication, more experts. Checkpoint in, checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decentra.config import ModelSpec
from decentra.data.tokens import joined
from decentra.errors import ConfigError
from decentra.hf.checkpoint import Checkpoint, check_target, open_checkpoint, save_checkpoint
from decentra.model.decoder import Decoder
from decentra.modular import upcycle
from decentra.modular.parts import State
from decentra.workshop import texts as text_of
from decentra.workshop.looking import calibration_of
from decentra.workshop.saving import Result, kind_of, lineage_of, save, state_of_same_shape, with_spec
from decentra.workshop.training import model_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(source: Path, target: Path, how: str, dtype: str = "fp32") -> Result:
    """``import`` and ``export`` are this: read a folder, write one that decentra and transformers both load, tensor by tensor."""
    check_target(target)
    with open_checkpoint(source) as opened:
        manifest = with_spec(opened.manifest, opened.spec)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in opened.names:
                yield name, opened(name)

        card = save_checkpoint(target, manifest, tensors(), lineage_of(opened, how, keeps=True), dtype=DTYPES[dtype], tokenizer=source)
        num = sum(torch.Size(shape).numel() for shape in opened.shapes.values())
        return {"ok": True, "dir": str(target), "kind": kind_of(opened.spec), "num_parameters": num, "files": card["files"]}


def _start_gap(before: Decoder, after: Decoder) -> float:
    """Largest logit difference on some tokens: what an operation changed at the start."""
    tokens = torch.randint(0, before.spec.vocab_size, (2, min(64, before.spec.max_seq_len)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float((before(tokens).logits_BTV - after(tokens).logits_BTV).abs().max())


def grow(source: Path, target: Path, what: str, make: Callable[[State, ModelSpec, Checkpoint], upcycle.Upcycled], **options: Any) -> Result:
    """Upcycling, MoE-fication and expansion; says how far the start is from the model before."""
    check_target(target)
    with open_checkpoint(source) as opened:
        state = opened.state()
        new = make(state, opened.spec, opened)
        gap = _start_gap(model_of(state, opened.spec), model_of(new.state, new.spec))
        save(target, opened, new.spec, new.state, lineage_of(opened, what, options=options, start_gap=gap))
        return {
            "ok": True, "dir": str(target), "before": kind_of(opened.spec), "after": kind_of(new.spec), "is_exact": new.is_exact, "start_logit_gap": gap,
            "num_parameters": sum(v.numel() for v in new.state.values()),
        }  # fmt: skip


def upcycled(source: Path, target: Path, *, experts: int, top_k: int, method: str, others: Sequence[Path] = (), seed: int = 0) -> Result:
    """``method``: copy, noise:0.01, drop:0.5, virtual-group:2, or btx with ``others``. Raises ConfigError."""
    kind, _, value = method.partition(":")

    def make(state: State, spec: ModelSpec, _: Checkpoint) -> upcycle.Upcycled:
        match kind:
            case "copy":
                return upcycle.upcycle(state, spec, experts, top_k, seed=seed)
            case "noise":
                return upcycle.upcycle(state, spec, experts, top_k, noise=_number(value or "0.01", method), seed=seed)
            case "drop":
                return upcycle.drop_upcycle(state, spec, experts, top_k, ratio=_number(value or "0.5", method), seed=seed)
            case "virtual-group":
                return upcycle.virtual_groups(state, spec, experts, int(_number(value or str(top_k), method)), seed=seed)
            case "btx":
                if not others:
                    raise ConfigError("btx mixes models that were trained apart; give them with --with DIR")
                return upcycle.branch_train_mix([state, *(state_of_same_shape(o, spec) for o in others)], spec, top_k, seed=seed)
        raise ConfigError(f"method: expected copy, noise:S, drop:R, virtual-group:G or btx, got {method!r}")

    return grow(source, target, "upcycle", make, method=method, experts=experts, top_k=top_k, others=[str(o) for o in others])


def _number(text: str, method: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"method: expected a number of 0 or more after the colon, got {method!r}")
    return value


def moefied(
    source: Path, target: Path, *, experts: int, active: int, cluster: str, shared: int | None, texts: Sequence[str], seed: int = 0
) -> Result:
    def make(state: State, spec: ModelSpec, opened: Checkpoint) -> upcycle.Upcycled:
        calibration = None
        if texts:
            tokenizer = opened.tokenizer()
            train, _ = text_of.split(texts, opened.manifest.data, tokenizer)
            calibration = calibration_of(model_of(state, spec), joined([t[:200_000] for t in train.values()]), opened.manifest.data.seq_len)
        return upcycle.moefy(state, spec, experts, active, calibration, cluster=cluster, shared=shared, seed=seed)

    return grow(source, target, "moefy", make, experts=experts, active=active, cluster=cluster)


def expanded(source: Path, target: Path, *, factor: int, keep_chosen: bool, noise: float, seed: int = 0) -> Result:
    return grow(
        source, target, "expand", lambda state, spec, _: upcycle.expand(state, spec, factor, keep_chosen=keep_chosen, noise=noise, seed=seed), factor=factor
    )  # fmt: skip
