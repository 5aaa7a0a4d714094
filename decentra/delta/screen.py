"""The screen: judges a decoded foreign delta before its receipt. It never changes a delta, and nobody screens after settling."""

from __future__ import annotations

import numpy as np

from decentra.bits import float_bits
from decentra.delta.decoded import Decoded
from decentra.errors import ConfigError, RejectedPayload


def screen(delta: Decoded, *, norm_bits: int | None, peer: str, round: int | None) -> None:
    """Raises RejectedPayload: ``not-finite``, or ``norm`` when the L2 norm is not the one its sender states, as float32 bits.

    The tolerance is none: norms are bit-equal on all machines that may take part (``norm.py``, ``golden.py``), so a packet has only one.
    """
    norm = delta.norm()
    try:
        true_bits = float_bits(norm)
    except ConfigError:
        raise RejectedPayload("not-finite", f"the delta's norm is {norm:.3g}, more than a float32 holds", peer=peer, round=round) from None
    if norm_bits is not None and true_bits != norm_bits:
        stated = float(np.uint32(norm_bits).view(np.float32))
        raise RejectedPayload("norm", f"the offer states a norm of {stated:.9g}, the packet's is {norm:.9g}", peer=peer, round=round)
