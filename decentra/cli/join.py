"""``join`` and ``keep``: one member from an invite line to its last word."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.cli.console import LogEvents
from decentra.cli.permit import POLL_S, Permit
from decentra.cli.rundir import read_genesis
from decentra.cli.running import StopRequest, locked_dir, watch_loop
from decentra.cli.succession import check_dir, expect_successor, note_steps, onward, successor_of
from decentra.cli.tokenizers import tokenizer_for
from decentra.cli.wiring import (
    check_fit,
    check_local,
    compare_held_out,
    follow_service,
    gossip,
    join_again,
    member_runtime,
    open_door,
    state_dir,
)
from decentra.config import Manifest, PeerConfig
from decentra.errors import ExitCode, NoRoomNow, Refused, RunOver
from decentra.gossip.exchange import HivemindExchange
from decentra.ids import short
from decentra.invite import Invite
from decentra.peer.disk import RealDisk, write_atomic
from decentra.peer.runtime import PeerRuntime
from decentra.peer.trainer import MakeInner
from decentra.ports import Events

PROGRESS_S = 10.0
NO_ROOM_S = 30.0  # until memory that others have is looked at again
PAUSED = "paused: "  # begins why a peer left that comes back by itself
OVER_FILE = "over"  # why the run ended, once it has


@dataclass(frozen=True)
class _Part:
    """One member's part in one run: what its owner asked for, and where it is kept."""

    invite: Invite
    config: PeerConfig
    root: Path
    permit: Permit
    stop: StopRequest
    events: LogEvents
    patience_s: float  # at the door
    genesis: Path | None  # the first anchors as files
    make_inner: MakeInner | None
    is_following: bool  # it was in the run that this one goes on from


async def run_member(
    invite: Invite,
    config: PeerConfig,
    stop: StopRequest,
    *,
    patience_s: float,
    genesis: Path | None = None,
    make_inner: MakeInner | None = None,
) -> dict[str, Any]:
    """Take part until the run is over, Ctrl-C, or the configured number of steps, and in the runs that it goes on as.

    Returns what was contributed to the last of them, and which runs there were.
    """
    check_local(config)
    first = state_dir(invite.run_id, config)
    check_dir(first, invite.run_id)
    with locked_dir(first):  # while it waits, too; and 'decentra pause' knows this directory, whichever run the peer is in
        return await _follow(invite, config, first, stop, patience_s=patience_s, genesis=genesis, make_inner=make_inner)


async def _follow(
    invite: Invite,
    config: PeerConfig,
    first: Path,
    stop: StopRequest,
    *,
    patience_s: float,
    genesis: Path | None,
    make_inner: MakeInner | None,
) -> dict[str, Any]:
    runs, base, permit = [invite.run_id], config.dir, Permit(config, first)
    while True:
        root, events = state_dir(invite.run_id, config), LogEvents(run=invite.run_id[:8], peer=config.name)
        part = _Part(invite, config, root, permit, stop, events, patience_s, genesis, make_inner, is_following=len(runs) > 1)
        try:
            with nullcontext() if root == first else locked_dir(root):
                result = await _run_member(part)
        except RunOver as error:
            way = await _way_on(invite, root, stop, events)
            if way is None and not stop.event.is_set():
                raise
            result = {"ok": True, "why": stop.why or str(error), "num_steps": 0, "num_tokens": 0}
        else:
            way = await _way_on(invite, root, stop, events) if result.pop("is_over", False) else None
        further = None if way is None or way.run_id in runs else onward(way, config, root, base)
        if further is None:
            return result | ({"runs": runs} if len(runs) > 1 else {})
        events.emit("onward", run=further.invite.run_id, why="the run goes on as another one; this peer follows")
        invite, config, genesis = further.invite, further.config, None
        runs.append(invite.run_id)


async def _way_on(invite: Invite, root: Path, stop: StopRequest, events: Events) -> Invite | None:
    """Where a run that is over goes on; None: nowhere, or Ctrl-C came first."""
    asking, stopped = asyncio.create_task(successor_of(invite, root, events)), asyncio.create_task(stop.event.wait())
    try:
        await asyncio.wait([asking, stopped], return_when=asyncio.FIRST_COMPLETED)
        return asking.result() if asking.done() else None
    finally:
        for task in (asking, stopped):
            task.cancel()
        await asyncio.gather(asking, stopped, return_exceptions=True)


