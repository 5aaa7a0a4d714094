"""One peer's delta of one fragment as bytes, and the bounded parser for foreign ones. No residual, no judgement of norms, no digest.

Packet, little-endian: magic, version u16, codec code u16, layout fingerprint [8], round u32, first 8 bytes of the sha256 of the sender's id, lengths
of the two sections u64 each; the large tensors' section in that codec, the small tensors' section in its companion; crc32 u32 of everything before
it. Which tensor is in which section follows from the layout and the codec, in layout order; so a model of a thousand matrices has one run of the
entropy coder, not a thousand. Round and sender make it one peer's packet of one round: nobody can pass it off as another's, or again.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.codec import CODECS, SPARSE, Codec, Sparse, codec_by_code, codec_named
from decentra.delta.decoded import Decoded
from decentra.delta.raw import Ints, Sizes, assert_fits, fingerprint, is_finite
from decentra.errors import RejectedPayload, TrainingError
from decentra.modules import Fragment, Slot

# N elements of a fragment, S of a section

_MAGIC = b"DCPK"
_VERSION = 3
_HEADER = struct.Struct("<4sHH8sI8sQQ")
_CRC = struct.Struct("<I")
MIN_SPARSE_ELEMENTS = 4096  # a smaller tensor is no full chunk, and dense it weighs little


@dataclass(frozen=True, slots=True)
class _Section:
    """Tensors that one codec writes together: neighbouring ones joined to (start, length) in the fragment."""

    codec: Codec
    sizes: Sizes
    runs: tuple[tuple[int, int], ...]

    @property
    def num_elements(self) -> int:
        return sum(self.sizes)

    def of(self, values_N: Tensor) -> Tensor:
        """fp32 [S]; a view where the section is one run."""
        parts = [values_N[start : start + length] for start, length in self.runs]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat([values_N[:0], *parts])


def encode_packet(fragment: Fragment, values_N: Tensor, codec_name: str, *, peer: str = "", round: int = 0) -> bytes:
    """Encode fp32 ``values_N`` [N] as ``peer``'s packet of ``round``. Raises TrainingError when they are not finite, ConfigError for an unknown codec."""
    assert_fits(values_N, fragment)
    if not is_finite(values_N):
        raise TrainingError(f"fragment {fragment.id}: the values to send are not finite; training diverged, restart from the last anchor")
    bodies = [s.codec.encode(s.of(values_N), s.sizes) for s in _sections(fragment, codec_name)]
    code = codec_named(codec_name).code
    packet = b"".join([_HEADER.pack(_MAGIC, _VERSION, code, fingerprint(fragment), *_label(peer, round), *map(len, bodies)), *bodies])
    return packet + _CRC.pack(zlib.crc32(packet))


@lru_cache(maxsize=1024)
def max_packet_bytes(fragment: Fragment, codec_name: str) -> int:
    """Largest packet an honest peer makes with this codec: the limit for offers and fetches. Raises ConfigError for an unknown codec."""
    return _HEADER.size + sum(s.codec.max_size(s.sizes) for s in _sections(fragment, codec_name)) + _CRC.size


def decode_packet(data: Buffer, fragment: Fragment, *, peer: str = "?", round: int | None = None, must_be_theirs: bool = False) -> Decoded:
    """Decode bytes that may come from anywhere; equal bytes give equal bits on every machine.

    ``must_be_theirs``: the packet has to be ``peer``'s of ``round``, else it is ``relabelled`` or ``replayed``. Every length is checked against the
    fragment before anything is allocated. Raises RejectedPayload: these, ``size``, ``malformed`` (magic, version, checksum, contents), ``shape``
    (another fragment's layout), ``codec`` or ``not-finite``.
    """
    try:
        view = memoryview(data).cast("B")
        if must_be_theirs:
            _check_label(view, peer, round or 0)
        return _decoded(view, fragment)
    except RejectedPayload as error:
        raise RejectedPayload(error.reason, error.detail, peer=peer, round=round) from None


def _label(peer: str, round: int) -> tuple[int, bytes]:
    return round & 0xFFFFFFFF, hashlib.sha256(peer.encode()).digest()[:8]


def _check_label(view: memoryview, peer: str, round: int) -> None:
    """Bytes too short for a header are left to the parser."""
    if view.nbytes < _HEADER.size:
        return
    _, _, _, _, made_in, made_by, *_ = _HEADER.unpack_from(view)
    wanted_round, wanted_peer = _label(peer, round)
    if made_by != wanted_peer:
        raise RejectedPayload("relabelled", "the packet was made by another peer than the one who offers it")
    if made_in != wanted_round:
        raise RejectedPayload("replayed", f"the packet was made for round {made_in}, it is offered in round {round}")


