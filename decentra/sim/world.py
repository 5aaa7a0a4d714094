"""A whole swarm in one process on virtual time: service, keeper and trainers, killed, cut off, wiped and started again from a seed; then the checker.

Only adapters and the trainer are simulated; RoundBook, Driver, PeerLoop, Replica, Fetcher and delta/ are the real ones.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from decentra.config import AdmissionSpec, CodecSpec, Manifest, ModelSpec, OuterSpec, PlacementSpec, RoundSpec
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.errors import DecentraError, Refused
from decentra.ids import Digest, FragmentId, PeerId, expert_of
from decentra.modules import Fragment, Layout, build_layout
from decentra.peer.disk import sweep, write_atomic
from decentra.peer.sync import PeerLoop
from decentra.protocol import ledger
from decentra.protocol.duties import Self
from decentra.protocol.messages import Hello, Role
from decentra.service.driver import Driver
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
)
from decentra.sim.loop import run_virtual
from decentra.sim.promises import AuditedReplica, Promises
from decentra.sim.scenario import NUM_EXPERTS, Report, Scenario, Violation
from decentra.wire.ledgers import SIGNATURE_BYTES

__all__ = ["Report", "Scenario", "Violation", "World", "simulate"]

RETURN_S = 60.0  # everybody is back at the service within this time of the last fault
PROGRESS_S = 120.0  # without faults every fragment confirms two rounds within this time
NUM_ROUNDS_AFTER = 2
TRAINED_FILE = "trained"  # of a machine that holds only what it trains
TAKE_OVER = 0.3  # of all returns of the service
QUIET_S = 200.0  # an anchor that is lost and that nobody trains is rolled back within this time, too


def tiny_layout() -> Layout:
    """A trunk with a vector and a matrix, and one matrix per expert: three fragments."""
    parameters = [("model.norm.weight", (4,)), ("lm_head.weight", (3, 4))]
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
    layout: Layout = field(default_factory=tiny_layout)
    journal: SimJournal = field(init=False, default_factory=SimJournal)
    hosts: dict[PeerId, _Host] = field(init=False, default_factory=dict)
    exchanges: dict[PeerId, SimExchange] = field(init=False, default_factory=dict)
    log: list[tuple[float, str, str, dict[str, Any]]] = field(init=False, default_factory=list)
    faults: list[str] = field(init=False, default_factory=list)
    promises: Promises = field(init=False)
    driver: Driver | None = field(init=False, default=None)
    term: int = field(init=False, default=1)
    num_crashes: int = field(init=False, default=0)
    num_wiped: int = field(init=False, default=0)
    _driver_task: asyncio.Task[None] | None = field(init=False, default=None)
    _orders: set[asyncio.Task[None]] = field(init=False, default_factory=set)  # of the organiser, under way

    def __post_init__(self) -> None:
        scenario = self.scenario
        self.rng = Random(scenario.seed)
        self.net = SimNet(Random(scenario.seed + 1), max_delay_s=scenario.max_delay_s)
        blobs = [encode_anchor(f, AnchorState(torch.linspace(-1, 1, f.num_elements))) for f in self.layout.fragments]
        lr = 0.7 if scenario.outer_rule == "nesterov" else 1.0
        outer = OuterSpec(rule=scenario.outer_rule, lr=lr, momentum=0.5, merge=scenario.merge, clip=scenario.clip)
        pace = scenario.pace
        rounds = RoundSpec(
            inner_steps=scenario.inner_steps, cut_off_s=10 * pace, grace_s=6 * pace, attest_s=6 * pace, gather_s=2 * pace, heartbeat_s=2 * pace,
            lease_s=5 * pace, rollback_s=15 * pace, reduce_from=scenario.reduce_from, merge_s=4 * pace,
        )  # fmt: skip
        self.manifest = Manifest(
            name="sim", model=ModelSpec(num_experts=NUM_EXPERTS), rounds=rounds, codec=CodecSpec(name=scenario.codec, merged=scenario.merged),
            placement=PlacementSpec(
                holders=2, experts_per_peer=scenario.experts_per_peer, adopt_s=20, mode="held" if scenario.is_partial else "mirror"
            ),
            genesis={f.id: anchor_digest(b) for f, b in zip(self.layout.fragments, blobs, strict=True)},
            outer=outer, admission=AdmissionSpec(max_members=2 * scenario.num_trainers + 64),
        )  # fmt: skip
        self.promises = Promises(self.manifest, lambda: {p: h.disk for p, h in self.hosts.items()})
        self.journal.on_append = self.promises.on_records
        for index, role in enumerate([Role.KEEPER] * scenario.has_keeper + [Role.TRAINER] * scenario.num_trainers):
            host = self._new_host(role, index)
            if role is Role.KEEPER or not scenario.has_keeper:  # genesis anchors are files; without a keeper every host has them
                host.disk.durable.update({f"blob-{anchor_digest(b)}": b for b in blobs})

    def _new_host(self, role: Role, index: int) -> _Host:
        rng = Random(self.scenario.seed * 1009 + index)
        host = _Host(PeerId(f"{role}-{index}"), role, SimDisk(rng), rng)
        self.hosts[host.peer] = host
        return host

    # ------------------------------------------------------------ processes

    def start_service(self) -> None:
        events = SimEvents("service", self.log)
        driver = Driver(self.manifest, self.journal, SimClock(), InlineCompute(self.rng, 0.05), events, lambda _: bytes(SIGNATURE_BYTES))
        driver.certificate = self.term, f"certificate of term {self.term}".encode()
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
        self.promises.check_disks(f"the crash of {host.peer}")

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
            self.num_crashes += 1
            self.promises.check_disks(f"the crash of {who}")
        except BaseExceptionGroup as group:
            if group.split(Crash)[0] is None:
                self.promises.broken.append(f"{who}: {group!r}: {group.exceptions!r}")
            self.num_crashes += 1
            self.promises.check_disks(f"the crash of {who}")
        except Exception as error:  # the simulated process died of a bug: that is a finding
            self.promises.broken.append(f"{who}: {error!r}")

    async def _peer(self, host: _Host) -> None:
        scenario, clock, events = self.scenario, SimClock(), SimEvents(host.peer, self.log)
        compute = InlineCompute(host.rng, scenario.max_compute_s)
        sweep(host.disk)
        host.exchange = exchange = SimExchange(host.peer, host.disk, self.net, self.exchanges)
        loop: PeerLoop | None = None
        trainer: SimTrainer | None = None
        if host.role is Role.TRAINER:
            trainer = SimTrainer(self.layout, host.rng, scenario.step_s, lambda n: loop.stepped(n) if loop else None)
        replicas: dict[FragmentId, AuditedReplica] = {}

        async def hold(fragments: Iterable[Fragment]) -> None:
            for f in fragments:
                replica = AuditedReplica(
                    f, self.manifest, host.peer, exchange, host.disk, compute, events, trainer, promises=self.promises, trainer=trainer
                )
                await replica.load()
                if trainer is not None and (live_N := replica.initial_live()) is not None:
                    await trainer.load(f.id, live_N)
                replica.begin_audit()
                replicas[f.id] = replica

        async def on_trained(fragments: frozenset[FragmentId]) -> None:
            if trainer is not None:
                if is_partial:
                    write_atomic(host.disk, TRAINED_FILE, " ".join(sorted(fragments)).encode())
                    await hold(self.layout[f] for f in sorted(fragments - replicas.keys()))
                trainer.trained = fragments

        is_partial = scenario.is_partial and trainer is not None
        last = (host.disk.read(TRAINED_FILE) or b"").decode().split()
        await hold(f for f in self.layout.fragments if not is_partial or expert_of(f.module) is None or f.id in last)
        nonce = f"{host.peer}/{host.num_starts}"
        service = SimService(
            host.peer, self.net, lambda: self.driver, self.promises.on_sent, lambda: not host.disk.is_dead, self.promises.on_told
        )
        loop = PeerLoop(
            Self(host.peer, host.role, scenario.inner_steps), lambda: Hello(host.peer, host.role, host.peer, nonce, is_partial=is_partial),
            self.manifest.rounds.heartbeat_s, service, exchange, replicas, clock, events, on_trained=on_trained,
            fragments=tuple(f.id for f in self.layout.fragments) if is_partial else (),
        )  # fmt: skip
        host.loop = loop
        await self._admitted(host, nonce)
        async with asyncio.TaskGroup() as group:
            training = group.create_task(trainer.run()) if trainer is not None else None
            try:
                await loop.run()
            finally:
                if training is not None:
                    training.cancel()

    async def _admitted(self, host: _Host, nonce: str) -> None:
        while True:
            if self.driver is not None and self.net.is_up(host.peer, SERVICE):
                with suppress(TimeoutError, Refused):  # the service may die while it answers, or still believe in the process before
                    async with asyncio.timeout(3):
                        await self.driver.join(host.peer, host.role, nonce, f"token-{host.peer}", 1)
                        return
            await asyncio.sleep(1)

    # ------------------------------------------------------------ the story

    async def run(self) -> Report:
        self.start_service()
        for host in self.hosts.values():
            self.start(host)
        await self._misfortune()
        self._heal()
        await asyncio.gather(*self._orders)
        await self._until(RETURN_S * self.scenario.pace, self._is_everybody_here)
        self._expect(self._is_everybody_here(), f"somebody is not back {RETURN_S * self.scenario.pace:g} s after the last fault")
        before, trained = self._heights(), self._trained()
        await self._until(PROGRESS_S * self.scenario.pace, lambda: all(self._heights()[f] >= before[f] + NUM_ROUNDS_AFTER for f in trained))
        after = self._heights()
        assert self.driver is not None
        self.driver.book.stopping = "the story ends"  # no round opens any more
        await self._until(QUIET_S * self.scenario.pace, self._is_quiet)
        self._check({f: after[f] - before[f] for f in trained})
        report = self._report()
        for host in self.hosts.values():
            self._bury(host)
        self.kill_service()
        return report

    async def _until(self, limit_s: float, holds: Callable[[], bool]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not holds() and not self.promises.broken:  # noqa: ASYNC110  (on virtual time looking is free)
                    await asyncio.sleep(0.5)
        self._expect(not self.promises.broken, "; ".join(self.promises.broken[:3]))

    async def _misfortune(self) -> None:
        gap_s = self.scenario.fault_s / max(1, self.scenario.num_faults)
        for _ in range(self.scenario.num_faults):
            await asyncio.sleep(self.rng.uniform(0.2, 1.8) * gap_s)
            self._one_fault()
            self.promises.check_disks(self.faults[-1])

    def _one_fault(self) -> None:
        now = asyncio.get_running_loop().time()
        host = self.rng.choice(list(self.hosts.values()))
        kinds = ["kill", "kill", "disk", "disk", "service", "cut", "partition", "slow", "loss", "rot", "doubled", "back", "heal", "heal"]
        kind = self.rng.choice([*kinds, "wipe"] if self.num_wiped == 0 and host.role is Role.TRAINER else kinds)
        self.faults.append(f"{now:.1f} {kind} {host.peer}")
        later = asyncio.get_running_loop().call_later
        match kind:
            case "kill" if host.task is not None:
                self.kill(host)
                later(self.rng.uniform(0.5, 15), self._restart, host)
            case "disk" if host.task is not None:
                host.disk.crash_in = self.rng.randrange(1, 40)
                later(self.rng.uniform(8, 20), self._restart, host)
            case "wipe":
                self._wipe(host)
            case "service" if self.driver is not None:
                self.kill_service()
                later(self.rng.uniform(0.5, 12), self._restart_service)
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
            case "rot":
                self.net.rot = self.rng.choice([0.1, 0.5])
            case "doubled":
                self.net.doubled = 0.5
            case "back" if self.driver is not None:
                self._order_back(self.driver)
            case "heal":
                self._mend()

    def _order_back(self, driver: Driver) -> None:
        """The organiser sends a fragment back by some rounds; perhaps nobody has that anchor any more."""
        book = self.rng.choice([driver.book.fragments[f] for f in sorted(driver.book.fragments)])
        if not book.history or driver.book.is_over:
            return
        anchor, height = book.history[-self.rng.randrange(1, min(len(book.history), 6) + 1)]
        self._orders.add(asyncio.create_task(self._tell(driver, f"{book.fragment} {height} {anchor} the story says so")))

    async def _tell(self, driver: Driver, argument: str) -> None:
        with suppress(TimeoutError, DecentraError):  # the service may die while it answers
            async with asyncio.timeout(3):
                await driver.command("roll-back", argument)

    def _wipe(self, host: _Host) -> None:
        """The machine is gone with its disk and its key; a new one joins in its place."""
        self.num_wiped += 1
        self.kill(host)
        del self.hosts[host.peer]
        self.promises.check_disks(f"the loss of {host.peer}")
        self.start(self._new_host(host.role, 10_000 + self.num_wiped))

    def _mend(self) -> None:
        self.net.cut.clear()
        self.net.max_delay_s, self.net.loss, self.net.rot, self.net.doubled = self.scenario.max_delay_s, 0.0, 0.0, 0.0

    def _restart(self, host: _Host) -> None:
        if host.peer in self.hosts and (host.task is None or host.task.done()):
            self._bury(host)
            self.start(host)

    def _restart_service(self) -> None:
        """On the same machine, or on another one, with a copy of the ledger that was in step."""
        if self.driver is None:
            self.term += self.rng.random() < TAKE_OVER
            self.start_service()

    def _heal(self) -> None:
        """Everybody comes back, links and disks are sound."""
        self._mend()
        self._restart_service()
        for host in self.hosts.values():
            host.disk.crash_in = None
            self._restart(host)

    def _is_everybody_here(self) -> bool:
        assert self.driver is not None
        return self.hosts.keys() <= {m.peer for m in self.driver.book.members.values() if m.is_live and m.has_greeted}

    def _is_quiet(self) -> bool:
        assert self.driver is not None
        if any(b.active is not None for b in self.driver.book.fragments.values()):
            return False
        return all(self._anchor_of(h, f) == b.anchor for f, b in self.driver.book.fragments.items() for h in self._who_hold(f))

    def _who_hold(self, fragment: FragmentId) -> list[_Host]:
        """All machines but those that hold only other experts."""
        hosts = self.hosts.values()
        return [h for h in hosts if not self.scenario.is_partial or h.role is Role.KEEPER or (h.loop and fragment in h.loop.replicas)]

    def _anchor_of(self, host: _Host, fragment: FragmentId) -> Digest | None:
        return None if host.loop is None or fragment not in host.loop.replicas else host.loop.replicas[fragment].anchor

    def _heights(self) -> dict[FragmentId, int]:
        return {} if self.driver is None else {f: b.height for f, b in self.driver.book.fragments.items()}

    def _trained(self) -> set[FragmentId]:
        """Fragments that somebody was placed to train: placement is sticky, so an expert may be left without a holder."""
        assert self.driver is not None
        experts = {e for m in self.driver.book.swarm().members if m.is_live and m.peer in self.hosts for e in m.experts}
        return {f.id for f in self.layout.fragments if (expert := expert_of(f.module)) is None or expert in experts}

    # ------------------------------------------------------------ the end

    def _check(self, grown: dict[FragmentId, int]) -> None:
        assert self.driver is not None
        for fragment, book in self.driver.book.fragments.items():
            num_rounds = grown.get(fragment, NUM_ROUNDS_AFTER)
            self._expect(
                num_rounds >= NUM_ROUNDS_AFTER,
                f"{fragment} confirmed {num_rounds} rounds in {PROGRESS_S:g} s without faults, expected {NUM_ROUNDS_AFTER}: {book.round}",
            )
            for host in self._who_hold(fragment):
                mine = self._anchor_of(host, fragment)
                self._expect(
                    mine == book.anchor, f"{host.peer} ends at another anchor of {fragment}: {mine and mine[:12]}, not {book.anchor[:12]}"
                )

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            story = "\n".join(f"  {t:8.2f} {who:10} {event} {fields}" for t, who, event, fields in self.log[-40:])
            raise Violation(
                f"seed {self.scenario.seed}: {what}\nfaults: {self.faults}\nlast events:\n{story}\n"
                f"scenario: {self.scenario}\nreplay: python -m decentra.sim --seed {self.scenario.seed}"
            )

    def _report(self) -> Report:
        assert self.driver is not None
        confirmed = [r for r in self.promises.records if isinstance(r, ledger.Confirmed)]
        log = hashlib.sha256(repr(self.log).encode())
        for record in self.journal.records:
            log.update(record)
        return Report(
            self.scenario.seed, self._heights(), len(confirmed), sum(r.thin for r in confirmed),
            sum(isinstance(r, ledger.GaveUp) for r in self.promises.records),
            sum(isinstance(r, ledger.RolledBack) for r in self.promises.records),
            self.num_crashes, self.num_wiped, self.faults,
            {f: b.anchor for f, b in self.driver.book.fragments.items()}, log.hexdigest(),
        )  # fmt: skip


def simulate(scenario: Scenario) -> Report:
    """Run one seed to its end. Raises Violation."""
    torch.set_num_threads(1)
    return run_virtual(World(scenario).run())
