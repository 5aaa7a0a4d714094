"""A run that goes on as another one: with experts added or taken away, or under other rules. Its members follow by themselves.

A run's manifest is frozen, so what changes its shape is a new run. The old one ends (``decentra stop RUN_DIR --pass-on``) with every round confirmed, its
model is pulled and changed, and the new run's host tells the old service, with the old run's key, where it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decentra.averaging.client import AveragingClient
from decentra.cli.rundir import RunDir
from decentra.cli.wiring import MANIFEST_FILE, state_dir, stored_credentials
from decentra.config import PeerConfig, manifest_from_bytes
from decentra.errors import ConfigError, DecentraError, Refused, Unreachable
from decentra.identity import Keypair, load_key, load_or_create_key, save_key
from decentra.ids import RunId
from decentra.invite import Invite, parse_invite
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.wire.trust import TrustChain, seal_successor

KEY_FILE = "identity.key"
STEPS_FILE = "num-steps"
SUCCESSOR_FILE = "successor"  # in a member's directory: empty while its run waits to be continued, then the way on
POLL_S, TELL_AGAIN_S = 3.0, 60.0
INVITE_DAYS = 90.0
PATIENCE_S = 86_400.0  # a member waits so long for the run that follows
ONCE_S = 5.0  # somebody whose run was said to be over asks once more


# ---------------------------------------------------------------- the organiser's side


async def tell_members(run: RunDir, addresses: tuple[Sequence[str], Sequence[str]], events: Events) -> None:
    """Tell the service of the run before this one where it goes on, as long as this host runs: what restarts there forgets the way.

    ``addresses``: this run's bootstrap nodes and services. Members get an invite of their own, for as many as may be in.
    """
    try:
        old = run.before()
        if old is None:
            return
        manifest, key = old.manifest(), old.run_key()
        invite = run.make_invite(2 * run.manifest().admission.max_members, INVITE_DAYS, bootstrap=addresses[0], services=addresses[1])
    except (ConfigError, OSError) as error:
        events.emit("operation-failed", why=f"members of the run before this one are not told where it goes on: {error}")
        return
    sealed, trust, said = seal_successor(key, manifest.run_id(), invite.encode()), TrustChain(manifest.run_id(), key.public), ""
    while True:
        why, is_told = await _tell(old, trust, key, sealed, events)
        if why != said:
            events.emit("succession", before=manifest.run_id()[:12], why=why)
            said = why
        await asyncio.sleep(TELL_AGAIN_S if is_told else POLL_S)


async def _tell(old: RunDir, trust: TrustChain, key: Keypair, sealed: str, events: Events) -> tuple[str, bool]:
    """What came of it, and whether it was heard."""
    try:
        client = AveragingClient(old.addresses()[1], trust, events)
    except (ConfigError, OSError) as error:
        return f"members are not told where their run goes on: {error}", False
    try:
        return await client.command(key, "succeed", sealed), True
    except DecentraError as error:
        return (
            f"members are not told where their run goes on: {error}; its host has to run beside this one, on other ports; told again",
            False,
        )
    finally:
        await client.close()


# ---------------------------------------------------------------- a member's side


@dataclass(frozen=True)
class Onward:
    """Where a member goes on."""

    invite: Invite
    config: PeerConfig


def expect_successor(root: Path) -> None:
    """This member's run ended to be continued."""
    _write(root, b"")


def check_dir(root: Path, run: RunId) -> None:
    """Raise ConfigError where a directory holds another run: its ledger's heights and accounts would be taken for this one's."""
    data = RealDisk(root).read(MANIFEST_FILE)
    try:
        held = None if data is None else manifest_from_bytes(data, str(root / MANIFEST_FILE)).run_id()
    except ConfigError:
        return  # damaged, or of another version: it is asked for again
    if held is not None and held != run:
        raise ConfigError(
            f"{root} holds the files of run {held[:12]}, this invite is for {run[:12]}: every run needs a directory of its own. Give another --dir;"
            " a peer that follows a run into the next one is started with the invite and the directory it had"
        )


def note_steps(root: Path, num_steps: int) -> None:
    """So many inner steps were done here, for runs that follow."""
    write_atomic(RealDisk(root), STEPS_FILE, str(num_steps).encode())


def _write(root: Path, line: bytes) -> None:
    write_atomic(RealDisk(root), SUCCESSOR_FILE, line)
    (root / SUCCESSOR_FILE).chmod(0o600)  # it lets in who reads it


def _read(root: Path) -> tuple[bool, Invite | None]:
    """Whether a run is to follow, and the way to it as last heard. What is damaged is asked for again."""
    try:
        data = RealDisk(root).read(SUCCESSOR_FILE)
        return data is not None, parse_invite(data.decode()) if data else None
    except (DecentraError, OSError, ValueError):
        return True, None


async def successor_of(invite: Invite, root: Path, events: Events) -> Invite | None:
    """The way to the run that ``invite``'s goes on as; None where it does not, as far as is known.

    The service is asked first: a way may change. Raises Refused, and Unreachable after ``PATIENCE_S``.
    """
    disk, trust = RealDisk(root), TrustChain(invite.run_id, invite.run_public)
    is_awaited, known = _read(root)
    key = load_or_create_key(root / KEY_FILE)
    credentials = stored_credentials(disk, trust, key.peer_id, events)
    client = AveragingClient(invite.services, trust, events, key=key, token=invite.token, credentials=credentials)
    began, said = time.monotonic(), ""
    patience_s = PATIENCE_S if is_awaited and known is None else ONCE_S
    try:
        while True:
            why = "the run is over and goes on as another one, whose host has not come yet"
            try:
                swarm, _ = await client.status()
                if swarm.successor:
                    found = trust.check_successor(swarm.successor)
                    _write(root, found.encode().encode())
                    return found
                if not swarm.awaits_successor and not is_awaited:
                    return None
            except Refused:
                if not is_awaited:
                    return None  # it was sent away; its run is over all the same
                raise
            except DecentraError as error:  # nobody answers, or another run does, on the ports of the old one
                why = str(error)
            if known is not None:
                return known
            if time.monotonic() > began + patience_s:
                if not is_awaited:
                    return None
                raise Unreachable(f"nothing followed this run within {PATIENCE_S / 3600:g} hours; 'decentra pull' gets its result ({why})")
            if why != said:
                events.emit("waiting", why=why)
                said = why
            await asyncio.sleep(POLL_S)
    finally:
        await client.close()


def _steps_done(root: Path) -> int:
    try:
        return max(0, int(RealDisk(root).read(STEPS_FILE) or b"0"))
    except ValueError:
        return 0


def onward(invite: Invite, config: PeerConfig, root: Path, base: Path | None) -> Onward | None:
    """How this member takes part in the run of ``invite``: under the same identity, with a directory of its own, for the steps that are left.

    ``base``: the directory its owner gave. None: it has done all its steps.
    """
    left = None if config.max_steps is None else config.max_steps - _steps_done(root)
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
