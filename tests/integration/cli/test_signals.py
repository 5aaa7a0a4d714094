"""Ctrl-C as the runner of every command sees it: the first asks to stop, the second ends the process at once, errors keep their exit code."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

HEAD = """
import asyncio, signal, sys
from decentra.cli.running import run_main
"""
STUBBORN = (
    HEAD
    + """
async def stubborn(stop):
    print("ready", flush=True)
    await stop.event.wait()
    print("asked:", stop.why, flush=True)
    await asyncio.sleep(60)
run_main(stubborn)
"""
)
OBEDIENT = (
    HEAD
    + """
async def obedient(stop):
    print("ready", flush=True)
    await stop.event.wait()
    return stop.why
print("left:", run_main(obedient), flush=True)
"""
)
# Two tasks fail at once: the user sees the failure that is ours, not the group.
FAILING = (
    HEAD
    + """
from decentra.errors import Unreachable
async def fail(error):
    raise error
async def main(stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(fail(ValueError("a bug")))
        group.create_task(fail(Unreachable("nobody answers")))
try:
    run_main(main)
except Unreachable as error:
    print("caught:", error)
"""
)


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_asks(number: signal.Signals, word: str) -> None:
    with start(OBEDIENT) as process:
        assert next_line(process) == "ready"
        process.send_signal(number)
        assert next_line(process) == f"left: {word}"
        assert process.wait(30) == 0


def test_the_second_ctrl_c_ends_at_once() -> None:
    with start(STUBBORN) as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert next_line(process) == "asked: Ctrl-C"
        assert process.poll() is None, "the first Ctrl-C only asks"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_of_several_failures_the_users_one_is_told() -> None:
    with start(FAILING) as process:
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out.strip()) == (0, "caught: nobody answers"), err
