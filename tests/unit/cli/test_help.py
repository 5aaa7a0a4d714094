"""The command line's face: help without heavy imports, help text everywhere, and JSON wherever a command reads or measures."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest
import typer.main

from decentra.cli.main import app
from tests.unit.cli_lines import problem_of

HEAVY = ("torch", "hivemind", "grpc", "sympy", "matplotlib", "uvloop", "cryptography")
LONG_RUNNING = {"bootstrap", "averager"}  # print addresses and serve; they read nothing and measure nothing


# Typer brings its own copy of click in some versions: only attributes are used here, no classes.
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GROUPS = {name: command for name, command in COMMANDS.items() if hasattr(command, "commands")}
COMMANDS = {n: c for n, c in COMMANDS.items() if n not in GROUPS} | {
    f"{g} {n}": c for g, group in GROUPS.items() for n, c in group.commands.items()
}
NAMES = sorted(COMMANDS)


@pytest.mark.parametrize("args", [["--help"], ["join", "--help"], ["status", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {args!r}\n"
        "from decentra.cli.main import main\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    print(f"decentra {' '.join(args)}: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before:.2f} s of CPU")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert "decentra" in done.stdout.lower()


def test_the_promised_commands_exist() -> None:
    promised = "init host bootstrap averager keep join invite revoke stop status show pull generate eval demo plan history autostart pause resume doctor"
    promised += " import export verify upcycle moefy expand merge soup route tune continual forget audit inspect"
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if "Example: " in (COMMANDS[n].help or "")])
def test_examples_are_commands(name: str) -> None:
    line = (COMMANDS[name].help or "").partition("Example: ")[2].strip()
    assert line.startswith(f"decentra {name} ")
    assert problem_of(line) is None


@pytest.mark.parametrize("name", NAMES)
def test_every_command_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert len(command.help.split()) >= 5
    for parameter in command.params:
        options = parameter.opts
        assert all(not o.startswith("-") or o == o.lower() for o in options), f"{name}: {options} is not lower case"


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LONG_RUNNING])
def test_every_command_that_reads_or_measures_takes_json(name: str) -> None:
    flags = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert "--json" in flags
