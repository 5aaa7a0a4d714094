"""``autostart``: a systemd user service that joins a run at login and again after a crash. Writes two files; starts nothing of its own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decentra.cli.wiring import state_dir
from decentra.config import PeerConfig
from decentra.errors import ConfigError
from decentra.ids import RunId
from decentra.invite import Invite

UNITS = Path(".config/systemd/user")
STOP_S = 30  # how long a peer may take for its goodbye and its checkpoint


def unit_name(run: RunId, name: str) -> str:
    return f"decentra-{run[:8]}-{name}.service"


def unit_text(name: str, command: Sequence[str], folder: Path) -> str:
    """The service: low priority, restarted after a crash but not after a refusal, ended like Ctrl-C."""
    quoted = " ".join(_quoted(part) for part in command)
    return (
        f"[Unit]\nDescription=decentra peer {name}\nWants=network-online.target\nAfter=network-online.target\n\n"
        f"[Service]\nWorkingDirectory={_escaped(str(folder))}\nExecStart={quoted}\nKillMode=mixed\nKillSignal=SIGINT\nTimeoutStopSec={STOP_S}\nRestart=on-failure\nRestartSec=60\n"
        "RestartPreventExitStatus=2 4 5 6\nNice=10\nLimitNOFILE=32768\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def _escaped(text: str) -> str:
    """systemd replaces % in unit files."""
    return text.replace("%", "%%")


def _quoted(part: str) -> str:
    """One argument of ExecStart: no word splitting, no variables, no escapes."""
    for character, written in (("\\", "\\\\"), ('"', '\\"'), ("$", "$$")):
        part = part.replace(character, written)
    return f'"{_escaped(part)}"'


def install(invite: Invite, config: PeerConfig, args: Sequence[str], home: Path, folder: Path) -> dict[str, Any]:
    """Write the unit and the invite, and enable it where systemd runs for this user. Paths in ``args`` are seen from ``folder``. Raises ConfigError."""
    if sys.platform != "linux":
        raise ConfigError(
            f"autostart writes a systemd user service, and this is {sys.platform}; put 'decentra join' where your system starts programs"
        )
    root = state_dir(invite.run_id, config)
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = root / "invite"
    line.touch(mode=0o600)
    line.write_text(invite.encode() + "\n")
    unit = home / UNITS / unit_name(invite.run_id, config.name)
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(unit_text(config.name, [*_decentra(), "join", str(line), *args], folder))
    return {"ok": True, "unit": str(unit), "invite_file": str(line)} | _systemctl(
        ["daemon-reload"], ["enable", unit.name], ["restart", unit.name]
    )


def remove(run: RunId, name: str, home: Path) -> dict[str, Any]:
    """Stop and remove the unit. Raises ConfigError where there is none."""
    unit = home / UNITS / unit_name(run, name)
    if not unit.is_file():
        raise ConfigError(f"{unit} is not there; give the --name that it was made with")
    done = _systemctl(["disable", "--now", unit.name])
    unit.unlink()
    return {"ok": True, "unit": str(unit)} | done


def _decentra() -> list[str]:
    """How this very installation is called."""
    beside = Path(sys.executable).parent / "decentra"
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", "decentra.cli.main"]


def _systemctl(*commands: Sequence[str]) -> dict[str, Any]:
    """Run ``systemctl --user`` commands; what is left to do by hand where that cannot be."""
    lines = [["systemctl", "--user", *command] for command in commands]
    if shutil.which("systemctl") is None:
        return {"is_running": False, "left_to_do": [shlex.join(line) for line in lines], "why": "systemctl is not on this machine"}
    for number, line in enumerate(lines):
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"is_running": False, "left_to_do": [shlex.join(one) for one in lines[number:]], "why": why}
    return {"is_running": True, "left_to_do": [], "why": ""}
