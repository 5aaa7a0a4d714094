"""Scalars of a settlement as IEEE float32 bits, so that every machine multiplies by the same number. No torch."""

from __future__ import annotations

import math
import struct

from decentra.errors import ConfigError, RejectedPayload

Buffer = bytes | bytearray | memoryview
ONE_BITS = 0x3F800000


def float_bits(x: float) -> int:
    """Bits (0 .. 2**32 - 1) of the float32 nearest to ``x``. Raises ConfigError when that float32 is not finite."""
    try:
        raw = struct.pack("<f", x)
    except OverflowError:
        raw = b""
    if not raw or not math.isfinite(x):
        raise ConfigError(f"expected a finite number within float32's range, got {x!r}; check the weights and outer optimizer settings")
    return int(struct.unpack("<I", raw)[0])


def bits_float(bits: int) -> float:
    """The float32 with these bits, exactly. Raises RejectedPayload (``malformed``: no 32-bit number, ``not-finite``)."""
    if not 0 <= bits < 1 << 32:
        raise RejectedPayload("malformed", f"expected the 32 bits of a float32, got {bits}")
    x = float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if not math.isfinite(x):
        raise RejectedPayload("not-finite", f"expected the bits of a finite float32, got {bits:#010x} ({x})")
    return x
