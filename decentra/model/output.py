"""What every model of a run returns, and the training loss computed from it. No parameters and no optimizer.

Shapes: B batch, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from decentra.config import ModelSpec
from decentra.data.tokens import read

NOT_LEARNT = -1  # every negative target is one


def num_learnt(targets_BT: Tensor) -> Tensor:
    """How many targets are to be learnt, 0-d."""
    return (targets_BT >= 0).sum()


class ForwardOutput(NamedTuple):
    """Result of a model's ``forward(tokens_BT)``; a model given with ``--model-code`` returns the same four values."""

    logits_BTV: Tensor
    aux_loss: Tensor  # load balancing, 0-d, not yet weighted
    z_loss: Tensor  # router z-loss, 0-d, not yet weighted
    tokens_per_expert_E: Tensor  # int64 on any device, summed over layers; a token counts once per expert it was sent to


class LossOutput(NamedTuple):
    """One training loss: ``total`` is differentiated, ``cross_entropy`` (nats per token) is what people read."""

    total: Tensor
    cross_entropy: Tensor
    tokens_per_expert_E: Tensor


def loss_of(model: nn.Module, spec: ModelSpec, tokens_BT1: Tensor) -> LossOutput:
    """Next-token loss of ``tokens_BT1`` (int64, [B, T + 1]) with the weighted router losses of ``spec`` added.

    Complements (``data.tokens``) are read like any token and are no targets.
    """
    output: ForwardOutput = model(read(tokens_BT1[:, :-1]))
    targets_BT = tokens_BT1[:, 1:]
    # fp32 whatever autocast chose: bf16 logits would round the loss people compare
    nats = F.cross_entropy(
        output.logits_BTV.float().flatten(0, 1), targets_BT.clamp_min(NOT_LEARNT).flatten(), ignore_index=NOT_LEARNT, reduction="sum"
    )
    cross_entropy = nats / num_learnt(targets_BT).clamp_min(1)
    total = cross_entropy + spec.aux_loss_weight * output.aux_loss + spec.z_loss_weight * output.z_loss
    return LossOutput(total, cross_entropy, output.tokens_per_expert_E)


def window_losses(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    """Cross entropy of each window, nats per token that is learnt, float64 [B] on the CPU; 0 where nothing is."""
    output: ForwardOutput = model(read(tokens_BT1[:, :-1]))
    targets_BT = tokens_BT1[:, 1:].clamp_min(NOT_LEARNT)
    nats_BT = F.cross_entropy(output.logits_BTV.float().transpose(1, 2), targets_BT, ignore_index=NOT_LEARNT, reduction="none")
    return nats_BT.double().sum(1).cpu() / (targets_BT >= 0).sum(1).clamp_min(1).cpu()
