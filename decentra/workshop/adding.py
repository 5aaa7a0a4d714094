"""Experts trained, added, kept, forgotten and audited, and one text after the other. Checkpoint in, checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decentra.data.tokens import Tokens, joined
from decentra.data.windows import WindowSource
from decentra.errors import ConfigError
from decentra.hf.checkpoint import check_target, open_checkpoint
from decentra.hf.files import Weights, read_json
from decentra.modular import lasting, parts
from decentra.modular.parts import State
from decentra.modular.route import Card
from decentra.workshop import experts as made
from decentra.workshop import texts as text_of
from decentra.workshop.looking import card_of, losses, mean
from decentra.workshop.saving import NUM_WINDOWS, Result, Say, kind_of, known_experts, lineage_of, save
from decentra.workshop.training import model_of


def expert_train(
    source: Path,
    target: Path,
    texts: Sequence[str],
    *,
    name: str,
    steps: int,
    lr: float,
    seed: int,
    start: int,
    gate_steps: int = 0,
    say: Say,
) -> Result:
    """Train an expert beside a frozen model; its row tells its text from the embedded domains' (as far as they are not its own)."""
    check_target(target)
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        train, held_out = text_of.split(texts, opened.manifest.data, tokenizer)
        state, seq_len = opened.state(), opened.manifest.data.seq_len
        alone = parts.spec_with(opened.spec, 1)
        before = mean(losses(model_of(parts.select(state, [start]), alone), held_out, seq_len, NUM_WINDOWS))
        public = text_of.public(opened.manifest.data, tokenizer, without=texts)
        text = joined(list(train.values()))
        expert = made.train_expert(
            state, opened.spec, text, name=name, steps=steps, seq_len=seq_len, start=start, lr=lr, seed=seed, public=public, say=say
        )
        trained = parts.select(parts.insert(parts.select(state, [start]), expert.part), [1])
        after = mean(losses(model_of(trained, alone), held_out, seq_len, NUM_WINDOWS))
        expert.about.update({"texts": list(train), "loss_before": before, "loss_after": after})
        if gate_steps:
            gate = made.train_gate(
                state, opened.spec, expert.part, text, steps=gate_steps, seq_len=seq_len, seed=seed, start=start, say=say
            )
            expert = replace(expert, gate_LD=gate)
        made.save_expert(target, expert)
        return {"ok": True, "dir": str(target)} | expert.about


def expert_card(source: Path, target: Path, texts: Sequence[str], *, number: int, name: str) -> Result:
    """A model's own expert as one that can be carried, with the card of a text that it is for: routers by cards need one of each."""
    check_target(target)
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        train, _ = text_of.split(texts, opened.manifest.data, tokenizer)
        state = opened.state()
        frozen = model_of(parts.select(state, [number]), parts.spec_with(opened.spec, 1))
        text, seq_len, part = joined(list(train.values())), opened.manifest.data.seq_len, parts.extract(state, number)
        card = card_of(frozen, text, seq_len)
        about = {"name": name, "base": made.base_digest(state), "texts": list(train), "start": number}
        made.save_expert(target, made.Expert(part, card, about))
        return {"ok": True, "dir": str(target), "num_tokens": card.num_tokens} | about


def expert_add(source: Path, target: Path, folders: Sequence[Path], *, any_base: bool) -> Result:
    check_target(target)
    with open_checkpoint(source) as opened:
        state, spec = opened.state(), opened.spec
        digest, cards = made.base_digest(state), {str(n): c for n, c in known_experts(opened.lineage).items()}
        public = str(opened.lineage.get("public_model") or digest)
        top_k = opened.lineage.get("public_top_k") or spec.num_experts_per_token
        for folder in folders:
            expert = made.load_expert(folder)
            state, spec = made.added(state, spec, expert, bases=() if any_base else (digest, public))
            cards[str(spec.num_experts - 1)] = {"about": expert.about, "sha256": made.part_digest(expert.part)}
        save(target, opened, spec, state, lineage_of(opened, "expert add", experts=cards, public_model=public, public_top_k=top_k))
        return {"ok": True, "dir": str(target), "kind": kind_of(spec), "experts": cards}


