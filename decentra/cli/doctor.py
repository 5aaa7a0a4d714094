"""``doctor``: prints what the checks of decentra/doctor found. Imports neither torch nor hivemind before a check needs them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decentra.cli.app import invite_of

if TYPE_CHECKING:
    from rich.table import Table

    from decentra.doctor.finding import Finding
    from decentra.invite import Invite

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "unreachable": "red"}


def doctor_command(
    invite: Annotated[
        str | None, typer.Argument(help="also check the way to this run: its line, or a file that holds it", metavar="[INVITE]")
    ] = None,
    name: Annotated[str, typer.Option(help="the peer whose state directory is checked")] = "peer",
    state: Annotated[Path | None, typer.Option("--dir", help="state directory; default: the user state directory, by run and name")] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="at which the averaging service tries to connect to this machine; default: any")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Check this machine, and with an invite the way to its run. Exit code 0: all well, 3: somebody does not answer, 1: anything else."""
    from decentra.cli.console import print_json
    from decentra.doctor.examine import Plan, examine
    from decentra.doctor.finding import as_json as to_json
    from decentra.doctor.finding import exit_code

    line = None if invite is None else invite_of(invite)
    findings = asyncio.run(examine(Plan(state_dir_of(line, name, state), line, port=port)))
    if as_json:
        print_json(to_json(findings))
    else:
        _print(findings)
    if code := exit_code(findings):
        raise typer.Exit(int(code))


def state_dir_of(invite: Invite | None, name: str, state: Path | None) -> Path:
    """Where the peer keeps its state: as ``join`` decides it; without an invite the folder above all runs."""
    import platformdirs

    root = platformdirs.user_state_path("decentra")
    return state or (root if invite is None else root / invite.run_id[:16] / name)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(_table(findings))
    for finding in findings:
        if finding.fix and finding.level != "ok":
            console.print(f"[{_COLOURS[finding.level]}]{escape(finding.check)}[/]: {escape(finding.fix)}", soft_wrap=True)
    if all(finding.level == "ok" for finding in findings):
        console.print("all well")


def _table(findings: list[Finding]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "", "found", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(escape(finding.check), f"[{_COLOURS[finding.level]}]{finding.level}[/]", escape(finding.found))
    return table
