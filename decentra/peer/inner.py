"""The inner loop as plain calls: one optimizer step, and everything that may happen between two steps. No thread, no asyncio, no network.

Shapes: B batch, T tokens, N elements of a fragment, E experts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from decentra.config import Manifest
from decentra.data.windows import WindowSource
from decentra.delta.flat import gather, scatter
from decentra.errors import ConfigError, DataError, IntegrityError
from decentra.ids import ROUTER, FragmentId, expert_of, module_of_fragment
from decentra.model.moe import MoE
from decentra.model.output import LossOutput, loss_of, num_learnt, window_losses
from decentra.modules import Layout, module_of_parameter
from decentra.peer.adamw import MOMENTS, AdamW
from decentra.peer.affinity import preference
from decentra.peer.muon import MUON_MOMENTS, MuonWithAdamW, moments_of

NUM_BAD_STEPS_DIVERGED = 5
LOSS_EMA_DECAY = 0.95


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One fragment between two inner steps. Counts are totals since the peer joined the run."""

    live_N: Tensor  # fp32 on the CPU, owns its memory
    num_steps: int
    num_tokens: int  # tokens that trained it; of an expert: tokens sent to it, summed over layers / num_layers
    cursor: bytes
    has_bad_steps: bool  # a loss or gradient was not finite since the last snapshot of this fragment
    untouched: tuple[slice, ...] = ()  # parts of live_N that this peer does not train: router rows of experts it does not hold


class Totals(NamedTuple):
    """What the trainer did so far; replaced as a whole after every step, so any thread may read it."""

    num_steps: int = 0
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    loss_ema: float | None = None  # cross entropy in nats per token
    expert_tokens: dict[int, int] = {}  # expert -> tokens that trained it


