"""Putting two models' neurons and experts in the same order before they are averaged (git re-basin, arXiv 2209.04836). Pure.

A network does not change when the hidden neurons of an FFN, or the experts of a layer with their router rows, change places; its average with another one
does. Shapes: I neurons, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decentra.modular.parts import EXPERT, ROUTER, State, experts_of


def best_pairs(gain: Tensor) -> Tensor:
    """The permutation p that maximises sum_i gain[i, p[i]] (linear assignment, Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return torch.as_tensor(columns)


def aligned(state: Mapping[str, Tensor], to: Mapping[str, Tensor], *, experts: bool = True) -> State:
    """``state`` with the neurons of every expert, and (``experts``) the experts of every layer, in the order in which they resemble ``to`` most."""
    out: State = dict(state)
    layers = sorted({found["layer"] for name in state if (found := ROUTER.match(name))})
    numbers = experts_of(state)
    for layer in layers:
        order, neurons = _match_layer(out, to, layer, numbers, experts)
        moved: State = {}
        for new, old in enumerate(order):
            mine = {rest: out[f"{layer}.experts.{old}.{rest}"] for rest in _rests(out, layer, old)}
            moved |= {f"{layer}.experts.{new}.{rest}": _with_neurons(rest, value, neurons[new]) for rest, value in mine.items()}
        out |= moved
        out[f"{layer}.gate.weight"] = out[f"{layer}.gate.weight"][torch.tensor(order)]
    return out


def _match_layer(
    state: Mapping[str, Tensor], to: Mapping[str, Tensor], layer: str, numbers: tuple[int, ...], move: bool
) -> tuple[list[int], list[Tensor]]:
    """(which expert comes to which place, its neurons' order there)."""
    pairs = {}
    gain = torch.full((len(numbers), len(numbers)), -torch.inf, dtype=torch.float64)
    for i in numbers:
        for j in numbers if move else (i,):
            likeness = _likeness(state, to, layer, j, i)
            neurons = best_pairs(likeness)
            pairs[i, j] = neurons
            gain[i, j] = likeness[torch.arange(len(neurons)), neurons].sum()
            gain[i, j] += (to[f"{layer}.gate.weight"][i] * state[f"{layer}.gate.weight"][j]).sum().double()
    order = best_pairs(gain).tolist() if move else list(numbers)
    return order, [pairs[i, order[i]] for i in range(len(numbers))]


def _likeness(state: Mapping[str, Tensor], to: Mapping[str, Tensor], layer: str, expert: int, target: int) -> Tensor:
    """[I, I]: how much neuron b of an expert resembles neuron a of the target, over all three matrices."""
    total = None
    for rest in _rests(state, layer, expert):
        mine, theirs = state[f"{layer}.experts.{expert}.{rest}"].double(), to[f"{layer}.experts.{target}.{rest}"].double()
        part = theirs.T @ mine if rest.startswith("down_proj") else theirs @ mine.T
        total = part if total is None else total + part
    assert total is not None
    return total


def _with_neurons(rest: str, value: Tensor, order: Tensor) -> Tensor:
    return value[:, order] if rest.startswith("down_proj") else value[order]


def _rests(state: Mapping[str, Tensor], layer: str, expert: int) -> list[str]:
    start = f"{layer}.experts.{expert}."
    return sorted(name[len(start) :] for name in state if name.startswith(start) and EXPERT.match(name))
