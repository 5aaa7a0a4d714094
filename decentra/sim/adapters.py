"""Memory adapters of the ports for virtual time. They lose what was not synced, tear what was half-written and cut what the network cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.errors import Refused, Unreachable
from decentra.ids import Digest, FragmentId, PeerId, digest_of
from decentra.modules import Layout
from decentra.peer.disk import write_atomic
from decentra.ports import Session
from decentra.protocol.messages import FragmentView, Hello, MemberMessage, Outcome, ServiceMessage, Told
from decentra.service.driver import Driver
from decentra.service.mailbox import Mailbox

T = TypeVar("T")
SERVICE = PeerId("service")
WELCOME_S = 3.0


class Crash(BaseException):
    """The simulated process ends here, at this instruction."""


class SimClock:
    """Virtual time; ``skew_s`` moves this machine's wall clock only."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.skew_s = skew_s

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now() + self.skew_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class InlineCompute:
    """Tensor work at once, taking a little virtual time so that others get in between."""

    def __init__(self, rng: Random, max_s: float = 0.2) -> None:
        self._rng, self._max_s = rng, max_s

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        await asyncio.sleep(self._rng.uniform(0, self._max_s))
        return function(*args)


@dataclass
class SimDisk:
    """Files with a durable and a volatile side. ``crash_in`` counts operations down to a crash in the middle of one."""

    rng: Random
    durable: dict[str, bytes] = field(default_factory=dict)
    volatile: dict[str, bytes | None] = field(default_factory=dict)  # None: deleted or renamed away, not durable yet
    synced: set[str] = field(default_factory=set)  # names whose content is on the platter although the directory entry may not be
    num_operations: int = 0
    crash_in: int | None = None
    is_dead: bool = False

    def read(self, name: str) -> bytes | None:
        self._alive()
        return self.volatile[name] if name in self.volatile else self.durable.get(name)

    def write(self, name: str, *parts: Buffer) -> None:
        data = b"".join(parts)
        self._operation(lambda: self.volatile.update({name: data[: self.rng.randrange(len(data) + 1)]}))
        self.volatile[name] = data
        self.synced.discard(name)

    def sync(self, name: str) -> None:
        self._operation()
        self.synced.add(name)

    def rename(self, old: str, new: str) -> None:
        self._operation()
        content = self.read(old)
        assert content is not None, f"rename of {old}, which does not exist"
        self.volatile[new], self.volatile[old] = content, None
        if old in self.synced:
            self.synced.add(new)
        else:
            self.synced.discard(new)  # the name may have had synced content before
        self.synced.discard(old)

    def sync_dir(self) -> None:
        self._operation()
        for name, content in list(self.volatile.items()):
            if content is None:
                self.durable.pop(name, None)
                del self.volatile[name]
            elif name in self.synced:
                self.durable[name] = content
                del self.volatile[name]

    def delete(self, name: str) -> None:
        self._operation()
        self.volatile[name] = None

    def list(self) -> list[str]:
        self._alive()
        names = (self.durable.keys() | self.volatile.keys()) - {n for n, c in self.volatile.items() if c is None}
        return sorted(names)

    def crash(self) -> None:
        """Power cut: each change that was not made durable survives, is lost, or (if its content was not synced) survives torn."""
        for name, content in self.volatile.items():
            if self.rng.random() < 0.5:
                continue
            if content is None:
                self.durable.pop(name, None)
            elif name in self.synced:
                self.durable[name] = content
            else:
                self.durable[name] = content[: self.rng.randrange(len(content) + 1)]
        self.volatile, self.synced, self.is_dead, self.crash_in = {}, set(), True, None

    def revive(self) -> None:
        self.is_dead = False

    def _operation(self, before_crash: Callable[[], object] | None = None) -> None:
        self._alive()
        self.num_operations += 1
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                if before_crash is not None:
                    before_crash()
                self.crash()
                raise Crash("disk operation")

    def _alive(self) -> None:
        if self.is_dead:
            raise Crash("the process is dead")


