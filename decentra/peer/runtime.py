"""One member from start to stop over ports: replicas, trainer, loop, checkpoints, in that order, and back. Chooses no adapter."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from decentra.config import Manifest, PeerConfig
from decentra.data.windows import WindowSource
from decentra.delta.golden import check_golden
from decentra.errors import DecentraError, IntegrityError, ManifestMismatch
from decentra.ids import FragmentId, PeerId, expert_of, module_of_fragment
from decentra.modules import Fragment, Layout
from decentra.peer.disk import sweep, write_atomic
from decentra.peer.inner import InnerLoop
from decentra.peer.judge import Judge
from decentra.peer.link import RateControl, limits_of
from decentra.peer.replica import Replica
from decentra.peer.stories import Stories
from decentra.peer.sync import PeerLoop
from decentra.peer.trainer import MakeInner, Trainer
from decentra.ports import AveragingService, Clock, Compute, Disk, Events, Exchange
from decentra.protocol.duties import Self
from decentra.protocol.messages import Counters, Hello, Role, Told

MIN_CHECKPOINT_S, MAX_CHECKPOINT_S = 10.0, 300.0  # between two checkpoints
CHECKPOINT_BYTES_PER_S = 2e6  # a home disk is written to for years; what a kill costs is the time between two
LEAVE_S = 5.0  # for a goodbye
STATE_FILE, PREVIOUS_FILE, TRAINED_FILE = "trainer.state", "trainer.state.prev", "trained.json"

STATE_MAGIC = b"DCTS"

Places = dict[FragmentId, tuple[str, int]]  # where live weights stand: (anchor digest, round of the pending packet or 0)


def _framed(places: Places, state: bytes) -> bytes:
    """A checkpoint: where each trained fragment's live weights stand, and the trainer's state."""
    head = json.dumps(places).encode()
    return STATE_MAGIC + len(head).to_bytes(4, "big") + head + state


def _unframed(data: bytes) -> tuple[Places, bytes]:
    """Raises IntegrityError for bytes that are no checkpoint; the state inside is checked by the trainer."""
    try:
        num_bytes = int.from_bytes(data[4:8], "big")
        if data[:4] != STATE_MAGIC or len(data) < 8 + num_bytes:
            raise ValueError("it does not begin like one")
        raw = json.loads(data[8 : 8 + num_bytes])
        return {FragmentId(f): (str(anchor), int(number)) for f, (anchor, number) in raw.items()}, data[8 + num_bytes :]
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"not a whole trainer checkpoint: {error}; the one before it is used") from None


def _experts_of(fragments: frozenset[FragmentId]) -> tuple[int, ...]:
    """The experts whose fragments these are."""
    return tuple(sorted({e for f in fragments if (e := expert_of(module_of_fragment(f))) is not None}))


def _is_held(fragment: FragmentId, held: tuple[int, ...]) -> bool:
    """Does a peer with these experts have this fragment?"""
    return (expert := expert_of(module_of_fragment(fragment))) is None or expert in held


def checkpoint_pause_s(num_bytes: int) -> float:
    """Seconds between two checkpoints of this size."""
    return min(MAX_CHECKPOINT_S, max(MIN_CHECKPOINT_S, num_bytes / CHECKPOINT_BYTES_PER_S))


def check_layout(manifest: Manifest, layout: Layout) -> None:
    """The model built here must have the manifest's fragments. Raises ManifestMismatch."""
    ours, theirs = {f.id for f in layout.fragments}, set(manifest.genesis)
    if ours != theirs:
        keys = tuple(sorted(ours ^ theirs))[:5]
        raise ManifestMismatch(f"{len(ours)} fragments", f"{len(theirs)} fragments", keys, what="the model's layout")


@dataclass
class Ports:
    """The outside of one member."""

    service: AveragingService
    exchange: Exchange
    disk: Disk
    clock: Clock
    compute: Compute
    events: Events


