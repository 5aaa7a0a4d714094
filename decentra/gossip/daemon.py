"""One p2pd process and the talk with it: start, connect, open and serve streams, end. Restarts nothing and knows no DHT."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import hivemind.p2p.p2p_daemon as hivemind_daemon
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from decentra.errors import ConfigError, DecentraError, IntegrityError, PortTaken, Unreachable
from decentra.gossip.address import Address, claim_ports, dialable, parse_multiaddr, visible_first
from decentra.gossip.guard import install_guard
from decentra.identity import load_key
from decentra.ids import PeerId

STARTUP_S = 60.0
CONTROL_S = 10.0
CLOSE_S = 3.0
READ_BUFFER_BYTES = 128 << 10
NUM_OPEN_FILES = 1 << 15  # every stream is a socket here and one in p2pd

_SOCKET_ROOT = "/tmp"  # fixed: a socket path has at most 107 bytes, and TMPDIR may be long
_SOCKET_PREFIX = "decentra-p2p-"

StreamHandler = Callable[[PeerId, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Daemon:
    """A running p2pd. Every call has a deadline and raises Unreachable when p2pd or the other peer does not answer."""

    def __init__(self, p2p: P2P, listen: tuple[str, ...], sockets: SocketDir) -> None:
        self.p2p, self.listen, self._sockets = p2p, listen, sockets
        self.peer_id = PeerId(p2p.peer_id.to_base58())
        self._control_path: str = p2p.daemon_listen_maddr["unix"]

    @classmethod
    async def start(cls, key_file: Path, *, listen: Sequence[str] = (), announce: Sequence[str] = ()) -> Daemon:
        """Start p2pd with the identity in ``key_file``; with no ``listen`` address it only dials out.

        Raises ConfigError (key, address), PortTaken, Unreachable (it did not start).
        """
        install_guard()
        _isolate_children()
        _raise_file_limit()
        load_key(key_file)  # p2pd would answer a missing file with a fresh RSA identity
        announced = [parse_multiaddr(text) for text in announce]
        if any(address.port == 0 for address in announced):
            raise ConfigError(f"announced addresses need their port, got {', '.join(map(str, announce))}")
        claimed = claim_ports(listen)
        sockets = SocketDir()
        try:
            p2p = await _create(key_file, claimed, [a.dial for a in announced], sockets)
        except BaseException:
            sockets.close()
            raise
        return cls(p2p, claimed, sockets)

    @property
    def pid(self) -> int:
        return int(self.p2p._child.pid)

    async def died(self) -> str:
        """Wait until the process ends; how it ended, in words."""
        code = await self.p2p._child.wait()
        return f"p2pd was ended by signal {-code}" if code < 0 else f"p2pd ended with status {code}"

    async def addresses(self, timeout_s: float = CONTROL_S) -> tuple[str, ...]:
        """Where others can reach this peer, with /p2p/PEER, loopback last; also the ping. Empty for a peer that only dials out."""
        answer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY), timeout_s, "p2pd does not answer")
        if not self.listen:
            return ()
        found: list[Address] = []
        for raw in answer.identify.addrs:
            with suppress(ConfigError, ValueError, LookupError):
                address = parse_multiaddr(str(Multiaddr(raw)))
                found.append(Address(address.kind, address.host, address.port, self.peer_id))
        return tuple(str(address) for address in visible_first(dict.fromkeys(found)))

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to ``peer``; without addresses p2pd asks its other peers for them. At once when connected already."""
        dials = [Multiaddr(text).to_bytes() for text in dialable(peer, addresses)]
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(peer=_to_hivemind(peer).to_bytes(), addrs=dials, timeout=max(1, int(timeout_s))),
        )
        where = f" at {', '.join(addresses)}" if addresses else ""
        await self._ask(request, timeout_s, f"peer {peer} does not answer{where}")

    async def peers(self, timeout_s: float = CONTROL_S) -> frozenset[PeerId]:
        """Who is connected now."""
        answer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS), timeout_s, "p2pd does not answer")
        return frozenset(PeerId(PeerID(info.id).to_base58()) for info in answer.peers)

    async def open_stream(self, peer: PeerId, protocol: str, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a two-way byte stream to ``peer``'s handler of ``protocol``. The caller closes the writer."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=_to_hivemind(peer).to_bytes(), proto=[protocol], timeout=max(1, int(timeout_s))),
        )
        failing = f"peer {peer} opened no stream for {protocol}"
        with _mapped(failing, timeout_s):
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._dial()
                try:
                    await _exchange(reader, writer, request)
                except BaseException:
                    writer.transport.abort()
                    raise
        return reader, writer

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Answer ``protocol`` with ``handler`` until the daemon ends. The remote id is authenticated by libp2p."""

        async def adapted(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await handler(PeerId(info.peer_id.to_base58()), reader, writer)

        with _mapped(f"p2pd did not take the handler {protocol}", CONTROL_S):
            async with asyncio.timeout(CONTROL_S):
                await self.p2p.add_binary_stream_handler(protocol, adapted)

    async def withdraw(self, protocol: str) -> None:
        with _mapped(f"p2pd did not drop the handler {protocol}", CONTROL_S):
            async with asyncio.timeout(CONTROL_S):
                await self.p2p.remove_binary_stream_handler(protocol)

    async def close(self) -> None:
        """End p2pd and remove its sockets; when this returns the process is gone."""
        try:
            await _end(self.p2p)
        finally:
            self._sockets.close()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._control_path, limit=READ_BUFFER_BYTES)

    async def _ask(self, request: Any, timeout_s: float, failing: str) -> Any:
        with _mapped(failing, timeout_s):
            async with asyncio.timeout(timeout_s), self._conversation() as (reader, writer):
                return await _exchange(reader, writer, request)

    @asynccontextmanager
    async def _conversation(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await self._dial()
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # also when cancelled: an abandoned control connection would stay open


class SocketDir:
    """A private directory for one daemon's two sockets, removed on close; those of killed processes are swept at the next start.

    A lock that dies with its process tells the living from the dead, across containers that share /tmp too.
    """

    def __init__(self, root: str = _SOCKET_ROOT) -> None:
        _sweep(root)
        self.path = Path(tempfile.mkdtemp(prefix=_SOCKET_PREFIX, dir=root))
        self._lock_fd: int | None = os.open(self.path / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        os.rename(self.path / "new", self.path / "lock")  # under its name it is locked from the first moment

    def close(self) -> None:
        if self._lock_fd is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = None


def _sweep(root: str) -> None:
    for lock in Path(root).glob(f"{_SOCKET_PREFIX}*/lock"):
        with suppress(OSError):
            if lock.stat().st_uid != os.getuid():
                continue
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(fd)


async def _create(key_file: Path, listen: Sequence[str], announce: Sequence[str], sockets: SocketDir) -> P2P:
    made: list[P2P] = []

    class Placed(P2P):  # type: ignore[misc]
        _UNIX_SOCKET_PREFIX = f"/unix{sockets.path}/"

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    try:
        return await Placed.create(
            initial_peers=None,  # bootstrap nodes may be down: they are connected later, see node.py
            identity_path=str(key_file),
            host_maddrs=list(listen) or None,
            announce_maddrs=list(announce) or None,
            no_listen=not listen,
            dht_mode="server" if listen else "client",
            check_if_identity_free=False,  # it reads RSA keys only; duplicates are found at admission
            nat_port_map=False,
            auto_nat=False,
            use_relay=False,
            startup_timeout=STARTUP_S,
        )
    except BaseException as error:
        for p2p in made:  # hivemind leaves a process that was half started to the garbage collector
            await _end(p2p)
        raise _start_error(error, listen) from None


async def _end(p2p: P2P) -> None:
    """End the process and wait for it, by force if it does not go."""
    child, listening = p2p._child, p2p._listen_task
    p2p._terminate()
    if child is None:
        return
    try:
        async with asyncio.timeout(CLOSE_S):
            await child.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    finally:
        child._transport.close()  # its output pipe; left to the garbage collector it complains after the loop has ended
        if listening is not None:
            await asyncio.wait({listening}, timeout=CLOSE_S)


def _start_error(error: BaseException, listen: Sequence[str]) -> BaseException:
    """What p2pd's failure to start means to the user; anything else is passed on as it is."""
    if not isinstance(error, (P2PDaemonError, OSError)):
        return error
    text = str(error)
    if "address already in use" in text:
        ports = re.findall(r"/tcp/(\d+)", " ".join(listen))
        return PortTaken(
            f"port {', '.join(ports)} is in use by another process; stop it, or listen on another port (--bootstrap-port of host)"
        )
    if "binary" in text:
        return ConfigError(f"p2pd cannot run on this machine: {text}; reinstall hivemind for this platform")
    return Unreachable(f"p2pd did not start: {text}; look for a firewall or a full disk, then try again")


