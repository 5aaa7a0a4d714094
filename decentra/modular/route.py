"""Routing among experts that were trained apart: which expert a token goes to, from statistics that owners can give away. Pure.

An expert's card has, of its owner's text, the mean and covariance of what each layer's router sees. From cards come router rows (linear, so any Qwen3-MoE
runtime follows them) or a classifier of the text so far (``Prefix``: better, and followed by decentra only). Shapes: B batch, T tokens, D hidden, E experts,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decentra.errors import ConfigError

RIDGE = 0.1  # of the mean variance, added to covariances
TOKENS_PER_WITNESS = 8.0  # neighbouring tokens say nearly the same: so many count as one independent observation
MAX_WITNESSES = 24.0


@dataclass(frozen=True)
class Card:
    """What an owner tells of its text: per layer mean [D] and covariance [D, D] of the router's input, and how many tokens were seen."""

    mean_LD: Tensor
    covariance_LDD: Tensor
    num_tokens: int


class CardWriter:
    """Collects a card over batches; ``see`` is called for every layer of every forward."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self._sum = torch.zeros(num_layers, hidden_size, dtype=torch.float64)
        self._square = torch.zeros(num_layers, hidden_size, hidden_size, dtype=torch.float64)
        self._count = [0] * num_layers

    def see(self, layer: int, x_TD: Tensor) -> None:
        x = x_TD.double()
        self._sum[layer] += x.sum(0)
        self._square[layer] += x.T @ x
        self._count[layer] += len(x)

    def card(self) -> Card:
        if min(self._count) < 2:
            raise ConfigError("a card needs text of two tokens or more")
        n = torch.tensor(self._count, dtype=torch.float64)[:, None]
        mean = self._sum / n
        covariance = self._square / n[..., None] - mean[:, :, None] * mean[:, None, :]
        return Card(mean.float(), covariance.float(), min(self._count))


def pooled(cards: Sequence[Card], layer: int) -> Tensor:
    """The covariance within domains [D, D], all alike, with a ridge."""
    within = torch.stack([c.covariance_LDD[layer] for c in cards]).mean(0)
    ridged: Tensor = within + RIDGE * within.diagonal().mean() * torch.eye(len(within))
    return ridged


# ---------------------------------------------------------------- rows: linear, exportable


def uniform_rows(cards: Sequence[Card]) -> Tensor:
    """[L, E, D] of zeros: with all experts chosen, each counts alike."""
    num_layers, hidden = cards[0].mean_LD.shape
    return torch.zeros(num_layers, len(cards), hidden)


def centroid_rows(cards: Sequence[Card], sharpness: float = 4.0) -> Tensor:
    """[L, E, D]: the direction from the common mean to each expert's own, so that its text has the largest product."""
    means_LED = torch.stack([c.mean_LD for c in cards], 1)
    away_LED = means_LED - means_LED.mean(1, keepdim=True)
    norm = away_LED.norm(dim=-1, keepdim=True)
    rows_LED: Tensor = sharpness * away_LED / (norm * norm).clamp_min(1e-12)
    return rows_LED


def lda_rows(cards: Sequence[Card]) -> Tensor:
    """[L, E, D] of linear discriminant analysis, S^-1 (mu_e - mean); its constant is dropped, since exported routers have none."""
    rows = []
    for layer in range(cards[0].mean_LD.shape[0]):
        means_ED = torch.stack([c.mean_LD[layer] for c in cards])
        rows.append(torch.linalg.solve(pooled(cards, layer), (means_ED - means_ED.mean(0)).T).T)
    return torch.stack(rows)


def own_row(card: Card, public: Card, sharpness: float = 4.0) -> Tensor:
    """[L, D]: a row for one expert beside a public model whose own rows are about zero. On the expert's text its logit is about ``sharpness`` / 2, on
    public text minus that: the discriminant between the two means, less what it says of their middle, since routers have no constant."""
    rows = []
    for layer in range(len(card.mean_LD)):
        own, other = card.mean_LD[layer], public.mean_LD[layer]
        direction, middle = torch.linalg.solve(pooled([card, public], layer), own - other), (own + other) / 2
        direction = direction - (direction @ middle) / (middle @ middle).clamp_min(1e-12) * middle
        rows.append(sharpness * direction / (direction @ (own - other)).abs().clamp_min(1e-6))
    return torch.stack(rows)


# ---------------------------------------------------------------- runtime routings


class Linear:
    """Rows of one's own, [L, E, D]."""

    def __init__(self, rows_LED: Tensor) -> None:
        self._rows_LED = rows_LED

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        del tokens_BT, num_before

    def logits(self, layer: int, x_TD: Tensor) -> Tensor:
        logits_TE: Tensor = x_TD.float() @ self._rows_LED[layer].T.to(x_TD.device)
        return logits_TE


class Gated:
    """Gates [L, E, D] that each owner trained for its own expert (PHATGOOSE, arXiv 2402.05859): LN(x) . LN(gate) / sqrt(D), so that gates which never met
    compare. The norms make it no linear router, so no stock class follows it."""

    def __init__(self, gates_LED: Tensor) -> None:
        self._gates_LED = torch.nn.functional.layer_norm(gates_LED.float(), gates_LED.shape[-1:])

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        del tokens_BT, num_before

    def logits(self, layer: int, x_TD: Tensor) -> Tensor:
        hidden = x_TD.shape[-1]
        logits_TE: Tensor = torch.nn.functional.layer_norm(x_TD.float(), (hidden,)) @ self._gates_LED[layer].T.to(x_TD.device) / hidden**0.5
        return logits_TE


