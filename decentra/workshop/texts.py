"""Texts by name for judging and training parts: embedded domains, or files of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from decentra.config import DataSpec
from decentra.data.domains import embedded_domain, embedded_domains
from decentra.data.files import read_texts
from decentra.data.tokens import BYTES, Tokenizer, Tokens
from decentra.errors import ConfigError

HELD_OUT_SHARE = 0.1  # of a user's text, its end, that nothing here trains on


def split(names: Sequence[str], spec: DataSpec, tokenizer: Tokenizer = BYTES) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """(to train on, held out) of each: the name of an embedded domain, or a path, which may be written NAME=PATH. Raises ConfigError, DataError."""
    train: dict[str, Tokens] = {}
    held_out: dict[str, Tokens] = {}
    for given in names:
        name, _, path = ("", "", given) if Path(given).expanduser().exists() else given.rpartition("=")
        if not name and given in embedded_domains():
            _once(given, train)
            text = embedded_domain(given, spec)
            train[given], held_out[given] = tokenizer.encode(text.train), tokenizer.encode(text.held_out)
            continue
        if not Path(path).expanduser().exists():
            raise ConfigError(f"{given}: no such file, and no embedded domain ({', '.join(embedded_domains())})")
        _once(name or Path(path).name, train)
        found = read_texts([path])
        whole = tokenizer.encode(found.data, found.unlearnt)
        cut = max(len(whole) - spec.held_out_bytes, int((1 - HELD_OUT_SHARE) * len(whole)))
        train[name or Path(path).name], held_out[name or Path(path).name] = whole[:cut], whole[cut:]
    if not train:
        raise ConfigError("no text was given; name embedded domains or files with --text")
    return train, held_out


def _once(name: str, known: Mapping[str, Tokens]) -> None:
    if name in known:
        raise ConfigError(f"two texts are called {name!r}; give them names of their own: --text NAME=PATH")


def public(spec: DataSpec, tokenizer: Tokenizer = BYTES, *, without: Sequence[str] = ()) -> Tokens:
    """Some text that everybody has, of all kinds but those named."""
    return tokenizer.encode(b"\n".join(embedded_domain(name, spec).train[:100_000] for name in embedded_domains() if name not in without))
