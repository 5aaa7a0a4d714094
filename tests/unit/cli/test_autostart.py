"""The user service: joins with what was asked for, holds no secret, and comes off again. systemd itself is not asked here."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from decentra.cli import autostart
from decentra.config import PeerConfig
from decentra.errors import ConfigError
from decentra.ids import RunId
from decentra.invite import Invite, parse_invite

INVITE = Invite(RunId("a" * 64), b"k" * 32, services=("127.0.0.1:1",), token=b"secret")


@pytest.fixture(autouse=True)
def _no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)


def test_installed_and_removed(tmp_path: Path) -> None:
    config = PeerConfig(name="home", dir=tmp_path / "state")
    found = autostart.install(INVITE, config, ["--name", "home", "--hours", "22-7"], tmp_path, tmp_path / "where 100%")
    unit, line = Path(found["unit"]), Path(found["invite_file"])
    text = unit.read_text()
    assert f'"join" "{line}" "--name" "home" "--hours" "22-7"' in text
    assert f"WorkingDirectory={tmp_path}/where 100%%" in text, "paths of the options are seen from where they were typed"
    assert unit.name == "decentra-aaaaaaaa-home.service", "one of another run is another unit"
    assert "KillSignal=SIGINT" in text, "it leaves as with Ctrl-C"
    assert "RestartPreventExitStatus=2 4 5 6" in text, "who was refused does not knock for ever"
    assert INVITE.encode() not in text
    assert stat.S_IMODE(line.stat().st_mode) == 0o600
    assert parse_invite(line.read_text()) == INVITE
    assert not found["is_running"]
    units = "decentra-aaaaaaaa-home.service"
    assert found["left_to_do"] == [f"systemctl --user {verb}" for verb in ("daemon-reload", f"enable {units}", f"restart {units}")]
    assert autostart.remove(INVITE.run_id, "home", tmp_path)["ok"]
    assert not unit.exists()
    with pytest.raises(ConfigError, match="--name"):
        autostart.remove(INVITE.run_id, "home", tmp_path)


def test_odd_arguments_survive_the_unit(tmp_path: Path) -> None:
    text = autostart.unit_text("a", ["/opt/my programs/decentra", "join", 'a "b" $HOME 100% \\'], tmp_path)
    assert 'ExecStart="/opt/my programs/decentra" "join" "a \\"b\\" $$HOME 100%% \\\\"\n' in text
