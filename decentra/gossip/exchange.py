"""Blobs between peers over p2p streams: serve what the store has to admitted peers, pull from others, advertise. Verifies no foreign blob.

Whoever pulls checks the digest: a stream carries bytes from an authenticated peer, but not necessarily the right ones.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from decentra.errors import ConfigError, DecentraError, Refused, RejectedPayload, Unreachable
from decentra.gossip import records
from decentra.gossip.address import MAX_ADDRESSES, check_multiaddr
from decentra.gossip.blobs import BlobReader, BlobStore
from decentra.gossip.dial import Dialer, DialTimes, Stream
from decentra.gossip.frames import Reply, Request, Status, pack_reply, pack_request, read_reply, read_request
from decentra.gossip.node import GossipNode
from decentra.gossip.pace import Pacer
from decentra.ids import Digest, PeerId, RunId, short

CHUNK_BYTES = 64 << 10
READ_AHEAD_BYTES = 1 << 20  # memory of one upload
NUM_ANNOUNCED_AT_ONCE = 8
NUM_TURNS = 4  # of ``hear``, until everybody was heard


@dataclass(frozen=True, slots=True)
class ExchangeLimits:
    """A peer that reads less than about ``CHUNK_BYTES`` in ``idle_s`` is cut off, so a slow reader holds no slot or memory for long."""

    num_uploads: int = 8
    num_uploads_per_peer: int = 4
    num_streams_per_peer: int = 32
    num_waiting: int = 64  # requests that wait for a slot, all peers together
    slot_s: float = 10.0  # they wait this long
    idle_s: float = 20.0  # longest silence on an open stream
    connect_s: float = 5.0
    reached_s: float = 20.0  # a peer that answered is asked for a stream at once for this long
    unreachable_s: float = 30.0  # a peer that did not answer is not dialled again for this long
    keep_s: float = 10.0  # a stream that served is kept this long for the next request; less than ``idle_s``
    max_blob_bytes: int = 64 << 30
    ttl_s: float = 300.0  # of announcements


@dataclass(slots=True)
class Traffic:
    """Payload bytes, without frames and libp2p's own."""

    tx_bytes: int = 0
    rx_bytes: int = 0


