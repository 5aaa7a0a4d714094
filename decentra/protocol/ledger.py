"""The ledger: one hash chain per fragment, one for the run, under a chain of heads. No I/O, no clock, no randomness, no keys.

A line is canonical JSON {chain, seq, prev, kind, body}; its hash is sha256 of its bytes and the next line of the chain names it as ``prev``.
``@run`` holds who was admitted and placed; ``@heads`` gets a line at each confirmation, naming the newest line of every fragment chain, so that
one head commits to everything before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

from decentra.errors import IntegrityError
from decentra.ids import Digest, FragmentId, PeerId, RunId, digest_of
from decentra.protocol import canonical
from decentra.protocol.messages import Phase, Role, Settlement

RUN_CHAIN, HEADS_CHAIN = "@run", "@heads"
FIRST = Digest("0" * 64)


@dataclass(frozen=True, slots=True)
class Started:
    run: RunId
    genesis: tuple[tuple[FragmentId, Digest], ...]


@dataclass(frozen=True, slots=True)
class Admitted:
    peer: PeerId
    role: Role
    name: str
    token: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    peer: PeerId
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Revoked:
    subject: str  # a token id or a peer id
    why: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Until the trunk has ``until_height`` confirmed rounds this member offers nothing: most holders said that its packet does not help.

    Where the trunk goes back meanwhile, that height goes back as far.
    """

    peer: PeerId
    until_height: int
    why: str


@dataclass(frozen=True, slots=True)
class Opened:
    fragment: FragmentId
    round: int
    height: int  # of the anchor the round starts from
    base: Digest
    holders: tuple[PeerId, ...]
    keepers: tuple[PeerId, ...]
    reducers: tuple[PeerId, ...] = ()
    residual: Digest | None = None  # which their merge starts with


@dataclass(frozen=True, slots=True)
class Settled:
    """Twice for a round with reducers; the second one stands. ``proofs``: their signed merges."""

    settlement: Settlement
    proofs: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Confirmed:
    fragment: FragmentId
    round: int
    height: int
    anchor: Digest
    attesters: tuple[PeerId, ...]
    thin: bool
    why: str
    proofs: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class GaveUp:
    fragment: FragmentId
    round: int
    phase: Phase  # ABANDONED or VOID
    why: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    fragment: FragmentId
    height: int
    anchor: Digest
    why: str


@dataclass(frozen=True, slots=True)
class Stopping:
    why: str
    is_over: bool
    awaits_successor: bool = False


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The run, which is over, goes on as another one, with other experts or other rules."""

    run: RunId


@dataclass(frozen=True, slots=True)
class Certified:
    """From here on the service of this certificate writes, sealed by the run key. A higher term: another service took the run over from a copy."""

    term: int
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Heads:
    heads: tuple[tuple[str, int, Digest], ...]


_OfRun = Started | Certified | Admitted | Placed | Revoked | Quarantined | Stopping | Succeeded
_OfFragment = Opened | Settled | Confirmed | GaveUp | RolledBack
Record = _OfRun | _OfFragment | Heads
_KINDS: dict[str, type[Record]] = {c.__name__: c for c in get_args(Record)}


def chain_of(record: Record) -> str:
    """The chain a record belongs to."""
    match record:
        case Settled(settlement):
            return settlement.fragment
        case Opened() | Confirmed() | GaveUp() | RolledBack():
            return record.fragment
        case Heads():
            return HEADS_CHAIN
    return RUN_CHAIN


@dataclass(frozen=True, slots=True)
class _Line:
    chain: str
    seq: int
    prev: Digest
    kind: str
    body: bytes


for _kind in (_Line, *_KINDS.values()):
    canonical.prepare(_kind)


def _parse(line: bytes) -> tuple[_Line, Record]:
    parsed = canonical.from_bytes(_Line, line, max_bytes=8 << 20)
    kind = _KINDS.get(parsed.kind)
    if kind is None:
        raise IntegrityError(f"ledger line {parsed.seq} of chain {parsed.chain}: unknown kind {parsed.kind!r}")
    return parsed, canonical.from_bytes(kind, parsed.body, max_bytes=8 << 20)


@dataclass
class Ledger:
    """The newest (sequence number, hash) of every chain; appending and checking are the same arithmetic."""

    heads: dict[str, tuple[int, Digest]] = field(default_factory=dict)

    def append(self, record: Record) -> bytes:
        """The record's line; the ledger moves on to it."""
        chain = chain_of(record)
        seq, prev = self.heads.get(chain, (0, FIRST))
        line = canonical.to_bytes(_Line(chain, seq + 1, prev, type(record).__name__, canonical.to_bytes(record)))
        self.heads[chain] = (seq + 1, digest_of(line))
        return line

    def accept(self, line: bytes) -> Record:
        """Check that ``line`` continues its chain and move on to it. Raises IntegrityError (RejectedPayload for a malformed line)."""
        parsed, record = _parse(line)
        if chain_of(record) != parsed.chain:
            raise IntegrityError(f"ledger line {parsed.seq} of chain {parsed.chain} speaks of {chain_of(record)}")
        seq, prev = self.heads.get(parsed.chain, (0, FIRST))
        if (parsed.seq, parsed.prev) != (seq + 1, prev):
            raise IntegrityError(
                f"ledger chain {parsed.chain} is broken: expected line {seq + 1} after {prev[:12]},"
                f" got line {parsed.seq} after {parsed.prev[:12]}; the ledger was edited or two services wrote it"
            )
        if isinstance(record, Heads):
            self._check_heads(record, parsed.seq)
        self.heads[parsed.chain] = (parsed.seq, digest_of(line))
        return record

    @staticmethod
    def peek(line: bytes) -> Record:
        """What a line says, whatever it continues. Raises IntegrityError."""
        return _parse(line)[1]

    def heads_record(self) -> Heads:
        """A record of all current heads but its own chain's."""
        return Heads(tuple((chain, seq, digest) for chain, (seq, digest) in sorted(self.heads.items()) if chain != HEADS_CHAIN))

    def _check_heads(self, record: Heads, seq: int) -> None:
        for chain, at, digest in record.heads:
            if self.heads.get(chain) != (at, digest):
                raise IntegrityError(
                    f"heads line {seq} names line {at} of chain {chain} as {digest[:12]}, the chain has {self.heads.get(chain)}"
                )


def replay(lines: Iterable[bytes]) -> tuple[Ledger, list[Record]]:
    """Check a whole ledger and return it with its records in order. Raises IntegrityError at the first line that does not fit."""
    ledger = Ledger()
    return ledger, [ledger.accept(line) for line in lines]
