"""What a run promises, checked while it happens: on every ledger record, offer, crash and move of an anchor. Changes nothing, decides nothing.

The promises:

1. A settlement holds only packets that their peers offered, and no packet counts twice.
2. A round is confirmed on the anchor before it, by two members unless it is marked thin.
3. From then on a disk that exists holds the anchor durably, until the next one is confirmed.
4. A peer moves only to a confirmed anchor.
5. One (peer, fragment, round) has one packet for ever, restarts included.
6. In one term members are told one line for a place in the ledger, and one anchor; nobody is told an earlier one after a later one.
7. What a peer trained is exactly once in the anchors, in its residual or in its live weights (``AuditedReplica``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decentra.bits import ONE_BITS, bits_float
from decentra.config import Manifest
from decentra.delta.packet import decode_packet
from decentra.errors import DecentraError
from decentra.ids import Digest, FragmentId, PeerId
from decentra.peer.replica import Replica
from decentra.protocol import ledger
from decentra.protocol.duties import Ending
from decentra.protocol.messages import MemberMessage, Offer, Phase, Settlement, Told
from decentra.sim.adapters import SimDisk, SimTrainer
from decentra.wire.ledgers import open_record

AUDIT_TOLERANCE = 1e-4  # sums of a few hundred fp32 steps of at most 0.01

Disks = Callable[[], Mapping[PeerId, SimDisk]]


@dataclass
class Promises:
    """The record of what was said and confirmed, and the list of broken promises in words."""

    manifest: Manifest
    disks: Disks
    broken: list[str] = field(default_factory=list)
    records: list[ledger.Record] = field(default_factory=list)
    _ledger: ledger.Ledger = field(default_factory=ledger.Ledger)
    _offers: dict[tuple[PeerId, FragmentId, int], Digest] = field(default_factory=dict)
    _settled: dict[tuple[FragmentId, int], Settlement] = field(default_factory=dict)
    _num_roster: dict[tuple[FragmentId, int], int] = field(default_factory=dict)
    _used: set[tuple[FragmentId, Digest]] = field(default_factory=set)
    _told: dict[tuple[int, FragmentId, int], Told] = field(default_factory=dict)
    _heard: dict[tuple[PeerId, int, FragmentId], int] = field(default_factory=dict)
    _confirmed: set[tuple[FragmentId, Digest]] = field(init=False)
    _current: dict[FragmentId, tuple[Digest, bool]] = field(init=False)  # anchor, is it thin

    def __post_init__(self) -> None:
        self._confirmed = set(self.manifest.genesis.items())
        self._current = {f: (digest, True) for f, digest in self.manifest.genesis.items()}

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def on_sent(self, message: MemberMessage) -> None:
        """A member's message left its process."""
        if isinstance(message, Offer):
            key = (message.peer, message.fragment, message.round)
            known = self._offers.setdefault(key, message.packet)
            self.expect(known == message.packet, f"{key} was offered with two digests: {known[:12]} and {message.packet[:12]}")

    def on_told(self, peer: PeerId, told: Told) -> None:
        """The service told a member of a confirmed anchor."""
        before = self._heard.get((peer, told.term, told.fragment), 0)
        self.expect(before <= told.seq, f"{peer} was told of line {before} of {told.fragment} and then of line {told.seq}")
        self._heard[peer, told.term, told.fragment] = told.seq
        known = self._told.setdefault((told.term, told.fragment, told.seq), told)
        self.expect(known == told, f"two stories of line {told.seq} of {told.fragment}: {known.anchor[:12]} and {told.anchor[:12]}")

    def on_records(self, lines: Sequence[bytes]) -> None:
        """Ledger records became durable."""
        for line in lines:
            try:
                record = self._ledger.accept(open_record(line)[1])
            except DecentraError as error:
                self.broken.append(f"the ledger does not continue: {error}")
                continue
            self.records.append(record)
            self._on_record(record)

    def on_moved(self, peer: PeerId, fragment: FragmentId, anchor: Digest, how: str) -> None:
        """A live peer made ``anchor`` its own."""
        self.expect((fragment, anchor) in self._confirmed, f"{peer} moved {fragment} to {anchor[:12]} ({how}), which nobody confirmed")

    def check_disks(self, when: str) -> None:
        """Every anchor confirmed by two is durable on some disk."""
        for fragment, (anchor, thin) in self._current.items():
            if not thin:
                self.expect(self._num_durable(anchor) > 0, f"after {when} no disk holds anchor {anchor[:12]} of {fragment}")

    def _num_durable(self, anchor: Digest) -> int:
        return sum(f"blob-{anchor}" in disk.durable for disk in self.disks().values())

    def _on_record(self, record: ledger.Record) -> None:
        match record:
            case ledger.Opened():
                self._num_roster[record.fragment, record.round] = len(record.holders) + len(record.keepers)
                self.expect(
                    record.base == self._current[record.fragment][0], f"round {record.round} of {record.fragment} opens on another anchor"
                )
            case ledger.Settled(settlement):
                self._on_settled(settlement)
            case ledger.Confirmed():
                self._on_confirmed(record)
            case ledger.RolledBack():
                key = (record.fragment, record.anchor)
                self.expect(key in self._confirmed, f"{record.fragment} rolled back to {record.anchor[:12]}, which nobody confirmed")
                self._current[record.fragment] = (record.anchor, True)
            case ledger.GaveUp(phase=phase):
                self.expect(phase in (Phase.ABANDONED, Phase.VOID), f"a round ended as {phase}")

    def _on_settled(self, settlement: Settlement) -> None:
        self._settled[settlement.fragment, settlement.round] = settlement
        for entry in settlement.entries:
            offered = self._offers.get((entry.peer, settlement.fragment, settlement.round))
            self.expect(
                offered == entry.packet, f"round {settlement.round} of {settlement.fragment} settled a packet {entry.peer} never offered"
            )

    def _on_confirmed(self, record: ledger.Confirmed) -> None:
        settlement, where = self._settled[record.fragment, record.round], f"round {record.round} of {record.fragment}"
        self.expect(settlement.base == self._current[record.fragment][0], f"{where} was confirmed on a stale anchor")
        num_attesters, num_roster = len(set(record.attesters)), self._num_roster[record.fragment, record.round]
        self.expect(num_attesters >= min(2, num_roster), f"{where} was confirmed by one of {num_roster}")
        self.expect(record.thin == (num_attesters == 1), f"{where}: thin is {record.thin}, attesters are {record.attesters}")
        for entry in settlement.entries:
            key = (record.fragment, entry.packet)
            self.expect(key not in self._used, f"packet {entry.packet[:12]} of {entry.peer} counts twice in {record.fragment}")
            self._used.add(key)
        self._confirmed.add((record.fragment, record.anchor))
        self._current[record.fragment] = (record.anchor, record.thin)
        num_durable, disks = self._num_durable(record.anchor), self.disks()
        needed = sum(peer in disks for peer in record.attesters)  # an attester's machine may be lost meanwhile
        self.expect(num_durable >= needed, f"{where} is confirmed, but only {num_durable} of {needed} attesters' disks hold its anchor")


