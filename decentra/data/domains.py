"""Four domains of text read from what is installed on any machine that runs decentra. Copies nothing, downloads nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from decentra.config import DataSpec
from decentra.errors import DataError
from decentra.ids import Digest, digest_of

# one huge generated file must not become a domain of its own
MAX_FILE_BYTES = 24_000


@dataclass(frozen=True, slots=True)
class DomainText:
    """One domain: ``train`` is for everybody, ``held_out`` is its tail that nobody trains on."""

    name: str
    train: bytes = field(repr=False)
    held_out: bytes = field(repr=False)


def embedded_domains() -> tuple[str, ...]:
    """Names of the domains that can be read on this machine."""
    return tuple(_PIECES)


def embedded_domain(name: str, spec: DataSpec) -> DomainText:
    """The first ``bytes_per_domain`` bytes of a domain, cut into training text and a held-out tail.

    The same installed versions give the same bytes. Raises DataError for an unknown name, a domain that is not installed or has
    fewer bytes, or a held-out part that leaves no room to train.
    """
    return _read_domain(name, spec.bytes_per_domain, spec.held_out_bytes)


def held_out_digests(spec: DataSpec) -> dict[str, Digest]:
    """sha256 of the held-out text of every embedded domain that ``spec`` names; free names are left out. Raises DataError."""
    return {name: digest_of(embedded_domain(name, spec).held_out) for name in spec.domains if name in _PIECES}


def differing_held_out(spec: DataSpec) -> tuple[str, ...]:
    """Domains whose held-out text on this machine is not the run's (another version of Python, torch or sympy). Raises DataError."""
    return tuple(name for name, digest in held_out_digests(spec).items() if spec.held_out.get(name, digest) != digest)


@lru_cache(maxsize=16)
def _read_domain(name: str, num_bytes: int, held_out_bytes: int) -> DomainText:
    if name not in _PIECES:
        raise DataError(f"unknown embedded domain '{name}'; known: {', '.join(_PIECES)}; other text is given as files (data = [...])")
    if held_out_bytes >= num_bytes:
        raise DataError(f"data.held_out_bytes {held_out_bytes} leaves nothing of data.bytes_per_domain {num_bytes} to train on")
    text = bytearray()
    for piece in _PIECES[name]():
        text += piece + b"\n"
        if len(text) >= num_bytes:
            break
    if len(text) < num_bytes:
        raise DataError(f"embedded domain '{name}' has {len(text)} bytes here, data.bytes_per_domain asks for {num_bytes}; lower it")
    return DomainText(name, bytes(text[: num_bytes - held_out_bytes]), bytes(text[num_bytes - held_out_bytes : num_bytes]))


def _code() -> Iterator[bytes]:
    return _files(Path(os.__file__).parent, (".py",), is_recursive=False)


def _prose() -> Iterator[bytes]:
    from pydoc_data.topics import topics  # 700 kB, loaded only when asked for

    for topic in _shuffled(topics):
        yield topics[topic].encode()


def _headers() -> Iterator[bytes]:
    include = _package("torch", "headers") / "include"
    # torch's own; the other folders are generated or belong to libraries that come and go with the build
    for folder in ("torch", "c10"):
        yield from _files(include / folder, (".h", ".hpp"))


def _mathematics() -> Iterator[bytes]:
    return _files(_package("sympy", "math"), (".py",), skipped=frozenset({"tests", "benchmarks"}))


_PIECES: dict[str, Callable[[], Iterator[bytes]]] = {"code": _code, "prose": _prose, "headers": _headers, "math": _mathematics}


def _package(name: str, domain: str) -> Path:
    """Folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise DataError(f"embedded domain '{domain}' is read from the package {name}, which is not installed; pip install {name}")
    return Path(found.origin).parent


def _files(root: Path, suffixes: tuple[str, ...], *, is_recursive: bool = True, skipped: frozenset[str] = frozenset()) -> Iterator[bytes]:
    """The beginnings of the files below ``root``, read one at a time; what cannot be read or is not text is passed over."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and f != "__pycache__"] if is_recursive else []
        names += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(suffixes)]
    for name in _shuffled(names):
        try:
            with open(root / name, "rb") as file:
                data = file.read(MAX_FILE_BYTES)
        except OSError:
            continue
        if data and b"\0" not in data:
            yield data.replace(b"\r\n", b"\n")


def _shuffled(names: Iterator[str] | list[str] | dict[str, str]) -> list[str]:
    """A fixed mixed order (by hash of the name), so that the held-out tail resembles the training text."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
