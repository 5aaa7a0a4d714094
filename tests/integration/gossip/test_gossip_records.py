"""DHT records: only what a peer signed for this run, key and time is stored, passed on and believed."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path

import pytest
from gossip_world import RUN, Recorder, world
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decentra.errors import RejectedPayload
from decentra.gossip import records
from decentra.gossip.records import MAX_RECORD_BYTES, MAX_TTL_S, RecordKey, RecordValidator, check_record, encode_record
from decentra.identity import Keypair
from decentra.ids import RunId

PAIR, OTHER = Keypair.from_seed(b"\1" * 32), Keypair.from_seed(b"\2" * 32)
KEY = records.service_key(RUN)
NOW = 1_000_000.0


@given(body=st.binary(max_size=4000), ttl_s=st.floats(0.001, MAX_TTL_S))
def test_a_record_comes_back_as_signed(body: bytes, ttl_s: float) -> None:
    record = check_record(encode_record(PAIR, KEY, body, NOW + ttl_s), KEY, PAIR.peer_id, NOW)
    assert (record.peer, record.body, record.key) == (PAIR.peer_id, body, KEY)


@example(at=-5, bit=3)  # the last character of the signature: base64 has spare bits there
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(at: int, bit: int) -> None:
    data = bytearray(encode_record(PAIR, KEY, b"body", NOW + 60))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(RejectedPayload):
        check_record(bytes(data), KEY, PAIR.peer_id, NOW)


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode), st.none(), st.integers()))
def test_garbage_is_refused(data: object) -> None:
    with pytest.raises(RejectedPayload):
        check_record(data, KEY, PAIR.peer_id, NOW)


def forged() -> bytes:
    fields = json.loads(encode_record(PAIR, KEY, b"body", NOW + 60))
    fields["peer"] = OTHER.peer_id
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "key", "subkey", "now", "reason"),
    [
        (encode_record(PAIR, KEY, b"x", NOW + 60), KEY, PAIR.peer_id, NOW + 61, "expired"),
        (encode_record(PAIR, KEY, b"x", NOW + 3600), KEY, PAIR.peer_id, NOW, "expiry"),
        (encode_record(PAIR, KEY, b"x", NOW + 60), KEY, OTHER.peer_id, NOW, "malformed"),
        (encode_record(PAIR, KEY, b"x", NOW + 60), RecordKey(RUN, "svc/other"), PAIR.peer_id, NOW, "malformed"),
        (encode_record(PAIR, KEY, b"x", NOW + 60), RecordKey(RunId("0" * 64), KEY.name), PAIR.peer_id, NOW, "malformed"),
        (forged(), KEY, OTHER.peer_id, NOW, "signature"),
        (b"[" * 5000, KEY, PAIR.peer_id, NOW, "malformed"),
        (b" " * (MAX_RECORD_BYTES + 1), KEY, PAIR.peer_id, NOW, "size"),
    ],
)
def test_each_lie_has_its_reason(data: bytes, key: RecordKey, subkey: str, now: float, reason: str) -> None:
    with pytest.raises(RejectedPayload) as caught:
        check_record(data, key, subkey, now)
    assert caught.value.reason == reason


def test_a_body_that_does_not_fit_is_refused_before_it_leaves() -> None:
    with pytest.raises(RejectedPayload, match="shorten its body"):
        encode_record(PAIR, KEY, b"x" * MAX_RECORD_BYTES, NOW + 60)


def test_the_door_lets_in_only_the_peer_itself() -> None:
    now = round(time.time(), 3)
    data = MSGPackSerializer.dumps(encode_record(PAIR, KEY, b"x", now + 60))
    place, subkey = DHTID.generate(KEY.name).to_bytes(), MSGPackSerializer.dumps(PAIR.peer_id)
    far = MSGPackSerializer.dumps(encode_record(PAIR, KEY, b"x", now + 1e6))
    validator = RecordValidator()
    assert validator.validate(DHTRecord(place, subkey, data, now + 60))
    lies = [
        DHTRecord(DHTID.generate("other").to_bytes(), subkey, data, now + 60),
        DHTRecord(place, MSGPackSerializer.dumps(OTHER.peer_id), data, now + 60),
        DHTRecord(place, MSGPackSerializer.dumps(None), data, now + 60),
        DHTRecord(place, subkey, data, now + 120),
        DHTRecord(place, subkey, data[:-1], now + 60),
        DHTRecord(place, subkey, far, now + 1e6),
        DHTRecord(place, subkey, b"\xc1", now + 60),
    ]
    assert not any(map(validator.validate, lies))
    assert validator.num_refused == len(lies)


def test_nodes_exchange_records_and_ignore_forged_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            events = Recorder()
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses, events=events)
            third = await w.node("third", initial_peers=first.addresses)
            key = records.heard_key(RUN, first.peer_id)
            assert key in records.heard_keys(RUN)
            for node, body in ((first, b"one"), (second, b"two"), (third, b"old")):
                assert await records.publish(node, key, body, 30)
            assert await records.publish(third, key, b"three", 60), "a later expiry replaces"
            expected = sorted([(first.peer_id, b"one"), (second.peer_id, b"two"), (third.peer_id, b"three")])
            for node in (first, second, third):
                assert await records.lookup(node, key) == expected
            # a forger keeps a record under another peer's name in its own storage; readers drop its whole answer
            expires = round(time.time() + 300, 3)
            lie = json.loads(encode_record(third.keypair, key, b"lie", expires))
            lie["body"] = base64.b64encode(b"LIE").decode()
            value = MSGPackSerializer.dumps(json.dumps(lie, sort_keys=True, separators=(",", ":")).encode())
            third.dht.protocol.storage.store_subkey(DHTID.generate(key.name), third.peer_id, value, expires)
            assert (third.peer_id, b"LIE") not in await records.lookup(second, key)
            assert await records.lookup(third, key) == expected[:0] + [r for r in expected if r[0] != third.peer_id]
            assert third.num_ignored_records == 1
            # the same key for another run is another world
            assert await records.lookup(second, RecordKey(RunId("0" * 64), key.name)) == []
            assert second.num_ignored_records >= 2
            assert events.named("record-ignored")

    asyncio.run(main())
