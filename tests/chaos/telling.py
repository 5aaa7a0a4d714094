"""What the trials' commands share: lines with the time since the start, and the result as the last line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def teller() -> Callable[[str], None]:
    """Says a line on stderr, with the seconds since this was made before it."""
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say


def end(found: dict[str, Any], summary: str, *, as_json: bool, holds: bool = True) -> int:
    """The summary for people, the whole for programs; the exit code."""
    print(summary, file=sys.stderr)
    if as_json:
        print(json.dumps(found))
    return 0 if holds else 1


def at_least_one(text: str) -> int:
    """For argparse: percentiles of nothing are no numbers."""
    if (number := int(text)) < 1:
        raise ValueError
    return number
