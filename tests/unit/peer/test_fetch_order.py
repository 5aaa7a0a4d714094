"""Whom the fetcher asks first, when it asks a second one, and what it makes of partial and wrong answers; on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.errors import Refused, RejectedPayload, Unreachable
from decentra.ids import Digest, PeerId, digest_of
from decentra.peer.fetch import Fetcher, Patience, Reachability
from decentra.sim.loop import run_virtual

BLOB = bytes(range(200)) * 5
DIGEST = digest_of(BLOB)
HOME, KEEPER, OTHER = PeerId("home"), PeerId("keeper"), PeerId("other")
ADDRESSES = {HOME: ("/ip4/10.0.0.2/tcp/1",), KEEPER: ("/ip4/10.0.0.1/tcp/1",), OTHER: ("/ip4/10.0.0.3/tcp/1",)}


@dataclass
class Habit:
    """How one peer answers. ``connect_s`` passes first; a peer without ``data`` at that time refuses, or is unreachable."""

    data: bytes | None = BLOB
    connect_s: float = 0.01
    is_reachable: bool = True
    has_it_at_s: float = 0.0
    breaks_after_bytes: int | None = None
    chunk_bytes: int = 100


@dataclass
class HabitExchange:
    """An Exchange of peers with habits; remembers who was asked when, from which byte on, and which streams were left open."""

    habits: dict[PeerId, Habit]
    advertised: list[tuple[PeerId, tuple[str, ...]]] = field(default_factory=list)
    asked: list[tuple[PeerId, float, int]] = field(default_factory=list)
    num_open: int = 0

    async def read(self, digest: Digest) -> bytes | None:
        return None

    async def tell(self, body: bytes) -> None:
        return None

    async def hear(self, turn: int) -> list[tuple[PeerId, bytes]]:
        return []

    async def providers(self, digest: Digest) -> list[tuple[PeerId, tuple[str, ...]]]:
        return self.advertised

    async def get(self, peer: PeerId, addresses: Sequence[str], digest: Digest, offset: int) -> AsyncIterator[bytes]:
        loop, habit = asyncio.get_running_loop(), self.habits[peer]
        self.asked.append((peer, round(loop.time(), 3), offset))
        self.num_open += 1
        try:
            await asyncio.sleep(habit.connect_s)
            if not habit.is_reachable:
                raise Unreachable(f"{peer} does not answer")
            if habit.data is None or loop.time() < habit.has_it_at_s:
                raise Refused(f"{peer} does not have it")
            if offset > len(habit.data):
                raise RejectedPayload("size", f"expected {offset}", peer=peer)
            for start in range(offset, len(habit.data), habit.chunk_bytes):
                if habit.breaks_after_bytes is not None and start - offset >= habit.breaks_after_bytes:
                    raise Unreachable(f"{peer} broke off")
                yield habit.data[start : start + habit.chunk_bytes]
                await asyncio.sleep(0.001)
        finally:
            self.num_open -= 1

    @property
    def order(self) -> list[PeerId]:
        return [peer for peer, _, _ in self.asked]


class NoEvents:
    """An Events port nobody listens to."""

    def emit(self, event: str, **fields: Any) -> None:
        return None


def fetcher_of(exchange: HabitExchange, addresses: dict[PeerId, tuple[str, ...]] = ADDRESSES) -> Fetcher:
    port: Any = exchange
    return Fetcher(port, lambda peer: addresses.get(peer, ()), NoEvents())


def fetch(exchange: HabitExchange, *sources: PeerId, fetcher: Fetcher | None = None) -> tuple[bytes, float]:
    """The blob and the virtual seconds it took."""

    async def run() -> tuple[bytes, float]:
        blob = await (fetcher or fetcher_of(exchange)).fetch(DIGEST, len(BLOB), sources)
        return blob, asyncio.get_running_loop().time()

    return run_virtual(run())


def test_a_silent_source_costs_its_head_start_and_no_more() -> None:
    exchange = HabitExchange({HOME: Habit(connect_s=5.0, is_reachable=False), KEEPER: Habit()})
    blob, took_s = fetch(exchange, HOME, KEEPER)
    assert blob == BLOB
    assert took_s < Patience().hedge_s + 0.1
    assert exchange.num_open == 0


def test_a_source_that_answers_in_time_is_the_only_one_asked() -> None:
    exchange = HabitExchange({HOME: Habit(connect_s=0.9), KEEPER: Habit()})
    assert fetch(exchange, HOME, KEEPER)[0] == BLOB
    assert exchange.order == [HOME]


def test_the_next_is_asked_at_once_when_one_fails() -> None:
    exchange = HabitExchange({HOME: Habit(is_reachable=False), OTHER: Habit(data=None), KEEPER: Habit()})
    _, took_s = fetch(exchange, HOME, OTHER, KEEPER)
    assert took_s < 0.1
    assert exchange.order == [HOME, OTHER, KEEPER]


def test_the_silent_and_those_without_address_are_asked_last() -> None:
    exchange = HabitExchange({HOME: Habit(connect_s=5.0, is_reachable=False), KEEPER: Habit(), OTHER: Habit()})

    async def run() -> None:
        fetcher = fetcher_of(exchange, {HOME: ADDRESSES[HOME], KEEPER: ADDRESSES[KEEPER]})
        with pytest.raises(Unreachable):
            await fetcher.fetch(DIGEST, len(BLOB), [HOME])
        exchange.asked.clear()
        exchange.habits[KEEPER].data = exchange.habits[OTHER].data = None
        with pytest.raises(Unreachable):
            await fetcher.fetch(DIGEST, len(BLOB), [HOME, OTHER, KEEPER])

    run_virtual(run())
    assert exchange.order[:3] == [KEEPER, OTHER, HOME]


def test_a_peer_without_address_that_answered_is_no_longer_last() -> None:
    exchange = HabitExchange({HOME: Habit(), KEEPER: Habit()})

    async def run() -> None:
        fetcher = fetcher_of(exchange, {KEEPER: ADDRESSES[KEEPER]})
        await fetcher.fetch(DIGEST, len(BLOB), [HOME])
        await fetcher.fetch(DIGEST, len(BLOB), [HOME, KEEPER])

    run_virtual(run())
    assert exchange.order == [HOME, HOME]


def test_a_keeper_that_does_not_have_it_yet_is_asked_again() -> None:
    exchange = HabitExchange({HOME: Habit(connect_s=5.0, is_reachable=False), KEEPER: Habit(has_it_at_s=0.5)})
    blob, took_s = fetch(exchange, KEEPER, HOME)
    assert blob == BLOB
    assert took_s < 1.0
    assert exchange.order.count(KEEPER) >= 2


def test_asking_again_ends_with_every_reason_in_the_story() -> None:
    exchange = HabitExchange({HOME: Habit(is_reachable=False), KEEPER: Habit(data=None)})
    with pytest.raises(Unreachable, match=r"does not have it.*does not answer|does not answer.*does not have it"):
        fetch(exchange, KEEPER, HOME)
    assert exchange.order.count(KEEPER) == 1 + len(Patience().again_s)
    assert exchange.order.count(HOME) == 1


def test_the_only_source_may_break_off_and_is_asked_for_the_rest() -> None:
    exchange = HabitExchange({KEEPER: Habit(breaks_after_bytes=400)})
    assert fetch(exchange, KEEPER)[0] == BLOB
    assert [offset for _, _, offset in exchange.asked] == [0, 400, 800]


def test_who_broke_off_is_followed_from_there() -> None:
    exchange = HabitExchange({HOME: Habit(breaks_after_bytes=300), KEEPER: Habit()})
    assert fetch(exchange, HOME, KEEPER)[0] == BLOB
    assert exchange.asked[-1] == (KEEPER, exchange.asked[-1][1], 300)


@pytest.mark.parametrize("bad", [b"x" * 1000, b"x" * 5000], ids=["as-long", "longer"])
def test_a_wrong_beginning_is_not_blamed_on_who_continues_it(bad: bytes) -> None:
    exchange = HabitExchange({HOME: Habit(data=bad, breaks_after_bytes=300), KEEPER: Habit()})
    assert fetch(exchange, HOME, KEEPER)[0] == BLOB
    assert [offset for peer, _, offset in exchange.asked if peer == KEEPER] == [300, 0]


def test_wrong_bytes_are_named_and_another_source_is_asked() -> None:
    exchange = HabitExchange({HOME: Habit(data=b"x" * 10), KEEPER: Habit()})
    assert fetch(exchange, HOME, KEEPER)[0] == BLOB
    with pytest.raises(RejectedPayload, match="digest"):
        fetch(HabitExchange({HOME: Habit(data=b"x" * 10)}), HOME)


def test_who_sent_wrong_bytes_is_asked_for_nothing_while_others_are_left() -> None:
    exchange = HabitExchange({HOME: Habit(data=b"x" * 10), KEEPER: Habit(), OTHER: Habit(is_reachable=False)})
    fetcher = fetcher_of(exchange)

    async def twice() -> None:
        for _ in range(2):
            await fetcher.fetch(DIGEST, len(BLOB), (HOME, OTHER, KEEPER))

    run_virtual(twice())
    assert exchange.order.count(HOME) == 1
    assert fetch(HabitExchange({HOME: Habit()}), HOME)[0] == BLOB, "a liar that has mended its ways is better than nobody"


def test_who_advertises_the_blob_is_asked_last_and_a_known_peer_only_at_a_new_address() -> None:
    moved = ("/ip4/10.0.0.9/tcp/1",)
    advertised = [(HOME, ADDRESSES[HOME]), (HOME, moved), (OTHER, ())]
    exchange = HabitExchange({HOME: Habit(is_reachable=False), OTHER: Habit(data=None)}, advertised)
    with pytest.raises(Unreachable):
        fetch(exchange, HOME)
    assert exchange.order[:3] == [HOME, OTHER, HOME]
    assert exchange.order.count(HOME) == 2
    exchange.habits[OTHER] = Habit()
    assert fetch(exchange, HOME)[0] == BLOB


def test_cancelling_leaves_no_stream_open() -> None:
    exchange = HabitExchange({HOME: Habit(connect_s=50.0), KEEPER: Habit(connect_s=50.0)})

    async def run() -> int:
        task = asyncio.create_task(fetcher_of(exchange).fetch(DIGEST, len(BLOB), [HOME, KEEPER]))
        await asyncio.sleep(3.0)
        assert exchange.num_open == 2
        task.cancel()
        await asyncio.wait([task])
        return exchange.num_open

    assert run_virtual(run()) == 0


def habits() -> st.SearchStrategy[Habit]:
    return st.builds(
        Habit,
        data=st.sampled_from([BLOB, BLOB, None, b"", b"x" * 1000, BLOB + b"y", BLOB[:-1]]),
        connect_s=st.sampled_from([0.01, 0.5, 1.5, 6.0, 40.0]),
        is_reachable=st.booleans(),
        has_it_at_s=st.sampled_from([0.0, 0.3, 100.0]),
        breaks_after_bytes=st.sampled_from([None, None, 0, 300]),
    )


@given(st.lists(habits(), min_size=1, max_size=5), st.booleans())
def test_never_wrong_bytes_and_never_stuck(others: list[Habit], has_good_one: bool) -> None:
    """Whatever the others do: the right bytes or an error, no stream left open; with one honest source the blob itself."""
    everybody = {PeerId(f"p{i}"): habit for i, habit in enumerate(others)}
    if has_good_one:
        everybody[PeerId("good")] = Habit()
    exchange = HabitExchange(everybody)
    try:
        blob, _ = fetch(exchange, *everybody)
    except (Unreachable, RejectedPayload):
        assert not has_good_one
    else:
        assert blob == BLOB
    assert exchange.num_open == 0


@given(st.lists(st.integers(0, 4), max_size=30), st.floats(0, 5000))
def test_reachability_only_reorders(silent: list[int], now: float) -> None:
    memory = Reachability(Patience())
    for number, peer in enumerate(silent):
        memory.silent(PeerId(str(peer)), 50.0 * number)
    sources = [(PeerId(str(i)), ("/ip4/10.0.0.1/tcp/1",)) for i in range(5)]
    assert sorted(memory.in_order(sources, now)) == sources


def test_shunning_grows_while_a_peer_stays_silent_and_ends_when_it_answers() -> None:
    memory, patience = Reachability(Patience()), Patience()
    sources = [(HOME, ADDRESSES[HOME]), (KEEPER, ADDRESSES[KEEPER])]

    def is_last(now: float) -> bool:
        return memory.in_order(sources, now)[-1][0] == HOME

    for _ in range(3):
        memory.silent(HOME, 0.0)  # three fetches at once are one silence
    assert is_last(patience.shun_s - 1)
    assert not is_last(patience.shun_s)
    memory.silent(HOME, patience.shun_s)
    assert is_last(3 * patience.shun_s - 1)
    assert not is_last(3 * patience.shun_s)
    memory.answered(HOME)
    memory.silent(HOME, 1000.0)
    assert not is_last(1000.0 + patience.shun_s)
