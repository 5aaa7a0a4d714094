"""A model out of another architecture: Hugging Face in and out, upcycling, MoE-fication, more experts. Checkpoint in, checkpoint out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decentra.config import ModelSpec
from decentra.data.tokens import joined
from decentra.errors import ConfigError, DecentraError
from decentra.hf.checkpoint import Checkpoint, check_target, open_checkpoint, save_checkpoint
from decentra.hf.convert import parameter_shapes, stock_class
from decentra.model.decoder import Decoder
from decentra.modular import upcycle
from decentra.modular.parts import State
from decentra.modules import module_of_parameter
from decentra.workshop import texts as text_of
from decentra.workshop.looking import calibration_of
from decentra.workshop.saving import Result, check_same_function, kind_of, lineage_of, with_spec
from decentra.workshop.training import model_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(source: Path, target: Path, how: str, dtype: str = "fp32", *, per_module: bool = False) -> Result:
    """``import`` and ``export`` are this: read a folder, write one that decentra and transformers both load, tensor by tensor."""
    check_target(target)
    with open_checkpoint(source) as opened:
        if how == "export":
            stock_class(opened.spec)  # said before anything is written; other commands keep what decentra alone computes
        manifest = with_spec(opened.manifest, opened.spec)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(opened.names, key=module_of_parameter) if per_module else opened.names:
                yield name, opened(name)

        lineage = lineage_of(opened, how, keeps=True)
        card = save_checkpoint(target, manifest, tensors(), lineage, dtype=DTYPES[dtype], tokenizer=source, per_module=per_module)
        num = sum(torch.Size(shape).numel() for shape in opened.shapes.values())
        return {"ok": True, "dir": str(target), "kind": kind_of(opened.spec), "num_parameters": num, "files": card["files"]}


def _start_gap(before: Decoder, after: Decoder) -> float:
    """Largest logit difference on some tokens: what an operation changed at the start."""
    tokens = torch.randint(0, before.spec.vocab_size, (2, min(64, before.spec.max_seq_len)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float((before(tokens).logits_BTV - after(tokens).logits_BTV).abs().max())


Piece = Callable[[State, ModelSpec, int], upcycle.Upcycled]  # one layer, or what is in none; its spec; its seed
FREE_SHARE = 0.5  # of free memory that two whole models may take when they are compared


def grow(
    source: Path, target: Path, what: str, prepare: Callable[[Checkpoint], Piece], *, seed: int, free_bytes: int, **options: Any
) -> Result:
    """Upcycling, MoE-fication and expansion, a layer at a time: a model larger than memory passes through.

    Where there is room for both models, says how far the start is from the model before: the largest difference of a logit. ``free_bytes``: of memory.
    """
    check_target(target)
    with open_checkpoint(source) as opened:
        make = prepare(opened)
        pieces = _pieces(opened.names)
        first = make({name: opened(name).float() for name in pieces[0]}, opened.spec, seed)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from first.state.items()
            for number, names in enumerate(pieces[1:], 1):
                yield from make({name: opened(name).float() for name in names}, opened.spec, seed + number * SEED_STRIDE).state.items()

        lineage = lineage_of(opened, what, options=options | {"seed": seed})
        save_checkpoint(target, with_spec(opened.manifest, first.spec), tensors(), lineage, tokenizer=source)
        sizes = [sum(torch.Size(s).numel() for s in parameter_shapes(spec).values()) for spec in (opened.spec, first.spec)]
        gap = why = None
        if 4 * sum(sizes) > FREE_SHARE * free_bytes:
            why = f"two models of {4 * sum(sizes) >> 20} MiB together were not compared: {free_bytes >> 20} MiB of memory are free"
        else:
            try:
                with open_checkpoint(target) as after:
                    gap = _start_gap(model_of(opened.state(), opened.spec), model_of(after.state(), first.spec))
            except (DecentraError, RuntimeError, MemoryError) as error:  # the model is made and whole; only the comparison failed
                why = f"the models could not be compared: {error}"[:300]
        return {
            "ok": True, "dir": str(target), "before": kind_of(opened.spec), "after": kind_of(first.spec), "is_exact": first.is_exact,
            "start_logit_gap": gap, "why_no_gap": why, "num_parameters": sizes[1],
        }  # fmt: skip


SEED_STRIDE = 1_000_003  # so that no layer draws what another one draws, with seeds that people choose


def _pieces(names: Iterable[str]) -> list[list[str]]:
    """Names of each layer, and last those of none."""
    layers: dict[int, list[str]] = {}
    for name in names:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        layers.setdefault(int(found[1]) if found else -1, []).append(name)
    return [layers[n] for n in sorted(layers, key=lambda n: (n < 0, n))]


def upcycled(
    source: Path, target: Path, *, experts: int, top_k: int, method: str, others: Sequence[Path] = (), seed: int = 0, free_bytes: int
) -> Result:
    """``method``: copy, noise:0.01, drop:0.5, virtual-group:2, or btx with ``others``. Raises ConfigError."""
    kind, _, value = method.partition(":")

    def make(state: State, spec: ModelSpec, seed: int) -> upcycle.Upcycled:
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
                if not opened:
                    raise ConfigError("btx mixes models that were trained apart; give them with --with DIR")
                states = [{name: other(name).float() for name in state} for other in opened]
                return upcycle.branch_train_mix([state, *states], spec, top_k, seed=seed)
        raise ConfigError(f"method: expected copy, noise:S, drop:R, virtual-group:G or btx, got {method!r}")

    def prepare(first: Checkpoint) -> Piece:
        for other in others:
            check_same_function(other, first)
            opened.append(stack.enter_context(open_checkpoint(other)))
        return make

    opened: list[Checkpoint] = []
    with ExitStack() as stack:
        return grow(
            source, target, "upcycle", prepare, seed=seed, free_bytes=free_bytes, method=method, experts=experts, top_k=top_k,
            others=[str(o) for o in others],
        )  # fmt: skip


def _number(text: str, method: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"method: expected a number of 0 or more after the colon, got {method!r}")
    return value


def moefied(
    source: Path, target: Path, *, experts: int, active: int, cluster: str, shared: int | None, texts: Sequence[str], seed: int = 0, free_bytes: int
) -> Result:  # fmt: skip
    """With texts the dense model reads them first, in memory."""

    def prepare(opened: Checkpoint) -> Piece:
        calibration = None
        if texts:
            train, _ = text_of.split(texts, opened.manifest.data, opened.tokenizer())
            text = joined([t[:200_000] for t in train.values()])
            calibration = calibration_of(model_of(opened.state(), opened.spec), text, opened.manifest.data.seq_len)
        return lambda state, spec, seed: upcycle.moefy(state, spec, experts, active, calibration, cluster=cluster, shared=shared, seed=seed)

    return grow(source, target, "moefy", prepare, seed=seed, free_bytes=free_bytes, experts=experts, active=active, cluster=cluster)


def expanded(source: Path, target: Path, *, factor: int, keep_chosen: bool, noise: float, seed: int = 0, free_bytes: int) -> Result:
    def prepare(_: Checkpoint) -> Piece:
        return lambda state, spec, seed: upcycle.expand(state, spec, factor, keep_chosen=keep_chosen, noise=noise, seed=seed)

    return grow(source, target, "expand", prepare, seed=seed, free_bytes=free_bytes, factor=factor)
