"""The SQLite journal: order, atomicity, exclusivity, damage, and survival of kill -9."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.errors import ConfigError, IntegrityError, VersionMismatch

ROOT = Path(__file__).parents[3]


@given(st.lists(st.lists(st.binary(max_size=50), max_size=4), max_size=8))
@settings(max_examples=20)
def test_what_is_appended_is_loaded_in_order(batches: list[list[bytes]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        expected: list[bytes] = []
        for batch in batches:
            journal = SqliteJournal(path)
            journal.append(batch)
            expected += batch
            assert list(journal.load()) == expected
            assert journal.count() == len(expected)
            journal.close()


def test_more_than_one_page(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "ledger.db")
    records = [str(i).encode() for i in range(1234)]
    journal.append(records)
    assert list(journal.load()) == records
    journal.close()


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "ledger.db")
    journal.append([b"a"])
    with pytest.raises(IntegrityError):
        journal.append([b"b", None, b"c"])  # type: ignore[list-item]
    assert list(journal.load()) == [b"a"]
    journal.append([b"b"])
    assert list(journal.load()) == [b"a", b"b"]
    journal.close()


def test_it_is_durable_by_settings(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "ledger.db")
    assert journal._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert journal._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    journal.close()


def test_calls_from_other_threads(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "ledger.db")
    threads = [threading.Thread(target=journal.append, args=([bytes([i])] * 10,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = list(journal.load())
    assert len(loaded) == 80
    assert all(len(set(loaded[i : i + 10])) == 1 for i in range(0, 80, 10))  # batches are not mixed
    journal.close()


def test_a_second_opener_is_told_that_it_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = SqliteJournal(path)
    journal.append([b"a"])
    with pytest.raises(ConfigError, match="in use by another process"):
        SqliteJournal(path)
    code = f"from pathlib import Path; from decentra.averaging.journal_sqlite import SqliteJournal; SqliteJournal(Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert other.returncode != 0
    assert "in use by another process" in other.stderr
    journal.append([b"b"])
    journal.close()
    again = SqliteJournal(path)
    assert list(again.load()) == [b"a", b"b"]
    again.close()


WRITER = """
import sys
from pathlib import Path
from decentra.averaging.journal_sqlite import SqliteJournal
journal = SqliteJournal(Path(sys.argv[1]))
seq = journal.count()
while True:
    journal.append([b"%d" % seq, b"%d" % (seq + 1)])
    seq += 2
    print(seq, flush=True)
"""


def test_it_survives_kill_9(tmp_path: Path) -> None:
    path, told = tmp_path / "ledger.db", 0
    for num_lines in (1, 7, 30):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(num_lines):
            told = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        told = max([told, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        writer.wait()
        journal = SqliteJournal(path)
        loaded = list(journal.load())
        assert len(loaded) >= told  # everything that was acknowledged, maybe one batch more
        assert len(loaded) % 2 == 0  # never half a batch
        assert loaded == [b"%d" % i for i in range(len(loaded))]
        journal.close()


@pytest.mark.parametrize("damage", ["no database", "a page overwritten", "cut off"])
def test_damage_is_an_integrity_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = SqliteJournal(path)
    journal.append([os.urandom(500) for _ in range(200)])
    journal.close()
    whole = path.read_bytes()
    damaged = {
        "no database": b"rubbish" * 1000,
        "a page overwritten": whole[:8192] + b"\xa5" * 4096 + whole[12288:],
        "cut off": whole[: len(whole) // 2],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(IntegrityError, match="restore the file from your backup"):
        SqliteJournal(path)
    path.write_bytes(whole)
    healthy = SqliteJournal(path)
    assert healthy.count() == 200
    healthy.close()


def test_a_missing_record_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = SqliteJournal(path)
    journal.append([b"a", b"b", b"c"])
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM record WHERE seq = 2")
    db.close()
    journal = SqliteJournal(path)
    with pytest.raises(IntegrityError, match="record 2 is missing"):
        list(journal.load())
    journal.close()


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks(url)")
    db.close()
    with pytest.raises(ConfigError, match="another program"):
        SqliteJournal(path)
    newer = tmp_path / "newer.db"
    SqliteJournal(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(VersionMismatch, match="format 3"):
        SqliteJournal(newer)
    with pytest.raises(ConfigError):
        SqliteJournal(tmp_path)  # a folder
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        SqliteJournal(tmp_path / "file" / "ledger.db")


def test_a_file_of_the_first_format_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path, text = tmp_path / "ledger.db", b"0123456789abcdef" * 100
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE record(seq INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT")
        db.executemany("INSERT INTO record(body) VALUES (?)", [(b"a",), (text,)])
        db.execute(f"PRAGMA application_id = {0x44454354}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    for expected in ([b"a", text], [b"a", text, text]):
        journal = SqliteJournal(path)
        assert list(journal.load()) == expected
        assert journal.read(1, 5) == expected[1:]
        journal.append([text])
        journal.close()
    with sqlite3.connect(path) as db:
        sizes = [len(body) for (body,) in db.execute("SELECT body FROM record")]
    db.close()
    assert sizes[:2] == [1, 1600]
    assert max(sizes[2:]) < 100


def test_a_record_that_does_not_inflate_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    for spoil in (b"\x00" * 20, b"", zlib.compress(b"a" * 1000)[:-6], zlib.compress(bytes(17 << 20))):
        journal = SqliteJournal(path)
        journal.append([b"a" * 1000])
        journal._db.execute("UPDATE record SET body = ? WHERE seq = 1", (spoil,))
        with pytest.raises(IntegrityError, match="record 1 is damaged; restore the file from your backup"):
            list(journal.load())
        journal.close()
