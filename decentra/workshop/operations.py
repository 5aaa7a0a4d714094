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
from decentra.hf.checkpoint import Checkpoint, check_target, open_checkpoint, save_checkpoint
from decentra.hf.files import Weights, read_json
from decentra.model.decoder import Decoder
from decentra.modular import align, combine, lasting, parts, soup, upcycle
from decentra.modular.combine import Recipe
from decentra.modular.parts import State
from decentra.modular.route import Card
from decentra.workshop import experts as made
from decentra.workshop import texts as text_of
from decentra.workshop.looking import calibration_of, card_of, grams_of, losses, mean, routing_of
from decentra.workshop.training import model_of, squared_gradients

Say = Callable[[str], None]
Result = dict[str, Any]

NUM_WINDOWS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def with_spec(manifest: Manifest, spec: ModelSpec, name: str | None = None) -> Manifest:
    """The manifest of a model that is no run's any more."""
    per_peer = min(manifest.placement.experts_per_peer, spec.num_experts)
    placement = manifest.placement.model_copy(update={"experts_per_peer": per_peer})
    return manifest.model_copy(update={"model": spec, "genesis": {}, "placement": placement, "name": (name or manifest.name)[:64]})


KEPT = ("experts", "public_model", "public_top_k", "run")  # of a lineage, by whatever leaves the experts as they are
MAX_STEPS_BEFORE = 12


def _lineage(source: Checkpoint, how: str, *, keeps: bool = False, **more: Any) -> Result:
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


def _save(target: Path, source: Checkpoint, spec: ModelSpec, state: Mapping[str, Tensor], lineage: Result) -> None:
    save_checkpoint(target, with_spec(source.manifest, spec), state.items(), lineage, tokenizer=source.folder)


def _kind(spec: ModelSpec) -> str:
    return "dense" if spec.num_experts == 1 else f"{spec.num_experts} experts, {spec.num_experts_per_token} per token"


# ---------------------------------------------------------------- Hugging Face


def convert(source: Path, target: Path, how: str, dtype: str = "fp32") -> Result:
    """``import`` and ``export`` are this: read a folder, write one that decentra and transformers both load, tensor by tensor."""
    check_target(target)
    with open_checkpoint(source) as opened:
        manifest = with_spec(opened.manifest, opened.spec)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in opened.names:
                yield name, opened(name)

        card = save_checkpoint(target, manifest, tensors(), _lineage(opened, how, keeps=True), dtype=DTYPES[dtype], tokenizer=source)
        num = sum(torch.Size(shape).numel() for shape in opened.shapes.values())
        return {"ok": True, "dir": str(target), "kind": _kind(opened.spec), "num_parameters": num, "files": card["files"]}


# ---------------------------------------------------------------- more experts


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
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"method: expected a number of 0 or more after the colon, got {method!r}")
    return value


def _same_function(folder: Path, spec: ModelSpec, first: Path) -> None:
    """Raise ConfigError for a model whose numbers mean something else than the first one's."""
    with open_checkpoint(folder) as other:
        for key, ours in spec.model_dump(exclude={"aux_loss_weight", "z_loss_weight", "max_seq_len", "code"}).items():
            if (theirs := getattr(other.spec, key)) != ours:
                raise ConfigError(f"{folder}: {key} is {theirs}, {first} has {ours}; they are of different architectures and do not merge")


def _same_shape(folder: Path, spec: ModelSpec) -> State:
    _same_function(folder, spec, Path("the first model"))
    with open_checkpoint(folder) as other:
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


def merge(
    folders: Sequence[Path], target: Path, recipe: Recipe, base: Path | None, *, rebasin: bool = False, texts: Sequence[str] = (),
    say: Say = lambda _: None,
) -> Result:  # fmt: skip
    """Models of one architecture into one, a parameter at a time. ``rebasin``: first their neurons and experts are put in the base's order, or in the
    first one's, which takes all of them in memory. ``texts``: one for all or one of each model, for fisher and regmean, which keep what they see of each
    model in memory: as much as the model, or a matrix of its inputs per matrix."""
    check_target(target)
    if len(folders) + (base is not None) < 2:
        raise ConfigError(f"merge: one model, {folders[0]}, is not merged with anything; the first folder is OUT, the models follow")
    opened = [open_checkpoint(folder) for folder in folders]
    origin = None if base is None else open_checkpoint(base)
    try:
        first = opened[0]
        for folder in [*folders[1:], *([] if base is None else [base])]:
            _same_function(folder, first.spec, folders[0])
        seen = [] if not texts else _seen(opened, recipe.method, texts, say, rebasin=rebasin)
        picks: list[combine.Pick] = list(opened)
        if rebasin:
            order = first.state() if origin is None else origin.state()  # task vectors are taken from the base: its order is the one
            picks = [align.aligned(one.state(), order).__getitem__ for one in opened]
        merged = combine.merged(first.shapes, picks, origin, recipe, seen)
        models = [{"name": one.folder.resolve().name, "files": one.hashes} for one in opened]
        lineage = _lineage(first, "merge", recipe=vars(recipe), models=models, base=None if origin is None else origin.hashes)
        save_checkpoint(target, with_spec(first.manifest, first.spec), merged, lineage, tokenizer=first.folder)
    finally:
        for one in [*opened, *([] if origin is None else [origin])]:
            one.weights.__exit__()
    return {"ok": True, "dir": str(target), "method": recipe.method, "num_models": len(folders), "kind": _kind(first.spec)}


