"""A run that goes on as another one: with experts added or taken away, or under other rules. Its members follow by themselves.

A run's manifest is frozen, so what changes its shape is a new run. The old one ends (``decentra stop RUN_DIR --pass-on``) with every round confirmed, its
model is pulled and changed, and the new run's host tells the old service, with the old run's key, where it goes on.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

from decentra.averaging.client import AveragingClient
from decentra.cli.rundir import RunDir
from decentra.cli.wiring import state_dir, stored_credentials
from decentra.config import PeerConfig
from decentra.errors import ConfigError, DecentraError, Refused, Unreachable
from decentra.identity import load_key, load_or_create_key, save_key
from decentra.invite import Invite, parse_invite
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.wire.trust import TrustChain, seal_successor

KEY_FILE = "identity.key"
SUCCESSOR_FILE = "successor"  # in a member's directory: while its run waits to be continued, and then with the way on
POLL_S, TELL_AGAIN_S = 3.0, 60.0
PATIENCE_S = 86_400.0  # a member waits so long for the run that follows
ONCE_S = 5.0  # somebody whose run was said to be over asks once more


# ---------------------------------------------------------------- the organiser's side


async def tell_members(run: RunDir, invite: Invite, events: Events) -> None:
    """Tell the service of the run before this one where it goes on, as long as this host runs: what restarts there forgets the way."""
    old = run.before()
    if old is None:
        return
    try:
        manifest, key, where = old.manifest(), old.run_key(), old.addresses()[1]
    except (ConfigError, OSError) as error:
        events.emit("operation-failed", why=f"members of the run before this one are not told where it goes on: {error}")
        return
    sealed = seal_successor(key, manifest.run_id(), invite.encode())
    client = AveragingClient(where, TrustChain(manifest.run_id(), key.public), events)
    said = ""
    try:
        while True:
            try:
                answer = await client.command(key, "succeed", sealed)
            except (Refused, Unreachable) as error:
                answer = f"{error}; told again in {POLL_S:g} s"
            if answer != said:
                events.emit("succession", before=manifest.run_id()[:12], why=answer)
                said = answer
            await asyncio.sleep(POLL_S if "told again" in answer else TELL_AGAIN_S)
    finally:
        await client.close()


# ---------------------------------------------------------------- a member's side


@dataclass(frozen=True)
class Onward:
    """Where a member goes on."""

    invite: Invite
    config: PeerConfig


def expect_successor(root: Path, num_steps: int) -> None:
    """This member's run ended to be continued, after so many of its steps."""
    _write(RealDisk(root), None, num_steps)


def _write(disk: RealDisk, invite: Invite | None, num_steps: int) -> None:
    body = {"invite": None if invite is None else invite.encode(), "num_steps": num_steps}
    write_atomic(disk, SUCCESSOR_FILE, json.dumps(body).encode())


def _read(disk: RealDisk) -> tuple[Invite | None, int] | None:
    """The way on, if it is known yet, and the steps done before; None: nothing is known. What is damaged is asked for again."""
    data = disk.read(SUCCESSOR_FILE)
    try:
        raw = None if data is None else json.loads(data)
        return None if raw is None else (raw["invite"] and parse_invite(raw["invite"]), int(raw["num_steps"]))
    except (ValueError, KeyError, TypeError, AttributeError, DecentraError):
        return None, 0


async def successor_of(invite: Invite, root: Path, events: Events) -> Invite | None:
    """The way to the run that ``invite``'s goes on as; None where it does not, as far as is known. Raises Unreachable after ``PATIENCE_S``."""
    disk = RealDisk(root)
    stored, trust = _read(disk), TrustChain(invite.run_id, invite.run_public)
    if stored and stored[0]:
        return stored[0]
    key = load_or_create_key(root / KEY_FILE)
    credentials = stored_credentials(disk, trust, key.peer_id, events)
    client = AveragingClient(invite.services, trust, events, key=key, token=invite.token, credentials=credentials)
    deadline, said = time.monotonic() + (ONCE_S if stored is None else PATIENCE_S), ""
    try:
        while True:
            why = "the run is over and goes on as another one, whose host has not come yet"
            try:
                swarm, _ = await client.status()
                if swarm.successor:
                    found = trust.check_successor(swarm.successor)
                    _write(disk, found, stored[1] if stored else 0)
                    return found
                if not swarm.awaits_successor and stored is None:
                    return None
            except Unreachable as error:
                why = str(error)
            if time.monotonic() > deadline:
                if stored is None:
                    return None
                raise Unreachable(f"nothing followed this run within {PATIENCE_S / 3600:g} hours; 'decentra pull' gets its result ({why})")
            if why != said:
                events.emit("waiting", why=why)
                said = why
            await asyncio.sleep(POLL_S)
    finally:
        await client.close()


def onward(invite: Invite, config: PeerConfig, root: Path, base: Path | None) -> Onward | None:
    """How this member takes part in the run of ``invite``: under the same identity, with a directory of its own, for the steps that are left.

    ``base``: the directory its owner gave. None: it has done all its steps.
    """
    known = _read(RealDisk(root))
    left = None if config.max_steps is None else config.max_steps - (known[1] if known else 0)
    if left is not None and left <= 0:
        return None
    # experts are numbered anew, so their owner's choice would be of others
    count = len(config.experts) if config.experts is not None and config.num_experts is None else config.num_experts
    changes = {
        "experts": None,
        "num_experts": count,
        "max_steps": left,
        "dir": None if base is None else base / "onward" / invite.run_id[:16],
    }
    changed = config.model_copy(update=changes)
    there = state_dir(invite.run_id, changed)
    if not (there / KEY_FILE).exists():
        save_key(there / KEY_FILE, load_key(root / KEY_FILE))
    return Onward(invite, changed)
