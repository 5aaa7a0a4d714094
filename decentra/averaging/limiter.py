"""Token buckets: how fast each member may speak. Pure arithmetic over a time that is handed in; no clock, no waiting."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from decentra.ids import PeerId


@dataclass(slots=True)
class Bucket:
    """Holds up to ``burst`` messages and refills by ``per_s``."""

    per_s: float
    burst: float
    _level: float
    _at_s: float

    def take(self, now_s: float) -> float:
        """Take one message; returns how many seconds the sender has to wait before it counts as sent (0: at once)."""
        self._level = min(self.burst, self._level + max(0.0, now_s - self._at_s) * self.per_s) - 1.0
        self._at_s = max(self._at_s, now_s)
        return max(0.0, -self._level / self.per_s)


class Limiter:
    """One bucket per member; keeps the ``max_members`` that spoke last, so that a reconnect does not refill a bucket."""

    def __init__(self, per_s: float, burst: float, max_members: int) -> None:
        self.per_s, self.burst, self._max_members = per_s, burst, max_members
        self._buckets: OrderedDict[PeerId, Bucket] = OrderedDict()

    def of(self, peer: PeerId, now_s: float) -> Bucket:
        bucket = self._buckets.setdefault(peer, Bucket(self.per_s, self.burst, self.burst, now_s))
        self._buckets.move_to_end(peer)
        if len(self._buckets) > self._max_members:
            self._buckets.popitem(last=False)
        return bucket
