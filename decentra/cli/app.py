"""The Typer app and what all its commands share: arguments, logging, reading an invite. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decentra import __version__
from decentra.errors import ConfigError

app = typer.Typer(
    name="decentra", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="People who share no cluster train one mixture-of-experts model together over ordinary internet links.",
)  # fmt: skip

InviteArg = Annotated[str, typer.Argument(help="the line the organiser sent, or a file that holds it", metavar="INVITE")]
RunDirArg = Annotated[Path, typer.Argument(help="run directory made by 'decentra init'", metavar="RUN_DIR")]
JsonOpt = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="every protocol message")]
LogJsonOpt = Annotated[bool, typer.Option("--log-json", help="log lines as JSON")]


def _version(asked: bool) -> None:
    if asked:
        print(f"decentra {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    pass


def logging_to(verbose: bool, log_json: bool) -> None:
    from decentra.cli.console import set_up_logging

    set_up_logging(is_verbose=verbose, is_json=log_json)


WithoutOpt = Annotated[
    str | None, typer.Option("--without", help="experts to leave out, such as 3 or 3,5; as if the model never had them, nothing is written")
]


def numbers_of(text: str | None, option: str) -> tuple[int, ...]:
    """Numbers with commas between them; none where nothing was given. Raises ConfigError."""
    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} expects numbers such as 0,3, got {text!r}") from None


def invite_of(text: str) -> Any:
    from decentra.errors import InviteError
    from decentra.invite import parse_invite

    if not text.startswith("decentra") and len(text) < 4096 and (path := Path(text).expanduser()).is_file():
        text = path.read_text()
    elif not text.startswith("decentra") and len(text) < 4096 and (path.suffix or "/" in text):
        raise InviteError(f"{text}: no such file, and no invite: one starts with 'decentra1_'")
    return parse_invite(text)
