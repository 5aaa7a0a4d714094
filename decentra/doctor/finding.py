"""What a check found, as a value, and the exit code that follows from all of them. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from decentra.errors import DecentraError, ExitCode, Unreachable


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but will hurt; does not change the exit code
    FAIL = "fail"
    UNREACHABLE = "unreachable"  # somebody else's machine does not answer


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``fix`` is one command or action; empty when nothing is wrong."""

    check: str
    level: Level
    found: str
    fix: str = ""

    @property
    def is_bad(self) -> bool:
        return self.level in (Level.FAIL, Level.UNREACHABLE)


def failure(check: str, error: DecentraError | OSError | ImportError, fix: str) -> Finding:
    """An error that ended a check, as its finding."""
    text = str(error) or type(error).__name__
    return Finding(check, Level.UNREACHABLE if isinstance(error, Unreachable) else Level.FAIL, text, fix)


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """OK when nothing is bad, UNREACHABLE when somebody did not answer, FAILED for everything else."""
    levels = {finding.level for finding in findings}
    if Level.UNREACHABLE in levels:
        return ExitCode.UNREACHABLE
    return ExitCode.FAILED if Level.FAIL in levels else ExitCode.OK


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The report as JSON values: ``ok``, ``exit_code`` and one object per check."""
    listed = list(findings)
    code = exit_code(listed)
    checks = [{"check": f.check, "level": str(f.level), "found": f.found, "fix": f.fix} for f in listed]
    return {"ok": code is ExitCode.OK, "exit_code": int(code), "checks": checks}


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / (1 << 30):.1f} GiB"
