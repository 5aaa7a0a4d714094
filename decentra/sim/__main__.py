"""Replay simulated runs: ``python -m decentra.sim --seed N [--count K]``."""

from __future__ import annotations

import argparse
import time

from decentra.sim.world import Scenario, simulate


def main() -> None:
    parser = argparse.ArgumentParser(description="run the swarm on virtual time and check its promises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--trainers", type=int, default=3)
    parser.add_argument("--faults", type=int, default=8)
    parser.add_argument("--no-keeper", action="store_true")
    args = parser.parse_args()
    for seed in range(args.seed, args.seed + args.count):
        start_s = time.perf_counter()
        report = simulate(Scenario(seed, num_trainers=args.trainers, num_faults=args.faults, has_keeper=not args.no_keeper))
        print(f"{time.perf_counter() - start_s:.2f} s {report}")


if __name__ == "__main__":
    main()
