"""The ledger's journal in one SQLite file: append-only, durable when ``append`` returns, one process. It knows no record's meaning.

Records are deflated (``packed`` 1) where that makes them smaller: a ledger is hexadecimal text, and takes less than half of its length so.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from decentra.errors import ConfigError, IntegrityError, InUse, VersionMismatch

_APPLICATION_ID = 0x44454354  # "DECT"
_SCHEMA_VERSION = 2  # 1: records as they are; read, and made a 2
MAX_RECORD_BYTES = 16 << 20
_PAGE_ROWS = 500


class SqliteJournal:
    """Implements ports.Journal. Calls block (run them in a thread); they may come from any thread.

    Raises ConfigError (in use by another process, disk full, no permission, not a ledger), IntegrityError (damaged) and
    VersionMismatch (written by a newer version).
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        is_new = not path.exists()
        with self._mapped():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with self._mapped():
                self._open()
        except BaseException:
            self._db.close()
            raise
        if is_new:
            _sync_dir(path.parent)

    def append(self, records: Sequence[bytes]) -> None:
        """Store all of ``records`` or none; on return they survive a power cut."""
        if not records:
            return
        with self._lock, self._mapped():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT INTO record(body, packed) VALUES (?, ?)", [_packed(record) for record in records])
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def load(self) -> Iterator[bytes]:
        """All records in the order in which they were appended."""
        seq = 0
        while True:
            with self._lock, self._mapped():
                rows = self._db.execute(
                    "SELECT seq, body, packed FROM record WHERE seq > ? ORDER BY seq LIMIT ?", (seq, _PAGE_ROWS)
                ).fetchall()
            for found, body, is_packed in rows:
                seq += 1
                if found != seq or not isinstance(body, bytes):
                    raise IntegrityError(
                        f"ledger {self._path}: record {seq} is missing; restore the file from your backup and start with --take-over"
                    )
                yield self._unpacked(seq, body, is_packed)
            if len(rows) < _PAGE_ROWS:
                return

    def read(self, after: int, limit: int) -> list[bytes]:
        """At most ``limit`` records after the first ``after``."""
        with self._lock, self._mapped():
            rows = self._db.execute("SELECT seq, body, packed FROM record WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)).fetchall()
        return [self._unpacked(seq, bytes(body), is_packed) for seq, body, is_packed in rows]

    def count(self) -> int:
        with self._lock, self._mapped():
            return int(self._db.execute("SELECT count(*) FROM record").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _open(self) -> None:
        # Exclusive before WAL: then SQLite keeps the lock until close and needs no shared memory file.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN EXCLUSIVE")
        if self._check_kind() == 1:
            self._db.execute("ALTER TABLE record ADD COLUMN packed INTEGER NOT NULL DEFAULT 0")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS record(seq INTEGER PRIMARY KEY, body BLOB NOT NULL, packed INTEGER NOT NULL DEFAULT 0) STRICT"
        )
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        self._db.execute("COMMIT")
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))

    def _unpacked(self, seq: int, body: bytes, is_packed: int) -> bytes:
        if not is_packed:
            return body
        try:
            inflater = zlib.decompressobj()
            record = inflater.decompress(body, MAX_RECORD_BYTES)
            if inflater.eof and not inflater.unconsumed_tail:
                return record
        except zlib.error:
            pass
        raise IntegrityError(f"ledger {self._path}: record {seq} is damaged; restore the file from your backup and start with --take-over")

    def _check_kind(self) -> int:
        """The format that the file has; 0: it is new."""
        application, version = (int(self._db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version"))
        tables = [row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if (application, version) == (0, 0) and not tables:
            return 0
        if application != _APPLICATION_ID or "record" not in tables:
            raise ConfigError(f"{self._path} is a SQLite file of another program, not a ledger; give another path")
        if not 1 <= version <= _SCHEMA_VERSION:
            raise VersionMismatch(f"ledger {self._path} has format {version}, this version reads up to {_SCHEMA_VERSION}; update decentra")
        return version

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from None
        except OSError as error:
            raise ConfigError(f"ledger {self._path}: {error.strerror}") from None

    def _explain(self, error: sqlite3.Error) -> ConfigError | IntegrityError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return InUse(f"ledger {self._path} is in use by another process; one averaging service per run, stop the other one first")
        if code == sqlite3.SQLITE_FULL:
            return ConfigError(f"ledger {self._path}: the disk is full; free space and start again, nothing was lost")
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR):
            return ConfigError(f"ledger {self._path} cannot be opened or written ({error}); check the folder, its permissions and the disk")
        return IntegrityError(
            f"ledger {self._path} is damaged ({error}); check the disk, restore the file from your backup and start with --take-over"
        )


def _packed(record: bytes) -> tuple[bytes, int]:
    """(what is stored, 1 if it is deflated)."""
    if not isinstance(record, bytes):
        return record, 0  # the database says what is wrong with it
    short = zlib.compress(record)
    return (short, 1) if len(short) < len(record) else (record, 0)


def _sync_dir(path: Path) -> None:
    """A new file's name is durable only after this."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