@lru_cache(maxsize=1024)
def _sections(fragment: Fragment, codec_name: str) -> tuple[_Section, _Section]:
    """Large tensors, small tensors."""
    codec = codec_named(codec_name)
    small = [s for s in fragment.slots if _is_small(codec, s)]
    large = [s for s in fragment.slots if not _is_small(codec, s)]
    companion = codec_named({"int8": "bf16", "int4": "bf16"}.get(codec_name, "int8" if codec_name in SPARSE else codec_name))
    return _section(codec, large), _section(companion, small)


def _is_small(codec: Codec, slot: Slot) -> bool:
    # norms and biases are few and sensitive: int8 blocks would save nothing and cost most there
    if codec.name in ("int8", "int4"):
        return len(slot.shape) < 2
    return codec.name in SPARSE and (len(slot.shape) < 2 or slot.size < MIN_SPARSE_ELEMENTS)


def _section(codec: Codec, slots: list[Slot]) -> _Section:
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + slot.size)
        else:
            runs.append((slot.offset, slot.size))
    return _Section(codec, tuple(s.size for s in slots), tuple(runs))


def _decoded(view: memoryview, fragment: Fragment) -> Decoded:
    runs: list[tuple[int, Tensor]] = []
    sparse = Decoded(fragment.num_elements)
    for section, body in _bodies(view, fragment):
        values = section.codec.decode(body, section.sizes)
        if isinstance(values, Sparse):
            sparse = Decoded(fragment.num_elements, (), _placed(section, values.positions_K), values.values_K)
            continue
        if not is_finite(values):
            raise RejectedPayload("not-finite", f"the packet of {fragment.id} holds infinite or NaN values")
        at = 0
        for start, length in section.runs:
            runs.append((start, values[at : at + length]))
            at += length
    return Decoded(fragment.num_elements, tuple(runs), sparse.positions_K, sparse.values_K)


def _placed(section: _Section, positions_K: Ints) -> Ints:
    """Positions in the section to positions in the fragment."""
    if len(section.runs) < 2:
        return positions_K + (section.runs[0][0] if section.runs else 0)
    starts = np.array([start for start, _ in section.runs])
    begins = np.cumsum([0, *(length for _, length in section.runs[:-1])])
    run_K = np.searchsorted(begins, positions_K, side="right") - 1
    placed_K: Ints = positions_K + (starts - begins)[run_K]
    return placed_K


def _bodies(view: memoryview, fragment: Fragment) -> list[tuple[_Section, memoryview]]:
    limit = max(max_packet_bytes(fragment, codec.name) for codec in CODECS)
    if not _HEADER.size + _CRC.size <= view.nbytes <= limit:
        raise RejectedPayload("size", f"a packet of {fragment.id} has {_HEADER.size + _CRC.size} to {limit} bytes, got {view.nbytes}")
    magic, version, code, layout, _, _, *lengths = _HEADER.unpack_from(view)
    if magic != _MAGIC or version != _VERSION:
        raise RejectedPayload("malformed", f"expected a packet of version {_VERSION}, got magic {magic!r}, version {version}")
    if zlib.crc32(view[: -_CRC.size]) != _CRC.unpack_from(view, view.nbytes - _CRC.size)[0]:
        raise RejectedPayload("malformed", "the checksum does not match; the bytes were damaged or cut")
    if layout != fingerprint(fragment):
        raise RejectedPayload("shape", f"expected a packet of {fragment.id}, this one is of another layout")
    sections = _sections(fragment, codec_by_code(code).name)
    if sum(lengths) != view.nbytes - _HEADER.size - _CRC.size:
        raise RejectedPayload("size", f"sections of {lengths} bytes do not fill a packet of {view.nbytes}")
    found, at = [], _HEADER.size
    for section, length in zip(sections, lengths, strict=True):
        expected, most = section.codec.encoded_size(section.sizes), section.codec.max_size(section.sizes)
        if length > most or (expected is not None and length != expected):
            raise RejectedPayload("size", f"{section.num_elements} {section.codec.name} values of {fragment.id} do not fit {length} bytes")
        found.append((section, view[at : at + length]))
        at += length
    return found
