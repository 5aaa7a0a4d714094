"""Replay simulated runs: ``python -m decentra.sim --seed N [--count K]``."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace

from decentra.sim.scenario import Scenario, Violation
from decentra.sim.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description="run the swarm on virtual time and check its promises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--trainers", type=int, help="instead of the seed's own number")
    parser.add_argument("--faults", type=int, help="instead of the seed's own number")
    parser.add_argument("--no-keeper", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="go on after a violation")
    args = parser.parse_args()
    num_bad = 0
    for seed in range(args.seed, args.seed + args.count):
        scenario = Scenario.from_seed(seed)
        if args.trainers is not None:
            scenario = replace(scenario, num_trainers=args.trainers)
        if args.faults is not None:
            scenario = replace(scenario, num_faults=args.faults)
        if args.no_keeper:
            scenario = replace(scenario, has_keeper=False)
        start_s = time.process_time()
        try:
            report = simulate(scenario)
            print(f"{time.process_time() - start_s:.2f} s {report}", flush=True)
        except Violation as violation:
            print(f"VIOLATION {violation}", flush=True)
            num_bad += 1
            if not args.keep_going:
                break
        gc.collect()
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
