"""Cold joins, one after another, into a run whose trainer loads a core: how long until a peer is admitted, until it trains, and what it fetched.

    python -m tests.bench.join --json [--joins 50] [--mode held|mirror]

admitted_p95_s    from exec to the service's line that it is in; ready_p95_s: to its first inner step with all anchors it needs
bytes_over_needed all blob bytes a newcomer received until it left, right after, over the size of the anchors that it needs: a held one's are the
                  trunk, the router and its experts

dead_bootstrap_p50_s  the same to its first inner step where the first of the invite's two bootstrap nodes is dead
donor_kill_ok     a blob of 48 MB from two donors, real p2p nodes, the one that sends killed with kill -9 at half of it: it arrives, verified, and
                  donor_kill_bytes_over_needed says what all came to

Every join is a new process with a new identity, ended once it trains. Limits of this measurement: loopback, one machine, no loss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from decentra.config import Manifest
from decentra.doctor.network import Silent
from decentra.gossip.blobs import BlobStore
from decentra.gossip.exchange import HivemindExchange
from decentra.gossip.node import GossipNode
from decentra.identity import Keypair, load_or_create_key
from decentra.ids import RunId, digest_of, expert_of
from decentra.invite import parse_invite
from decentra.peer.fetch import Fetcher
from tests.bench.deltas import layout_of
from tests.bench.measure import arguments, load, machine, show
from tests.bench.round import Place, start_swarm
from tests.bench.story import Log, lines

NUM_JOINS, READY_S = 50, 90.0
NUM_DEAD_BOOTSTRAP_JOINS = 5
DONATED_BYTES, DONATED_S = 48 << 20, 60.0
DEAD_BOOTSTRAP = f"/ip4/127.0.0.1/tcp/9/p2p/{Keypair.generate().peer_id}"
MODEL = {"hidden_size": 128, "num_layers": 4, "num_experts": 8, "expert_hidden_size": 192}


def measure(num_joins: int, mode: str) -> dict[str, Any]:
    settings = [f"model.{key}={value}" for key, value in MODEL.items()]
    settings += [
        "name=bench", "data.bytes_per_domain=60000", "data.held_out_bytes=2048", f"placement.mode={mode}", "placement.experts_per_peer=2",
        "admission.max_members=4000", "rounds.gather_s=1",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="decentra-bench-") as name:
        here = Place(None, Path(name))
        try:
            manifest, _ = start_swarm(here, settings, 1)
            line = [
                sys.executable,
                "-m",
                "decentra.cli.main",
                "invite",
                str(here.folder / "run"),
                "--uses",
                "4000",
                "--json",
            ]  # the host's is for 32
            invite = str(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])["invite"])
            trainer = Log(here.folder / "p0.log", "training")
            _wait(lambda: bool(trainer.read()), "the trainer")
            joins = [_join(here, manifest, invite, f"n{i}") for i in range(num_joins)]
            real = parse_invite(invite)
            dead = replace(real, bootstrap=(DEAD_BOOTSTRAP, *real.bootstrap)).encode()
            beside_dead = [_join(here, manifest, dead, f"d{i}") for i in range(min(num_joins, NUM_DEAD_BOOTSTRAP_JOINS))]
        finally:
            here.close()
    good = [j for j in joins if j is not None]
    return {
        "num_joins": num_joins, "num_ok": len(good), "mode": mode,
        "admitted_p50_s": statistics.median(j["admitted_s"] for j in good), "admitted_p95_s": _p95([j["admitted_s"] for j in good]),
        "ready_p50_s": statistics.median(j["ready_s"] for j in good), "ready_p95_s": _p95([j["ready_s"] for j in good]),
        "bytes_over_needed": statistics.median(j["fetched"] / j["needed"] for j in good),
        "dead_bootstrap_ok": all(j is not None for j in beside_dead),
        "dead_bootstrap_p50_s": statistics.median(j["ready_s"] for j in beside_dead if j is not None),
    }  # fmt: skip


def kill_a_donor() -> dict[str, Any]:
    """One peer fetches from two; who sends is killed in the middle."""

    async def story(root: Path) -> tuple[bool, float]:
        async with AsyncExitStack() as stack:
            nodes = []
            for name in ("first", "second", "newcomer"):
                load_or_create_key(root / f"{name}.key")
                known = nodes[0].addresses if nodes else ()
                node = await GossipNode.start(root / f"{name}.key", listen=("/ip4/127.0.0.1/tcp/0",), initial_peers=known, events=Silent())
                stack.push_async_callback(node.close)
                nodes.append(node)
            ends = []
            for node in nodes:
                store = BlobStore(root / f"blobs-{node.peer_id}", 1 << 30)
                end = HivemindExchange(node, store, RunId("5e" * 32), lambda: b"t", lambda _peer, _papers: None)
                await end.start()
                stack.push_async_callback(end.close)
                ends.append(end)
            blob = os.urandom(DONATED_BYTES)
            digest = digest_of(blob)
            for end in ends[:2]:
                await end.put(digest, blob)
            addresses = {node.peer_id: node.addresses for node in nodes}
            fetcher = Fetcher(ends[2], lambda peer: addresses[peer], Silent())
            fetching = asyncio.create_task(fetcher.fetch(digest, DONATED_BYTES, [nodes[0].peer_id, nodes[1].peer_id]))
            async with asyncio.timeout(DONATED_S):
                while ends[2].rx_bytes < DONATED_BYTES // 2 and not fetching.done():  # noqa: ASYNC110 - a byte count has no event
                    await asyncio.sleep(0.001)
                was_in_the_middle = not fetching.done()
                sender = max((0, 1), key=lambda i: ends[i].tx_bytes)
                os.kill(nodes[sender].daemon.pid, signal.SIGKILL)
                return await fetching == blob and was_in_the_middle, fetcher.rx_bytes / DONATED_BYTES

    with tempfile.TemporaryDirectory(prefix="decentra-bench-") as folder:
        is_ok, share = asyncio.run(story(Path(folder)))
    return {"donor_kill_ok": is_ok, "donor_kill_bytes_over_needed": share}


def _join(here: Place, manifest: Manifest, invite: str, name: str) -> dict[str, float] | None:
    """One cold join; None when it did not train in time."""
    host, log = (
        Log(here.folder / "host.log", "admitted"),
        Log(here.folder / f"{name}.log", "service-connected", "placed-here", "training"),
    )
    num_before, began = len(host.read()), time.time()
    where = ["--name", name, "--dir", str(here.folder / name), "--listen", "/ip4/127.0.0.1/tcp/0", "--log-json", "--json"]
    process = here.start(name, [sys.executable, "-m", "decentra.cli.main", "join", invite, *where], name, out=f"{name}.out")
    try:
        _wait(lambda: bool(log.read() and [e for e in log.named("training") if e["experts"]]), name)
        admitted = host.read()[num_before:]
        experts = log.named("training")[-1]["experts"]
        needed = sum(
            4 * f.num_elements for f in layout_of(manifest).fragments
            if manifest.placement.mode == "mirror" or (e := expert_of(f.module)) is None or e in experts
        )  # fmt: skip
        process.terminate()
        process.wait(10)
        (left,) = lines(here.folder / f"{name}.out")[-1:]
        return {
            "admitted_s": admitted[0]["at_s"] - began, "ready_s": log.named("training")[-1]["at_s"] - began,
            "fetched": left["rx_bytes"], "needed": needed,
        }  # fmt: skip
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return None
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        here.processes.remove(process)


def _wait(holds: Any, what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not train within {READY_S:g} s")
        time.sleep(0.02)


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--joins", type=int, default=NUM_JOINS)
        parser.add_argument("--mode", choices=("held", "mirror"), default="held")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    show({"machine": machine(), "load_before": load()} | measure(args.joins, args.mode) | kill_a_donor(), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
