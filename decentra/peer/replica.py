"""One fragment at this peer: its account, its live weights (at the trainer), its files. Does what the member machine says; decides nothing.

Files: ``F.record`` is the whole account, written before an offer leaves; ``F.note`` says how the newest round after it ended. Anchors and packets are
blobs. Every write has the next sequence number, so the newer of the two files is known; a file is written before memory changes, so a failed write
can be tried again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from decentra.bits import ONE_BITS, bits_float
from decentra.config import Manifest
from decentra.delta.account import Account, Pending, account_from_record, anchor_of_record, record_parts
from decentra.delta.aggregate import checked_clip
from decentra.delta.anchor import AnchorState, anchor_digest, decode_anchor, encode_anchor
from decentra.delta.decoded import Decoded
from decentra.delta.flat import with_untouched
from decentra.delta.packet import decode_packet, max_packet_bytes
from decentra.delta.reduce import reduce_packets
from decentra.delta.screen import screen
from decentra.errors import DecentraError, IntegrityError, RejectedPayload, TrainingError
from decentra.ids import MERGED, Digest, FragmentId, PeerId, digest_of
from decentra.modules import Fragment
from decentra.peer.applying import merge_entries, merged_delta, stepped
from decentra.peer.disk import write_atomic
from decentra.peer.judge import Packet
from decentra.peer.kept import KeptBlobs
from decentra.ports import Compute, Disk, Events, Exchange
from decentra.protocol import canonical
from decentra.protocol.duties import Ending
from decentra.protocol.messages import Merge, Offer, Settlement

_STAMP_BYTES = 8
MAX_SCREENED = 256  # decoded sparse packets kept of one fragment; more are decoded again
MAX_NORM_GROWTH = 2.0  # of a packet over the usual one


class SnapshotLike(Protocol):
    """Live weights at one moment: fp32 [N] on the CPU and the totals so far."""

    @property
    def live_N(self) -> Tensor: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def cursor(self) -> bytes: ...
    @property
    def has_bad_steps(self) -> bool: ...
    @property
    def untouched(self) -> Sequence[slice]: ...


class LiveWeights(Protocol):
    """The trainer as a replica sees it; each call happens between two inner steps."""

    @property
    def is_diverged(self) -> bool: ...
    async def snapshot(self, fragment: FragmentId) -> SnapshotLike: ...
    async def shift(self, fragment: FragmentId, delta_N: Tensor) -> None: ...
    async def load(self, fragment: FragmentId, values_N: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Note:
    """How the newest round ended here, and which blobs of this fragment are kept."""

    round: int
    ending: str  # an Ending or "reset"
    anchor: Digest
    seq: int
    clip_bits: int = ONE_BITS  # applied: float32 bits of what the packet was multiplied with
    kept: tuple[tuple[int, tuple[Digest, ...]], ...] = ()  # (round, blobs)
    residuals: tuple[Digest, ...] = ()  # a reducer's
    big: tuple[Digest, ...] = ()  # those of ``kept`` that are no packets but as large as the fragment


@dataclass
class Replica:
    """Account and files of one fragment. ``live`` is None at a keeper.

    ``archive_every`` > 0: packets of old rounds, and the anchor after every so many rounds, stay until their space is needed, so that the run can be
    replayed from its ledger.
    """

    fragment: Fragment
    manifest: Manifest
    me: PeerId
    exchange: Exchange
    disk: Disk
    compute: Compute
    events: Events
    live: LiveWeights | None = None
    codec: Callable[[], str] | None = None  # picks the next packet's codec; default: the manifest's
    archive_every: int = 0
    account: Account | None = None
    pending_offer: Offer | None = None
    _tentative: tuple[Digest, AnchorState] | None = None
    _is_mark: bool = True  # our anchor is one to replay from: its height says so, or how it came here is not known
    _is_next_mark: bool = True
    _seq: int = 0  # of the newest file
    _tokens_at_encode: int = 0
    _tokens_before: int = 0
    _screened: dict[Digest, Decoded] = field(default_factory=dict)  # sparse ones of the current round
    _usual_norm: float | None = None  # of the packets sent since the start
    _kept: KeptBlobs = field(init=False)

    def __post_init__(self) -> None:
        self._kept = KeptBlobs(self.exchange, self.events, keeps_packets=self.archive_every > 0)

    # ------------------------------------------------------------ start

    async def load(self) -> None:
        """Read what the last process left. A file that is damaged is reported and dropped; the fragment then recovers from others."""
        note = self._read_note()
        record = await self._read_record()
        record_seq = 0 if record is None else _seq_of(record)
        self._seq = record_seq if note is None else max(record_seq, note.seq)
        if note is not None:
            self._kept.restore(dict(note.kept), note.residuals, note.big)
        if record is not None and (note is None or record_seq > note.seq):
            self.account = record
        elif note is not None:
            self.account = await self._resolved(record, note)
        if self.account is not None:
            self.exchange.pin(self.account.anchor_digest)
        if self.account is not None and (pending := self.account.pending) is not None:
            self.pending_offer = self._offer(pending)
            await self._kept.hold(pending.round, self.pending_offer.packet, pending.packet)

    @property
    def anchor(self) -> Digest | None:
        return None if self.account is None else self.account.anchor_digest

    @property
    def place(self) -> tuple[str, int] | None:
        """Where this fragment stands: (anchor digest, round of the pending packet or 0)."""
        if self.account is None:
            return None
        return self.account.anchor_digest, self.account.pending.round if self.account.pending is not None else 0

    def initial_live(self) -> Tensor | None:
        """Where training goes on: live at the last encode while its outcome is open, else the anchor. fp32 [N]."""
        if self.account is None:
            return None
        pending = self.account.pending
        return self.account.anchor_state.anchor_N if pending is None else pending.live_N

    async def begin_training(self) -> None:
        """Tokens count from now on."""
        if self.live is not None:
            self._tokens_at_encode = self._tokens_before = (await self.live.snapshot(self.fragment.id)).num_tokens

    # ------------------------------------------------------------ the way of a delta

    async def encode(self, number: int, base: Digest) -> Offer:
        """Encode this peer's progress and make it durable. Raises TrainingError when there is nothing sound to offer."""
        account = self._account()
        if account.anchor_digest != base or self.live is None:
            raise IntegrityError(
                f"round {number} of {self.fragment.id} starts from {base[:12]}, this peer is at {account.anchor_digest[:12]}"
            )
        snapshot = await self.live.snapshot(self.fragment.id)
        if snapshot.has_bad_steps:
            if self.live.is_diverged:  # it will not come back by itself: start again from what the others have
                await self.live.load(self.fragment.id, account.anchor_state.anchor_N)
            raise TrainingError("the loss was not finite in this round's inner steps")
        num_tokens = max(0, snapshot.num_tokens - self._tokens_at_encode)
        account.extra = self._next_stamp(snapshot.cursor)
        live_N = with_untouched(snapshot.live_N, account.anchor_state.anchor_N, snapshot.untouched)
        codec = self._codec()
        beta = self.manifest.codec.error_feedback
        try:
            pending = await self.compute.run(
                functools.partial(
                    account.encode,
                    number,
                    live_N,
                    codec,
                    beta,
                    num_tokens,
                    snapshot.num_steps,
                    peer=self.me,
                    max_norm=self._max_norm(),
                )
            )
        except TrainingError:
            await self.live.load(self.fragment.id, account.anchor_state.anchor_N)
            raise
        try:
            await self._write_record(account)
            offer = self._offer(pending)
            await self._kept.hold(number, offer.packet, pending.packet)
        except OSError:
            account.cancelled()
            raise
        self._tokens_before, self._tokens_at_encode = self._tokens_at_encode, snapshot.num_tokens
        if (sent := pending.sent) is not None:
            norm = bits_float(pending.norm_bits)
            self._usual_norm = norm if self._usual_norm is None else (self._usual_norm + norm) / 2
            self._screened[offer.packet] = sent
        self.pending_offer = offer
        return offer

    def check_size(self, num_bytes: int, sender: PeerId, number: int) -> None:
        """Refuse to fetch what cannot be a packet of this fragment. Raises RejectedPayload('size')."""
        codec = self.manifest.codec
        most = max(max_packet_bytes(self.fragment, name) for name in (codec.name, codec.merged or codec.name, *self._dense_codec()))
        if num_bytes > most:
            detail = f"{num_bytes} bytes are offered, a packet of {self.fragment.id} has at most {most}"
            raise RejectedPayload("size", detail, peer=sender, round=number)

    async def check_packet(self, digest: Digest, data: bytes, sender: PeerId, number: int, norm_bits: int | None) -> Decoded:
        """Screen a foreign packet and the norm its sender states, then store and serve it. Raises RejectedPayload."""
        delta = await self.compute.run(self._screen, data, sender, number, norm_bits)
        if delta.is_sparse and len(self._screened) < MAX_SCREENED:
            self._screened[digest] = delta  # small: kept until its round is applied, so that it is decoded once
        await self._kept.hold(number, digest, data)
        return delta

    async def own_packet(self, number: int) -> Packet | None:
        """This peer's packet of a round as everybody decodes it, while it is pending."""
        if self.account is None or (pending := self.account.pending) is None or pending.round != number:
            return None
        delta = pending.sent
        if delta is None:
            delta = await self.compute.run(functools.partial(decode_packet, pending.packet, self.fragment))
        return Packet(self.me, delta, pending.num_tokens)

    async def keep_residual(self, digest: Digest, blob: bytes) -> None:
        """Hold what earlier merges left out, verified by its digest. Raises RejectedPayload when it is no residual of this fragment."""
        await self.compute.run(decode_anchor, self.fragment, blob)
        await self.exchange.put(digest, blob)
        self._kept.keep_residuals((*self._kept.residuals[-1:], digest))

    async def reduce(self, settlement: Settlement) -> Merge:
        """Make one packet of the settled ones and of what earlier merges left out, and keep it for the others."""
        deltas = await self._deltas(settlement)
        residual = None if settlement.residual is None else await self.exchange.read(settlement.residual)
        if settlement.residual is not None and residual is None:
            raise IntegrityError(f"residual {settlement.residual[:12]} of {self.fragment.id} is gone from this peer's store")
        packet, left = await self.compute.run(self._reduce, settlement, deltas, residual)
        digest, left_digest = await self.compute.run(digest_of, packet), await self.compute.run(digest_of, left)
        await self.exchange.put(left_digest, left)
        await self._kept.hold(settlement.round, digest, packet)
        self._kept.keep_residuals((*(() if settlement.residual is None else (settlement.residual,)), left_digest))
        return Merge(self.fragment.id, settlement.round, self.me, digest, len(packet), left_digest)

    async def apply(self, settlement: Settlement) -> Digest:
        """Compute the settlement's anchor and make it durable; what comes back is attested. The confirmed anchor stays beside it."""
        if self._tentative is not None:  # what was attested last was not confirmed: perhaps others computed something else
            await self._check_anchor()
        deltas = await self._deltas(settlement)
        state, blob, digest = await self.compute.run(self._aggregate, settlement, deltas)
        await self.exchange.put(digest, blob)
        self._set_tentative((digest, state))
        self._kept.keep(settlement.round, settlement.packets)
        self._is_next_mark = self.archive_every > 0 and settlement.height % self.archive_every == 0
        if not self._is_next_mark:
            self._kept.keep_whole(settlement.round, digest)
        return digest

    async def _check_anchor(self) -> None:
        """Memory may have changed under us: what we compute with has to be the anchor that was confirmed, else it is read again. Raises IntegrityError."""
        account = self._account()
        held = await self.compute.run(lambda: anchor_digest(encode_anchor(self.fragment, account.anchor_state)))
        if held == account.anchor_digest:
            return
        self.events.emit(
            "damaged-anchor", fragment=self.fragment.id, anchor=account.anchor_digest[:12], why="a bit turned over in memory; read again"
        )
        state = await self._stored_anchor(account.anchor_digest)
        if state is None:
            raise IntegrityError(
                f"anchor {account.anchor_digest[:12]} of {self.fragment.id} is damaged in memory and on disk; restart this peer, it fetches a sound one,"
                " and check the machine's memory"
            )
        account.anchor_state = state

    async def commit(self, number: int, anchor: Digest, ending: Ending, clip_bits: int = ONE_BITS) -> None:
        """The tentative anchor is confirmed: close the account's pending packet, what was clipped off it comes home, and move live."""
        checked_clip(self.me, clip_bits)  # before it is on disk
        account, state = self._account(), self._computed(anchor)
        if not (self.archive_every and self._is_mark):
            self._kept.keep_whole(number, account.anchor_digest)
        self._seq += 1
        note = Note(number, ending, anchor, self._seq, clip_bits)
        if ending is Ending.FOLLOWED and bool(account.residual_N.any()):
            # a note alone would forget the residual: the whole account goes first, and counts as newer than the note
            await self._write_record(
                Account(self.fragment, state, anchor, residual_N=account.residual_N, extra=self._next_stamp(cursor_of(account)))
            )
        await self._write_note(note)
        self._kept.move_pin(account.anchor_digest, anchor)
        self._is_mark = self._is_next_mark if anchor != account.anchor_digest else self._is_mark
        applied = functools.partial(account.applied, clip_bits=clip_bits)
        moves: dict[Ending, Callable[[AnchorState, Digest], Tensor]]
        moves = {Ending.APPLIED: applied, Ending.EXCLUDED: account.excluded, Ending.FOLLOWED: account.followed}
        shift_N = await self.compute.run(moves[ending], state, anchor)
        if self.live is not None:
            await self.live.shift(self.fragment.id, shift_N)
        self.pending_offer = None
        self._set_tentative(None)
        self._screened.clear()
        await self._kept.collect_garbage(self.anchor)

    async def cancel(self, number: int) -> None:
        """The pending packet's round gave nothing: as if it had never been encoded."""
        account = self._account()
        if (pending := account.pending) is None or pending.round != number:
            raise IntegrityError(f"round {number} of {self.fragment.id} has no pending packet that could be cancelled")
        extra = self._next_stamp(cursor_of(account))
        await self._write_record(
            Account(self.fragment, account.anchor_state, account.anchor_digest, residual_N=pending.residual_before_N, extra=extra)
        )
        account.cancelled()
        account.extra = extra
        self.pending_offer = None
        self._screened.clear()
        self._tokens_at_encode = self._tokens_before

    async def recover(self, anchor: Digest, number: int, blob: bytes) -> None:
        """Take a whole anchor, verified against its digest; local progress since the old one is dropped."""
        if await self.compute.run(digest_of, blob) != anchor:
            raise RejectedPayload("digest", f"anchor {anchor[:12]} of {self.fragment.id} came with other bytes")
        state = await self.compute.run(decode_anchor, self.fragment, blob)
        await self.exchange.put(anchor, blob)
        self._seq += 1
        await self._write_note(Note(number, "reset", anchor, self._seq))
        self._kept.move_pin(self.anchor, anchor)
        self._is_mark = True
        if self.account is None:
            self.account = Account(self.fragment, state, anchor)
        else:
            self.account.reset(state, anchor)
        self.pending_offer = None
        self._set_tentative(None)
        if self.live is not None:
            await self.live.load(self.fragment.id, state.anchor_N)
            await self.begin_training()

    # ------------------------------------------------------------ parts

    def _account(self) -> Account:
        if self.account is None:
            raise IntegrityError(f"{self.fragment.id} has no anchor at this peer yet")
        return self.account

    def _codec(self) -> str:
        codec = self.manifest.codec.name if self.codec is None else self.codec()
        return next(iter(self._dense_codec()), codec) if codec.startswith("topk") else codec

    def _dense_codec(self) -> tuple[str, ...]:
        """Merged row by row, a packet must hold every row that was trained: the codec used instead of sparse ones, if it is needed."""
        return ("int8",) if self.manifest.merge_of(self.fragment.id) == "rows" else ()

    def _max_norm(self) -> float | None:
        """Where codecs change, what a sparse one left behind must not come out at once."""
        if self.manifest.codec.sparsest is None or not self._usual_norm:
            return None
        return MAX_NORM_GROWTH * self._usual_norm

    def _offer(self, p: Pending) -> Offer:
        return Offer(self.fragment.id, p.round, self.me, p.base, digest_of(p.packet), len(p.packet), p.num_tokens, p.num_steps, p.norm_bits)

    def _screen(self, data: bytes, sender: PeerId, number: int, norm_bits: int | None) -> Decoded:
        delta = decode_packet(data, self.fragment, peer=sender, round=number, must_be_theirs=True)
        screen(delta, norm_bits=norm_bits, peer=sender, round=number)
        return delta

    async def _deltas(self, settlement: Settlement) -> dict[PeerId, Decoded]:
        """The settlement's packets decoded, by sender; a merged one stands for all of them."""
        names = {MERGED: settlement.merged.packet} if settlement.merged else {e.peer: e.packet for e in settlement.entries}
        deltas = {}
        for peer, packet in names.items():
            if packet in self._screened:
                deltas[peer] = self._screened[packet]
                continue
            data = await self.exchange.read(packet)
            if data is None:
                raise IntegrityError(f"packet {packet[:12]} of {self.fragment.id} is gone from this peer's store")
            decode = functools.partial(decode_packet, data, self.fragment, peer=peer, round=settlement.round)
            deltas[peer] = await self.compute.run(decode)
        return deltas

    def _reduce(self, settlement: Settlement, deltas: dict[PeerId, Decoded], residual: bytes | None) -> tuple[bytes, bytes]:
        codec = self.manifest.codec
        merged_N = merge_entries(self.fragment, self.manifest, settlement, deltas)
        return reduce_packets(self.fragment, merged_N, residual, codec.merged or codec.name, settlement.round)

    def _aggregate(self, settlement: Settlement, deltas: dict[PeerId, Decoded]) -> tuple[AnchorState, bytes, Digest]:
        account = self._account()
        if settlement.base != account.anchor_digest:
            raise IntegrityError(f"settlement of {settlement.base[:12]}, this peer is at {account.anchor_digest[:12]}")
        merged_N = merged_delta(self.fragment, self.manifest, settlement, deltas)
        state = stepped(self.fragment, self.manifest, account.anchor_state, settlement, merged_N)
        blob = encode_anchor(self.fragment, state)
        return state, blob, anchor_digest(blob)

    @property
    def _file(self) -> str:
        return self.fragment.id.replace("/", "-")

    def _next_stamp(self, cursor: bytes) -> bytes:
        """What a record carries beside the account: its sequence number and the trainer's place in its data."""
        self._seq += 1
        return self._seq.to_bytes(_STAMP_BYTES, "big") + cursor

    async def _write_record(self, account: Account) -> None:
        await self.compute.run(lambda: write_atomic(self.disk, f"{self._file}.record", *record_parts(account)))

    async def _write_note(self, note: Note) -> None:
        kept, whole_blobs = tuple(sorted(self._kept.by_round.items())), tuple(sorted(self._kept.whole))
        whole = replace(note, kept=kept, residuals=self._kept.residuals, big=whole_blobs)
        await self.compute.run(write_atomic, self.disk, f"{self._file}.note", canonical.to_bytes(whole))

    def _read_note(self) -> Note | None:
        data = self.disk.read(f"{self._file}.note")
        try:
            return None if data is None else canonical.from_bytes(Note, data)
        except RejectedPayload as error:
            self.events.emit("damaged-file", file=f"{self._file}.note", why=str(error))
            return None

    async def _read_record(self) -> Account | None:
        data = self.disk.read(f"{self._file}.record")
        if data is None:
            return None
        try:
            digest = anchor_of_record(data)
            state = None if digest is None else await self._stored_anchor(digest)
            if state is None:
                raise IntegrityError("its anchor is not in this peer's store")
            return await self.compute.run(account_from_record, self.fragment, data, state)
        except IntegrityError as error:
            self.events.emit("damaged-file", file=f"{self._file}.record", why=str(error))
            return None

    async def _resolved(self, record: Account | None, note: Note) -> Account | None:
        """The account after the outcome that ``note`` tells, from the record before it and the anchor blob."""
        state = await self._stored_anchor(note.anchor)
        if state is None:
            self.events.emit("lost-anchor", fragment=self.fragment.id, anchor=note.anchor[:12])
            return None
        pending = None if record is None else record.pending
        if record is None or pending is None or note.round != pending.round or note.ending not in (Ending.APPLIED, Ending.EXCLUDED):
            return Account(self.fragment, state, note.anchor)
        try:
            if note.ending == Ending.APPLIED:
                record.applied(state, note.anchor, note.clip_bits)
            else:
                record.excluded(state, note.anchor)
        except RejectedPayload as error:
            self.events.emit("damaged-file", file=f"{self._file}.note", why=str(error))
            return None
        return record

    async def _stored_anchor(self, digest: Digest) -> AnchorState | None:
        blob = await self.exchange.read(digest)
        try:
            return None if blob is None else await self.compute.run(decode_anchor, self.fragment, blob)
        except DecentraError:
            return None

    def _computed(self, anchor: Digest) -> AnchorState:
        """The state of a confirmed anchor: the tentative one, or ours if the round moved nothing. Raises IntegrityError."""
        account = self._account()
        if self._tentative is not None and self._tentative[0] == anchor:
            return self._tentative[1]
        if account.anchor_digest == anchor:
            return account.anchor_state
        raise IntegrityError(f"anchor {anchor[:12]} of {self.fragment.id} is confirmed, but this peer has not computed it")

    def _set_tentative(self, tentative: tuple[Digest, AnchorState] | None) -> None:
        """An attested anchor is not evicted: others count on it."""
        old, self._tentative = self._tentative, tentative
        if tentative is not None:
            self.exchange.pin(tentative[0])
        if old is not None:
            self.exchange.unpin(old[0])


def cursor_of(account: Account) -> bytes:
    return account.extra[_STAMP_BYTES:]


def _seq_of(record: Account) -> int:
    return int.from_bytes(record.extra[:_STAMP_BYTES], "big")
