"""The service calls a machine back at its own address: yes needs the caller's nonce, and nobody can look at others' ports with it."""

from __future__ import annotations

import asyncio
import time

import pytest
from averaging_world import MALLORY, run, world

from decentra.averaging import probe
from decentra.averaging.probe import Prober, address_of
from decentra.errors import Refused, RejectedPayload
from decentra.pb import averaging_pb2 as pb

NONCE = bytes(range(16))


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:192.0.2.7:5000", "192.0.2.7"), ("ipv6:%5B2001:db8::1%5D:443", "2001:db8::1"), ("ipv6:%5B::ffff:192.0.2.7%5D:1", "192.0.2.7")],
)
def test_addresses(peer: str, address: str) -> None:
    assert address_of(peer) == address


@pytest.mark.parametrize("peer", ["unix:/tmp/x", "", "ipv4:192.0.2.7"])
def test_callers_without_an_address(peer: str) -> None:
    with pytest.raises(RejectedPayload):
        address_of(peer)


async def _listener(shown: bytes) -> tuple[asyncio.Server, int]:
    async def show(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(shown)
        writer.close()

    server = await asyncio.start_server(show, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def test_over_grpc() -> None:
    async def story() -> None:
        async with world() as one:
            client = one.client(None)
            assert (await client.probe()).address == "127.0.0.1"
            server, port = await _listener(NONCE)
            reply = await client.probe(port, NONCE, num_filler_bytes=100_000)
            assert (reply.is_reachable, reply.why) == (True, "")
            with pytest.raises(Refused, match="a moment ago"):
                await client.probe(port, NONCE)
            server.close()

    run(story())


def test_every_no_is_the_same_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CALL_BACK_S", 0.2)

    async def story() -> None:
        prober = Prober(time.monotonic)
        server, port = await _listener(b"somebody else...")

        async def asked(address: str) -> tuple[str, float]:
            began = time.monotonic()
            reply = await prober.answer(pb.ProbeRequest(port=port, nonce=NONCE), f"ipv4:{address}:1")
            assert not reply.is_reachable
            return reply.why.replace(address, "X"), time.monotonic() - began

        others, others_s = await asked("127.0.0.1")
        server.close()
        await server.wait_closed()
        closed, closed_s = await asked("127.0.0.2")
        assert others == closed
        assert min(others_s, closed_s) > 0.19, "the time tells nothing either"
        for request in (
            pb.ProbeRequest(port=70_000, nonce=NONCE),
            pb.ProbeRequest(port=80, nonce=NONCE),
            pb.ProbeRequest(port=8080, nonce=b"short"),
        ):
            with pytest.raises(RejectedPayload):
                await prober.answer(request, "ipv4:127.0.0.3:1")

    run(story())


def test_strangers_are_not_called_back() -> None:
    async def story() -> None:
        async with world() as one:
            stranger = one.client(None, token=one.token(key=MALLORY))
            with pytest.raises(Refused):
                await stranger.probe()

    run(story())
