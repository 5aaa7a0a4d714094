"""Experts trained apart and put together: train one on text that stays here, write its card, route among several, fit an exportable router, take one out.

The public model is frozen while an expert is trained, so what it learned is in the expert, and its row and card are computed from its text: nothing else saw
it, and taking them out is exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from decentra.config import ModelSpec
from decentra.data.tokens import Tokens, tensor_of
from decentra.data.windows import WindowSource
from decentra.errors import ConfigError, IntegrityError
from decentra.hf.files import MAX_JSON_BYTES, sha256_of
from decentra.model.decoder import Decoder, Routing
from decentra.modular import route
from decentra.modular.parts import Part, State, experts_of, extract, insert, select, spec_with
from decentra.modular.route import Card
from decentra.workshop.looking import card_of, watching
from decentra.workshop.training import Guard, Plan, model_of, names_of, train

ROUTERS = ("own", "evidence", "prefix", "document", "uniform", "centroid", "lda", "phatgoose")
EXPERT_FILE, CARD_FILE = "expert.safetensors", "expert.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Expert:
    """An expert that can be carried: its part, its card, and what is said about it."""

    part: Part
    card: Card
    about: dict[str, Any]  # name, licence, base (sha256 of the public model's weights), data in words, tokens
    gate_LD: Tensor | None = None  # for routing by gates; see ``train_gate``


def base_digest(state: Mapping[str, Tensor]) -> str:
    """Names a model by its weights: experts fit the model that they were trained beside."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def part_digest(part: Part) -> str:
    """Names an expert and its row by their numbers."""
    return base_digest({**part.weights, **{f"row of {layer}": row for layer, row in part.rows.items()}})


def train_expert(
    state: State, spec: ModelSpec, text: Tokens, *, name: str, steps: int, seq_len: int, start: int = 0, lr: float = 1.4e-3, seed: int = 0,
    public: Tokens | None = None, guards: Sequence[Guard] = (), say: Say = lambda _: None,
) -> Expert:  # fmt: skip
    """A new expert on one's own text: a copy of expert ``start`` beside the frozen public model, which alone is trained.

    Its router row is the discriminant between its text and ``public`` text (``route.own_row``): other owners' rows need not be known.
    """
    single = model_of(select(state, [start]), spec_with(spec, 1))
    plan = Plan(steps, names_of(single, experts=[0]), lr=lr, seed=seed)
    loss = train(
        single, WindowSource([text], seq_len, seed, name), plan, guards, lambda step, value: _progress(say, name, step, steps, value)
    )
    part = extract({k: v.detach() for k, v in single.state_dict().items()}, 0)
    frozen = model_of(select(state, [start]), spec_with(spec, 1))
    card = card_of(frozen, text, seq_len)
    if public is not None:
        rows = route.own_row(card, card_of(frozen, public, seq_len))
        part = Part(part.weights, {f"model.layers.{layer}.mlp": row for layer, row in enumerate(rows)})
    about = {"name": name, "base": base_digest(state), "tokens": steps * 8 * seq_len, "loss": loss, "start": start}
    return Expert(part, card, about)


def train_gate(
    state: State, spec: ModelSpec, part: Part, text: Tokens, *, steps: int, seq_len: int, lr: float = 1e-2, seed: int = 0, start: int = 0,
    say: Say = lambda _: None,
) -> Tensor:  # fmt: skip
    """A gate [L, D] that opens on an expert's own text (PHATGOOSE, arXiv 2402.05859): everything is frozen, y = public(x) + sigmoid(gate . x) (expert(x) -
    public(x)) learns the gate. Two experts of which both are chosen compute just that, with the public one's row zero.
    """
    rows = {name: torch.zeros_like(row) for name, row in part.rows.items()}
    public = Part(extract(state, start).weights, rows)
    two = select(insert(insert(select(state, [start]), public), Part(part.weights, rows)), [1, 2])
    alone = {"aux_loss_weight": 0.0, "z_loss_weight": 0.0}  # what a gate learns is the text, not balance
    model = model_of(two, spec_with(spec, 2, 2, norm_topk_prob=True, **alone))
    plan = Plan(steps, names_of(model, router=True), rows=(1,), lr=lr, seed=seed)
    train(model, WindowSource([text], seq_len, seed, "gate"), plan, say=lambda step, value: _progress(say, "gate", step, steps, value))
    return torch.stack([model.router_rows(layer)[1].detach() for layer in range(spec.num_layers)])


