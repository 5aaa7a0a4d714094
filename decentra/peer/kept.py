"""Which blobs of one fragment this peer has promised to keep, and until when. Decides nothing about rounds; no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from decentra.ids import Digest
from decentra.ports import Events, Exchange

NUM_KEPT_ROUNDS = 4  # rounds whose packets are served on, for members that come back


@dataclass
class KeptBlobs:
    """Packets and anchors by the round they belong to, and a reducer's residuals. What is pinned is not evicted, whatever else wants the space.

    ``keeps_packets``: those of old rounds are not dropped, they stay until their space is needed.
    """

    exchange: Exchange
    events: Events
    keeps_packets: bool = False
    by_round: dict[int, tuple[Digest, ...]] = field(default_factory=dict)
    residuals: tuple[Digest, ...] = ()  # of the newest merge: what it began with and what it left
    whole: set[Digest] = field(default_factory=set)  # those of ``by_round`` that are no packets

    def restore(self, by_round: Mapping[int, tuple[Digest, ...]], residuals: Sequence[Digest], whole: Sequence[Digest] = ()) -> None:
        """What the last process kept."""
        self.by_round, self.whole = dict(by_round), set(whole)
        self.keep_residuals(residuals)

    async def hold(self, number: int, digest: Digest, data: bytes) -> None:
        """A receipt or an offer is a promise: the packet stays until its round is old."""
        await self.exchange.put(digest, data)
        self.exchange.pin(digest)
        self.keep(number, (digest,))

    def keep(self, number: int, blobs: Sequence[Digest]) -> None:
        """These belong to the round, besides those that did already."""
        self.by_round[number] = tuple(dict.fromkeys((*self.by_round.get(number, ()), *blobs)))

    def keep_whole(self, number: int, digest: Digest) -> None:
        """A blob as large as the fragment, an anchor or a residual, that goes with the round."""
        self.keep(number, (digest,))
        self.whole.add(digest)

    def keep_residuals(self, digests: Sequence[Digest]) -> None:
        """Pin these; those held before are dropped when their round is old."""
        new = tuple(dict.fromkeys(digests))[-2:]
        for digest in set(new) - set(self.residuals):
            self.exchange.pin(digest)
        for digest in set(self.residuals) - set(new):
            self.exchange.unpin(digest)
            self.keep_whole(min(self.by_round, default=0), digest)
        self.residuals = new

    def move_pin(self, old: Digest | None, new: Digest) -> None:
        """The anchor is another one now."""
        if old == new:
            return
        self.exchange.pin(new)
        if old is not None:
            self.exchange.unpin(old)

    async def collect_garbage(self, anchor: Digest | None) -> None:
        """Drop blobs of rounds older than the newest few; never the confirmed anchor."""
        old = sorted(self.by_round)[:-NUM_KEPT_ROUNDS]
        still = {d for number, blobs in self.by_round.items() if number not in old for d in blobs} | {anchor, *self.residuals}
        for number in old:
            for digest in self.by_round.pop(number):
                if digest in still:
                    continue
                if self.keeps_packets and digest not in self.whole:
                    self.exchange.unpin(digest)
                    continue
                self.whole.discard(digest)
                try:
                    await self.exchange.drop(digest)
                except OSError as error:  # the round is committed all the same
                    self.events.emit("not-dropped", digest=digest[:12], why=str(error))
