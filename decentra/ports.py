"""What the runtime needs from outside, as protocols. Real adapters live in gossip/, averaging/ and peer/; sim/ has memory ones.

Every method that waits takes or has a deadline; adapters map foreign exceptions to decentra.errors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from decentra.bits import Buffer
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol.messages import Hello, MemberMessage, Outcome, ServiceMessage

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Unix time in seconds; for expiries and for people, never for deadlines."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class Compute(Protocol):
    """The delta thread: tensor work never runs in the loop."""

    async def run(self, function: Callable[..., T], *args: Any) -> T: ...


class Exchange(Protocol):
    """Content-addressed blobs between peers. ``get`` yields bytes from ``offset`` on; the caller verifies the digest."""

    async def put(self, digest: Digest, data: bytes) -> None:
        """Store durably and serve from now on. Raises OSError when the disk refuses."""
        ...

    async def read(self, digest: Digest) -> bytes | None:
        """A blob this peer has, or None."""
        ...

    async def has(self, digest: Digest) -> bool: ...

    async def drop(self, digest: Digest) -> None: ...

    def pin(self, digest: Digest) -> None:
        """Never evict this blob for space. Pins are in memory: they are set again after a restart."""
        ...

    def unpin(self, digest: Digest) -> None: ...

    def get(self, peer: PeerId, addresses: Sequence[str], digest: Digest, offset: int) -> AsyncIterator[bytes]:
        """Chunks of a foreign blob.

        Raises Unreachable (nobody there), Refused (does not have it, not admitted, busy), RejectedPayload (an answer that is none).
        """
        ...

    async def announce(self, digests: Sequence[Digest]) -> None:
        """Advertise blobs in the DHT; best effort, never fails."""
        ...

    async def providers(self, digest: Digest) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Peers that advertise a blob, for when the service is away."""
        ...

    async def tell(self, body: bytes) -> None:
        """Say something in public, in place of what was said before; best effort, never fails."""
        ...

    async def hear(self, turn: int) -> list[tuple[PeerId, bytes]]:
        """What some of the others say; everybody's turn comes as ``turn`` goes up, where others do not fill the place. Best effort, never fails."""
        ...


class Session(Protocol):
    """One member's open stream to the averaging service."""

    async def send(self, message: MemberMessage) -> None: ...

    def messages(self) -> AsyncIterator[ServiceMessage]:
        """Ends or raises Unreachable when the stream breaks; raises Refused when the service ends it on purpose."""
        ...

    async def close(self) -> None: ...


class AveragingService(Protocol):
    """The member's side of the averaging service."""

    async def attend(self, hello: Hello) -> Session: ...

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None:
        """How an old round ended, from the ledger; None when the ledger does not know it."""
        ...


class Journal(Protocol):
    """Append-only storage of ledger records; ``append`` blocks until they survive a power cut."""

    def append(self, records: Sequence[bytes]) -> None: ...

    def load(self) -> Iterable[bytes]: ...

    def read(self, after: int, limit: int) -> list[bytes]:
        """At most ``limit`` records after the first ``after``; blocks."""
        ...


class Disk(Protocol):
    """The only way to write files. Each call is one crash point."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, *parts: Buffer) -> None:
        """Not durable until ``sync``."""
        ...

    def sync(self, name: str) -> None: ...

    def rename(self, old: str, new: str) -> None:
        """Atomic; durable after ``sync_dir``."""
        ...

    def sync_dir(self) -> None: ...

    def delete(self, name: str) -> None: ...

    def list(self) -> list[str]: ...


class Events(Protocol):
    """Where protocol events go for people: logs and progress."""

    def emit(self, event: str, **fields: Any) -> None: ...
