"""Tensors to little-endian bytes and back; a layout's fingerprint for file headers. Knows no format: callers check lengths first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from decentra.bits import Buffer
from decentra.ids import digest_of
from decentra.modules import Fragment

# N elements

Ints = npt.NDArray[np.int64]
Sizes = tuple[int, ...]  # elements of each of several tensors

FLOAT_BYTES = 4
FINGERPRINT_BYTES = 8


def fingerprint(fragment: Fragment) -> bytes:
    """First 8 bytes of the sha256 of a fragment's id, parameter names and shapes."""
    layout = repr((fragment.id, [(slot.name, slot.shape) for slot in fragment.slots]))
    return bytes.fromhex(digest_of(layout.encode()))[:FINGERPRINT_BYTES]


def float_bytes(x_N: Tensor) -> bytes:
    """fp32 values as little-endian bytes, 4 per element."""
    return x_N.contiguous().numpy().astype("<f4", copy=False).tobytes()


def float_view(x_N: Tensor) -> memoryview:
    """The same bytes without a copy where the machine is little-endian: valid while nobody writes into the tensor."""
    return x_N.contiguous().numpy().astype("<f4", copy=False).data.cast("B")


def floats_at(data: Buffer, offset_bytes: int, num_elements: int) -> Tensor:
    """A new fp32 tensor [N] that owns its memory, from little-endian bytes. The caller has checked that they are there."""
    return torch.from_numpy(np.frombuffer(data, "<f4", num_elements, offset_bytes).astype(np.float32))


def assert_fits(x_N: Tensor, fragment: Fragment) -> None:
    """Our own invariant: ``x_N`` is an fp32 vector [N] of this fragment."""
    expected = (fragment.num_elements,)
    assert x_N.dtype == torch.float32, f"fragment {fragment.id} works in fp32, got {x_N.dtype}"
    assert x_N.shape == expected, f"fragment {fragment.id} has shape {expected}, got {tuple(x_N.shape)}"


def is_finite(x_N: Tensor) -> bool:
    """True when no element is infinite or NaN."""
    # minimum and maximum carry NaN and infinity, and cost two passes that write nothing
    values = x_N.detach().numpy()
    return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))