def expert_keep(
    source: Path, target: Path, numbers: Sequence[int], how: str = "expert keep", top_k: int | None = None, **more: Any
) -> Result:
    """The model with these experts only, numbered anew; everything about the others is gone from it."""
    check_target(target)
    with open_checkpoint(source) as opened:
        state = parts.select(opened.state(), numbers)
        spec = parts.spec_with(opened.spec, len(numbers), top_k)
        known = known_experts(opened.lineage)
        cards = {str(new): known[old] for new, old in enumerate(numbers) if old in known}
        lineage = lineage_of(opened, how, keeps=True, kept=list(numbers)) | {"experts": cards} | more
        save(target, opened, spec, state, lineage)
        return {"ok": True, "dir": str(target), "kind": kind_of(spec), "kept": list(numbers), "experts": cards}


def forget(source: Path, target: Path, *, experts: Sequence[int], owner: str | None, texts: Sequence[str] = ()) -> Result:
    """Experts out of a model, and a verdict: isolated, when hashes prove that what is left is the model that never had them; joint otherwise.

    ``texts``: what is to be forgotten and what is not; their losses before and after are measured, which is all that is known of a joint one.
    """
    check_target(target)
    with open_checkpoint(source) as opened:
        known, count, before = known_experts(opened.lineage), opened.spec.num_experts, opened.hashes
        gone = set(experts)
        if unknown := sorted(e for e in gone if not 0 <= e < count):
            raise ConfigError(f"expert {unknown[0]} is not there: this model has experts 0 to {count - 1}")
        if owner is not None:
            gone |= {n for n, card in known.items() if card["about"].get("name") == owner}
            if not gone:
                names = ", ".join(sorted(str(c["about"].get("name")) for c in known.values())) or "none"
                raise ConfigError(f"no expert of {owner!r} is in {source}; its lineage names {names}")
        if not gone:
            raise ConfigError("forget: no expert was named")
        left = [e for e in range(count) if e not in gone]
        if not left:
            raise ConfigError("forgetting every expert leaves no model")
        state = opened.state()
        doubt = _doubt(state, known, gone, left, str(opened.lineage.get("public_model")))
        top_k = opened.lineage.get("public_top_k")
        is_public = all(e not in known for e in left)
    mode = "joint" if doubt else "isolated"
    why = (
        f"{doubt}; what they saw may be elsewhere in the model, too: this is approximate"
        if doubt
        else "the model is bitwise the one that never had them"
    )
    original = int(top_k) if is_public and isinstance(top_k, int) and not doubt else None
    losses_before = _losses_of(source, texts) if texts else None
    result = expert_keep(source, target, left, "forget", original, forgotten=sorted(gone), mode=mode)
    with open_checkpoint(target) as after:
        result |= {"forgotten": sorted(gone), "mode": mode, "why": why, "files_before": before, "files_after": after.hashes}
    if losses_before is not None:
        result |= {"loss_before": losses_before, "loss_after": _losses_of(target, texts)}
    return result


def _losses_of(folder: Path, texts: Sequence[str]) -> dict[str, float]:
    """A model's loss on the part of each text that somebody may have trained on."""
    with open_checkpoint(folder) as opened:
        train, _ = text_of.split(texts, opened.manifest.data, opened.tokenizer())
        return losses(model_of(opened.state(), opened.spec), train, opened.manifest.data.seq_len, NUM_WINDOWS)


def _doubt(state: State, known: Mapping[int, Mapping[str, Any]], gone: set[int], left: Sequence[int], public: str) -> str:
    """Why it is not proven that only the experts that go knew what they know; empty when it is."""
    if strangers := sorted(e for e in gone if e not in known):
        return f"expert {strangers[0]} was not put in with 'expert add'"
    own = [e for e in range(len(left) + len(gone)) if e not in known]
    if not own or made.base_digest(parts.select(state, own)) != public:
        return "the public model is not as it was before experts were added: it, or its router, was trained since"
    for number in left:
        if number in known:
            card = known[number]
            if card["about"].get("base") != public:
                return f"expert {number} was trained beside another model than the public one"
            if made.part_digest(parts.extract(state, number)) != card.get("sha256"):
                return f"expert {number} is not as it was when it was added: it was trained since"
    return ""


