"""Soups: which of several models of one ancestor to average, judged on held-out text (arXiv 2203.05482). Pure; losses come from a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decentra.errors import ConfigError
from decentra.modular.parts import State

Judge = Callable[[State], float]  # loss on the selection text: lower is better


@dataclass(frozen=True)
class Soup:
    """A mean, its ingredients in the order in which they were added, its loss on the selection text, and what was tried."""

    state: State
    ingredients: tuple[int, ...]
    loss: float
    tried: tuple[tuple[int, float], ...]  # (ingredient, loss of the soup with it)


def mean_of(states: Sequence[Mapping[str, Tensor]]) -> State:
    """The mean of models; of equal ones exactly that model."""
    out: State = {}
    for name, first in states[0].items():
        values = [s[name] for s in states]
        out[name] = (
            first.clone() if all(v.equal(first) for v in values[1:]) else torch.stack([v.double() for v in values]).mean(0).to(first.dtype)
        )
    return out


def greedy_soup(states: Sequence[Mapping[str, Tensor]], judge: Judge, say: Callable[[str], None] = lambda _: None) -> Soup:
    """Best first; each next one joins when the mean with it is no worse. So the soup is no worse than its best ingredient, on the selection text."""
    if not states:
        raise ConfigError("a soup needs a model or more")
    losses = [judge(dict(s)) for s in states]
    order = sorted(range(len(states)), key=lambda i: (losses[i], i))
    chosen, loss = [order[0]], losses[order[0]]
    state, tried = dict(states[order[0]]), [(order[0], loss)]
    for number in order[1:]:
        candidate = mean_of([states[i] for i in [*chosen, number]])
        with_it = judge(candidate)
        tried.append((number, with_it))
        say(f"model {number + 1}: {losses[number]:.4f} alone, {with_it:.4f} in the soup of {len(chosen)}")
        if with_it <= loss:
            chosen, loss, state = [*chosen, number], with_it, candidate
    return Soup(state, tuple(chosen), loss, tuple(tried))


def barrier(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], judge: Judge, num_points: int = 5
) -> tuple[list[tuple[float, float]], float]:
    """Losses along the straight line between two models, and the loss barrier: how far it rises above the line between the ends (arXiv 1912.05671)."""
    path = []
    for step in range(num_points):
        t = step / (num_points - 1)
        path.append((t, judge({n: (1 - t) * v + t * second[n] for n, v in first.items()})))
    (_, left), (_, right) = path[0], path[-1]
    return path, max(loss - ((1 - t) * left + t * right) for t, loss in path)
