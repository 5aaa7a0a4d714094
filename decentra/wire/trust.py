"""The papers of a run and their chain to the run key: certificate, admission, token, command, manifest. No network, no clock.

The run key (offline) seals the manifest, the service certificate, tokens and commands; the service key named by the certificate seals
admissions. A peer's credentials are certificate and admission together, so that any peer can check any other without asking anybody.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from decentra.config import Manifest, manifest_from_bytes
from decentra.errors import ConfigError, Expired, Refused, RejectedPayload
from decentra.identity import Keypair, is_signed, peer_id_of
from decentra.ids import PeerId, RunId, digest_of
from decentra.invite import Invite, parse_invite
from decentra.pb import averaging_pb2 as pb
from decentra.protocol.messages import Role, Told
from decentra.wire import limits
from decentra.wire.convert import digest_bytes, dump, parse, role_from_wire, role_to_wire, take_digest, take_peer, take_text
from decentra.wire.frames import is_told
from decentra.wire.signed import Opened, open_sealed, purpose_of, seal

CERTIFICATE, ADMISSION, JOIN, COMMAND, MANIFEST, TOKEN = "service-certificate", "admission", "join", "command", "manifest", "token"
LEDGER, SUCCESSOR = "ledger", "successor"
MAX_CREDENTIALS_BYTES = 4096
MAX_TERM = 1 << 40
_WHAT_TO_DO = (
    "Whoever runs it has to stop it; to use that machine again, move host/ledger.db away and let it keep a copy:"
    " decentra averager RUN_DIR --standby --service THE_OTHER_ONE"
)
RECHECK_S, MAX_CHECKED = 60.0, 512  # signatures of shown credentials are checked again after; how many are remembered

_TOKEN_FORMAT = 1
_TOKEN_ID_BYTES = 8
_TOKEN_BYTES = 1 + _TOKEN_ID_BYTES + 4 + 8 + 1 + 64
_TOKEN_ROLES: tuple[Role | None, ...] = (None, Role.TRAINER, Role.KEEPER, Role.WATCHER)


@dataclass(frozen=True, slots=True)
class ServiceCertificate:
    """The run key's word for a service: its signing key, the sha256 of its TLS certificate, and until when (Unix seconds).

    ``term``: of two services that of the higher term is the run's; the other one was replaced and may not know it.
    """

    service_public: bytes
    tls_fingerprint: bytes
    not_after_s: int
    term: int = 1


@dataclass(frozen=True, slots=True)
class Admission:
    """The service's word for a member: it may take part in ``run`` as ``role`` until ``expires_at_s`` (Unix seconds)."""

    run: RunId
    peer: PeerId
    role: Role
    expires_at_s: int


@dataclass(frozen=True, slots=True)
class Token:
    """The run key's permission to join, ``uses`` times, until ``expires_at_s`` (Unix seconds); ``role`` None: as anything."""

    id: str  # 16 hex characters
    uses: int
    expires_at_s: int
    role: Role | None = None

    @staticmethod
    def generate(uses: int, expires_at_s: int, role: Role | None = None) -> Token:
        return Token(os.urandom(_TOKEN_ID_BYTES).hex(), uses, expires_at_s, role)


@dataclass(frozen=True, slots=True)
class Command:
    """An order of the organiser. ``nonce`` and expiry make each order count once."""

    kind: str
    argument: str
    nonce: bytes
    expires_at_s: int


# ---------------------------------------------------------------- sealing


def seal_certificate(run_key: Keypair, run: RunId, certificate: ServiceCertificate) -> bytes:
    body = pb.ServiceCertificate(
        service_public=certificate.service_public, tls_fingerprint=certificate.tls_fingerprint, not_after_s=certificate.not_after_s,
        term=certificate.term,
    )  # fmt: skip
    return seal(run_key, CERTIFICATE, run, body, not_after_s=certificate.not_after_s)


def seal_manifest(run_key: Keypair, manifest: Manifest) -> bytes:
    return seal(run_key, MANIFEST, manifest.run_id(), manifest.canonical_bytes())


def seal_admission(service_key: Keypair, admission: Admission) -> bytes:
    body = pb.Admission(
        run=digest_bytes(admission.run), peer=admission.peer, role=role_to_wire(admission.role), expires_at_s=admission.expires_at_s
    )
    return seal(service_key, ADMISSION, admission.run, body, not_after_s=admission.expires_at_s)


def pack_credentials(certificate: bytes, admission: bytes) -> bytes:
    """What a member shows at every door: the sealed certificate and its sealed admission."""
    return dump(pb.Credentials(certificate=certificate, admission=admission))


def seal_command(run_key: Keypair, run: RunId, kind: str, argument: str, *, expires_at_s: float) -> bytes:
    return seal(run_key, COMMAND, run, pb.Command(kind=kind, argument=argument, nonce=os.urandom(16)), not_after_s=expires_at_s)


