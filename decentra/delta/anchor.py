"""The anchor of a fragment with its outer state, and its canonical bytes: bit-equal states give equal bytes. No files.

Little-endian: magic, version u16, flags u16 (1: momentum), layout fingerprint [8], N u64, anchor fp32 [N], (momentum fp32 [N]).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.raw import FLOAT_BYTES, assert_fits, fingerprint, float_bytes, floats_at, is_finite
from decentra.errors import RejectedPayload
from decentra.ids import Digest, digest_of
from decentra.modules import Fragment

# N elements of a fragment

_MAGIC = b"DCAN"
_VERSION = 1
_HAS_MOMENTUM = 1
_HEADER = struct.Struct("<4sHH8sQ")


@dataclass(frozen=True, eq=False)
class AnchorState:
    """Agreed weights fp32 [N] and the outer optimizer's momentum fp32 [N]; None before its first step and for rules without one.

    The tensors are values: nobody writes into them.
    """

    anchor_N: Tensor
    momentum_N: Tensor | None = None


def encode_anchor(fragment: Fragment, state: AnchorState) -> bytes:
    """Canonical bytes; their digest is what members attest. Raises RejectedPayload (``not-finite``): such an anchor is never published."""
    parts = [state.anchor_N] if state.momentum_N is None else [state.anchor_N, state.momentum_N]
    for part_N in parts:
        assert_fits(part_N, fragment)
        if not is_finite(part_N):
            raise RejectedPayload("not-finite", f"the new anchor of fragment {fragment.id} is not finite; the round must be voided")
    flags = 0 if state.momentum_N is None else _HAS_MOMENTUM
    header = _HEADER.pack(_MAGIC, _VERSION, flags, fingerprint(fragment), fragment.num_elements)
    return b"".join([header, *map(float_bytes, parts)])


def max_anchor_bytes(fragment: Fragment) -> int:
    """Size of the largest anchor blob of this fragment, momentum included."""
    return _HEADER.size + 2 * FLOAT_BYTES * fragment.num_elements


def decode_anchor(fragment: Fragment, data: Buffer) -> AnchorState:
    """Parse bytes that may come from anywhere; the tensors own their memory.

    Raises RejectedPayload: ``size``, ``malformed`` (magic, version, flags), ``shape`` (another layout), ``not-finite``.
    """
    size = memoryview(data).nbytes
    if not _HEADER.size <= size <= max_anchor_bytes(fragment):
        raise RejectedPayload("size", f"an anchor of {fragment.id} has at most {max_anchor_bytes(fragment)} bytes, got {size}")
    magic, version, flags, layout, num_elements = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or flags & ~_HAS_MOMENTUM:
        raise RejectedPayload(
            "malformed", f"expected an anchor of version {_VERSION}, got magic {magic!r}, version {version}, flags {flags}"
        )
    if layout != fingerprint(fragment) or num_elements != fragment.num_elements:
        raise RejectedPayload(
            "shape", f"expected {fragment.id} with {fragment.num_elements} elements, got {num_elements} of another layout"
        )
    num_parts = 2 if flags & _HAS_MOMENTUM else 1
    expected = _HEADER.size + num_parts * FLOAT_BYTES * num_elements
    if size != expected:
        raise RejectedPayload("size", f"this anchor of {fragment.id} must have {expected} bytes, got {size}")
    parts = [floats_at(data, _HEADER.size + i * FLOAT_BYTES * num_elements, num_elements) for i in range(num_parts)]
    if not all(map(is_finite, parts)):
        raise RejectedPayload("not-finite", f"the anchor of {fragment.id} holds infinite or NaN values; fetch it from another peer")
    return AnchorState(parts[0], parts[1] if num_parts == 2 else None)


def anchor_digest(data: Buffer) -> Digest:
    """Digest of an anchor's bytes: it covers weights and outer state."""
    return digest_of(data)
