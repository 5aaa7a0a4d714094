"""Blobs between real nodes: pulled, resumed, refused by name, never a hang, and no heartbeat starves meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gossip_world import LOOPBACK, TICKET, Recorder, eventually, fetch, world

from decentra.errors import Refused, RejectedPayload, Unreachable
from decentra.gossip.address import claim_ports
from decentra.gossip.exchange import NUM_TURNS, ExchangeLimits
from decentra.gossip.frames import Request, Status, pack_request, read_reply
from decentra.gossip.records import MAX_RECORD_BYTES
from decentra.identity import Keypair
from decentra.ids import Digest, digest_of

DATA = hashlib.shake_128(b"packet").digest(300_000)
DIGEST = digest_of(DATA)


async def exhaust(stream: AsyncIterator[bytes]) -> int:
    return sum([len(chunk) async for chunk in stream])


def test_pull_resume_and_account(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            serving, asking = await w.exchange(first), await w.exchange(second)
            await serving.put(DIGEST, DATA)
            assert await serving.has(DIGEST)
            assert await serving.read(DIGEST) == DATA
            assert await fetch(asking, first, DIGEST) == DATA
            assert await fetch(asking, first, DIGEST, 123_456) == DATA[123_456:]
            assert await fetch(asking, first, DIGEST, len(DATA)) == b""
            total = 2 * len(DATA) - 123_456
            assert asking.rx_bytes == asking.traffic[first.peer_id].rx_bytes == total
            assert serving.tx_bytes == serving.traffic[second.peer_id].tx_bytes == total
            with pytest.raises(Refused, match=f"{first.peer_id}.*offset.*past its end"):
                await fetch(asking, first, DIGEST, len(DATA) + 1)
            with pytest.raises(Refused, match=r"missing.*does not have it"):
                await fetch(asking, first, digest_of(b"nobody's"))
            with pytest.raises(RejectedPayload, match="expected a digest"):
                await fetch(asking, first, Digest("../x"))
            # a pull that the caller gives up frees the other side's slot
            stream = asking.get(first.peer_id, first.addresses, DIGEST, 0)
            assert await anext(stream)
            await stream.aclose()
            await eventually(lambda: not serving._peer_slots, 5, "the upload ends")
            await serving.drop(DIGEST)
            assert not await serving.has(DIGEST)

    asyncio.run(main())


def test_strangers_are_refused_by_name_and_empty_blobs_are_blobs(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            events = Recorder()
            first = await w.node("first", events=events)
            hostile = await w.node("hostile", initial_peers=first.addresses)
            serving = await w.exchange(first)
            asking = await w.exchange(hostile, ticket=b"forged")
            await serving.put(DIGEST, DATA)
            with pytest.raises(Refused, match=f"{hostile.peer_id} shows no admission"):
                await fetch(asking, first, DIGEST)
            assert events.named("blob-refused")[0]["peer"] == hostile.peer_id
            assert serving.tx_bytes == 0
            with pytest.raises(RejectedPayload, match="at most 4096"):
                await fetch(await w.exchange(await w.node("third", initial_peers=first.addresses), ticket=b"x" * 5000), first, DIGEST)
            # the admitted peer is served by the same exchange
            asking._credentials = lambda: TICKET
            empty = digest_of(b"")
            await serving.put(empty, b"")
            assert await fetch(asking, first, empty) == b""

    asyncio.run(main())


@pytest.mark.parametrize("request_bytes", [b"\2" + bytes(42), b"\1" + bytes(40) + b"\xff\xff"], ids=["version", "credentials"])
def test_malformed_requests_get_an_answer(tmp_path: Path, request_bytes: bytes) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            hostile = await w.node("hostile", initial_peers=first.addresses)
            serving = await w.exchange(first)
            reader, writer = await hostile.open_stream(first.peer_id, serving._protocol, 5)
            writer.write(request_bytes)
            reply = await asyncio.wait_for(read_reply(reader), 10)
            assert reply.status is Status.MALFORMED
            assert "expected" in reply.reason or "at most" in reply.reason
            writer.close()

    asyncio.run(main())


def test_hostile_answers_are_errors_not_hangs(tmp_path: Path) -> None:
    async def main() -> None:
        answers = {
            "unknown status": (struct.pack(">BQH", 99, 0, 0), RejectedPayload),
            "endless reason": (struct.pack(">BQH", 1, 0, 65535), RejectedPayload),
            "endless blob": (struct.pack(">BQH", 0, 1 << 62, 0), RejectedPayload),
            "ends early": (struct.pack(">BQH", 0, 1000, 0) + b"x" * 10, Unreachable),
            "says nothing": (b"", Unreachable),
        }
        async with world(tmp_path) as w:
            hostile = await w.node("hostile")
            asking = await w.exchange(await w.node("asking", initial_peers=hostile.addresses))
            answer = b""

            async def lie(remote: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.read(1000)
                writer.write(answer)
                await writer.drain()

            await hostile.serve(asking._protocol, lie)
            for name, (lie_bytes, error) in answers.items():
                answer = lie_bytes
                with pytest.raises(error, match=hostile.peer_id if error is Unreachable else "payload"):
                    await asyncio.wait_for(fetch(asking, hostile, DIGEST), 10)
                assert not asking._dialer._unreachable_until, name

    asyncio.run(main())


def test_a_silent_peer_meets_the_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            hostile = await w.node("hostile")
            limits = ExchangeLimits(idle_s=0.3, slot_s=0.1)
            asking = await w.exchange(await w.node("asking", initial_peers=hostile.addresses), limits=limits)

            async def hang(remote: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await asyncio.Event().wait()

            await hostile.serve(asking._protocol, hang)
            with pytest.raises(Unreachable, match="was silent for"):
                await asyncio.wait_for(fetch(asking, hostile, DIGEST), 10)

    asyncio.run(main())


def test_a_peer_that_listens_nowhere_is_pulled_from_over_its_own_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            keeper = await w.node("keeper")
            quiet = await w.node("quiet", listen=(), initial_peers=keeper.addresses)
            pulling, serving = await w.exchange(keeper), await w.exchange(quiet)
            await serving.put(DIGEST, DATA)
            await serving.announce([DIGEST])
            assert await pulling.providers(DIGEST) == [(quiet.peer_id, ())]
            assert await fetch(pulling, quiet, DIGEST) == DATA
            # and the keeper advertises where it is
            await pulling.put(DIGEST, DATA)
            await pulling.announce([DIGEST])
            assert await serving.providers(DIGEST) == [(keeper.peer_id, keeper.addresses)]
            assert await serving.providers(digest_of(b"nobody's")) == []

    asyncio.run(main())


def test_an_unreachable_peer_is_remembered_until_it_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            asking_node = await w.node("asking")
            asking = await w.exchange(asking_node)
            stranger = Keypair.from_seed(b"\7" * 32).peer_id
            with pytest.raises(Unreachable, match="does not answer"):
                await exhaust(asking.get(stranger, claim_ports(LOOPBACK), DIGEST, 0))
            started = time.monotonic()
            with pytest.raises(Unreachable, match="dialled again in"):
                await exhaust(asking.get(stranger, claim_ports(LOOPBACK), DIGEST, 0))
            assert time.monotonic() - started < ExchangeLimits().connect_s
            # one that dials us is served by at once, although we could not dial it
            quiet = await w.node("quiet", listen=(), initial_peers=asking_node.addresses)
            serving = await w.exchange(quiet)
            await serving.put(DIGEST, DATA)
            asking._dialer._unreachable_until[quiet.peer_id] = time.monotonic() + 1000
            assert await fetch(asking, quiet, DIGEST) == DATA

    asyncio.run(main())


def test_uploads_are_limited_per_peer_and_overall_and_the_rest_wait_their_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            third = await w.node("third", initial_peers=first.addresses)
            limits = ExchangeLimits(num_uploads=3, num_uploads_per_peer=2, slot_s=0.5)
            serving = await w.exchange(first, limits=limits)
            asking, other = await w.exchange(second), await w.exchange(third)
            big = hashlib.shake_128(b"big").digest(48 << 20)  # more than p2pd buffers for a reader that pauses
            digest = digest_of(big)
            await serving.put(digest, big)
            held = [asking.get(first.peer_id, first.addresses, digest, 0) for _ in range(2)]
            for stream in held:
                assert await anext(stream)
            with pytest.raises(Refused, match="busy"):
                await fetch(asking, first, digest)
            assert await fetch(other, first, digest) == big, "another peer is not in the way"
            waiting = asyncio.create_task(fetch(asking, first, digest, len(big) - 10))
            await eventually(lambda: serving._num_waiting == 1, 5, "the third pull waits for a slot")
            await held[0].aclose()
            assert await asyncio.wait_for(waiting, 10) == big[-10:]
            await held[1].aclose()
            await eventually(lambda: not serving._peer_slots and serving._slots._value == 3, 10, "all slots are free")

    asyncio.run(main())


def test_a_reader_that_stops_reading_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            slow = await w.node("slow", initial_peers=first.addresses)
            serving = await w.exchange(first, limits=ExchangeLimits(idle_s=0.5))
            big = bytes(48 << 20)
            await serving.put(digest_of(big), big)
            _, writer = await slow.open_stream(first.peer_id, serving._protocol, 5)
            writer.write(pack_request(Request(digest_of(big), 0, TICKET)))
            await eventually(lambda: serving.tx_bytes > 0, 10, "the upload starts")
            await eventually(lambda: not serving._peer_slots, 20, "the upload is given up")
            assert serving.tx_bytes < len(big)
            writer.close()

    asyncio.run(main())


def test_a_sender_that_dies_in_the_middle_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            asking = await w.exchange(await w.node("second", initial_peers=first.addresses))
            serving = await w.exchange(first)
            big = bytes(48 << 20)
            await serving.put(digest_of(big), big)
            stream = asking.get(first.peer_id, first.addresses, digest_of(big), 0)
            await anext(stream)
            os.kill(first.daemon.pid, signal.SIGKILL)
            with pytest.raises(Unreachable, match=f"{first.peer_id}.*(before its end|broke)"):
                await exhaust(stream)
            assert asking.rx_bytes < len(big)

    asyncio.run(main())


def test_heartbeats_get_through_a_bulk_transfer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            serving, asking = await w.exchange(first), await w.exchange(second)
            big = bytes(64 << 20)
            await serving.put(digest_of(big), big)

            async def echo(remote: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while beat := await reader.read(1):
                    writer.write(beat)

            await first.serve("test/heartbeat", echo)
            reader, writer = await second.open_stream(first.peer_id, "test/heartbeat", 5)
            progress_bytes: list[int] = []  # how far the transfer was at each heartbeat's return

            async def heartbeat() -> None:
                while True:
                    writer.write(b"h")
                    await reader.readexactly(1)
                    progress_bytes.append(asking.rx_bytes)
                    await asyncio.sleep(0.005)

            beating = asyncio.create_task(heartbeat())
            assert await exhaust(asking.get(first.peer_id, first.addresses, digest_of(big), 0)) == len(big)
            beating.cancel()
            writer.close()
            quarters = {beat * 4 // len(big) for beat in progress_bytes if 0 < beat < len(big)}
            assert quarters == {0, 1, 2, 3}, "heartbeats return in every quarter of the transfer, not before or after it"

    asyncio.run(main())


def test_what_a_peer_says_in_public_reaches_the_others_in_some_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            saying, hearing = await w.exchange(first), await w.exchange(second)
            await saying.tell(b"older")
            await saying.tell(b"newer")
            await hearing.tell(b"of its own, which it need not hear")
            heard = [one for turn in range(NUM_TURNS, 2 * NUM_TURNS) for one in await hearing.hear(turn)]
            assert heard == [(first.peer_id, b"newer")]
            await saying.tell(bytes(MAX_RECORD_BYTES))  # best effort: said to its own events, and nothing else
            assert [one for turn in range(NUM_TURNS) for one in await hearing.hear(turn)] == [(first.peer_id, b"newer")]

    asyncio.run(main())
