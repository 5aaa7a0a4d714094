"""This peer in the p2p network: one daemon and one DHT node, kept alive and kept attached. Moves no tensors and decides no rounds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import dht_pb2

from decentra.errors import ConfigError, DecentraError, PortTaken, RejectedPayload, Unreachable
from decentra.gossip.contacts import Contacts
from decentra.gossip.daemon import Daemon, StreamHandler
from decentra.gossip.records import RecordValidator
from decentra.identity import load_key
from decentra.ids import PeerId
from decentra.ports import Events

MAX_CLOCK_SKEW_S = 3.0  # more, and other DHT nodes refuse us
FEW_PEERS = 3
NUM_GREETED = 8  # known peers tried at once
MAX_STORED_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Timing:
    """How often the node looks after itself."""

    ping_s: float = 5.0
    num_missed_pings: int = 3
    connect_s: float = 5.0
    few_s: float = 5.0  # between two looks at the network while few peers are connected
    calm_s: float = 30.0
    renew_s: float = 30.0  # a p2pd that reaches nobody for this long is replaced
    retry_s: float = 1.0  # first wait when nobody answers; doubles
    retry_max_s: float = 10.0  # nobody can dial a peer behind a router: how soon it is back after an outage is up to itself


class GossipNode:
    """Start with ``await GossipNode.start(...)``, end with ``await node.close()``. Outlives its daemon and its bootstrap nodes."""

    def __init__(self, key_file: Path, announce: Sequence[str], contacts: Contacts, events: Events, timing: Timing) -> None:
        self.keypair = load_key(key_file)
        self.peer_id = self.keypair.peer_id
        self.num_ignored_records = 0
        self._key_file, self._announce, self._contacts = key_file, tuple(announce), contacts
        self.events, self._timing = events, timing
        self._validator = RecordValidator()
        self._daemon: Daemon | None = None
        self._dht: Any = None
        self._addresses: tuple[str, ...] = ()
        self._listen: tuple[str, ...] = ()
        self._handlers: dict[str, StreamHandler] = {}
        self._handling: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()  # streams that this node ends itself
        self._attached = asyncio.Event()
        self._is_stale = False  # p2pd waits longer and longer between two dials of an address, up to 5 min; a new one forgets that
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        key_file: Path,
        *,
        listen: Sequence[str],
        announce: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        known_peers: Sequence[str] = (),
        events: Events,
        timing: Timing = Timing(),
    ) -> GossipNode:
        """Start the p2p daemon and the DHT node; with no ``listen`` address the peer only dials out.

        ``initial_peers`` are the bootstrap nodes, ``known_peers`` what an earlier ``known_peers()`` returned. When none of them answers the
        node starts all the same and goes on trying. Raises ConfigError (key, address), PortTaken, Unreachable (the daemon did not start).
        """
        contacts = Contacts(load_key(key_file).peer_id, initial_peers, known_peers)
        node = cls(key_file, announce, contacts, events, timing)
        try:
            await node._build(tuple(listen))
            await node._greet_contacts()
        except BaseException:
            await node._tear_down()
            raise
        node._life = asyncio.create_task(node._live(), name="gossip-node")
        return node

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses with /p2p/PEER at which others reach this peer; empty when it only dials out."""
        return self._addresses

    @property
    def is_client(self) -> bool:
        """True for a peer that listens nowhere: it asks the DHT but stores nothing for others."""
        return not self._listen

    @property
    def daemon(self) -> Daemon:
        if self._daemon is None:
            raise Unreachable("the p2p daemon of this peer is being restarted; try again in a few seconds")
        return self._daemon

    @property
    def dht(self) -> Any:
        """hivemind's DHTNode, for records.py."""
        if self._dht is None or self._daemon is None:
            raise Unreachable("the DHT node of this peer is being restarted; try again in a few seconds")
        return self._dht

    @property
    def is_attached(self) -> bool:
        """True while a bootstrap node or known peer answers, and for the first node of a network, which has nobody to ask."""
        return self._attached.is_set()

    async def wait_attached(self, timeout_s: float) -> None:
        """Return once attached. Raises Unreachable, which names who was asked."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._attached.wait()
        except TimeoutError:
            who = ", ".join(self._contacts.bootstraps) or "the peers known from last time"
            raise Unreachable(f"nobody answered within {timeout_s:g} s (asked {who}); check the address and your network") from None

    def known_peers(self) -> tuple[str, ...]:
        """Addresses of peers that answered, for the next start."""
        return self._contacts.known()

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Note where ``peer`` can be reached, to come back through it when the bootstrap nodes are gone."""
        self._contacts.remember(peer, addresses)

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to ``peer``, at once when connected already. Raises Unreachable."""
        await self.daemon.connect(peer, addresses, timeout_s)
        self._contacts.answered(peer, addresses)

    async def open_stream(self, peer: PeerId, protocol: str, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A byte stream to a peer's handler; the caller closes the writer. Raises Unreachable."""
        return await self.daemon.open_stream(peer, protocol, timeout_s)

    async def connected(self) -> frozenset[PeerId]:
        """Who is connected now. Raises Unreachable when the daemon does not answer."""
        return await self.daemon.peers()

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Answer streams of ``protocol``, also after a restart of the daemon. The writer is closed when ``handler`` returns."""
        if protocol in self._handlers:
            raise ConfigError(f"{protocol} is served already; withdraw it first")
        self._handlers[protocol] = self._tracked(protocol, handler)
        if self._daemon is not None:
            await self._daemon.serve(protocol, self._handlers[protocol])

    async def withdraw(self, protocol: str) -> None:
        """Stop answering ``protocol``. Streams that are open go on."""
        if self._handlers.pop(protocol, None) is not None and self._daemon is not None:
            with suppress(Unreachable):
                await self._daemon.withdraw(protocol)

    @property
    def num_refused_records(self) -> int:
        """Records that other peers sent and this node neither kept nor believed."""
        return self._validator.num_refused

    def count_ignored_record(self, key: str, error: RejectedPayload) -> None:
        self.num_ignored_records += 1
        self.events.emit("record-ignored", key=key, reason=error.reason, why=str(error))

    async def close(self) -> None:
        """Leave: when this returns, the daemon has ended and its sockets are gone. Safe to call twice."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait({self._life})
            self._life = None
        await self._tear_down()

    # ------------------------------------------------------------ building and rebuilding

    async def _build(self, listen: tuple[str, ...]) -> None:
        daemon = await Daemon.start(self._key_file, listen=listen, announce=self._announce)
        self._daemon, self._listen = daemon, daemon.listen
        assert daemon.peer_id == self.peer_id
        for protocol, handler in self._handlers.items():
            await daemon.serve(protocol, handler)
        stored = self._dht.protocol.storage if self._dht is not None else None
        self._dht = None
        dht = await self._create_dht(daemon)
        dht.protocol.storage.maxsize = MAX_STORED_KEYS
        if stored is not None:
            dht.protocol.storage = stored
        self._dht = dht
        self._addresses = await daemon.addresses()

    async def _create_dht(self, daemon: Daemon) -> Any:
        try:
            async with asyncio.timeout(4 * self._timing.connect_s):
                return await DHTNode.create(
                    p2p=daemon.p2p,
                    node_id=DHTID.generate(source=self.peer_id),  # the same after a restart: others keep their routes
                    client_mode=self.is_client,
                    record_validator=self._validator,
                    cache_locally=False,  # a cached list of members hides newcomers until it expires
                    cache_nearest=0,
                    cache_on_store=False,
                    cache_size=1,
                    reuse_get_requests=False,  # one search that fails must not take others along
                )
        except (TimeoutError, P2PDaemonError, OSError) as error:
            raise Unreachable(f"the DHT node did not start ({str(error) or type(error).__name__}); try again") from None

    async def _tear_down(self) -> None:
        self._ending = set(self._handling)
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending, timeout=5)
        if self._dht is not None:
            self._dht.is_alive = False  # its own shutdown talks to the daemon, which may be dead, and takes back what ends with it anyway
            if self._dht.cache_refresh_task is not None:
                self._dht.cache_refresh_task.cancel()
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            await daemon.close()

    def _tracked(self, protocol: str, handler: StreamHandler) -> StreamHandler:
        async def tracked(remote: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._handling.add(task)
            try:
                await handler(remote, reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                writer.transport.abort()  # the other side left
            except asyncio.CancelledError:
                writer.transport.abort()
                if task not in self._ending:
                    raise  # else this node ends it on purpose; asyncio would log every one with its traceback
            except Exception as error:  # task boundary: one stream's failure ends that stream only
                if not writer.is_closing():  # uvloop raises RuntimeError where the other side left
                    self.events.emit("stream-failed", protocol=protocol, peer=remote, why=f"{type(error).__name__}: {error}")
                writer.transport.abort()
            finally:
                self._handling.discard(task)
                writer.close()

        return tracked

    # ------------------------------------------------------------ staying alive

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._watch_daemon))
            group.create_task(self._forever(self._stay_attached))
            group.create_task(self._look_up_self())

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # task boundary: a node that no longer looks after itself is lost without a word
                self.events.emit("p2p-waiting", why=f"{type(error).__name__}: {error}; trying again in {self._timing.retry_s:.0f} s")
                await asyncio.sleep(_jittered(self._timing.retry_s))

    async def _watch_daemon(self) -> None:
        why = "p2pd is not running" if self._daemon is None else await self._failure(self._daemon)
        self.events.emit("p2p-renewed" if self._is_stale else "p2p-died", why=f"{why}; it is started again")
        started = time.monotonic()
        await self._rebuild()
        self._is_stale = False
        self.events.emit("p2p-restarted", why="same identity, same addresses", restart_s=round(time.monotonic() - started, 2))

    async def _failure(self, daemon: Daemon) -> str:
        """Wait until the daemon has ended or stopped answering; why, in words."""
        died = asyncio.create_task(daemon.died())
        try:
            num_missed = 0
            while num_missed < self._timing.num_missed_pings:
                await asyncio.wait({died}, timeout=self._timing.ping_s)
                if died.done():
                    return died.result()
                if self._is_stale:
                    return f"p2pd reaches nobody for {self._timing.renew_s:.0f} s and dials less and less often"
                try:
                    self._addresses = await daemon.addresses(self._timing.ping_s)
                    num_missed = 0
                except Unreachable:
                    num_missed += 1
            return f"p2pd did not answer {num_missed} times"
        finally:
            died.cancel()

    async def _rebuild(self) -> None:
        self._attached.clear()
        wait_s = self._timing.retry_s
        while True:
            await self._tear_down()
            try:
                await self._build(self._listen)
                await self._attach()
                return
            except (DecentraError, OSError, TimeoutError) as error:
                hint = "" if isinstance(error, PortTaken) else "p2pd did not come back: "
                self.events.emit("p2p-waiting", why=f"{hint}{error}; trying again in {wait_s:.0f} s")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, self._timing.retry_max_s)

    # ------------------------------------------------------------ staying attached

    async def _stay_attached(self) -> None:
        wait_s, renew_at = self._timing.retry_s, time.monotonic() + self._timing.renew_s
        while not self._attached.is_set():
            if self._daemon is not None:
                if bootstraps := ", ".join(self._contacts.bootstraps):
                    why = f"bootstrap {bootstraps} does not answer, trying again in {wait_s:.0f} s"
                    self.events.emit("bootstrap-waiting", why=why, wait_s=wait_s)
                else:  # the first node of a run, before anybody came or after all have left
                    self.events.emit("alone", wait_s=wait_s)
            await asyncio.sleep(_jittered(wait_s))
            wait_s = min(2 * wait_s, self._timing.retry_max_s)
            if self._daemon is not None:
                await self._attach()
                if time.monotonic() > renew_at and not self._attached.is_set() and not await self.connected():
                    self._is_stale, renew_at = True, time.monotonic() + self._timing.renew_s
        self._is_stale = False
        await self._calm_down()
        if self._daemon is not None:  # while it is rebuilt, its watcher attaches it
            await self._attach()

    async def _calm_down(self) -> None:
        """Wait until it is time to greet the others again: soon when few peers are connected."""
        until = time.monotonic() + _jittered(self._timing.calm_s)
        while time.monotonic() < until:
            await asyncio.sleep(_jittered(self._timing.few_s))
            if self._daemon is None or len(await self.connected()) < FEW_PEERS:
                return

    async def _attach(self) -> None:
        """Greet the bootstrap nodes and some known peers, and look up our own id, so that our routes and theirs are fresh."""
        if await self._greet_contacts():
            await self._look_up_self()

    async def _greet_contacts(self) -> bool:
        """Whether somebody answers."""
        if self._contacts.is_empty():
            self._attached.set()
            return False
        dht, daemon = self.dht, self.daemon
        dht.blacklist.clear()
        targets = self._contacts.to_greet(NUM_GREETED)
        num_answers = sum(await asyncio.gather(*(self._greet(daemon, dht, peer, addresses) for peer, addresses in targets)))
        if num_answers and not self._attached.is_set():
            self._attached.set()
            self.events.emit("bootstrap-attached", why=f"{num_answers} of {len(targets)} known peers answer", num_peers=num_answers)
        elif not num_answers:
            self._attached.clear()
        return num_answers > 0

    async def _look_up_self(self) -> None:
        """Takes seconds where others are behind routers that let nobody in, so nothing waits for it."""
        try:
            async with asyncio.timeout(2 * self._timing.connect_s):
                await self.dht.find_nearest_nodes([self.dht.node_id])
        except Exception as error:  # hivemind's calls raise whatever the other side's handler raised; the next look is in some seconds
            self.events.emit("lookup-failed", key="own id", why=f"{type(error).__name__}: {error}")

    async def _greet(self, daemon: Daemon, dht: Any, peer: PeerId, addresses: Sequence[str]) -> bool:
        try:
            await daemon.connect(peer, addresses, self._timing.connect_s)
            is_here = await self._ping(dht, peer)
        except Unreachable:
            is_here = False
        if is_here:
            self._contacts.answered(peer, addresses)
        else:
            self._contacts.failed(peer)
        return is_here

    async def _ping(self, dht: Any, peer: PeerId) -> bool:
        """One DHT ping, which also compares clocks."""
        remote, asked = PeerID.from_base58(peer), time.time()
        request = dht_pb2.PingRequest(peer=dht.protocol.node_info, validate=False)
        try:
            answer = await dht.protocol.get_stub(remote).rpc_ping(request, timeout=self._timing.connect_s)
        except Exception:  # hivemind's calls raise whatever the other side's handler raised; each means no answer
            return False
        skew_s = max(asked - answer.dht_time, answer.dht_time - time.time(), 0.0) if answer.dht_time else 0.0
        if skew_s > MAX_CLOCK_SKEW_S:
            why = f"this machine's clock and that of {peer} differ by {skew_s:.0f} s, at most {MAX_CLOCK_SKEW_S:.0f} s work; set the clock"
            self.events.emit("clock-skew", peer=peer, skew_s=skew_s, why=why)
        if answer.peer.node_id:  # a peer that only dials out keeps no routes for others
            await dht.protocol.update_routing_table(DHTID.from_bytes(answer.peer.node_id), remote, responded=True)
        return True


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # so that a swarm cut off together does not come back in one blow
