"""``history``: the run's ledger, fetched from its service, checked line by line, as a table and as a plot of tokens per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decentra.cli.look import watching
from decentra.config import Manifest
from decentra.ids import short
from decentra.invite import Invite
from decentra.protocol.ledger import Record
from decentra.wire.ledgers import LedgerReader, check_words
from decentra.wire.trust import TrustChain

PAGE = 2000


async def read_ledger(invite: Invite) -> tuple[Manifest, list[Record]]:
    """(manifest, every record). Raises IntegrityError at the first line that its chain or the service's key does not vouch for."""
    records: list[Record] = []
    async with watching(invite) as client:
        described = await client.describe()
        reader = LedgerReader(TrustChain(invite.run_id, invite.run_public), f"the ledger from {described.address}")
        while page := await client.ledger(len(records), PAGE):
            records += [reader.accept(sealed) for sealed in page]
        reader.finish(described.certificate.service_public)
    return described.manifest, records


def summary(manifest: Manifest, records: list[Record], csv_file: Path | None, plot_file: Path | None) -> dict[str, Any]:
    """Sums for people and programs; writes the files that were asked for."""
    from decentra.status.history import check_settlements, expert_curves, rounds, to_csv, tokens_per_peer
    from decentra.status.plot import experts_png

    check_settlements(manifest, records)
    words = check_words(records, manifest.run_id())
    done = rounds(records)
    curves = expert_curves(done, manifest.model.num_experts)
    if csv_file is not None:
        csv_file.write_text(to_csv(done))
    if plot_file is not None:
        experts_png(plot_file, curves, f"{manifest.name}: tokens per expert")
    return {
        "ok": True, "run": manifest.run_id(), "name": manifest.name, "num_records": len(records), "num_signed": words.num_signed,
        "num_unsigned": words.num_unsigned, "rounds_confirmed": len(done),
        "rounds_thin": sum(r.is_thin for r in done), "packet_bytes": sum(r.num_bytes for r in done),
        "tokens_per_expert": [int(curve[-1][1]) for curve in curves], "tokens_per_peer": tokens_per_peer(records),
        "csv": None if csv_file is None else str(csv_file), "plot": None if plot_file is None else str(plot_file),
        "curves": curves,
    }  # fmt: skip


def describe_history(found: dict[str, Any]) -> str:
    """A plot in text, and sums."""
    from decentra.status.plot import experts_text

    peers = ", ".join(f"{short(peer)} {tokens}" for peer, tokens in sorted(found["tokens_per_peer"].items(), key=lambda x: -x[1])[:8])
    return (
        f"{experts_text(found['curves'], found['name'] + ': tokens per expert over rounds of the trunk')}\n"
        f"{found['num_records']} ledger records and {found['num_signed']} words of members checked, {found['num_unsigned']} unsigned\n"
        f"{found['rounds_confirmed']} rounds confirmed ({found['rounds_thin']} thin)\n"
        f"tokens of the trunk, per peer: {peers}"
    )
