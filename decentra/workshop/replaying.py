"""A run's anchors, computed again from its ledger and its packets: whether they are what the ledger says, as they were, and as they would be had somebody
never taken part. Records and bytes in, values out; no network, no clock.

Leaving somebody out takes back what its packets moved, not what others learnt from anchors that held them: their packets stay as they are. So it is for
packets that did no harm. What a liar moved the others pushed back, and without it their packets push too far (tests/bench/LOG.md): there the run goes back
to before it came.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace

from decentra.config import Manifest
from decentra.delta.anchor import AnchorState, anchor_digest, decode_anchor, encode_anchor
from decentra.delta.decoded import Decoded
from decentra.delta.packet import decode_packet
from decentra.errors import ConfigError, IntegrityError, RejectedPayload
from decentra.ids import MERGED, TRUNK, Digest, FragmentId, PeerId, module_of_fragment
from decentra.modules import Fragment
from decentra.peer.applying import merged_delta, stepped
from decentra.protocol import ledger, settling
from decentra.protocol.messages import Settlement

Read = Callable[[Digest], bytes | None]


@dataclass(frozen=True, slots=True)
class Link:
    """One confirmed round and the anchor it led to."""

    settlement: Settlement
    anchor: Digest
    height: int


@dataclass
class Story:
    """How one fragment came from an anchor to where it is; rounds that were taken back are not in it. ``points``: (anchor, height), one more than links."""

    fragment: FragmentId
    points: list[tuple[Digest, int]]
    links: list[Link] = field(default_factory=list)
    hidden: list[Link] = field(default_factory=list)  # rounds inside an anchor that was computed anew: nothing can be taken out of it
    _past: list[tuple[list[tuple[Digest, int]], list[Link], list[Link]]] = field(default_factory=list)

    def add(self, link: Link) -> None:
        self.links.append(link)
        self.points.append((link.anchor, link.height))

    def go_back(self, height: int, anchor: Digest) -> None:
        """To one of its own anchors; another one begins the story anew."""
        self._past.append((self.points, self.links, self.hidden))
        for points, links, hidden in reversed(self._past):  # also to one that was left before
            if (anchor, height) in points:
                at = len(points) - 1 - points[::-1].index((anchor, height))
                self.points, self.links, self.hidden = points[: at + 1], links[:at], hidden
                return
        self.points, self.links, self.hidden = [(anchor, height)], [], [*self.hidden, *self.links]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A fragment's anchor after a replay, and how it came about."""

    fragment: FragmentId
    blob: bytes
    height: int
    from_height: int  # of the kept anchor that it began with
    num_rounds: int  # computed again
    num_changed: int  # of them: rounds in which somebody was left out
    num_stay: int  # rounds with somebody to be left out that lie before the beginning: nothing is kept of them

    @property
    def digest(self) -> Digest:
        return anchor_digest(self.blob)


@dataclass
class Audit:
    """What became of computing every kept round again."""

    num_equal: int = 0
    num_unchecked: int = 0  # no anchor before them, or not all of their packets
    wrong: list[str] = field(default_factory=list)


def until(records: Sequence[ledger.Record], trunk_height: int) -> Sequence[ledger.Record]:
    """The ledger up to the moment at which the trunk (its slowest fragment) came to this height. Raises ConfigError where it never did."""
    heights = {f: 0 for f, _ in _genesis(records) if module_of_fragment(f) == TRUNK}
    now, end = 0, 0 if trunk_height == 0 else None
    for index, record in enumerate(records):
        if isinstance(record, ledger.Started) and trunk_height == 0:
            end = index + 1
        if isinstance(record, ledger.Confirmed | ledger.RolledBack) and record.fragment in heights:
            heights[record.fragment] = record.height
            before, now = now, min(heights.values())
            if now == trunk_height != before:
                end = index + 1
    if end is None:
        raise ConfigError(f"the trunk never had {trunk_height} confirmed rounds; it has {now}")
    return records[:end]


def before(records: Sequence[ledger.Record], peers: Container[PeerId]) -> Sequence[ledger.Record]:
    """The ledger up to the first settlement with a packet of one of them."""
    for index, record in enumerate(records):
        if isinstance(record, ledger.Settled) and any(e.peer in peers for e in record.settlement.entries):
            return records[:index]
    return records


def stories(records: Iterable[ledger.Record]) -> dict[FragmentId, Story]:
    """Of every fragment how it came to its newest anchor. A ledger's chains were checked before."""
    found: dict[FragmentId, Story] = {}
    settled: dict[FragmentId, Settlement] = {}
    for record in records:
        match record:
            case ledger.Started(_, genesis):
                found = {fragment: Story(fragment, [(digest, 0)]) for fragment, digest in genesis}
            case ledger.Settled(settlement):
                settled[settlement.fragment] = settlement
            case ledger.Confirmed(fragment, number, height, anchor):
                settlement = settled.pop(fragment)
                if settlement.round != number:
                    raise IntegrityError(f"the ledger confirms round {number} of {fragment}, which it never settled")
                found[fragment].add(Link(settlement, anchor, height))
            case ledger.RolledBack(fragment, height, anchor):
                found[fragment].go_back(height, anchor)
            case _:
                pass
    return found