class HivemindExchange:
    """ports.Exchange over a GossipNode. ``await start()`` before use, ``await close()`` before the node's.

    ``credentials()`` are shown to others with every request; ``check(peer, credentials)`` raises Refused for a peer that may have none.
    ``peer`` is authenticated by libp2p; what the credentials say about it is up to ``check``. ``up_bytes_per_s``: all uploads together.
    """

    def __init__(
        self,
        node: GossipNode,
        store: BlobStore,
        run_id: RunId,
        credentials: Callable[[], bytes],
        check: Callable[[PeerId, bytes], None],
        limits: ExchangeLimits = ExchangeLimits(),
        up_bytes_per_s: float | None = None,
    ) -> None:
        self.traffic: dict[PeerId, Traffic] = {}
        self._node, self._store, self._run_id, self._limits = node, store, run_id, limits
        self._credentials, self._check = credentials, check
        self._protocol = f"decentra/1/blob/{run_id[:16]}"
        self._pacer = Pacer(up_bytes_per_s)
        self._slots = asyncio.Semaphore(limits.num_uploads)
        self._peer_slots: dict[PeerId, tuple[asyncio.Semaphore, int]] = {}  # with the number of those who hold or want one
        self._num_waiting = 0
        self._num_streams: Counter[PeerId] = Counter()
        times = DialTimes(limits.connect_s, limits.reached_s, limits.unreachable_s, limits.keep_s)
        self._dialer = Dialer(node, self._protocol, times, num_kept=limits.num_uploads_per_peer)

    async def start(self) -> None:
        await self._node.serve(self._protocol, self._serve)

    async def close(self) -> None:
        self._dialer.close()
        await self._node.withdraw(self._protocol)

    @property
    def tx_bytes(self) -> int:
        return sum(traffic.tx_bytes for traffic in self.traffic.values())

    @property
    def rx_bytes(self) -> int:
        return sum(traffic.rx_bytes for traffic in self.traffic.values())

    # ------------------------------------------------------------ our own blobs

    async def put(self, digest: Digest, data: bytes) -> None:
        await asyncio.to_thread(self._store.put, digest, data)

    async def read(self, digest: Digest) -> bytes | None:
        return await asyncio.to_thread(self._store.read, digest) if self._store.has(digest) else None

    async def has(self, digest: Digest) -> bool:
        return self._store.has(digest)

    async def drop(self, digest: Digest) -> None:
        await asyncio.to_thread(self._store.drop, digest)

    def pin(self, digest: Digest) -> None:
        self._store.pin(digest)

    def unpin(self, digest: Digest) -> None:
        self._store.unpin(digest)

    # ------------------------------------------------------------ blobs of others

    async def get(self, peer: PeerId, addresses: Sequence[str], digest: Digest, offset: int) -> AsyncIterator[bytes]:
        """Chunks of ``peer``'s blob from ``offset`` to its end; the caller verifies the digest and bounds what it takes.

        Raises Unreachable (nobody there, silent for ``idle_s``, ended early), Refused (does not have it, not admitted, busy),
        RejectedPayload (an answer that is no answer).
        """
        request = pack_request(Request(digest, offset, self._credentials()))
        stream, reply = await self._ask(peer, addresses, digest, request)
        is_in_step = False  # nothing of this answer is left in the stream
        try:
            is_in_step = reply.status is not Status.OK
            num_left = self._judge(peer, digest, offset, reply)
            while num_left:
                async with self._deadline(peer, digest, self._limits.idle_s):
                    chunk = await stream.reader.read(min(CHUNK_BYTES, num_left))
                if not chunk:
                    raise Unreachable(f"peer {peer} ended blob {digest[:8]} {num_left} bytes before its end; go on from there")
                num_left -= len(chunk)
                self._traffic(peer).rx_bytes += len(chunk)
                is_in_step = not num_left
                yield chunk
                await asyncio.sleep(0)  # a fast stream must not starve heartbeats
            is_in_step = True
        finally:
            if is_in_step:
                self._dialer.give_back(peer, stream)
            else:
                stream.abort()

    async def _ask(self, peer: PeerId, addresses: Sequence[str], digest: Digest, request: bytes) -> tuple[Stream, Reply]:
        """A stream on which ``request`` was asked, and the reply. A kept stream may have been closed at the other end: then once more on a new one."""
        while True:
            stream = await self._dialer.open(peer, addresses)
            try:
                async with self._deadline(peer, digest, self._limits.idle_s + self._limits.slot_s):
                    stream.writer.write(request)
                    await stream.writer.drain()
                    return stream, await read_reply(stream.reader)
            except Unreachable:
                stream.abort()
                if not stream.was_kept:
                    raise
            except BaseException:
                stream.abort()
                raise

    async def announce(self, digests: Sequence[Digest]) -> None:
        """Advertise blobs in the DHT for ``ttl_s``; best effort."""
        body = json.dumps(self._node.addresses[:MAX_ADDRESSES]).encode()
        at_once = asyncio.Semaphore(NUM_ANNOUNCED_AT_ONCE)

        async def announce_one(digest: Digest) -> None:
            async with at_once:
                try:
                    await records.publish(self._node, records.blob_key(self._run_id, digest), body, self._limits.ttl_s)
                except DecentraError as error:
                    self._node.events.emit("announce-failed", digest=digest, why=str(error))

        await asyncio.gather(*(announce_one(digest) for digest in digests))

    async def providers(self, digest: Digest) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Peers that advertise the blob, with their addresses (none: it only dials out). Empty when the DHT is silent."""
        try:
            found = await records.lookup(self._node, records.blob_key(self._run_id, digest))
        except Unreachable as error:
            self._node.events.emit("lookup-failed", digest=digest, why=str(error))
            return []
        return [(peer, _parse_addresses(body)) for peer, body in found if peer != self._node.peer_id]

    async def tell(self, body: bytes) -> None:
        """Publish what this peer heard from the service for ``ttl_s``; best effort, and said where nobody took it."""
        try:
            is_taken = await records.publish(self._node, records.heard_key(self._run_id, self._node.peer_id), body, self._limits.ttl_s)
            why = "" if is_taken else "no node took it; others may have filled its place"
        except DecentraError as error:
            why = str(error)
        if why:
            self._node.events.emit("announce-failed", why=why)

    async def hear(self, turn: int) -> list[tuple[PeerId, bytes]]:
        """What others heard, a quarter of the DHT keys at a time. Empty when the DHT is silent."""
        found: list[tuple[PeerId, bytes]] = []
        for key in records.heard_keys(self._run_id)[turn % NUM_TURNS :: NUM_TURNS]:
            try:
                found += await records.lookup(self._node, key)
            except DecentraError as error:
                self._node.events.emit("lookup-failed", key=key.name, why=str(error))
        return [(peer, body) for peer, body in found if peer != self._node.peer_id]

    def _judge(self, peer: PeerId, digest: Digest, offset: int, reply: Reply) -> int:
        """How many bytes follow the reply."""
        if reply.status is not Status.OK:
            raise Refused(f"peer {peer} did not give blob {digest[:8]} ({reply.status.name.lower()}): {reply.reason}")
        if not offset <= reply.total_bytes <= self._limits.max_blob_bytes:
            most = self._limits.max_blob_bytes
            detail = f"blob {digest[:8]} is said to have {reply.total_bytes} bytes, expected {offset} to {most}"
            raise RejectedPayload("size", detail, peer=peer)
        return reply.total_bytes - offset

    @asynccontextmanager
    async def _deadline(self, peer: PeerId, digest: Digest, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise Unreachable(f"peer {peer} was silent for {timeout_s:g} s while sending blob {digest[:8]}; ask another") from None
        except (OSError, asyncio.IncompleteReadError, RuntimeError):  # uvloop raises RuntimeError where the stream is closed already
            raise Unreachable(f"peer {peer} broke the stream of blob {digest[:8]}; ask again or ask another") from None

    # ------------------------------------------------------------ serving

    async def _serve(self, remote: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request after another on the same stream, until the asker closes it or is silent."""
        self._num_streams[remote] += 1
        try:
            if self._num_streams[remote] > self._limits.num_streams_per_peer:
                await self._answer(writer, Reply(Status.BUSY, reason=f"more than {self._limits.num_streams_per_peer} streams are open"))
                return
            while await self._serve_one(remote, reader, writer):
                pass
        finally:
            self._num_streams[remote] -= 1
            if not self._num_streams[remote]:
                del self._num_streams[remote]

    async def _serve_one(self, remote: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """True when another request may follow."""
        try:
            async with asyncio.timeout(self._limits.idle_s):
                request = await read_request(reader)
            self._check(remote, request.credentials)
            async with self._slot(remote):
                await self._upload(remote, request, writer)
        except TimeoutError:
            writer.transport.abort()  # a reader that stopped reading would keep the rest in memory
            return False
        except RejectedPayload as error:
            await self._answer(writer, Reply(Status.MALFORMED, reason=error.detail))
            return False
        except _Busy as error:
            await self._answer(writer, Reply(Status.BUSY, reason=str(error)))
        except DecentraError as error:  # Refused, or credentials that are not even well-formed
            self._node.events.emit("blob-refused", peer=remote, why=str(error))
            await self._answer(writer, Reply(Status.REFUSED, reason=str(error)))
            return False
        return not writer.is_closing()

    async def _upload(self, remote: PeerId, request: Request, writer: asyncio.StreamWriter) -> None:
        try:
            blob, block = await asyncio.to_thread(self._begin, request)
        except OSError as error:
            await self._answer(writer, Reply(Status.FAILED, reason=f"the disk of {short(self._node.peer_id)} fails: {error.strerror}"))
            return
        if blob is None:
            await self._answer(writer, Reply(Status.MISSING, reason=f"{short(self._node.peer_id)} does not have it; ask another"))
            return
        with blob:
            if request.offset > blob.num_bytes:
                await self._answer(writer, Reply(Status.OFFSET, reason=f"offset {request.offset} is past its end at {blob.num_bytes}"))
                return
            if not await self._send(remote, blob, request.offset, block, writer):
                writer.transport.abort()  # the file is shorter than it was: nothing more comes, and the other end must not wait for it

    def _begin(self, request: Request) -> tuple[BlobReader | None, bytes]:
        """The blob and its first block from the offset on, in one visit to a thread."""
        blob = self._store.open(request.digest)
        return blob, b"" if blob is None else blob.read_at(request.offset, READ_AHEAD_BYTES)

    async def _send(self, remote: PeerId, blob: BlobReader, offset: int, block: bytes, writer: asyncio.StreamWriter) -> bool:
        """The reply and the blob from ``offset``; the reply travels with the first bytes. False when it ended early."""
        traffic, head, step = self._traffic(remote), pack_reply(Reply(Status.OK, blob.num_bytes)), self._pacer.chunk_bytes
        while block:
            offset += len(block)
            for start in range(0, len(block), step):
                chunk = block[start : start + step]
                await self._pacer.take(len(chunk))
                writer.write(head + chunk)
                head = b""
                async with asyncio.timeout(self._limits.idle_s):
                    await writer.drain()
                traffic.tx_bytes += len(chunk)
                await asyncio.sleep(0)  # a fast stream must not starve heartbeats
            block = await asyncio.to_thread(blob.read_at, offset, READ_AHEAD_BYTES) if offset < blob.num_bytes else b""
        writer.write(head)
        async with asyncio.timeout(self._limits.idle_s):
            await writer.drain()
        return offset == blob.num_bytes

    async def _answer(self, writer: asyncio.StreamWriter, reply: Reply) -> None:
        writer.write(pack_reply(reply))
        try:
            async with asyncio.timeout(self._limits.idle_s):
                await writer.drain()
        except TimeoutError:
            writer.transport.abort()

    @asynccontextmanager
    async def _slot(self, remote: PeerId) -> AsyncIterator[None]:
        """One of the uploads of ``remote`` and of all; waits for it a while. Raises _Busy."""
        own, num_users = self._peer_slots.get(remote, (asyncio.Semaphore(self._limits.num_uploads_per_peer), 0))
        if num_users >= 2 * self._limits.num_uploads_per_peer or self._num_waiting >= self._limits.num_waiting:
            raise _Busy(f"{short(self._node.peer_id)} has too many transfers waiting; ask another, or again in a few seconds")
        self._peer_slots[remote] = (own, num_users + 1)
        self._num_waiting += 1
        is_waiting, num_held = True, 0
        try:
            try:
                async with asyncio.timeout(self._limits.slot_s):
                    for semaphore in (own, self._slots):
                        await semaphore.acquire()
                        num_held += 1
            except TimeoutError:
                raise _Busy(f"{short(self._node.peer_id)} had no free transfer for {self._limits.slot_s:g} s; ask another") from None
            self._num_waiting -= 1
            is_waiting = False
            yield
        finally:
            self._num_waiting -= is_waiting
            for semaphore in (own, self._slots)[:num_held]:
                semaphore.release()
            self._leave(remote)

    def _leave(self, remote: PeerId) -> None:
        own, num_users = self._peer_slots[remote]
        if num_users > 1:
            self._peer_slots[remote] = (own, num_users - 1)
        else:
            del self._peer_slots[remote]

    def _traffic(self, peer: PeerId) -> Traffic:
        return self.traffic.setdefault(peer, Traffic())


class _Busy(Exception):
    """No upload slot became free."""


def _parse_addresses(body: bytes) -> tuple[str, ...]:
    """Foreign text: what is no address is left out."""
    try:
        texts = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    addresses: list[str] = []
    for text in texts[:MAX_ADDRESSES] if isinstance(texts, list) else []:
        try:
            addresses.append(check_multiaddr(text) if isinstance(text, str) else "")
        except ConfigError:
            continue
    return tuple(filter(None, addresses))
