"""Whether the averaging service tells everybody the same: this peer says in public what it was told, and compares what others say.

Each word is signed by the service and names its place in the ledger, whose lines are hashes of all before them. So two words for one place that differ
prove, to anybody who has the service's certificate, that it keeps two ledgers; nobody else can make up such a pair. Who reads the whole ledger can check
words for places of which it was told nothing, too: ``decentra history --compare`` does (wire/ledgers.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import Digest, FragmentId, PeerId, short
from decentra.peer.disk import write_atomic
from decentra.ports import Clock, Compute, Disk, Events, Exchange
from decentra.protocol.messages import FragmentView, Heard, Told
from decentra.wire.convert import decode, encode

NUM_KEPT = 256  # words of each fragment: what others published minutes ago can still be compared
NUM_TOLD = 4  # words that are published at a time
MAX_HEARD = 512  # peers whose words are looked at in one turn
TELL_S = 60.0
FIRST_TELL_S = 5.0  # while there is nothing to say yet
WORDS_FILE, EVIDENCE_FILE = "told", "two-stories.json"
_WHAT_TO_DO = (
    f"See {EVIDENCE_FILE} in this peer's directory, and ask the organiser over another channel. A service that was restored from an older copy has to be"
    " started with 'decentra host RUN_DIR --take-over'; then this peer goes on"
)


@dataclass(frozen=True)
class _Finding:
    """What is wrong, in words, and what shows it."""

    why: str
    told: tuple[Told, ...] = ()
    certificates: tuple[bytes, ...] = ()
    heard_by: PeerId | None = None
    is_written: bool = False


@dataclass
class Stories:
    """What one member was told in the service's term, against what others were.

    ``is_told``: did the run's service of now sign this word? ``contradicts``: is this certificate of another service of the same term? ``certificate``:
    of the service that this member listens to, sealed.
    """

    peer: PeerId
    genesis: Mapping[FragmentId, Digest]
    exchange: Exchange
    disk: Disk
    clock: Clock
    compute: Compute
    events: Events
    is_told: Callable[[Told], bool]
    contradicts: Callable[[bytes], bool] = lambda _: False
    certificate: Callable[[], bytes] = bytes
    _term: int = field(init=False, default=0)
    _words: dict[FragmentId, dict[int, Told]] = field(init=False, default_factory=dict)  # by place in the fragment's chain, oldest first
    _earlier: tuple[int, str] | None = field(init=False, default=None)  # (term, what an earlier process found)
    _saved: bytes = field(init=False, default=b"")
    _found: asyncio.Future[_Finding] | None = field(init=False, default=None)
    _finding: _Finding | None = field(init=False, default=None)

    # ------------------------------------------------------------ what this peer is told

    async def load(self) -> None:
        """What an earlier process was told last, and whether it found two stories: then this one ends as soon as the same term speaks to it."""
        evidence, words = await self.compute.run(self._read)
        try:
            raw: dict[str, Any] = json.loads(evidence)
            self._earlier = int(raw["term"]), str(raw["why"])
        except (ValueError, TypeError, KeyError) as error:
            if evidence != b"null":
                self.events.emit("damaged-file", file=EVIDENCE_FILE, why=f"{type(error).__name__}: {error}")
        try:
            for one in decode(Heard, words).told:
                self._take(one)
        except RejectedPayload as error:
            self.events.emit("damaged-file", file=WORDS_FILE, why=error.detail)

    def _read(self) -> tuple[bytes, bytes]:
        return self.disk.read(EVIDENCE_FILE) or b"null", self.disk.read(WORDS_FILE) or b""

    def saw(self, view: FragmentView) -> None:
        """The service told this peer of a confirmed anchor. Raises IntegrityError for what is no word at all, and for a second story."""
        first, told = self.genesis.get(view.fragment), view.told
        if first is None or told is None or (told.seq == 0 and told.anchor != first):
            says = "has no such fragment" if first is None else f"says {first[:12]}"
            raise IntegrityError(
                f"the averaging service says that {view.fragment} begins with anchor {view.anchor[:12]}, the manifest {says}; nothing it says is believed,"
                " tell the organiser"
            )
        if self._earlier is not None and told.term == self._earlier[0]:
            self._find(_Finding(f"an earlier process of this peer found out: {self._earlier[1]}", is_written=True))
        newest = self._newest_of(view.fragment)
        if newest is not None and newest.term == told.term and told.seq < newest.seq:
            why = f"line {newest.seq} of {told.fragment} made anchor {newest.anchor[:12]} the confirmed one, and now line {told.seq} is said to be the newest"
            self._find(_Finding(why, (newest, told)))
        self._take(told)
        if self._finding is not None:
            raise IntegrityError(f"the averaging service told two stories: {self._finding.why}")  # and this one is not followed

    # ------------------------------------------------------------ what others are told

    async def run(self) -> None:
        """Tell and hear until cancelled. Raises IntegrityError when the service told two stories, after both were written to ``EVIDENCE_FILE``."""
        self._found = found = asyncio.get_running_loop().create_future()
        if self._finding is not None:
            found.set_result(self._finding)
        turn = 0
        while not found.done():
            is_told = bool(self._words)
            if is_told:
                await self._save()
                await self.exchange.tell(encode(Heard(self._newest(turn), self.certificate())))
                for peer, body in (await self.exchange.hear(turn))[:MAX_HEARD]:
                    self._hear(peer, body)
                turn += 1
            pause: asyncio.Future[None] = asyncio.ensure_future(self.clock.sleep(TELL_S if is_told else FIRST_TELL_S))
            try:
                await asyncio.wait((pause, found), return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
        await self.check()

    async def check(self) -> None:
        """Raise IntegrityError when two stories were found and not told yet."""
        if (finding := self._finding) is None:
            return
        self.events.emit("two-stories", why=finding.why)
        evidence = {
            "term": self._term, "why": finding.why, "told": [asdict(told) | {"proof": told.proof.hex()} for told in finding.told],
            "certificates": [one.hex() for one in (self.certificate(), *finding.certificates) if one],
            "heard_by": [self.peer, finding.heard_by or self.peer],
        }  # fmt: skip
        try:
            if not finding.is_written:
                await self.compute.run(write_atomic, self.disk, EVIDENCE_FILE, json.dumps(evidence, indent=1).encode())
        except OSError as error:
            self.events.emit("evidence-lost", why=f"{EVIDENCE_FILE}: {error.strerror}")
        raise IntegrityError(f"the averaging service told two stories: {finding.why}. {_WHAT_TO_DO}")

    async def _save(self) -> None:
        words = encode(Heard(tuple(word for f in sorted(self._words) if (word := self._newest_of(f)) is not None)))
        if words == self._saved:
            return
        try:
            await self.compute.run(write_atomic, self.disk, WORDS_FILE, words)
            self._saved = words
        except OSError as error:
            self.events.emit("checkpoint-failed", why=f"{error.strerror}; training goes on, free some space")

    def _newest(self, turn: int) -> tuple[Told, ...]:
        """The newest word of some fragments, other ones each turn."""
        fragments = sorted(self._words)
        begin = turn * NUM_TOLD % max(1, len(fragments))
        chosen = (*fragments[begin:], *fragments[:begin])[:NUM_TOLD]
        return tuple(word for f in chosen if (word := self._newest_of(f)) is not None)

    def _newest_of(self, fragment: FragmentId) -> Told | None:
        words = self._words.get(fragment)
        return next(reversed(words.values())) if words else None

    def _hear(self, peer: PeerId, body: bytes) -> None:
        try:
            heard: Heard = decode(Heard, body)
        except RejectedPayload as error:
            self.events.emit("record-ignored", peer=short(peer), reason=error.reason, why=error.detail)
            return
        if heard.certificate and self.contradicts(heard.certificate):
            why = (
                f"{short(peer)} listens to another service of term {self._term}; of two in one term nobody knows which one is the run's, until the right one is"
                " started with --take-over"
            )
            self._find(_Finding(why, certificates=(heard.certificate,), heard_by=peer))
        for told in heard.told[:NUM_TOLD]:
            mine = self._words.get(told.fragment, {}).get(told.seq)
            if mine is None or told.term != mine.term or _is_same(mine, told):
                continue
            if not self.is_told(told):
                break  # made up; the next one would only cost time
            self._find(_two_of_one_place(mine, told, peer))

    # ------------------------------------------------------------ parts

    def _take(self, told: Told) -> None:
        if told.term > self._term:  # another service, from a copy: what it says of old places need not be what the one before said
            self._term = told.term
            self._words.clear()
        elif told.term < self._term:
            return
        words = self._words.setdefault(told.fragment, {})
        if not _is_same(known := words.setdefault(told.seq, told), told):
            self._find(_two_of_one_place(known, told, None))
        while len(words) > NUM_KEPT:
            del words[next(iter(words))]

    def _find(self, finding: _Finding) -> None:
        if self._finding is None:
            self._finding = finding
            if self._found is not None and not self._found.done():
                self._found.set_result(finding)


def _is_same(one: Told, other: Told) -> bool:
    return (one.line, one.height, one.anchor) == (other.line, other.height, other.anchor)


def _two_of_one_place(mine: Told, other: Told, peer: PeerId | None) -> _Finding:
    whom = "it was told another time" if peer is None else f"{short(peer)} was told"
    why = f"line {mine.seq} of {mine.fragment} made anchor {mine.anchor[:12]} the confirmed one, as this peer was told, and {other.anchor[:12]}, as {whom}"
    return _Finding(why, (mine, other), heard_by=peer)
