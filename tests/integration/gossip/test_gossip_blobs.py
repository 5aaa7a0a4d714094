"""The blob store keeps what it was given, under its budget, whatever happened to the disk meanwhile."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decentra.errors import ConfigError, RejectedPayload
from decentra.gossip.blobs import BlobStore
from decentra.ids import Digest, digest_of


def blob(number: int, num_bytes: int = 100) -> tuple[Digest, bytes]:
    data = hashlib.shake_128(number.to_bytes(4, "big")).digest(num_bytes)
    return digest_of(data), data


def test_put_read_open_drop(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 1000)
    digest, data = blob(1)
    store.put(digest, data)
    assert store.has(digest)
    assert store.size(digest) == 100
    assert store.read(digest) == data
    assert (tmp_path / "blobs" / digest[:2] / digest).read_bytes() == data
    reader = store.open(digest)
    assert reader is not None
    with reader:
        store.drop(digest)
        assert reader.read_at(90, 50) == data[90:]
    assert not store.has(digest)
    assert store.read(digest) is None
    assert store.open(digest) is None
    store.drop(digest)
    assert store.used_bytes == 0


def test_wrong_digests_never_reach_the_disk(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 1000)
    with pytest.raises(RejectedPayload, match="expected a blob with sha256"):
        store.put(blob(1)[0], b"other")
    for name in ("../../etc/passwd", "a" * 63, "A" * 64):
        with pytest.raises(RejectedPayload, match="64 lower-case"):
            store.read(Digest(name))
    assert not list((tmp_path / "blobs").rglob("*"))


def test_a_restart_keeps_blobs_removes_leftovers_and_finds_rot(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    store = BlobStore(root, 1000)
    good, rotten, ranged = blob(1), blob(2), blob(3)
    for digest, data in (good, rotten, ranged):
        store.put(digest, data)
    leftover = root / good[0][:2] / f"{good[0]}.abcd.tmp"
    leftover.write_bytes(b"half")
    for digest in (rotten[0], ranged[0]):
        with (root / digest[:2] / digest).open("r+b") as file:
            file.write(b"!!")
    store = BlobStore(root, 1000)
    assert not leftover.exists()
    assert store.used_bytes == 300
    assert store.read(good[0]) == good[1]
    assert store.read(rotten[0]) is None
    assert store.open(ranged[0]) is None
    assert store.num_corrupt == 2
    assert not store.has(rotten[0])
    assert store.used_bytes == 100
    store.put(*rotten)
    assert store.read(rotten[0]) == rotten[1]


def test_the_least_used_unpinned_blob_goes_first(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    (a, b, c, d) = (blob(n) for n in range(4))
    for digest, data in (a, b, c):
        store.put(digest, data)
    store.pin(a[0])
    store.read(b[0])
    store.put(*d)
    assert [store.has(x[0]) for x in (a, b, c, d)] == [True, True, False, True]
    store.pin(b[0])
    store.pin(d[0])
    with pytest.raises(OSError, match="blob_budget_bytes"):
        store.put(*c)
    assert store.pinned_bytes == 300
    store.unpin(b[0])
    store.put(*c)
    assert not store.has(b[0])
    assert store.num_evicted == 2
    with pytest.raises(OSError, match="does not fit"):
        store.put(*blob(9, 301))


def test_an_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    for number in range(3):
        store.put(*blob(number))
        os.utime(tmp_path / blob(number)[0][:2] / blob(number)[0], (1000 + number, 1000 + number))
    store.read(blob(0)[0])
    store = BlobStore(tmp_path, 300)
    store.put(*blob(3))
    assert not store.has(blob(1)[0])
    assert store.has(blob(0)[0])


def test_unusable_places_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="give a directory"):
        BlobStore(tmp_path / "file" / "blobs", 1000)
    with pytest.raises(ConfigError, match="budget"):
        BlobStore(tmp_path / "blobs", 0)


def test_threads_may_put_the_same_and_other_blobs(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 100_000)
    threads = [threading.Thread(target=lambda n=n: [store.put(*blob(k)) for k in range(n % 2, 20, 2 - n % 2)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert store.used_bytes == sum(store.size(digest) or 0 for digest in store.digests()) == 2000
    assert not list(tmp_path.rglob("*.tmp"))


STEPS = st.lists(st.tuples(st.sampled_from(["put", "read", "drop", "pin", "unpin", "restart"]), st.integers(0, 7)), max_size=30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_the_budget_holds_and_pins_stay(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    root = tmp_path_factory.mktemp("blobs")
    store, pins = BlobStore(root, 350), set[Digest]()
    for action, number in steps:
        digest, data = blob(number, 60 + 10 * number)
        kept = {d for d in pins if store.has(d) and not (action == "drop" and d == digest)}
        if action == "put":
            try:
                store.put(digest, data)
                assert store.read(digest) == data
            except OSError:
                assert sum(store.size(d) or 0 for d in pins) + len(data) > 350
        elif action == "read":
            assert store.read(digest) in (None, data)
        elif action == "drop":
            store.drop(digest)
        elif action == "pin" and digest not in pins:
            store.pin(digest)
            pins.add(digest)
        elif action == "unpin" and digest in pins:
            store.unpin(digest)
            pins.remove(digest)
        elif action == "restart":
            store = BlobStore(root, 350)
            for pinned in pins:
                store.pin(pinned)
        on_disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        assert store.used_bytes == on_disk <= 350
        assert all(store.has(d) for d in kept)
