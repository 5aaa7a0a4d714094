"""Folders of safetensors files: read a tensor at a time, written in shards, so that a model larger than memory passes through. Never unpickles.

A folder has ``model.safetensors``, or shards with ``model.safetensors.index.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from decentra.errors import ConfigError, IntegrityError

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARD_BYTES = 2 << 30
MAX_JSON_BYTES = 64 << 20
_HASH_BYTES = 1 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError, IntegrityError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes; no such file is that long")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}; give the folder of a whole model") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path} is not JSON, it is damaged; pull the model again, or fetch it anew") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Weights:
    """The tensors of a folder by name, read when asked for. Close it, or use it in a ``with``."""

    def __init__(self, folder: Path, one: str = ONE) -> None:
        """``one``: the file where there are no shards. Raises ConfigError (no weights, a part is missing), IntegrityError (damaged)."""
        self.folder, self._one = folder, one
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._of: dict[str, str] = {}
        with contextlib.ExitStack() as unfinished:
            unfinished.push(self._stack)
            for file in self._parts():
                self._open(file)
            unfinished.pop_all()
        if not self._of:
            raise ConfigError(f"{folder}: its safetensors files hold no tensor")

    def _parts(self) -> list[str]:
        if self._one == ONE and (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX)
            of = index.get("weight_map")
            if not isinstance(of, dict) or not all(isinstance(f, str) and "/" not in f and f != ".." for f in of.values()):
                raise IntegrityError(f"{self.folder / INDEX} has no weight_map of file names")
            self._promised = set(of)
            return sorted(set(of.values()))
        self._promised = set()
        return [self._one]

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            what = "no finished model" if file == self._one else f"half a download: {file} is missing"
            raise ConfigError(f"{self.folder} has {what}; expected {self._one} or {INDEX} with all its parts")
        try:
            opened = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except (safetensors.SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
        self._files[file] = opened
        self._of |= dict.fromkeys(opened.keys(), file)

    def check(self) -> None:
        """Raise IntegrityError when the index promises tensors that no file has."""
        if missing := sorted(self._promised - set(self._of)):
            raise IntegrityError(f"{self.folder}: {len(missing)} tensors of the index are in no file, {missing[0]} for one; fetch it again")

    def __enter__(self) -> Weights:
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    @property
    def files(self) -> set[str]:
        """Names of the files that tensors come from."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._of[name]].get_slice(name).get_shape())

    def __call__(self, name: str) -> Tensor:
        """Raises ConfigError."""
        if name not in self._of:
            raise ConfigError(f"{self.folder} has no tensor {name}; it is of another architecture, or not whole")
        tensor: Tensor = self._files[self._of[name]].get_tensor(name)
        return tensor


class ShardWriter:
    """Writes tensors as they come, in files of about ``shard_bytes``; ``finish`` names them. Until then the folder holds no finished model.

    ``add`` with a ``group`` makes a file of each group instead, whatever its size; its tensors come one after the other.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shard_bytes = folder, shard_bytes
        self._group: str | None = None
        self._waiting: dict[str, Tensor] = {}
        self._num_waiting_bytes = 0
        self._storages: set[int] = set()
        self._parts: list[tuple[Path, list[str], int, str | None]] = []

    def add(self, name: str, tensor: Tensor, group: str | None = None) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        is_full = group is None and self._num_waiting_bytes + num_bytes > self._shard_bytes
        if self._waiting and (group != self._group or is_full):
            self._flush()
        self._group = group
        whole = tensor.contiguous()
        pointer = whole.untyped_storage().data_ptr()
        if (
            whole._base is not None or pointer in self._storages
        ):  # a file holds each tensor's own bytes, also where two are one (a tied head)
            whole = whole.clone()
        self._storages.add(pointer)
        self._waiting[name] = whole
        self._num_waiting_bytes += num_bytes

    def _flush(self) -> None:
        path = self._folder / f".part-{len(self._parts):05}.safetensors"
        safetensors.torch.save_file(self._waiting, path, metadata={"format": "pt"})
        self._parts.append((path, list(self._waiting), self._num_waiting_bytes, self._group))
        self._waiting, self._num_waiting_bytes = {}, 0
        self._storages = set()

    def finish(self) -> dict[str, str]:
        """File name -> sha256 of each part."""
        if self._waiting or not self._parts:
            self._flush()
        hashes: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for number, (path, names, _, group) in enumerate(self._parts, 1):
            name = ONE if len(self._parts) == 1 else f"model-{number:05}-of-{len(self._parts):05}.safetensors"
            if group is not None:
                name = f"model-{group}.safetensors"
            assert name not in hashes, "the tensors of a group come one after the other"
            path.rename(self._folder / name)
            hashes[name] = sha256_of(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        if list(hashes) != [ONE]:
            index = {"metadata": {"total_size": sum(size for _, _, size, _ in self._parts)}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))
        return hashes


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
