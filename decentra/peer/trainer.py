"""The inner loop in a thread of its own, with an asyncio face. Knows no rounds and no network; the only place that moves live weights.

Commands run in the trainer thread between two inner steps; while it is paused or done they run at once. Before ``start`` and after
``stop`` there is no thread, and a command runs in the caller's.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from decentra.config import Manifest
from decentra.data.windows import WindowSource
from decentra.errors import DecentraError, TrainingError
from decentra.ids import FragmentId
from decentra.modules import Layout
from decentra.peer.inner import InnerLoop, Snapshot, Totals, resolve_device

T = TypeVar("T")

__all__ = ["Snapshot", "Totals", "Trainer"]

_STEP_TIME_DECAY = 0.9

MakeInner = Callable[[Manifest, Layout, nn.Module, WindowSource, torch.device, frozenset[FragmentId]], InnerLoop]


class _Command:
    """A function for the trainer thread and the future in the caller's loop that gets its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function, self._loop = function, asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def execute(self) -> None:
        try:
            result = self._function()
        except Exception as error:  # a command's mistake is its caller's to handle, not the thread's end
            self.fail(_as_ours(error))
        else:
            _call_in(self._loop, _resolve, self.future, result, None)

    def fail(self, error: BaseException) -> None:
        _call_in(self._loop, _resolve, self.future, None, error)


