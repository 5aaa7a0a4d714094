"""How many experts fit into this machine's memory: what its owner allows, else what is free. Decides nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from decentra.config import Manifest, PeerConfig
from decentra.doctor.machine import free_memory_bytes, total_memory_bytes
from decentra.errors import ConfigError, NoRoomNow
from decentra.modules import Layout
from decentra.peer.footprint import Footprint, footprint, mib


def is_partial(config: PeerConfig, manifest: Manifest) -> bool:
    return config.role == "trainer" and (config.mode or manifest.placement.mode) == "held"


@dataclass(frozen=True)
class Budget:
    """Memory of one kind that a trainer has to fit into. ``total_bytes``: what there would be if nobody else used it; None: no more than now."""

    where: str
    num_bytes: int
    need: Footprint
    total_bytes: int | None = None

    def fitting(self, wanted: int | None, hint: str) -> int:
        """How many experts fit; enough for ``wanted`` or, without a wish, for one. Raises ConfigError, NoRoomNow."""
        least = 1 if wanted is None else wanted
        if self.need.total(least) <= self.num_bytes:
            return self.need.fitting(self.num_bytes, self.where) if least else max(0, self.need.room(self.num_bytes))
        if self.total_bytes is not None and self.need.total(least) <= self.total_bytes:
            raise NoRoomNow(
                f"{self.where}, {mib(self.num_bytes)}, is too little now for {least} experts of this run, which need {mib(self.need.total(least))};"
                " other programs have the rest"
            )
        if wanted is not None and wanted > 1:
            fit = max(0, self.need.room(self.num_bytes))
            raise ConfigError(
                f"{wanted} experts of this run need {mib(self.need.total(wanted))}; {self.where} ({mib(self.num_bytes)}) is enough for {fit}"
            )
        try:
            return self.need.fitting(self.num_bytes, self.where)
        except ConfigError as error:
            raise ConfigError(f"{error}; {hint}") from None


def max_experts(config: PeerConfig, manifest: Manifest, layout: Layout, num_processes: int = 1) -> int | None:
    """How many experts this machine has room for; None: all, or it is no trainer. ``num_processes``: that share one model.

    Raises ConfigError when not even one fits, or not those that its owner asked for; NoRoomNow when that is only so for the moment.
    """
    if config.role != "trainer":
        return None
    partial = is_partial(config, manifest)
    need, free, allowed = footprint(manifest, layout, is_partial=partial), free_memory_bytes(), config.memory_bytes
    if allowed is not None and allowed < free:
        budgets = [Budget("memory", allowed, need)]
    else:
        total = total_memory_bytes() if allowed is None else min(allowed, total_memory_bytes())
        budgets = [Budget("the free memory of this machine", free, need, total)]
    if (gpu := _gpu_bytes(config)) is not None:
        on_gpu = footprint(manifest, layout, is_partial=partial, on_gpu=True, num_processes=num_processes)
        budgets.append(Budget("the memory of this GPU", gpu[0], on_gpu, gpu[1]))
    wanted = len(config.experts) if config.experts is not None else config.num_experts
    hint = "give it more, or join a run with a smaller model"
    if not partial and manifest.placement.mode == "held":
        hint = "leave out --mode mirror: with the experts it trains alone a peer needs less"
    most = min(budget.fitting(wanted, hint) for budget in budgets)
    return None if most >= manifest.model.num_experts else most


def _gpu_bytes(config: PeerConfig) -> tuple[int, int] | None:
    """(free now, all that may ever be used) of the GPU that training will run on; None without one."""
    if config.device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.device(config.device).index if config.device != "auto" else torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index)  # this process's own
    most = config.gpu_memory_bytes if config.gpu_memory_bytes is not None else total
    return min(free, most), min(total, most)


def limit_gpu(config: PeerConfig) -> None:
    """Hold torch to the owner's word: an allocation beyond it fails instead of taking the memory of what else runs there."""
    import torch

    if config.gpu_memory_bytes is None or config.device == "cpu" or not torch.cuda.is_available():
        return
    index = torch.device(config.device).index if config.device != "auto" else torch.cuda.current_device()
    total = torch.cuda.get_device_properties(index or 0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_bytes / total), index or 0)
