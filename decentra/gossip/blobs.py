"""Content-addressed files under a byte budget: verified in and out, durable, least used evicted first. Blocking; knows no network."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from decentra.errors import ConfigError, RejectedPayload
from decentra.ids import Digest, digest_of, is_digest

HASH_STEP_BYTES = 1 << 20
RESERVE_BYTES = 256 << 20  # of the disk, at most a tenth of it: what may be evicted does not fill it, others write there, too
MAX_BLOBS = 100_000  # small ones, too, cost the file system and every start


class BlobReader:
    """An open blob. It stays readable when the store drops or evicts it meanwhile."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd, self.num_bytes = fd, num_bytes

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Up to ``num_bytes`` from ``offset``; fewer at the end only. Raises OSError."""
        parts: list[bytes] = []
        while num_bytes and (part := os.pread(self._fd, num_bytes, offset)):
            parts.append(part)
            offset, num_bytes = offset + len(part), num_bytes - len(part)
        return b"".join(parts)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlobStore:
    """Blobs as files ``root/ab/DIGEST``. Safe to use from several threads.

    Pins live in memory: whoever needs a blob pins it again after a restart, before the first ``put``. A file found at start is verified
    when it is first read; one that does not match its name is deleted, counted in ``num_corrupt`` and missing from then on.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        """Raises ConfigError when ``root`` cannot be used."""
        if budget_bytes < 1:
            raise ConfigError(f"the blob budget has to be at least 1 byte, got {budget_bytes}")
        self.root, self.budget_bytes = root, budget_bytes
        self.num_corrupt = self.num_evicted = 0
        self._lock = threading.Lock()
        self._sizes: dict[Digest, int] = {}  # least recently used first
        self._verified: set[Digest] = set()
        self._pins: Counter[Digest] = Counter()
        self._used_bytes = 0
        self._reserved_bytes = 0  # of puts under way
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._load()
        except OSError as error:
            raise ConfigError(f"blob store {root}: {error.strerror}; give a directory this user can write") from None

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def pinned_bytes(self) -> int:
        with self._lock:
            return self._pinned_bytes()

    def has(self, digest: Digest) -> bool:
        """Also of a blob that was put here beside this process (``put_beside``): from now on it counts like the others."""
        if digest in self._sizes:
            return True
        try:
            num_bytes = self._path(digest).stat().st_size
        except OSError:
            return False
        with self._lock:
            if digest not in self._sizes:
                self._sizes[digest] = num_bytes
                self._used_bytes += num_bytes
        return True

    def size(self, digest: Digest) -> int | None:
        """Bytes of a blob, or None."""
        return self._sizes.get(digest)

    def put(self, digest: Digest, data: bytes) -> None:
        """Store ``data`` durably. Raises RejectedPayload when it is not what ``digest`` says, OSError when disk or budget refuse it."""
        path = self._path(digest)
        actual = digest_of(data)
        if actual != digest:
            raise RejectedPayload("digest", f"expected a blob with sha256 {digest}, got {len(data)} bytes with {actual}")
        with self._lock:
            if self._sizes.get(digest) == len(data) and digest in self._verified:
                self._touch(digest)
                return
            self._make_room(digest, len(data))
            self._reserved_bytes += len(data)
        try:
            _write_durably(path, data)
        finally:
            with self._lock:
                self._reserved_bytes -= len(data)
        with self._lock:
            self._forget(digest)
            self._sizes[digest] = len(data)
            self._used_bytes += len(data)
            self._verified.add(digest)

    def read(self, digest: Digest) -> bytes | None:
        """A whole blob, verified, or None."""
        reader = self._open(digest)
        if reader is None:
            return None
        with reader:
            data = reader.read_at(0, reader.num_bytes)
        if digest_of(data) != digest:
            self._discard_corrupt(digest)
            return None
        with self._lock:
            if digest in self._sizes:
                self._verified.add(digest)
        return data

    def open(self, digest: Digest) -> BlobReader | None:
        """A blob for reading in ranges, verified once since the start, or None. The caller closes it."""
        reader = self._open(digest)
        if reader is None or digest in self._verified:
            return reader
        actual, offset = hashlib.sha256(), 0
        while step := reader.read_at(offset, HASH_STEP_BYTES):
            actual.update(step)
            offset += len(step)
        if actual.hexdigest() != digest:
            reader.close()
            self._discard_corrupt(digest)
            return None
        with self._lock:
            if digest in self._sizes:
                self._verified.add(digest)
        return reader

    def drop(self, digest: Digest) -> None:
        """Delete a blob, pinned or not; nothing happens when it is not there."""
        with self._lock:
            if self._forget(digest):
                self._path(digest).unlink(missing_ok=True)

    def pin(self, digest: Digest) -> None:
        """Keep a blob, present or to come, until ``unpin`` was called as often."""
        with self._lock:
            self._pins[digest] += 1

    def unpin(self, digest: Digest) -> None:
        with self._lock:
            self._pins[digest] -= 1
            if self._pins[digest] <= 0:
                del self._pins[digest]

    def digests(self) -> tuple[Digest, ...]:
        """All blobs, least recently used first."""
        with self._lock:
            return tuple(self._sizes)

    # ------------------------------------------------------------ inside

    def _path(self, digest: Digest) -> Path:
        if not is_digest(digest):  # it becomes a file name
            raise RejectedPayload("malformed", f"expected a digest of 64 lower-case hex characters, got {digest[:80]!r}")
        return self.root / digest[:2] / digest

    def _load(self) -> None:
        found: list[tuple[float, Digest, int]] = []
        for path in _files(self.root):
            if path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)
            elif is_digest(path.name) and path.parent.name == path.name[:2]:
                stat = path.stat()
                found.append((stat.st_mtime, Digest(path.name), stat.st_size))
        for _, digest, num_bytes in sorted(found):
            self._sizes[digest] = num_bytes
            self._used_bytes += num_bytes

    def _open(self, digest: Digest) -> BlobReader | None:
        path = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._lock:
                self._forget(digest)
            return None
        with self._lock:
            if digest in self._sizes:
                self._touch(digest)
        with contextlib.suppress(OSError):
            os.utime(fd)  # the order of use survives a restart
        return BlobReader(fd, os.fstat(fd).st_size)

    def _discard_corrupt(self, digest: Digest) -> None:
        self.num_corrupt += 1
        self.drop(digest)

    def _touch(self, digest: Digest) -> None:
        self._sizes[digest] = self._sizes.pop(digest)

    def _forget(self, digest: Digest) -> bool:
        num_bytes = self._sizes.pop(digest, None)
        self._verified.discard(digest)
        self._used_bytes -= num_bytes or 0
        return num_bytes is not None

    def _pinned_bytes(self) -> int:
        return sum(self._sizes.get(digest, 0) for digest in self._pins)

    def _spare_bytes(self) -> int:
        """Of the disk, beyond the reserve; may be negative."""
        disk = shutil.disk_usage(self.root)
        return disk.free - min(RESERVE_BYTES, disk.total // 10)

    def _make_room(self, digest: Digest, num_bytes: int) -> None:
        pinned = self._pinned_bytes() - (self._sizes.get(digest, 0) if digest in self._pins else 0) + self._reserved_bytes
        if pinned + num_bytes > self.budget_bytes:
            raise OSError(
                errno.ENOSPC,
                f"blob of {num_bytes} bytes does not fit: {pinned} of {self.budget_bytes} bytes in {self.root} are in use by blobs that"
                " must stay; raise blob_budget_bytes or hold fewer experts",
            )
        used = self._used_bytes - self._sizes.get(digest, 0) + self._reserved_bytes
        budget_bytes = min(self.budget_bytes, used + self._spare_bytes())
        for victim in list(self._sizes):
            if used + num_bytes <= budget_bytes and len(self._sizes) < MAX_BLOBS:
                return
            if victim not in self._pins and victim != digest:
                used -= self._sizes[victim]
                self._forget(victim)
                self._path(victim).unlink(missing_ok=True)
                self.num_evicted += 1


def read_kept(root: Path, digest: Digest) -> bytes | None:
    """A blob of a store that may be another process's, verified, or None."""
    try:
        data = (root / digest[:2] / digest).read_bytes()
    except OSError:
        return None
    return data if digest_of(data) == digest else None


def put_beside(root: Path, digest: Digest, data: bytes) -> None:
    """Put a blob where the process that has the store finds it when it is asked for it. Raises OSError."""
    _write_durably(root / digest[:2] / digest, data)


def _files(root: Path) -> Iterator[Path]:
    for folder in sorted(root.iterdir()):
        if len(folder.name) == 2 and folder.is_dir() and not folder.is_symlink():
            yield from (path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink())


def _write_durably(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the directory: after it the blob is there whole, before it not at all."""
    if not path.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
        _sync_dir(path.parent.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_dir(path.parent)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
