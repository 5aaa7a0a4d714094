from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_TRAINER: _ClassVar[Role]
    ROLE_KEEPER: _ClassVar[Role]
    ROLE_WATCHER: _ClassVar[Role]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_IDLE: _ClassVar[Phase]
    PHASE_OPEN: _ClassVar[Phase]
    PHASE_SETTLED: _ClassVar[Phase]
    PHASE_TENTATIVE: _ClassVar[Phase]
    PHASE_CONFIRMED: _ClassVar[Phase]
    PHASE_ABANDONED: _ClassVar[Phase]
    PHASE_VOID: _ClassVar[Phase]
ROLE_UNSPECIFIED: Role
ROLE_TRAINER: Role
ROLE_KEEPER: Role
ROLE_WATCHER: Role
PHASE_UNSPECIFIED: Phase
PHASE_IDLE: Phase
PHASE_OPEN: Phase
PHASE_SETTLED: Phase
PHASE_TENTATIVE: Phase
PHASE_CONFIRMED: Phase
PHASE_ABANDONED: Phase
PHASE_VOID: Phase

class SignedStatement(_message.Message):
    __slots__ = ("purpose", "body", "signer", "signature", "not_after_s")
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    purpose: str
    body: bytes
    signer: bytes
    signature: bytes
    not_after_s: int
    def __init__(self, purpose: _Optional[str] = ..., body: _Optional[bytes] = ..., signer: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., not_after_s: _Optional[int] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("peer", "fragment", "anchor")
    PEER_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    peer: str
    fragment: str
    anchor: bytes
    def __init__(self, peer: _Optional[str] = ..., fragment: _Optional[str] = ..., anchor: _Optional[bytes] = ...) -> None: ...

class IntList(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, items: _Optional[_Iterable[int]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("peer", "role", "name", "nonce", "addresses", "experts", "num_experts", "holdings", "may_reduce", "is_partial", "max_experts")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    MAY_REDUCE_FIELD_NUMBER: _ClassVar[int]
    IS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    MAX_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    peer: str
    role: Role
    name: str
    nonce: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    experts: IntList
    num_experts: int
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    may_reduce: bool
    is_partial: bool
    max_experts: int
    def __init__(self, peer: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., nonce: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., experts: _Optional[_Union[IntList, _Mapping]] = ..., num_experts: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., may_reduce: bool = ..., is_partial: bool = ..., max_experts: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("fragment", "round", "peer", "base", "packet", "num_bytes", "num_tokens", "num_steps", "norm_bits", "proof")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NORM_BITS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    peer: str
    base: bytes
    packet: bytes
    num_bytes: int
    num_tokens: int
    num_steps: int
    norm_bits: int
    proof: bytes
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., peer: _Optional[str] = ..., base: _Optional[bytes] = ..., packet: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., norm_bits: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("fragment", "round", "peer", "sender", "packet", "objects")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    peer: str
    sender: str
    packet: bytes
    objects: bool
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., peer: _Optional[str] = ..., sender: _Optional[str] = ..., packet: _Optional[bytes] = ..., objects: bool = ...) -> None: ...

class Merge(_message.Message):
    __slots__ = ("fragment", "round", "peer", "packet", "num_bytes", "residual", "proof")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    peer: str
    packet: bytes
    num_bytes: int
    residual: bytes
    proof: bytes
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., peer: _Optional[str] = ..., packet: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., residual: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Abstention(_message.Message):
    __slots__ = ("fragment", "round", "peer", "why")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    peer: str
    why: str
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., peer: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class Attestation(_message.Message):
    __slots__ = ("fragment", "round", "peer", "anchor", "proof")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    peer: str
    anchor: bytes
    proof: bytes
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., peer: _Optional[str] = ..., anchor: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class ExpertTokens(_message.Message):
    __slots__ = ("expert", "num_tokens")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    expert: int
    num_tokens: int
    def __init__(self, expert: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("num_steps", "num_tokens", "tx_bytes", "rx_bytes", "loss", "tokens_per_s", "skipped_rounds", "state", "expert_tokens")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TX_BYTES_FIELD_NUMBER: _ClassVar[int]
    RX_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_tokens: int
    tx_bytes: int
    rx_bytes: int
    loss: float
    tokens_per_s: float
    skipped_rounds: int
    state: str
    expert_tokens: _containers.RepeatedCompositeFieldContainer[ExpertTokens]
    def __init__(self, num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., tx_bytes: _Optional[int] = ..., rx_bytes: _Optional[int] = ..., loss: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., skipped_rounds: _Optional[int] = ..., state: _Optional[str] = ..., expert_tokens: _Optional[_Iterable[_Union[ExpertTokens, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("peer", "seq", "counters")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    peer: str
    seq: int
    counters: Counters
    def __init__(self, peer: _Optional[str] = ..., seq: _Optional[int] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("peer", "why", "comes_back")
    PEER_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    COMES_BACK_FIELD_NUMBER: _ClassVar[int]
    peer: str
    why: str
    comes_back: bool
    def __init__(self, peer: _Optional[str] = ..., why: _Optional[str] = ..., comes_back: bool = ...) -> None: ...

class MemberFrame(_message.Message):
    __slots__ = ("hello", "offer", "receipt", "attestation", "holding", "heartbeat", "goodbye", "abstention", "merge")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    ABSTENTION_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    hello: bytes
    offer: bytes
    receipt: bytes
    attestation: bytes
    holding: Holding
    heartbeat: Heartbeat
    goodbye: Goodbye
    abstention: Abstention
    merge: bytes
    def __init__(self, hello: _Optional[bytes] = ..., offer: _Optional[bytes] = ..., receipt: _Optional[bytes] = ..., attestation: _Optional[bytes] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., abstention: _Optional[_Union[Abstention, _Mapping]] = ..., merge: _Optional[bytes] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("peer", "packet", "num_bytes", "num_tokens", "weight_bits", "norm_bits", "clip_bits", "num_steps", "proof")
    PEER_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    NORM_BITS_FIELD_NUMBER: _ClassVar[int]
    CLIP_BITS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    peer: str
    packet: bytes
    num_bytes: int
    num_tokens: int
    weight_bits: int
    norm_bits: int
    clip_bits: int
    num_steps: int
    proof: bytes
    def __init__(self, peer: _Optional[str] = ..., packet: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., num_tokens: _Optional[int] = ..., weight_bits: _Optional[int] = ..., norm_bits: _Optional[int] = ..., clip_bits: _Optional[int] = ..., num_steps: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Merged(_message.Message):
    __slots__ = ("packet", "num_bytes", "residual")
    PACKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    packet: bytes
    num_bytes: int
    residual: bytes
    def __init__(self, packet: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., residual: _Optional[bytes] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ("fragment", "round", "height", "base", "entries", "lr_bits", "momentum_bits", "why", "reducers", "residual", "merged", "failed")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LR_BITS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_BITS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    REDUCERS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    height: int
    base: bytes
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    lr_bits: int
    momentum_bits: int
    why: str
    reducers: _containers.RepeatedScalarFieldContainer[str]
    residual: bytes
    merged: Merged
    failed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ..., height: _Optional[int] = ..., base: _Optional[bytes] = ..., entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., lr_bits: _Optional[int] = ..., momentum_bits: _Optional[int] = ..., why: _Optional[str] = ..., reducers: _Optional[_Iterable[str]] = ..., residual: _Optional[bytes] = ..., merged: _Optional[_Union[Merged, _Mapping]] = ..., failed: _Optional[_Iterable[str]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("round", "phase", "why", "settlement", "anchor", "thin")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    THIN_FIELD_NUMBER: _ClassVar[int]
    round: int
    phase: Phase
    why: str
    settlement: Settlement
    anchor: bytes
    thin: bool
    def __init__(self, round: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., why: _Optional[str] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ..., anchor: _Optional[bytes] = ..., thin: bool = ...) -> None: ...

class Receipts(_message.Message):
    __slots__ = ("peers", "pairs")
    PEERS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedScalarFieldContainer[str]
    pairs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, peers: _Optional[_Iterable[str]] = ..., pairs: _Optional[_Iterable[int]] = ...) -> None: ...

class Tally(_message.Message):
    __slots__ = ("num_confirmed", "num_thin", "num_abandoned", "num_void", "num_tokens")
    NUM_CONFIRMED_FIELD_NUMBER: _ClassVar[int]
    NUM_THIN_FIELD_NUMBER: _ClassVar[int]
    NUM_ABANDONED_FIELD_NUMBER: _ClassVar[int]
    NUM_VOID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_confirmed: int
    num_thin: int
    num_abandoned: int
    num_void: int
    num_tokens: int
    def __init__(self, num_confirmed: _Optional[int] = ..., num_thin: _Optional[int] = ..., num_abandoned: _Optional[int] = ..., num_void: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("fragment", "term", "seq", "line", "height", "anchor", "proof")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    term: int
    seq: int
    line: bytes
    height: int
    anchor: bytes
    proof: bytes
    def __init__(self, fragment: _Optional[str] = ..., term: _Optional[int] = ..., seq: _Optional[int] = ..., line: _Optional[bytes] = ..., height: _Optional[int] = ..., anchor: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Heard(_message.Message):
    __slots__ = ("told", "certificate")
    TOLD_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    told: _containers.RepeatedCompositeFieldContainer[Told]
    certificate: bytes
    def __init__(self, told: _Optional[_Iterable[_Union[Told, _Mapping]]] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class FragmentView(_message.Message):
    __slots__ = ("fragment", "version", "height", "anchor", "round", "phase", "why", "holders", "keepers", "quorum", "cut_off_in_s", "offers", "receipts", "settlement", "attesters", "ready", "recent", "tally", "reducers", "residual", "told")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    KEEPERS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    CUT_OFF_IN_S_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    ATTESTERS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    REDUCERS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    version: int
    height: int
    anchor: bytes
    round: int
    phase: Phase
    why: str
    holders: _containers.RepeatedScalarFieldContainer[str]
    keepers: _containers.RepeatedScalarFieldContainer[str]
    quorum: int
    cut_off_in_s: float
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    receipts: Receipts
    settlement: Settlement
    attesters: _containers.RepeatedScalarFieldContainer[str]
    ready: _containers.RepeatedScalarFieldContainer[str]
    recent: _containers.RepeatedCompositeFieldContainer[Outcome]
    tally: Tally
    reducers: _containers.RepeatedScalarFieldContainer[str]
    residual: bytes
    told: Told
    def __init__(self, fragment: _Optional[str] = ..., version: _Optional[int] = ..., height: _Optional[int] = ..., anchor: _Optional[bytes] = ..., round: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., why: _Optional[str] = ..., holders: _Optional[_Iterable[str]] = ..., keepers: _Optional[_Iterable[str]] = ..., quorum: _Optional[int] = ..., cut_off_in_s: _Optional[float] = ..., offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ..., receipts: _Optional[_Union[Receipts, _Mapping]] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ..., attesters: _Optional[_Iterable[str]] = ..., ready: _Optional[_Iterable[str]] = ..., recent: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., tally: _Optional[_Union[Tally, _Mapping]] = ..., reducers: _Optional[_Iterable[str]] = ..., residual: _Optional[bytes] = ..., told: _Optional[_Union[Told, _Mapping]] = ...) -> None: ...

class MemberView(_message.Message):
    __slots__ = ("peer", "name", "role", "is_live", "addresses", "experts", "counters", "is_partial", "quarantine")
    PEER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    IS_LIVE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    IS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    name: str
    role: Role
    is_live: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    experts: _containers.RepeatedScalarFieldContainer[int]
    counters: Counters
    is_partial: bool
    quarantine: str
    def __init__(self, peer: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., is_live: bool = ..., addresses: _Optional[_Iterable[str]] = ..., experts: _Optional[_Iterable[int]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., is_partial: bool = ..., quarantine: _Optional[str] = ...) -> None: ...

class SwarmView(_message.Message):
    __slots__ = ("version", "members", "is_stopping", "is_stopped", "why", "revoked", "awaits_successor", "successor")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    IS_STOPPING_FIELD_NUMBER: _ClassVar[int]
    IS_STOPPED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    AWAITS_SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[MemberView]
    is_stopping: bool
    is_stopped: bool
    why: str
    revoked: _containers.RepeatedScalarFieldContainer[str]
    awaits_successor: bool
    successor: str
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[MemberView, _Mapping]]] = ..., is_stopping: bool = ..., is_stopped: bool = ..., why: _Optional[str] = ..., revoked: _Optional[_Iterable[str]] = ..., awaits_successor: bool = ..., successor: _Optional[str] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("peer", "reason", "detail")
    PEER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    peer: str
    reason: str
    detail: str
    def __init__(self, peer: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("server_time_s",)
    SERVER_TIME_S_FIELD_NUMBER: _ClassVar[int]
    server_time_s: float
    def __init__(self, server_time_s: _Optional[float] = ...) -> None: ...

class ServiceFrame(_message.Message):
    __slots__ = ("welcome", "fragment", "swarm", "rejected")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    SWARM_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    fragment: FragmentView
    swarm: SwarmView
    rejected: Rejected
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., fragment: _Optional[_Union[FragmentView, _Mapping]] = ..., swarm: _Optional[_Union[SwarmView, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ...) -> None: ...
