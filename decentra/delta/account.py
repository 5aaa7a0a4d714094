"""The account of a fragment: whatever a peer trained is at any time exactly once in the anchors, in its residual or in its live weights.

No files, no time. The law, with anchor A, live z (owned by the trainer), residual e and at most
one pending encode (y: live at encode, d: decoded packet, raw = beta e_before + (A - y), e_after = raw - d):

outcome of the pending    residual      shift the trainer adds to z
applied                   e_after       A' - y      (with a clip c: e_after + (1 - c) d, what was cut off comes home)
excluded                  e_after + d   A' - y      (settled without me: all of raw stays at home)
cancelled                 e_before      none        (abandoned or void: live still holds all progress; beta is not applied twice)
followed (no pending)     unchanged     A' - A
reset (full recover)      zero          none: the caller loads z = A'

An account's record restores it bit by bit, given its anchor, which is a blob of its own; whoever writes it makes the write atomic. Little-endian:
magic, version u16, flags u16 (1: residual, 2: pending), layout fingerprint [8], N u64, packet length u64, extra length u32, round u64, tokens u64,
steps u64, beta f64, anchor digest [32]; fp32 [N] each: (residual, left out when zero), (y); packet; extra; crc32 u32 of everything before it. The
base of a pending is the anchor, its e_before is the residual, e_after follows from these, beta and the packet, the norm from the packet: each is
written once or not at all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decentra.bits import ONE_BITS, Buffer, float_bits
from decentra.delta.aggregate import checked_clip
from decentra.delta.anchor import AnchorState
from decentra.delta.decoded import Decoded
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.pseudo_gradient import pseudo_gradient
from decentra.delta.raw import FLOAT_BYTES, assert_fits, fingerprint, float_view, floats_at
from decentra.errors import ConfigError, IntegrityError, RejectedPayload, TrainingError
from decentra.ids import Digest, is_digest
from decentra.modules import Fragment

# N elements of a fragment

_MAGIC = b"DCAC"
_VERSION = 3
_HAS_RESIDUAL, _HAS_PENDING = 1, 2
_HEADER = struct.Struct("<4sHH8sQQIQQQd32s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Pending:
    """One encoded delta whose round has no outcome yet. The tensors are values: nobody writes into them."""

    round: int
    base: Digest  # the anchor the delta was taken from
    packet: bytes
    live_N: Tensor  # y: live at encode
    residual_before_N: Tensor
    residual_after_N: Tensor
    num_tokens: int
    num_steps: int
    norm_bits: int  # float32 bits of the decoded packet's norm
    beta: float = 1.0  # share of the residual that went into the packet
    sent: Decoded | None = None  # the packet decoded, where that is small; not kept in the record


class Account:
    """Anchor, residual and pending encode of one fragment. Not thread-safe; only the methods below change it."""

    def __init__(
        self,
        fragment: Fragment,
        anchor_state: AnchorState,
        anchor_digest: Digest,
        *,
        residual_N: Tensor | None = None,
        pending: Pending | None = None,
        extra: bytes = b"",
    ) -> None:
        """``residual_N``: fp32 [N], zero by default. ``extra``: opaque bytes of the caller, kept in the record (the data cursor)."""
        self.fragment = fragment
        self.anchor_state = anchor_state
        self.anchor_digest = anchor_digest
        self.residual_N = torch.zeros(fragment.num_elements) if residual_N is None else residual_N
        self.pending = pending
        self.extra = extra
        self.check()

    def check(self) -> None:
        """Assert what always holds."""
        assert_fits(self.anchor_state.anchor_N, self.fragment)
        assert_fits(self.residual_N, self.fragment)
        if self.pending is not None:
            assert self.pending.base == self.anchor_digest, "a pending delta was taken from the current anchor"
            assert self.pending.residual_before_N is self.residual_N, "the residual waits for the outcome"

    def encode(
        self, round: int, live_N: Tensor, codec_name: str, beta: float, num_tokens: int, num_steps: int, *, peer: str = "",
        max_norm: float | None = None,
    ) -> Pending:  # fmt: skip
        """Encode ``peer``'s progress: that of ``live_N`` fp32 [N] (copied) plus ``beta`` times the residual (error feedback, arXiv 1901.09847, alg. 1).

        A packet whose norm would pass ``max_norm``, and twice that of the progress itself, is sent scaled down; the rest stays in the
        residual. The residual moves at the outcome, not here. Raises TrainingError when an encode is pending, or the sum is not finite or
        its norm more than a float32 holds; ConfigError for an unknown codec.
        """
        if self.pending is not None:
            raise TrainingError(
                f"fragment {self.fragment.id}: round {round} cannot be encoded, round {self.pending.round} has no outcome yet;"
                " ask the ledger for it"
            )
        y_N = live_N.detach().clone()
        progress_N = pseudo_gradient(self.anchor_state.anchor_N, y_N)
        raw_N = _raw(self.residual_N, beta, progress_N)
        packet = encode_packet(self.fragment, raw_N, codec_name, peer=peer, round=round)
        # the own packet is decoded like a foreign one: all peers, this one too, aggregate the same numbers
        sent = decode_packet(packet, self.fragment, peer="self", round=round)
        norm = sent.norm()
        if max_norm is not None and norm > (most := max(max_norm, 2 * Decoded.of(progress_N).norm())):
            packet = encode_packet(self.fragment, torch.mul(raw_N, most / norm), codec_name, peer=peer, round=round)
            sent = decode_packet(packet, self.fragment, peer="self", round=round)
            norm = sent.norm()
        try:
            norm_bits = float_bits(norm)
        except ConfigError:
            raise TrainingError(f"fragment {self.fragment.id}: the delta's norm of {norm:.3g} is more than a float32 holds") from None
        self.pending = Pending(
            round,
            self.anchor_digest,
            packet,
            y_N,
            self.residual_N,
            sent.subtracted_from(raw_N),
            num_tokens,
            num_steps,
            norm_bits,
            beta,
            sent if sent.is_sparse else None,
        )
        self.check()
        return self.pending

    def applied(self, new_state: AnchorState, new_digest: Digest, clip_bits: int = ONE_BITS) -> Tensor:
        """The round is confirmed with my packet in it, multiplied with the settlement's clip. Returns the shift fp32 [N] to add to live.

        Raises RejectedPayload for a clip outside 0 to 1, and changes nothing then.
        """
        cut = 1.0 - checked_clip("self", clip_bits)
        pending = self._take("applied")
        residual_N = pending.residual_after_N
        if cut:
            residual_N = residual_N.clone()
            decode_packet(pending.packet, self.fragment, peer="self", round=pending.round).add_to(residual_N, cut)
        return self._adopt(new_state, new_digest, residual_N, pending.live_N)

    def excluded(self, new_state: AnchorState, new_digest: Digest) -> Tensor:
        """The round is confirmed without my packet. Returns the shift fp32 [N] to add to live."""
        pending = self._take("excluded")
        residual_N = pending.residual_after_N.clone()
        decode_packet(pending.packet, self.fragment, peer="self", round=pending.round).add_to(residual_N, 1.0)
        return self._adopt(new_state, new_digest, residual_N, pending.live_N)

    def cancelled(self) -> None:
        """The round is abandoned or void: as if it had never been encoded."""
        self.residual_N = self._take("cancelled").residual_before_N

    def followed(self, new_state: AnchorState, new_digest: Digest) -> Tensor:
        """The anchor moved in a round I have nothing in. Returns the shift fp32 [N] to add to live."""
        if self.pending is not None:
            raise TrainingError(
                f"fragment {self.fragment.id}: the anchor cannot be followed, round {self.pending.round} is pending;"
                " its outcome is applied, excluded or cancelled"
            )
        return self._adopt(new_state, new_digest, self.residual_N, self.anchor_state.anchor_N)

    def reset(self, new_state: AnchorState, new_digest: Digest) -> None:
        """Recover from a full anchor: a pending encode is dropped, the residual is zero. The caller loads live = anchor."""
        self.pending = None
        self._adopt(new_state, new_digest, torch.zeros(self.fragment.num_elements), new_state.anchor_N)

    def _take(self, outcome: str) -> Pending:
        pending, self.pending = self.pending, None
        if pending is None:
            raise TrainingError(f"fragment {self.fragment.id}: nothing is pending that could be {outcome}; the outcome was taken twice")
        return pending

    def _adopt(self, new_state: AnchorState, new_digest: Digest, residual_N: Tensor, from_N: Tensor) -> Tensor:
        self.anchor_state, self.anchor_digest, self.residual_N = new_state, new_digest, residual_N
        self.check()
        return torch.sub(new_state.anchor_N, from_N)


def _raw(residual_N: Tensor, beta: float, progress_N: Tensor) -> Tensor:
    return torch.add(torch.mul(residual_N, beta), progress_N)


def to_record(account: Account) -> bytes:
    """The record in one piece; see ``record_parts``."""
    return b"".join(record_parts(account))


def record_parts(account: Account) -> list[Buffer]:
    """Bytes that hold the whole account but its anchor, and its ``extra``, in pieces that are not copied: write them before the account changes.

    Raises IntegrityError when the anchor digest is no sha256.
    """
    pending, fragment = account.pending, account.fragment
    if not is_digest(account.anchor_digest):
        raise IntegrityError(f"fragment {fragment.id}: expected the anchor's sha256 in hex, got {account.anchor_digest[:80]!r}")
    has_residual = bool(account.residual_N.any())
    flags = (_HAS_RESIDUAL if has_residual else 0) | (0 if pending is None else _HAS_PENDING)
    packet, counts = b"", (0, 0, 0, 0.0)
    if pending is not None:
        packet, counts = pending.packet, (pending.round, pending.num_tokens, pending.num_steps, pending.beta)
    header = _HEADER.pack(
        _MAGIC, _VERSION, flags, fingerprint(fragment), fragment.num_elements, len(packet), len(account.extra), *counts,
        bytes.fromhex(account.anchor_digest),
    )  # fmt: skip
    tensors = ([account.residual_N] if has_residual else []) + ([pending.live_N] if pending is not None else [])
    parts: list[Buffer] = [header, *map(float_view, tensors), packet, account.extra]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return [*parts, _CRC.pack(crc)]


def anchor_of_record(data: bytes) -> Digest | None:
    """The anchor a record belongs to, not verified; None for bytes that are too short."""
    return Digest(_HEADER.unpack_from(data)[-1].hex()) if len(data) >= _HEADER.size else None


def account_from_record(fragment: Fragment, data: bytes, state: AnchorState) -> Account:
    """Restore an account bit by bit; ``state``: the anchor of ``anchor_of_record``.

    Raises IntegrityError for a record that is damaged, cut, of another version or another fragment.
    """
    where = f"account record of {fragment.id}"
    if (
        len(data) < _HEADER.size + _CRC.size
        or zlib.crc32(memoryview(data)[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]
    ):
        raise IntegrityError(f"{where}: {len(data)} bytes do not match their own checksum; recover from the anchor")
    header = _HEADER.unpack_from(data)
    magic, version, flags, layout, num_elements, packet_bytes, extra_bytes, round, num_tokens, num_steps, beta, digest = header
    if magic != _MAGIC or version != _VERSION or flags & ~(_HAS_RESIDUAL | _HAS_PENDING):
        raise IntegrityError(
            f"{where}: expected version {_VERSION}, got {magic!r}, version {version}, flags {flags}; recover from the anchor"
        )
    if layout != fingerprint(fragment) or num_elements != fragment.num_elements:
        raise IntegrityError(f"{where}: it is of another fragment or model; recover from the anchor")
    has_residual, has_pending = bool(flags & _HAS_RESIDUAL), bool(flags & _HAS_PENDING)
    packet_at = _HEADER.size + (has_residual + has_pending) * FLOAT_BYTES * num_elements
    if len(data) != packet_at + packet_bytes + extra_bytes + _CRC.size:
        raise IntegrityError(f"{where}: {len(data)} bytes do not match its own lengths; recover from the anchor")
    tensors = _tensors(data, num_elements)
    residual_N = next(tensors) if has_residual else torch.zeros(num_elements)
    pending, anchor_digest = None, Digest(digest.hex())
    if has_pending:
        packet = bytes(data[packet_at : packet_at + packet_bytes])
        y_N = next(tensors)
        raw_N = _raw(residual_N, beta, pseudo_gradient(state.anchor_N, y_N))
        try:
            sent = decode_packet(packet, fragment, peer="self", round=round)
            norm_bits = float_bits(sent.norm())
        except (RejectedPayload, ConfigError) as error:
            raise IntegrityError(f"{where}: its packet cannot be read ({error}); recover from the anchor") from None
        residual_after_N = sent.subtracted_from(raw_N)
        pending = Pending(round, anchor_digest, packet, y_N, residual_N, residual_after_N, num_tokens, num_steps, norm_bits, beta)
    extra = bytes(data[packet_at + packet_bytes : -_CRC.size])
    return Account(fragment, state, anchor_digest, residual_N=residual_N, pending=pending, extra=extra)


def _tensors(data: bytes, num_elements: int) -> Iterator[Tensor]:
    """The record's fp32 vectors [N] in order; the caller has checked how many there are."""
    at = _HEADER.size
    while True:
        yield floats_at(data, at, num_elements)
        at += FLOAT_BYTES * num_elements
