"""``history``: the run's ledger, fetched from its service, checked line by line, as a table and as a plot of tokens per expert."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decentra.cli.console import LogEvents
from decentra.cli.look import watching
from decentra.config import Manifest, PeerConfig
from decentra.errors import RejectedPayload
from decentra.identity import Keypair, save_key
from decentra.ids import PeerId, short
from decentra.invite import Invite
from decentra.protocol.ledger import Record
from decentra.protocol.messages import Heard, Told
from decentra.wire.convert import decode
from decentra.wire.ledgers import LedgerReader, check_words
from decentra.wire.trust import TrustChain

PAGE = 2000
ATTACH_S = 20.0


async def read_ledger(invite: Invite, heard: Sequence[tuple[PeerId, Told]] | None = None) -> tuple[Manifest, list[Record], int | None]:
    """(manifest, every record, how many of ``heard`` could be compared with them; None where nothing was to be).

    Raises IntegrityError at the first line that its chain or the service's key does not vouch for, and where members were told otherwise.
    """
    records: list[Record] = []
    async with watching(invite) as client:
        described = await client.describe()
        chain, where = TrustChain(invite.run_id, invite.run_public), f"the ledger from {described.address}"
        reader = LedgerReader(chain, where, heard=heard or ())
        while page := await client.ledger(len(records), PAGE):
            records += [reader.accept(sealed) for sealed in page]
        reader.finish(described.certificate.service_public)
        reader.compare()
    return described.manifest, records, None if heard is None else reader.num_compared


async def heard_by_members(invite: Invite) -> list[tuple[PeerId, Told]]:
    """What members say in the DHT that the service told them. Raises Unreachable."""
    from decentra.cli.wiring import gossip
    from decentra.gossip.exchange import NUM_TURNS

    events = LogEvents(run=invite.run_id[:8])
    with tempfile.TemporaryDirectory(prefix="decentra-history-") as scratch:
        save_key(Path(scratch) / "identity.key", Keypair.generate())
        config, trust = PeerConfig(name="history", role="watcher", listen=()), TrustChain(invite.run_id, invite.run_public)
        async with gossip(Path(scratch), invite.bootstrap, config, trust, bytes, events) as (node, exchange):
            await node.wait_attached(ATTACH_S)
            said = [one for turn in range(NUM_TURNS) for one in await exchange.hear(turn)]
    heard = []
    for peer, body in said:
        try:
            heard += [(peer, told) for told in decode(Heard, body).told]
        except RejectedPayload as error:
            events.emit("record-ignored", peer=short(peer), reason=error.reason, why=error.detail)
    return heard


async def read_and_compare(invite: Invite) -> tuple[Manifest, list[Record], int | None]:
    """The ledger, compared with what members were told before it was read."""
    return await read_ledger(invite, await heard_by_members(invite))


def summary(
    manifest: Manifest, records: list[Record], num_compared: int | None, csv_file: Path | None, plot_file: Path | None
) -> dict[str, Any]:
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
        "num_unsigned": words.num_unsigned, "num_compared": num_compared, "rounds_confirmed": len(done),
        "rounds_thin": sum(r.is_thin for r in done), "packet_bytes": sum(r.num_bytes for r in done),
        "tokens_per_expert": [int(curve[-1][1]) for curve in curves], "tokens_per_peer": tokens_per_peer(records),
        "csv": None if csv_file is None else str(csv_file), "plot": None if plot_file is None else str(plot_file),
        "curves": curves,
    }  # fmt: skip


def describe_history(found: dict[str, Any]) -> str:
    """A plot in text, and sums."""
    from decentra.status.plot import experts_text

    peers = ", ".join(f"{short(peer)} {tokens}" for peer, tokens in sorted(found["tokens_per_peer"].items(), key=lambda x: -x[1])[:8])
    compared = "" if found["num_compared"] is None else (
        f"; {found['num_compared']} confirmations that members were told of are in it" if found["num_compared"] else "; nobody said anything to compare"
    )  # fmt: skip
    return (
        f"{experts_text(found['curves'], found['name'] + ': tokens per expert over rounds of the trunk')}\n"
        f"{found['num_records']} ledger records and {found['num_signed']} words of members checked, {found['num_unsigned']} unsigned{compared}\n"
        f"{found['rounds_confirmed']} rounds confirmed ({found['rounds_thin']} thin)\n"
        f"tokens of the trunk, per peer: {peers}"
    )
