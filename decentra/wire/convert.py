"""Domain values of protocol/messages.py to protobuf messages and back, with every bound checked. No network, no signatures.

The pairs are one explicit table; how a field travels follows from its type hint. What a foreigner got wrong is
RejectedPayload('malformed'); what we hand over wrongly ourselves is an AssertionError.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, Message

from decentra.errors import RejectedPayload
from decentra.ids import Digest, FragmentId, PeerId, is_digest
from decentra.pb import messages_pb2 as pb
from decentra.protocol import messages as domain
from decentra.wire import limits

Value = (
    domain.MemberMessage
    | domain.ServiceMessage
    | domain.Outcome
    | domain.Settlement
    | domain.Merged
    | domain.Entry
    | domain.MemberView
    | domain.Counters
    | domain.Told
    | domain.Heard
)
PbMessage = TypeVar("PbMessage", bound=Message)

PAIRS: dict[type, type[Message]] = {
    domain.Holding: pb.Holding,
    domain.Hello: pb.Hello,
    domain.Offer: pb.Offer,
    domain.Receipt: pb.Receipt,
    domain.Merge: pb.Merge,
    domain.Abstention: pb.Abstention,
    domain.Attestation: pb.Attestation,
    domain.Counters: pb.Counters,
    domain.Heartbeat: pb.Heartbeat,
    domain.Goodbye: pb.Goodbye,
    domain.Entry: pb.Entry,
    domain.Merged: pb.Merged,
    domain.Settlement: pb.Settlement,
    domain.Outcome: pb.Outcome,
    domain.Tally: pb.Tally,
    domain.Told: pb.Told,
    domain.Heard: pb.Heard,
    domain.FragmentView: pb.FragmentView,
    domain.MemberView: pb.MemberView,
    domain.SwarmView: pb.SwarmView,
    domain.Rejected: pb.Rejected,
}
_DOMAIN_OF = {message: value for value, message in PAIRS.items()}
_ENUMS: dict[type[StrEnum], Any] = {domain.Role: pb.Role, domain.Phase: pb.Phase}

# Bounds by field name: (characters, whether a longer text is cut when we send it). Prose is cut, names are not.
_TEXT: dict[str, tuple[int, bool]] = {
    "name": (limits.MAX_NAME_CHARS, False),
    "nonce": (limits.MAX_NAME_CHARS, False),
    "reason": (limits.MAX_NAME_CHARS, True),
    "why": (limits.MAX_WHY_CHARS, True),
    "detail": (limits.MAX_WHY_CHARS, True),
    "state": (limits.MAX_WHY_CHARS, True),
    "quarantine": (limits.MAX_WHY_CHARS, True),
    "addresses": (limits.MAX_ADDRESS_CHARS, False),
    "successor": (limits.MAX_SUCCESSOR_CHARS, False),
}
# Lists that are cut when we send them (how: keep first or last), all others are asserted.
_LISTS: dict[str, tuple[int, slice | None]] = {
    "addresses": (limits.MAX_ADDRESSES, slice(None, limits.MAX_ADDRESSES)),
    "recent": (limits.MAX_RECENT, slice(-limits.MAX_RECENT, None)),
}
_PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,64}")
# A control character could repaint the terminal of whoever reads the status.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FRAGMENT = re.compile(r"[a-z][a-z0-9_.]{0,40}/[0-9]{1,9}")


def malformed(detail: str, peer: str = "?") -> RejectedPayload:
    return RejectedPayload("malformed", detail, peer=peer)


def parse(cls: type[PbMessage], data: bytes, *, max_bytes: int = limits.MAX_MESSAGE_BYTES) -> PbMessage:
    """Bytes as a protobuf message. Raises RejectedPayload('malformed' or 'size')."""
    name = cls.DESCRIPTOR.name
    if len(data) > max_bytes:
        raise RejectedPayload("size", f"expected a {name} of at most {max_bytes} bytes, got {len(data)}")
    try:
        message: PbMessage = cls.FromString(data)
    except DecodeError:
        raise malformed(f"expected a {name}, got {len(data)} bytes that are none") from None
    return message


def dump(message: Message) -> bytes:
    """The bytes of a protobuf message; equal messages give equal bytes."""
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def to_wire(value: Value) -> Message:
    """The protobuf message of a domain value. Prose longer than its bound is cut; a number nobody can use is left out."""
    message = PAIRS[type(value)]()
    for one in _fields_of(type(value)):
        one.put(message, getattr(value, one.name))
    return message


def from_wire(message: Message) -> Any:
    """The domain value of a protobuf message. Raises RejectedPayload('malformed') naming the field."""
    cls = _DOMAIN_OF[type(message)]
    return cls(**{one.name: one.take(message) for one in _fields_of(cls)})


def encode(value: Value) -> bytes:
    return dump(to_wire(value))


def decode(cls: type[Any], data: bytes) -> Any:
    """``data`` as a value of the domain class ``cls``. Raises RejectedPayload('malformed' or 'size')."""
    return from_wire(parse(PAIRS[cls], data))


# ---------------------------------------------------------------- fields


@dataclass(frozen=True, slots=True)
class _Field:
    """How one dataclass field travels."""

    name: str
    put: Callable[[Any, Any], None]
    take: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Codec:
    """How one value travels: ``put`` makes what protobuf stores, ``take`` checks and makes the domain value."""

    put: Callable[[Any], Any]
    take: Callable[[Any], Any]


def _fields_of(cls: Any) -> tuple[_Field, ...]:
    return _FIELDS[cls]


def _resolve(cls: type) -> tuple[_Field, ...]:
    hints = get_type_hints(cls)
    return tuple(_field(cls, one.name, hints[one.name]) for one in fields(cls))


def _field(cls: type, name: str, hint: Any) -> _Field:
    where = f"{cls.__name__}.{name}"
    if cls is domain.FragmentView and name == "receipts":
        return _Field(name, _put_receipts, _take_receipts)
    optional = _inner_of_optional(hint)
    if optional is not None:
        return _optional_field(name, where, optional)
    if get_origin(hint) is tuple:
        return _list_field(name, where, get_args(hint)[0])
    codec = _codec(name, where, hint)
    if hint in PAIRS:
        return _message_field(name, where, codec)

    def put(message: Any, value: Any) -> None:
        setattr(message, name, codec.put(value))

    return _Field(name, put, lambda message: codec.take(getattr(message, name)))


def _inner_of_optional(hint: Any) -> Any:
    if get_origin(hint) in (types.UnionType, Union):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        assert len(inner) == 1, hint
        return inner[0]
    return None


def _message_field(name: str, where: str, codec: _Codec) -> _Field:
    def put(message: Any, value: Any) -> None:
        getattr(message, name).CopyFrom(codec.put(value))

    def take(message: Any) -> Any:
        if not message.HasField(name):
            raise malformed(f"{where} is missing")
        return codec.take(getattr(message, name))

    return _Field(name, put, take)


def _optional_field(name: str, where: str, inner: Any) -> _Field:
    if get_origin(inner) is tuple:  # protobuf has no optional list: it is wrapped in an IntList
        items = _list_field("items", where, get_args(inner)[0])

        def put_list(message: Any, value: Any) -> None:
            if value is not None:
                getattr(message, name).SetInParent()
                items.put(getattr(message, name), value)

        return _Field(name, put_list, lambda message: items.take(getattr(message, name)) if message.HasField(name) else None)
    codec = _codec(name, where, inner)

    def put(message: Any, value: Any) -> None:
        if value is None or (inner is float and not math.isfinite(value)):
            return
        if inner in PAIRS:
            getattr(message, name).CopyFrom(codec.put(value))
        else:
            setattr(message, name, codec.put(value))

    return _Field(name, put, lambda message: codec.take(getattr(message, name)) if message.HasField(name) else None)


def _list_field(name: str, where: str, item: Any) -> _Field:
    most, cut = _LISTS.get(name, (limits.MAX_LIST_ITEMS, None))
    codec = _pair_codec(where, item) if get_origin(item) is tuple else _codec(name, where, item)

    def put(message: Any, value: tuple[Any, ...]) -> None:
        value = value if cut is None else value[cut]
        assert len(value) <= most, f"{where} has {len(value)} items, at most {most} travel"
        getattr(message, name).extend([codec.put(one) for one in value])

    def take(message: Any) -> tuple[Any, ...]:
        stored = getattr(message, name)
        if len(stored) > most:
            raise malformed(f"{where} has {len(stored)} items, expected at most {most}")
        return tuple(codec.take(one) for one in stored)

    return _Field(name, put, take)


def _pair_codec(where: str, item: Any) -> _Codec:
    assert get_args(item) == (int, int), where
    count = _int_codec(where, limits.MAX_INT)
    return _Codec(
        lambda pair: pb.ExpertTokens(expert=count.put(pair[0]), num_tokens=count.put(pair[1])),
        lambda stored: (count.take(stored.expert), count.take(stored.num_tokens)),
    )


# ---------------------------------------------------------------- values


def _codec(name: str, where: str, hint: Any) -> _Codec:
    if hint in PAIRS:
        return _Codec(to_wire, from_wire)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_codec(where, hint)
    if hint is Digest:
        return _Codec(digest_bytes, lambda raw: take_digest(raw, where))
    if hint is PeerId:
        return _text_codec(where, limits.MAX_PEER_CHARS, False, _PEER)
    if hint is FragmentId:
        return _text_codec(where, limits.MAX_FRAGMENT_CHARS, False, _FRAGMENT)
    if hint is str:
        return _text_codec(where, *_TEXT[name])
    if hint is int:
        return _int_codec(where, limits.MAX_FLOAT_BITS if name.endswith("_bits") else limits.MAX_INT)
    return _plain_codec(where, hint)


def _plain_codec(where: str, hint: Any) -> _Codec:
    if hint is bool:
        return _Codec(bool, bool)
    if hint is float:
        return _Codec(lambda value: value if math.isfinite(value) else 0.0, lambda value: _finite(value, where))
    if hint is bytes:
        return _bytes_codec(where, limits.MAX_PROOF_BYTES)
    raise AssertionError(f"{where}: no rule for {hint}")


def digest_bytes(digest: str) -> bytes:
    """A digest as it travels: 32 raw bytes."""
    assert is_digest(digest), f"expected 64 lower-case hex characters, got {digest[:80]!r}"
    return bytes.fromhex(digest)


def take_digest(raw: bytes, where: str) -> Digest:
    """32 raw bytes as a digest. Raises RejectedPayload('malformed')."""
    if len(raw) != 32:
        raise malformed(f"{where}: expected a digest of 32 bytes, got {len(raw)}")
    return Digest(raw.hex())


def role_to_wire(role: domain.Role) -> Any:
    return _enum_codec("role", domain.Role).put(role)


def role_from_wire(number: int, where: str) -> domain.Role:
    """Raises RejectedPayload('malformed') for a number no role has."""
    role: domain.Role = _enum_codec(where, domain.Role).take(number)
    return role


def take_text(text: str, most_chars: int, where: str) -> str:
    """``text`` when it is short enough and printable. Raises RejectedPayload('malformed')."""
    taken: str = _text_codec(where, most_chars, False).take(text)
    return taken


def take_fragment(text: str, where: str) -> FragmentId:
    """``text`` as a fragment id. Raises RejectedPayload('malformed')."""
    return FragmentId(_text_codec(where, limits.MAX_FRAGMENT_CHARS, False, _FRAGMENT).take(text))


def take_peer(text: str, where: str) -> PeerId:
    """``text`` as a peer id. Raises RejectedPayload('malformed')."""
    return PeerId(_text_codec(where, limits.MAX_PEER_CHARS, False, _PEER).take(text))


def _enum_codec(where: str, hint: type[StrEnum]) -> _Codec:
    wire = _ENUMS[hint]
    number_of = {one: wire.Value(f"{hint.__name__.upper()}_{one.name}") for one in hint}
    one_of = {number: one for one, number in number_of.items()}

    def take(number: int) -> StrEnum:
        if number not in one_of:
            raise malformed(f"{where}: expected one of {', '.join(hint)}, got number {number}")
        return one_of[number]

    return _Codec(lambda value: number_of[value], take)


def _text_codec(where: str, most_chars: int, is_cut: bool, pattern: re.Pattern[str] | None = None) -> _Codec:
    def fault(text: str) -> str | None:
        if len(text) > most_chars:
            return f"{where}: expected at most {most_chars} characters, got {len(text)}"
        if pattern is not None and not pattern.fullmatch(text):
            return f"{where}: {text!r} has not the expected form"
        if _CONTROL.search(text):
            return f"{where}: expected printable text, got {text[:80]!r}"
        return None

    def put(text: str) -> str:
        if is_cut:
            text = _CONTROL.sub(" ", text)
            text = text if len(text) <= most_chars else text[: most_chars - 3] + "..."
        problem = fault(text)
        assert problem is None, problem
        return text

    def take(text: str) -> str:
        if problem := fault(text):
            raise malformed(problem)
        return text

    return _Codec(put, take)


def _int_codec(where: str, most: int) -> _Codec:
    def put(value: int) -> int:
        assert 0 <= value <= most, f"{where}: {value} is outside 0..{most}"
        return int(value)

    def take(value: int) -> int:
        if not 0 <= value <= most:
            raise malformed(f"{where}: expected a number in 0..{most}, got {value}")
        return value

    return _Codec(put, take)


def _bytes_codec(where: str, most_bytes: int) -> _Codec:
    def put(value: bytes) -> bytes:
        assert len(value) <= most_bytes, f"{where}: {len(value)} bytes, at most {most_bytes} travel"
        return value

    def take(value: bytes) -> bytes:
        if len(value) > most_bytes:
            raise malformed(f"{where}: expected at most {most_bytes} bytes, got {len(value)}")
        return value

    return _Codec(put, take)


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise malformed(f"{where}: expected a finite number, got {value}")
    return value


# ---------------------------------------------------------------- receipts of a view


def _put_receipts(message: Any, pairs: tuple[tuple[PeerId, PeerId], ...]) -> None:
    assert len(pairs) <= limits.MAX_RECEIPT_PAIRS, f"{len(pairs)} receipts in one view"
    index: dict[PeerId, int] = {}
    numbers = [index.setdefault(peer, len(index)) for pair in pairs for peer in pair]
    peer_codec = _codec("peers", "FragmentView.receipts", PeerId)
    message.receipts.peers.extend([peer_codec.put(peer) for peer in index])
    message.receipts.pairs.extend(numbers)


def _take_receipts(message: Any) -> tuple[tuple[PeerId, PeerId], ...]:
    where, stored = "FragmentView.receipts", message.receipts
    if len(stored.peers) > limits.MAX_LIST_ITEMS or len(stored.pairs) > 2 * limits.MAX_RECEIPT_PAIRS or len(stored.pairs) % 2:
        raise malformed(f"{where}: {len(stored.peers)} peers and {len(stored.pairs)} indices are no list of pairs")
    peers = [take_peer(peer, where) for peer in stored.peers]
    if any(number >= len(peers) for number in stored.pairs):
        raise malformed(f"{where}: an index is outside the {len(peers)} peers named")
    numbers = iter(stored.pairs)
    return tuple((peers[sender], peers[holder]) for sender, holder in zip(numbers, numbers, strict=True))


# At import: resolving type hints compiles them, and nothing is compiled while foreign bytes are read.
_FIELDS = {cls: _resolve(cls) for cls in PAIRS}
