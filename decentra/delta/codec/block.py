"""The int8 block codec: 128 values share one fp32 scale. Stateless; what rounding loses is the caller's residual.

Section: ceil(N / 128) scales fp32, then N values int8, little-endian; value = int8 * scale.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decentra.delta.raw import FLOAT_BYTES, Buffer, Sizes, float_bytes, floats_at, is_finite
from decentra.errors import RejectedPayload

# N elements of all tensors of a section, M blocks, B elements of a block

BLOCK_ELEMENTS = 128
_LEVELS = 127
# largest fp32 whose product with 127 is finite: (2**24 - 1) // 127 * 2**104
_MAX_SCALE = float((2**24 - 1) // 127 * 2**104)


class Int8Block:
    """Symmetric int8, scale = absmax / 127 per block (about 1.03 bytes per value); an all-zero block has scale 0."""

    name = "int8"
    code = 3

    def encoded_size(self, sizes: Sizes) -> int:
        return FLOAT_BYTES * _num_blocks(sum(sizes)) + sum(sizes)

    def max_size(self, sizes: Sizes) -> int:
        return self.encoded_size(sizes)

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        n = values_N.numel()
        x_MB = _in_blocks(values_N)
        scale_M = (x_MB.abs().amax(dim=1) / _LEVELS).clamp(max=_MAX_SCALE)
        # a scale that is or underflows to 0 stands for a block of zeros: its values round to 0 against 1
        divisor_M1 = torch.where(scale_M > 0, scale_M, torch.ones_like(scale_M)).unsqueeze(1)
        # a subnormal scale is coarse, the quotient may then pass 127
        q_MB = (x_MB / divisor_M1).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
        return float_bytes(scale_M) + q_MB.reshape(-1)[:n].numpy().tobytes()

    def decode(self, data: Buffer, sizes: Sizes) -> Tensor:
        num_elements = sum(sizes)
        num_blocks = _num_blocks(num_elements)
        scale_M = floats_at(data, 0, num_blocks)
        if not is_finite(scale_M):
            raise RejectedPayload("not-finite", "an int8 block's scale is infinite or NaN")
        if bool((scale_M < 0).any()):
            raise RejectedPayload("malformed", "an int8 block's scale is negative")
        q_N = torch.from_numpy(np.frombuffer(data, np.int8, num_elements, FLOAT_BYTES * num_blocks).astype(np.float32))
        if bool((q_N < -_LEVELS).any()):
            raise RejectedPayload("malformed", f"an int8 value is below -{_LEVELS}")
        return (_in_blocks(q_N) * scale_M.unsqueeze(1)).reshape(-1)[:num_elements].contiguous()


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK_ELEMENTS)


def _in_blocks(x_N: Tensor) -> Tensor:
    """Copy [N] into zero-padded [M, B]."""
    n = x_N.numel()
    x_MB = torch.zeros(_num_blocks(n), BLOCK_ELEMENTS, dtype=torch.float32)
    x_MB.view(-1)[:n] = x_N
    return x_MB
