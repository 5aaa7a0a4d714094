"""The words the members and the averaging service say to each other, as frozen values. No I/O, no clock, no randomness.

Members send facts (Hello, Offer, Receipt, Attestation, Holding, Heartbeat, Goodbye). The service answers with views: the whole state of one
fragment, newest version wins. A member acts on the difference between the view and its own state, so a lost, repeated or late message, a
restart and a newcomer are all the same case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from decentra.ids import Digest, FragmentId, PeerId


class Role(StrEnum):
    TRAINER = "trainer"
    KEEPER = "keeper"
    WATCHER = "watcher"


class Phase(StrEnum):
    IDLE = "idle"  # no round is open
    OPEN = "open"
    SETTLED = "settled"  # the set of offers is frozen
    TENTATIVE = "tentative"  # somebody attested the result
    CONFIRMED = "confirmed"
    ABANDONED = "abandoned"  # given up before settling
    VOID = "void"  # given up before confirming


# ---------------------------------------------------------------- member -> service


@dataclass(frozen=True, slots=True)
class Holding:
    """``peer`` has the anchor with this digest on disk."""

    peer: PeerId
    fragment: FragmentId
    anchor: Digest


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a member's stream. ``nonce`` differs per process, so a copied identity shows."""

    peer: PeerId
    role: Role
    name: str
    nonce: str
    addresses: tuple[str, ...] = ()
    experts: tuple[int, ...] | None = None  # experts the peer insists on
    num_experts: int | None = None  # how many it can hold
    holdings: tuple[Holding, ...] = ()
    may_reduce: bool = True  # false where its owner limits the uplink
    is_partial: bool = False  # holds only the experts it trains
    max_experts: int | None = None  # more do not fit into this machine; None: all do


@dataclass(frozen=True, slots=True)
class Offer:
    """Header of one packet. One (peer, fragment, round) has one digest for ever. ``proof`` is its peer's signature, opaque here."""

    fragment: FragmentId
    round: int
    peer: PeerId
    base: Digest  # the anchor the delta was taken from
    packet: Digest
    num_bytes: int
    num_tokens: int  # weight: tokens trained (expert: tokens routed to it)
    num_steps: int
    norm_bits: int  # float32 bits of the decoded packet's L2 norm: who gives a receipt has found it true
    proof: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Receipt:
    """``peer`` holds ``sender``'s packet, it passed the screen, and its norm is the offer's. ``objects``: judged by its loss it does not help."""

    fragment: FragmentId
    round: int
    peer: PeerId
    sender: PeerId
    packet: Digest
    objects: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """``peer``, a reducer of the round, has merged the settled packets into one and holds it. Equal words of both reducers make it the round's."""

    fragment: FragmentId
    round: int
    peer: PeerId
    packet: Digest
    num_bytes: int
    residual: Digest  # of what the packet left out, for the next merge
    proof: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Abstention:
    """``peer`` has nothing to offer in this round (its loss was not finite, say); nobody should wait for it."""

    fragment: FragmentId
    round: int
    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class Attestation:
    """``peer`` applied the settlement, has the result on disk, and its digest is ``anchor``."""

    fragment: FragmentId
    round: int
    peer: PeerId
    anchor: Digest
    proof: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Counters:
    """What a member did since it joined the run, as it says itself."""

    num_steps: int = 0
    num_tokens: int = 0
    tx_bytes: int = 0
    rx_bytes: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    skipped_rounds: int = 0
    state: str = ""  # in words: "training", "recovering trunk/0", ...
    expert_tokens: tuple[tuple[int, int], ...] = ()  # (expert, tokens routed to it)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    peer: PeerId
    seq: int
    counters: Counters


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The member leaves on purpose. What it alone trains is handed over at once, unless it ``comes_back``."""

    peer: PeerId
    why: str
    comes_back: bool = False


MemberMessage = Hello | Offer | Receipt | Merge | Abstention | Attestation | Holding | Heartbeat | Goodbye


# ---------------------------------------------------------------- service -> member


@dataclass(frozen=True, slots=True)
class Entry:
    """One offer inside a settlement; ``weight_bits`` are float32 bits of its share, ``clip_bits`` of what its delta is multiplied with before.

    Both are computed once by the service; all else is the offer's, and its sender's signature under it, so that everybody can compute and check them again.
    """

    peer: PeerId
    packet: Digest
    num_bytes: int
    num_tokens: int
    weight_bits: int
    norm_bits: int
    clip_bits: int
    num_steps: int = 0
    proof: bytes = field(default=b"", compare=False, repr=False)  # of the offer


@dataclass(frozen=True, slots=True)
class Merged:
    """The one packet that stands for all entries of a settlement, as both reducers made it."""

    packet: Digest
    num_bytes: int
    residual: Digest


@dataclass(frozen=True, slots=True)
class Settlement:
    """The frozen set of offers of a round with every scalar of the outer step, as float32 bits. Entries are sorted by peer id.

    With ``reducers`` it is applied by nobody until it is ``merged``, or comes again without reducers: then everybody fetches every packet.
    """

    fragment: FragmentId
    round: int
    height: int  # of the anchor it leads to; genesis has height 0
    base: Digest
    entries: tuple[Entry, ...]
    lr_bits: int
    momentum_bits: int
    why: str
    reducers: tuple[PeerId, ...] = ()
    residual: Digest | None = None  # what earlier merges left out, which this one starts with; None: nothing
    merged: Merged | None = None
    failed: tuple[PeerId, ...] = ()  # reducers that did not do their part: the reason for its second writing without them

    @property
    def is_final(self) -> bool:
        """It can be applied."""
        return not self.reducers or self.merged is not None

    @property
    def packets(self) -> tuple[Digest, ...]:
        """What a member needs to apply it."""
        return (self.merged.packet,) if self.merged is not None else tuple(e.packet for e in self.entries)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round ended."""

    round: int
    phase: Phase  # CONFIRMED, ABANDONED or VOID
    why: str
    settlement: Settlement | None = None
    anchor: Digest | None = None
    thin: bool = False


