"""Spoilt bytes at every door, under an audit hook: nothing but a value or one clear error may come of them, and nothing may be executed.

    python -m tests.chaos.fuzz --json [--minutes 5] [--seed 1] [--turns N] [--keep DIR]

finds   inputs that brought up something else than DecentraError; with ``--keep`` each is written there, to be added to tests/chaos/corpus
events  what the interpreter was asked to do while foreign bytes were read, of: run or compile code, unpickle, start a program, connect, write a file
slow_s  the longest that one input took; rss_mb  by how much the process grew after its first minute (or half of the turns)
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.chaos.doors import Door, attempt, doors, scratch_folder
from tests.chaos.telling import end

FORBIDDEN = (
    "exec", "compile", "marshal.loads", "marshal.load", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "socket.bind", "ctypes.dlopen", "import", "code.__new__", "os.remove", "os.rename", "shutil.rmtree",
)  # fmt: skip
WARM_UP_TURNS = 3000


class Watch:
    """Counts forbidden events between ``on`` and ``off``. An audit hook cannot be taken out again: this one sleeps."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.is_on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_on and event in FORBIDDEN:
            self.is_on = False  # what follows may raise events itself
            self.seen[f"{event} {str(args)[:200]}"] += 1
            self.is_on = True


def fuzz(table: Sequence[Door], seed: int, *, seconds: float | None, turns: int | None, keep: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    for codec in (
        "utf-16-le",
        "utf-16-be",
        "utf-32-le",
        "utf-32-be",
    ):  # json.loads guesses encodings, and imports their codecs when it first meets one
        "".encode(codec)
    rng, watch, process = random.Random(seed), Watch(), psutil.Process()
    tried: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    finds: list[dict[str, str]] = []
    begun, slowest, rss = time.monotonic(), (0.0, ""), 0
    number = 0
    while (seconds is None or time.monotonic() < begun + seconds) and (turns is None or number < turns):
        door = table[number % len(table)]
        watch.is_on = number >= WARM_UP_TURNS  # libraries import and compile what they need the first time
        started = time.monotonic()
        data, is_taken, error = attempt(door, rng)
        slowest = max(slowest, (time.monotonic() - started, door.name))
        watch.is_on = False
        tried[door.name] += 1
        taken[door.name] += is_taken
        if error is not None:
            story = traceback.format_exception(error)[-2:]
            finds.append({"door": door.name, "error": repr(error)[:200], "where": "".join(story)[-400:]})
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{door.name.replace(' ', '-')}-{len(finds)}").write_bytes(data)
        number += 1
        if number == (turns // 2 if turns else 20_000):
            rss = process.memory_info().rss
    grown_mb = (process.memory_info().rss - rss) / 1e6 if rss else 0.0
    return {
        "turns": number, "seed": seed, "doors": len(table), "taken": sum(taken.values()), "finds": len(finds), "examples": finds[:10],
        "events": dict(watch.seen), "slow_s": round(slowest[0], 3), "slow_door": slowest[1], "rss_mb": round(grown_mb, 1),
        "tried_each": dict(tried), "taken_each": dict(taken),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--turns", type=int, help="instead of a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args(argv)
    with scratch_folder() as scratch:
        seconds = None if args.turns else 60 * args.minutes
        found = fuzz(doors(Path(scratch)), args.seed, seconds=seconds, turns=args.turns, keep=args.keep)
    for find in found["examples"]:
        print(f"{find['door']}: {find['error']}\n{find['where']}", file=sys.stderr)
    summary = (
        f"{found['turns']} spoilt inputs at {found['doors']} doors, {found['taken']} still meant something, {found['finds']} finds,"
        f" {sum(found['events'].values())} forbidden events, slowest {found['slow_s']:.2f} s ({found['slow_door']})"
    )
    return end(found, summary, as_json=args.json, holds=not found["finds"] and not found["events"])


if __name__ == "__main__":
    raise SystemExit(main())
