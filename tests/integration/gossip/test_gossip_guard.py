"""A hostile DHT record costs its sender an error and nobody the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gossip_world import RUN, eventually, world
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

from decentra.errors import RejectedPayload
from decentra.gossip import records
from decentra.gossip.guard import MAX_EXT_DEPTH, MAX_STORED_BYTES, MAX_SUBKEYS, MAX_VALUE_BYTES, install_guard


def nested_ext(depth: int, code: int = 0x40) -> bytes:
    """``depth`` tuples inside each other, as msgpack bytes."""
    data = b"\x90"  # the empty array
    for level in range(depth):
        if level:
            data = b"\x91" + data  # an array of one
        data = (b"\xc7" + bytes([len(data)]) if len(data) < 256 else b"\xc8" + len(data).to_bytes(2, "big")) + bytes([code]) + data
    return data


SCRIPT = """
import sys
from hivemind.utils.serializer import MSGPackSerializer
if sys.argv[1] == "guarded":
    from decentra.gossip.guard import install_guard
    install_guard()
try:
    MSGPackSerializer.loads(bytes.fromhex(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_nested_record_kills_without_the_guard_and_raises_with_it() -> None:
    hostile = nested_ext(900).hex()
    assert len(hostile) // 2 < MAX_VALUE_BYTES
    plain, guarded = (
        subprocess.Popen([sys.executable, "-c", SCRIPT, mode, hostile], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for mode in ("plain", "guarded")
    )
    plain.communicate(timeout=60)
    out, err = guarded.communicate(timeout=60)
    assert plain.returncode < 0, "hivemind survives now: the guard may be needed no more"
    assert guarded.returncode == 0, err
    assert out.startswith("RejectedPayload")
    assert f"deeper than {MAX_EXT_DEPTH}" in out


def test_guard_bounds_depth_and_size_and_keeps_plain_values() -> None:
    install_guard()
    install_guard()
    assert MSGPackSerializer.loads(nested_ext(MAX_EXT_DEPTH))
    with pytest.raises(RejectedPayload, match="deeper"):
        MSGPackSerializer.loads(nested_ext(MAX_EXT_DEPTH + 1))
    with pytest.raises(RejectedPayload, match="at most 10000 bytes"):
        MSGPackSerializer.loads(MSGPackSerializer.dumps(b"x" * MAX_VALUE_BYTES))
    value = {"a": (1, [2.5, b"x"]), "b": None}
    assert MSGPackSerializer.loads(MSGPackSerializer.dumps(value)) == value
    # the depth is counted per value, also after a refusal
    assert MSGPackSerializer.loads(nested_ext(MAX_EXT_DEPTH))


def test_a_whole_key_may_be_larger_than_one_value() -> None:
    install_guard()
    many = DictionaryDHTValue()
    for index in range(40):
        many.store(f"peer{index}", b"x" * 1000, time.time() + 60)
    packed = MSGPackSerializer.dumps(many)
    assert len(packed) > MAX_VALUE_BYTES
    assert len(MSGPackSerializer.loads(packed).data) == 40


def test_a_full_key_takes_no_strangers_and_still_refreshes_members() -> None:
    install_guard()
    storage, key, now = DHTLocalStorage(), DHTID.generate("k"), time.time()
    assert all(storage.store_subkey(key, f"peer{i}", b"x", now + 60 + i) for i in range(MAX_SUBKEYS))
    assert not storage.store_subkey(key, "stranger", b"x", now + 900)
    assert storage.store_subkey(key, "peer0", b"y", now + 900)
    big = DHTID.generate("big")
    assert storage.store_subkey(big, "a", b"x" * (MAX_STORED_BYTES - 10), now + 60)
    assert not storage.store_subkey(big, "b", b"x" * 11, now + 60)


def test_hostile_records_do_not_kill_live_nodes(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            reader = await w.node("reader")
            hostile = await w.node("hostile", initial_peers=reader.addresses)
            key = records.service_key(RUN)
            await records.publish(reader, key, b"true", 60)
            evil, expires, target = nested_ext(900), time.time() + 60, DHTID.generate(key.name)
            # 1: pushed to the reader's storage, as one subkey and as a whole key
            assert await hostile.dht.protocol.call_store(
                PeerID.from_base58(reader.peer_id), [target], [evil], [expires], subkeys=[hostile.peer_id]
            ) == [False]
            whole = dht_pb2.StoreRequest(
                keys=[target.to_bytes()], subkeys=[b""], values=[evil], expiration_time=[expires], in_cache=[False]
            )
            with pytest.raises(Exception, match="deeper"):
                await hostile.dht.protocol.get_stub(PeerID.from_base58(reader.peer_id)).rpc_store(whole, timeout=5)
            assert reader.num_refused_records >= 1
            # 2: waiting in the hostile node for a reader to ask
            hostile.dht.protocol.storage.store_subkey(target, hostile.peer_id, evil, expires)
            assert await records.lookup(reader, key) == [(reader.peer_id, b"true")]
            await eventually(lambda: reader.is_attached, 5, "the reader lives")

    asyncio.run(main())
