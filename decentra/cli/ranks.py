"""A peer of several processes, as ``join --processes N`` or torchrun starts them: rank 0 is the peer, the others repeat its inner loop until it ends.

Who is which rank stands where torch looks for it: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from decentra.cli.capacity import limit_gpu
from decentra.cli.running import die_with_parent
from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from torch import nn

    from decentra.modules import Layout
    from decentra.peer.sharded import Ranks
    from decentra.peer.trainer import MakeInner

T = TypeVar("T")

HELPER_END_S, WATCH_S = 5.0, 0.5


def num_ranks() -> int:
    """How many processes a launcher started for this peer; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} <= os.environ.keys() else 1


@contextmanager
def helpers(num_processes: int) -> Iterator[None]:
    """Start the other ranks of a peer as copies of this command, which becomes rank 0. They end with the block, and with this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "decentra.cli.main", *sys.argv[1:]]
    started: list[subprocess.Popen[bytes]] = []
    is_over = threading.Event()
    try:
        for rank in range(1, num_processes):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent))
        os.environ.update(common, RANK="0", LOCAL_RANK="0")
        threading.Thread(target=_end_with, args=(started, is_over), name="helpers", daemon=True).start()
        yield
    finally:
        is_over.set()
        for process in started:
            try:
                process.wait(HELPER_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with(started: list[subprocess.Popen[bytes]], is_over: threading.Event) -> None:
    """A helper that ends before its time leaves the others in a collective that nobody finishes: the peer ends, its last checkpoint is on disk."""
    while not is_over.wait(WATCH_S):
        for process in started:
            if process.poll() is not None and not is_over.wait(HELPER_END_S):
                why = f"a process of this peer ended with {process.returncode}; see above, and start the peer again"
                print(f"decentra: {why}", file=sys.stderr, flush=True)
                os._exit(int(ExitCode.FAILED))


def check_ranks(config: PeerConfig, manifest: Manifest) -> None:
    """What is wrong with several processes in this run. Raises ConfigError."""
    if num_ranks() > 1 and config.role == "trainer":
        from decentra.peer.sharded import check_shardable

        check_shardable(manifest, num_ranks())
        if (config.mode or manifest.placement.mode) == "held":
            raise ConfigError(
                "a peer of several processes has all experts in memory, and this run is of 'held' peers; join with --mode mirror"
            )


def with_ranks(config: PeerConfig, lead: Callable[[Ranks], T]) -> T | None:
    """Run ``lead`` in rank 0; the others follow it and return None. Raises ConfigError."""
    if config.mode == "held":
        raise ConfigError("mode 'held': a peer of several processes has all experts in memory; leave out --mode or say --mode mirror")
    import torch

    from decentra.peer.sharded import Ranks, follow

    torch.set_num_threads(config.threads)
    if os.environ["RANK"] != "0":
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
        ):  # a terminal and a launcher pass them on to all; rank 0 says when it is over
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(signal.SIGKILL)
    ranks = Ranks.start(int(os.environ["LOCAL_RANK"]), config.device)
    limit_gpu(config.model_copy(update={"device": str(ranks.device)}))
    try:
        if ranks.rank:
            follow(ranks, lambda manifest: _built(manifest, config.model_code))
            return None
        try:
            return lead(ranks)
        finally:
            ranks.tell_last("exit")
    finally:
        ranks.close()


def _built(manifest: Manifest, model_code: Path | None) -> tuple[Layout, nn.Module]:
    from decentra.model.custom import layout_for, model_for

    build, _ = model_for(manifest, model_code)
    return layout_for(manifest, model_code), build(manifest.model, manifest.seed)


def leading(ranks: Ranks) -> MakeInner:
    """The inner loop of rank 0."""
    from decentra.peer.sharded import LeadInner

    return lambda manifest, layout, model, source, _device, trained: LeadInner(manifest, layout, model, source, ranks, trained)
