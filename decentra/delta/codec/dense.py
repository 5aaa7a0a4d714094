"""Dense codecs: every value as fp32 or bf16. Stateless; bf16 is done in integers so that no CPU's conversion instruction matters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.delta.raw import FLOAT_BYTES, Sizes, float_bytes, floats_at

# N elements of all tensors of a section

_MAX_BF16 = 3.3895313892515355e38  # largest finite bf16, (2 - 2**-7) * 2**127


class Fp32:
    """4 bytes per value, exact."""

    name = "fp32"
    code = 1

    def encoded_size(self, sizes: Sizes) -> int:
        return FLOAT_BYTES * sum(sizes)

    def max_size(self, sizes: Sizes) -> int:
        return self.encoded_size(sizes)

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        return float_bytes(values_N)

    def decode(self, data: Buffer, sizes: Sizes) -> Tensor:
        return floats_at(data, 0, sum(sizes))


class Bf16:
    """2 bytes per value: the upper half of an fp32, rounded to nearest, ties to even; values beyond bf16's range saturate."""

    name = "bf16"
    code = 2

    def encoded_size(self, sizes: Sizes) -> int:
        return 2 * sum(sizes)

    def max_size(self, sizes: Sizes) -> int:
        return self.encoded_size(sizes)

    def encode(self, values_N: Tensor, sizes: Sizes) -> bytes:
        # the clamp leaves no bit pattern that the carry could push beyond 32 bits
        bits_N = values_N.clamp(-_MAX_BF16, _MAX_BF16).contiguous().numpy().view(np.uint32)
        rounded_N = (bits_N + 0x7FFF + ((bits_N >> 16) & 1)) >> 16
        return rounded_N.astype("<u2").tobytes()

    def decode(self, data: Buffer, sizes: Sizes) -> Tensor:
        upper_N = np.frombuffer(data, "<u2", sum(sizes)).astype(np.uint32)
        return torch.from_numpy((upper_N << 16).view(np.float32))
