"""Checkpoint in, checkpoint out: every modular operation as one call that says what it did. Folders and texts; the numbers are ``modular``'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decentra.config import Manifest, ModelSpec
from decentra.data.windows import WindowSource
from decentra.errors import ConfigError
from decentra.hf.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from decentra.model.decoder import Decoder
from decentra.modular import align, combine, lasting, parts, soup, upcycle
from decentra.modular.combine import Recipe
from decentra.modular.parts import State
from decentra.workshop import experts as made
from decentra.workshop import texts as text_of
from decentra.workshop.looking import calibration_of, losses, mean, routing_of
from decentra.workshop.training import model_of

Say = Callable[[str], None]
Result = dict[str, Any]

NUM_WINDOWS = 64
SHAPE_KEYS = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "expert_hidden_size", "num_experts")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def with_spec(manifest: Manifest, spec: ModelSpec, name: str | None = None) -> Manifest:
    """The manifest of a model that is no run's any more."""
    per_peer = min(manifest.placement.experts_per_peer, spec.num_experts)
    placement = manifest.placement.model_copy(update={"experts_per_peer": per_peer})
    return manifest.model_copy(update={"model": spec, "genesis": {}, "placement": placement, "name": (name or manifest.name)[:64]})


def _lineage(source: Checkpoint, how: str, **more: Any) -> Result:
    """What a model was made of; a model of models keeps their stories."""
    return {
        "made_by": how,
        "from": str(source.folder),
        "from_files": source.hashes,
        "parents": source.lineage,
        "at": int(time.time()),
    } | more


def _save(
    target: Path, source: Checkpoint, spec: ModelSpec, state: Mapping[str, Tensor], lineage: Result, dtype: torch.dtype = torch.float32
) -> None:
    save_checkpoint(target, with_spec(source.manifest, spec), state.items(), lineage, dtype=dtype)


def _kind(spec: ModelSpec) -> str:
    return "dense" if spec.num_experts == 1 else f"{spec.num_experts} experts, {spec.num_experts_per_token} per token"


# ---------------------------------------------------------------- Hugging Face


def convert(source: Path, target: Path, how: str, dtype: str = "fp32", keep_extra: bool = True) -> Result:
    """``import`` and ``export`` are this: read a folder, write one that decentra and transformers both load, tensor by tensor."""
    with open_checkpoint(source) as opened:
        manifest = with_spec(opened.manifest, opened.spec)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in opened.names:
                yield name, opened(name)

        card = save_checkpoint(target, manifest, tensors(), _lineage(opened, how), dtype=DTYPES[dtype])
        copied = _copy_extra(source, target) if keep_extra else []
        num = sum(torch.Size(shape).numel() for shape in opened.shapes.values())
        return {"ok": True, "dir": str(target), "kind": _kind(opened.spec), "num_parameters": num, "files": card["files"], "copied": copied}


def _copy_extra(source: Path, target: Path) -> list[str]:
    from decentra.hf.checkpoint import TOKENIZER_FILES

    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        (target / name).write_bytes((source / name).read_bytes())
    return copied


# ---------------------------------------------------------------- more experts


