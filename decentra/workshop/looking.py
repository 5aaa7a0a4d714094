"""What a model does on texts: losses per domain, who routes where, what routers see, what neurons fire. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from decentra.data.tokens import Tokens
from decentra.data.windows import WindowSource
from decentra.model.decoder import Decoder, Layer
from decentra.model.evaluate import evaluate
from decentra.model.moe import Linear, MoE
from decentra.modular.route import Card, CardWriter
from decentra.modular.upcycle import Calibration


def losses(model: Decoder, texts: Mapping[str, Tokens], seq_len: int, max_windows: int | None = None) -> dict[str, float]:
    """Nats per token of each text."""
    return {name: evaluate(model, text, seq_len, max_windows=max_windows) for name, text in texts.items()}


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


@contextmanager
def watching(model: Decoder, see: Callable[[int, MoE, Tensor], None]) -> Iterator[None]:
    """``see(layer, moe, x_TD)`` for every layer of every forward inside the block."""
    hooks = []
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)

        def hook(moe: Any, given: Any, _index: int = index) -> None:
            see(_index, moe, given[0].detach())

        hooks.append(layer.mlp.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def card_of(model: Decoder, text: Tokens, seq_len: int, num_windows: int = 64, seed: int = 0) -> Card:
    """An expert's card: what routers see of this text."""
    writer = CardWriter(model.spec.num_layers, model.spec.hidden_size)
    with watching(model, lambda layer, _moe, x_TD: writer.see(layer, x_TD)), torch.inference_mode():
        _read(model, text, seq_len, num_windows, seed)
    return writer.card()


def calibration_of(model: Decoder, text: Tokens, seq_len: int, num_windows: int = 32, seed: int = 0) -> dict[str, Calibration]:
    """What each layer's only FFN sees and does: for MoE-fication of a dense model."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(layer: int, moe: MoE, x_TD: Tensor) -> None:
        gate, up, _ = moe.experts["0"].weights()  # type: ignore[operator]
        h_TI = torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)
        seen.setdefault(layer, []).append((x_TD, h_TI.detach()))

    with watching(model, see), torch.no_grad():
        _read(model, text, seq_len, num_windows, seed)
    return {
        f"model.layers.{layer}.mlp": Calibration(torch.cat([x for x, _ in parts]), torch.cat([h for _, h in parts]))
        for layer, parts in seen.items()
    }


def grams_of(model: Decoder, text: Tokens, seq_len: int, num_windows: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """X^T X [I, I] of the inputs of every matrix that multiplies hidden states, by parameter name; an expert's are of the tokens that were sent to it."""
    grams: dict[str, Tensor] = {}

    def add(name: str, x_TI: Tensor) -> None:
        x_TI = x_TI.detach().flatten(0, -2).double()
        grams[name] = grams.get(name, torch.zeros(())) + x_TI.T @ x_TI

    def see(layer: int, moe: MoE, x_TD: Tensor) -> None:
        start = f"model.layers.{layer}.mlp"
        add(f"{start}.gate.weight", x_TD)
        _, choice_TK = _choice(moe, x_TD)
        for position, (expert, weights) in enumerate(moe.experts.items()):
            gate, up, _ = weights.weights()  # type: ignore[operator]
            x_SD = x_TD[(choice_TK == position).any(-1)]
            add(f"{start}.experts.{expert}.gate_proj.weight", x_SD)
            grams[f"{start}.experts.{expert}.up_proj.weight"] = grams[f"{start}.experts.{expert}.gate_proj.weight"]
            add(f"{start}.experts.{expert}.down_proj.weight", torch.nn.functional.silu(x_SD @ gate.T) * (x_SD @ up.T))

    hooks = [
        module.register_forward_pre_hook(lambda _module, given, name=name: add(f"{name}.weight", given[0]))
        for name, module in model.named_modules()
        if isinstance(module, Linear) and ".mlp." not in name
    ]
    try:
        with watching(model, see), torch.no_grad():
            _read(model, text, seq_len, num_windows, seed)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def _choice(moe: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [T, E], chosen of those present [T, K]) as the layer itself has them in evaluation."""
    logits_TE = x_TD.float() @ moe.gate.weight.T
    logits_TP = logits_TE if len(moe.present) == moe.num_experts else logits_TE[:, list(moe.present)]
    return logits_TE, (logits_TP if moe.bias_P is None else logits_TP + moe.bias_P).topk(moe.num_chosen, -1).indices


def _read(model: Decoder, text: Tokens, seq_len: int, num_windows: int, seed: int) -> None:
    source = WindowSource([text], seq_len, seed, "looking")
    for _ in range(math.ceil(num_windows / 8)):
        model(source.next_inputs(8))


def routing_of(model: Decoder, texts: Mapping[str, Tokens], seq_len: int, num_windows: int = 32) -> dict[str, Any]:
    """Load of every expert by domain (share of slots), how uneven it is (MaxVio: the largest load over the mean, less one), router entropy, dead experts."""
    share: dict[str, list[float]] = {}
    entropy: list[float] = []
    slots_LE = torch.zeros(model.spec.num_layers, model.spec.num_experts)

    def see(layer: int, moe: MoE, x_TD: Tensor) -> None:
        logits, choice_TK = _choice(moe, x_TD)
        probs = logits.softmax(-1)
        entropy.append(float(-(probs * probs.clamp_min(1e-12).log()).sum(-1).mean()))
        slots_LE[layer] += torch.bincount(choice_TK.flatten(), minlength=model.spec.num_experts)

    total_LE = torch.zeros_like(slots_LE)
    for name, text in texts.items():
        slots_LE.zero_()
        with watching(model, see), torch.inference_mode():
            _read(model, text, seq_len, num_windows, 0)
        load_E = slots_LE.sum(0)
        share[name] = (load_E / load_E.sum()).tolist()
        total_LE += slots_LE
    load_LE = total_LE / total_LE.sum(1, keepdim=True)
    return {
        "experts_by_domain": share, "max_violation": float((load_LE.max(1).values * model.spec.num_experts - 1).max()),
        "max_violation_per_layer": (load_LE.max(1).values * model.spec.num_experts - 1).tolist(),
        "router_entropy": sum(entropy) / len(entropy), "max_entropy": math.log(model.spec.num_experts) if model.spec.num_experts > 1 else 0.0,
        "dead_experts": [e for e in range(model.spec.num_experts) if float(total_LE[:, e].sum()) == 0.0],
        "mutual_information": mutual_information(share),
    }  # fmt: skip


def mutual_information(share: Mapping[str, list[float]]) -> float:
    """Of domain and expert, in nats, with domains equally likely: 0 when every domain is served alike."""
    joint = torch.tensor(list(share.values()), dtype=torch.float64) / len(share)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / product.clamp_min(1e-300)).clamp_min(1e-300).log()).sum())
