"""One frame of a member's stream to domain values and back; facts that others must be able to check are signed. No network, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, cast

from decentra.errors import DecentraError, IntegrityError, RejectedPayload
from decentra.identity import Keypair, peer_id_of
from decentra.ids import PeerId, RunId
from decentra.pb import messages_pb2 as pb
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    Entry,
    FragmentView,
    Goodbye,
    Heartbeat,
    Hello,
    Holding,
    MemberMessage,
    Merge,
    Offer,
    Receipt,
    Rejected,
    ServiceMessage,
    Settlement,
    SwarmView,
    Told,
)
from decentra.wire import limits
from decentra.wire.convert import decode, dump, encode, from_wire, malformed, parse, to_wire
from decentra.wire.signed import is_sealed, open_sealed, seal, sign

SIGNED: dict[type, str] = {Hello: "hello", Offer: "offer", Receipt: "receipt", Merge: "merge", Attestation: "attestation"}
_PLAIN: dict[type, str] = {Holding: "holding", Heartbeat: "heartbeat", Goodbye: "goodbye", Abstention: "abstention"}
_CLASS_OF = {kind: cls for cls, kind in (SIGNED | _PLAIN).items()}
_SERVICE: dict[type, str] = {FragmentView: "fragment", SwarmView: "swarm", Rejected: "rejected"}

_TOLD = "told"

Fact = Hello | Offer | Receipt | Merge | Attestation


def seal_fact(key: Keypair, run: RunId, fact: Fact, *, not_after_s: float = 0) -> bytes:
    """``fact`` signed by its peer. The proof field is never part of what is signed."""
    assert fact.peer == key.peer_id, f"a {SIGNED[type(fact)]} of {fact.peer} cannot be signed by {key.peer_id}"
    return seal(key, SIGNED[type(fact)], run, _body(fact), not_after_s=not_after_s)


def _body(fact: Fact) -> bytes:
    """What is signed."""
    return encode(replace(fact, proof=b"") if isinstance(fact, Offer | Merge | Attestation) else fact)


def is_proven(fact: Offer | Merge | Attestation, run: RunId) -> bool:
    """Whether its proof is its peer's signature under just this: anybody can say so, however it came here."""
    try:
        body = _body(fact)
    except (AssertionError, ValueError):  # values that cannot travel, out of a ledger: nobody signed them
        return False
    return is_sealed(fact.proof, SIGNED[type(fact)], run, body, fact.peer)


def sign_told(service_key: Keypair, run: RunId, told: Told) -> Told:
    """The service's word with its signature."""
    return replace(told, proof=sign(service_key, _TOLD, run, encode(replace(told, proof=b""))))


def is_told(told: Told, run: RunId, service_public: bytes) -> bool:
    """Whether the service with this key gave this word."""
    return is_sealed(told.proof, _TOLD, run, encode(replace(told, proof=b"")), peer_id_of(service_public))


def check_told(view: FragmentView, run: RunId, term: int, service_public: bytes) -> None:
    """Raise IntegrityError for a view whose confirmed anchor is not the signed word of the service of this term."""
    told, shown = view.told, (view.fragment, term, view.height, view.anchor)
    if told is not None and (told.fragment, told.term, told.height, told.anchor) == shown and is_told(told, run, service_public):
        return
    raise IntegrityError(
        f"the averaging service says that anchor {view.anchor[:12]}, height {view.height} of {view.fragment}, is confirmed, and does not sign that;"
        " nothing it says is believed, tell the organiser"
    )


def offer_of(settlement: Settlement, entry: Entry) -> Offer:
    """The offer that an entry stands for, with its sender's proof."""
    return Offer(
        settlement.fragment, settlement.round, entry.peer, settlement.base, entry.packet, entry.num_bytes, entry.num_tokens, entry.num_steps,
        entry.norm_bits, entry.proof,
    )  # fmt: skip


def open_fact(cls: type[Any], data: bytes, run: RunId, peer: PeerId | None, *, now_s: float | None = None) -> Any:
    """A signed Hello, Offer, Receipt, Merge or Attestation, signed by the peer it names; Offer, Merge and Attestation keep its signature as proof.

    ``peer``: who must have signed; None takes the signer. Raises RejectedPayload (reasons of ``open_sealed``).
    """
    most_bytes = limits.MAX_MESSAGE_BYTES if cls is Hello else limits.MAX_PROOF_BYTES
    opened = open_sealed(data, SIGNED[cls], run, signer=peer, now_s=now_s, max_bytes=most_bytes)
    try:
        fact = decode(cls, opened.body)
    except RejectedPayload as error:
        raise malformed(error.detail, opened.peer) from None
    if fact.peer != opened.peer:
        raise RejectedPayload("signer", f"this {SIGNED[cls]} names {fact.peer} and is signed by {opened.peer}", peer=opened.peer)
    if cls not in (Offer, Merge, Attestation):
        return fact
    if opened.not_after_s or _body(fact) != opened.body:  # its signature would prove nothing to who has only its values
        raise malformed(f"expected this {SIGNED[cls]} in its canonical bytes, and for ever; update decentra", opened.peer)
    return replace(fact, proof=opened.signature)


