"""Text to token numbers and back: bytes, or a ``tokenizer.json`` as Hugging Face's tokenizers library writes it. No windows, no model.

Shapes: N tokens of a text. A token that is read and not learnt (a prompt, say) is written as the complement ``~id`` of its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decentra.errors import ConfigError, IntegrityError
from decentra.ids import Digest, digest_of

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20
NUM_BYTE_TOKENS = 256
MAX_BYTE_VOCAB = 512  # bytes, and room for marks of one's own
_CHUNK_BYTES = 1 << 16

Spans = Sequence[tuple[int, int]]  # of bytes, ascending and apart: [start, end)
Tokens = bytes | np.ndarray  # numbers [N]; bytes are a token each


def numbers_of(tokens: Tokens) -> np.ndarray:
    """Integers [N]."""
    return np.frombuffer(tokens, dtype=np.uint8) if isinstance(tokens, bytes) else tokens


def tensor_of(tokens: Tokens) -> Tensor:
    """int64 [N] as a model reads them: what is not to be learnt has its number like the rest."""
    return read(torch.from_numpy(numbers_of(tokens).astype(np.int64)))


def read(tokens: Tensor) -> Tensor:
    """Numbers as a model reads them, whatever is to be learnt of them."""
    return torch.where(tokens < 0, ~tokens, tokens)


def joined(texts: Sequence[Tokens]) -> Tokens:
    """One text after the other; bytes with a newline between them."""
    if all(isinstance(text, bytes) for text in texts):
        return b"\n".join(text for text in texts if isinstance(text, bytes))
    return np.concatenate([numbers_of(text).astype(np.int32) for text in texts])


class Tokenizer(Protocol):
    """What turns text into numbers 0..num_tokens-1. ``digest`` is None for bytes."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def digest(self) -> Digest | None: ...

    def encode(self, text: bytes, unlearnt: Spans = ()) -> Tokens:
        """Numbers [N]; those of the ``unlearnt`` spans as complements."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; what is no UTF-8 is shown as replacement characters."""
        ...

    def spread(self, text: bytes, values: Sequence[int]) -> list[int]:
        """For each byte of ``text`` the value of the token it belongs to; ``values`` of each token of ``encode(text)``."""
        ...


class ByteTokenizer:
    """A byte is a token."""

    num_tokens = NUM_BYTE_TOKENS
    digest: Digest | None = None

    def encode(self, text: bytes, unlearnt: Spans = ()) -> Tokens:
        if not unlearnt:
            return text
        numbers = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
        for start, end in unlearnt:
            numbers[start:end] = ~numbers[start:end]
        return numbers

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t if t < NUM_BYTE_TOKENS else ord("?") for t in tokens).decode(errors="replace")

    def spread(self, text: bytes, values: Sequence[int]) -> list[int]:
        return list(values)


BYTES = ByteTokenizer()


