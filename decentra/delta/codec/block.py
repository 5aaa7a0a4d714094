"""The block codecs int8 and int4: 128 values share one fp32 scale. Stateless; what rounding loses is the caller's residual.

Section, little-endian: ceil(N / 128) scales fp32, then N values; value = whole number * scale. int8: one byte each. int4: two in a byte, the earlier in
the low half, each as its number plus 8; an odd last half is 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.raw import FLOAT_BYTES, Sizes, float_bytes, floats_at, is_finite
from decentra.errors import RejectedPayload

# N elements of all tensors of a section, M blocks, B elements of a block

BLOCK_ELEMENTS = 128
_NIBBLE_ZERO = 8


@dataclass(frozen=True)
class Block:
    """Symmetric whole numbers of ``bits`` (8 or 4) bits, scale = absmax / largest per block; an all-zero block has scale 0."""

    name: str
    code: int
    bits: int

    @property
    def levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def encoded_size(self, sizes: Sizes) -> int:
        n = sum(sizes)
        return FLOAT_BYTES * _num_blocks(n) + (n * self.bits + 7) // 8

    def max_size(self, sizes: Sizes) -> int:
        return self.encoded_size(sizes)

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        x_MB = _in_blocks(values_N)
        # largest fp32 scale whose product with the levels is finite
        largest = float((2**24 - 1) // self.levels * 2**104)
        scale_M = (x_MB.abs().amax(dim=1) / self.levels).clamp(max=largest)
        # a scale that is or underflows to 0 stands for a block of zeros: its values round to 0 against 1
        divisor_M1 = torch.where(scale_M > 0, scale_M, torch.ones_like(scale_M)).unsqueeze(1)
        # a subnormal scale is coarse, the quotient may then pass the largest level
        q_MB = (x_MB / divisor_M1).round().clamp(-self.levels, self.levels).to(torch.int8)
        q_N = q_MB.reshape(-1)[: values_N.numel()].numpy()
        return float_bytes(scale_M) + (q_N if self.bits == 8 else _packed(q_N)).tobytes()

    def decode(self, data: Buffer, sizes: Sizes) -> Tensor:
        num_elements = sum(sizes)
        num_blocks = _num_blocks(num_elements)
        scale_M = floats_at(data, 0, num_blocks)
        if not is_finite(scale_M):
            raise RejectedPayload("not-finite", f"an {self.name} block's scale is infinite or NaN")
        if bool((scale_M < 0).any()):
            raise RejectedPayload("malformed", f"an {self.name} block's scale is negative")
        at = FLOAT_BYTES * num_blocks
        q_N = np.frombuffer(data, np.int8, num_elements, at) if self.bits == 8 else _unpacked(data, num_elements, at)
        if bool((q_N < -self.levels).any()):
            raise RejectedPayload("malformed", f"an {self.name} value is below -{self.levels}")
        return (_in_blocks(torch.from_numpy(q_N.astype(np.float32))) * scale_M.unsqueeze(1)).reshape(-1)[:num_elements].contiguous()


def _packed(q_N: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    nibbles = np.full(len(q_N) + len(q_N) % 2, _NIBBLE_ZERO, np.uint8)
    nibbles[: len(q_N)] = (q_N + _NIBBLE_ZERO).astype(np.uint8)
    return (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)


def _unpacked(data: Buffer, num_elements: int, at: int) -> npt.NDArray[np.int8]:
    packed = np.frombuffer(data, np.uint8, (num_elements + 1) // 2, at)
    nibbles = np.stack((packed & 15, packed >> 4), axis=1).reshape(-1)
    if num_elements % 2 and nibbles[-1] != _NIBBLE_ZERO:
        raise RejectedPayload("malformed", "the odd last half of an int4 section is not empty")
    return nibbles[:num_elements].astype(np.int8) - np.int8(_NIBBLE_ZERO)


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK_ELEMENTS)


def _in_blocks(x_N: Tensor) -> Tensor:
    """Copy [N] into zero-padded [M, B]."""
    n = x_N.numel()
    x_MB = torch.zeros(_num_blocks(n), BLOCK_ELEMENTS, dtype=torch.float32)
    x_MB.view(-1)[:n] = x_N
    return x_MB
