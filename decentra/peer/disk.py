"""Files of one directory through the Disk port, and the one way to write them so that a crash leaves the old or the new file. No threads."""

from __future__ import annotations

import os
from pathlib import Path

from decentra.bits import Buffer
from decentra.errors import ConfigError
from decentra.ports import Disk

TMP = ".tmp"


def write_atomic(disk: Disk, name: str, *parts: Buffer) -> None:
    """tmp, write, fsync, rename, fsync directory: after a crash at any point the name holds the old or the new bytes, whole."""
    disk.write(name + TMP, *parts)
    disk.sync(name + TMP)
    disk.rename(name + TMP, name)
    disk.sync_dir()


def sweep(disk: Disk) -> int:
    """Remove what a crash left half-written; the number of files removed."""
    leftovers = [name for name in disk.list() if name.endswith(TMP)]
    for name in leftovers:
        disk.delete(name)
    return len(leftovers)


class RealDisk:
    """The Disk port over a directory, made when missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state directory {root}: {error.strerror}; choose another with --dir") from None

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, *parts: Buffer) -> None:
        with open(self.root / name, "wb") as file:
            file.writelines(parts)

    def sync(self, name: str) -> None:
        fd = os.open(self.root / name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        os.replace(self.root / old, self.root / new)

    def sync_dir(self) -> None:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def list(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p.is_file())