def audit(source: Path, members: Sequence[str], others: Sequence[str]) -> Result:
    """Can texts that are said to be trained on be told from others? AUC of their losses: 0.5 is no trace."""
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        model = model_of(opened.state(), opened.spec)

        def each(lines: Sequence[str]) -> list[float]:
            found = []
            for line in lines:
                data = tokenizer.encode(line.encode(errors="replace"))[: opened.spec.max_seq_len]
                if len(data) > 1:
                    found.append(losses(model, {"": data}, len(data) - 1)[""])
            return found

        a, b = each(members), each(others)
        return {
            "ok": True,
            "auc": lasting.auc(a, b),
            "num_members": len(a),
            "num_others": len(b),
            "loss_members": sum(a) / len(a),
            "loss_others": sum(b) / len(b),
        }


def expert_lora(source: Path, adapter: Path, target: Path, *, name: str) -> Result:
    """A PEFT LoRA adapter of a dense model as an expert that can be added to it."""
    from decentra.modular.adapter import expert_from, scale_of

    check_target(target)
    with open_checkpoint(source) as opened:
        if opened.spec.num_experts != 1:
            raise ConfigError(f"{source} has {opened.spec.num_experts} experts; an adapter is of a dense model's FFN")
        scale = scale_of(read_json(adapter / "adapter_config.json"))
        with Weights(adapter, "adapter_model.safetensors") as weights:
            part = expert_from(opened.state(), {n: weights(n) for n in weights}, scale)
        about = {"name": name, "base": made.base_digest(opened.state()), "adapter": adapter.resolve().name, "start": 0}
        nothing = torch.zeros(opened.spec.num_layers, opened.spec.hidden_size)
        card = Card(nothing, torch.zeros(*nothing.shape, opened.spec.hidden_size), 0)
        made.save_expert(target, made.Expert(part, card, about))
        return {"ok": True, "dir": str(target)} | about


STRATEGIES = ("grow", "naive", "replay", "lwf", "ewc")


def continual(source: Path, target: Path, texts: Sequence[str], *, strategy: str, steps: int, lr: float, seed: int, say: Say) -> Result:
    """One text after the other, in their order; the matrix of losses, and what was kept (``lasting.Transfer``)."""
    from decentra.workshop.training import Plan, ewc, lwf, train

    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    check_target(target)
    with open_checkpoint(source) as opened:
        tokenizer = opened.tokenizer()
        stream, held_out = text_of.split(texts, opened.manifest.data, tokenizer)
        seq_len, state, spec = opened.manifest.data.seq_len, opened.state(), opened.spec
        model = model_of(state, spec)
        matrix = [list(losses(model, held_out, seq_len, NUM_WINDOWS).values())]
        seen: list[Tokens] = []
        cards: dict[str, Any] = {str(n): c for n, c in known_experts(opened.lineage).items()}
        for name, text in stream.items():
            source_of = WindowSource([text], seq_len, seed, name)
            plan = Plan(steps, frozenset(n for n, _ in model.named_parameters()), lr=lr, seed=seed)
            guards = []
            if strategy == "grow":
                public = joined(seen) if seen else text_of.public(opened.manifest.data, tokenizer, without=texts)
                expert = made.train_expert(
                    state, spec, text, name=name, steps=steps, seq_len=seq_len, lr=lr, seed=seed, public=public, say=say
                )
                state, spec = made.added(state, spec, expert)
                cards[str(spec.num_experts - 1)] = {"about": expert.about, "sha256": made.part_digest(expert.part)}
                model = model_of(state, spec)
                model.routing = made.evidence_of(model)
            else:
                if strategy == "replay" and seen:
                    source_of = WindowSource([text], seq_len, seed, name, seen, 0.5)
                if strategy == "lwf":
                    guards = [lwf(model_of(state, spec), WindowSource([text], seq_len, seed, "lwf"))]
                if strategy == "ewc" and seen:
                    guards = [ewc(model, WindowSource(seen, seq_len, seed, "ewc"))]
                train(model, source_of, plan, guards)
                state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            seen.append(text)
            matrix.append(list(losses(model, held_out, seq_len, NUM_WINDOWS).values()))
            say(f"after {name}: " + ", ".join(f"{d} {value:.3f}" for d, value in zip(stream, matrix[-1], strict=True)))
        found = lasting.transfer(matrix)
        save(target, opened, spec, state, lineage_of(opened, f"continual {strategy}", stream=list(stream), experts=cards))
        return {
            "ok": True, "dir": str(target), "strategy": strategy, "stream": list(stream), "loss_matrix": matrix, "backward_transfer": found.backward,
            "forward_transfer": found.forward, "loss": found.final, "router": "evidence" if strategy == "grow" else "own",
        }  # fmt: skip
