"""The screen: judges a decoded foreign delta before its receipt. It never changes a delta, and nobody screens after settling."""

from __future__ import annotations

import torch
from torch import Tensor

from decentra.delta.raw import is_finite
from decentra.errors import RejectedPayload

# N elements of a fragment


def screen(values_N: Tensor, *, norm_limit: float | None, peer: str, round: int | None) -> float:
    """L2 norm of a delta fp32 [N]; raises RejectedPayload (``not-finite``, or ``norm`` above ``norm_limit``; None: no limit).

    The norm is a local judgement and a reduction: it is close, not bit-equal, between machines.
    """
    if not is_finite(values_N):
        raise RejectedPayload("not-finite", "the delta holds infinite or NaN values", peer=peer, round=round)
    # fp64: the square of a large finite fp32 overflows fp32
    norm = float(torch.linalg.vector_norm(values_N, dtype=torch.float64))
    if norm_limit is not None and not norm <= norm_limit:
        raise RejectedPayload("norm", f"the delta's norm is {norm:.6g}, the limit is {norm_limit:.6g}", peer=peer, round=round)
    return norm