@contextmanager
def _mapped(failing: str, timeout_s: float) -> Iterator[None]:
    """Foreign exceptions of one talk with p2pd become Unreachable."""
    try:
        yield
    except DecentraError:
        raise
    except TimeoutError:
        raise Unreachable(f"{failing} (no answer within {timeout_s:g} s)") from None
    except (P2PDaemonError, asyncio.IncompleteReadError, OSError, EOFError, ValueError, DecodeError, RuntimeError) as error:
        raise Unreachable(f"{failing} ({str(error)[:300] or type(error).__name__})") from None


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    await write_pbmsg(writer, request)
    answer = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, answer)
    if answer.type == p2pd_pb2.Response.ERROR:
        raise P2PDaemonError(answer.error.msg)
    return answer


def _to_hivemind(peer: PeerId) -> PeerID:
    try:
        return PeerID.from_base58(peer)
    except ValueError:
        raise IntegrityError(f"expected a base58 peer id, got {peer[:60]!r}") from None


class _OwnSession:
    """Stands in for the asyncio module inside hivemind's daemon module: p2pd starts in a session of its own.

    Otherwise Ctrl-C in a terminal ends p2pd before we could say goodbye. p2pd still ends with us: it exits when its last connection closes.
    """

    def __init__(self) -> None:
        self.subprocess = self

    PIPE, STDOUT = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT

    async def create_subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.create_subprocess_exec(*args, **kwargs, start_new_session=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


def _isolate_children() -> None:
    if not isinstance(hivemind_daemon.asyncio, _OwnSession):
        hivemind_daemon.asyncio = _OwnSession()


def _raise_file_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_OPEN_FILES if hard == resource.RLIM_INFINITY else min(NUM_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
