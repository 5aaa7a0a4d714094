"""Spoilt bytes at every door give a value or one clear error and execute nothing; what was found once stays mended; and the instrument can see."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from decentra.errors import DecentraError
from tests.chaos.doors import Door, attempt, doors

CORPUS = Path(__file__).with_name("corpus")
ROOT = Path(__file__).parents[2]
TURNS = 12_000


def test_foreign_bytes_are_a_value_or_one_error_and_execute_nothing() -> None:
    """In a process of its own: the hook that listens stays for ever, and a crash must not take the others along."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.fuzz", "--json", "--turns", str(TURNS)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["finds"], found["events"]) == (0, {}), found
    assert found["turns"] == TURNS
    assert min(found["tried_each"].values()) >= TURNS // found["doors"]


def test_the_untouched_bytes_are_taken_at_every_door(tmp_path: Path) -> None:
    for door in doors(tmp_path):
        for good in door.good:
            door.read(good)


def test_what_was_found_once(tmp_path: Path) -> None:
    """Every file of the corpus is named after its door: a value or DecentraError, today as well."""
    table = {door.name.replace(" ", "-"): door for door in doors(tmp_path)}
    for path in sorted(CORPUS.glob("*")):
        door = table[path.name.rpartition("-")[0]]
        with suppress(DecentraError):
            door.read(path.read_bytes())


PLANTED = """
import pickle
from tests.chaos.doors import Door
from tests.chaos import fuzz
class Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))
fuzz.WARM_UP_TURNS = 0
doors = {"unpickles": pickle.loads, "evaluates": lambda b: eval("2"), "raises": lambda b: b[0:0][1], "innocent": len}
for name, read in doors.items():
    found = fuzz.fuzz([Door(name, read, (pickle.dumps(Evil()),))], 1, seconds=None, turns=200, keep=None)
    print(f"{name}:{found['finds'] > 0}:{len(found['events']) > 0}")
"""


def test_the_instrument_sees_what_a_door_does() -> None:
    """Doors that unpickle, that evaluate, that raise what they should not, and one that does nothing, one after the other in one process."""
    done = subprocess.run([sys.executable, "-c", PLANTED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["unpickles:True:True", "evaluates:False:True", "raises:True:False", "innocent:False:False"], done.stderr[
        -2000:
    ]


def test_a_seed_gives_the_same_inputs() -> None:
    door = Door("any", len, (pickle.dumps([1, 2, 3]), b"abc"))
    first, second = ([attempt(door, random.Random(5))[0] for _ in range(3)] for _ in range(2))
    assert first == second
