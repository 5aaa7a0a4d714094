"""Whether a ledger's lines were written by services that the run key vouches for, one after the other. No files, no network, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from decentra.errors import IntegrityError, Refused
from decentra.identity import is_signed
from decentra.protocol.ledger import Certified, Ledger, Record
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
    _unvouched: list[tuple[int, bytes, bytes]] = field(default_factory=list)  # (position, line, signature)

    def accept(self, sealed: bytes) -> Record:
        """The next record. Raises IntegrityError where the chain is broken or nobody vouches for the line."""
        signature, line = open_record(sealed)
        record = self.ledger.accept(line)
        self.vouch(line, signature, record)
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
