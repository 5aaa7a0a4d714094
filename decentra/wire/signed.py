"""The signed envelope: seal a body for one purpose in one run, and open it again only if all of that holds. No network, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from decentra.errors import DecentraError, RejectedPayload
from decentra.identity import Keypair, is_signed, peer_id_of, public_key_of
from decentra.ids import PeerId, RunId
from decentra.pb import messages_pb2 as pb
from decentra.wire import limits
from decentra.wire.convert import dump, parse


@dataclass(frozen=True, slots=True)
class Opened:
    """What a valid statement says: the exact ``body`` bytes, whose they are and until when (Unix seconds, 0: for ever)."""

    body: bytes
    signer: bytes
    not_after_s: int
    signature: bytes = b""

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.signer)


def purpose_of(kind: str, run: RunId) -> str:
    """What a signature is for: it counts for no other kind and in no other run."""
    return f"{kind}/{run}"


def _signed_bytes(not_after_s: int, body: bytes) -> bytes:
    return not_after_s.to_bytes(8, "big") + body


def seal(key: Keypair, kind: str, run: RunId, body: Message | bytes, *, not_after_s: float = 0) -> bytes:
    """A SignedStatement as bytes. Equal arguments give equal bytes (Ed25519 is deterministic)."""
    raw = body if isinstance(body, bytes) else dump(body)
    purpose, expiry_s = purpose_of(kind, run), int(not_after_s)
    signature = key.sign(purpose, _signed_bytes(expiry_s, raw))
    return dump(pb.SignedStatement(purpose=purpose, body=raw, signer=key.public, signature=signature, not_after_s=expiry_s))


def sign(key: Keypair, kind: str, run: RunId, body: bytes) -> bytes:
    """The signature of ``seal`` without an expiry, alone: 64 bytes for whoever has the body."""
    return key.sign(purpose_of(kind, run), _signed_bytes(0, body))


def is_sealed(signature: bytes, kind: str, run: RunId, body: bytes, peer: PeerId) -> bool:
    """Whether ``peer`` signed ``body`` for ever: what ``sign`` makes, and ``seal`` without an expiry."""
    try:
        return len(signature) == 64 and is_signed(public_key_of(peer), purpose_of(kind, run), _signed_bytes(0, body), signature)
    except DecentraError:
        return False  # no peer id


def open_sealed(
    data: bytes,
    kind: str,
    run: RunId,
    *,
    signer: bytes | PeerId | None,
    now_s: float | None = None,
    max_bytes: int = limits.MAX_STATEMENT_BYTES,
) -> Opened:
    """Check a statement and return what it says.

    ``signer``: the public key or peer id that must have signed; None accepts anybody and the caller looks at ``Opened.signer``.
    ``now_s``: Unix seconds; given, an expired statement is refused. Raises RejectedPayload with the reason ``malformed``,
    ``size``, ``run`` (another run), ``purpose`` (another kind), ``signer`` (another key), ``signature`` (forged) or ``expired``.
    """
    statement = parse(pb.SignedStatement, data, max_bytes=max_bytes)
    if len(statement.signer) != 32 or len(statement.signature) != 64 or statement.not_after_s < 0:
        raise RejectedPayload("malformed", f"expected a {kind} signed with Ed25519 (32-byte key, 64-byte signature), got none")
    sender = peer_id_of(statement.signer)
    _check_purpose(statement.purpose, kind, run, sender)
    if signer is not None and statement.signer != (expected := signer if isinstance(signer, bytes) else _key_of(signer)):
        raise RejectedPayload("signer", f"expected a {kind} signed by {peer_id_of(expected)}, it is signed by {sender}", peer=sender)
    if not is_signed(statement.signer, statement.purpose, _signed_bytes(statement.not_after_s, statement.body), statement.signature):
        raise RejectedPayload("signature", f"the signature under this {kind} is not {sender}'s", peer=sender)
    if now_s is not None and 0 < statement.not_after_s < now_s:
        late_s = now_s - statement.not_after_s
        raise RejectedPayload("expired", f"this {kind} expired {late_s:.0f} s ago; make a new one, or set the clock right", peer=sender)
    return Opened(statement.body, statement.signer, statement.not_after_s, statement.signature)


def _check_purpose(purpose: str, kind: str, run: RunId, sender: PeerId) -> None:
    if purpose == purpose_of(kind, run):
        return
    theirs_kind, _, theirs_run = purpose[:200].partition("/")
    if theirs_kind == kind:
        raise RejectedPayload("run", f"expected a {kind} of run {run}, got one of run {theirs_run}", peer=sender)
    raise RejectedPayload("purpose", f"expected a {kind}, got a statement signed as {theirs_kind!r}", peer=sender)


def _key_of(peer: PeerId) -> bytes:
    try:
        return public_key_of(peer)
    except DecentraError as error:
        raise RejectedPayload("signer", str(error), peer=peer[:64]) from None
