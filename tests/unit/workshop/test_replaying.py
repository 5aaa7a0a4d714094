"""A run told by its ledger is computed again: bit-equal as it was, and as it would be without somebody; what is not kept is said, never guessed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decentra.bits import float_bits
from decentra.config import CodecSpec, Manifest, ModelSpec, OuterSpec
from decentra.delta.anchor import AnchorState, anchor_digest, decode_anchor, encode_anchor
from decentra.delta.packet import decode_packet, encode_packet
from decentra.delta.reduce import reduce_packets
from decentra.errors import ConfigError, IntegrityError
from decentra.ids import MERGED, Digest, FragmentId, PeerId, RunId, digest_of
from decentra.modules import build_layout
from decentra.peer.applying import merge_entries, merged_delta, stepped
from decentra.protocol import ledger, settling
from decentra.protocol.messages import Entry, Merged, Phase, Settlement
from decentra.workshop.replaying import Audit, Teller, before, stories, until

LAYOUT = build_layout([("a.norm", (4,)), ("b.weight", (5, 8))])
FRAGMENT = LAYOUT.fragments[0]
N = FRAGMENT.num_elements
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
GENESIS = AnchorState(torch.linspace(-1, 1, N))
MANIFEST = Manifest(
    name="test", model=ModelSpec(num_experts=2), codec=CodecSpec(name="int8"), outer=OuterSpec(rule="nesterov", lr=0.7, momentum=0.9, clip=1.0)
)  # fmt: skip
OUTER = MANIFEST.outer_of(FRAGMENT.id)


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * 0.1


@dataclass
class Run:
    """A swarm of one fragment: its ledger, and everything that anybody ever stored."""

    state: AnchorState = GENESIS
    height: int = 0
    number: int = 0
    store: dict[Digest, bytes] = field(default_factory=dict)
    records: list[ledger.Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        genesis = self.keep(encode_anchor(FRAGMENT, self.state))
        self.records.append(ledger.Started(RunId("r"), ((FRAGMENT.id, genesis),)))

    def keep(self, blob: bytes) -> Digest:
        self.store[digest_of(blob)] = blob
        return digest_of(blob)

    @property
    def anchor(self) -> Digest:
        return anchor_digest(encode_anchor(FRAGMENT, self.state))

    def entries(self, peers: Iterable[PeerId]) -> tuple[Entry, ...]:
        found = []
        for peer in sorted(peers):
            data = encode_packet(FRAGMENT, vector(1000 * self.number + ord(peer)), "int8", peer=peer, round=self.number)
            norm = float_bits(decode_packet(data, FRAGMENT).norm())
            found.append(Entry(peer, self.keep(data), len(data), 100 + ord(peer), 0, norm, 0))
        return tuple(found)

    def confirm(self, *peers: PeerId, is_reduced: bool = False) -> None:
        """One round with packets of these peers."""
        self.number += 1
        entries = self.entries(peers)
        scalars = settling.scalars_of(entries, self.height + 1, OUTER)
        assert scalars is not None
        entries = tuple(replace(e, weight_bits=w, clip_bits=c) for e, (w, c) in zip(entries, scalars[2], strict=True))
        settlement = Settlement(FRAGMENT.id, self.number, self.height + 1, self.anchor, entries, scalars[0], scalars[1], "")
        if is_reduced:
            merged_N = merge_entries(FRAGMENT, MANIFEST, settlement, self.deltas(settlement))
            packet, left = reduce_packets(FRAGMENT, merged_N, None, "int8", self.number)
            settlement = replace(settlement, reducers=(A, B), merged=Merged(self.keep(packet), len(packet), self.keep(left)))
        assert not settling.what_is_wrong(settlement, OUTER)
        self.records.append(ledger.Settled(settlement))
        self.state = stepped(
            FRAGMENT, MANIFEST, self.state, settlement, merged_delta(FRAGMENT, MANIFEST, settlement, self.deltas(settlement))
        )
        self.height += 1
        self.keep(encode_anchor(FRAGMENT, self.state))
        self.records.append(ledger.Confirmed(FRAGMENT.id, self.number, self.height, self.anchor, (A, B), False, ""))

    def deltas(self, settlement: Settlement) -> dict[PeerId, object]:
        names = {MERGED: settlement.merged.packet} if settlement.merged else {e.peer: e.packet for e in settlement.entries}
        return {peer: decode_packet(self.store[packet], FRAGMENT) for peer, packet in names.items()}

    def abandon(self) -> None:
        self.number += 1
        self.records.append(ledger.GaveUp(FRAGMENT.id, self.number, Phase.ABANDONED, ""))

    def teller(self, lost: Iterable[Digest] = (), records: Iterable[ledger.Record] | None = None) -> Teller:
        kept = {d: b for d, b in self.store.items() if d not in set(lost)}
        return Teller(FRAGMENT, MANIFEST, stories(self.records if records is None else records)[FRAGMENT.id], kept.get)

    def anchors(self) -> list[Digest]:
        return [self.records[0].genesis[0][1], *(r.anchor for r in self.records if isinstance(r, ledger.Confirmed))]  # type: ignore[union-attr]

    def packets(self, number: int) -> list[Digest]:
        return [
            e.packet for r in self.records if isinstance(r, ledger.Settled) and r.settlement.round == number for e in r.settlement.entries
        ]


PEERS_OF_ROUNDS = st.lists(st.sets(st.sampled_from([A, B, C]), min_size=1), min_size=1, max_size=6)


@given(PEERS_OF_ROUNDS, st.sets(st.integers(1, 6)), st.booleans())
@settings(max_examples=25)
def test_a_replay_is_the_ledgers_anchor_whichever_anchors_are_kept(rounds: list[set[PeerId]], lost: set[int], is_reduced: bool) -> None:
    run = Run()
    for number, peers in enumerate(rounds):
        run.confirm(*peers, is_reduced=is_reduced and number % 2 == 0)
        run.abandon()
    anchors = run.anchors()
    teller = run.teller(lost=[anchors[i] for i in lost if i < len(anchors)])
    done = teller.replay()
    assert (done.digest, done.height) == (run.anchor, run.height)
    assert (done.num_changed, done.num_stay) == (0, 0)
    audit = Audit()
    run.teller().audit(audit)
    assert (audit.num_equal, audit.num_unchecked, audit.wrong) == (len(rounds), 0, [])


@given(PEERS_OF_ROUNDS)
@settings(max_examples=25)
def test_without_somebody_it_is_the_run_of_the_others_packets(rounds: list[set[PeerId]]) -> None:
    run, others = Run(), Run()
    for peers in rounds:
        run.confirm(*peers)
        if peers - {C}:
            others.number = run.number - 1  # the same packets
            others.height = run.height - 1  # and the same outer step
            others.confirm(*(peers - {C}))
    done = run.teller().replay({C})
    assert done.digest == others.anchor
    assert done.height == run.height
    assert done.num_changed == sum(C in peers for peers in rounds)
    assert done.num_stay == 0


def test_what_somebody_did_before_the_oldest_kept_anchor_stays_and_is_said() -> None:
    run = Run()
    for peers in ((A, B), (A, C), (A, B), (A, C), (B,)):
        run.confirm(*peers)
    anchors = run.anchors()
    done = run.teller(lost=[*anchors[:3], *anchors[4:]]).replay({C})
    assert (done.from_height, done.num_rounds, done.num_changed, done.num_stay) == (3, 2, 1, 1)


def test_a_gap_in_the_packets_is_stepped_over_where_an_anchor_lies_behind_it() -> None:
    run = Run()
    for peers in ((A, C), (A, B), (A, C), (B,)):
        run.confirm(*peers)
    done = run.teller(lost=run.packets(2)).replay({C})
    assert (done.from_height, done.num_stay) == (2, 1)
    done = run.teller(lost=run.packets(2)).replay()
    assert (done.digest, done.from_height) == (run.anchor, 4)
    with pytest.raises(IntegrityError, match="cannot be replayed to height 4: no anchor is kept"):
        run.teller(lost=[*run.packets(2), *run.anchors()[2:]]).replay({C})


def test_a_reduced_round_needs_everybodys_packets_only_when_somebody_is_left_out() -> None:
    run = Run()
    run.confirm(A, B, C, is_reduced=True)
    lost = [*run.packets(1), run.anchors()[1]]
    assert run.teller(lost=lost).replay().digest == run.anchor
    with pytest.raises(IntegrityError):
        run.teller(lost=lost).replay({C})
    assert run.teller(lost=lost[-1:]).replay({C}).digest != run.anchor


def test_an_anchor_that_is_not_what_its_packets_give_is_found() -> None:
    run = Run()
    for _ in range(3):
        run.confirm(A, B)
    other = run.keep(encode_anchor(FRAGMENT, AnchorState(vector(7), vector(8))))
    told = [replace(r, anchor=other) if isinstance(r, ledger.Confirmed) and r.height == 2 else r for r in run.records]
    audit = Audit()
    run.teller(records=told).audit(audit)
    assert len(audit.wrong) == 2, "the round that led to it, and the one that began with it"
    assert f"{other[:12]} was confirmed" in audit.wrong[0]
    audit = Audit()
    run.teller(lost=run.packets(2)).audit(audit)
    assert (audit.num_equal, audit.num_unchecked, audit.wrong) == (2, 1, [])


def test_a_packet_in_anothers_name_is_not_taken() -> None:
    run = Run()
    run.confirm(A, B)
    settled = next(r for r in run.records if isinstance(r, ledger.Settled))
    entries = settled.settlement.entries
    swapped = replace(settled.settlement, entries=(replace(entries[0], packet=entries[1].packet), entries[1]))
    told = [ledger.Settled(swapped) if r is settled else r for r in run.records]
    with pytest.raises(IntegrityError, match=r"packet .* of trunk/0, round 1"):
        run.teller(lost=run.anchors()[1:], records=told).replay()


def test_a_moment_of_the_run_is_a_height_of_the_trunk_or_somebodys_coming() -> None:
    run = Run()
    for peers in ((A, B), (A, B), (A, C), (A, B)):
        run.confirm(*peers)
    anchors = run.anchors()
    for height in range(5):
        assert run.teller(records=until(run.records, height)).replay().digest == anchors[height]
    with pytest.raises(ConfigError, match="the trunk never had 5 confirmed rounds; it has 4"):
        until(run.records, 5)
    assert run.teller(records=before(run.records, {C})).replay().digest == anchors[2]
    assert list(before(run.records, {PeerId("nobody")})) == run.records


def test_the_story_goes_on_from_where_it_was_taken_back_to() -> None:
    run = Run()
    for _ in range(4):
        run.confirm(A, B)
    anchors = run.anchors()
    run.records.append(ledger.RolledBack(FRAGMENT.id, 2, anchors[2], "by the organiser"))
    run.state, run.height = decode_anchor(FRAGMENT, run.store[anchors[2]]), 2
    run.confirm(A, C)
    done = run.teller(lost=[run.anchor]).replay()
    assert (done.digest, done.height) == (run.anchor, 3)
    assert run.teller(records=until(run.records, 3)).replay().digest == run.anchor, "the last time it was so far"
    assert run.teller(records=until(run.records, 4)).replay().digest == anchors[4]
    # another anchor than any before, as a replay without somebody gives
    run.state = AnchorState(vector(3), vector(4))
    fresh = run.keep(encode_anchor(FRAGMENT, run.state))
    run.records.append(ledger.RolledBack(FRAGMENT.id, 3, fresh, "by the organiser"))
    run.confirm(A, B)
    done = run.teller(lost=[run.anchor]).replay()
    assert (done.digest, done.from_height) == (run.anchor, 3)
    assert FragmentId(done.fragment) == FRAGMENT.id


def test_a_way_back_that_was_undone_costs_nothing_of_the_story() -> None:
    run = Run()
    for peers in ((A, C), (A, B), (A, B)):
        run.confirm(*peers)
    anchors, fresh = run.anchors(), run.keep(encode_anchor(FRAGMENT, AnchorState(vector(3), vector(4))))
    run.records += [
        ledger.RolledBack(FRAGMENT.id, 3, fresh, "by the organiser"),
        ledger.RolledBack(FRAGMENT.id, 3, anchors[3], "nobody has it"),
    ]
    run.confirm(A, B)
    audit = Audit()
    run.teller().audit(audit)
    assert (audit.num_equal, audit.num_unchecked) == (4, 0)
    assert run.teller().replay({C}).num_changed == 1


def test_what_lies_inside_an_anchor_that_was_computed_anew_is_said() -> None:
    run = Run()
    for peers in ((A, C), (A, B), (A, C)):
        run.confirm(*peers)
    run.state = AnchorState(vector(3), vector(4))
    run.records.append(ledger.RolledBack(FRAGMENT.id, 3, run.keep(encode_anchor(FRAGMENT, run.state)), "without b"))
    run.confirm(A, B)
    assert run.teller().replay({C}).num_stay == 2
    audit = Audit()
    run.teller().audit(audit)
    assert (audit.num_equal, audit.num_unchecked) == (1, 3)


def test_without_somebody_no_merged_packet_counts_since_it_holds_what_others_left_out() -> None:
    run, plain = Run(), Run()
    for peers in ((A, B, C), (A, B), (A, B)):
        run.confirm(*peers, is_reduced=True)
        plain.confirm(*(set(peers) - {C}))
    assert run.teller().replay({C}).digest == plain.anchor