def _seen(opened: Sequence[Checkpoint], method: str, texts: Sequence[str], say: Say, *, rebasin: bool) -> list[combine.Statistics]:
    """What each model's own text says of its parameters."""
    if method not in combine.STATISTICAL:
        raise ConfigError(f"--text is for {' and '.join(combine.STATISTICAL)}; {method} looks at weights only")
    if rebasin:
        raise ConfigError(
            f"--rebasin changes the order of what {method} has measured; align each model first: decentra merge OUT MODEL --base BASE --rebasin"
        )
    if len(texts) not in (1, len(opened)):
        raise ConfigError(f"--text: expected one for all or one for each of {len(opened)} models, in their order, got {len(texts)}")
    text_of.check_bytes(opened[0].spec.vocab_size)
    data = opened[0].manifest.data
    found: list[combine.Statistics] = []
    for index, one in enumerate(opened):
        name = texts[index % len(texts)]
        train, _ = text_of.split([name], data)
        model = model_of(one.state(), one.spec)
        [text] = train.values()
        if method == "fisher":
            values = squared_gradients(model, WindowSource([text], data.seq_len, 0, "fisher"), NUM_WINDOWS)
        else:
            values = grams_of(model, text, data.seq_len, NUM_WINDOWS)
        say(f"{one.folder.name}: {method} has read {NUM_WINDOWS} windows of {name}")
        found.append(values.get)
    return found


def cooked(folders: Sequence[Path], target: Path, texts: Sequence[str], say: Say) -> Result:
    """A greedy soup by held-out loss."""
    check_target(target)
    if len(folders) < 2:
        raise ConfigError(f"soup: one model, {folders[0] if folders else 'none'}, makes none; the first folder is OUT, the models follow")
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
        _lineage(
            opened[0],
            "soup",
            models=[{"name": folders[i].resolve().name, "files": opened[i].hashes} for i in chosen.ingredients],
            loss=chosen.loss,
        ),
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
    """Train an expert beside a frozen model; its row tells its text from the embedded domains' (as far as they are not its own)."""
    check_target(target)
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, held_out = text_of.split(texts, opened.manifest.data)
        state, seq_len = opened.state(), opened.manifest.data.seq_len
        alone = parts.spec_with(opened.spec, 1)
        before = mean(losses(model_of(parts.select(state, [start]), alone), held_out, seq_len, NUM_WINDOWS))
        public = text_of.public(opened.manifest.data, without=texts)
        text = b"\n".join(train.values())
        expert = made.train_expert(
            state, opened.spec, text, name=name, steps=steps, seq_len=seq_len, start=start, lr=lr, seed=seed, public=public, say=say
        )
        trained = parts.select(parts.insert(parts.select(state, [start]), expert.part), [1])
        after = mean(losses(model_of(trained, alone), held_out, seq_len, NUM_WINDOWS))
        expert.about.update({"texts": list(train), "loss_before": before, "loss_after": after})
        made.save_expert(target, expert)
        return {"ok": True, "dir": str(target)} | expert.about


def expert_card(source: Path, target: Path, texts: Sequence[str], *, number: int, name: str) -> Result:
    """A model's own expert as one that can be carried, with the card of a text that it is for: routers by cards need one of each."""
    check_target(target)
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, _ = text_of.split(texts, opened.manifest.data)
        state = opened.state()
        frozen = model_of(parts.select(state, [number]), parts.spec_with(opened.spec, 1))
        card = card_of(frozen, b"\n".join(train.values()), opened.manifest.data.seq_len)
        about = {"name": name, "base": made.base_digest(state), "texts": list(train), "start": number}
        made.save_expert(target, made.Expert(parts.extract(state, number), card, about))
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
        _save(target, opened, spec, state, _lineage(opened, "expert add", experts=cards, public_model=public, public_top_k=top_k))
        return {"ok": True, "dir": str(target), "kind": _kind(spec), "experts": cards}


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
        lineage = _lineage(opened, how, keeps=True, kept=list(numbers)) | {"experts": cards} | more
        _save(target, opened, spec, state, lineage)
        return {"ok": True, "dir": str(target), "kind": _kind(spec), "kept": list(numbers), "experts": cards}