@dataclass
class PeerRuntime:
    """A trainer or keeper of a run. ``run`` returns why it ended; ``leave`` ends it from inside the loop."""

    manifest: Manifest
    layout: Layout
    config: PeerConfig
    peer: PeerId
    nonce: str
    ports: Ports
    addresses: Callable[[], tuple[str, ...]] = tuple
    traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)  # bytes sent, received
    on_revoked: Callable[[PeerId], None] = lambda _: None
    is_told: Callable[[Told], bool] = lambda _: False  # these three: see Stories
    contradicts: Callable[[bytes], bool] = lambda _: False
    certificate: Callable[[], bytes] = bytes
    make_model: Callable[[Sequence[int] | None], nn.Module] | None = None  # with these experts, None: all; no function at a keeper
    make_source: Callable[[], WindowSource] | None = None
    make_inner: MakeInner = InnerLoop  # where several processes train one peer's model, the one that leads them
    max_experts: int | None = None  # more do not fit into this machine; None: all do
    replicas: dict[FragmentId, Replica] = field(init=False, default_factory=dict)
    trainer: Trainer | None = field(init=False, default=None)
    loop: PeerLoop | None = field(init=False, default=None)
    rate: RateControl = field(init=False)
    _why_left: str | None = field(init=False, default=None)
    _is_making_room: bool = field(init=False, default=False)
    _restored: Places = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.manifest.codec
        self.rate = RateControl(spec, self.layout, limits_of(spec, self.config), self.peer)

    async def run(self) -> str:
        """Raises Refused, IntegrityError (golden check, layout, two stories of the service), TrainingError, DataError."""
        if self.rate.limits.cap_bytes_per_day is not None and not self.rate.has_choice:
            why = f"the run has one codec, {self.manifest.codec.name}; --cap changes nothing"
            self.ports.events.emit("limits-not-heard", why=why)
        check_layout(self.manifest, self.layout)
        await self.ports.compute.run(check_golden)
        if removed := sweep(self.ports.disk):
            self.ports.events.emit("swept", num_files=removed)
        await self._start_trainer()
        try:
            await self._load_replicas()
            return await self._take_part()
        finally:
            await self._stop_trainer()

    @property
    def is_partial(self) -> bool:
        """True for a trainer that holds only the experts it trains."""
        return self.config.role == "trainer" and (self.config.mode or self.manifest.placement.mode) == "held"

    @property
    def saw_the_end(self) -> bool:
        """True when the run itself is over, not only this peer's part."""
        return self.loop is not None and self.loop.machine.is_finished

    def leave(self, why: str, *, comes_back: bool = False) -> None:
        self._why_left = why
        if self.loop is not None:
            self.loop.leave(why, comes_back=comes_back)

    # ------------------------------------------------------------ start

    async def _start_trainer(self) -> None:
        if self.make_model is None or self.make_source is None:
            return
        trained = self._last_trained()
        held = _experts_of(trained) if self.is_partial else None
        model, source = await asyncio.to_thread(self.make_model, held), await asyncio.to_thread(self.make_source)
        self.trainer = Trainer(
            self.manifest, self.layout, model, source, device=self.config.device, threads=self.config.threads,
            trained=trained, on_steps=self._on_step, max_steps=self.config.max_steps, make_inner=self.make_inner,
        )  # fmt: skip
        self.trainer.start(asyncio.get_running_loop())
        await self._load_state()

    def _last_trained(self) -> frozenset[FragmentId]:
        """What this peer trained when it stopped, so that it can go on while the service is away."""
        raw = self.ports.disk.read(TRAINED_FILE)
        try:
            names = json.loads(raw) if raw is not None else []
        except ValueError as error:
            self.ports.events.emit("damaged-file", file=TRAINED_FILE, why=f"not JSON: {error}")
            names = []
        known = names if isinstance(names, list) else []
        fragments = frozenset(FragmentId(n) for n in known if isinstance(n, str) and n in self.manifest.genesis)
        if self.is_partial and self.max_experts is not None and len(_experts_of(fragments)) > self.max_experts:
            return frozenset()  # they do not fit any more: it is told which ones to keep, and fetches those
        return fragments

    async def _load_state(self) -> None:
        assert self.trainer is not None
        for name in (STATE_FILE, PREVIOUS_FILE):
            data = self.ports.disk.read(name)
            if data is None:
                continue
            try:
                places, state = _unframed(data)
                await self.trainer.load_state(state)
            except DecentraError as error:
                self.ports.events.emit("damaged-file", file=name, why=str(error))
                continue
            held = _experts_of(self.trainer.trained) if self.is_partial else None
            self._restored = {f: place for f, place in places.items() if held is None or _is_held(f, held)}
            self.ports.events.emit("resumed", file=name, num_steps=self.trainer.totals().num_steps)
            return

    async def _load_replicas(self) -> None:
        held = _experts_of(self.trainer.trained) if self.is_partial and self.trainer is not None else None
        for fragment in self.layout.fragments:
            if held is None or _is_held(fragment.id, held):
                await self._load_replica(fragment)

    async def _load_replica(self, fragment: Fragment) -> None:
        p = self.ports
        replica = Replica(
            fragment, self.manifest, self.peer, p.exchange, p.disk, p.compute, p.events, live=self.trainer,
            codec=functools.partial(self._codec, fragment.id), archive_every=self.config.archive_every,
        )  # fmt: skip
        await replica.load()
        if self._restored.get(fragment.id) == (place := replica.place) and place is not None:
            pass  # the checkpoint's live weights belong to this very anchor and packet: nothing trained since is lost
        elif self.trainer is not None and (live_N := replica.initial_live()) is not None:
            now_N = (await self.trainer.snapshot(fragment.id)).live_N
            await self.trainer.shift(fragment.id, live_N - now_N)  # a shift keeps the optimizer's moments
        if self.trainer is not None and fragment.id in self.trainer.trained:
            await replica.begin_training()
        self.replicas[fragment.id] = replica

    def _codec(self, fragment: FragmentId) -> str:
        before, codec = self.rate.codec_now, self.rate.codec(fragment, self.ports.clock.now())
        if before != codec and self.rate.has_choice:
            self.ports.events.emit("codec", codec=codec, why=self.rate.why_now)
        return codec

    # ------------------------------------------------------------ life

    async def _take_part(self) -> str:
        num_steps = self.trainer.totals().num_steps if self.trainer is not None else 0
        role = Role(self.config.role)
        p = self.ports
        stories = Stories(
            self.peer, self.manifest.genesis, p.exchange, p.disk, p.clock, p.compute, p.events, self.is_told, self.contradicts, self.certificate
        )  # fmt: skip
        await stories.load()
        self.loop = PeerLoop(
            Self(self.peer, role, self.manifest.rounds.inner_steps), self._hello, self.manifest.rounds.heartbeat_s, self.ports.service,
            self.ports.exchange, self.replicas, self.ports.clock, self.ports.events, counters=self.counters, on_trained=self._on_trained,
            on_recovered=self._resume_if_whole, on_revoked=self.on_revoked, rate=self.rate, num_steps=num_steps,
            head_start=self.manifest.rounds.inner_steps if self.manifest.rounds.stagger else 0,
            fragments=tuple(f.id for f in self.layout.fragments) if self.is_partial else (),
            on_limit=self.trainer.step_to if self.trainer is not None and not self.manifest.rounds.overlap else None,
            judge=self._judge(), stories=stories,
            on_run_tokens=self.trainer.set_run_tokens if self.trainer is not None and self.manifest.train.schedule != "constant" else None,
        )  # fmt: skip
        self._resume_if_whole()
        if self.trainer is not None and self.trainer.is_finished:
            self._on_step()  # an earlier process did all its steps; no other one will come and say so
        if self._why_left is not None:
            return self._why_left
        chores = [asyncio.create_task(c) for c in (self._checkpoints(), self._announcements(), stories.run())]
        loop = asyncio.create_task(self.loop.run())
        try:
            await asyncio.wait([loop, *chores], return_when=asyncio.FIRST_COMPLETED)
            if not loop.done():
                self.loop.leave("it cannot go on")
                await asyncio.wait([loop], timeout=LEAVE_S)
                for chore in chores:
                    if chore.done():
                        chore.result()
            try:
                why = await loop
            except DecentraError:
                await stories.check()  # a service that is found out may turn this peer away
                raise
            await stories.check()
            return why
        finally:
            for task in (loop, *chores):
                task.cancel()
            await asyncio.gather(loop, *chores, return_exceptions=True)

    def _judge(self) -> Judge | None:
        rules = self.manifest.judging
        if rules.share is None or self.trainer is None:
            return None
        if self.make_inner is not InnerLoop:
            self.ports.events.emit(
                "judges-nothing", why="a peer of several processes does not judge packets; it vouches for all that are well-formed"
            )
            return None
        return Judge(rules, self.trainer, self.ports.events, salt=secrets.randbits(48))

    def _hello(self) -> Hello:
        return Hello(
            self.peer, Role(self.config.role), self.config.name, self.nonce, self.addresses(), self.config.experts, self.config.num_experts,
            may_reduce=not self.rate.limits.is_set,  # a reducer sends what it makes to everybody
            is_partial=self.is_partial, max_experts=self.max_experts,
        )  # fmt: skip

    def _resume_if_whole(self) -> None:
        """Training begins when every fragment has an anchor; a peer that lacks one would train on a model nobody has."""
        if self.trainer is None or not self.trainer.is_paused or self._is_making_room or (self.is_partial and not self._experts()):
            return
        if all(r.account is not None for r in self.replicas.values()):
            self.trainer.resume()
            self.ports.events.emit("training", experts=self._experts())

    def _experts(self) -> list[int]:
        return list(_experts_of(self.trainer.trained)) if self.trainer else []

    async def _on_trained(self, fragments: frozenset[FragmentId]) -> None:
        if self.trainer is not None:
            try:  # first, so that the next process makes room for all that the trainer's record may hold
                await self.ports.compute.run(write_atomic, self.ports.disk, TRAINED_FILE, json.dumps(sorted(fragments)).encode())
            except OSError as error:
                self.ports.events.emit("checkpoint-failed", why=f"{error.strerror}; training goes on, free some space")
            self._is_making_room = True
            try:
                if self.is_partial:
                    await self._hold(fragments)
                await self.trainer.set_trained(fragments)
            finally:
                self._is_making_room = False
            self._resume_if_whole()
            self.ports.events.emit("placed-here", experts=self._experts())

    async def _hold(self, fragments: frozenset[FragmentId]) -> None:
        """Make room for experts that this peer was given. Inner steps wait until their anchors are here: zeros would be in everybody's way."""
        assert self.trainer is not None
        if new := sorted(fragments - self.replicas.keys()):
            self.trainer.pause()
            await self.trainer.hold(_experts_of(frozenset(new)))
            for fragment in new:
                await self._load_replica(self.layout[fragment])

    def _on_step(self) -> None:
        assert self.trainer is not None
        if self.loop is None:
            return
        if (failure := self.trainer.failure) is not None:
            self.ports.events.emit("trainer-died", why=str(failure))
            self.leave(f"failed: {failure}")
            return
        self.loop.stepped(self.trainer.totals().num_steps)
        if self.trainer.is_finished:
            self.leave(f"did its {self.config.max_steps} inner steps")

    def counters(self) -> Counters:
        """What this peer did, for heartbeats and progress."""
        tx_bytes, rx_bytes = self.traffic()
        skipped = self.loop.machine.skipped_rounds if self.loop is not None else 0
        if self.trainer is None:
            return Counters(tx_bytes=tx_bytes, rx_bytes=rx_bytes, state=self.state())
        t = self.trainer.totals()
        return Counters(
            t.num_steps, t.num_tokens, tx_bytes, rx_bytes, t.loss_ema, t.tokens_per_s, skipped, self.state(), tuple(sorted(t.expert_tokens.items()))
        )  # fmt: skip

    def state(self) -> str:
        """What the peer is doing, in words."""
        if self.loop is None:
            return "starting"
        lives = self.loop.machine.lives
        if recovering := sorted(f for f, life in lives.items() if life.busy == "recover" or life.anchor is None):
            return f"recovering {recovering[0]}" + (f" and {len(recovering) - 1} more" if len(recovering) > 1 else "")
        away = "" if self.loop.machine.is_connected else "; the averaging service is away, its rounds wait"
        if self.trainer is None:
            return "keeping" + away
        if self.trainer.is_diverged:
            return "the loss is not finite" + away
        if not self.trainer.trained:
            return "waits for experts" + away
        return "training" + (f"; {self.rate.why}" if self.rate.why else "") + away

    # ------------------------------------------------------------ checkpoints

    async def _checkpoints(self) -> None:
        saved, pause_s = -1, MIN_CHECKPOINT_S
        while True:
            await self.ports.clock.sleep(pause_s)
            if self.trainer is not None and self.trainer.totals().num_steps != saved:
                saved = self.trainer.totals().num_steps
                num_bytes = await self._checkpoint()
                pause_s = checkpoint_pause_s(num_bytes)

    async def _checkpoint(self) -> int:
        """The bytes of it."""
        assert self.trainer is not None
        try:
            before = self._places()
            state = await self.trainer.state_record()
            after = self._places()  # a fragment that moved meanwhile is left out: its live weights belong to neither place for sure
            places = {f: place for f, place in before.items() if after.get(f) == place and f in self.trainer.trained}
            await self.ports.compute.run(self._write_state, _framed(places, state))
        except OSError as error:
            self.ports.events.emit("checkpoint-failed", why=f"{error.strerror}; training goes on, free some space")
            return 0
        return len(state)

    def _places(self) -> Places:
        return {f: place for f, r in self.replicas.items() if (place := r.place) is not None}

    def _write_state(self, data: bytes) -> None:
        if self.ports.disk.read(STATE_FILE) is not None:
            self.ports.disk.rename(STATE_FILE, PREVIOUS_FILE)
        write_atomic(self.ports.disk, STATE_FILE, data)

    async def _announcements(self) -> None:
        """Advertise the anchors this peer has, so that others find them while the service is away."""
        while True:
            await self.ports.exchange.announce([r.anchor for r in self.replicas.values() if r.anchor is not None])
            await self.ports.clock.sleep(120.0)

    async def _stop_trainer(self) -> None:
        if self.trainer is None:
            return
        self.trainer.pause()
        if self.trainer.failure is None:
            await self.trainer.step_over()  # it counts, too
            if self.trainer.totals().num_steps:
                await self._checkpoint()
        await self.trainer.stop()
