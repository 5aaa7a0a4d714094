"""Data affinity: which of some windows of text the router sends most to a peer's own experts (DiPaCo, arXiv 2403.10616, shards text so ahead of training).

Shapes: C windows, T tokens of a window, D hidden, E experts of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from decentra.config import Manifest
from decentra.data.tokens import read
from decentra.model.decoder import Decoder

NUM_PREFIX_TOKENS = 32  # a window is judged by its beginning: choosing must stay cheap beside training

Preference = tuple[()] | tuple[int, Callable[[Tensor], Tensor]]  # the last arguments of ``WindowSource.next_batch``


class OwnShare:
    """Share of the router's probability, over all experts, that goes to ``experts``; mean over tokens and layers."""

    def __init__(self, model: Decoder, experts: Sequence[int]) -> None:
        self._model, self._experts = model, list(experts)
        self._shares_CT: list[Tensor] = []
        self._shape = (0, 0)

    @torch.no_grad()
    def __call__(self, tokens_CT1: Tensor) -> Tensor:
        """Shares [C] of windows int64 [C, T + 1]."""
        device = self._model.lm_head.weight.device
        was_training, kept = self._model.training, self._model.routing
        self._model.eval()  # loss-free balancing must not count these tokens
        self._model.routing, self._shares_CT = self, []
        try:
            self._model(read(tokens_CT1[:, :NUM_PREFIX_TOKENS]).to(device))
        finally:
            self._model.routing = kept
            self._model.train(was_training)
        return torch.stack(self._shares_CT).mean((0, 2)).cpu()

    def start(self, tokens_BT: Tensor, num_before: int) -> None:
        """Of ``model.decoder.Routing``: it looks and leaves the choice to the model."""
        self._shape = (tokens_BT.shape[0], tokens_BT.shape[1])

    def logits(self, layer: int, x_TD: Tensor) -> None:
        probs_TE = (x_TD.float() @ self._model.router_rows(layer).t()).softmax(-1)
        self._shares_CT.append(probs_TE[:, self._experts].sum(-1).view(self._shape))


def preference(model: nn.Module, experts: Sequence[int], manifest: Manifest) -> Preference:
    """How a peer that trains ``experts`` chooses its common text; nothing where all text is equally its own."""
    num = manifest.placement.data_affinity
    if num == 1 or not isinstance(model, Decoder) or not 0 < len(experts) < manifest.model.num_experts:
        return ()
    return num, OwnShare(model, experts)
