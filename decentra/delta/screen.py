"""The screen: judges a decoded foreign delta before its receipt. It never changes a delta, and nobody screens after settling."""

from __future__ import annotations

import math

from decentra.delta.decoded import Decoded
from decentra.errors import RejectedPayload


def screen(delta: Decoded, *, norm_limit: float | None, peer: str, round: int | None) -> float:
    """L2 norm of a delta; raises RejectedPayload (``not-finite``, or ``norm`` above ``norm_limit``; None: no limit)."""
    norm = delta.norm()
    if not math.isfinite(norm):
        raise RejectedPayload("not-finite", "the delta holds infinite or NaN values", peer=peer, round=round)
    if norm_limit is not None and not norm <= norm_limit:
        raise RejectedPayload("norm", f"the delta's norm is {norm:.6g}, the limit is {norm_limit:.6g}", peer=peer, round=round)
    return norm
