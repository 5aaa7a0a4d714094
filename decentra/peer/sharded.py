"""One peer of several processes, a GPU each: parameters, gradients and moments are sharded over them (FSDP2, ``torch.distributed.fsdp.fully_shard``).

Rank 0 is the peer: it has the identity, the data and the swarm. The other ranks repeat every operation of its inner loop, because each is a collective:
``LeadInner`` tells them what comes next, ``follow`` does it. What goes between them is a header of numbers, JSON and plain tensors.

A batch is split by rows, so a peer of two processes does the same steps as one of one. Only the load-balancing loss differs a little: it is a product of
means, taken here over each rank's rows. Shapes: B batch, T tokens, E experts.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from decentra.config import Manifest, manifest_from_bytes
from decentra.data.windows import WindowSource
from decentra.errors import ConfigError, IntegrityError, Unreachable
from decentra.ids import FragmentId
from decentra.model.moe import MoE
from decentra.model.output import LossOutput, num_learnt
from decentra.modules import Layout
from decentra.peer.adamw import AdamW
from decentra.peer.inner import InnerLoop, Snapshot

FOREVER = timedelta(days=365)  # a peer may wait for its swarm for days, and its other ranks with it
TOGETHER = timedelta(seconds=120)  # in a step nobody waits longer for another

_DTYPES = {str(d): d for d in (torch.float32, torch.int64, torch.uint8, torch.bfloat16)}


@dataclass
class Ranks:
    """The processes of one peer. ``control``: a gloo group over CPU tensors."""

    rank: int
    size: int
    device: torch.device
    control: Any

    @staticmethod
    def start(local_rank: int, device_name: str = "auto") -> Ranks:
        """Meet the other ranks of the launcher. Raises ConfigError for a device that cannot be shared, Unreachable when they do not come."""
        device = _device(local_rank, device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TOGETHER)
            control = dist.new_group(backend="gloo", timeout=FOREVER)
        except RuntimeError as error:
            raise Unreachable(f"the other processes of this peer did not come within {TOGETHER.seconds} s: {error}") from None
        return Ranks(dist.get_rank(), dist.get_world_size(), device, control)

    def close(self) -> None:
        with suppress(RuntimeError):  # another rank is gone already
            dist.destroy_process_group()

    def tell_last(self, op: str) -> None:
        """``tell`` at an end: who is gone already need not hear it."""
        with suppress(RuntimeError):
            self.tell(op)

    def tell(self, op: str, meta: dict[str, Any] | None = None, tensors: Sequence[Tensor] = ()) -> None:
        """From rank 0 to all others: an operation and what it needs."""
        shapes = [[list(t.shape), str(t.dtype)] for t in tensors]
        text = torch.frombuffer(bytearray(json.dumps([op, meta or {}, shapes]).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([text.numel()]), 0, group=self.control)
        for tensor in (text, *tensors):
            if tensor.numel():
                dist.broadcast(tensor.cpu().contiguous(), 0, group=self.control)

    def hear(self) -> tuple[str, dict[str, Any], list[Tensor]]:
        """What rank 0 told."""
        num_bytes = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(num_bytes, 0, group=self.control)
        text = torch.empty(int(num_bytes), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.control)
        op, meta, shapes = json.loads(bytes(text.tolist()))
        tensors = [torch.empty(shape, dtype=_DTYPES[dtype]) for shape, dtype in shapes]
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(tensor, 0, group=self.control)
        return op, meta, tensors

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        found: list[float] = total.tolist()
        return found


class ShardedInner(InnerLoop):
    """The inner loop of one rank. Every method is a collective: all ranks call the same ones in the same order."""

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        model: nn.Module,
        source: WindowSource | None,
        ranks: Ranks,
        trained: frozenset[FragmentId],
    ) -> None:
        """Raises ConfigError for what cannot be sharded."""
        check_shardable(manifest, ranks.size)
        self.ranks = ranks
        self._locals: dict[str, nn.Parameter] = {}
        self._heard: Tensor | None = None  # the batch that rank 0 sent
        self._share = 1.0  # of the batch's learnt tokens that are in this rank's rows, over 1 / size
        for module in model.modules():
            if isinstance(module, MoE):
                module.gives_zeros = True
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            self._locals[name] = nn.Parameter(parameter.to_local(), requires_grad=False)
        super().__init__(manifest, layout, model, source, ranks.device, trained)  # type: ignore[arg-type]  # rank 0 alone has a source
        assert not self._absent_rows, "a model with a part of its experts is not sharded"

    def hold(self, experts: Sequence[int]) -> None:
        raise ConfigError("a peer of several processes has all experts in memory; join with --mode mirror")

    # ------------------------------------------------------------ one step

    def _next_batch(self) -> Tensor:
        assert self._heard is not None, "rank 0 sends the batch before the step"
        return self._heard.to(self.device)

    def _mine(self, tokens_BT1: Tensor) -> Tensor:
        mine = tokens_BT1.chunk(self.ranks.size)[self.ranks.rank]
        self._share = self.ranks.size * int(num_learnt(mine[:, 1:])) / max(1, int(num_learnt(tokens_BT1[:, 1:])))
        return mine

    def _to_lower(self, loss: LossOutput) -> Tensor:
        return loss.total + (self._share - 1.0) * loss.cross_entropy  # FSDP takes the mean over ranks, the loss is one over tokens learnt

    def _told(self, loss: LossOutput) -> tuple[float, float, list[int]]:
        cross_entropy = self._share * loss.cross_entropy.item()
        mine = [self._to_lower(loss).item(), cross_entropy, *map(float, loss.tokens_per_expert_E.tolist())]
        total, cross_entropy, *slots_E = self.ranks.sum(mine)
        return total / self.ranks.size, cross_entropy / self.ranks.size, [int(s) for s in slots_E]

    def _clip(self, most: float) -> float:
        grads = {name: p.grad for name, p in self._parameters.items() if p.requires_grad and p.grad is not None}
        squares = self.ranks.sum(torch.stack([_local(g).double().square().sum() for g in grads.values()]).tolist())
        norm = sum(squares) ** 0.5
        factor = min(1.0, most / (norm + 1e-6))
        for (name, grad), square in zip(grads.items(), squares, strict=True):
            # nobody's token went to it: it is left alone, as in a single process
            self._locals[name].grad = None if square == 0.0 else _local(grad).mul_(factor)
        return float(norm)

    def step(self) -> int:
        for parameter in self._parameters.values():
            parameter.grad = None
        try:
            return super().step()
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Give up whole parameters that a forward without its backward left: the next one would not see what changed since."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def set_trained(self, trained: frozenset[FragmentId]) -> None:
        super().set_trained(trained)
        for module in self._model.modules():  # FSDP keeps the whole parameters that it once made
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                for one in group.fsdp_params:
                    if hasattr(one, "_unsharded_param"):
                        one._unsharded_param.requires_grad_(one.sharded_param.requires_grad)

    def _new_optimizer(self, parameters: dict[str, nn.Parameter]) -> AdamW:
        train = self._manifest.train
        return AdamW(list(parameters.values()), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)

    # ------------------------------------------------------------ whole and part

    def _updated(self, name: str) -> nn.Parameter:
        return self._locals[name]

    def _whole(self, name: str, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            return value.full_tensor()
        like = self._parameters[name]
        assert isinstance(like, DTensor)
        return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()

    def _part(self, name: str, value: Tensor) -> Tensor:
        like = self._parameters[name]
        assert isinstance(like, DTensor)
        whole = value.to(self.device, like.dtype)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


class LeadInner(ShardedInner):
    """Rank 0's: the face that the trainer knows. Tells the others each operation before it does it."""

    def __init__(
        self, manifest: Manifest, layout: Layout, model: nn.Module, source: WindowSource, ranks: Ranks, trained: frozenset[FragmentId]
    ) -> None:
        self._is_told = True  # what the constructor calls is part of "build"
        ranks.tell("build", {"manifest": manifest.canonical_bytes().decode(), "trained": sorted(trained)})
        super().__init__(manifest, layout, model, source, ranks, trained)
        self._is_told = False

    def close(self) -> None:
        self.ranks.tell_last("close")

    def step(self) -> int:
        self._heard = self._source.next_batch(self._manifest.train.batch_size)  # rank 0 alone: no forward, so no data affinity
        self.ranks.tell("step", {"run_tokens": self._counters.run_tokens}, [self._heard])
        return super().step()

    def snapshot(self, fragment: FragmentId) -> Snapshot:
        self.ranks.tell("snapshot", {"fragment": fragment})
        return super().snapshot(fragment)

    def shift(self, fragment: FragmentId, delta_N: Tensor) -> None:
        self.ranks.tell("shift", {"fragment": fragment}, [delta_N])
        super().shift(fragment, delta_N)

    def load(self, fragment: FragmentId, values_N: Tensor) -> None:
        self.ranks.tell("load", {"fragment": fragment}, [values_N])
        super().load(fragment, values_N)

    def set_trained(self, trained: frozenset[FragmentId]) -> None:
        if not self._is_told:
            self.ranks.tell("set_trained", {"trained": sorted(trained)})
        super().set_trained(trained)

    def record(self) -> bytes:
        self.ranks.tell("record")
        return super().record()

    def restore(self, data: bytes) -> None:
        self.ranks.tell("restore", tensors=[torch.frombuffer(bytearray(data), dtype=torch.uint8)])
        super().restore(data)