async def _run_member(part: _Part) -> dict[str, Any]:
    """In one run. ``is_over`` in what it returns: it saw the run's end."""
    permit, stop, events = part.permit, part.stop, part.events
    tx_bytes = rx_bytes = 0
    if (over := RealDisk(part.root).read(OVER_FILE)) is not None:
        raise RunOver(f"this run is over ({over.decode(errors='replace')[:200]}); 'decentra pull' gets its result")
    result: dict[str, Any] = {"ok": True, "num_steps": 0, "num_tokens": 0}
    while not stop.event.is_set():
        if why := permit.refusal():
            events.emit("paused", why=why)
            await _until(lambda: not permit.refusal(), stop)
            continue
        try:
            stay = await _one_stay(part, brings_genesis="peer" not in result)
        except RunOver as error:
            if "peer" not in result:
                raise
            result |= {"why": str(error), "is_over": True}  # it ended while this peer was paused
            break
        except NoRoomNow as error:
            if "peer" not in result:
                raise
            events.emit("paused", why=str(error))
            await _until(functools.partial(_is_later, time.monotonic() + NO_ROOM_S), stop)
            continue
        finally:
            _give_memory_back()
        tx_bytes, rx_bytes = tx_bytes + stay.get("tx_bytes", 0), rx_bytes + stay.get("rx_bytes", 0)
        result = stay if "peer" in stay or "peer" not in result else result | {"why": stay["why"]}
        if not str(stay["why"]).startswith(PAUSED):
            break
    if stop.event.is_set():
        result["why"] = stop.why
    return result | ({"tx_bytes": tx_bytes, "rx_bytes": rx_bytes} if "peer" in result else {})


def _is_later(at_s: float) -> bool:
    return time.monotonic() >= at_s


async def _until(holds: Callable[[], bool], stop: StopRequest) -> None:
    """Wait until it holds, or for Ctrl-C."""
    while not holds():
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await stop.event.wait()
                return


async def _one_stay(part: _Part, *, brings_genesis: bool) -> dict[str, Any]:
    """From the door until the peer leaves: the run is over, Ctrl-C, its steps are done, or its owner's rules make it pause."""
    invite, config, root, permit, stop, events = part.invite, part.config, part.root, part.permit, part.stop, part.events
    async with AsyncExitStack() as stack:
        check = functools.partial(check_fit, config, is_following=part.is_following)
        opening = open_door(invite, config, root, events, patience_s=part.patience_s, check=check)
        door = await _or_stop(opening, stop, permit)
        if door is None:
            return {"ok": True, "why": stop.why or f"{PAUSED}{permit.refusal()}", "num_steps": 0, "num_tokens": 0}
        stack.push_async_callback(door.client.close)
        await asyncio.to_thread(compare_held_out, door, config, events)
        node, exchange = await stack.enter_async_context(
            gossip(root, invite.bootstrap, config, door.trust, lambda: door.client.credentials, events)
        )
        if part.genesis is not None and brings_genesis:
            await _bring_genesis(part.genesis, door.manifest, exchange)
        tokenizer = await _or_stop(tokenizer_for(door.manifest, root, door.client, exchange, events, part.patience_s), stop, permit)
        if tokenizer is None:
            return {"ok": True, "why": stop.why or f"{PAUSED}{permit.refusal()}", "num_steps": 0, "num_tokens": 0}
        runtime = member_runtime(door, config, root, node, exchange, events, tokenizer)
        if part.make_inner is not None:
            runtime.make_inner = part.make_inner
        stop.on_stop(runtime.leave)
        tasks = [
            asyncio.create_task(watch_loop(events)),
            asyncio.create_task(_progress(runtime, events)),
            asyncio.create_task(join_again(door, config, root, events)),
            asyncio.create_task(follow_service(door, node, invite.services, root, events)),
            asyncio.create_task(_leave_when_refused(permit, runtime, stop)),
        ]
        for task in tasks:
            task.add_done_callback(lambda t: _report(t, runtime, events))
        began = time.monotonic()
        try:
            why = await runtime.run()
            if runtime.saw_the_end:
                assert runtime.loop is not None
                assert runtime.loop.machine.swarm is not None
                swarm = runtime.loop.machine.swarm
                why = swarm.why  # also when its owner said pause at the same moment
                if swarm.awaits_successor:
                    expect_successor(root)
                with suppress(OSError):  # a full disk: the next start asks the service instead
                    write_atomic(RealDisk(root), OVER_FILE, why.encode())
        finally:
            stop.forget(runtime.leave)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        counters = runtime.counters()
        with suppress(OSError):  # a full disk: then a run that follows counts from nought
            note_steps(root, counters.num_steps)
        events.emit("leaving", why=why)
        failed = why.startswith("failed: ")
        return {
            "ok": not failed, "is_over": runtime.saw_the_end, "why": why, "exit_code": int(ExitCode.FAILED if failed else ExitCode.OK), "run": invite.run_id,
            "peer": door.key.peer_id, "name": config.name, "num_steps": counters.num_steps, "num_tokens": counters.num_tokens,
            "tx_bytes": counters.tx_bytes, "rx_bytes": counters.rx_bytes, "loss": counters.loss, "seconds": round(time.monotonic() - began, 1),
            "skipped_rounds": counters.skipped_rounds, "experts": sorted(e for e, _ in counters.expert_tokens),
            "anchors": {f: r.anchor for f, r in runtime.replicas.items()}, "state_dir": str(root),
        }  # fmt: skip


