"""Command lines quoted in documents, checked against the real CLI. Runs none of them; tests nothing itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import typer.main

from decentra.cli.main import app

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")


@lru_cache(maxsize=1)
def cli() -> Any:
    """The command group people type."""
    return typer.main.get_command(app)


def in_markdown(text: str) -> Iterator[str]:
    """Lines of code blocks (fenced or indented) and inline code that begin with ``decentra``."""
    blocks = "".join(found.group(1) for found in _FENCE.finditer(text))
    rest = _FENCE.sub("", text)
    lines = [*blocks.splitlines(), *(line for line in rest.splitlines() if line.startswith("    "))]
    lines += [found.group(1) for found in _INLINE.finditer(rest)]
    yield from _commands(lines)


def in_comments(text: str) -> Iterator[str]:
    """Commands in the comments of TOML, YAML and Dockerfiles, and in the docstrings of Python: quoted, or at the end of a line."""
    for line in text.splitlines():
        quoted = re.findall(r"['`](decentra [^'`]+)['`]", line)
        ending = re.findall(r"(?:^|[:#]\s+|\s{3,})(decentra [a-z-]+ .*|\bdecentra [a-z-]+$)", line)
        yield from _commands(quoted or ending)


def _commands(lines: list[str]) -> Iterator[str]:
    for line in lines:
        for part in re.split(r"&&|;|\|", line.split(" #")[0]):
            part = part.strip().removeprefix("$ ")
            if re.match(r"(\.venv/bin/)?decentra( |$)", part):
                yield part.removeprefix(".venv/bin/")


def problem_of(line: str) -> str | None:
    """What is wrong with a command line: no such command, no such option. None when it could be typed."""
    words = shlex.split(line)[1:]
    group = cli()
    if not words or words[0].startswith("-"):
        known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
        return next((f"no option {w} of decentra itself in {line!r}" for w in words if w not in known), None)
    command = group.commands.get(words[0])
    if command is None:
        return f"no command {words[0]!r} in {line!r}; known: {', '.join(sorted(group.commands))}"
    if hasattr(command, "commands"):  # a group: decentra expert train
        words, group = words[1:], command
        command = group.commands.get(words[0]) if words else None
        if command is None:
            return f"no such command of a group in {line!r}; known: {', '.join(sorted(group.commands))}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words[1:]:
        if word.startswith("-") and word.split("=")[0] not in known:
            return f"no option {word!r} of {words[0]!r} in {line!r}; known: {', '.join(sorted(known))}"
    num_given = len(_arguments(words[1:], command))
    num_known = sum(p.param_type_name == "argument" for p in command.params)
    takes_any = any(p.param_type_name == "argument" and p.nargs == -1 for p in command.params)
    if num_given > num_known and not takes_any:
        return f"{num_given} arguments in {line!r}, {words[0]!r} takes {num_known}"
    return None


def _arguments(words: list[str], command: Any) -> list[str]:
    """Words that are neither options nor their values."""
    takes_value = {o for p in command.params if p.param_type_name == "option" and not p.is_flag for o in p.opts}
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in takes_value
        else:
            found.append(word)
    return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