def member_frame(key: Keypair, run: RunId, message: MemberMessage, *, not_after_s: float = 0) -> bytes:
    """A member's message as the bytes of one MemberFrame, signed where its kind asks for it. ``not_after_s``: of a Hello."""
    if isinstance(message, Hello | Offer | Receipt | Merge | Attestation):
        return dump(pb.MemberFrame(**cast(Any, {SIGNED[type(message)]: seal_fact(key, run, message, not_after_s=not_after_s)})))
    return dump(pb.MemberFrame(**cast(Any, {_PLAIN[type(message)]: to_wire(message)})))


def parse_member_frame(data: bytes, run: RunId, peer: PeerId) -> MemberMessage:
    """One frame of ``peer``'s stream after its hello. Raises RejectedPayload; its peer is always ``peer``."""
    try:
        return _parse_member_frame(data, run, peer)
    except RejectedPayload as error:
        raise RejectedPayload(error.reason, error.detail, peer=peer, round=error.round) from None


def _parse_member_frame(data: bytes, run: RunId, peer: PeerId) -> MemberMessage:
    frame = parse(pb.MemberFrame, data, max_bytes=limits.MAX_FRAME_BYTES)
    kind = frame.WhichOneof("body")
    if kind is None:
        raise malformed("expected a message, got an empty frame or one of a newer protocol")
    cls = _CLASS_OF[kind]
    if cls is Hello:
        raise malformed("a hello comes once, as the first message; open a new stream to say something else")
    if cls in SIGNED:
        return cast(MemberMessage, open_fact(cls, getattr(frame, kind), run, peer))
    message = cast(MemberMessage, from_wire(getattr(frame, kind)))
    if message.peer != peer:
        raise RejectedPayload("signer", f"this {kind} names {message.peer}, expected the stream's own peer")
    return message


def open_hello(data: bytes, run: RunId, peer: PeerId, now_s: float) -> Hello:
    """The first frame of ``peer``'s stream: a Hello it signed for these minutes. Raises RejectedPayload."""
    frame = parse(pb.MemberFrame, data)
    if frame.WhichOneof("body") != "hello":
        raise malformed("expected a hello as the first message of the stream", peer)
    hello: Hello = open_fact(Hello, frame.hello, run, peer, now_s=now_s)
    not_after_s = parse(pb.SignedStatement, frame.hello).not_after_s
    if not now_s <= not_after_s <= now_s + limits.MAX_FRESH_S:
        raise RejectedPayload("expired", f"a hello has to expire within {limits.MAX_FRESH_S:.0f} s", peer=peer)
    return hello


def welcome_frame(server_time_s: float) -> bytes:
    return dump(pb.ServiceFrame(welcome=pb.Welcome(server_time_s=server_time_s)))


def is_welcome(data: bytes) -> bool:
    """Whether a service's frame says that the hello was taken. Raises RejectedPayload('malformed')."""
    return bool(parse(pb.ServiceFrame, data).WhichOneof("body") == "welcome")


def service_frame(message: ServiceMessage) -> bytes:
    """A service's message as the bytes of one ServiceFrame."""
    return dump(pb.ServiceFrame(**cast(Any, {_SERVICE[type(message)]: to_wire(message)})))


def parse_service_frame(data: bytes) -> ServiceMessage:
    """Raises RejectedPayload('malformed')."""
    frame = parse(pb.ServiceFrame, data)
    kind = frame.WhichOneof("body")
    if kind is None or kind == "welcome":
        raise malformed("expected a view, got an empty frame or one of a newer protocol", "the averaging service")
    return cast(ServiceMessage, from_wire(getattr(frame, kind)))


class ProofChecker:
    """Checks what a service says others offered, open or settled, against their signatures; remembers the last ``num_remembered`` good ones."""

    def __init__(self, run: RunId, num_remembered: int = 16_384) -> None:
        self._run, self._num_remembered = run, num_remembered
        self._good: OrderedDict[bytes, Offer] = OrderedDict()

    def check(self, view: FragmentView) -> tuple[FragmentView, list[DecentraError]]:
        """``view`` without the offers that their senders did not sign, and without settlements that hold such; an error for each."""
        errors: list[DecentraError] = []
        offers = tuple(offer for offer in view.offers if self._is_good(offer, errors))
        settlement = self._checked(view.settlement, errors)
        recent = tuple(replace(o, settlement=self._checked(o.settlement, errors)) for o in view.recent)
        return (replace(view, offers=offers, settlement=settlement, recent=recent) if errors else view), errors

    def _checked(self, settlement: Settlement | None, errors: list[DecentraError]) -> Settlement | None:
        if settlement is None:
            return None
        is_good = [self._is_good(offer_of(settlement, entry), errors) for entry in settlement.entries]
        return settlement if all(is_good) else None

    def _is_good(self, offer: Offer, errors: list[DecentraError]) -> bool:
        if self._good.get(offer.proof) == offer:  # the proof field does not take part in this comparison
            return True
        if not is_proven(offer, self._run):
            what = "the service shows an offer that its sender did not sign"
            errors.append(RejectedPayload("signature", what, peer=offer.peer, round=offer.round))
            return False
        self._good[offer.proof] = offer
        if len(self._good) > self._num_remembered:
            self._good.popitem(last=False)
        return True