async def _leave_when_refused(permit: Permit, runtime: PeerRuntime, stop: StopRequest) -> None:
    why = ""

    def is_refused() -> bool:
        nonlocal why
        why = permit.refusal()
        return bool(why)

    await _until(is_refused, stop)
    if why:
        runtime.leave(f"{PAUSED}{why}", comes_back=True)


def _report(task: asyncio.Task[None], runtime: PeerRuntime, events: Events) -> None:
    """A background chore that ends with an error is told; one that was refused for good ends the peer."""
    if task.cancelled() or (error := task.exception()) is None:
        return
    events.emit("operation-failed", why=str(error) or repr(error))
    if isinstance(error, Refused):
        runtime.leave(f"failed: {error}")


def _give_memory_back() -> None:
    """A paused peer waits in the same process: its model is garbage now, and glibc keeps what was freed unless it is asked."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


async def _bring_genesis(folder: Path, manifest: Manifest, exchange: HivemindExchange) -> None:
    """Take the first anchors from files, so that a run can begin without a host. Raises IntegrityError."""
    for digest, blob in read_genesis(folder, manifest).items():
        await exchange.put(digest, blob)
        exchange.pin(digest)


async def _or_stop(job: Any, stop: StopRequest, permit: Permit) -> Any:
    """The job's result, or None when Ctrl-C or the owner's word came first."""
    task, stopped = asyncio.ensure_future(job), asyncio.ensure_future(_until(lambda: bool(permit.refusal()), stop))
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, stopped):
            one.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def _progress(runtime: PeerRuntime, events: Events) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        c = runtime.counters()
        rounds = {}
        if runtime.loop is not None:
            rounds = {f: life.view.height for f, life in runtime.loop.machine.lives.items() if life.view is not None}
        events.emit(
            "progress", state=c.state, step=c.num_steps, loss=None if c.loss is None else round(c.loss, 3), tokens_per_s=round(c.tokens_per_s),
            trunk_rounds=max((h for f, h in rounds.items() if f.startswith("trunk")), default=0), up=_bytes(c.tx_bytes), down=_bytes(c.rx_bytes),
        )  # fmt: skip


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


def describe_peer(result: dict[str, Any]) -> str:
    """One sentence of thanks."""
    if "peer" not in result:
        return f"left before joining: {result['why']}"
    return (
        f"{result['name']} ({short(result['peer'])}) left: {result['why']}. {result['num_steps']} steps, {result['num_tokens']} tokens,"
        f" {_bytes(result['tx_bytes'])} up, {_bytes(result['rx_bytes'])} down in {result['seconds']:.0f} s"
    )
