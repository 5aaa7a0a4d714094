"""The mixture-of-experts layer: a router and the experts that are present, dispatched by one sort. No loss weights and no optimizer.

Shapes: T tokens (batch and sequence flattened), D hidden, I expert hidden, E experts of the run, P experts present, K experts per
token, S = T * K slots sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decentra.config import ModelSpec


class Linear(nn.Module):
    """A matrix without bias and without an initialisation of its own: ``build_model`` or a loader fills it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Expert(nn.Module):
    """The weights of one SwiGLU expert in one layer (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.expert_hidden_size)
        self.up_proj = Linear(spec.hidden_size, spec.expert_hidden_size)
        self.down_proj = Linear(spec.expert_hidden_size, spec.hidden_size)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class RouterStats(NamedTuple):
    """What one layer's router did with T tokens; the decoder pools it over layers."""

    mean_prob_P: Tensor  # mean router probability of each present expert
    num_slots_P: Tensor  # int64: tokens sent to each present expert
    z_loss: Tensor  # mean squared log-sum-exp of the logits over all E rows


class MoE(nn.Module):
    """One layer's router (rows of all E experts) and the experts in ``present``; the choice is restricted to those."""

    def __init__(self, spec: ModelSpec, present: Sequence[int]) -> None:
        super().__init__()
        self.gate = Linear(spec.hidden_size, spec.num_experts)
        self.experts = nn.ModuleDict({str(e): Expert(spec) for e in present})
        self.present = tuple(present)
        self.spec, self.num_experts = spec, spec.num_experts
        self.is_renormalised = spec.norm_topk_prob
        self.bias_P: Tensor | None = None  # of loss-free balancing; lives while training goes on, and is in no checkpoint
        self.affinity_P: Tensor | None = None  # added to the logits of the choice, and to nothing else
        self.left_out: tuple[int, ...] = ()  # present, and not chosen now
        self.gives_zeros = False  # gradients of experts without tokens: zeros instead of none, where processes have to agree

    @property
    def num_chosen(self) -> int:
        return min(self.spec.num_experts_per_token, len(self.present) - len(self.left_out))

    def add(self, experts: Sequence[int], device: torch.device) -> None:
        """Room for experts that are absent; ``present`` and the dispatch stay in ascending order."""
        known = {**dict(self.experts.items()), **{str(e): Expert(self.spec).to(device) for e in experts}}
        self.present = tuple(sorted(int(e) for e in known))
        self.experts = nn.ModuleDict({str(e): known[str(e)] for e in self.present})

    def favour(self, experts: Sequence[int], affinity: float) -> None:
        """Choose these experts more often while training, as if their logits were higher by ``affinity``; weights and gradients stay the router's."""
        if affinity == 0.0:
            self.affinity_P = None
            return
        values = [affinity if e in experts else 0.0 for e in self.present]
        self.affinity_P = torch.tensor(values, device=self.gate.weight.device)

    def forward(self, x_TD: Tensor, logits_TE: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """``logits_TE``: instead of the router's own."""
        # router in fp32: top-k choices and the z-loss are sensitive to bf16 rounding
        with torch.autocast(x_TD.device.type, enabled=False):
            if logits_TE is None:
                logits_TE = F.linear(x_TD.float(), self.gate.weight)
            if self.left_out:
                logits_TE = logits_TE.index_fill(1, torch.tensor(self.left_out, device=logits_TE.device), -torch.inf)
            z_loss = logits_TE.logsumexp(-1).square().mean()
            logits_TP = logits_TE if len(self.present) == self.num_experts else logits_TE[:, list(self.present)]
            probs_TP = logits_TP.softmax(-1)
            if self.affinity_P is None and self.bias_P is None:
                weights_TK, choice_TK = probs_TP.topk(self.num_chosen, dim=-1)
            else:
                favoured_TP = logits_TP.detach() + sum(b for b in (self.affinity_P, self.bias_P) if b is not None)
                choice_TK = favoured_TP.topk(self.num_chosen, dim=-1).indices
                weights_TK = probs_TP.gather(-1, choice_TK)
            if self.is_renormalised:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        num_slots_P = torch.bincount(choice_TK.flatten(), minlength=len(self.present))
        if self.training and self.spec.bias_rate:
            self._rebalance(num_slots_P)
        y_TD = self._dispatch(x_TD, weights_TK, choice_TK, num_slots_P)
        return y_TD, RouterStats(probs_TP.mean(0), num_slots_P, z_loss)

    @torch.no_grad()
    def _rebalance(self, num_slots_P: Tensor) -> None:
        """Who had fewer tokens than the mean is chosen more easily from the next step on, by ``bias_rate``."""
        if self.bias_P is None or len(self.bias_P) != len(num_slots_P):
            self.bias_P = torch.zeros(len(num_slots_P), device=num_slots_P.device)
        load_P = num_slots_P.float()
        self.bias_P = self.bias_P + self.spec.bias_rate * (load_P.mean() - load_P).sign()

    def _dispatch(self, x_TD: Tensor, weights_TK: Tensor, choice_TK: Tensor, num_slots_P: Tensor) -> Tensor:
        order_S = choice_TK.flatten().argsort(stable=True)
        # ModuleDict.values() is in the order of ``present``
        matrices = [w for expert in self.experts.values() for w in expert.weights()]  # type: ignore[operator]
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_TD, weights_TK, matrices = x_TD.to(dtype), weights_TK.to(dtype), [w.to(dtype) for w in matrices]
        y_TD: Tensor = _ExpertMix.apply(x_TD, weights_TK, order_S, num_slots_P.tolist(), self.gives_zeros, *matrices)  # type: ignore[no-untyped-call]
        return y_TD


class _ExpertMix(torch.autograd.Function):
    """sum_k weight_tk * expert_k(x_t) with hand-written gradients.

    One autograd node instead of about ten per expert: with small experts the bookkeeping weighs on a CPU (10-15 % of a step of the
    default model, measured). The routing weight is applied before ``down``, so its gradient needs no stored expert outputs. Weight
    gradients of frozen experts are never computed; an expert without tokens gets no gradient at all (None), so the optimizer leaves
    it alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, order_S: Tensor, counts: list[int], gives_zeros: bool, *matrices: Tensor
    ) -> Tensor:
        num_tokens, num_chosen = weights_TK.shape
        x_SD = x_TD.index_select(0, order_S // num_chosen)
        weight_S1 = weights_TK.flatten()[order_S].unsqueeze(-1)
        gate_SI = x_SD.new_empty(len(order_S), matrices[0].shape[0])
        up_SI, y_SD = torch.empty_like(gate_SI), torch.empty_like(x_SD)
        for rows, (gate, up, _) in _parts(counts, matrices):
            torch.mm(x_SD[rows], gate.t(), out=gate_SI[rows])
            torch.mm(x_SD[rows], up.t(), out=up_SI[rows])
        sigmoid_SI = gate_SI.sigmoid()  # kept, because exp is by far the dearest elementwise operation on a CPU
        weighted_SI = (gate_SI * sigmoid_SI).mul_(up_SI).mul_(weight_S1)
        for rows, (_, _, down) in _parts(counts, matrices):
            torch.mm(weighted_SI[rows], down.t(), out=y_SD[rows])
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        ctx.counts, ctx.num_chosen, ctx.gives_zeros = counts, num_chosen, gives_zeros
        ctx.save_for_backward(x_SD, weight_S1, order_S, inverse_S, gate_SI, up_SI, sigmoid_SI, *matrices)
        return y_SD.index_select(0, inverse_S).view(num_tokens, num_chosen, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_SD, weight_S1, order_S, inverse_S, gate_SI, up_SI, sigmoid_SI, *matrices = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy_SD = grads[0].index_select(0, order_S // ctx.num_chosen)
        silu_SI = gate_SI * sigmoid_SI
        h_SI = silu_SI * up_SI
        dh_SI = torch.empty_like(gate_SI)
        for rows, (_, _, down) in _parts(ctx.counts, matrices):
            torch.mm(dy_SD[rows], down, out=dh_SI[rows])
        dweights_TK = None
        if needs[1]:
            dweights_TK = (dh_SI * h_SI).sum(-1).index_select(0, inverse_S).view(-1, ctx.num_chosen)
        dh_SI.mul_(weight_S1)
        dup_SI = dh_SI * silu_SI
        # silu' = sigmoid + silu - silu * sigmoid
        dgate_SI = dh_SI.mul_(up_SI).mul_((sigmoid_SI + silu_SI).addcmul_(silu_SI, sigmoid_SI, value=-1.0))
        dmatrices = _matrix_grads(ctx.counts, matrices, needs[5:], (x_SD, h_SI.mul_(weight_S1), dy_SD, dgate_SI, dup_SI))
        if ctx.gives_zeros:
            dmatrices = [torch.zeros_like(w) if d is None and n else d for d, w, n in zip(dmatrices, matrices, needs[5:], strict=True)]
        dx_TD = None
        if needs[0]:
            dx_SD = torch.empty_like(x_SD)
            for rows, (gate, up, _) in _parts(ctx.counts, matrices):
                torch.mm(dgate_SI[rows], gate, out=dx_SD[rows])
                dx_SD[rows].addmm_(dup_SI[rows], up)
            dx_TD = dx_SD.index_select(0, inverse_S).view(-1, ctx.num_chosen, x_SD.shape[-1]).sum(1)
        return dx_TD, dweights_TK, None, None, None, *dmatrices


def _parts(counts: list[int], matrices: Sequence[Tensor]) -> list[tuple[slice, Sequence[Tensor]]]:
    """(rows of the sorted slots, (gate, up, down)) of every expert that got tokens."""
    parts, start = [], 0
    for index, count in enumerate(counts):
        if count:
            parts.append((slice(start, start + count), matrices[3 * index : 3 * index + 3]))
        start += count
    return parts


def _matrix_grads(
    counts: list[int], matrices: Sequence[Tensor], needs: Sequence[bool], activations: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
) -> list[Tensor | None]:
    x_SD, weighted_SI, dy_SD, dgate_SI, dup_SI = activations
    grads: list[Tensor | None] = [None] * len(matrices)
    start = 0
    for index, count in enumerate(counts):
        rows, at = slice(start, start + count), 3 * index
        start += count
        if not count:
            continue
        if needs[at]:
            grads[at] = dgate_SI[rows].t() @ x_SD[rows]
        if needs[at + 1]:
            grads[at + 1] = dup_SI[rows].t() @ x_SD[rows]
        if needs[at + 2]:
            grads[at + 2] = dy_SD[rows].t() @ weighted_SI[rows]
    return grads
