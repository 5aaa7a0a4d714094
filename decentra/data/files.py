"""The user's own text: files and folders of plain text, JSONL or Parquet, read as bytes. No windows, no sampling, no other formats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from decentra.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
_ROWS_AT_ONCE = 4096
# share of undecodable characters above which a file is not text; old 8-bit European text stays below it
MAX_UNDECODABLE_SHARE = 0.1
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class FileTexts:
    """All text that was found, joined in path order with a newline between documents."""

    data: bytes = field(repr=False)
    num_files: int
    skipped: tuple[str, ...] = ()  # files inside given folders that are not text


def read_texts(paths: Sequence[str | Path], *, text_field: str = "text", min_bytes: int = 1) -> FileTexts:
    """Read files and folders (recursively, hidden names left out) in path order.

    A ``.jsonl`` or ``.ndjson`` file has one JSON object per line whose ``text_field`` is the text, a ``.parquet`` file a column of that name (pyarrow, the
    ``data`` extra, reads it); every other file is text as it is.
    Raises DataError: a path that is missing or cannot be read, a given file that is empty or binary, a JSONL line that is not as
    described (named by file and line), less than ``min_bytes`` of text in all.
    """
    if not paths:
        raise DataError("no data was given; name at least one file or folder of text")
    documents: list[bytes] = []
    skipped: list[str] = []
    num_files = 0
    for given in (Path(p).expanduser() for p in paths):
        for path in _files_of(given):
            if path.suffix.lower() == PARQUET_SUFFIX:
                num_files += 1
                documents += _parquet_documents(path, text_field)
                continue
            data = _read(path)
            if problem := _why_not_text(data):
                if path == given:
                    raise DataError(f"{path}: {problem}; give UTF-8 text or JSONL")
                skipped.append(str(path))
                continue
            num_files += 1
            documents += _jsonl_documents(path, data, text_field) if path.suffix.lower() in JSONL_SUFFIXES else [data]
    text = b"\n".join(documents)
    if len(text) < min_bytes:
        where = ", ".join(str(p) for p in paths)
        raise DataError(f"{where}: {len(text)} bytes of text in {num_files} files, at least {min_bytes} (one window) are needed; add text")
    return FileTexts(text, num_files, tuple(skipped))


def _files_of(given: Path) -> Iterator[Path]:
    if given.is_file():
        yield given
        return
    if not given.is_dir():
        raise DataError(f"{given}: no such file or folder; check the path in 'data'")
    found = False
    for folder, folders, files in os.walk(given, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(f for f in files if not f.startswith(".")):
            found = True
            yield Path(folder, name)
    if not found:
        raise DataError(f"{given}: the folder has no files; put text or JSONL files into it")


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _why_not_text(data: bytes) -> str | None:
    """What is wrong with bytes that should be text, or None. UTF-16 is caught by its NUL bytes."""
    if not data.strip():
        return "the file is empty"
    if b"\0" in data:
        return "the file is binary (it has NUL bytes)"
    sample = data[:_SAMPLE_BYTES].decode("utf-8", errors="replace")
    share = sample.count("\ufffd") / len(sample)
    if share > MAX_UNDECODABLE_SHARE:
        return f"the file is binary ({share:.0%} of it is not UTF-8)"
    return None


def _jsonl_documents(path: Path, data: bytes, text_field: str) -> Iterable[bytes]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}:{number}: expected one JSON object per line, got {line[:60]!r}") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            keys = ", ".join(map(str, list(row)[:10])) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{path}:{number}: expected a string field '{text_field}', got: {keys}; name the right one as text_field")
        yield row[text_field].encode("utf-8", errors="replace")


def _parquet_documents(path: Path, text_field: str) -> Iterator[bytes]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'decentra[data]', or give JSONL") from None
    try:
        with ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: expected a column '{text_field}', got: {', '.join(file.schema_arrow.names[:10])}; name the right one as text_field"
                )
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    if value is None:
                        continue
                    if not isinstance(value, str):
                        raise DataError(f"{path}: column '{text_field}' holds {type(value).__name__}, text was expected")
                    yield value.encode("utf-8", errors="replace")
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({str(error)[:120]}); fetch it again") from None