def _genesis(records: Sequence[ledger.Record]) -> tuple[tuple[FragmentId, Digest], ...]:
    return next((r.genesis for r in records if isinstance(r, ledger.Started)), ())


class Teller:
    """Computes the rounds of one fragment again. ``read`` gives a kept blob, verified, or None."""

    def __init__(self, fragment: Fragment, manifest: Manifest, story: Story, read: Read) -> None:
        self.fragment, self.manifest, self.story, self._read = fragment, manifest, story, read

    def replay(self, without: Container[PeerId] = ()) -> Replayed:
        """The newest anchor of the story, as it would be without these peers. Raises IntegrityError where too little is kept for it.

        Begins with the newest kept anchor before their first round; where packets are missing on the way, with the next kept one behind the gap.
        """
        links, points = self.story.links, self.story.points
        has_them = [any(e.peer in without for e in link.settlement.entries) for link in links]
        first = has_them.index(True) if True in has_them else len(links)
        begin = next((i for i in range(first, -1, -1) if self._anchor(points[i][0]) is not None), None)
        if begin is None:
            begin = self._next_kept(first)
        while True:
            state, num_changed, gap = self._anchor(points[begin][0]), 0, None
            assert state is not None
            for index in range(begin, len(links)):
                settlement = links[index].settlement
                if first < len(links):  # what reducers made holds what they left out of rounds before, which is computed again here
                    settlement = replace(settlement, merged=None, reducers=())
                changed = settling.without(settlement, without, self.manifest.outer_of(self.fragment.id))
                num_changed += has_them[index]
                if changed is None:
                    continue
                deltas = self._deltas(changed)
                if deltas is None:
                    gap = index
                    break
                state = self._after(state, changed, deltas)
            if gap is None:
                blob = encode_anchor(self.fragment, state)
                num_stay = sum(has_them[:begin]) + sum(
                    any(e.peer in without for e in link.settlement.entries) for link in self.story.hidden
                )
                return Replayed(self.fragment.id, blob, points[-1][1], points[begin][1], len(links) - begin, num_changed, num_stay)
            begin = self._next_kept(gap + 1)

    def audit(self, audit: Audit) -> None:
        """Compute every round again whose packets are kept, from the oldest kept anchor on, and compare with the ledger."""
        audit.num_unchecked += len(self.story.hidden)
        state = self._anchor(self.story.points[0][0])
        for link in self.story.links:
            deltas = None if state is None else self._deltas(link.settlement)
            if state is None or deltas is None:
                audit.num_unchecked += 1
                state = self._anchor(link.anchor)
                continue
            state = self._after(state, link.settlement, deltas)
            if (digest := anchor_digest(encode_anchor(self.fragment, state))) == link.anchor:
                audit.num_equal += 1
                continue
            audit.wrong.append(
                f"round {link.settlement.round} of {self.fragment.id}: its packets give anchor {digest[:12]}, {link.anchor[:12]} was confirmed"
            )
            state = self._anchor(link.anchor)

    def _next_kept(self, first: int) -> int:
        points = self.story.points
        found = next((i for i in range(first, len(points)) if self._anchor(points[i][0]) is not None), None)
        if found is None:
            raise IntegrityError(
                f"{self.fragment.id} cannot be replayed to height {points[-1][1]}: no anchor is kept from height {points[min(first, len(points) - 1)][1]} on"
                " with all packets behind it; give the folder of another keeper that was there with --store"
            )
        return found

    def _anchor(self, digest: Digest) -> AnchorState | None:
        blob = self._read(digest)
        return None if blob is None else decode_anchor(self.fragment, blob)

    def _deltas(self, settlement: Settlement) -> dict[PeerId, Decoded] | None:
        """The packets of a settlement, decoded; None where one is not kept."""
        names = {MERGED: settlement.merged.packet} if settlement.merged else {e.peer: e.packet for e in settlement.entries}
        deltas = {}
        for peer, packet in names.items():
            if (data := self._read(packet)) is None:
                return None
            try:
                deltas[peer] = decode_packet(data, self.fragment, peer=peer, round=settlement.round, must_be_theirs=True)
            except RejectedPayload as error:
                raise IntegrityError(f"packet {packet[:12]} of {self.fragment.id}, round {settlement.round}: {error.detail}") from None
        return deltas

    def _after(self, state: AnchorState, settlement: Settlement, deltas: dict[PeerId, Decoded]) -> AnchorState:
        merged_N = merged_delta(self.fragment, self.manifest, settlement, deltas)
        return stepped(self.fragment, self.manifest, state, settlement, merged_N)
