"""Frozen dataclasses to canonical JSON and strictly back: what ledgers and records are made of. No I/O, no clock, no randomness."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from decentra.errors import RejectedPayload

T = TypeVar("T")


def to_bytes(value: Any) -> bytes:
    """Canonical UTF-8 JSON of a dataclass: sorted keys, no spaces; equal values give equal bytes."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def from_bytes(cls: type[T], data: bytes, *, max_bytes: int = 1 << 20) -> T:
    """Strict inverse of ``to_bytes``. Raises RejectedPayload('malformed') for anything that is not exactly such a value."""
    if len(data) > max_bytes:
        raise RejectedPayload("size", f"{len(data)} bytes of {cls.__name__}, at most {max_bytes} are read")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RejectedPayload("malformed", f"expected JSON of {cls.__name__}: {error}") from None
    value: T = _build(cls, raw, cls.__name__)
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def prepare(kind: Any) -> None:
    """Resolve the type hints of a dataclass and of all inside it now: that compiles them, and nothing is compiled while foreign bytes are read."""
    kind = getattr(kind, "__supertype__", kind)
    inner = _hints(kind).values() if is_dataclass(kind) and isinstance(kind, type) else get_args(kind)
    for one in inner:
        prepare(one)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _build(kind: Any, raw: Any, where: str) -> Any:
    kind = getattr(kind, "__supertype__", kind)
    if is_dataclass(kind):
        return _build_dataclass(kind, raw, where)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [o for o in get_args(kind) if o is not type(None)]
        if raw is None and len(options) < len(get_args(kind)):
            return None
        return _build(options[0], raw, where)
    if origin is tuple:
        return _build_tuple(get_args(kind), raw, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(raw)
        except ValueError:
            raise RejectedPayload("malformed", f"{where}: {raw!r} is no {kind.__name__}") from None
    if kind is bytes:
        return _build_bytes(raw, where)
    if kind is float:
        return _build_float(raw, where)
    if type(raw) is not kind:
        raise RejectedPayload("malformed", f"{where}: expected {getattr(kind, '__name__', kind)}, got {type(raw).__name__}")
    return raw


def _build_bytes(raw: Any, where: str) -> bytes:
    try:
        value = bytes.fromhex(raw)
    except (ValueError, TypeError):
        value = None
    if value is None or value.hex() != raw:  # fromhex takes capitals and spaces, too
        raise RejectedPayload("malformed", f"{where}: expected bytes as lower-case hex")
    return value


def _build_float(raw: Any, where: str) -> float:
    try:
        value = float(raw) if type(raw) in (int, float) else math.nan
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise RejectedPayload("malformed", f"{where}: expected a finite number, got {str(raw)[:40]!r}")
    return value


def _build_dataclass(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise RejectedPayload("malformed", f"{where}: expected an object, got {type(raw).__name__}")
    known = {f.name: f for f in fields(kind)}
    if unknown := raw.keys() - known.keys():
        raise RejectedPayload("malformed", f"{where}: unknown field {sorted(unknown)[0]!r}")
    hints = _hints(kind)
    values = {}
    for name, f in known.items():
        if name in raw:
            values[name] = _build(hints[name], raw[name], f"{where}.{name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise RejectedPayload("malformed", f"{where}: field {name!r} is missing")
    return kind(**values)


def _build_tuple(args: tuple[Any, ...], raw: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise RejectedPayload("malformed", f"{where}: expected a list, got {type(raw).__name__}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(raw))
    if len(args) != len(raw):
        raise RejectedPayload("malformed", f"{where}: expected {len(args)} items, got {len(raw)}")
    return tuple(_build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, raw, strict=True)))
