"""Getting a blob by digest from whoever has it: whom to ask, resume, verify, give up in time. Knows the Exchange port, no network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from decentra.errors import Refused, RejectedPayload, Unreachable
from decentra.ids import Digest, PeerId, digest_of, short
from decentra.ports import Events, Exchange

ATTEMPT_IDLE_S = 20.0
MAX_AT_ONCE = 8
MIN_BYTES_PER_S = 8_192

Directory = Callable[[PeerId], Sequence[str]]


class Fetcher:
    """Fetches at most ``MAX_AT_ONCE`` blobs at a time; a blob asked for twice is fetched once."""

    def __init__(self, exchange: Exchange, directory: Directory, events: Events) -> None:
        self._exchange, self._directory, self._events = exchange, directory, events
        self._gate = asyncio.Semaphore(MAX_AT_ONCE)
        self.rx_bytes = 0

    async def fetch(self, digest: Digest, max_bytes: int, sources: Sequence[PeerId]) -> bytes:
        """The blob's bytes, from this peer's own store if it is there.

        Raises Unreachable when no source could give it, RejectedPayload('size' | 'digest') when what came was wrong from every source.
        """
        if (mine := await self._exchange.read(digest)) is not None:
            return mine
        began = asyncio.get_running_loop().time()
        async with self._gate:
            try:
                return await self._from_sources(digest, max_bytes, sources)
            finally:
                self._events.emit("fetch-measured", digest=digest[:12], s=round(asyncio.get_running_loop().time() - began, 3), sources=len(sources))

    async def _from_sources(self, digest: Digest, max_bytes: int, sources: Sequence[PeerId]) -> bytes:
        got = bytearray()
        reasons: list[str] = []
        candidates = [(p, tuple(self._directory(p))) for p in sources]
        wrong: RejectedPayload | None = None
        asked_dht = False
        while True:
            if not candidates:
                if asked_dht:
                    break
                asked_dht = True
                known = set(sources)
                candidates = [(p, a) for p, a in await self._exchange.providers(digest) if p not in known]
                continue
            peer, addresses = candidates.pop(0)
            try:
                async with asyncio.timeout(ATTEMPT_IDLE_S + max_bytes / MIN_BYTES_PER_S):
                    await self._append(got, peer, addresses, digest, max_bytes)
            except (Unreachable, Refused) as error:
                reasons.append(f"{short(peer)}: {error}")
                continue
            except TimeoutError:
                reasons.append(f"{short(peer)}: too slow")
                continue
            except RejectedPayload as error:
                wrong, got = error, bytearray()
                self._events.emit("bad-blob", peer=short(peer), digest=digest[:12], why=str(error))
                continue
            if digest_of(got) == digest:
                return bytes(got)
            wrong = RejectedPayload("digest", f"expected {digest[:12]}, the bytes have {digest_of(got)[:12]}", peer=short(peer))
            self._events.emit("bad-blob", peer=short(peer), digest=digest[:12], why=wrong.detail)
            got = bytearray()
        if wrong is not None:
            raise wrong
        raise Unreachable(f"nobody gave blob {digest[:12]}: {'; '.join(reasons) or 'no source is known'}")

    async def _append(self, got: bytearray, peer: PeerId, addresses: Sequence[str], digest: Digest, max_bytes: int) -> None:
        async for chunk in self._exchange.get(peer, addresses, digest, len(got)):
            self.rx_bytes += len(chunk)
            if len(got) + len(chunk) > max_bytes:
                raise RejectedPayload("size", f"blob {digest[:12]} is longer than the {max_bytes} bytes it may have", peer=short(peer))
            got += chunk
