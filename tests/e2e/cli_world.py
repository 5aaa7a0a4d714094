"""The decentra command inside the test's process: arguments in; exit code, stdout and stderr out. Starts no second process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any

from decentra.cli.main import main


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event; needs ``--log-json``."""
        lines = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def error_line(self) -> str:
        """The one line that says what went wrong. Fails on a traceback, on silence and on a second error line."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("decentra: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    def refused(self, code: int, *words: str) -> str:
        """Assert a clean failure with this exit code whose one line holds all ``words``."""
        line = self.error_line()
        assert self.code == code, f"exit code {self.code}, expected {code}: {line}"
        for word in words:
            assert word in line, f"{word!r} is not in: {line}"
        return line


def decentra(*args: str) -> Said:
    """Run one command as a user would type it."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["decentra", *args]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
    finally:
        sys.argv = argv
    return Said(code, out.getvalue(), err.getvalue())
