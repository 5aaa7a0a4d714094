"""A short training of chosen parts of one model, outside any run: an expert and its row, a router, a new expert, or everything with a guard against forgetting.

Shapes: B batch, T tokens, E experts, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decentra.config import TrainSpec
from decentra.data.windows import WindowSource
from decentra.errors import TrainingError
from decentra.ids import ROUTER, expert_module
from decentra.model.decoder import Decoder
from decentra.modules import module_of_parameter
from decentra.peer.adamw import AdamW

Guard = Callable[[Decoder], Tensor]  # something added to the loss, 0-d


@dataclass(frozen=True)
class Plan:
    """``names``: parameters that move; ``rows``: of router matrices these rows only (None: all)."""

    steps: int
    names: frozenset[str]
    rows: tuple[int, ...] | None = None
    lr: float = 1.4e-3
    batch_size: int = 8
    warmup_steps: int = 10
    seed: int = 0


def names_of(model: nn.Module, *, experts: Sequence[int] = (), router: bool = False, trunk: bool = False) -> frozenset[str]:
    """Names of the parameters of these modules."""
    wanted = {expert_module(e) for e in experts} | ({ROUTER} if router else set()) | ({"trunk"} if trunk else set())
    return frozenset(name for name, _ in model.named_parameters() if module_of_parameter(name) in wanted)


def train(
    model: Decoder, source: WindowSource, plan: Plan, guards: Sequence[Guard] = (), say: Callable[[int, float], None] = lambda _step, _loss: None
) -> float:  # fmt: skip
    """Train in place; returns the mean loss of the last tenth of the steps (cross entropy, nats per token). Raises TrainingError when it diverges.

    Nothing else of the model changes, to the bit.
    """
    base = TrainSpec()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.names)
    moving = {name: p for name, p in model.named_parameters() if name in plan.names}
    optimizer = AdamW(list(moving.values()), beta1=base.beta1, beta2=base.beta2, weight_decay=base.weight_decay)
    still = [(p, _other_rows(p, plan.rows)) for n, p in moving.items() if plan.rows is not None and module_of_parameter(n) == ROUTER]
    losses: list[float] = []
    was_training = model.training
    model.train()
    try:
        for step in range(plan.steps):
            optimizer.zero_grad()
            loss = model.loss(source.next_batch(plan.batch_size))
            total = loss.total + sum((guard(model) for guard in guards), torch.zeros(()))
            if not math.isfinite(total.item()):
                raise TrainingError(f"the loss is not finite at step {step + 1}; lower --lr ({plan.lr:g})")
            total.backward()  # type: ignore[no-untyped-call]
            for parameter, rows in still:
                if parameter.grad is not None:
                    parameter.grad[rows] = 0.0
            nn.utils.clip_grad_norm_(optimizer.parameters, base.grad_clip)
            kept = [(p, rows, p.detach()[rows]) for p, rows in still]
            optimizer.step(plan.lr * min(1.0, (step + 1) / max(1, plan.warmup_steps)))
            with torch.no_grad():
                for parameter, rows, values in kept:
                    parameter[rows] = values
            losses.append(loss.cross_entropy.item())
            say(step + 1, losses[-1])
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


def _other_rows(parameter: Tensor, rows: tuple[int, ...] | None) -> Tensor:
    return torch.tensor([r for r in range(len(parameter)) if r not in (rows or ())], dtype=torch.int64)


# ---------------------------------------------------------------- guards against forgetting


def lwf(old: Decoder, source: WindowSource, weight: float = 1.0, batch_size: int = 4) -> Guard:
    """Learning without forgetting (arXiv 1606.09282): stay near the old model's predictions on text at hand, KL in nats per token."""
    old.eval()

    def guard(model: Decoder) -> Tensor:
        tokens_BT = source.next_inputs(batch_size)
        with torch.no_grad():
            before = old(tokens_BT).logits_BTV.log_softmax(-1)
        now = model(tokens_BT).logits_BTV.log_softmax(-1)
        divergence: Tensor = (before.exp() * (before - now)).sum(-1).mean()
        return weight * divergence

    return guard


def ewc(model: Decoder, source: WindowSource, weight: float = 100.0, num_batches: int = 16) -> Guard:
    """Elastic weight consolidation (arXiv 1612.00796): what mattered for old text, by its squared gradients, is held near where it is."""
    importance = squared_gradients(model, source, num_batches)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def guard(now: Decoder) -> Tensor:
        parts = [(importance[n] * (p - start[n]).square()).sum() for n, p in now.named_parameters() if p.requires_grad]
        return 0.5 * weight * torch.stack(parts).sum() if parts else torch.zeros(())

    return guard


def squared_gradients(model: Decoder, source: WindowSource, num_batches: int = 16) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: mean squared gradients of the loss of single batches of one window."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    was = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for _ in range(num_batches):
        model.zero_grad()
        model.loss(source.next_batch(1)).cross_entropy.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.square() / num_batches
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(was[name])
    return total


def model_of(state: Mapping[str, Tensor], spec: object) -> Decoder:
    """The decoder with these weights, in evaluation mode."""
    from decentra.config import ModelSpec

    assert isinstance(spec, ModelSpec)
    model = Decoder(spec)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()