class FileTokenizer:
    """A ``tokenizer.json``. Marks that it knows (``<|im_end|>``) are one token wherever they stand in a text; nothing is put before or after a text."""

    def __init__(self, data: bytes, where: str = TOKENIZER_FILE) -> None:
        """Raises ConfigError for what is no tokenizer."""
        from tokenizers import Tokenizer as Foreign

        if len(data) > MAX_TOKENIZER_BYTES:
            raise ConfigError(f"{where}: {len(data)} bytes, a tokenizer has at most {MAX_TOKENIZER_BYTES}")
        try:
            self._foreign: Any = Foreign.from_str(data.decode())
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{where}: not a tokenizer.json of the tokenizers library ({str(error)[:120]}); fetch it again") from None
        self._foreign.no_padding()
        self._foreign.no_truncation()
        self.data, self.digest = data, digest_of(data)
        whole, parts = (self._ids(text) for text in (["\nword"], ["\n", "word"]))
        self._is_cuttable = whole[0] == parts[0] + parts[1]  # not where a mark is put before a text, as Llama's does

    @property
    def num_tokens(self) -> int:
        return 1 + max(self._foreign.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text: bytes, unlearnt: Spans = ()) -> Tokens:
        if not self._is_cuttable:
            return self._whole(text, unlearnt)
        parts: list[np.ndarray] = []
        at = 0
        for start, end in [*unlearnt, (len(text), len(text))]:
            parts.append(self._numbers(text[at:start]))
            parts.append(~self._numbers(text[start:end]))
            at = end
        return np.concatenate(parts)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._foreign.decode(list(tokens), skip_special_tokens=False))

    def spread(self, text: bytes, values: Sequence[int]) -> list[int]:
        characters = text.decode(errors="replace")
        encoding = self._foreign.encode(characters, add_special_tokens=False)
        of_character, at, last = [], 0, values[0] if len(values) else 0
        for value, (start, end) in zip(values, encoding.offsets, strict=False):  # the text may have been cut
            of_character += [last] * (start - at) + [value] * (end - max(start, at))  # what no token covers goes with the one before
            at, last = max(at, end), value
        of_character += [last] * (len(characters) - at)
        return [value for value, one in zip(of_character, characters, strict=True) for _ in one.encode()]

    def _numbers(self, text: bytes) -> np.ndarray:
        """int32; in pieces that end at lines, so that memory stays a small multiple of the text."""
        pieces = [piece.decode(errors="replace") for piece in _pieces(text)]
        return np.concatenate([np.array(ids, dtype=np.int32) for ids in self._ids(pieces)] or [np.empty(0, dtype=np.int32)])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._foreign.encode_batch(list(texts), add_special_tokens=False)]

    def _whole(self, text: bytes, unlearnt: Spans) -> np.ndarray:
        """The same of a text that must not be cut: a token belongs to where it begins."""
        encoding = self._foreign.encode(text.decode(errors="replace"), add_special_tokens=False)
        numbers = np.array(encoding.ids, dtype=np.int32)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        at_byte = at = 0  # characters are counted once, from span to span
        for start, end in unlearnt:
            at += len(text[at_byte:start].decode(errors="replace"))
            inside = slice(*np.searchsorted(starts, [at, at := at + len(text[start:end].decode(errors="replace"))]))
            numbers[inside] = ~numbers[inside]
            at_byte = end
        return numbers


def _pieces(text: bytes) -> list[bytes]:
    pieces, at = [], 0
    while at < len(text):
        end = len(text) if len(text) - at <= _CHUNK_BYTES else text.rfind(b"\n", at, at + _CHUNK_BYTES) + 1
        if end <= at:  # one line that is longer than a piece: cut where a character begins
            end = at + _CHUNK_BYTES
            while end > at + 1 and text[end] & 0xC0 == 0x80:
                end -= 1
        pieces.append(text[at:end])
        at = end
    return pieces


def load_tokenizer(path: Path, digest: Digest | None = None) -> FileTokenizer:
    """A tokenizer's file. Raises ConfigError, and IntegrityError where it is not the one with ``digest``."""
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes, a tokenizer has at most {MAX_TOKENIZER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); the model needs its {TOKENIZER_FILE}; pull or import it again"
        ) from None
    if digest is not None and digest_of(data) != digest:
        raise IntegrityError(f"{path} has sha256 {digest_of(data)[:12]}, this model was trained with {digest[:12]}; get its own again")
    return FileTokenizer(data, str(path))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raise ConfigError for a tokenizer whose tokens the model does not have."""
    if tokenizer.num_tokens > vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has {tokenizer.num_tokens} tokens, the model {vocab_size}; it is another model's tokenizer"
        )
    if tokenizer.digest is None and vocab_size > MAX_BYTE_VOCAB:
        raise ConfigError(
            f"{where}: the model has {vocab_size} tokens and no {TOKENIZER_FILE} is with it; read as bytes, text would mean nothing to it."
            f" Put its {TOKENIZER_FILE} beside the original model and import that again"
        )
