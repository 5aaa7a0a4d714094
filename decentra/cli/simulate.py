"""``simulate``: seeds, one after the other or shared by processes, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any

from decentra.sim.scenario import Scenario, Violation
from decentra.sim.world import simulate

AHEAD = 4  # seeds handed out for each process: an interrupt is answered soon


@dataclass(frozen=True)
class Told:
    """What came of one seed. ``violation``: the broken promise in words, empty where all were kept."""

    text: str = ""
    num_confirmed: int = 0
    num_crashes: int = 0
    violation: str = ""


def run_seed(changes: Mapping[str, Any], seed: int) -> Told:
    """``changes``: of the seed's scenario."""
    try:
        report = simulate(replace(Scenario.from_seed(seed), **changes))
    except Violation as violation:
        return Told(violation=str(violation))
    return Told(str(report), report.num_confirmed, report.num_crashes)


def run_seeds(seeds: Sequence[int], changes: Mapping[str, Any], jobs: int) -> Iterator[Told]:
    """In the order of the seeds, each as soon as it is known."""
    one = partial(run_seed, dict(changes))
    if jobs == 1:
        yield from map(one, seeds)
        return
    left = iter(seeds)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way = [pool.submit(one, seed) for seed in islice(left, jobs * AHEAD)]
        try:
            while under_way:
                yield under_way.pop(0).result()
                under_way += [pool.submit(one, seed) for seed in islice(left, 1)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
