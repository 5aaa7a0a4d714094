"""A file written atomically is the old or the new one after a crash at any operation, on the simulated disk and in its shape on the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from decentra.errors import ConfigError
from decentra.peer.disk import RealDisk, sweep, write_atomic
from decentra.ports import Disk
from decentra.sim.adapters import Crash, SimDisk

OLD, NEW = b"old" * 20, b"new" * 30
NUM_POWER_CUTS = 12  # what survives of the unsynced writes is drawn anew in each


def careless(disk: Disk, name: str, data: bytes) -> None:
    """What people write instead."""
    disk.write(name + ".tmp", data)
    disk.rename(name + ".tmp", name)
    disk.sync_dir()


def found_after_crashes(write: Callable[[Disk, str, bytes], None]) -> set[bytes | None]:
    found: set[bytes | None] = set()
    for seed in range(NUM_POWER_CUTS):
        for crash_in in range(1, 20):
            disk = SimDisk(Random(seed))
            write_atomic(disk, "file", OLD)
            disk.crash_in = crash_in
            try:
                write(disk, "file", NEW)
            except Crash:
                pass
            else:
                disk.crash()  # after the last operation
            disk.revive()
            found.add(disk.read("file"))
            sweep(disk)
            assert disk.list() == ["file"]
            if crash_in > disk.num_operations:
                break
    return found


def test_old_or_new_after_a_crash_at_every_operation() -> None:
    assert found_after_crashes(write_atomic) == {OLD, NEW}


def test_the_simulated_disk_finds_a_missing_sync() -> None:
    assert found_after_crashes(careless) - {OLD, NEW}, "a torn file shows"


def test_what_was_written_is_durable_when_the_call_returns() -> None:
    for seed in range(NUM_POWER_CUTS):
        disk = SimDisk(Random(seed))
        write_atomic(disk, "file", NEW)
        disk.crash()
        disk.revive()
        assert disk.read("file") == NEW


def test_a_dead_disk_answers_nothing() -> None:
    disk = SimDisk(Random(0))
    disk.crash()
    for call in (lambda: disk.read("a"), disk.list, lambda: disk.write("a", b""), lambda: disk.delete("a"), disk.sync_dir):
        with pytest.raises(Crash):
            call()


def test_the_real_disk(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "state")
    assert disk.read("file") is None
    write_atomic(disk, "file", OLD)
    write_atomic(disk, "file", NEW)
    assert disk.read("file") == NEW
    assert disk.list() == ["file"]
    disk.write("left.tmp", b"half")
    assert sweep(disk) == 1
    disk.delete("file")
    disk.delete("file")
    assert disk.list() == []


def test_a_state_directory_that_cannot_be_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="--dir"):
        RealDisk(tmp_path / "file" / "state")
