"""Bytes a peer downloads per round with few and with many holders: real member machines, replicas and packets on virtual time.

    python -m tests.bench.downlink --json [--holders 4,16] [--codec topk64] [--merged topk128]

rx_bytes_per_peer_round  packets (and residuals, when a reducer changes) a peer fetched per confirmed round of a fragment, mean over peers and rounds after
                         everybody is in; ``rx_bytes_max`` that of the peer that fetched most (a reducer)
ratio                    of the last to the first number of holders
anchors_equal            every peer ended with the anchors of the ledger
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from decentra.ids import Digest, FragmentId
from decentra.modules import Layout, build_layout
from decentra.protocol import ledger
from decentra.sim.loop import run_virtual
from decentra.sim.scenario import NUM_EXPERTS, CodecName, Scenario
from decentra.sim.world import World
from tests.bench.measure import arguments, machine, show

NUM_ROUNDS = 6  # of the trunk, measured
DEADLINE_S = 900.0  # virtual


def layout_of_size(width: int) -> Layout:
    """A trunk of ``width`` x ``width`` and an expert of a quarter of that each."""
    parameters = [("model.norm.weight", (4,)), ("lm_head.weight", (width, width))]
    parameters += [(f"model.layers.0.mlp.experts.{e}.up_proj.weight", (width // 4, width)) for e in range(NUM_EXPERTS)]
    return build_layout(parameters)


def measure(
    num_holders: int, layout: Layout, codec: CodecName, merged: CodecName | None = None, num_rounds: int = NUM_ROUNDS
) -> dict[str, Any]:
    """One swarm without faults; ``num_holders`` trainers, each trains everything."""
    scenario = Scenario(
        1,
        num_trainers=num_holders,
        num_faults=0,
        experts_per_peer=NUM_EXPERTS,
        reduce_from=9,
        codec=codec,
        merged=merged,
        step_s=0.5,
        inner_steps=6,
        max_compute_s=0.05,
    )
    world, found = World(scenario, layout=layout), {"num_holders": num_holders}
    run_virtual(_story(world, num_rounds, found))
    return found


async def _story(world: World, num_rounds: int, found: dict[str, Any]) -> None:
    world.start_service()
    for host in world.hosts.values():
        world.start(host)
    trunk = FragmentId("trunk/0")

    def full_rounds() -> list[ledger.Settled]:
        """Settlements that stand, of confirmed trunk rounds in which everybody is."""
        records = world.promises.records
        done = {r.round for r in records if isinstance(r, ledger.Confirmed) and r.fragment == trunk}
        last = {r.settlement.round: r for r in records if isinstance(r, ledger.Settled) and r.settlement.fragment == trunk}
        return [r for n, r in sorted(last.items()) if n in done and len(r.settlement.entries) == world.scenario.num_trainers]

    def received() -> list[int]:
        return [h.loop.fetcher.rx_bytes for h in world.hosts.values() if h.loop is not None]

    def num_confirmed() -> int:
        return sum(isinstance(r, ledger.Confirmed) for r in world.promises.records)

    async with asyncio.timeout(DEADLINE_S):
        while len(full_rounds()) < 2:  # noqa: ASYNC110  (on virtual time looking is free)
            await asyncio.sleep(0.2)
        before, confirmed_before, num_before = received(), num_confirmed(), len(full_rounds())
        while len(full_rounds()) < num_before + num_rounds:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        after, num = received(), num_confirmed() - confirmed_before
        rounds = full_rounds()[num_before:]
        assert world.driver is not None
        world.driver.book.stopping = "measured"
        while not world._is_quiet():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    anchors: dict[FragmentId, Digest] = {f: b.anchor for f, b in world.driver.book.fragments.items()}
    per_round = [(b - a) / num for a, b in zip(before, after, strict=True)]
    found |= {
        "rx_bytes_per_peer_round": sum(per_round) / len(per_round), "rx_bytes_max": max(per_round),
        "num_merged": sum(r.settlement.merged is not None for r in rounds), "num_rounds": len(rounds),
        "anchors_equal": all(world._anchor_of(h, f) == a for h in world.hosts.values() for f, a in anchors.items()),
        "broken_promises": list(world.promises.broken),
    }  # fmt: skip
    for host in list(world.hosts.values()):
        world._bury(host)
    world.kill_service()


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--holders", default="4,16")
        parser.add_argument("--codec", default="topk64")
        parser.add_argument("--merged", default=None, help="codec of merged packets; default: the same")
        parser.add_argument("--width", type=int, default=256)

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    rows = [measure(int(n), layout_of_size(args.width), args.codec, args.merged) for n in args.holders.split(",")]
    ratio = rows[-1]["rx_bytes_per_peer_round"] / rows[0]["rx_bytes_per_peer_round"]
    show({"rows": rows, "ratio": ratio, "codec": args.codec, "merged": args.merged or args.codec, "machine": machine()}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
