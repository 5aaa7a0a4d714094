"""A model of your own for a run: small causal convolutions and a mixture of experts over bytes. An example to copy; nothing imports it.

    decentra init my-run --model-code peers/bring_your_own_model.py --set model.hidden_size=64
    decentra join INVITE --model-code bring_your_own_model.py

The manifest holds the file's hash: every peer needs the same bytes, gets them from the organiser by hand, and reads them before running them.

The contract is two functions:

build(spec, seed)   a torch.nn.Module. Its forward takes tokens (int64, [B, T]) and returns ForwardOutput. The same seed should give a model of the
                    same shapes; the first weights that count are the files 'init' makes, so equal numbers are not needed.
module_of(name)     to which module a parameter belongs: "trunk", "router" or "expert.0" .. "expert.N". What several peers share out are
                    experts; the trunk and the router are trained by all. Left out: names as in Qwen3-MoE checkpoints.

Use what you like from the manifest's [model] section and ignore the rest. No dropout or other randomness is needed; if you use some, a resumed
peer continues it exactly.

Shapes: B batch, T tokens, V vocabulary, D hidden, I expert hidden, E experts, K experts per token, S = B * T.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decentra.config import ModelSpec
from decentra.model.output import ForwardOutput

KERNEL_TOKENS = 8


class CausalConv(nn.Module):
    """Mixes each channel over the last ``KERNEL_TOKENS`` tokens, then gates: x [B, T, D] -> [B, T, D]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(hidden_size, hidden_size, KERNEL_TOKENS, groups=hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        padded_BDT = F.pad(x_BTD.transpose(1, 2), (KERNEL_TOKENS - 1, 0))
        return self.out(self.filter(padded_BDT).transpose(1, 2) * torch.sigmoid(self.gate(x_BTD)))


class Expert(nn.Module):
    """A two-layer perceptron: x [S, D] -> [S, D]. The unit that peers share out."""

    def __init__(self, hidden_size: int, expert_hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, expert_hidden_size, bias=False)
        self.down = nn.Linear(expert_hidden_size, hidden_size, bias=False)

    def forward(self, x_SD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_SD)))


class Mixture(nn.Module):
    """Sends every token to its ``num_experts_per_token`` best experts; returns their weighted sum, both router losses and token counts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_chosen = spec.num_experts_per_token
        self.router = nn.Linear(spec.hidden_size, spec.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(spec.hidden_size, spec.expert_hidden_size) for _ in range(spec.num_experts))

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_SE = self.router(x_SD).float()
        probs_SE = logits_SE.softmax(-1)
        weights_SK, chosen_SK = probs_SE.topk(self.num_chosen, dim=-1)
        weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        y_SD = torch.zeros_like(x_SD)
        for index, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen_SK == index)
            if rows.numel():
                y_SD = y_SD.index_add(0, rows, expert(x_SD[rows]) * weights_SK[rows, slot, None].to(x_SD.dtype))
        counts_E = torch.bincount(chosen_SK.flatten(), minlength=len(self.experts))
        share_E = counts_E.float() / counts_E.sum()
        aux_loss = len(self.experts) * (share_E * probs_SE.mean(0)).sum()  # Switch Transformer, arXiv 2101.03961, eq. 4
        z_loss = logits_SE.logsumexp(-1).square().mean()  # ST-MoE, arXiv 2202.08906, eq. 5
        return y_SD, aux_loss, z_loss, counts_E


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm_conv, self.norm_mixture = nn.LayerNorm(spec.hidden_size), nn.LayerNorm(spec.hidden_size)
        self.conv, self.mixture = CausalConv(spec.hidden_size), Mixture(spec)


class ConvMixture(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.hidden_size)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> ForwardOutput:
        x_BTD = self.embed(tokens_BT)
        aux_losses, z_losses, counts = [], [], []
        for layer in self.layers:
            x_BTD = x_BTD + layer.conv(layer.norm_conv(x_BTD))
            y_SD, aux_loss, z_loss, counts_E = layer.mixture(layer.norm_mixture(x_BTD).flatten(0, 1))
            x_BTD = x_BTD + y_SD.view_as(x_BTD)
            aux_losses.append(aux_loss)
            z_losses.append(z_loss)
            counts.append(counts_E)
        logits_BTV = self.head(self.norm(x_BTD))
        # counts are summed over layers: they become the weights of the experts' deltas
        return ForwardOutput(logits_BTV, torch.stack(aux_losses).mean(), torch.stack(z_losses).mean(), torch.stack(counts).sum(0))


def build(spec: ModelSpec, seed: int) -> nn.Module:
    """The run's model; see the contract above."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvMixture(spec)


def module_of(name: str) -> str:
    """Experts and router rows are found by name, everything else is trunk."""
    if found := re.search(r"\.mixture\.experts\.(\d+)\.", name):
        return f"expert.{found.group(1)}"
    return "router" if name.endswith(".mixture.router.weight") else "trunk"
