"""Getting a blob by digest from whoever has it: whom to ask first, when to ask a second one, resume, verify, give up. Knows the Exchange port, no network.

Many peers sit behind a router that lets nobody in: dialling one is silent for seconds. So a peer that does not answer soon is not waited for alone,
and one that did not answer lately, or has no address, is asked last. A keeper often has a packet a moment later than it is asked: it is asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from decentra.errors import DecentraError, Refused, RejectedPayload, Unreachable
from decentra.ids import Digest, PeerId, short
from decentra.ports import Events, Exchange

MAX_AT_ONCE = 8
MIN_BYTES_PER_S = 8_192

Directory = Callable[[PeerId], Sequence[str]]
Source = tuple[PeerId, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one source, or all of them, are waited for. Seconds."""

    hedge_s: float = 1.0  # a source that sent nothing for this long gets company
    attempt_s: float = 20.0  # one source, on top of the time the bytes need at MIN_BYTES_PER_S
    again_s: tuple[float, ...] = (0.2, 0.4, 0.8)  # pauses before asking once more those who do not have it yet or broke off
    ban_s: float = 600.0  # who sent wrong bytes is asked for nothing as long as anybody else is left
    shun_s: float = 60.0  # a source that did not answer is asked last for this long; doubles each time
    max_shun_s: float = 900.0


