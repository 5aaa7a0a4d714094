"""A peer of several processes, as ``join --processes N`` or torchrun starts them: rank 0 is the peer, the others repeat its inner loop until it ends.

Who is which rank stands where torch looks for it: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from decentra.cli.running import die_with_parent
from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from decentra.modules import Layout
    from decentra.peer.sharded import Ranks
    from decentra.peer.trainer import MakeInner

T = TypeVar("T")

HELPER_END_S = 5.0


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
    try:
        for rank in range(1, num_processes):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent))
        os.environ.update(common, RANK="0", LOCAL_RANK="0")
        yield
    finally:
        for process in started:
            try:
                process.wait(HELPER_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def with_ranks(config: PeerConfig, lead: Callable[[Ranks], T]) -> T | None:
    """Run ``lead`` in rank 0; the others follow it and return None. Raises ConfigError."""
    if config.mode == "held":
        raise ConfigError("mode 'held': a peer of several processes has all experts in memory; leave out --mode or say --mode mirror")
    import torch

    from decentra.peer.sharded import Ranks, follow

    torch.set_num_threads(config.threads)
    ranks = Ranks.start(int(os.environ["LOCAL_RANK"]))
    try:
        if ranks.rank:
            for number in (signal.SIGINT, signal.SIGTERM):  # the launcher passes them on to all; rank 0 says when it is over
                signal.signal(number, signal.SIG_IGN)
            follow(ranks, lambda manifest: _built(manifest, config.model_code))
            return None
        try:
            return lead(ranks)
        finally:
            ranks.tell("exit")
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