@dataclass
class _Counters:
    """Everything that is counted, and nothing else: this is what a state record holds beside tensors."""

    num_steps: int = 0  # skipped ones included
    num_skipped_steps: int = 0
    num_bad_in_row: int = 0
    num_tokens: int = 0
    run_tokens: int = 0  # confirmed tokens of the whole run, as last heard: what the learning rate follows
    loss_ema: float | None = None
    expert_slots: dict[int, int] = field(default_factory=dict)  # summed over layers
    bad_fragments: set[FragmentId] = field(default_factory=set)


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch.device() itself accepts other backends and wraps large indices around
    if not (found := re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)):
        raise ConfigError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name[:40]!r}")
    if name != "cpu" and int(found.group(1) or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA devices; use 'auto' or 'cpu'")
    return torch.device(name)


class InnerLoop:
    """Model, optimizer, data and counters of one peer; owned by one thread at a time."""

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        model: nn.Module,
        source: WindowSource,
        device: torch.device,
        trained: frozenset[FragmentId],
    ) -> None:
        self.layout, self.device = layout, device
        self._manifest, self._source = manifest, source
        self._model = model.to(device)
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._counters = _Counters()
        self._optimizer = self._new_optimizer({})
        self.trained: frozenset[FragmentId] = frozenset()
        self.set_trained(trained)
        self._absent_rows = self._rows_of_absent()

    @property
    def can_step(self) -> bool:
        return bool(self._optimizer.parameters)

    @property
    def num_skipped_steps(self) -> int:
        return self._counters.num_skipped_steps

    @property
    def is_diverged(self) -> bool:
        return self._counters.num_bad_in_row >= NUM_BAD_STEPS_DIVERGED

    def set_run_tokens(self, run_tokens: int) -> None:
        """The whole run has so many confirmed tokens."""
        self._counters.run_tokens = run_tokens

    def totals(self, tokens_per_s: float) -> Totals:
        c = self._counters
        return Totals(c.num_steps, c.num_tokens, tokens_per_s, c.loss_ema, {e: self._expert_tokens(e) for e in sorted(c.expert_slots)})

    def close(self) -> None:
        """No step follows."""

    # ------------------------------------------------------------ one step

    def step(self) -> int:
        """One inner step; returns the tokens trained, 0 for a step that was skipped: nothing in it was to be learnt, or its numbers were not finite."""
        train, counters = self._manifest.train, self._counters
        tokens_BT1 = self._next_batch()
        lr = train.lr_at(counters.num_steps, counters.run_tokens)
        counters.num_steps += 1
        num_tokens = int(num_learnt(tokens_BT1[:, 1:]))
        if not num_tokens:
            return 0  # nothing to learn here; the router's own losses alone must not move anything
        self._optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = loss_of(self._model, self._manifest.model, self._mine(tokens_BT1))
        total, cross_entropy, slots_E = self._told(loss)
        is_good = math.isfinite(total)
        if is_good:
            self._to_lower(loss).backward()  # type: ignore[no-untyped-call]
            self._forget_absent_rows()
            is_good = math.isfinite(self._clip(train.grad_clip))
        if not is_good:
            counters.num_skipped_steps += 1
            counters.num_bad_in_row += 1
            counters.bad_fragments.update(self.trained)
            return 0
        kept = [(p, rows, p.detach()[rows]) for p, rows in self._absent_rows]  # weight decay must not move them either
        self._optimizer.step(lr)
        with torch.no_grad():
            for parameter, rows, values in kept:
                parameter[rows] = values
        share = num_tokens / tokens_BT1[:, 1:].numel()  # what is only read trains no expert
        self._count(num_tokens, cross_entropy, [round(share * slots) for slots in slots_E])
        return num_tokens

    # What follows is otherwise where several processes train one model (``sharded.py``).

    def _next_batch(self) -> Tensor:
        """int64 [B, T + 1] on the device."""
        return self._source.next_batch(self._manifest.train.batch_size, *self._preference).to(self.device)

    def _mine(self, tokens_BT1: Tensor) -> Tensor:
        """The rows that this process trains on."""
        return tokens_BT1

    def _to_lower(self, loss: LossOutput) -> Tensor:
        """What this process's gradient is of."""
        return loss.total

    def _told(self, loss: LossOutput) -> tuple[float, float, list[int]]:
        """Total loss, cross entropy and tokens per expert of the whole batch."""
        return loss.total.item(), loss.cross_entropy.item(), loss.tokens_per_expert_E.tolist()

    def _clip(self, most: float) -> float:
        """Shorten the gradient to at most ``most``; returns its norm before."""
        return nn.utils.clip_grad_norm_(self._optimizer.parameters, most).item()

    def _updated(self, name: str) -> nn.Parameter:
        """What the optimizer updates for a parameter."""
        return self._parameters[name]

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """A parameter or a moment of its shape, whole."""
        return value

    def _part(self, name: str, value: Tensor) -> Tensor:
        """What of a whole parameter or moment lies in this process."""
        return value

    def _count(self, num_tokens: int, cross_entropy: float, slots_E: list[int]) -> None:
        counters = self._counters
        counters.num_bad_in_row = 0
        counters.num_tokens += num_tokens
        old = cross_entropy if counters.loss_ema is None else counters.loss_ema
        counters.loss_ema = LOSS_EMA_DECAY * old + (1.0 - LOSS_EMA_DECAY) * cross_entropy
        for fragment in self.trained:
            # tokens sent to a frozen expert teach it nothing, so they are nobody's contribution
            if (expert := expert_of(module_of_fragment(fragment))) is not None:
                counters.expert_slots[expert] = counters.expert_slots.get(expert, 0) + slots_E[expert]

    def _rows_of_absent(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Router parameters [E, D] and the rows of experts that are not in this process: who does not hold an expert does not train its row."""
        present = getattr(self._model, "present", range(self._manifest.model.num_experts))
        absent = [e for e in range(self._manifest.model.num_experts) if e not in present]
        rows = torch.tensor(absent, dtype=torch.int64, device=self.device)
        return [(p, rows) for name, p in self._parameters.items() if absent and module_of_parameter(name) == ROUTER]

    def _forget_absent_rows(self) -> None:
        for parameter, rows in self._absent_rows:
            if parameter.grad is not None:
                parameter.grad[rows] = 0.0

    def _expert_tokens(self, expert: int) -> int:
        return self._counters.expert_slots.get(expert, 0) // self._manifest.model.num_layers

    # ------------------------------------------------------------ between two steps

    def hold(self, experts: Sequence[int]) -> None:
        """Take these experts into the process, as zeros; ``load`` fills them. Raises ConfigError where the model cannot hold a part of them."""
        add = getattr(self._model, "add_experts", None)
        if add is None:
            raise ConfigError("this run's own model code has no add_experts, so its model is held whole; join with --mode mirror")
        for name in add(experts):
            dict(self._model.named_parameters())[name].requires_grad_(False)
        self._parameters = dict(self._model.named_parameters())
        self._absent_rows = self._rows_of_absent()

    def snapshot(self, fragment: FragmentId) -> Snapshot:
        """A copy of one fragment with its counts. Raises ConfigError when the model lacks its parameters."""
        counters, expert = self._counters, expert_of(module_of_fragment(fragment))
        num_tokens = counters.num_tokens if expert is None else self._expert_tokens(expert)
        has_bad_steps = fragment in counters.bad_fragments
        whole = {s.name: self._whole(s.name, p) for s in self.layout[fragment].slots if (p := self._parameters.get(s.name)) is not None}
        live_N = gather(whole, self.layout[fragment])
        counters.bad_fragments.discard(fragment)
        untouched = self._untouched(fragment)
        return Snapshot(live_N, counters.num_steps, num_tokens, self._source.cursor(), has_bad_steps, untouched)

    def _untouched(self, fragment: FragmentId) -> tuple[slice, ...]:
        absent = {id(parameter): rows.tolist() for parameter, rows in self._absent_rows}
        spans = []
        for slot in self.layout[fragment].slots:
            row_size = slot.size // slot.shape[0] if slot.shape else slot.size
            spans += [
                slice(start := slot.offset + row * row_size, start + row_size)
                for row in absent.get(id(self._parameters.get(slot.name)), ())
            ]
        return tuple(spans)

    @torch.no_grad()
    def gains(self, fragment: FragmentId, anchor_N: Tensor, deltas: Sequence[Tensor], step: float, number: int, num_windows: int) -> Tensor:
        """How much lower this peer's loss is with a small step of each delta, [deltas, windows], nats per token: loss(anchor) - loss(anchor - step * delta).

        The rest of the model is as it is now; the fragment is put back, and neither moments, counters nor the order of the text change. Equal ``number``
        means equal text.
        """
        tokens_BT1 = self._source.aside(number, num_windows).to(self.device)
        slots = self.layout[fragment].slots
        kept = {s.name: self._parameters[s.name].detach().clone() for s in slots}
        was_training = self._model.training
        self._model.eval()
        try:
            losses = []
            for values_N in (anchor_N, *(anchor_N - step * delta_N for delta_N in deltas)):
                for name, values in scatter(values_N, self.layout[fragment]).items():
                    self._parameters[name].copy_(values.to(self.device))
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                    losses.append(window_losses(self._model, tokens_BT1))
        finally:
            for name, values in kept.items():
                self._parameters[name].copy_(values)
            self._model.train(was_training)
        return torch.stack([losses[0] - loss for loss in losses[1:]])

    @torch.no_grad()
    def shift(self, fragment: FragmentId, delta_N: Tensor) -> None:
        """live += delta."""
        for name, delta in scatter(delta_N, self.layout[fragment]).items():
            self._updated(name).add_(self._part(name, delta).to(self.device))

    @torch.no_grad()
    def load(self, fragment: FragmentId, values_N: Tensor) -> None:
        """live := values; the optimizer moments of the fragment belong to the old values and are dropped."""
        for name, values in scatter(values_N, self.layout[fragment]).items():
            self._updated(name).copy_(self._part(name, values))
            self._optimizer.state.pop(self._updated(name), None)

    def set_trained(self, trained: frozenset[FragmentId]) -> None:
        """Train exactly these fragments from now on; moments of those that stay are kept, of the others dropped."""
        names = {slot.name for fragment in trained for slot in self.layout[fragment].slots}
        if missing := sorted(names - self._parameters.keys()):
            raise ConfigError(f"fragments to train need parameter {missing[0]}, the model has none of that name; check the model's code")
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None
        self.trained = trained
        own = [e for f in trained if (e := expert_of(module_of_fragment(f))) is not None]
        for module in self._model.modules():
            if isinstance(module, MoE):
                module.favour(own, self._manifest.placement.affinity)
        self._preference = preference(self._model, own, self._manifest)
        old = self._optimizer.state
        self._optimizer = self._new_optimizer({name: self._updated(name) for name in self._parameters if name in names})
        self._optimizer.state.update({p: old[p] for p in self._optimizer.parameters if p in old})

    def _new_optimizer(self, parameters: dict[str, nn.Parameter]) -> AdamW | MuonWithAdamW:
        train = self._manifest.train
        if train.optimizer == "muon":
            return MuonWithAdamW(parameters, beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)
        return AdamW(list(parameters.values()), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)

    # ------------------------------------------------------------ state record

    def record(self) -> bytes:
        """Trained parameters, their moments, counters, data cursor and torch's random state as safetensors bytes."""
        tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                tensors[f"live/{name}"] = self._whole(name, parameter.detach())
                state = self._optimizer.state.get(self._updated(name), {})
                tensors.update({f"{key}/{name}": self._whole(name, value) if value.ndim else value for key, value in state.items()})
        c = self._counters
        counters = {**vars(c), "expert_slots": sorted(c.expert_slots.items()), "bad_fragments": sorted(c.bad_fragments)}
        meta = {"format": 1, "cursor": self._source.cursor().decode(), "counters": counters}
        tensors["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        return safetensors.torch.save({key: value.cpu().contiguous() for key, value in tensors.items()})

    def restore(self, data: bytes) -> None:
        """Go on from a record of an earlier process, bit for bit on the same machine. Raises IntegrityError, and then changes nothing."""
        tensors = _parsed_record(data)
        meta, counters = _parsed_meta(tensors.pop("meta", None))
        known = {slot.name for fragment in self.layout.fragments for slot in fragment.slots}
        for key in [k for k in tensors if (name := k.partition("/")[2]) in known and name not in self._parameters]:
            del tensors[key]  # of an expert that this process does not hold any more
        for key, value in tensors.items():
            self._check_record_tensor(key, value)
        try:
            self._source.seek(meta["cursor"].encode())
        except DataError as error:
            raise IntegrityError(f"trainer record: {error}") from None
        self._counters = counters
        torch.set_rng_state(tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
        for name, parameter in self._parameters.items():
            if (live := tensors.get(f"live/{name}")) is not None:
                with torch.no_grad():
                    self._updated(name).copy_(self._part(name, live))
            if parameter.requires_grad:
                self._optimizer.state.pop(self._updated(name), None)
                moments = moments_of(name, parameter, self._manifest.train.optimizer)
                found = {key: tensors[f"{key}/{name}"] for key in moments if f"{key}/{name}" in tensors}
                if len(found) == len(moments):
                    parts = {key: self._part(name, value) if value.ndim else value for key, value in found.items()}
                    self._optimizer.state[self._updated(name)] = {key: value.to(self.device) for key, value in parts.items()}

    def _check_record_tensor(self, key: str, value: Tensor) -> None:
        kind, _, name = key.partition("/")
        if kind == "rng":
            return
        parameter = self._parameters.get(name)
        if kind not in ("live", *MOMENTS, *MUON_MOMENTS) or parameter is None:
            raise IntegrityError(f"trainer record: it has {key[:100]!r}, which this model does not; it belongs to another run or model")
        shape = () if kind == "step" else tuple(parameter.shape)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise IntegrityError(f"trainer record: expected {key[:100]!r} of shape {shape}, got {tuple(value.shape)} {value.dtype}")


def _parsed_record(data: bytes) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with contextlib.suppress(safetensors.SafetensorError):
        tensors = safetensors.torch.load(data)
    state = tensors.get("rng/cpu")
    if state is None or state.dtype != torch.uint8 or state.shape != torch.get_rng_state().shape:
        raise IntegrityError(
            f"trainer record: {len(data)} bytes that are not a whole record; remove it, the peer then starts from its anchors"
        )
    return tensors


def _parsed_meta(meta: Tensor | None) -> tuple[dict[str, Any], _Counters]:
    try:
        raw = json.loads(bytes(meta.tolist())) if meta is not None else {}
        if raw["format"] != 1 or not isinstance(raw["cursor"], str):
            raise ValueError("format")
        fields = dict(raw["counters"])
        fields["expert_slots"] = {int(expert): int(count) for expert, count in fields["expert_slots"]}
        fields["bad_fragments"] = {FragmentId(str(f)) for f in fields["bad_fragments"]}
        return raw, _Counters(**fields)
    except (KeyError, TypeError, ValueError):
        raise IntegrityError("trainer record: its counters cannot be read; remove it, the peer then starts from its anchors") from None