def forget(source: Path, target: Path, *, experts: Sequence[int], owner: str | None) -> Result:
    """Experts out of a model, and a verdict: isolated, when hashes prove that what is left is the model that never had them; joint otherwise."""
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
    result = expert_keep(source, target, left, "forget", original, forgotten=sorted(gone), mode=mode)
    with open_checkpoint(target) as after:
        return result | {"forgotten": sorted(gone), "mode": mode, "why": why, "files_before": before, "files_after": after.hashes}


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
        text_of.check_bytes(opened.spec.vocab_size)
        model = model_of(opened.state(), opened.spec)

        def each(lines: Sequence[str]) -> list[float]:
            found = []
            for line in lines:
                data = line.encode(errors="replace")[: opened.spec.max_seq_len]
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
    if router not in made.ROUTERS:
        raise ConfigError(f"router: expected one of {', '.join(made.ROUTERS)}, got {router!r}")
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        spec, data = opened.spec, text.encode(errors="replace")[: opened.spec.max_seq_len]
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
    shape = (spec.num_layers, spec.hidden_size)
    if wrong := [c for c in cards if tuple(c.mean_LD.shape) != shape]:
        raise ConfigError(f"a card is of a model of {tuple(wrong[0].mean_LD.shape)} layers and hidden size, this one has {shape}")
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
    check_target(target)
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, held_out = text_of.split(texts, opened.manifest.data)
        seq_len, state = opened.manifest.data.seq_len, opened.state()
        before = mean(losses(model_of(state, opened.spec), held_out, seq_len, NUM_WINDOWS))
        new = made.tune_router(state, opened.spec, text_of.joined(train), steps=steps, seq_len=seq_len, lr=lr, seed=seed, say=say)
        after = mean(losses(model_of(new, opened.spec), held_out, seq_len, NUM_WINDOWS))
        _save(target, opened, opened.spec, new, _lineage(opened, "tune router", keeps=True, steps=steps))
        return {"ok": True, "dir": str(target), "loss_before": before, "loss_after": after}


def distilled(
    source: Path, target: Path, texts: Sequence[str], *, router: str, experts: Sequence[Path], steps: int, seed: int, say: Say
) -> Result:
    """A runtime routing baked into linear rows, which any Qwen3-MoE runtime follows; how much of it they hold is said as KL on held-out text."""
    from decentra.model.decoder import Routing

    check_target(target)
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        train, held_out = text_of.split(texts, opened.manifest.data)
        seq_len, state, spec = opened.manifest.data.seq_len, opened.state(), opened.spec
        model = model_of(state, spec)
        cards = [made.load_expert(folder).card for folder in experts]
        first = next(iter(held_out.values()))
        teacher: Routing | None = (
            made.evidence_of(model) if router == "evidence" else _with_cards(router, cards, spec, model, first[: spec.max_seq_len])
        )
        if teacher is None:
            raise ConfigError("distil: the model's own router is linear already; name another one with --router")
        say(f"fitting rows to {router}")
        rows, _ = made.distil(model, teacher, text_of.joined(train), seq_len, steps=steps, seed=seed)
        left = made.divergence(model, teacher, rows, text_of.joined(held_out), seq_len)
        model.routing = teacher
        before = mean(losses(model, held_out, seq_len, NUM_WINDOWS))
        new = made.with_rows(state, rows)
        after = mean(losses(model_of(new, spec), held_out, seq_len, NUM_WINDOWS))
        _save(target, opened, spec, new, _lineage(opened, "distil router", keeps=True, router=router, kl=left))
        return {"ok": True, "dir": str(target), "router": router, "kl": left, "loss_with_router": before, "loss_with_rows": after}


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


def continual(source: Path, target: Path, texts: Sequence[str], *, strategy: str, steps: int, lr: float, seed: int, say: Say) -> Result:
    """One text after the other, in their order; the matrix of losses, and what was kept (``lasting.Transfer``)."""
    from decentra.workshop.training import Plan, ewc, lwf, train

    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    check_target(target)
    with open_checkpoint(source) as opened:
        text_of.check_bytes(opened.spec.vocab_size)
        stream, held_out = text_of.split(texts, opened.manifest.data)
        seq_len, state, spec = opened.manifest.data.seq_len, opened.state(), opened.spec
        model = model_of(state, spec)
        matrix = [list(losses(model, held_out, seq_len, NUM_WINDOWS).values())]
        seen: list[bytes] = []
        cards: dict[str, Any] = {str(n): c for n, c in known_experts(opened.lineage).items()}
        for name, text in stream.items():
            source_of = WindowSource([text], seq_len, seed, name)
            plan = Plan(steps, frozenset(n for n, _ in model.named_parameters()), lr=lr, seed=seed)
            guards = []
            if strategy == "grow":
                public = b"\n".join(seen) if seen else text_of.public(opened.manifest.data, without=texts)
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
        _save(target, opened, spec, state, _lineage(opened, f"continual {strategy}", stream=list(stream), experts=cards))
        return {
            "ok": True, "dir": str(target), "strategy": strategy, "stream": list(stream), "loss_matrix": matrix, "backward_transfer": found.backward,
            "forward_transfer": found.forward, "loss": found.final, "router": "evidence" if strategy == "grow" else "own",
        }  # fmt: skip


STRATEGIES = ("grow", "naive", "replay", "lwf", "ewc")
