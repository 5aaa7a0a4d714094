"""``replay`` and ``rollback``: a run's rounds computed again from its ledger and what its host kept; with it the run goes on from there."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.averaging.client import AveragingClient
from decentra.cli.history import read_ledger
from decentra.cli.look import watching
from decentra.cli.rundir import RunDir
from decentra.cli.standby import verify_ledger
from decentra.config import Manifest
from decentra.errors import ConfigError, IntegrityError, InUse, Unreachable
from decentra.gossip.blobs import put_beside, read_kept
from decentra.ids import Digest, FragmentId, PeerId, digest_of, short
from decentra.invite import Invite
from decentra.model.custom import layout_for
from decentra.modules import Layout
from decentra.peer.checkpoint import assemble, save_model
from decentra.peer.disk import RealDisk
from decentra.protocol import ledger
from decentra.protocol.messages import SwarmView
from decentra.status.history import check_settlements
from decentra.wire.ledgers import check_words
from decentra.wire.trust import TrustChain
from decentra.workshop.replaying import Audit, Read, Replayed, Teller, before, stories, until

HELD_AGAIN_S = 120.0  # how long the run gets to have its new anchors before it is said that something is wrong
POLL_S = 0.5


@dataclass(frozen=True)
class Told:
    """A run as its ledger tells it, and its model's layout."""

    manifest: Manifest
    layout: Layout
    records: Sequence[ledger.Record]

    def peers(self, option: str, names: Sequence[str], swarm: SwarmView | None) -> frozenset[PeerId]:
        """Peer ids of names or ids. Raises ConfigError for whom the ledger does not know."""
        admitted = {r.peer for r in self.records if isinstance(r, ledger.Admitted)}
        members = swarm.members if swarm is not None else ()
        found = set()
        for name in names:
            ids = {PeerId(name)} & admitted or {m.peer for m in members if m.name == name} & admitted
            if len(ids) > 1:
                raise ConfigError(
                    f"{option} {name[:60]}: {len(ids)} members have this name; give a peer id, see 'decentra status INVITE --json'"
                )
            if not ids:
                there = ", ".join(sorted({m.name for m in members}))
                hint = (
                    f"names here: {there}"
                    if there
                    else "names are known while the host runs, peer ids always: 'decentra history INVITE --json'"
                )
                raise ConfigError(f"{option} {name[:60]}: no member of this run; {hint}")
            found |= ids
        return frozenset(found)


async def tell(run: RunDir, model_code: Path | None) -> tuple[Told, SwarmView | None]:
    """The run's ledger, checked; from its service where that has it open, and then who is in, too."""
    manifest = run.manifest()
    swarm: SwarmView | None = None
    try:
        _, records = await asyncio.to_thread(verify_ledger, run)
    except InUse:
        invite = run.make_invite(1, 1.0, bootstrap=(), services=run.addresses()[1], role="watcher")
        _, records, _ = await read_ledger(invite)
        swarm = await _swarm(invite)
    check_settlements(manifest, records)
    await asyncio.to_thread(check_words, records, manifest.run_id())
    return Told(manifest, await asyncio.to_thread(layout_for, manifest, model_code), records), swarm


async def _swarm(invite: Invite) -> SwarmView:
    async with watching(invite) as client:
        return (await client.status())[0]


def reader_of(run: RunDir, stores: Sequence[Path]) -> Read:
    """Blobs of the host, of other keepers' folders, and the genesis. Raises ConfigError for a folder that is none."""
    roots = [run.host / "blobs", *(store / "blobs" if (store / "blobs").is_dir() else store for store in stores)]
    if missing := [str(root) for root in roots[1:] if not root.is_dir()]:
        raise ConfigError(f"--store {missing[0]}: no such folder; give the state directory of a keeper of this run")

    def read(digest: Digest) -> bytes | None:
        for root in roots:
            if (data := read_kept(root, digest)) is not None:
                return data
        data = RealDisk(run.genesis).read(digest)
        return data if data is not None and digest_of(data) == digest else None

    return read


def audit(told: Told, read: Read) -> dict[str, Any]:
    """Every kept round computed again. Raises IntegrityError where the ledger says another anchor than the packets give."""
    found, of = Audit(), stories(told.records)
    for fragment in told.layout.fragments:
        Teller(fragment, told.manifest, of[fragment.id], read).audit(found)
        _say(f"{fragment.id}: {found.num_equal} rounds equal so far, {found.num_unchecked} not kept, {len(found.wrong)} wrong")
    if found.wrong:
        raise IntegrityError(
            f"{len(found.wrong)} rounds are not what their packets give, the first: {found.wrong[0]}; the anchor was attested by members that computed"
            " something else, or the store was tampered with: replay from another keeper's folder (--store), and ask who attested"
        )
    return {"ok": True, "run": told.manifest.run_id(), "rounds_equal": found.num_equal, "rounds_not_kept": found.num_unchecked}


@dataclass(frozen=True)
class Wanted:
    """Which moment of the run, and who is left out of it."""

    to: int | None = None  # confirmed rounds of the trunk
    before: frozenset[PeerId] = frozenset()
    without: frozenset[PeerId] = frozenset()

    def why(self) -> str:
        """The reason that the ledger keeps."""
        parts = [f"back to {self.to} rounds of the trunk"] if self.to is not None else []
        parts += [f"{word} {_shortly(peers)}" for word, peers in (("before", self.before), ("without", self.without)) if peers]
        return "by the organiser: " + ", ".join(parts)


