"""How fast this peer sends blobs: what its owner allows, all uploads together. No I/O but sleeping.

Without it a codec chosen for 5 Mbit/s would still leave in one burst and hold up everybody else at home.
"""

from __future__ import annotations

import asyncio

BURST_S = 0.25  # of the rate may leave at once
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 10, 64 << 10


class Pacer:
    """``await take(n)`` before sending ``n`` bytes; None is as fast as it goes. One queue: who asks first sends first."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        """Small enough that several uploads alternate within a burst, and none is silent for long."""
        if self._bytes_per_s is None:
            return MAX_CHUNK_BYTES
        return int(min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, self._bytes_per_s * BURST_S / 4)))

    async def take(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` may leave."""
        if self._bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at_s = max(self._free_at_s, now - BURST_S) + num_bytes / self._bytes_per_s
        if (wait_s := self._free_at_s - now) > 0:
            await asyncio.sleep(wait_s)