@dataclass
class SimJournal:
    """The service's ledger storage; what ``append`` returned for is durable."""

    records: list[bytes] = field(default_factory=list)
    on_append: Callable[[Sequence[bytes]], None] = lambda _: None

    def append(self, records: Sequence[bytes]) -> None:
        self.records.extend(records)
        self.on_append(records)

    def load(self) -> Iterable[bytes]:
        return list(self.records)

    def read(self, after: int, limit: int) -> list[bytes]:
        return self.records[after : after + limit]


@dataclass
class SimNet:
    """Who can reach whom, how slowly, and what gets lost."""

    rng: Random
    cut: set[frozenset[PeerId]] = field(default_factory=set)
    max_delay_s: float = 0.1
    loss: float = 0.0  # share of blob requests that fail
    rot: float = 0.0  # share of blobs that arrive with a bit turned over
    doubled: float = 0.0  # share of members' messages that the service hears twice

    def is_up(self, a: PeerId, b: PeerId) -> bool:
        return frozenset({a, b}) not in self.cut

    async def delay(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.001, self.max_delay_s))


class SimExchange:
    """Blob store on a SimDisk, served to whoever the net lets through."""

    def __init__(self, me: PeerId, disk: SimDisk, net: SimNet, peers: dict[PeerId, SimExchange]) -> None:
        self.me, self.disk, self.net, self.peers = me, disk, net, peers
        self.is_open = True
        self.said = b""
        peers[me] = self

    async def put(self, digest: Digest, data: bytes) -> None:
        if self.disk.read(f"blob-{digest}") is None:
            write_atomic(self.disk, f"blob-{digest}", data)

    async def read(self, digest: Digest) -> bytes | None:
        data = self.disk.read(f"blob-{digest}")
        return data if data is not None and digest_of(data) == digest else None

    async def has(self, digest: Digest) -> bool:
        return await self.read(digest) is not None

    async def drop(self, digest: Digest) -> None:
        self.disk.delete(f"blob-{digest}")

    def pin(self, digest: Digest) -> None:
        return None

    def unpin(self, digest: Digest) -> None:
        return None

    async def get(self, peer: PeerId, addresses: Sequence[str], digest: Digest, offset: int) -> AsyncIterator[bytes]:
        await self.net.delay()
        other = self.peers.get(peer)
        if other is None or not other.is_open or not self.net.is_up(self.me, peer) or self.net.rng.random() < self.net.loss:
            raise Unreachable(f"{peer} does not answer")
        try:
            data = await other.read(digest)
        except Crash:  # it died in this moment, and nobody else does of that
            raise Unreachable(f"{peer} died") from None
        if data is None:
            raise Refused(f"{peer} does not have {digest[:12]}")
        if data and self.net.rng.random() < self.net.rot:
            at = self.net.rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << self.net.rng.randrange(8)]) + data[at + 1 :]
        half = max(offset, len(data) // 2)
        yield data[offset:half]
        await self.net.delay()
        if not other.is_open or not self.net.is_up(self.me, peer):
            raise Unreachable(f"{peer} broke off")
        yield data[half:]

    async def announce(self, digests: Sequence[Digest]) -> None:
        return None

    async def providers(self, digest: Digest) -> list[tuple[PeerId, tuple[str, ...]]]:
        return []

    async def tell(self, body: bytes) -> None:
        self.said = body

    async def hear(self, turn: int) -> list[tuple[PeerId, bytes]]:
        await self.net.delay()
        others = (p for p in self.peers.values() if p is not self and p.is_open and p.said and self.net.is_up(self.me, p.me))
        return [(p.me, p.said) for p in others]


@dataclass
class SimService:
    """A member's side of the service: reaches whatever driver is up at the moment."""

    me: PeerId
    net: SimNet
    driver_now: Callable[[], Driver | None]
    watch: Callable[[MemberMessage], None]
    is_alive: Callable[[], bool] = lambda: True
    on_told: Callable[[PeerId, Told], None] = lambda *_: None

    async def attend(self, hello: Hello) -> Session:
        await self.net.delay()
        driver = self.driver_now()
        if driver is None or not self.net.is_up(self.me, SERVICE):
            raise Unreachable("the averaging service does not answer")
        mailbox = Mailbox()
        try:
            async with asyncio.timeout(WELCOME_S):
                await driver.attend(hello, mailbox)
        except TimeoutError:  # its process ended before the hello was taken
            raise Unreachable("the averaging service did not answer the hello in time") from None
        except Refused as error:
            # a killed process's stream takes a moment to be noticed; a real peer is told to come again, too
            raise Unreachable(str(error)) from None
        return _SimSession(self, driver, mailbox)

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None:
        driver = self.driver_now()
        return None if driver is None else await driver.outcome(fragment, round)


class _SimSession:
    def __init__(self, service: SimService, driver: Driver, mailbox: Mailbox) -> None:
        self._service, self._driver, self._mailbox = service, driver, mailbox

    def _check(self) -> None:
        if self._service.driver_now() is not self._driver or not self._service.net.is_up(self._service.me, SERVICE):
            self._mailbox.close(None)
            raise Unreachable("the stream to the averaging service broke")

    async def send(self, message: MemberMessage) -> None:
        await self._service.net.delay()
        self._check()
        self._service.watch(message)
        await self._driver.deliver(message)
        if self._service.net.rng.random() < self._service.net.doubled:
            await self._driver.deliver(message)

    async def messages(self) -> AsyncIterator[ServiceMessage]:
        while True:
            try:
                async with asyncio.timeout(5.0):
                    messages = await self._mailbox.get()
            except TimeoutError:
                self._check()
                continue
            await self._service.net.delay()
            self._check()
            if not messages:
                raise Unreachable(self._mailbox.reason or "closed")
            for message in messages:
                if isinstance(message, FragmentView) and message.told is not None:
                    self._service.on_told(self._service.me, message.told)
                yield message

    async def close(self) -> None:
        if not self._service.is_alive() and self._service.net.rng.random() < 0.5:
            return  # a power cut says nothing: the service notices by the lease, or when the next process comes
        await self._driver.leave(self._service.me, self._mailbox, "closed")


@dataclass(frozen=True)
class SimSnapshot:
    live_N: Tensor
    num_steps: int
    num_tokens: int
    cursor: bytes
    has_bad_steps: bool
    untouched: tuple[slice, ...] = ()


class SimTrainer:
    """Moves live weights by seeded amounts once per virtual step; stands for the torch trainer."""

    def __init__(self, layout: Layout, rng: Random, step_s: float, on_step: Callable[[int], None]) -> None:
        self.live = {f.id: torch.zeros(f.num_elements) for f in layout.fragments}
        self.moved = {f.id: torch.zeros(f.num_elements, dtype=torch.float64) for f in layout.fragments}  # sum of all steps so far
        self.trained: frozenset[FragmentId] = frozenset()
        self.num_steps = 0
        self._rng, self._step_s, self._on_step = rng, step_s, on_step

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s * self._rng.uniform(0.8, 1.2))
            for fragment in sorted(self.trained):
                live_N = self.live[fragment]
                step_N = torch.tensor([self._rng.uniform(-0.01, 0.01) for _ in range(live_N.numel())])
                self.live[fragment] = live_N + step_N
                self.moved[fragment] = self.moved[fragment] + step_N
            self.num_steps += 1
            self._on_step(self.num_steps)

    @property
    def is_diverged(self) -> bool:
        return False

    async def snapshot(self, fragment: FragmentId) -> SimSnapshot:
        return SimSnapshot(self.live[fragment].clone(), self.num_steps, self.num_steps * 100, b"", False)

    async def shift(self, fragment: FragmentId, delta_N: Tensor) -> None:
        self.live[fragment] = self.live[fragment] + delta_N

    async def load(self, fragment: FragmentId, values_N: Tensor) -> None:
        self.live[fragment] = values_N.clone()


@dataclass
class SimEvents:
    """Keeps the newest events with their virtual time; a failing run prints them."""

    who: str
    log: list[tuple[float, str, str, dict[str, Any]]]

    def emit(self, event: str, **fields: Any) -> None:
        self.log.append((asyncio.get_running_loop().time(), self.who, event, fields))
