"""How many experts fit into this machine's memory: what its owner allows, else what is free. Looks at the machine; decides nothing else."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import psutil

from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError
from decentra.modules import Layout
from decentra.peer.footprint import Footprint, footprint, mib

CGROUPS = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


def free_bytes(groups: Path = GROUPS, cgroups: Path = CGROUPS) -> int:
    """What this process may still take, its own memory included: the machine's, its control group's and its own limits."""
    own = psutil.Process().memory_info()
    found = [psutil.virtual_memory().available + own.rss]
    found += [left + own.rss for left in _left_in_groups(groups, cgroups)]
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if data != resource.RLIM_INFINITY:
        found.append(data)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        found.append(space - own.vms + own.rss)
    return max(0, min(found))


def _left_in_groups(groups: Path, cgroups: Path) -> list[int]:
    """Bytes that each control group above this process leaves it, versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.strip("/")
        for folder in (here, *here.parents):
            with suppress(OSError, ValueError):  # "max", or a level that has no files here
                limit, used = (int((folder / name).read_text()) for name in names)
                found.append(limit - used)
            if folder == root:
                break
    return found


def is_partial(config: PeerConfig, manifest: Manifest) -> bool:
    return config.role == "trainer" and (config.mode or manifest.placement.mode) == "held"


def max_experts(config: PeerConfig, manifest: Manifest, layout: Layout) -> int | None:
    """How many experts this machine has room for; None: all, or it is no trainer. Raises ConfigError when not even one fits, or not those it insists on."""
    if config.role != "trainer":
        return None
    partial = is_partial(config, manifest)
    allowed, free = config.memory_bytes, free_bytes()
    where, num_bytes = ("memory", allowed) if allowed is not None and allowed < free else ("the free memory of this machine", free)
    counts = [_fitting(footprint(manifest, layout, is_partial=partial), num_bytes, where, manifest, partial)]
    if (gpu_bytes := _gpu_bytes(config)) is not None:
        on_gpu = footprint(manifest, layout, is_partial=partial, on_gpu=True)
        counts.append(_fitting(on_gpu, gpu_bytes, "the memory of this GPU", manifest, partial))
    most = min(counts)
    wanted = len(config.experts) if config.experts is not None else config.num_experts
    if wanted is not None and wanted > most:
        need = footprint(manifest, layout, is_partial=partial).total(wanted)
        raise ConfigError(f"{wanted} experts of this run need {mib(need)}; {where} ({mib(num_bytes)}) is enough for {most}")
    return None if most >= manifest.model.num_experts else most


def _fitting(need: Footprint, num_bytes: int, where: str, manifest: Manifest, partial: bool) -> int:
    try:
        return need.fitting(num_bytes, where)
    except ConfigError as error:
        if not partial and manifest.placement.mode == "held":
            raise ConfigError(f"{error}; leave out --mode mirror: with the experts it trains alone a peer needs less") from None
        raise ConfigError(f"{error}; give it more, or join a run with a smaller model") from None


def _gpu_bytes(config: PeerConfig) -> int | None:
    """Of the GPU that training will run on; None without one."""
    if config.device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.device(config.device).index if config.device != "auto" else None
    free, _ = torch.cuda.mem_get_info(index)
    return free if config.gpu_memory_bytes is None else min(free, config.gpu_memory_bytes)


def limit_gpu(config: PeerConfig) -> None:
    """Hold torch to the owner's word: an allocation beyond it fails instead of taking the memory of what else runs there."""
    import torch

    if config.gpu_memory_bytes is None or config.device == "cpu" or not torch.cuda.is_available():
        return
    index = torch.device(config.device).index if config.device != "auto" else torch.cuda.current_device()
    total = torch.cuda.get_device_properties(index or 0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_bytes / total), index or 0)
