"""The user's own text: files and folders of plain text, JSONL, Parquet or Arrow, read as bytes. No windows, no sampling, no other formats.

A row is a document when it has a text, and a lesson when it has a prompt and a completion, or messages: then what is asked is read and not learnt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decentra.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX, ARROW_SUFFIX = ".parquet", ".arrow"  # the second: of a data set that the datasets library saved
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
_ARROW_FILE = b"ARROW1"  # how Arrow's file format begins
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
    unlearnt: tuple[tuple[int, int], ...] = ()  # spans of ``data`` that are read and not learnt


@dataclass(slots=True)
class _Document:
    """One document or lesson under way."""

    text: bytes = b""
    unlearnt: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str, *, is_learnt: bool = True) -> None:
        start = len(self.text)
        self.text += text.encode("utf-8", errors="replace")
        if not is_learnt:
            self.unlearnt.append((start, len(self.text)))


def read_texts(paths: Sequence[str | Path], *, text_field: str = "text", min_bytes: int = 1) -> FileTexts:
    """Read files and folders (recursively, hidden names left out) in path order.

    A ``.jsonl`` or ``.ndjson`` file has one JSON object per line; ``.parquet`` and ``.arrow`` files (a folder of ``datasets``' save_to_disk) have columns, and
    need pyarrow, the ``data`` extra; every other file is text as it is. A row has its text as ``text_field``, or ``prompt`` and ``completion``, or
    ``messages`` with a role and a content each, which become ChatML (``<|im_start|>role``, the content, ``<|im_end|>``); of these, completions and what
    the assistant says are learnt. A row with null in its fields is left out, and so is a message with null as its content (the call of a tool).
    Raises DataError: a path that is missing or cannot be read, a given file that is empty or binary, a JSONL line that is not as
    described (named by file and line), less than ``min_bytes`` of text in all.
    """
    if not paths:
        raise DataError("no data was given; name at least one file or folder of text")
    documents: list[_Document] = []
    skipped: list[str] = []
    num_files = 0
    for given in (Path(p).expanduser() for p in paths):
        for path in _files_of(given):
            if path.suffix.lower() in (PARQUET_SUFFIX, ARROW_SUFFIX):
                num_files += 1
                documents += (_row_document(row, str(path), text_field) for row in _column_rows(path, text_field))
                continue
            data = _read(path)
            if problem := _why_not_text(data):
                if path == given:
                    raise DataError(f"{path}: {problem}; give UTF-8 text or JSONL")
                skipped.append(str(path))
                continue
            num_files += 1
            documents += _jsonl_documents(path, data, text_field) if path.suffix.lower() in JSONL_SUFFIXES else [_Document(data)]
    text = b"\n".join(document.text for document in documents)
    if len(text) < min_bytes:
        where = ", ".join(str(p) for p in paths)
        raise DataError(f"{where}: {len(text)} bytes of text in {num_files} files, at least {min_bytes} (one window) are needed; add text")
    if documents and all(sum(end - start for start, end in d.unlearnt) == len(d.text) for d in documents):
        where = ", ".join(str(p) for p in paths)
        raise DataError(f"{where}: nothing in it is to be learnt, there are prompts only; give completions, or messages of an assistant")
    return FileTexts(text, num_files, tuple(skipped), tuple(_spans(documents)))


def _spans(documents: Sequence[_Document]) -> Iterator[tuple[int, int]]:
    at = 0
    for number, document in enumerate(documents, 1):
        yield from ((at + start, at + end) for start, end in document.unlearnt)
        at += len(document.text)
        if document.unlearnt and number < len(documents):
            yield at, at + 1  # the newline that joins a lesson to the next one
        at += 1


def _files_of(given: Path) -> Iterator[Path]:
    if given.is_file():
        yield given
        return
    if not given.is_dir():
        raise DataError(f"{given}: no such file or folder; check the path in 'data'")
    found = False
    for folder, folders, files in os.walk(given, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        # the JSON files of a saved data set describe it and are not text
        is_saved_set = any(f.endswith(ARROW_SUFFIX) or f == "dataset_dict.json" for f in files)
        for name in sorted(f for f in files if not f.startswith(".") and not (is_saved_set and f.endswith(".json"))):
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


def _jsonl_documents(path: Path, data: bytes, text_field: str) -> Iterable[_Document]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}:{number}: expected one JSON object per line, got {line[:60]!r}") from None
        if not _is_empty(row, text_field):
            yield _row_document(row, f"{path}:{number}", text_field)


def _is_empty(row: Any, text_field: str) -> bool:
    """True for a row that has the right fields and nothing (null) in them."""
    forms = [[text_field], [PROMPT, COMPLETION], [MESSAGES]]
    known = [[row[name] for name in form] for form in forms if isinstance(row, dict) and all(name in row for name in form)]
    return bool(known) and all(None in form for form in known)


def _row_document(row: Any, where: str, text_field: str) -> _Document:
    """A row as a document or a lesson. Raises DataError."""
    document = _Document()
    if isinstance(row, dict) and isinstance(row.get(text_field), str):
        document.add(row[text_field])
    elif isinstance(row, dict) and isinstance(row.get(PROMPT), str) and isinstance(row.get(COMPLETION), str):
        document.add(row[PROMPT], is_learnt=False)
        document.add(row[COMPLETION])
    elif isinstance(row, dict) and isinstance(row.get(MESSAGES), list):
        for message in row[MESSAGES]:
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            if isinstance(role, str) and content is None and "content" in message:
                continue  # a call of a tool, of which there is no text
            if not isinstance(role, str) or not isinstance(content, str):
                raise DataError(f"{where}: a message has a text 'role' and a text 'content', got {str(message)[:80]}")
            document.add(f"<|im_start|>{role}\n", is_learnt=False)
            document.add(f"{content}<|im_end|>", is_learnt=role == "assistant")
            document.add("\n", is_learnt=False)
    else:
        keys = ", ".join(map(str, list(row)[:10])) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: expected a string field '{text_field}' (or '{PROMPT}' and '{COMPLETION}', or '{MESSAGES}'), got: {keys};"
            " name the right one as text_field"
        )
    return document


def _column_rows(path: Path, text_field: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or Arrow file, of the columns that are read; rows with nothing in them are left out. Raises DataError."""
    try:
        from pyarrow import ArrowException, ipc
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: reading {path.suffix} needs pyarrow: pip install 'decentra[data]', or give JSONL") from None

    def batches() -> Iterator[Any]:
        if path.suffix.lower() == PARQUET_SUFFIX:
            with ParquetFile(path) as file:
                yield from file.iter_batches(_ROWS_AT_ONCE, columns=_columns(path, file.schema_arrow.names, text_field))
        else:
            with path.open("rb") as raw:
                is_file = raw.read(len(_ARROW_FILE)) == _ARROW_FILE  # else a stream, as the datasets library writes it
                raw.seek(0)
                with ipc.open_file(raw) if is_file else ipc.open_stream(raw) as reader:
                    columns = _columns(path, reader.schema.names, text_field)
                    found = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
                    yield from (batch.select(columns) for batch in found)

    try:
        for batch in batches():
            yield from (row for row in batch.to_pylist() if not _is_empty(row, text_field))
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole {path.suffix} file ({str(error)[:120]}); fetch it again") from None


def _columns(path: Path, names: Sequence[str], text_field: str) -> list[str]:
    found = [name for name in dict.fromkeys((text_field, PROMPT, COMPLETION, MESSAGES)) if name in names]
    if not found:
        raise DataError(f"{path}: expected a column '{text_field}', got: {', '.join(names[:10])}; name the right one as text_field")
    return found
