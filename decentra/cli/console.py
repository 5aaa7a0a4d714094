"""What commands print: one structured line per protocol event, errors with their exit code, JSON as the last line. Decides nothing."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import structlog
import typer

from decentra.errors import DecentraError, ExitCode

# What a watching human cares about; everything else is DEBUG.
_INFO = frozenset(
    {
        "training", "placed-here", "recovered", "service-connected", "service-away", "service-rejected", "round-skipped", "packet-refused",
        "operation-failed", "damaged-file", "bad-blob", "resumed", "trainer-died", "checkpoint-failed", "lost-anchor", "bootstrap-waiting",
        "bootstrap-attached", "p2p-died", "p2p-restarted", "clock-skew", "round-confirmed", "round-abandoned", "round-void", "rolled-back",
        "run-over", "run-stopping", "admitted", "placed", "service-started", "service-resumed", "rejected", "waiting", "progress",
        "leaving", "measuring", "capacity", "held-out-differs", "offer-forged", "settings-ignored", "codec", "limits-not-heard", "paused",
        "objected", "judges-nothing", "quarantined", "succession", "succeeded", "onward",
        "damaged-anchor", "copy-in-step", "copy-behind", "taking-over", "took-over", "two-stories", "evidence-lost",
    }
)  # fmt: skip
_SECRET = frozenset({"token", "invite", "credentials", "seed", "run_key", "service_key", "key"})


def set_up_logging(*, is_verbose: bool, is_json: bool) -> None:
    """structlog to stderr: colours on a terminal, JSON lines on request. Foreign libraries stay quiet unless they warn."""
    level = logging.DEBUG if is_verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    renderer: Any = (
        structlog.processors.JSONRenderer() if is_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=16)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _redact,
            structlog.processors.TimeStamper(fmt="iso" if is_json else "%H:%M:%S", utc=is_json), renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )  # fmt: skip


def _redact(_logger: Any, _name: str, fields: Any) -> Any:
    for name in _SECRET & fields.keys():
        fields[name] = "***"
    return fields


class LogEvents:
    """The Events port over structlog."""

    def __init__(self, **bound: Any) -> None:
        self._log = structlog.get_logger().bind(**bound)

    def emit(self, event: str, **fields: Any) -> None:
        self._log.log(logging.INFO if event in _INFO else logging.DEBUG, event, **fields)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, the last line of stdout."""
    print(json.dumps(value, sort_keys=True), flush=True)


def fail(error: DecentraError | OSError, *, as_json: bool = False) -> typer.Exit:
    """Say what went wrong and give the exit to raise."""
    code = error.exit_code if isinstance(error, DecentraError) else ExitCode.FAILED
    text = str(error) if isinstance(error, DecentraError) else f"{error.strerror}: {error.filename}" if error.filename else str(error)
    print(f"decentra: {text}", file=sys.stderr, flush=True)
    if as_json:
        print_json({"ok": False, "error": text, "kind": type(error).__name__, "exit_code": int(code)})
    return typer.Exit(int(code))


def print_table(rows: dict[str, Any]) -> None:
    """Names and values, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)
