"""Named parameters to a fragment's flat vector and back. Moves numbers, changes none beyond the cast to fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from decentra.delta.raw import assert_fits
from decentra.errors import ConfigError
from decentra.modules import Fragment

# N elements of a fragment


def gather(params: Mapping[str, Tensor], fragment: Fragment) -> Tensor:
    """Copy a fragment's parameters into a new contiguous fp32 CPU vector [N].

    Parameters may be of any dtype, device and stride. Raises ConfigError when one is missing or of another shape.
    """
    flat_N = torch.empty(fragment.num_elements, dtype=torch.float32)
    for slot in fragment.slots:
        tensor = params.get(slot.name)
        if tensor is None:
            raise ConfigError(
                f"fragment {fragment.id} expects parameter {slot.name}, the model has none of that name; check the model's code"
            )
        if tuple(tensor.shape) != slot.shape:
            raise ConfigError(
                f"fragment {fragment.id} expects parameter {slot.name} of shape {slot.shape}, the model's has {tuple(tensor.shape)};"
                " check the model's code"
            )
        flat_N[slot.offset : slot.offset + slot.size].view(slot.shape).copy_(tensor.detach())
    return flat_N


def scatter(flat_N: Tensor, fragment: Fragment) -> dict[str, Tensor]:
    """Views into ``flat_N`` [N], one per parameter, with the parameters' shapes. Writing to a view writes to ``flat_N``."""
    assert_fits(flat_N, fragment)
    return {slot.name: flat_N[slot.offset : slot.offset + slot.size].view(slot.shape) for slot in fragment.slots}


def with_untouched(live_N: Tensor, anchor_N: Tensor, untouched: Sequence[slice]) -> Tensor:
    """``live_N``, but the anchor where the peer trained nothing: what rounding left between the two there is no progress. Changes ``live_N``."""
    for span in untouched:
        live_N[span] = anchor_N[span]
    return live_N