@dataclass(frozen=True)
class Sliced:
    """An expert trained slice by slice (SISA, arXiv 1912.03817), with what it was after each: a slice can be unlearned by going back and on without it."""

    after: tuple[Expert, ...]
    num_steps: int  # that it took

    @property
    def expert(self) -> Expert:
        return self.after[-1]


def train_sliced(
    state: State, spec: ModelSpec, slices: Sequence[Tokens], *, name: str, steps: int, seq_len: int, lr: float = 1.4e-3, seed: int = 0,
    begin: Sequence[Expert] = (), numbers: Sequence[int] | None = None, say: Say = lambda _: None,
) -> Sliced:  # fmt: skip
    """``steps`` on each slice of a text, one after the other; each begins with fresh moments and an order that depends on its own ``number`` alone.

    ``begin``: experts after slices that are learned already. The result does not depend on whether they were just trained or kept.
    """
    after = list(begin)
    numbers = range(len(slices)) if numbers is None else numbers
    for index in range(len(begin), len(slices)):
        from_state = state if not after else insert(select(state, [0]), after[-1].part)
        start = 0 if not after else 1
        key = f"{name}/{numbers[index]}"
        made = train_expert(
            from_state,
            spec_with(spec, start + 1),
            slices[index],
            name=key,
            steps=steps,
            seq_len=seq_len,
            start=start,
            lr=lr,
            seed=seed,
            say=say,
        )
        after.append(
            Expert(made.part, made.card, made.about | {"name": name, "base": base_digest(state), "slices": [*numbers[: index + 1]]})
        )
    return Sliced(tuple(after), steps * (len(slices) - len(begin)))


def unlearned(
    sliced: Sliced, without: int, state: State, spec: ModelSpec, slices: Sequence[Tokens], *, name: str, steps: int, seq_len: int, lr: float = 1.4e-3,
    seed: int = 0, say: Say = lambda _: None,
) -> Sliced:  # fmt: skip
    """The expert as if slice ``without`` had never been there: from the expert before it, on with the slices after it. Exact."""
    if not 0 <= without < len(slices):
        raise ConfigError(f"slice {without} is not there: the expert was trained on slices 0 to {len(slices) - 1}")
    left = [n for n in range(len(slices)) if n != without]
    if not left:
        raise ConfigError("the expert was trained on one slice; without it there is none")
    return train_sliced(
        state, spec, [slices[n] for n in left], name=name, steps=steps, seq_len=seq_len, lr=lr, seed=seed, begin=sliced.after[:without], numbers=left, say=say
    )  # fmt: skip