class Trainer:
    """Trains ``model`` on ``source`` step after step between ``resume`` and ``pause``; starts paused.

    ``on_steps`` is called in the loop after every inner step, skipped ones included, and once if the thread dies. A step whose loss or
    gradient is not finite is skipped and counted. With ``max_steps`` training ends at that total; commands go on working.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        model: nn.Module,
        source: WindowSource,
        *,
        device: str,
        threads: int,
        trained: frozenset[FragmentId],
        on_steps: Callable[[], None],
        max_steps: int | None = None,
        make_inner: MakeInner = InnerLoop,
    ) -> None:
        """Moves the model to ``device``. Raises ConfigError for a device this machine lacks or fragments the model lacks."""
        self._inner = make_inner(manifest, layout, model, source, resolve_device(device), trained)
        self._num_threads, self._on_steps, self._max_steps = threads, on_steps, max_steps
        self._wake = threading.Condition()  # guards the six fields below
        self._commands: deque[_Command] = deque()
        self._is_paused, self._is_stopping, self._is_running = True, False, False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._step_limit: int | None = None
        self._step_s: float | None = None
        self._totals = Totals()

    # ------------------------------------------------------------ life

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, paused; ``on_steps`` will be called in ``loop``."""
        assert self._thread is None, "a trainer starts once"
        self._loop, self._is_running = loop, True
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the current inner step and the commands that wait; never raises for a thread that died."""
        self._set(is_stopping=True)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._inner.close()

    def pause(self) -> None:
        """No inner step begins after this; one may be under way, any awaited command waits for its end."""
        self._set(is_paused=True)

    def resume(self) -> None:
        self._set(is_paused=False)

    def step_to(self, limit: int | None) -> None:
        """No inner step begins once ``limit`` are done; None: no limit."""
        with self._wake:
            self._step_limit = limit
            self._wake.notify()

    def set_run_tokens(self, run_tokens: int) -> None:
        """Confirmed tokens of the whole run, which the learning rate follows from the next step on."""
        self._inner.set_run_tokens(run_tokens)

    def _set(self, *, is_paused: bool | None = None, is_stopping: bool | None = None) -> None:
        with self._wake:
            self._is_paused = self._is_paused if is_paused is None else is_paused
            self._is_stopping = self._is_stopping if is_stopping is None else is_stopping
            self._wake.notify()

    # ------------------------------------------------------------ what it did (any thread, no waiting)

    def totals(self) -> Totals:
        """(num_steps, num_tokens, tokens_per_s, loss_ema, expert_tokens)."""
        return self._totals

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    @property
    def is_diverged(self) -> bool:
        """True after five steps in a row that were not finite."""
        return self._inner.is_diverged

    @property
    def is_finished(self) -> bool:
        """True when ``max_steps`` are done."""
        return self._max_steps is not None and self._totals.num_steps >= self._max_steps

    @property
    def num_skipped_steps(self) -> int:
        return self._inner.num_skipped_steps

    @property
    def trained(self) -> frozenset[FragmentId]:
        return self._inner.trained

    @property
    def failure(self) -> TrainingError | None:
        """Why the thread died, or None."""
        return None if self._failure is None else _death(self._failure)

    # ------------------------------------------------------------ commands

    async def step_over(self) -> None:
        """Wait for the end of the inner step under way, if there is one."""
        await self._call(lambda: None)

    async def snapshot(self, fragment: FragmentId) -> Snapshot:
        """A copy of one fragment with its counts. Raises TrainingError when the thread died; so do all commands."""
        return await self._call(lambda: self._inner.snapshot(fragment))

    async def shift(self, fragment: FragmentId, delta_N: Tensor) -> None:
        """live += delta (fp32 [N] on the CPU), between two inner steps; moments stay."""
        await self._call(lambda: self._inner.shift(fragment, delta_N))

    async def load(self, fragment: FragmentId, values_N: Tensor) -> None:
        """live := values (fp32 [N] on the CPU); the fragment's optimizer moments are dropped."""
        await self._call(lambda: self._inner.load(fragment, values_N))

    async def gains(
        self, fragment: FragmentId, anchor_N: Tensor, deltas: Sequence[Tensor], step: float, number: int, num_windows: int
    ) -> Tensor:
        """How much a step of each delta lowers this peer's loss; see ``InnerLoop.gains``."""
        return await self._call(lambda: self._inner.gains(fragment, anchor_N, deltas, step, number, num_windows))

    async def set_trained(self, trained: frozenset[FragmentId]) -> None:
        """Train exactly these fragments from now on; moments of those that stay are kept. With none the trainer waits."""
        await self._call(lambda: self._inner.set_trained(trained))

    async def hold(self, experts: Sequence[int]) -> None:
        """Take these experts into the process, as zeros. Raises ConfigError where the model cannot hold a part of its experts."""
        await self._call(lambda: self._inner.hold(experts))

    async def state_record(self) -> bytes:
        """Trained live weights, moments, counters, cursor and torch's random state, as safetensors bytes."""
        return await self._call(self._inner.record)

    async def load_state(self, data: bytes) -> None:
        """Go on from a ``state_record``, bit for bit on the same machine. Raises IntegrityError, and then changes nothing."""
        await self._call(lambda: self._restore(data))

    def _restore(self, data: bytes) -> None:
        self._inner.restore(data)
        self._totals = self._inner.totals(self._totals.tokens_per_s)

    async def _call(self, function: Callable[[], T]) -> T:
        command = _Command(function)
        with self._wake:
            if self._failure is not None:
                raise _death(self._failure) from self._failure
            if is_queued := self._is_running:
                self._commands.append(command)
                self._wake.notify()
        if not is_queued:
            return function()
        result: T = await command.future
        return result

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            _keep_freed_memory()
            torch.set_num_threads(self._num_threads)
            while self._serve():
                self._step()
        except BaseException as error:  # task boundary: whatever ends the thread must reach everyone who waits for it
            self._die(error)

    def _serve(self) -> bool:
        """Run commands until a step may begin (True) or the trainer is to end (False)."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._is_stopping or self._may_step())
                if not self._commands:
                    self._is_running = not self._is_stopping
                    return self._is_running
                command = self._commands.popleft()
            command.execute()

    def _may_step(self) -> bool:
        is_ahead = self._step_limit is not None and self._totals.num_steps >= self._step_limit
        return not self._is_paused and not self.is_finished and not is_ahead and self._inner.can_step

    def _step(self) -> None:
        start_s = time.perf_counter()
        num_tokens = self._inner.step()
        step_s = time.perf_counter() - start_s
        self._step_s = step_s if self._step_s is None else _STEP_TIME_DECAY * self._step_s + (1 - _STEP_TIME_DECAY) * step_s
        rate = num_tokens / self._step_s if num_tokens else self._totals.tokens_per_s
        self._totals = self._inner.totals(rate)
        assert self._loop is not None
        _call_in(self._loop, self._on_steps)

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self._failure, self._is_running = error, False
            waiting = list(self._commands)
            self._commands.clear()
        for command in waiting:
            death = _death(error)
            death.__cause__ = error
            command.fail(death)
        assert self._loop is not None
        _call_in(self._loop, self._on_steps)


def _death(cause: BaseException) -> TrainingError:
    return TrainingError(
        f"the trainer ended with {type(cause).__name__}: {cause}; fix the cause and start the peer again, its anchors are safe"
    )


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, DecentraError | AssertionError | KeyError):
        return error
    ours = TrainingError(f"the trainer could not do that: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: nobody is left to tell
        if not loop.is_closed():
            raise


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed activations for the next step instead of returning them to the system; elsewhere does nothing.

    Every step allocates the same few megabytes; faulting those pages in anew cost 5 to 25 % of a small model's CPU time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_mmap_threshold = -1, -3  # glibc's malloc.h
            mallopt(m_trim_threshold, 256 << 20)
            mallopt(m_mmap_threshold, 32 << 20)