def wanted(told: Told, swarm: SwarmView | None, to: int | None, before: Sequence[str], without: Sequence[str]) -> Wanted:
    """Raises ConfigError."""
    if to is not None and before:
        raise ConfigError("--to and --before both say where to; give one of them")
    return Wanted(to, told.peers("--before", before, swarm), told.peers("--without", without, swarm))


def replay(told: Told, read: Read, what: Wanted) -> list[Replayed]:
    """Every fragment at that moment, without these peers. Raises IntegrityError where too little is kept."""
    records = told.records if what.to is None else until(told.records, what.to)
    of, done = stories(before(records, what.before)), []
    for fragment in told.layout.fragments:
        done.append(Teller(fragment, told.manifest, of[fragment.id], read).replay(what.without))
        _say(_line(done[-1], bool(what.without)))
    return done


def _shortly(peers: frozenset[PeerId]) -> str:
    return ", ".join(sorted(short(p) for p in peers))[:200]


def _line(one: Replayed, is_without: bool) -> str:
    text = f"{one.fragment}: height {one.height}, {one.num_rounds} rounds computed again from height {one.from_height}"
    if is_without:
        text += f", somebody left out of {one.num_changed}"
    if one.num_stay:
        text += f"; {one.num_stay} earlier rounds with them stay in, since nothing is kept of those"
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def save(told: Told, done: Sequence[Replayed], target: Path, without: frozenset[PeerId], read: Read, model_code: Path | None) -> None:
    """A checkpoint like that of ``pull``."""
    heights = {one.fragment: one.height for one in done}
    assembled = assemble(told.manifest, {one.fragment: one.blob for one in done}, heights, model_code)
    digest = told.manifest.data.tokenizer
    tokenizer = None if digest is None else read(digest)
    save_model(target, assembled, {"replayed_without": sorted(without)} if without else {}, tokenizer)


def summary(told: Told, done: Sequence[Replayed], what: Wanted) -> dict[str, Any]:
    """For people and programs."""
    return {
        "ok": True, "run": told.manifest.run_id(), "to": what.to, "before": sorted(what.before), "without": sorted(what.without),
        "rounds": sum(one.num_rounds for one in done),
        "rounds_changed": sum(one.num_changed for one in done), "rounds_that_stay": sum(one.num_stay for one in done),
        "fragments": [
            {"fragment": one.fragment, "height": one.height, "from_height": one.from_height, "anchor": one.digest} for one in done
        ],
    }  # fmt: skip


# ---------------------------------------------------------------- the run goes on from there


async def roll_back(run: RunDir, told: Told, done: Sequence[Replayed], why: str, services: Sequence[str] | None) -> dict[str, Any]:
    """Give the anchors to the host and tell its service, fragment by fragment; said again it does the same. Waits until somebody holds each."""
    if not (run.host / "blobs").is_dir():
        raise ConfigError(f"{run.host / 'blobs'} is missing: rollback is for the machine whose 'decentra host' serves this folder")
    of = stories(told.records)
    now = {fragment: story.points[-1] for fragment, story in of.items()}
    moved = [one for one in done if (one.digest, one.height) != now[one.fragment]]
    for one in moved:
        await asyncio.to_thread(put_beside, run.host / "blobs", one.digest, one.blob)
    async with _ordering(run, told.manifest, services) as client:
        for one in moved:
            _say(await client.command(run.run_key(), "roll-back", f"{one.fragment} {one.height} {one.digest} {why}"))
        before = {fragment: frozenset(digest for digest, _ in story.points) for fragment, story in of.items()}
        took_s = await _held_again(run, moved, before, services)
    return {"fragments_moved": len(moved), "held_again_s": round(took_s, 1)}


@asynccontextmanager
async def _ordering(run: RunDir, manifest: Manifest, services: Sequence[str] | None) -> AsyncIterator[AveragingClient]:
    from decentra.cli.console import LogEvents

    client = AveragingClient(tuple(services or run.addresses()[1]), TrustChain(manifest.run_id(), run.run_key().public), LogEvents())
    try:
        yield client
    finally:
        await client.close()


async def _held_again(
    run: RunDir, moved: Sequence[Replayed], before: Mapping[FragmentId, frozenset[Digest]], services: Sequence[str] | None
) -> float:
    """Seconds until members have what they were told to have. ``before``: the anchors up to now. Raises Unreachable, also where they went back to one."""
    began, missing = time.monotonic(), {one.fragment: one.digest for one in moved}
    async with watching(run.make_invite(1, 1.0, bootstrap=(), services=tuple(services or run.addresses()[1]), role="watcher")) as client:
        while missing:
            _, views = await client.status()
            for view in views:
                if (wanted_now := missing.get(view.fragment)) is None:
                    continue
                if view.anchor != wanted_now and view.anchor in before[view.fragment]:
                    raise Unreachable(
                        f"nobody brought the new anchor of {view.fragment}, and it is back at {view.anchor[:12]}: nothing was rolled back there. The host's"
                        f" keeper reads new anchors from {run.host / 'blobs'}: is the host of this folder the one that runs? Say it again when it does"
                    )
                if view.ready or view.anchor != wanted_now:  # held, or a round was confirmed on top of it
                    del missing[view.fragment]
            if missing and time.monotonic() > began + HELD_AGAIN_S:
                raise Unreachable(
                    f"nobody holds the new anchors of {_names(missing)} after {HELD_AGAIN_S:.0f} s: the host's keeper reads them from {run.host / 'blobs'}."
                    " Is the host of this folder running? Without them the fragments go back to what members hold"
                )
            await asyncio.sleep(POLL_S if missing else 0)
    return time.monotonic() - began


def _names(fragments: dict[FragmentId, Digest]) -> str:
    return ", ".join(sorted(fragments)[:5])