def _progress(say: Say, what: str, step: int, steps: int, loss: float) -> None:
    if step == 1 or step == steps or step % max(1, steps // 10) == 0:
        say(f"{what}: step {step} of {steps}, loss {loss:.3f}")


def save_expert(folder: Path, expert: Expert) -> None:
    """Two files: tensors, and what is said about them with the tensors' hash."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights/{k}": v.contiguous().clone() for k, v in expert.part.weights.items()}
    tensors |= {f"rows/{k}": v.contiguous().clone() for k, v in expert.part.rows.items()}
    tensors |= {"card/mean": expert.card.mean_LD.contiguous(), "card/covariance": expert.card.covariance_LDD.contiguous()}
    if expert.gate_LD is not None:
        tensors["gate"] = expert.gate_LD.contiguous()
    safetensors.torch.save_file(tensors, folder / EXPERT_FILE, metadata={"format": "pt"})
    about = {"format": 1, "about": expert.about, "num_tokens": expert.card.num_tokens, "sha256": sha256_of(folder / EXPERT_FILE)}
    (folder / CARD_FILE).write_text(json.dumps(about, indent=1))


def load_expert(folder: Path) -> Expert:
    """Raises ConfigError, IntegrityError."""
    try:
        if (folder / CARD_FILE).stat().st_size > MAX_JSON_BYTES:
            raise IntegrityError(f"{folder / CARD_FILE} is longer than any card")
        told = json.loads((folder / CARD_FILE).read_bytes())
        if told["format"] != 1 or sha256_of(folder / EXPERT_FILE) != told["sha256"]:
            raise IntegrityError(f"{folder / EXPERT_FILE} is not the file that {CARD_FILE} describes; fetch the expert again")
        tensors = safetensors.torch.load_file(folder / EXPERT_FILE)
        card = Card(tensors.pop("card/mean"), tensors.pop("card/covariance"), int(told["num_tokens"]))
        about, gate_LD = dict(told["about"]), tensors.pop("gate", None)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is no expert ({Path(str(error.filename)).name} is missing); 'decentra expert train' makes one"
        ) from None
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise IntegrityError(f"{folder} is a damaged expert ({type(error).__name__}: {error}); fetch it again") from None
    part = Part(
        {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")},
        {k.removeprefix("rows/"): v for k, v in tensors.items() if k.startswith("rows/")},
    )
    told_of = [card.mean_LD, card.covariance_LDD, *([] if gate_LD is None else [gate_LD])]
    if not all(bool(v.isfinite().all()) for v in (*part.weights.values(), *part.rows.values(), *told_of)):
        raise IntegrityError(f"{folder} has numbers that are not finite; its training went wrong, ask for another one")
    return Expert(part, card, about, gate_LD)


def added(state: State, spec: ModelSpec, expert: Expert, *, bases: Sequence[str] = ()) -> tuple[State, ModelSpec]:
    """The model with this expert, too. ``bases``: digests of the models that it may have been trained beside; raises ConfigError for another."""
    if bases and expert.about.get("base") not in bases:
        raise ConfigError(
            f"expert '{expert.about.get('name')}' was trained beside another model ({str(expert.about.get('base'))[:12]}, this is {bases[0][:12]});"
            " it fits only that one (--any-base: add it all the same)"
        )
    grown = insert(state, expert.part)
    count = len(experts_of(grown))
    return grown, spec_with(spec, count, max(2, spec.num_experts_per_token))


# ---------------------------------------------------------------- routing


def routing(kind: str, cards: Sequence[Card]) -> Routing | None:
    """How tokens are sent among experts, by their cards in the experts' order. ``own``: the model's rows. Raises ConfigError."""
    match kind:
        case "own":
            return None
        case "uniform":
            return route.Linear(route.uniform_rows(cards))
        case "centroid":
            return route.Linear(route.centroid_rows(cards))
        case "lda":
            return route.Linear(route.lda_rows(cards))
        case "prefix":
            return route.Prefix(cards)
    raise ConfigError(f"router: expected one of {', '.join(ROUTERS)}, got {kind!r}")


def evidence_of(model: Decoder) -> route.Evidence:
    """Routing by how well each expert of this model predicts the text so far."""

    def predict(expert: int, tokens_BT: Tensor) -> Tensor:
        alone = torch.full((model.spec.num_experts,), -50.0)
        alone[expert] = 50.0
        kept, model.routing = model.routing, route.Fixed(alone)
        try:
            with torch.no_grad():
                logits_BTV = model(tokens_BT[:, :-1]).logits_BTV
        finally:
            model.routing = kept
        told_BT: Tensor = logits_BTV.float().log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
        return told_BT

    return route.Evidence(model.spec.num_experts, predict)


def document_routing(model: Decoder, cards: Sequence[Card], text: Tokens) -> tuple[Routing, Tensor]:
    """One expert mixture for a whole document, by all of it: (routing, probabilities [E])."""
    seen: list[Tensor] = []

    def see(layer: int, _moe: object, x_TD: Tensor) -> None:
        if layer == 0:
            seen.append(x_TD)

    tokens = tensor_of(text[: model.spec.max_seq_len])[None]
    with watching(model, see), torch.inference_mode():
        model(tokens)
    probs_E = route.classify(cards, seen[0])
    return route.Fixed(probs_E.clamp_min(1e-9).log()), probs_E


def tune_router(
    state: State, spec: ModelSpec, texts: Sequence[Tokens], *, steps: int, seq_len: int, lr: float = 3e-3, rows: Tensor | None = None, seed: int = 0,
    say: Say = lambda _: None,
) -> State:  # fmt: skip
    """Router rows trained on public text of all kinds, everything else frozen; ``rows`` [L, E, D] to start from."""
    model = model_of(with_rows(state, rows) if rows is not None else state, spec)
    plan = Plan(steps, names_of(model, router=True), lr=lr, seed=seed)
    train(
        model, WindowSource(list(texts), seq_len, seed, "tune"), plan, say=lambda step, value: _progress(say, "router", step, steps, value)
    )
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def with_rows(state: Mapping[str, Tensor], rows_LED: Tensor) -> State:
    """The model with these router rows."""
    out = dict(state)
    for layer in range(len(rows_LED)):
        out[f"model.layers.{layer}.mlp.gate.weight"] = rows_LED[layer].clone()
    return out


class _Watched:
    """A routing, and what it was asked and said in the forward under way."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        self._routing.start(tokens_BT, num_before)

    def logits(self, layer: int, x_TD: Tensor) -> Tensor | None:
        said = self._routing.logits(layer, x_TD)
        if said is not None:
            self.seen.append((layer, x_TD, said))
        return said


def distil(
    model: Decoder, teacher: Routing, texts: Sequence[Tokens], seq_len: int, *, steps: int = 60, lr: float = 3e-2, seed: int = 0
) -> tuple[Tensor, float]:
    """The linear rows [L, E, D] that follow a runtime routing best, and the KL in nats per token that is left: what a stock class can hold of it."""
    source = WindowSource(list(texts), seq_len, seed, "distil")
    num_layers, num_experts = model.spec.num_layers, model.spec.num_experts
    rows = torch.zeros(num_layers, num_experts, model.spec.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([rows], lr=lr)
    kept, left, watched = model.routing, 0.0, _Watched(teacher)
    model.routing = watched
    try:
        for step in range(steps):
            watched.seen.clear()
            with torch.no_grad():
                model(source.next_inputs(8))
            parts = [
                torch.nn.functional.kl_div(
                    (x_TD @ rows[layer].T).log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
                )
                for layer, x_TD, wanted in watched.seen
            ]
            loss = torch.stack(parts).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            left = loss.item() if step == 0 else 0.8 * left + 0.2 * loss.item()
    finally:
        model.routing = kept
    return rows.detach(), left


def divergence(
    model: Decoder, teacher: Routing, rows: Tensor, texts: Sequence[Tokens], seq_len: int, *, num_batches: int = 4, seed: int = 1
) -> float:
    """KL in nats per token between a routing and linear rows [L, E, D], on text that neither was fitted to."""
    source, watched, kept = WindowSource(list(texts), seq_len, seed, "divergence"), _Watched(teacher), model.routing
    model.routing = watched
    try:
        with torch.no_grad():
            for _ in range(num_batches):
                model(source.next_inputs(8))
            parts = [
                torch.nn.functional.kl_div(
                    (x_TD @ rows[layer].T).log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
                )
                for layer, x_TD, wanted in watched.seen
            ]
    finally:
        model.routing = kept
    return float(torch.stack(parts).mean())