def seal_token(run_key: Keypair, run: RunId, token: Token) -> bytes:
    """A token as 86 bytes: format, id (8), uses (4), expiry (8), role (1), signature (64). Raises ConfigError."""
    try:
        head = bytes([_TOKEN_FORMAT]) + bytes.fromhex(token.id) + token.uses.to_bytes(4, "big") + token.expires_at_s.to_bytes(8, "big")
    except (ValueError, OverflowError):
        raise ConfigError(f"a token needs 16 hex characters, fewer than 2**32 uses and an expiry, got {token}") from None
    head += bytes([_TOKEN_ROLES.index(token.role)])
    if len(head) + 64 != _TOKEN_BYTES or token.uses < 1:
        raise ConfigError(f"a token needs an id of 16 hex characters and at least 1 use, got {token}")
    return head + run_key.sign(purpose_of(TOKEN, run), head)


def seal_successor(run_key: Keypair, run: RunId, invite: str) -> str:
    """The invite line of the run that ``run`` goes on as, with the word of ``run``'s key: ``signature.invite``, the first as 128 hex characters."""
    return f"{run_key.sign(purpose_of(SUCCESSOR, run), invite.encode()).hex()}.{invite}"


# ---------------------------------------------------------------- checking


class TrustChain:
    """What a peer believes about one run: everything follows from the run id and the run key of its invite.

    All checks raise Refused with the reason in words. ``now_s`` is Unix time in seconds.
    """

    def __init__(self, run_id: RunId, run_public: bytes) -> None:
        self.run_id, self.run_public = run_id, run_public
        self.term = 0  # the highest that a service of this run was seen with
        self.service_public: bytes | None = None  # of that service; None: not known any more
        self._revoked: set[str] = set()
        self._checked: dict[bytes, tuple[Admission, float]] = {}

    def revoke(self, name: str) -> None:
        """From now on refuse this peer id or token id."""
        self._revoked.add(name)

    def check_certificate(self, sealed: bytes, now_s: float | None) -> ServiceCertificate:
        """``now_s`` None: of what was written under it once, expired or not."""
        body = self._open(sealed, CERTIFICATE, self.run_public, now_s)
        try:
            stored = parse(pb.ServiceCertificate, body)
            public, fingerprint = take_digest(stored.service_public, "service key"), take_digest(stored.tls_fingerprint, "TLS fingerprint")
        except RejectedPayload as error:
            raise Refused(f"service certificate: {error.detail}") from None
        if now_s is not None and stored.not_after_s < now_s:
            raise Expired("the service certificate has expired; the organiser has to issue a new one with the run key")
        if not 0 <= stored.term < MAX_TERM:
            raise Refused(f"a service certificate is of a term below {MAX_TERM}, this one of {stored.term}")
        return ServiceCertificate(bytes.fromhex(public), bytes.fromhex(fingerprint), stored.not_after_s, max(1, stored.term))

    def why_replaced(self, certificate: ServiceCertificate) -> str | None:
        """Why a service with a valid certificate is none of this run's any more; None while it is."""
        if certificate.term == self.term and self.service_public not in (None, certificate.service_public):
            return f"another service has term {certificate.term} as well; of two such the one that was met first counts. {_WHAT_TO_DO}"
        if certificate.term >= self.term:
            return None
        return f"it is of term {certificate.term}, and the run is served in term {self.term}. {_WHAT_TO_DO}"

    def note(self, certificate: ServiceCertificate) -> None:
        """This service was met, or wrote the ledger; from now on those of earlier terms are none of this run's."""
        if certificate.term >= self.term:
            self.term, self.service_public = certificate.term, certificate.service_public

    def is_told(self, told: Told) -> bool:
        """Whether the run's service of now gave this word for a confirmed anchor."""
        return self.service_public is not None and told.term == self.term and is_told(told, self.run_id, self.service_public)

    def contradicts(self, sealed: bytes) -> bool:
        """Whether a certificate that another member shows is of another service of this very term. A later term is noted, as if its service was met."""
        try:
            certificate = self.check_certificate(sealed, None)
        except Refused:
            return False
        if certificate.term > self.term:
            self.note(certificate)
        return certificate.term == self.term and self.service_public not in (None, certificate.service_public)

    def check_credentials(self, credentials: bytes, peer: PeerId, now_s: float) -> Admission:
        """The admission of ``peer``, whose identity the caller knows already (a stream's authenticated id, a signature)."""
        admission = self._admission(credentials, now_s)
        if admission.peer != peer:
            raise Refused(f"these credentials belong to {admission.peer}, {peer} showed them; a peer shows its own")
        return admission

    def check_bearer(self, credentials: bytes, now_s: float) -> Admission:
        """The admission inside credentials whose bearer is not known; enough to read, never to act for that peer."""
        return self._admission(credentials, now_s)

    def check_token(self, sealed: bytes, now_s: float) -> Token:
        if len(sealed) != _TOKEN_BYTES or sealed[0] != _TOKEN_FORMAT:
            raise Refused(f"this token has {len(sealed)} bytes and is none of format {_TOKEN_FORMAT}; ask the organiser for a new invite")
        head, signature = sealed[:-64], sealed[-64:]
        if not is_signed(self.run_public, purpose_of(TOKEN, self.run_id), head, signature):
            raise Refused("this token is forged or belongs to another run; ask the organiser for an invite of this run")
        role = head[-1]
        if role >= len(_TOKEN_ROLES):
            raise Refused(f"this token is for role number {role}, which this version does not know; update decentra")
        token = Token(head[1:9].hex(), int.from_bytes(head[9:13], "big"), int.from_bytes(head[13:21], "big"), _TOKEN_ROLES[role])
        if token.expires_at_s < now_s:
            raise Expired("the token of this invite has expired; ask the organiser for a new invite")
        if token.id in self._revoked:
            raise Refused("the organiser revoked this invite; ask for a new one")
        return token

    def check_command(self, sealed: bytes, now_s: float) -> Command:
        """Also refuses a command that would stay valid longer than ``MAX_FRESH_S``: each has to be remembered until it expires."""
        opened = self._opened(sealed, COMMAND, self.run_public, now_s)
        if not now_s <= opened.not_after_s <= now_s + limits.MAX_FRESH_S:
            raise Expired(f"a command has to expire within {limits.MAX_FRESH_S:.0f} s; check the clocks of both machines")
        try:
            stored = parse(pb.Command, opened.body)
            kind, argument = take_text(stored.kind, 64, "command"), take_text(stored.argument, limits.MAX_SUCCESSOR_CHARS, "argument")
        except RejectedPayload as error:
            raise Refused(f"command: {error.detail}") from None
        return Command(kind, argument, stored.nonce, opened.not_after_s)

    def check_successor(self, sealed: str) -> Invite:
        """The way to the run that this one goes on as. Raises InviteError, too."""
        signature, _, line = sealed[: limits.MAX_SUCCESSOR_CHARS].partition(".")
        try:
            is_ours = is_signed(self.run_public, purpose_of(SUCCESSOR, self.run_id), line.encode(), bytes.fromhex(signature))
        except ValueError:
            is_ours = False
        if not is_ours:
            raise Refused("the successor of this run is not named by its organiser's key; nobody follows there, tell the organiser")
        return parse_invite(line)

    def check_manifest(self, sealed: bytes) -> Manifest:
        body = self._open(sealed, MANIFEST, self.run_public, None)
        if RunId(digest_of(body)) != self.run_id:
            raise Refused(f"expected the manifest of run {self.run_id}, got one with digest {digest_of(body)}")
        try:
            return manifest_from_bytes(body, f"manifest of run {self.run_id[:8]}")
        except ConfigError as error:
            raise Refused(f"{error}; this run may need another version of decentra") from None

    def _admission(self, credentials: bytes, now_s: float) -> Admission:
        """Signatures of the same bytes are checked once in ``RECHECK_S``; expiry and revocation always."""
        known = self._checked.get(credentials)
        if known is None or not known[1] <= now_s < known[1] + RECHECK_S:
            admission = self._checked_admission(credentials, now_s)
            while len(self._checked) >= MAX_CHECKED:
                self._checked.pop(next(iter(self._checked)))
            self._checked[credentials] = known = (admission, now_s)
        self._check_admission(known[0], now_s)
        return known[0]

    def _checked_admission(self, credentials: bytes, now_s: float) -> Admission:
        if not credentials:
            raise Refused("no credentials were shown; join the run first")
        try:
            papers = parse(pb.Credentials, credentials, max_bytes=MAX_CREDENTIALS_BYTES)
        except RejectedPayload as error:
            raise Refused(f"credentials: {error.detail}") from None
        certificate = self.check_certificate(papers.certificate, now_s)
        body = self._open(papers.admission, ADMISSION, certificate.service_public, now_s)
        try:
            stored = parse(pb.Admission, body)
            run, peer = RunId(take_digest(stored.run, "run")), take_peer(stored.peer, "peer")
            admission = Admission(run, peer, role_from_wire(stored.role, "role"), stored.expires_at_s)
        except RejectedPayload as error:
            raise Refused(f"admission: {error.detail}") from None
        self._check_admission(admission, now_s)
        return admission

    def _check_admission(self, admission: Admission, now_s: float) -> None:
        if admission.run != self.run_id:
            raise Refused(f"this admission is for run {admission.run}, not for {self.run_id}")
        if admission.expires_at_s < now_s:
            raise Expired(f"the admission of {admission.peer} has expired; join again with a valid invite")
        if admission.peer in self._revoked:
            raise Refused(f"the organiser revoked {admission.peer}")

    def _open(self, sealed: bytes, kind: str, signer: bytes, now_s: float | None) -> bytes:
        return self._opened(sealed, kind, signer, now_s).body

    def _opened(self, sealed: bytes, kind: str, signer: bytes, now_s: float | None) -> Opened:
        try:
            return open_sealed(sealed, kind, self.run_id, signer=signer, now_s=now_s)
        except RejectedPayload as error:
            refusal = Expired if error.reason == "expired" else Refused
            raise refusal(f"{kind} ({error.reason}): {error.detail}") from None

    def __repr__(self) -> str:
        return f"TrustChain(run {self.run_id[:8]}, key {peer_id_of(self.run_public)})"
