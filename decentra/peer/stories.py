"""Whether the averaging service tells everybody the same: this peer says in public what it was told, and compares what others say.

Each word is signed by the service and names its place in the ledger, whose lines are hashes of all before them. So two words for one place that differ
prove, to anybody, that the service keeps two ledgers; nobody else can make up such a pair. Who reads the whole ledger can check words for places of which
it was told nothing, too: ``decentra history`` does (wire/ledgers.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import Digest, FragmentId, PeerId, short
from decentra.peer.disk import write_atomic
from decentra.ports import Clock, Compute, Disk, Events, Exchange
from decentra.protocol.messages import FragmentView, Heard, Told
from decentra.wire.convert import decode, encode

NUM_KEPT = 256  # words of each fragment: what others published minutes ago can still be compared
NUM_TOLD = 8  # words that are published at a time
MAX_HEARD = 512  # peers whose words are looked at in one turn
TELL_S = 60.0
FIRST_TELL_S = 5.0  # while there is nothing to say yet
EVIDENCE_FILE = "two-stories.json"

Words = dict[FragmentId, dict[int, Told]]  # by place in the fragment's chain, oldest first


@dataclass
class Stories:
    """What one member was told in the service's term, against what others were. ``is_told``: did the run's service sign this word?"""

    peer: PeerId
    genesis: Mapping[FragmentId, Digest]
    exchange: Exchange
    disk: Disk
    clock: Clock
    compute: Compute
    events: Events
    is_told: Callable[[Told], bool]
    _term: int = field(init=False, default=0)
    _words: Words = field(init=False, default_factory=dict)
    _told_differently: asyncio.Future[tuple[Told, Told, PeerId]] | None = field(init=False, default=None)
    _found: tuple[Told, Told, PeerId] | None = field(init=False, default=None)

    def saw(self, view: FragmentView) -> None:
        """The service told this peer of a confirmed anchor. Raises IntegrityError for one before any round that is not the manifest's."""
        first = self.genesis.get(view.fragment)
        if view.told is not None and first is not None:
            self._take(view.told, self.peer)
        elif view.anchor != first:
            says = "has no such fragment" if first is None else f"says {first[:12]}"
            raise IntegrityError(
                f"the averaging service says that {view.fragment} begins with anchor {view.anchor[:12]}, the manifest {says}; nothing it says is believed,"
                " tell the organiser"
            )

    async def run(self) -> None:
        """Tell and hear until cancelled. Raises IntegrityError when the service told two stories, after both were written to ``EVIDENCE_FILE``."""
        self._told_differently = asyncio.get_running_loop().create_future()
        if self._found is not None:
            self._told_differently.set_result(self._found)
        turn = 0
        while not self._told_differently.done():
            if newest := self._newest(turn):
                await self.exchange.tell(encode(Heard(newest)))
                for peer, body in (await self.exchange.hear(turn))[:MAX_HEARD]:
                    self._hear(peer, body)
                turn += 1
            pause: asyncio.Future[None] = asyncio.ensure_future(self.clock.sleep(TELL_S if newest else FIRST_TELL_S))
            await asyncio.wait((pause, self._told_differently), return_when=asyncio.FIRST_COMPLETED)
            pause.cancel()
        await self._expose(*self._told_differently.result())

    def _newest(self, turn: int) -> tuple[Told, ...]:
        """The newest word of some fragments, other ones each turn."""
        fragments = sorted(self._words)
        begin = turn * NUM_TOLD % max(1, len(fragments))
        chosen = (*fragments[begin:], *fragments[:begin])[:NUM_TOLD]
        return tuple(next(reversed(self._words[f].values())) for f in chosen)

    def _hear(self, peer: PeerId, body: bytes) -> None:
        try:
            heard: Heard = decode(Heard, body)
        except RejectedPayload as error:
            self.events.emit("record-ignored", peer=short(peer), reason=error.reason, why=error.detail)
            return
        for told in heard.told[:NUM_TOLD]:
            mine = self._words.get(told.fragment, {}).get(told.seq)
            if mine is not None and told.term == mine.term and not _is_same(mine, told) and self.is_told(told):
                self._take(told, peer)

    def _take(self, told: Told, source: PeerId) -> None:
        if told.term > self._term:  # another service, from a copy: what it says of old places need not be what the one before said
            self._term = told.term
            self._words.clear()
        elif told.term < self._term:
            return
        words = self._words.setdefault(told.fragment, {})
        known = words.setdefault(told.seq, told)
        if not _is_same(known, told) and self._found is None:
            self._found = known, told, source
            if self._told_differently is not None and not self._told_differently.done():
                self._told_differently.set_result(self._found)
        while len(words) > NUM_KEPT:
            del words[next(iter(words))]

    async def _expose(self, mine: Told, other: Told, source: PeerId) -> None:
        evidence = {"told": [_readable(mine), _readable(other)], "heard_by": [self.peer, source]}
        self.events.emit("two-stories", fragment=mine.fragment, why=f"{mine.anchor[:12]} and {other.anchor[:12]} for line {mine.seq}")
        try:
            await self.compute.run(write_atomic, self.disk, EVIDENCE_FILE, json.dumps(evidence, indent=1).encode())
        except OSError as error:
            self.events.emit("checkpoint-failed", why=f"{EVIDENCE_FILE}: {error.strerror}")
        whom = "this peer, earlier," if source == self.peer else short(source)
        raise IntegrityError(
            f"the averaging service told two stories: line {mine.seq} of {mine.fragment} made anchor {mine.anchor[:12]} the confirmed one, as this peer was"
            f" told, and {other.anchor[:12]}, as {whom} was told. Both are signed, see {EVIDENCE_FILE} in this peer's directory. Ask the organiser over"
            " another channel; a service that was restored from an older copy has to be started with 'decentra host RUN_DIR --take-over'"
        )


def _is_same(one: Told, other: Told) -> bool:
    return (one.line, one.height, one.anchor) == (other.line, other.height, other.anchor)


def _readable(told: Told) -> dict[str, object]:
    return {**asdict(told), "proof": told.proof.hex()}
