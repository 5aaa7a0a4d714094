"""The mailbox keeps the newest of everything and is bounded; the rate limiter adds up."""

from __future__ import annotations

import asyncio

from averaging_world import ALICE, HASH, run, view
from hypothesis import given
from hypothesis import strategies as st

from decentra.averaging.limiter import Limiter
from decentra.ids import FragmentId, PeerId
from decentra.protocol.messages import FragmentView, Phase, Rejected, SwarmView
from decentra.service.mailbox import MAX_REJECTED, Mailbox

PEER = PeerId(ALICE.peer_id)


def fragment_view(fragment: int, round: int, version: int) -> FragmentView:
    return FragmentView(FragmentId(f"trunk/{fragment}"), version, 0, HASH, round, Phase.OPEN, "")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_only_the_newest_view_of_each_fragment_waits(puts: list[tuple[int, int, int]]) -> None:
    async def story() -> None:
        mailbox = Mailbox()
        for fragment, round, version in puts:
            mailbox.put(fragment_view(fragment, round, version))
        got = await mailbox.get()
        newest = {fragment: max(put[1:] for put in puts if put[0] == fragment) for fragment, _, _ in puts}
        assert {(one.fragment, one.round, one.version) for one in got if isinstance(one, FragmentView)} == {
            (f"trunk/{fragment}", *key) for fragment, key in newest.items()
        }
        assert len(got) == len(newest)

    run(story())


def test_rejections_and_swarm_are_bounded() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        for i in range(1000):
            mailbox.put(Rejected(PEER, "digest", str(i)))
            mailbox.put(SwarmView(i, ()))
        mailbox.put(SwarmView(3, ()))
        got = await mailbox.get()
        assert got[-1] == SwarmView(999, ())
        assert [one.detail for one in got if isinstance(one, Rejected)] == [str(i) for i in range(1000 - MAX_REJECTED, 1000)]

    run(story())


def test_get_waits_and_a_taken_view_does_not_come_twice() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(view(1))
        assert await waiting == [view(1)]
        waiting = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(view(2))
        assert await waiting == [view(2)]

    run(story())


def test_closing_delivers_what_waits_and_then_nothing() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        mailbox.put(view(1))
        mailbox.close("revoked")
        mailbox.put(view(2))
        mailbox.close(None)  # the first reason stands
        assert await mailbox.get() == [view(1)]
        assert await mailbox.get() == []
        assert await mailbox.get() == []
        assert (mailbox.is_closed, mailbox.reason) == (True, "revoked")
        waiting = Mailbox()
        task = asyncio.create_task(waiting.get())
        await asyncio.sleep(0)
        waiting.close(None)
        assert await task == []

    run(story())


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=200), st.floats(1, 100), st.integers(1, 20))
def test_a_member_that_waits_as_told_never_exceeds_its_rate(pauses_s: list[float], per_s: float, burst: int) -> None:
    limiter, now_s, times_s = Limiter(per_s, burst, 4), 50.0, []
    for pause_s in pauses_s:
        now_s += pause_s
        now_s += limiter.of(PEER, now_s).take(now_s)
        times_s.append(now_s)
    for i, begin_s in enumerate(times_s):
        for j in range(i, len(times_s)):
            assert j - i + 1 <= burst + (times_s[j] - begin_s) * per_s + 1 + 1e-6


def test_a_reconnect_does_not_refill_and_members_do_not_share() -> None:
    limiter = Limiter(1.0, 2, 4)
    bucket = limiter.of(PEER, 0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0.0, 0.0, 1.0]
    assert limiter.of(PEER, 0.0).take(0.0) == 2.0
    assert limiter.of(PeerId("other"), 0.0).take(0.0) == 0.0
    for i in range(10):
        limiter.of(PeerId(str(i)), 0.0)
    assert len(limiter._buckets) == 4
