"""The codecs of packet sections behind one interface, by name (manifest) and by code (wire). No framing, no provenance."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.codec.block import Block
from decentra.delta.codec.dense import Bf16, Fp32
from decentra.delta.codec.topk import Sparse as Sparse
from decentra.delta.codec.topk import TopK
from decentra.delta.raw import Sizes
from decentra.errors import ConfigError, RejectedPayload

# N elements of all tensors of a section together


class Codec(Protocol):
    """Turns the values of a section's tensors, concatenated, into bytes and back. Decoding gives the same bits on every machine; encoding
    need not. ``sizes``: number of elements of each tensor, N in all."""

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> int:
        """Number on the wire, 0 .. 65535; never reused."""
        ...

    def encoded_size(self, sizes: Sizes) -> int | None:
        """Exact number of bytes, or None when it depends on the data."""
        ...

    def max_size(self, sizes: Sizes) -> int:
        """Upper bound in bytes, whatever the data."""
        ...

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        """``values_N``: finite fp32 [N], contiguous."""
        ...

    def decode(self, data: Buffer, sizes: Sizes) -> Tensor | Sparse:
        """fp32 [N], or the few values that are not zero. The caller checked the size. Raises RejectedPayload without a peer's name."""
        ...


CODECS: tuple[Codec, ...] = (
    Fp32(), Bf16(), Block("int8", 3, 8), Block("int4", 4, 4), TopK(16, 16), TopK(32, 17), TopK(64, 18), TopK(128, 19), TopK(256, 20)
)  # fmt: skip
SPARSE = frozenset(c.name for c in CODECS if isinstance(c, TopK))


def codec_named(name: str) -> Codec:
    """The codec a manifest names. Raises ConfigError."""
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise ConfigError(f"codec: expected one of {', '.join(c.name for c in CODECS)}, got {name!r}")


def codec_by_code(code: int) -> Codec:
    """The codec a packet names. Raises RejectedPayload (``codec``)."""
    for codec in CODECS:
        if codec.code == code:
            return codec
    raise RejectedPayload(
        "codec", f"expected a codec code of {', '.join(str(c.code) for c in CODECS)}, got {code}; its sender may be newer"
    )
