"""What the gRPC server needs from the averaging service behind it, as protocols. No gRPC here, and no decisions."""

from __future__ import annotations

from typing import Protocol, TypeVar

from decentra.ids import FragmentId, PeerId, RunId
from decentra.protocol.messages import FragmentView, Hello, MemberMessage, Outcome, Role, ServiceMessage, SwarmView


class Outbox(Protocol):
    """What waits to be sent on one stream. The service puts, the server gets; both may close it."""

    @property
    def reason(self) -> str | None:
        """Why the service ended the stream; None when it ended in peace."""
        ...

    def put(self, message: ServiceMessage) -> None: ...

    async def get(self) -> list[ServiceMessage]:
        """Wait until something is there and take it; empty: closed, and nothing is left."""
        ...

    def close(self, reason: str | None) -> None: ...


OutboxT = TypeVar("OutboxT", bound=Outbox)
OutboxT_contra = TypeVar("OutboxT_contra", bound=Outbox, contravariant=True)


class ServiceDoor(Protocol[OutboxT_contra]):
    """The averaging service as its server sees it. Identities, signatures and admissions were checked before these are called."""

    async def join(self, peer: PeerId, role: Role, nonce: str, token_id: str | None, token_uses: int) -> None:
        """Admit a peer, once more if it is known. Counts uses of the token. Raises Refused."""
        ...

    async def attend(self, hello: Hello, mailbox: OutboxT_contra) -> None:
        """Take a member in; views appear in ``mailbox`` from now on. Raises Refused. ``leave`` follows in every case."""
        ...

    async def deliver(self, message: MemberMessage) -> None: ...

    async def leave(self, peer: PeerId, mailbox: OutboxT_contra, why: str) -> None:
        """The stream of this mailbox ended; also called when ``attend`` refused it."""
        ...

    async def outcome(self, fragment: FragmentId, round: int) -> Outcome | None: ...

    async def status(self) -> tuple[SwarmView, tuple[FragmentView, ...]]:
        """The swarm and every fragment, nothing that is not durable. Raises Unreachable."""
        ...

    async def ledger(self, after_seq: int, limit: int) -> list[bytes]:
        """At most ``limit`` sealed records after position ``after_seq`` (0: from the first)."""
        ...

    async def copied(self, name: str, num_records: int, wait_s: float) -> None:
        """A copy of the ledger has so many records on its disk; returns when there are more, or ``wait_s`` are over. Raises Refused."""
        ...

    async def command(self, kind: str, argument: str) -> str:
        """Carry out an order of the organiser (``stop``, ``pass-on``, ``drain``, ``retire``, ...) and say what was done. Raises Refused."""
        ...

    async def revoke(self, subject: str) -> str:
        """Take back a token (by its id) or an admission (by peer id or name); the id that is revoked now. Raises Refused."""
        ...

    async def succeed(self, run: RunId, successor: str) -> str:
        """The run is over and goes on as another one. Raises Refused while it is not over."""
        ...
