"""Texts by name for judging and training parts: embedded domains, or files of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from decentra.config import DataSpec
from decentra.data.domains import embedded_domain, embedded_domains
from decentra.data.files import read_texts
from decentra.errors import ConfigError, DataError

HELD_OUT_SHARE = 0.1  # of a user's text, its end, that nothing here trains on


def split(names: Sequence[str], spec: DataSpec) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(to train on, held out) of each: the name of an embedded domain, or a path, which may be written NAME=PATH. Raises ConfigError, DataError."""
    train: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    for given in names:
        name, _, path = ("", "", given) if Path(given).expanduser().exists() else given.rpartition("=")
        if not name and given in embedded_domains():
            _once(given, train)
            text = embedded_domain(given, spec)
            train[given], held_out[given] = text.train, text.held_out
            continue
        if not Path(path).expanduser().exists():
            raise ConfigError(f"{given}: no such file, and no embedded domain ({', '.join(embedded_domains())})")
        _once(name or Path(path).name, train)
        whole = read_texts([path]).data
        cut = max(len(whole) - spec.held_out_bytes, int((1 - HELD_OUT_SHARE) * len(whole)))
        train[name or Path(path).name], held_out[name or Path(path).name] = whole[:cut], whole[cut:]
    if not train:
        raise ConfigError("no text was given; name embedded domains or files with --text")
    return train, held_out


def _once(name: str, known: Mapping[str, bytes]) -> None:
    if name in known:
        raise ConfigError(f"two texts are called {name!r}; give them names of their own: --text NAME=PATH")


def public(spec: DataSpec, *, without: Sequence[str] = ()) -> bytes:
    """Some text that everybody has, of all kinds but those named."""
    return b"\n".join(embedded_domain(name, spec).train[:100_000] for name in embedded_domains() if name not in without)


def check_bytes(vocab_size: int) -> None:
    """Raise DataError for a model that does not read bytes: its tokenizer is its own, and none is read here yet."""
    if vocab_size != 256:
        raise DataError(
            f"this model has {vocab_size} tokens, text is read as bytes here (256); what needs text works on byte models only, the rest on all"
        )


def joined(texts: Mapping[str, bytes]) -> list[bytes]:
    return list(texts.values())
