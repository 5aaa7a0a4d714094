"""A whole swarm in one process on virtual time: service, keeper and trainers, killed, cut off and started again from a seed; then the checker.

Only adapters and the trainer are simulated; RoundBook, Driver, PeerLoop, Replica, Fetcher and delta/ are the real ones.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from decentra.config import CodecSpec, Manifest, ModelSpec, OuterSpec, PlacementSpec, RoundSpec
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.ids import Digest, FragmentId, PeerId
from decentra.modules import Layout, build_layout
from decentra.peer.disk import sweep
from decentra.peer.replica import Replica
from decentra.peer.sync import PeerLoop
from decentra.protocol import ledger
from decentra.protocol.member import Self
from decentra.protocol.messages import Hello, Phase, Role
from decentra.service.driver import SIGNATURE_BYTES, Driver, open_record
from decentra.sim.adapters import (
    SERVICE,
    Crash,
    InlineCompute,
    SimClock,
    SimDisk,
    SimEvents,
    SimExchange,
    SimJournal,
    SimNet,
    SimService,
    SimTrainer,
    offers_seen,
)
from decentra.sim.loop import run_virtual

NUM_EXPERTS = 2


@dataclass(frozen=True)
class Scenario:
    """What a seed is turned into. Times are virtual seconds."""

    seed: int
    num_trainers: int = 3
    has_keeper: bool = True
    fault_s: float = 90.0  # faults happen until here
    heal_s: float = 60.0  # then everybody is up and connected, and the swarm must get on
    step_s: float = 0.7
    inner_steps: int = 5
    num_faults: int = 8


@dataclass
class Report:
    """What a simulated run came to."""

    seed: int
    heights: dict[FragmentId, int]
    num_confirmed: int
    num_thin: int
    num_given_up: int
    num_rolled_back: int
    num_crashes: int
    faults: list[str]
    anchors: dict[FragmentId, Digest]


class Violation(AssertionError):
    """A promise was broken; the message names the seed that shows it."""


def tiny_layout() -> Layout:
    parameters = [("model.norm.weight", (4,)), ("lm_head.weight", (3, 4)), ("model.layers.0.mlp.gate.weight", (NUM_EXPERTS, 4))]
    parameters += [(f"model.layers.0.mlp.experts.{e}.up_proj.weight", (3, 4)) for e in range(NUM_EXPERTS)]
    return build_layout(parameters)


@dataclass
class _Host:
    """One simulated machine: its disk outlives its processes."""

    peer: PeerId
    role: Role
    disk: SimDisk
    rng: Random
    task: asyncio.Task[Any] | None = None
    loop: PeerLoop | None = None
    exchange: SimExchange | None = None
    num_starts: int = 0


@dataclass
class World:
    """The machines, the network and the record of what happened."""

    scenario: Scenario
    rng: Random = field(init=False)
    net: SimNet = field(init=False)
    layout: Layout = field(init=False, default_factory=tiny_layout)
    journal: SimJournal = field(init=False, default_factory=SimJournal)
    hosts: dict[PeerId, _Host] = field(init=False, default_factory=dict)
    exchanges: dict[PeerId, SimExchange] = field(init=False, default_factory=dict)
    log: list[tuple[float, str, str, dict[str, Any]]] = field(init=False, default_factory=list)
    faults: list[str] = field(init=False, default_factory=list)
    driver: Driver | None = field(init=False, default=None)
    num_crashes: int = field(init=False, default=0)
    _driver_task: asyncio.Task[None] | None = field(init=False, default=None)
    _offers: dict[tuple[PeerId, FragmentId, int], Digest] = field(init=False, default_factory=dict)
    _broken: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(self.scenario.seed)
        self.net = SimNet(Random(self.scenario.seed + 1))
        blobs: dict[Digest, bytes] = {}
        genesis: dict[FragmentId, Digest] = {}
        for fragment in self.layout.fragments:
            blob = encode_anchor(fragment, AnchorState(torch.linspace(-1, 1, fragment.num_elements)))
            genesis[fragment.id] = anchor_digest(blob)
            blobs[anchor_digest(blob)] = blob
        rounds = RoundSpec(
            inner_steps=self.scenario.inner_steps, cut_off_s=15, grace_s=10, attest_s=8, gather_s=2, heartbeat_s=2, lease_s=6, rollback_s=20
        )  # fmt: skip
        self.manifest = Manifest(
            name="sim", model=ModelSpec(num_experts=NUM_EXPERTS), rounds=rounds, codec=CodecSpec(name="int8"),
            placement=PlacementSpec(holders=2, experts_per_peer=1), genesis=genesis,
            outer=OuterSpec(rule="nesterov", lr=0.7, momentum=0.5) if self.scenario.seed % 2 else OuterSpec(),
        )  # fmt: skip
        roles = [Role.KEEPER] * self.scenario.has_keeper + [Role.TRAINER] * self.scenario.num_trainers
        for index, role in enumerate(roles):
            peer = PeerId(f"{role}-{index}")
            host_rng = Random(self.scenario.seed * 1009 + index)
            self.hosts[peer] = _Host(peer, role, SimDisk(host_rng), host_rng)
        for host in self.hosts.values():  # genesis anchors are files; the first host has them, or every host where there is no keeper
            if host.role is Role.KEEPER or not self.scenario.has_keeper:
                host.disk.durable.update({f"blob-{digest}": blob for digest, blob in blobs.items()})

    # ------------------------------------------------------------ processes

    def start_service(self) -> None:
        driver = Driver(
            self.manifest,
            self.journal,
            SimClock(),
            InlineCompute(self.rng, 0.01),
            SimEvents("service", self.log),
            lambda _: bytes(SIGNATURE_BYTES),
        )
        driver.recover()
        self.driver = driver
        self._driver_task = asyncio.get_running_loop().create_task(self._watched(driver.run(), "service"))

    def kill_service(self) -> None:
        if self._driver_task is not None:
            self._driver_task.cancel()
        self.driver, self._driver_task = None, None

    def start(self, host: _Host) -> None:
        host.num_starts += 1
        host.disk.revive()
        host.task = asyncio.get_running_loop().create_task(self._watched(self._peer(host), host.peer))

    def kill(self, host: _Host) -> None:
        """kill -9 and a power cut at once."""
        self.num_crashes += 1
        if not host.disk.is_dead:
            host.disk.crash()
        self._bury(host)

    def _bury(self, host: _Host) -> None:
        if host.exchange is not None:
            host.exchange.is_open = False
        if host.task is not None:
            host.task.cancel()
        host.task, host.loop = None, None

    async def _watched(self, job: Any, who: str) -> None:
        try:
            await job
        except asyncio.CancelledError:
            raise
        except Crash:
            pass
        except BaseExceptionGroup as group:
            if group.split(Crash)[0] is None:
                self._broken.append(f"{who}: {group!r}: {group.exceptions!r}")
        except Exception as error:  # the simulated process died of a bug: that is a finding
            self._broken.append(f"{who}: {error!r}")

    async def _peer(self, host: _Host) -> None:
        clock, events = SimClock(), SimEvents(host.peer, self.log)
        compute = InlineCompute(host.rng)
        sweep(host.disk)
        exchange = SimExchange(host.peer, host.disk, self.net, self.exchanges)
        host.exchange = exchange
        trainer: SimTrainer | None = None
        loop: PeerLoop | None = None
        if host.role is Role.TRAINER:
            trainer = SimTrainer(self.layout, host.rng, self.scenario.step_s, lambda n: loop.stepped(n) if loop else None)
        replicas = {
            f.id: Replica(f, self.manifest, host.peer, exchange, host.disk, compute, events, live=trainer) for f in self.layout.fragments
        }  # fmt: skip
        for replica in replicas.values():
            await replica.load()
            if trainer is not None and (live_N := replica.initial_live()) is not None:
                await trainer.load(replica.fragment.id, live_N)

        async def on_trained(fragments: frozenset[FragmentId]) -> None:
            if trainer is not None:
                trainer.trained = fragments

        nonce = f"{host.peer}/{host.num_starts}"
        service = SimService(host.peer, self.net, lambda: self.driver, offers_seen(self._offers))
        loop = PeerLoop(
            Self(host.peer, host.role, self.scenario.inner_steps), lambda: Hello(host.peer, host.role, host.peer, nonce),
            self.manifest.rounds.heartbeat_s, service, exchange, replicas, clock, events, on_trained=on_trained,
        )  # fmt: skip
        host.loop = loop
        await self._admitted(host)
        async with asyncio.TaskGroup() as group:
            training = group.create_task(trainer.run()) if trainer is not None else None
            try:
                await loop.run()
            finally:
                if training is not None:
                    training.cancel()

    async def _admitted(self, host: _Host) -> None:
        while True:
            if self.driver is not None and self.net.is_up(host.peer, SERVICE):
                await self.driver.join(host.peer, host.role, f"{host.peer}/{host.num_starts}", f"token-{host.peer}", 1)
                return
            await asyncio.sleep(1)

    # ------------------------------------------------------------ the story

    async def run(self) -> Report:
        self.start_service()
        for host in self.hosts.values():
            self.start(host)
        await self._misfortune()
        await self._heal()
        before = self._heights()
        await asyncio.sleep(self.scenario.heal_s)
        await self._quiesce()
        report = self._check(before)
        for host in self.hosts.values():
            self._bury(host)
        self.kill_service()
        return report

    async def _misfortune(self) -> None:
        gap_s = self.scenario.fault_s / max(1, self.scenario.num_faults)
        for _ in range(self.scenario.num_faults):
            await asyncio.sleep(self.rng.uniform(0.3, 1.7) * gap_s)
            self._one_fault()

    def _one_fault(self) -> None:
        now = asyncio.get_running_loop().time()
        host = self.rng.choice(list(self.hosts.values()))
        kind = self.rng.choice(["kill", "kill", "disk", "service", "cut", "partition", "slow", "loss", "heal"])
        self.faults.append(f"{now:.1f} {kind} {host.peer}")
        later = asyncio.get_running_loop().call_later
        match kind:
            case "kill" if host.task is not None:
                self.kill(host)
                later(self.rng.uniform(1, 25), self._restart, host)
            case "disk" if host.task is not None:
                host.disk.crash_in = self.rng.randrange(1, 40)
            case "service" if self.driver is not None:
                self.kill_service()
                later(self.rng.uniform(0.5, 15), self._restart_service)
            case "cut":
                other = self.rng.choice([SERVICE, *(p for p in self.hosts if p != host.peer)])
                self.net.cut.add(frozenset({host.peer, other}))
            case "partition":
                away = {p for p in self.hosts if self.rng.random() < 0.5}
                self.net.cut |= {frozenset({a, b}) for a in away for b in [*self.hosts, SERVICE] if b not in away and a != b}
            case "slow":
                self.net.max_delay_s = self.rng.choice([0.5, 2.0, 5.0])
            case "loss":
                self.net.loss = self.rng.choice([0.2, 0.6])
            case "heal":
                self._mend()

    def _mend(self) -> None:
        self.net.cut.clear()
        self.net.max_delay_s, self.net.loss = 0.1, 0.0

    def _restart(self, host: _Host) -> None:
        if host.task is None or host.task.done():
            self._bury(host)
            self.start(host)

    def _restart_service(self) -> None:
        if self.driver is None:
            self.start_service()

    async def _heal(self) -> None:
        """Everybody comes back, links and disks are sound."""
        self._mend()
        self._restart_service()
        for host in self.hosts.values():
            host.disk.crash_in = None
            self._restart(host)
        await asyncio.sleep(30)
        for host in self.hosts.values():  # a crash by disk shows only when the task has ended
            self._restart(host)

    async def _quiesce(self) -> None:
        """Let no round open and wait until everybody is at the confirmed anchors."""
        assert self.driver is not None
        self.driver.book.stopping = "the story ends"
        with suppress(TimeoutError):
            async with asyncio.timeout(120):
                while not self._is_quiet():  # noqa: ASYNC110 - virtual time: a poll costs nothing and needs no hook in the real code
                    await asyncio.sleep(1)

    def _is_quiet(self) -> bool:
        assert self.driver is not None
        if any(b.active is not None for b in self.driver.book.fragments.values()):
            return False
        return all(self._anchor_of(h, f) == b.anchor for h in self.hosts.values() for f, b in self.driver.book.fragments.items())

    def _anchor_of(self, host: _Host, fragment: FragmentId) -> Digest | None:
        return None if host.loop is None else host.loop.replicas[fragment].anchor

    def _heights(self) -> dict[FragmentId, int]:
        assert self.driver is not None
        return {f: b.height for f, b in self.driver.book.fragments.items()}

    # ------------------------------------------------------------ the checker

    def _check(self, before: dict[FragmentId, int]) -> Report:
        self._expect(not self._broken, "; ".join(self._broken[:3]))
        assert self.driver is not None
        _, records = ledger.replay(open_record(r)[1] for r in self.journal.records)
        confirmed = [r for r in records if isinstance(r, ledger.Confirmed)]
        rolled = [r for r in records if isinstance(r, ledger.RolledBack)]
        self._check_chain(records)
        for fragment, book in self.driver.book.fragments.items():
            self._expect(
                book.height > before[fragment], f"{fragment} made no progress in {self.scenario.heal_s:g} s without faults: {book.round}"
            )
            for host in self.hosts.values():
                mine = self._anchor_of(host, fragment)
                self._expect(
                    mine == book.anchor, f"{host.peer} ends at another anchor of {fragment}: {mine and mine[:12]}, not {book.anchor[:12]}"
                )
        return Report(
            self.scenario.seed, self._heights(), len(confirmed), sum(r.thin for r in confirmed),
            sum(isinstance(r, ledger.GaveUp) for r in records), len(rolled), self.num_crashes, self.faults,
            {f: b.anchor for f, b in self.driver.book.fragments.items()},
        )  # fmt: skip

    def _check_chain(self, records: list[ledger.Record]) -> None:
        """Each confirmed round starts at the anchor before it; no packet counts twice; only thin anchors are ever rolled back."""
        at = dict(self.manifest.genesis)
        settled: dict[tuple[FragmentId, int], ledger.Settled] = {}
        used: set[tuple[FragmentId, Digest]] = set()
        for record in records:
            match record:
                case ledger.Settled(settlement):
                    settled[settlement.fragment, settlement.round] = record
                case ledger.Confirmed():
                    s = settled[record.fragment, record.round].settlement
                    self._expect(
                        s.base == at[record.fragment], f"round {record.round} of {record.fragment} was confirmed on a stale anchor"
                    )
                    for entry in s.entries:
                        key = (record.fragment, entry.packet)
                        self._expect(key not in used, f"packet {entry.packet[:12]} of {entry.peer} counts twice in {record.fragment}")
                        used.add(key)
                    at[record.fragment] = record.anchor
                case ledger.RolledBack():
                    at[record.fragment] = record.anchor
                case ledger.GaveUp(phase=phase):
                    self._expect(phase in (Phase.ABANDONED, Phase.VOID), f"a round ended as {phase}")

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            story = "\n".join(f"  {t:8.2f} {who:10} {event} {fields}" for t, who, event, fields in self.log[-25:])
            raise Violation(
                f"seed {self.scenario.seed}: {what}\nfaults: {self.faults}\nlast events:\n{story}\nreplay: python -m decentra.sim --seed {self.scenario.seed}"
            )


def simulate(scenario: Scenario) -> Report:
    """Run one seed to its end. Raises Violation."""
    torch.set_num_threads(1)
    return run_virtual(World(scenario).run())