@dataclass(frozen=True, slots=True)
class Tally:
    """How the rounds of a fragment ended so far, and the tokens inside confirmed ones."""

    num_confirmed: int = 0
    num_thin: int = 0  # of the confirmed
    num_abandoned: int = 0
    num_void: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """The service's signed word for a confirmed anchor: line ``seq`` of the fragment's chain in the ledger, with this digest, made it so.

    ``seq`` 0, a digest of zeros and height 0: the manifest's own anchor, before any line. In one term a service gives one word for each place. Who has
    two different ones can prove to anybody that it tells two stories.
    """

    fragment: FragmentId
    term: int
    seq: int
    line: Digest
    height: int
    anchor: Digest
    proof: bytes = b""


@dataclass(frozen=True, slots=True)
class Heard:
    """What one member was told, for others to compare with what they were told. ``certificate``: of the service that told it, sealed."""

    told: tuple[Told, ...]
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class FragmentView:
    """All a member needs to know about one fragment. A view with a higher (round, version) replaces an older one."""

    fragment: FragmentId
    version: int
    height: int
    anchor: Digest  # the last confirmed anchor
    round: int  # the newest round, whatever its phase; 0 before the first
    phase: Phase
    why: str  # in words: what the round waits for
    holders: tuple[PeerId, ...] = ()  # roster: may offer
    keepers: tuple[PeerId, ...] = ()  # roster: receipt and attest only
    quorum: int = 0
    cut_off_in_s: float = 0.0
    offers: tuple[Offer, ...] = ()
    receipts: tuple[tuple[PeerId, PeerId], ...] = ()  # (sender, who has the packet)
    settlement: Settlement | None = None
    attesters: tuple[PeerId, ...] = ()
    ready: tuple[PeerId, ...] = ()  # present peers that hold ``anchor``
    recent: tuple[Outcome, ...] = ()  # newest last
    tally: Tally = field(default_factory=Tally)
    reducers: tuple[PeerId, ...] = ()  # of the roster: they alone fetch the offered packets; none: everybody does
    residual: Digest | None = None  # which their merge starts with
    told: Told | None = None  # of ``anchor``


@dataclass(frozen=True, slots=True)
class MemberView:
    """One member as the service sees it."""

    peer: PeerId
    name: str
    role: Role
    is_live: bool
    addresses: tuple[str, ...]
    experts: tuple[int, ...]
    counters: Counters
    is_partial: bool = False
    quarantine: str = ""  # why its packets are left out now


@dataclass(frozen=True, slots=True)
class SwarmView:
    """Who is in, where they are, who holds which expert, and whether the run is ending."""

    version: int
    members: tuple[MemberView, ...]
    is_stopping: bool = False
    is_stopped: bool = False
    why: str = ""
    revoked: tuple[PeerId, ...] = ()  # members whose admission was taken back: no door opens for them
    awaits_successor: bool = False  # it ends to be continued as another run
    successor: str = ""  # that run, as ``wire.trust.seal_successor`` made it


DRAINED = "drained"  # a Rejected with this reason: the member is to leave


@dataclass(frozen=True, slots=True)
class Rejected:
    """The service refused one message of this member, or the member itself."""

    peer: PeerId
    reason: str
    detail: str


ServiceMessage = FragmentView | SwarmView | Rejected
