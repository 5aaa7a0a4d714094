"""One peer's delta of one fragment as bytes, and the bounded parser for foreign ones. No residual, no judgement of norms, no digest.

Packet, little-endian: magic, version u16, flags u16 (0), layout fingerprint [8], number of sections u32; per parameter in layout order:
slot index u32, codec code u16, length u64, that many bytes; crc32 u32 of everything before it.
"""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from decentra.delta.codec import CODECS, Codec, codec_by_code, codec_named
from decentra.delta.raw import Buffer, assert_fits, fingerprint, is_finite
from decentra.errors import RejectedPayload, TrainingError
from decentra.modules import Fragment, Slot

# N elements of a fragment

_MAGIC = b"DCPK"
_VERSION = 1
_HEADER = struct.Struct("<4sHH8sI")
_SECTION = struct.Struct("<IHQ")
_CRC = struct.Struct("<I")


def encode_packet(fragment: Fragment, values_N: Tensor, codec_name: str) -> bytes:
    """Encode fp32 ``values_N`` [N]. Raises TrainingError when they are not finite, ConfigError for an unknown codec."""
    assert_fits(values_N, fragment)
    if not is_finite(values_N):
        raise TrainingError(f"fragment {fragment.id}: the values to send are not finite; training diverged, restart from the last anchor")
    codec = codec_named(codec_name)
    parts = [_HEADER.pack(_MAGIC, _VERSION, 0, fingerprint(fragment), len(fragment.slots))]
    for index, slot in enumerate(fragment.slots):
        section_codec = _codec_of_slot(codec, slot)
        body = section_codec.encode(values_N[slot.offset : slot.offset + slot.size].contiguous())
        parts += [_SECTION.pack(index, section_codec.code, len(body)), body]
    packet = b"".join(parts)
    return packet + _CRC.pack(zlib.crc32(packet))


def max_packet_bytes(fragment: Fragment, codec_name: str) -> int:
    """Largest packet an honest peer makes with this codec: the limit for offers and fetches. Raises ConfigError for an unknown codec."""
    codec = codec_named(codec_name)
    bodies = sum(_SECTION.size + _codec_of_slot(codec, slot).max_size(slot.size) for slot in fragment.slots)
    return _HEADER.size + bodies + _CRC.size


def decode_packet(data: Buffer, fragment: Fragment, *, peer: str = "?", round: int | None = None) -> Tensor:
    """Decode bytes that may come from anywhere to fp32 [N]; equal bytes give equal bits on every machine.

    Every length is checked against the fragment before anything is allocated. Raises RejectedPayload: ``size``, ``malformed`` (magic,
    version, checksum, section order), ``shape`` (another layout), ``codec``, ``not-finite``.
    """
    try:
        view = memoryview(data).cast("B")
        return _decoded(view, fragment, _sections(view, fragment))
    except RejectedPayload as error:
        raise RejectedPayload(error.reason, error.detail, peer=peer, round=round) from None


def _codec_of_slot(codec: Codec, slot: Slot) -> Codec:
    # norms and biases are few and sensitive: int8 blocks would save nothing and cost most there
    return codec_named("bf16") if codec.name == "int8" and len(slot.shape) < 2 else codec


def _sections(view: memoryview, fragment: Fragment) -> list[tuple[Codec, int, int]]:
    """(codec, start, length in bytes) of every slot's body, all within ``view``."""
    _check_frame(view, fragment)
    sections, at, end = [], _HEADER.size, view.nbytes - _CRC.size
    for index, slot in enumerate(fragment.slots):
        if at + _SECTION.size > end:
            raise RejectedPayload("size", f"the packet of {fragment.id} ends before section {index} of {len(fragment.slots)}")
        found, code, length = _SECTION.unpack_from(view, at)
        at += _SECTION.size
        if found != index:
            raise RejectedPayload("malformed", f"expected section {index} of {fragment.id}, got {found}")
        codec = codec_by_code(code)
        expected, limit = codec.encoded_size(slot.size), min(codec.max_size(slot.size), end - at)
        if length > limit or (expected is not None and length != expected):
            raise RejectedPayload("size", f"section {index} ({slot.name}): {slot.size} {codec.name} values do not fit {length} bytes")
        sections.append((codec, at, length))
        at += length
    if at != end:
        raise RejectedPayload("size", f"{end - at} bytes too many after the last section of {fragment.id}")
    return sections


def _check_frame(view: memoryview, fragment: Fragment) -> None:
    limit = max(max_packet_bytes(fragment, codec.name) for codec in CODECS)
    if not _HEADER.size + _CRC.size <= view.nbytes <= limit:
        raise RejectedPayload("size", f"a packet of {fragment.id} has {_HEADER.size + _CRC.size} to {limit} bytes, got {view.nbytes}")
    magic, version, flags, layout, num_sections = _HEADER.unpack_from(view)
    if magic != _MAGIC or version != _VERSION or flags:
        raise RejectedPayload(
            "malformed", f"expected a packet of version {_VERSION}, got magic {magic!r}, version {version}, flags {flags}"
        )
    if zlib.crc32(view[: -_CRC.size]) != _CRC.unpack_from(view, view.nbytes - _CRC.size)[0]:
        raise RejectedPayload("malformed", "the checksum does not match; the bytes were damaged or cut")
    if layout != fingerprint(fragment) or num_sections != len(fragment.slots):
        raise RejectedPayload("shape", f"expected {fragment.id} with {len(fragment.slots)} sections, got {num_sections} of another layout")


def _decoded(view: memoryview, fragment: Fragment, sections: list[tuple[Codec, int, int]]) -> Tensor:
    values_N = torch.empty(fragment.num_elements, dtype=torch.float32)
    for slot, (codec, start, length) in zip(fragment.slots, sections, strict=True):
        values_N[slot.offset : slot.offset + slot.size] = codec.decode(view[start : start + length], slot.size)
    if not is_finite(values_N):
        raise RejectedPayload("not-finite", f"the packet of {fragment.id} holds infinite or NaN values")
    return values_N
