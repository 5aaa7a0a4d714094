"""Runs one asyncio main under uvloop: Ctrl-C asks it to stop, a second Ctrl-C ends the process at once, stalls of the loop are logged."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from decentra.errors import ConfigError, DecentraError
from decentra.ports import Events

T = TypeVar("T")
STALL_S, WATCH_S = 0.05, 0.25
SIGINT_EXIT = 130


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; callbacks run in the loop."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.why = ""
        self._callbacks: list[Callable[[str], object]] = []

    def on_stop(self, callback: Callable[[str], object]) -> None:
        self._callbacks.append(callback)
        if self.event.is_set():
            callback(self.why)

    def forget(self, callback: Callable[[str], object]) -> None:
        self._callbacks = [known for known in self._callbacks if known != callback]

    def set(self, why: str) -> None:
        if self.event.is_set():
            os._exit(SIGINT_EXIT)  # the second time is at once; the p2p daemon ends by itself
        self.why = why
        self.event.set()
        for callback in self._callbacks:
            callback(why)


def run_main(main: Callable[[StopRequest], Awaitable[T]]) -> T:
    """Run ``main`` to its end. Errors inside a TaskGroup come out as the first DecentraError among them."""

    async def whole() -> T:
        stop, loop = StopRequest(), asyncio.get_running_loop()
        loop.set_exception_handler(_report)
        for number, word in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "the terminal closed")):
            loop.add_signal_handler(number, stop.set, word)
        return await main(stop)

    try:
        if sys.platform == "win32":
            return asyncio.run(whole())
        import uvloop

        return uvloop.run(whole())
    except BaseExceptionGroup as group:
        raise _first_of_ours(group) from None


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Run in a child, also between fork and exec: the kernel sends this signal when the parent ends, however it ends (Linux)."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's last resort. hivemind's DHT drops waiting ``Event.wait()`` tasks when a store is cancelled; that is no news to a user."""
    task = context.get("task")
    if isinstance(task, asyncio.Task) and "destroyed but it is pending" in str(context.get("message")):
        code = getattr(task.get_coro(), "cr_code", None)
        if code is not None and code.co_qualname == "Event.wait":
            return
    loop.default_exception_handler(context)


def _first_of_ours(group: BaseExceptionGroup[BaseException]) -> BaseException:
    ours = group.subgroup((DecentraError, OSError))
    error: BaseException = ours if ours is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def watch_loop(events: Events) -> None:
    """Log stalls over 50 ms: the loop must never touch a tensor."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(WATCH_S)
        late_s = time.monotonic() - before - WATCH_S
        if late_s > STALL_S:
            events.emit("loop-stalled", late_ms=round(1000 * late_s))


def is_locked(path: Path) -> bool:
    """True while a process holds the state directory."""
    with suppress(OSError), open(path / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def locked_dir(path: Path) -> Iterator[None]:
    """Hold a state directory for this process alone. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"state directory {path}: {error.strerror}; choose another with --dir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(f"state directory {path} is in use by another process; give this one another --name or --dir") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.close()