class Fixed:
    """The same logits [E] for every token: a document's expert, or a mixture that somebody chose."""

    def __init__(self, logits_E: Tensor) -> None:
        self._logits_E = logits_E

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        del tokens_BT, num_before

    def logits(self, layer: int, x_TD: Tensor) -> Tensor:
        del layer
        return self._logits_E.to(x_TD.device).expand(len(x_TD), -1)


class Prefix:
    """Whose text is this, by all of it so far: discriminant analysis on the mean of what the first router saw, one decision for all layers of a token.

    A mean over n tokens is surer than one of them: logits grow with the number of independent witnesses, up to a bound. Causal: a token's experts depend on
    nothing after it. Continues over calls with a cache.
    """

    def __init__(self, cards: Sequence[Card], layer: int = 0, tokens_per_witness: float = TOKENS_PER_WITNESS) -> None:
        means_ED = torch.stack([c.mean_LD[layer] for c in cards])
        solved_ED = torch.linalg.solve(pooled(cards, layer), means_ED.T).T
        self._rows_ED, self._bias_E = solved_ED, -0.5 * (solved_ED * means_ED).sum(1)
        self._layer, self._tokens_per_witness = layer, tokens_per_witness
        self._shape, self._num_before = (0, 0), 0
        self._sum_BD: Tensor | None = None
        self._logits_TE: Tensor | None = None

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        self._shape, self._num_before = (len(tokens_BT), tokens_BT.shape[1]), num_before
        if num_before == 0:
            self._sum_BD = None

    def logits(self, layer: int, x_TD: Tensor) -> Tensor | None:
        if layer < self._layer:
            return None  # too early to know: the model's own router
        if layer == self._layer:
            sums_BTD = x_TD.float().view(*self._shape, -1).cumsum(1)
            if self._sum_BD is not None:
                sums_BTD = sums_BTD + self._sum_BD[:, None]
            self._sum_BD = sums_BTD[:, -1]
            count_T1 = torch.arange(self._num_before + 1, self._num_before + self._shape[1] + 1, device=x_TD.device)[:, None].float()
            scores_BTE = (sums_BTD / count_T1) @ self._rows_ED.T.to(x_TD.device) + self._bias_E.to(x_TD.device)
            witnesses_T1 = (count_T1 / self._tokens_per_witness).clamp(max=MAX_WITNESSES)
            self._logits_TE = (scores_BTE * witnesses_T1).flatten(0, 1)
        return self._logits_TE


class Evidence:
    """Which expert predicted the text so far best: the posterior over experts by Bayes' rule, tempered and forgetting (the domain posterior of DEMix,
    arXiv 2108.05036, per token). Needs no card, knows what the experts know, and costs a forward per expert.

    ``predict(expert, tokens_BT)`` gives the expert's log-probability [B, T - 1] of each token but the first, by those before it.
    """

    def __init__(
        self, num_experts: int, predict: Callable[[int, Tensor], Tensor], temper: float = 0.25, memory: float = 0.95, window: int = 256
    ) -> None:
        self._num_experts, self._predict, self._temper, self._memory, self._window = num_experts, predict, temper, memory, window
        self._read_BT: Tensor | None = None
        self._logits_TE: Tensor | None = None

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        new = tokens_BT.shape[1]
        if num_before and self._read_BT is not None:
            tokens_BT = torch.cat([self._read_BT, tokens_BT], 1)
        self._read_BT = tokens_BT[:, -self._window :]
        tokens_BT = tokens_BT[:, -max(new, self._window) :]
        scores = []
        for expert in range(self._num_experts):
            known_BT = torch.nn.functional.pad(
                self._predict(expert, tokens_BT) if tokens_BT.shape[1] > 1 else tokens_BT[:, :0].float(), (1, 0)
            )
            scores.append(_remembered(known_BT, self._memory))
        self._logits_TE = (torch.stack(scores, -1) * self._temper)[:, -new:].flatten(0, 1)

    def logits(self, layer: int, x_TD: Tensor) -> Tensor | None:
        del layer, x_TD
        return self._logits_TE


def _remembered(x_BT: Tensor, memory: float) -> Tensor:
    """Running sums in which what lies n tokens back counts memory^n."""
    out, total = torch.empty_like(x_BT), torch.zeros(len(x_BT), device=x_BT.device)
    for t in range(x_BT.shape[1]):
        total = memory * total + x_BT[:, t]
        out[:, t] = total
    return out


def classify(cards: Sequence[Card], x_TD: Tensor, layer: int = 0) -> Tensor:
    """Probability [E] that a document, by its router inputs [T, D] of one layer, is each expert's."""
    router = Prefix(cards, layer)
    router.start(torch.zeros(1, len(x_TD), dtype=torch.int64), 0)
    logits = router.logits(layer, x_TD)
    assert logits is not None
    return logits[-1].softmax(-1)
