"""The ledger replays what was written, and notices every edit, removal, repetition and reordering."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import digest

from decentra.errors import IntegrityError
from decentra.ids import FragmentId, PeerId, RunId
from decentra.protocol import ledger
from decentra.protocol.ledger import HEADS_CHAIN, Ledger, Record, chain_of, replay
from decentra.protocol.messages import Entry, Phase, Role, Settlement

fragments = st.sampled_from([FragmentId("trunk/0"), FragmentId("expert.0/0")])
numbers = st.integers(1, 50)
anchors = st.integers(0, 9).map(lambda i: digest(f"anchor {i}"))
peers = st.integers(0, 3).map(lambda i: PeerId(f"peer-{i}"))
entries = st.builds(Entry, peers, anchors, numbers, numbers, st.integers(0, (1 << 32) - 1))
settlements = st.builds(
    Settlement, fragments, numbers, numbers, anchors, st.lists(entries, max_size=3).map(tuple), st.integers(0, 1 << 31),
    st.integers(0, 1 << 31), st.text(max_size=10),
)  # fmt: skip
plain_records = st.one_of(
    st.builds(ledger.Admitted, peers, st.sampled_from(Role), st.text(max_size=5), st.text(max_size=5)),
    st.builds(ledger.Placed, peers, st.lists(st.integers(0, 8), max_size=3).map(tuple)),
    st.builds(ledger.Revoked, st.text(max_size=8), st.text(max_size=8)),
    st.builds(ledger.Opened, fragments, numbers, numbers, anchors, st.lists(peers, max_size=2).map(tuple), st.just(())),
    st.builds(ledger.Settled, settlements),
    st.builds(
        ledger.Confirmed,
        fragments,
        numbers,
        numbers,
        anchors,
        st.lists(peers).map(tuple),
        st.booleans(),
        st.text(max_size=5),
        st.just((b"\1",)),
    ),
    st.builds(ledger.GaveUp, fragments, numbers, st.sampled_from([Phase.VOID, Phase.ABANDONED]), st.text(max_size=5)),
    st.builds(ledger.RolledBack, fragments, numbers, anchors, st.text(max_size=5)),
    st.builds(ledger.Stopping, st.text(max_size=5), st.booleans()),
)
started = ledger.Started(RunId("0" * 64), ((FragmentId("trunk/0"), digest("g")),))


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[list[Record], list[bytes]]:
    """Records with their lines; heads are written now and then, as the service does."""
    book, records, lines = Ledger(), [], []
    for record in [started, *draw(st.lists(plain_records, min_size=1, max_size=12))]:
        records.append(record)
        lines.append(book.append(record))
        if draw(st.booleans()):
            records.append(book.heads_record())
            lines.append(book.append(records[-1]))
    return records, lines


@given(ledgers())
@settings(max_examples=60)
def test_replay_gives_the_records_and_the_heads(written: tuple[list[Record], list[bytes]]) -> None:
    records, lines = written
    book, found = replay(lines)
    assert found == records
    assert set(book.heads) == {chain_of(r) for r in records}
    again = Ledger()
    assert [again.append(r) for r in records] == lines, "equal records give equal lines"


@given(ledgers(), st.data())
@settings(max_examples=150)
def test_no_byte_can_change_unnoticed(written: tuple[list[Record], list[bytes]], data: st.DataObject) -> None:
    """A change in any line but the last of its chain breaks the chain; in the last, the heads differ."""
    _, lines = written
    honest, _ = replay(lines)
    index = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[index]) - 1))
    changed = bytearray(lines[index])
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        book, _ = replay([*lines[:index], bytes(changed), *lines[index + 1 :]])
    except IntegrityError:
        return
    assert book.heads != honest.heads


@given(ledgers(), st.data())
@settings(max_examples=100)
def test_no_line_can_go_move_or_come_twice(written: tuple[list[Record], list[bytes]], data: st.DataObject) -> None:
    _, lines = written
    honest, _ = replay(lines)
    index = data.draw(st.integers(0, len(lines) - 1))
    with pytest.raises(IntegrityError):
        replay([*lines[: index + 1], lines[index], *lines[index + 1 :]])
    try:
        without, _ = replay([*lines[:index], *lines[index + 1 :]])
    except IntegrityError:
        return
    assert without.heads != honest.heads, "only the newest line of a chain can be cut off, and then the head differs"


@given(ledgers())
@settings(max_examples=40)
def test_heads_commit_to_what_came_before(written: tuple[list[Record], list[bytes]]) -> None:
    """Another history that leads to a heads line is refused there, even if each of its chains is sound."""
    records, _ = written
    book = Ledger()
    lines = [book.append(r) for r in records]
    lines.append(book.append(book.heads_record()))
    forger = Ledger()
    forged = [forger.append(r) for r in records]
    forged[0] = Ledger().append(ledger.Started(RunId("1" * 64), started.genesis))
    with pytest.raises(IntegrityError):
        replay([forged[0], *lines[1:]])


def test_lines_that_are_none() -> None:
    book = Ledger()
    line = book.append(started)
    for bad in (b"", b"{}", b"[1]", line[:-1], line.replace(b'"Started"', b'"Begun"'), line.replace(b'"@run"', b'"@other"')):
        with pytest.raises(IntegrityError):
            Ledger().accept(bad)
    wrong = ledger.Heads((("@run", 1, digest("no")),))
    honest = Ledger()
    honest.accept(line)
    with pytest.raises(IntegrityError, match="names line 1"):
        honest.accept(book.append(wrong))
    assert chain_of(wrong) == HEADS_CHAIN


def test_a_refused_line_leaves_the_ledger_where_it_was() -> None:
    book = Ledger()
    lines = [book.append(started), book.append(ledger.Stopping("a", False))]
    reader = Ledger()
    reader.accept(lines[0])
    with pytest.raises(IntegrityError):
        reader.accept(lines[0])
    reader.accept(lines[1])
    assert reader.heads == book.heads