class _NoSource:
    """In the place of a follower's windows: rank 0 has them."""

    def cursor(self) -> bytes:
        return b""

    def seek(self, cursor: bytes) -> None:
        del cursor


def follow(ranks: Ranks, make: Callable[[Manifest], tuple[Layout, nn.Module]]) -> None:
    """Repeat what rank 0 does until it says that the peer is over. ``make``: the layout and the model of a run."""
    inner: ShardedInner | None = None
    while True:
        op, meta, tensors = ranks.hear()
        if op == "exit":
            return
        if op == "build":
            manifest = manifest_from_bytes(meta["manifest"].encode(), "the manifest of rank 0")
            layout, model = make(manifest)
            inner = ShardedInner(manifest, layout, model, _NoSource(), ranks, frozenset(map(FragmentId, meta["trained"])))  # type: ignore[arg-type]
            continue
        if op == "close":
            inner = None
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        assert inner is not None, f"rank 0 said {op} before build"
        _repeat(inner, op, meta, tensors)


def _repeat(inner: ShardedInner, op: str, meta: dict[str, Any], tensors: list[Tensor]) -> None:
    match op:
        case "step":
            inner._heard = tensors[0]
            inner.set_run_tokens(meta["run_tokens"])
            inner.step()
        case "snapshot":
            inner.snapshot(FragmentId(meta["fragment"]))
        case "shift":
            inner.shift(FragmentId(meta["fragment"]), tensors[0])
        case "load":
            inner.load(FragmentId(meta["fragment"]), tensors[0])
        case "set_trained":
            inner.set_trained(frozenset(map(FragmentId, meta["trained"])))
        case "record":
            inner.record()
        case "restore":
            with suppress(IntegrityError):  # rank 0 says it
                inner.restore(tensors[0].numpy().tobytes())
        case _:
            raise AssertionError(f"rank 0 said {op!r}, which nobody knows")


def check_shardable(manifest: Manifest, num_processes: int) -> None:
    """Raise ConfigError for a run whose model several processes cannot share."""
    if manifest.train.batch_size % num_processes:
        raise ConfigError(f"{num_processes} processes cannot share a batch of {manifest.train.batch_size} (train.batch_size) evenly")
    if manifest.train.optimizer != "adamw":
        raise ConfigError(f"optimizer {manifest.train.optimizer!r} needs whole matrices; a peer of several processes trains with adamw")
    if manifest.model.code != "decoder":
        raise ConfigError("the model of this run is its own code, which decentra cannot share among processes; join with one")


def _device(local_rank: int, name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ConfigError(f"device {name!r} is one; several processes take 'auto', 'cpu', or 'cuda' and a GPU each")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"process {local_rank + 1} needs a GPU of its own, and this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)


def _layers(model: nn.Module) -> list[nn.Module]:
    """What is gathered at one time: the blocks of the first list of modules; none: the whole model at once."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(lists[0]) if lists else []


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
