"""Whether a ledger's lines were written by services that the run key vouches for, one after the other, and whether members said what they are said to
have said. No files, no network, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from decentra.errors import IntegrityError, Refused, RejectedPayload
from decentra.identity import is_signed
from decentra.ids import FragmentId, PeerId, RunId, short
from decentra.protocol.ledger import FIRST, Certified, Confirmed, Ledger, Record, RolledBack, Settled, Started
from decentra.protocol.messages import Attestation, Merge, Offer, Told
from decentra.wire.frames import is_proven, is_told, offer_of, open_fact
from decentra.wire.signed import purpose_of
from decentra.wire.trust import LEDGER, ServiceCertificate, TrustChain

SIGNATURE_BYTES = 64


def open_record(sealed: bytes) -> tuple[bytes, bytes]:
    """(signature, line) of one sealed record. Raises IntegrityError."""
    if len(sealed) <= SIGNATURE_BYTES:
        raise IntegrityError(f"a ledger record of {len(sealed)} bytes is too short to hold a signature")
    return sealed[:SIGNATURE_BYTES], sealed[SIGNATURE_BYTES:]


@dataclass
class LedgerReader:
    """Reads sealed records in order. A line counts when the service whose certificate precedes it signed it; terms only grow.

    What precedes the first certificate is kept until that is read, or until ``finish``. ``where``: for messages.
    """

    chain: TrustChain
    where: str = "this ledger"
    ledger: Ledger = field(default_factory=Ledger)
    num_records: int = 0
    newest: ServiceCertificate | None = None
    heard: Sequence[tuple[PeerId, Told]] = ()  # what members say the service told them, before this ledger was asked for
    num_compared: int = 0  # of those
    _lines: dict[tuple[FragmentId, int], Told] = field(default_factory=dict)  # what this ledger says at the same places
    _unvouched: list[tuple[int, bytes, bytes]] = field(default_factory=list)  # (position, line, signature)

    def accept(self, sealed: bytes) -> Record:
        """The next record. Raises IntegrityError where the chain is broken or nobody vouches for the line."""
        signature, line = open_record(sealed)
        record = self.ledger.accept(line)
        self.vouch(line, signature, record)
        if self.heard and isinstance(record, Started):
            self._lines |= {(f, 0): Told(f, 0, 0, FIRST, 0, anchor) for f, anchor in record.genesis}
        if self.heard and isinstance(record, Confirmed | RolledBack):
            seq, digest = self.ledger.heads[record.fragment]
            self._lines[record.fragment, seq] = Told(record.fragment, 0, seq, digest, record.height, record.anchor)
        return record

    def vouch(self, line: bytes, signature: bytes, record: Record) -> None:
        """Judge one line whose chain was checked elsewhere. Raises IntegrityError."""
        self.num_records += 1
        if isinstance(record, Certified):
            self._begin(record)
        if self.newest is None:
            self._unvouched.append((self.num_records, line, signature))
        else:
            self._check(((self.num_records, line, signature),), self.newest.service_public)

    def finish(self, public: bytes) -> None:
        """The end of what there is. ``public``: the key of the service that has it, for a ledger without any certificate. Raises IntegrityError."""
        unvouched, self._unvouched = self._unvouched, []
        self._check(unvouched, public)

    def compare(self) -> None:
        """Raise IntegrityError where this ledger, read to its end, is not the one that a member was told of; words of earlier terms say nothing."""
        for peer, told in self.heard:
            newest = self.newest
            if newest is None or told.term != newest.term or not is_told(told, self.chain.run_id, newest.service_public):
                continue
            line = self._lines.get((told.fragment, told.seq))
            if line is None or (line.line, line.height, line.anchor) != (told.line, told.height, told.anchor):
                here = (
                    "is none that moves an anchor"
                    if line is None
                    else f"made anchor {line.anchor[:12]} of height {line.height} the confirmed one"
                )
                raise IntegrityError(
                    f"the averaging service told two stories: line {told.seq} of {told.fragment} {here} in {self.where}; {short(peer)} was told, with the"
                    f" service's signature, that it made anchor {told.anchor[:12]} of height {told.height} so. Ask the organiser over another channel"
                )
            self.num_compared += 1

    def _begin(self, record: Certified) -> None:
        try:
            certificate = self.chain.check_certificate(record.certificate, None)
        except Refused as error:
            raise IntegrityError(f"{self.where}: record {self.num_records} brings a certificate that does not hold: {error}") from None
        before = self.newest
        is_other = before is not None and before.service_public != certificate.service_public
        if certificate.term != record.term or (before is not None and certificate.term < before.term + is_other):
            raise IntegrityError(
                f"{self.where}: record {self.num_records} is by a service of term {certificate.term}"
                + ("" if before is None else f" after one of term {before.term}")
                + "; a service that takes over has a higher term: two services wrote here"
            )
        self.newest = certificate
        self.finish(certificate.service_public)

    def _check(self, lines: Iterable[tuple[int, bytes, bytes]], public: bytes) -> None:
        purpose = purpose_of(LEDGER, self.chain.run_id)
        for number, line, signature in lines:
            if not is_signed(public, purpose, line, signature):
                raise IntegrityError(
                    f"{self.where}: record {number} is not signed by the run's service; it was edited, or written by another one:"
                    " restore it from a backup, or ask the organiser over another channel"
                )


@dataclass
class Words:
    """What members are said to have offered, merged and attested: so many of each with their signature, and without any (of older versions)."""

    num_offers: int = 0
    num_merges: int = 0
    num_attestations: int = 0
    num_unsigned: int = 0

    @property
    def num_signed(self) -> int:
        return self.num_offers + self.num_merges + self.num_attestations


def check_words(records: Iterable[Record], run: RunId) -> Words:
    """Raise IntegrityError for the first word in the ledger that its member did not sign."""
    found = Words()
    for record in records:
        if isinstance(record, Settled):
            settlement = record.settlement
            for entry in settlement.entries:
                if found.num_offers and not entry.proof:  # this service keeps signatures: it has none
                    raise _unsaid(offer_of(settlement, entry))
                found.num_offers += _is_said(offer_of(settlement, entry), run, found)
            if (merged := settlement.merged) is not None:
                for peer, proof in zip(settlement.reducers, record.proofs, strict=False):
                    merge = Merge(settlement.fragment, settlement.round, peer, merged.packet, merged.num_bytes, merged.residual, proof)
                    found.num_merges += _is_said(merge, run, found)
                found.num_unsigned += max(0, len(settlement.reducers) - len(record.proofs))
        elif isinstance(record, Confirmed):
            for peer, proof in zip(record.attesters, record.proofs, strict=False):
                found.num_attestations += _is_said(Attestation(record.fragment, record.round, peer, record.anchor, proof), run, found)
            found.num_unsigned += len(record.attesters) - min(len(record.attesters), len(record.proofs))
    return found


def _is_said(fact: Offer | Merge | Attestation, run: RunId, found: Words) -> bool:
    if not fact.proof:
        found.num_unsigned += 1
        return False
    if len(fact.proof) == SIGNATURE_BYTES and is_proven(fact, run):
        return True
    with suppress(RejectedPayload):  # ledgers of protocol 3 hold the whole signed statement
        if open_fact(type(fact), fact.proof, run, fact.peer) == fact:
            return True
    raise _unsaid(fact)


def _unsaid(fact: Offer | Merge | Attestation) -> IntegrityError:
    what = {Offer: "offered", Merge: "merged", Attestation: "attested"}[type(fact)]
    return IntegrityError(
        f"the ledger says that {short(fact.peer)} {what} this in round {fact.round} of {fact.fragment}, and there is no signature of that peer under it;"
        " the averaging service is not to be trusted, ask the organiser over another channel"
    )
