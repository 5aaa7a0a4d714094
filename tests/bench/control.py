"""What a round costs when there is almost nothing to send: eight peers, a model of a few thousand parameters, one tiny inner step.

    python -m tests.bench.control --json [--peers 8] [--rtt-ms 100]

p50_ms, p95_ms   time between two heights that all three fragments (trunk, router, one expert) have confirmed: opening, inner step, packets, receipts,
                 settlement, ledger fsync, attestations, confirmation; all peers and the host share this machine's cores
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from tests.bench.measure import arguments, machine, show
from tests.bench.round import measure_decentra

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

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    args.rate_mbit, args.codec, args.sparsest, args.params = 100.0 if args.rtt_ms else 0.0, "fp32", "fp32", 10
    print("control ...", file=sys.stderr, flush=True)
    found = measure_decentra(args, SHAPE, NUM_ROUNDS)
    times = sorted(found["durations_s"])
    show(
        {
            "num_peers": args.peers, "rtt_ms": args.rtt_ms, "num_rounds": len(times), "p50_ms": 1000 * statistics.median(times),
            "p95_ms": 1000 * times[int(0.95 * len(times))], "cpu_s_per_round": found["decentra_cpu_s"], "machine": machine(),
        },
        args.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