@dataclass
class AuditedReplica(Replica):
    """The real replica; at each outcome it checks that nothing this peer trained was lost or counted twice.

    With anchor A, live z and residual e, ``(A - z) + e`` plus all packets that were applied, times their clips, is minus the sum of all inner steps.
    """

    promises: Promises | None = None
    trainer: SimTrainer | None = None
    _base_N: Tensor | None = None  # what (A - z) + e + moves was when the audit began
    _sent_N: Tensor | None = None

    def begin_audit(self) -> None:
        """The books open here: at the start, and after a recovery, which drops progress on purpose."""
        if self.trainer is not None and self.account is not None:
            self._base_N, self._sent_N = self._balance(), torch.zeros(self.fragment.num_elements, dtype=torch.float64)

    async def commit(self, number: int, anchor: Digest, ending: Ending, clip_bits: int = ONE_BITS) -> None:
        pending = None if self.account is None else self.account.pending
        await super().commit(number, anchor, ending, clip_bits)
        assert self.promises is not None
        self.promises.on_moved(self.me, self.fragment.id, anchor, f"commit of round {number}")
        if ending is Ending.APPLIED and pending is not None and self._sent_N is not None:
            self._sent_N = self._sent_N + bits_float(clip_bits) * decode_packet(pending.packet, self.fragment).dense().double()
        self._audit(f"round {number} was {ending}")

    async def cancel(self, number: int) -> None:
        await super().cancel(number)
        self._audit(f"round {number} was cancelled")

    async def recover(self, anchor: Digest, number: int, blob: bytes) -> None:
        await super().recover(anchor, number, blob)
        assert self.promises is not None
        self.promises.on_moved(self.me, self.fragment.id, anchor, "recovery")
        self.begin_audit()

    def _balance(self) -> Tensor:
        assert self.account is not None
        assert self.trainer is not None
        account, live_N = self.account, self.trainer.live[self.fragment.id]
        home_N = (account.anchor_state.anchor_N - live_N + account.residual_N).double()
        return home_N + self.trainer.moved[self.fragment.id]

    def _audit(self, after: str) -> None:
        if self._base_N is None or self._sent_N is None or self.promises is None:
            return
        off = float((self._balance() + self._sent_N - self._base_N).abs().max())
        self.promises.expect(off < AUDIT_TOLERANCE, f"{self.me}: after {after} the account of {self.fragment.id} is off by {off:.2g}")
