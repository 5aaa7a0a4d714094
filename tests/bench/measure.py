"""What the benchmarks share: medians of repeated calls, ratios in one process, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def median_s(call: Callable[[], object], repeats: int = 7) -> float:
    """Median wall time of ``call`` in seconds, after one call that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def over_copy(call: Callable[[], object], copied_N: torch.Tensor, repeats: int = 7) -> float:
    """How many times longer ``call`` takes than copying ``copied_N``; each call is measured next to a copy, the median ratio counts."""
    target_N = torch.empty_like(copied_N)
    call()
    ratios = []
    for _ in range(repeats):
        copy_s = min(_timed(lambda: target_N.copy_(copied_N)) for _ in range(3))
        ratios.append(_timed(call) / copy_s)
    return statistics.median(ratios)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> str:
    """The machine in one line."""
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    except OSError:
        cpu = platform.machine()
    return f"{cpu}, {torch.get_num_threads()} torch thread, torch {torch.__version__}"


def load() -> float:
    """How many processes wanted a core over the last minute, the benchmark's own included."""
    return os.getloadavg()[0]


def arguments(
    description: str, argv: Sequence[str] | None, extra: Callable[[argparse.ArgumentParser], object] = lambda _: None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    extra(parser)
    return parser.parse_args(argv)


def rounded(value: Any, digits: int = 4) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner, digits) for inner in value]
    return value


def show(result: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(rounded(result)) if as_json else json.dumps(rounded(result), indent=2), flush=True)
