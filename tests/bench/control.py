"""What a round costs when there is almost nothing to send: eight peers, a model of a few thousand parameters, one tiny inner step.

    python -m tests.bench.control --json [--peers 8] [--rtt-ms 100] [--modules] [--seconds 300]

p50_ms, p95_ms   time between two confirmed rounds: opening, inner step, packets, receipts, settlement, ledger fsync, attestations, confirmation,
                 everybody on the new anchor; a keeper and the service beside the peers, all on this machine's cores
phases_ms        median and 95th percentile of each part, from the logs: the first five add up to the whole
cpu_s_per_round  CPU seconds of all processes, p2p daemons included: with fewer cores than processes it bounds the time from below

The model is one module, so that it has one fragment and a round is a round. With ``--modules`` it has three (trunk, router, one expert), each with a
round of its own, and the time is between heights that all three have confirmed; the inner step, which here waits for every fragment's round, then
puts one round after another. ``--seconds``: what is confirmed by then has to do, if it is more than a few rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from tests.bench.measure import arguments, load, machine, show
from tests.bench.round import measure_decentra
from tests.bench.story import in_ms, percentile

SHAPE = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "expert_hidden_size": 16, "num_experts": 1,
    "num_experts_per_token": 1,
}  # fmt: skip
NUM_ROUNDS = 60


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--peers", type=int, default=8)
        parser.add_argument(
            "--rtt-ms", type=float, default=0.0, help="with it, members are hosts in network namespaces with 100 Mbit/s each"
        )
        parser.add_argument("--modules", action="store_true", help="the built-in decoder with its three modules")
        parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
        parser.add_argument("--seconds", type=float, default=300.0)

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    args.rate_mbit, args.codec, args.sparsest, args.params = 100.0 if args.rtt_ms else 0.0, "fp32", "fp32", 10
    print("control ...", file=sys.stderr, flush=True)
    load_before = load()
    found = measure_decentra(args, SHAPE, args.rounds, is_one_module=not args.modules, patience_s=args.seconds)
    times = found["decentra_durations_s"]
    show(
        {
            "num_peers": args.peers, "rtt_ms": args.rtt_ms, "num_fragments": 3 if args.modules else 1, "num_rounds": len(times),
            "p50_ms": 1000 * statistics.median(times), "p95_ms": 1000 * percentile(times, 0.95), "phases_ms": in_ms(found["phases_s"]),
            "cpu_s_per_round": found["decentra_cpu_s"], "load_before": load_before, "machine": machine(),
        },
        args.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