def _start_gap(before: Decoder, after: Decoder) -> float:
    """Largest logit difference on some tokens: what an operation changed at the start."""
    tokens = torch.randint(0, before.spec.vocab_size, (2, min(64, before.spec.max_seq_len)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float((before(tokens).logits_BTV - after(tokens).logits_BTV).abs().max())


def grow(source: Path, target: Path, what: str, make: Callable[[State, ModelSpec, Checkpoint], upcycle.Upcycled], **options: Any) -> Result:
    """Upcycling, MoE-fication and expansion; says how far the start is from the model before."""
    with open_checkpoint(source) as opened:
        state = opened.state()
        new = make(state, opened.spec, opened)
        gap = _start_gap(model_of(state, opened.spec), model_of(new.state, new.spec))
        _save(target, opened, new.spec, new.state, _lineage(opened, what, options=options, start_gap=gap))
        return {
            "ok": True, "dir": str(target), "before": _kind(opened.spec), "after": _kind(new.spec), "is_exact": new.is_exact, "start_logit_gap": gap,
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
                return upcycle.branch_train_mix([state, *(_same_shape(o, spec) for o in others)], spec, top_k, seed=seed)
        raise ConfigError(f"method: expected copy, noise:S, drop:R, virtual-group:G or btx, got {method!r}")

    return grow(source, target, "upcycle", make, method=method, experts=experts, top_k=top_k, others=[str(o) for o in others])


def _number(text: str, method: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"method: expected a number after the colon, got {method!r}") from None


def _same_shape(folder: Path, spec: ModelSpec) -> State:
    with open_checkpoint(folder) as other:
        for key, ours in spec.model_dump().items():
            theirs = getattr(other.spec, key)
            if theirs != ours and key in (
                "vocab_size",
                "hidden_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "expert_hidden_size",
                "num_experts",
            ):
                raise ConfigError(f"{folder}: {key} is {theirs}, the first model's {ours}; they are of different architectures")
        return other.state()


def moefied(
    source: Path, target: Path, *, experts: int, active: int, cluster: str, shared: int | None, texts: Sequence[str], seed: int = 0
) -> Result:
    def make(state: State, spec: ModelSpec, opened: Checkpoint) -> upcycle.Upcycled:
        calibration = None
        if texts:
            text_of.check_bytes(spec.vocab_size)
            train, _ = text_of.split(texts, opened.manifest.data)
            calibration = calibration_of(
                model_of(state, spec), b"\n".join(t[:200_000] for t in train.values()), opened.manifest.data.seq_len
            )
        return upcycle.moefy(state, spec, experts, active, calibration, cluster=cluster, shared=shared, seed=seed)

    return grow(source, target, "moefy", make, experts=experts, active=active, cluster=cluster)


def expanded(source: Path, target: Path, *, factor: int, keep_chosen: bool, noise: float, seed: int = 0) -> Result:
    return grow(
        source, target, "expand", lambda state, spec, _: upcycle.expand(state, spec, factor, keep_chosen=keep_chosen, noise=noise, seed=seed), factor=factor
    )  # fmt: skip


# ---------------------------------------------------------------- merging


def merge(folders: Sequence[Path], target: Path, recipe: Recipe, base: Path | None, *, rebasin: bool = False) -> Result:
    """Models of one architecture into one, a parameter at a time; ``rebasin`` puts their neurons and experts in the first one's order before (in memory)."""
    opened = [open_checkpoint(folder) for folder in folders]
    origin = None if base is None else open_checkpoint(base)
    try:
        first = opened[0]
        for other in [*opened[1:], *([] if origin is None else [origin])]:
            if other.shapes != first.shapes:
                differing = next(k for k, v in first.spec.model_dump().items() if getattr(other.spec, k) != v)
                raise ConfigError(
                    f"{other.folder}: {differing} is {getattr(other.spec, differing)}, {first.folder} has {getattr(first.spec, differing)};"
                    " models of different architectures do not merge"
                )
        picks: list[combine.Pick] = list(opened)
        if rebasin:
            states = [first.state(), *(align.aligned(o.state(), first.state()) for o in opened[1:])]
            picks = [s.__getitem__ for s in states]
        merged = combine.merged(first.shapes, picks, origin, recipe)
        lineage = {
            "made_by": "merge",
            "method": recipe.method,
            "models": [_lineage(o, "ingredient") for o in opened],
            "base": str(base) if base else None,
        }
        save_checkpoint(target, with_spec(first.manifest, first.spec), merged, lineage)
    finally:
        for one in [*opened, *([] if origin is None else [origin])]:
            one.weights.__exit__()
    return {"ok": True, "dir": str(target), "method": recipe.method, "num_models": len(folders), "kind": _kind(first.spec)}


def cooked(folders: Sequence[Path], target: Path, texts: Sequence[str], say: Say) -> Result:
    """A greedy soup by held-out loss."""
    opened = [open_checkpoint(folder) for folder in folders]
    text_of.check_bytes(opened[0].spec.vocab_size)
    states = [o.state() if n == 0 else _same_shape(o.folder, opened[0].spec) for n, o in enumerate(opened)]
    _, held_out = text_of.split(texts, opened[0].manifest.data)
    spec, seq_len = opened[0].spec, opened[0].manifest.data.seq_len

    def judge(state: State) -> float:
        return mean(losses(model_of(state, spec), held_out, seq_len, NUM_WINDOWS))

    chosen = soup.greedy_soup(states, judge, say)
    path, barrier = (
        soup.barrier(states[chosen.ingredients[0]], states[chosen.ingredients[-1]], judge) if len(chosen.ingredients) > 1 else ([], 0.0)
    )
    _save(
        target,
        opened[0],
        spec,
        chosen.state,
        {"made_by": "soup", "models": [str(folders[i]) for i in chosen.ingredients], "loss": chosen.loss},
    )
    for one in opened:
        one.weights.__exit__()
    return {
        "ok": True, "dir": str(target), "ingredients": [str(folders[i]) for i in chosen.ingredients], "loss": chosen.loss,
        "tried": [{"model": str(folders[i]), "loss": loss} for i, loss in chosen.tried], "barrier": barrier, "path": path,
    }  # fmt: skip


# ---------------------------------------------------------------- experts as parts


def expert_train(
    source: Path, target: Path, texts: Sequence[str], *, name: str, steps: int, lr: float, seed: int, start: int, say: Say
) -> Result:
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, held_out = text_of.split(texts, opened.manifest.data)
        state, seq_len = opened.state(), opened.manifest.data.seq_len
        before = mean(losses(model_of(state, opened.spec), held_out, seq_len, NUM_WINDOWS))
        text = b"\n".join(train.values())
        expert = made.train_expert(
            state, opened.spec, text, name=name, steps=steps, seq_len=seq_len, start=start, lr=lr, seed=seed, say=say
        )
        spec = parts.spec_with(opened.spec, 1)
        alone = parts.select(parts.insert(parts.select(state, [start]), expert.part), [1])
        after = mean(losses(model_of(alone, spec), held_out, seq_len, NUM_WINDOWS))
        expert.about.update({"texts": list(train), "loss_before": before, "loss_after": after, "base_dir": str(source)})
        made.save_expert(target, expert)
        return {"ok": True, "dir": str(target)} | expert.about


def expert_add(source: Path, target: Path, folders: Sequence[Path], *, any_base: bool) -> Result:
    with open_checkpoint(source) as opened:
        state, spec = opened.state(), opened.spec
        digest, cards = made.base_digest(state), dict(opened.lineage.get("experts") or {})
        base = str(opened.lineage.get("public_model") or digest)
        for folder in folders:
            expert = made.load_expert(folder)
            state, spec = made.added(state, spec, expert, check_base=None if any_base else base)
            cards[str(spec.num_experts - 1)] = {"about": expert.about, "folder": str(folder)}
        _save(target, opened, spec, state, _lineage(opened, "expert add", experts=cards, public_model=base))
        return {"ok": True, "dir": str(target), "kind": _kind(spec), "experts": cards}


def expert_keep(source: Path, target: Path, numbers: Sequence[int], how: str = "expert keep") -> Result:
    """The model with these experts only, numbered anew; everything about the others is gone from it."""
    with open_checkpoint(source) as opened:
        state = parts.select(opened.state(), numbers)
        spec = parts.spec_with(opened.spec, len(numbers))
        known = dict(opened.lineage.get("experts") or {})
        cards = {str(new): known[str(old)] for new, old in enumerate(numbers) if str(old) in known}
        lineage = {
            "made_by": how,
            "from": str(source),
            "kept": list(numbers),
            "experts": cards,
            "public_model": opened.lineage.get("public_model"),
        }
        _save(target, opened, spec, state, lineage)
        return {"ok": True, "dir": str(target), "kind": _kind(spec), "kept": list(numbers), "experts": cards}


def forget(source: Path, target: Path, *, experts: Sequence[int], owner: str | None) -> Result:
    """Isolated experts out: exact, since nothing else of the model was trained on their text. Says the hashes before and after."""
    with open_checkpoint(source) as opened:
        known = dict(opened.lineage.get("experts") or {})
        gone = set(experts)
        if owner is not None:
            gone |= {int(n) for n, card in known.items() if card.get("about", {}).get("name") == owner}
            if not gone:
                raise ConfigError(
                    f"no expert of {owner!r} is in {source}; its lineage names {', '.join(sorted(c['about']['name'] for c in known.values())) or 'none'}"
                )
        joint = sorted(e for e in gone if str(e) not in known)
        left = [e for e in range(opened.spec.num_experts) if e not in gone]
        if not left:
            raise ConfigError("forgetting every expert leaves no model")
        before = opened.hashes
    result = expert_keep(source, target, left, "forget")
    mode = "isolated" if not joint else "joint"
    why = (
        "the model is bitwise the one that never had them" if mode == "isolated"
        else f"experts {joint} were not added with 'expert add': what they saw may be in the trunk and the router, too; this is approximate"
    )  # fmt: skip
    with open_checkpoint(target) as after:
        return result | {"forgotten": sorted(gone), "mode": mode, "why": why, "files_before": before, "files_after": after.hashes}


def audit(source: Path, members: Sequence[str], others: Sequence[str]) -> Result:
    """Can texts that are said to be trained on be told from others? AUC of their losses: 0.5 is no trace."""
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        model = model_of(opened.state(), opened.spec)

        def each(lines: Sequence[str]) -> list[float]:
            found = []
            for line in lines:
                data = line.encode()[: opened.spec.max_seq_len]
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


# ---------------------------------------------------------------- looking


def inspect(source: Path, texts: Sequence[str]) -> Result:
    with open_checkpoint(source) as opened:
        spec = opened.spec
        result: Result = {
            "ok": True, "dir": str(source), "kind": _kind(spec), "num_parameters": sum(torch.Size(s).numel() for s in opened.shapes.values()),
            "spec": spec.model_dump(), "lineage": opened.lineage,
        }  # fmt: skip
        if texts:
            text_of.check_bytes(spec.vocab_size)
            _, held_out = text_of.split(texts, opened.manifest.data)
            model = model_of(opened.state(), spec)
            per_domain = losses(model, held_out, opened.manifest.data.seq_len, NUM_WINDOWS)
            result |= {"loss_per_domain": per_domain, "loss": mean(per_domain)} | routing_of(model, held_out, opened.manifest.data.seq_len)
        return result


def routed(source: Path, text: str, router: str, experts: Sequence[Path]) -> Result:
    """Which expert serves each byte of a text, and how well the text is predicted."""
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        spec, data = opened.spec, text.encode()[: opened.spec.max_seq_len]
        if len(data) < 2:
            raise ConfigError("the text is too short; give two characters or more")
        model = model_of(opened.state(), spec)
        cards = [made.load_expert(folder).card for folder in experts]
        model.routing = made.evidence_of(model) if router == "evidence" else _with_cards(router, cards, spec, model, data)
        chosen: list[Tensor] = []
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[None]
        with torch.inference_mode(), _noting(model, chosen):
            output = model(tokens)
        told = output.logits_BTV[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        shares_TE = torch.stack(chosen).mean(0)
        return {
            "ok": True, "router": router, "loss": float(-told.mean()), "expert_per_byte": shares_TE.argmax(-1).tolist(),
            "share_per_expert": shares_TE.mean(0).tolist(), "text": data.decode(errors="replace"),
        }  # fmt: skip


def _with_cards(router: str, cards: Sequence[Any], spec: ModelSpec, model: Decoder, data: bytes) -> Any:
    if router == "own":
        return None
    if len(cards) != spec.num_experts:
        raise ConfigError(
            f"router {router} needs a card of each of the {spec.num_experts} experts, got {len(cards)}; give them with --expert DIR, in order"
        )
    if router == "document":
        return made.document_routing(model, cards, data)[0]
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
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, held_out = text_of.split(texts, opened.manifest.data)
        seq_len, state = opened.manifest.data.seq_len, opened.state()
        before = mean(losses(model_of(state, opened.spec), held_out, seq_len, NUM_WINDOWS))
        new = made.tune_router(state, opened.spec, text_of.joined(train), steps=steps, seq_len=seq_len, lr=lr, seed=seed, say=say)
        after = mean(losses(model_of(new, opened.spec), held_out, seq_len, NUM_WINDOWS))
        lineage = _lineage(
            opened, "tune router", steps=steps, experts=opened.lineage.get("experts"), public_model=opened.lineage.get("public_model")
        )
        _save(target, opened, opened.spec, new, lineage)
        return {"ok": True, "dir": str(target), "loss_before": before, "loss_after": after}


def continual(source: Path, target: Path, texts: Sequence[str], *, strategy: str, steps: int, lr: float, seed: int, say: Say) -> Result:
    """One text after the other, in their order; the matrix of losses, and what was kept (``lasting.Transfer``)."""
    from decentra.workshop.training import Plan, ewc, lwf, train

    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        stream, held_out = text_of.split(texts, opened.manifest.data)
        seq_len, state, spec = opened.manifest.data.seq_len, opened.state(), opened.spec
        model = model_of(state, spec)
        matrix = [list(losses(model, held_out, seq_len, NUM_WINDOWS).values())]
        seen: list[bytes] = []
        for name, text in stream.items():
            source_of = WindowSource([text], seq_len, seed, name)
            plan = Plan(steps, frozenset(n for n, _ in model.named_parameters()), lr=lr, seed=seed)
            guards = []
            if strategy == "grow":
                expert = made.train_expert(state, spec, text, name=name, steps=steps, seq_len=seq_len, lr=lr, seed=seed, say=say)
                state, spec = made.added(state, spec, expert)
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
        _save(target, opened, spec, state, _lineage(opened, f"continual {strategy}", stream=list(stream)))
        return {
            "ok": True, "dir": str(target), "strategy": strategy, "stream": list(stream), "loss_matrix": matrix, "backward_transfer": found.backward,
            "forward_transfer": found.forward, "loss": found.final,
        }  # fmt: skip


STRATEGIES = ("grow", "naive", "replay", "lwf", "ewc")
