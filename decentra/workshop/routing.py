"""What a model does on text, who serves it, and routers trained or distilled. Checkpoint in, what was seen or a checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decentra.config import ModelSpec
from decentra.data.tokens import Tokens, tensor_of
from decentra.errors import ConfigError
from decentra.hf.checkpoint import check_target, open_checkpoint
from decentra.model.decoder import Decoder
from decentra.modular import route
from decentra.workshop import experts as made
from decentra.workshop import texts as text_of
from decentra.workshop.looking import losses, mean, routing_of
from decentra.workshop.saving import NUM_WINDOWS, Result, Say, kind_of, lineage_of, save
from decentra.workshop.training import model_of


def inspect(source: Path, texts: Sequence[str]) -> Result:
    with open_checkpoint(source) as opened:
        spec = opened.spec
        result: Result = {
            "ok": True, "dir": str(source), "kind": kind_of(spec), "num_parameters": sum(torch.Size(s).numel() for s in opened.shapes.values()),
            "spec": spec.model_dump(), "lineage": opened.lineage,
        }  # fmt: skip
        if texts:
            tokenizer = opened.tokenizer()
            _, held_out = text_of.split(texts, opened.manifest.data, tokenizer)
            model = model_of(opened.state(), spec)
            per_domain = losses(model, held_out, opened.manifest.data.seq_len, NUM_WINDOWS)
            result |= {"loss_per_domain": per_domain, "loss": mean(per_domain)} | routing_of(model, held_out, opened.manifest.data.seq_len)
        return result


def routed(source: Path, text: str, router: str, experts: Sequence[Path]) -> Result:
    """Which expert serves each byte of a text, and how well the text is predicted."""
    if router not in made.ROUTERS:
        raise ConfigError(f"router: expected one of {', '.join(made.ROUTERS)}, got {router!r}")
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        spec, data = opened.spec, text.encode(errors="replace")
        numbers = tokenizer.encode(data)
        if len(numbers) > spec.max_seq_len:  # cut the text, so that what is shown is what was read
            data = (
                tokenizer.decode(tensor_of(numbers)[: spec.max_seq_len].tolist()).encode() if tokenizer.digest else data[: spec.max_seq_len]
            )
            numbers = tokenizer.encode(data)[: spec.max_seq_len]
        if len(numbers) < 2:
            raise ConfigError("the text is too short; give two characters or more")
        model = model_of(opened.state(), spec)
        model.routing = made.evidence_of(model) if router == "evidence" else _with_cards(router, experts, spec, model, numbers)
        chosen: list[Tensor] = []
        tokens = tensor_of(numbers)[None]
        with torch.inference_mode(), _noting(model, chosen):
            output = model(tokens)
        told = output.logits_BTV[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        shares_TE = torch.stack(chosen).mean(0)
        return {
            "ok": True, "router": router, "loss": float(-told.mean()), "expert_per_byte": tokenizer.spread(data, shares_TE.argmax(-1).tolist()),
            "share_per_expert": shares_TE.mean(0).tolist(), "text": data.decode(errors="replace"),
        }  # fmt: skip


def _with_cards(router: str, folders: Sequence[Path], spec: ModelSpec, model: Decoder, text: Tokens) -> Any:
    if router == "own":
        return None
    if len(folders) != spec.num_experts:
        raise ConfigError(
            f"router {router} needs a card of each of the {spec.num_experts} experts, got {len(folders)}; give them with --expert DIR, in order"
        )
    experts = [made.load_expert(folder) for folder in folders]
    cards, shape = [expert.card for expert in experts], (spec.num_layers, spec.hidden_size)
    if wrong := [c for c in cards if tuple(c.mean_LD.shape) != shape]:
        raise ConfigError(f"a card is of a model of {tuple(wrong[0].mean_LD.shape)} layers and hidden size, this one has {shape}")
    if router == "phatgoose":
        if all(expert.gate_LD is None for expert in experts):
            raise ConfigError(
                f"none of the experts has a gate, {folders[0]} for one; 'expert train --gate 100' trains it, the public model needs none"
            )
        gates = [torch.zeros(shape) if expert.gate_LD is None else expert.gate_LD for expert in experts]
        if wrong_gates := [str(folder) for folder, gate in zip(folders, gates, strict=True) if tuple(gate.shape) != shape]:
            raise ConfigError(f"{wrong_gates[0]}: its gate is of another model; expected {shape[0]} layers and hidden size {shape[1]}")
        return route.Gated(torch.stack(gates, 1))
    if router == "document":
        return made.document_routing(model, cards, text)[0]
    return made.routing(router, cards)


class _noting:
    """Routing weights [T, E] of every layer of a forward."""

    def __init__(self, model: Decoder, into: list[Tensor]) -> None:
        self._model, self._into = model, into

    def __enter__(self) -> None:
        into, kept = self._into, self._model.routing
        self._kept = kept
        model = self._model

        class Noting:
            def start(self, tokens_BT: Tensor, num_before: int) -> None:
                if kept is not None:
                    kept.start(tokens_BT, num_before)
                    into.clear()  # evidence runs the model itself

            def logits(self, layer: int, x_TD: Tensor) -> Tensor:
                own = None if kept is None else kept.logits(layer, x_TD)
                rows: Any = model.model.layers[layer]
                logits = x_TD.float() @ rows.mlp.gate.weight.T if own is None else own
                top = logits.softmax(-1).topk(rows.mlp.num_chosen, -1)
                weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
                into.append(weights)
                return logits

        model.routing = Noting()

    def __exit__(self, *_: object) -> None:
        self._model.routing = self._kept


def tuned(source: Path, target: Path, texts: Sequence[str], *, steps: int, lr: float, seed: int, say: Say) -> Result:
    """Router rows trained on public text, everything else frozen: after experts were added or swarm peers held a part each."""
    check_target(target)
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        train, held_out = text_of.split(texts, opened.manifest.data, tokenizer)
        seq_len, state = opened.manifest.data.seq_len, opened.state()
        before = mean(losses(model_of(state, opened.spec), held_out, seq_len, NUM_WINDOWS))
        new = made.tune_router(state, opened.spec, list(train.values()), steps=steps, seq_len=seq_len, lr=lr, seed=seed, say=say)
        after = mean(losses(model_of(new, opened.spec), held_out, seq_len, NUM_WINDOWS))
        save(target, opened, opened.spec, new, lineage_of(opened, "tune router", keeps=True, steps=steps))
        return {"ok": True, "dir": str(target), "loss_before": before, "loss_after": after}


def distilled(
    source: Path, target: Path, texts: Sequence[str], *, router: str, experts: Sequence[Path], steps: int, seed: int, say: Say
) -> Result:
    """A runtime routing baked into linear rows, which any Qwen3-MoE runtime follows; how much of it they hold is said as KL on held-out text."""
    from decentra.model.decoder import Routing

    check_target(target)
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        train, held_out = text_of.split(texts, opened.manifest.data, tokenizer)
        seq_len, state, spec = opened.manifest.data.seq_len, opened.state(), opened.spec
        model = model_of(state, spec)
        first = next(iter(held_out.values()))
        teacher: Routing | None = (
            made.evidence_of(model) if router == "evidence" else _with_cards(router, experts, spec, model, first[: spec.max_seq_len])
        )
        if teacher is None:
            raise ConfigError("distil: the model's own router is linear already; name another one with --router")
        say(f"fitting rows to {router}")
        rows, _ = made.distil(model, teacher, list(train.values()), seq_len, steps=steps, seed=seed)
        left = made.divergence(model, teacher, rows, list(held_out.values()), seq_len)
        model.routing = teacher
        before = mean(losses(model, held_out, seq_len, NUM_WINDOWS))
        new = made.with_rows(state, rows)
        after = mean(losses(model_of(new, spec), held_out, seq_len, NUM_WINDOWS))
        save(target, opened, spec, new, lineage_of(opened, "distil router", keeps=True, router=router, kl=left))
        return {"ok": True, "dir": str(target), "router": router, "kl": left, "loss_with_router": before, "loss_with_rows": after}