class Reachability:
    """Who answered lately, to ask first those who will answer. A memory of this process, never a reason to ask nobody."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._answered: set[PeerId] = set()
        self._shunned: dict[PeerId, tuple[float, int]] = {}  # until when, how often in a row
        self._banned: dict[PeerId, float] = {}  # until when

    def answered(self, peer: PeerId) -> None:
        self._answered.add(peer)
        self._shunned.pop(peer, None)

    def silent(self, peer: PeerId, now: float) -> None:
        """``peer`` could not be reached. Several tries that ran at the same time count once."""
        self._answered.discard(peer)
        until, num_times = self._shunned.get(peer, (0.0, 0))
        if now >= until:
            pause_s = min(self._patience.max_shun_s, self._patience.shun_s * 2**num_times)
            self._shunned[peer] = (now + pause_s, num_times + 1)

    def lied(self, peer: PeerId, now: float) -> None:
        """``peer`` sent bytes that are not what was asked for, from their beginning."""
        self._banned[peer] = now + self._patience.ban_s

    def in_order(self, sources: Sequence[Source], now: float) -> list[Source]:
        """``sources`` with the likely ones first: unknown or answering, then those without an address, then the silent, then liars; else as they came."""

        def rank(source: Source) -> int:
            peer, addresses = source
            if now < self._banned.get(peer, 0.0):
                return 3
            if now < self._shunned.get(peer, (0.0, 0))[0]:
                return 2
            return 0 if addresses or peer in self._answered else 1

        return sorted(sources, key=rank)


class Fetcher:
    """Fetches at most ``MAX_AT_ONCE`` blobs at a time. ``rx_bytes`` counts every byte that came, also useless ones."""

    def __init__(self, exchange: Exchange, directory: Directory, events: Events, patience: Patience = Patience()) -> None:
        self._exchange, self._directory, self._events, self._patience = exchange, directory, events, patience
        self._gate = asyncio.Semaphore(MAX_AT_ONCE)
        self._reachability = Reachability(patience)
        self.rx_bytes = 0

    async def fetch(self, digest: Digest, max_bytes: int, sources: Sequence[PeerId]) -> bytes:
        """The blob's bytes, from this peer's own store if it is there.

        Raises Unreachable when no source could give it, RejectedPayload('size' | 'digest') when what came was wrong.
        """
        if (mine := await self._exchange.read(digest)) is not None:
            return mine
        async with self._gate:
            began_s = _now()
            hunt = _Hunt(digest, max_bytes)
            await self._search(hunt, sources)
            if hunt.blob is None:
                raise hunt.failure()
            self._events.emit(
                "fetched", digest=digest[:12], num_bytes=len(hunt.blob), seconds=round(_now() - began_s, 3), num_asked=hunt.num_asked
            )
            return hunt.blob

    async def _search(self, hunt: _Hunt, sources: Sequence[PeerId]) -> None:
        """Ask the sources, then whoever advertises the blob."""
        known = {peer: tuple(self._directory(peer)) for peer in sources}
        await self._ask(hunt, list(known.items()))
        if hunt.blob is None:
            advertised = await self._exchange.providers(hunt.digest)
            await self._ask(hunt, [(p, a) for p, a in advertised if p not in known or not set(a) <= set(known[p])])

    async def _ask(self, hunt: _Hunt, sources: Sequence[Source]) -> None:
        """Race the sources; the first to send is listened to, the others are left, and come back when it breaks off."""
        turns = _Turns(self._patience, self._reachability.in_order(sources, _now()), _now())
        while hunt.blob is None and not turns.is_empty:
            async with self._racing() as race:
                winner = await self._race(hunt, turns, race)
                turns.put_back([a.source for a in race if a is not winner])  # they did nothing wrong
                if winner is not None and (error := await self._listen(hunt, winner)) is not None:
                    self._note(hunt, winner, error, turns)

    @asynccontextmanager
    async def _racing(self) -> AsyncIterator[list[_Attempt]]:
        """The attempts of one race; whatever is unfinished at its end is broken off."""
        race: list[_Attempt] = []
        try:
            yield race
        finally:
            for attempt in race:
                attempt.first.cancel()
            await asyncio.gather(*(a.first for a in race), return_exceptions=True)
            await asyncio.gather(*(a.stream.aclose() for a in race), return_exceptions=True)

    async def _race(self, hunt: _Hunt, turns: _Turns, race: list[_Attempt]) -> _Attempt | None:
        """The first attempt that sends something. None when all failed, or when they have to start again from the blob's beginning."""
        num_kept_bytes = len(hunt.got)
        while race or not turns.is_empty:
            while (source := turns.take(_now(), is_idle=not race)) is not None:
                race.append(self._attempt(hunt, source))
            pause_s = turns.pause_s(_now())
            if not race:
                await asyncio.sleep(pause_s or 0.0)
                continue
            await asyncio.wait([a.first for a in race], timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            for attempt in [a for a in race if a.first.done()]:
                error = attempt.first.exception()
                if error is None:
                    return attempt
                race.remove(attempt)
                self._note(hunt, attempt, error, turns)
                if len(hunt.got) != num_kept_bytes:
                    return None
        return None

    def _attempt(self, hunt: _Hunt, source: Source) -> _Attempt:
        hunt.num_asked += 1
        offset = len(hunt.got)
        stream: Any = self._exchange.get(source[0], source[1], hunt.digest, offset)
        return _Attempt(source, offset, stream, asyncio.create_task(_first_chunk(stream, self._patience.attempt_s)))

    async def _listen(self, hunt: _Hunt, attempt: _Attempt) -> Exception | None:
        """Take what the winner sends, to its end; what went wrong, if anything. What came before it broke off is kept for the next to go on from."""
        peer = attempt.source[0]
        self._reachability.answered(peer)
        try:
            async with asyncio.timeout(self._patience.attempt_s + hunt.max_bytes / MIN_BYTES_PER_S):
                self._take(hunt, attempt.first.result(), peer)
                async for chunk in attempt.stream:
                    self._take(hunt, chunk, peer)
        except (DecentraError, TimeoutError) as error:
            return error
        if (found := str(hunt.sha.hexdigest())) != hunt.digest:
            return RejectedPayload("digest", f"expected {hunt.digest[:12]}, the bytes have {found[:12]}", peer=short(peer))
        hunt.blob = bytes(hunt.got)
        for suspect in hunt.suspects - {peer}:  # what it began was wrong, and who ended it gave all of it right
            self._reachability.lied(suspect, _now())
        return None

    def _take(self, hunt: _Hunt, chunk: bytes, peer: PeerId) -> None:
        self.rx_bytes += len(chunk)
        if len(hunt.got) + len(chunk) > hunt.max_bytes:
            detail = f"blob {hunt.digest[:12]} is longer than the {hunt.max_bytes} bytes it may have"
            raise RejectedPayload("size", detail, peer=short(peer))
        if not hunt.got:
            hunt.began_by = peer
        hunt.add(chunk)

    def _note(self, hunt: _Hunt, attempt: _Attempt, error: BaseException, turns: _Turns) -> None:
        """Why a source did not give the blob: for the next choice and for the story. Who only added to foreign bytes is asked for all of them."""
        peer = attempt.source[0]
        turns.hurry(_now())
        match error:
            case RejectedPayload():
                if attempt.offset and hunt.began_by is not None:
                    hunt.suspects.add(hunt.began_by)
                hunt.start_over()
                if attempt.offset:
                    turns.put_back([attempt.source])
                    return
                hunt.wrong = error
                self._reachability.lied(peer, _now())
                self._events.emit("bad-blob", peer=short(peer), digest=hunt.digest[:12], why=error.detail)
            case Refused():
                self._reachability.answered(peer)
                hunt.reasons[peer] = str(error)
                turns.ask_again(attempt.source, _now())
            case Unreachable() | TimeoutError():
                hunt.reasons[peer] = str(error) or "too slow"
                if attempt.has_answered:
                    turns.ask_again(attempt.source, _now())
                else:
                    self._reachability.silent(peer, _now())
            case _:
                raise error


class _Turns:
    """Whose turn it is, and when: each source ``hedge_s`` after the one before or as soon as that failed; who refused or broke off, again soon."""

    def __init__(self, patience: Patience, sources: Sequence[Source], now: float) -> None:
        self._patience, self._fresh, self._next_at_s = patience, list(sources), now
        self._later: list[tuple[float, Source]] = []
        self._num_again: dict[PeerId, int] = {}

    @property
    def is_empty(self) -> bool:
        return not self._fresh and not self._later

    def take(self, now: float, *, is_idle: bool) -> Source | None:
        """The next source to ask now, if any; ``is_idle``: nobody else is being asked."""
        for at_s, source in self._later:
            if at_s <= now:
                self._later.remove((at_s, source))
                return source
        if self._fresh and (is_idle or self._next_at_s <= now):
            self._next_at_s = now + self._patience.hedge_s
            return self._fresh.pop(0)
        return None

    def pause_s(self, now: float) -> float | None:
        """Until the next turn; None when nobody is left."""
        times = [at_s for at_s, _ in self._later] + ([self._next_at_s] if self._fresh else [])
        return max(0.0, min(times) - now) if times else None

    def hurry(self, now: float) -> None:
        self._next_at_s = now

    def put_back(self, sources: Sequence[Source]) -> None:
        self._fresh[:0] = sources

    def ask_again(self, source: Source, now: float) -> None:
        num_times = self._num_again.get(source[0], 0)
        if num_times < len(self._patience.again_s):
            self._num_again[source[0]] = num_times + 1
            self._later.append((now + self._patience.again_s[num_times], source))


@dataclass
class _Hunt:
    """One blob being looked for."""

    digest: Digest
    max_bytes: int
    got: bytearray = field(default_factory=bytearray)
    sha: Any = field(default_factory=hashlib.sha256)  # of ``got``, chunk by chunk, so that no large blob is hashed at one go in the loop
    blob: bytes | None = None
    reasons: dict[PeerId, str] = field(default_factory=dict)
    wrong: RejectedPayload | None = None
    num_asked: int = 0
    began_by: PeerId | None = None  # who sent the first bytes of ``got``
    suspects: set[PeerId] = field(default_factory=set)  # began something that others ended, and it was wrong

    def add(self, chunk: bytes) -> None:
        self.got += chunk
        self.sha.update(chunk)

    def start_over(self) -> None:
        self.got.clear()
        self.sha = hashlib.sha256()

    def failure(self) -> DecentraError:
        if self.wrong is not None:
            return self.wrong
        told = "; ".join(f"{short(peer)}: {reason}" for peer, reason in self.reasons.items())
        return Unreachable(f"nobody gave blob {self.digest[:12]}: {told or 'no source is known'}")


@dataclass(eq=False)
class _Attempt:
    """One source being asked; ``first`` is its first chunk on the way."""

    source: Source
    offset: int  # of the first byte asked for
    stream: Any  # an async generator of bytes
    first: asyncio.Task[bytes]

    @property
    def has_answered(self) -> bool:
        """It began to send, whatever became of it."""
        return self.first.done() and not self.first.cancelled() and self.first.exception() is None


async def _first_chunk(stream: AsyncIterator[bytes], timeout_s: float) -> bytes:
    """The stream's first bytes, empty at its end. Raises TimeoutError and what the stream raises."""
    async with asyncio.timeout(timeout_s):
        return await anext(stream, b"")


def _now() -> float:
    return asyncio.get_running_loop().time()
