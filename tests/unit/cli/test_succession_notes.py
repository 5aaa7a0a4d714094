"""A member's notes about the run that follows: what is read of them, whose directory is whose, and how its owner's words are carried over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decentra.cli.create import create
from decentra.cli.rundir import AFTER_FILE, RunDir
from decentra.cli.succession import SUCCESSOR_FILE, _read, check_dir, expect_successor, note_steps, onward
from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError
from decentra.identity import Keypair, load_key, save_key
from decentra.ids import RunId
from decentra.invite import Invite

WAY = Invite(RunId("5" * 64), Keypair.generate().public, (), ("127.0.0.1:1",), b"t")


def test_the_way_is_read_back_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    assert _read(tmp_path) == (False, None)
    expect_successor(tmp_path)
    assert _read(tmp_path) == (True, None)
    (tmp_path / SUCCESSOR_FILE).write_bytes(WAY.encode().encode())
    assert _read(tmp_path) == (True, WAY)
    expect_successor(tmp_path)
    assert (tmp_path / SUCCESSOR_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [b"x", b"\xff\xfe", b"Infinity", b"[" * 100_000, WAY.encode().encode()[:-3]])
def test_a_damaged_note_is_asked_for_again(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / SUCCESSOR_FILE).write_bytes(damage)
    assert _read(tmp_path) == (True, None)


def test_a_folder_in_the_place_of_the_note(tmp_path: Path) -> None:
    (tmp_path / SUCCESSOR_FILE).mkdir()
    assert _read(tmp_path) == (True, None)


def test_every_run_has_a_directory_of_its_own(tmp_path: Path) -> None:
    check_dir(tmp_path, WAY.run_id)
    mine = Manifest(name="mine")
    (tmp_path / "manifest.json").write_bytes(mine.canonical_bytes())
    check_dir(tmp_path, mine.run_id())
    with pytest.raises(ConfigError, match="every run needs a directory of its own"):
        check_dir(tmp_path, WAY.run_id)
    (tmp_path / "manifest.json").write_bytes(b"{")
    check_dir(tmp_path, WAY.run_id)


def test_identity_comes_along_and_what_its_owner_said_of_the_old_run_does_not(tmp_path: Path) -> None:
    key = Keypair.generate()
    save_key(tmp_path / "identity.key", key)
    note_steps(tmp_path, 30)
    config = PeerConfig(dir=tmp_path, experts=(0, 3, 5), max_steps=100, data=("x",))
    further = onward(WAY, config, tmp_path, tmp_path)
    assert further is not None
    assert (further.config.experts, further.config.num_experts, further.config.max_steps) == (None, 3, 70)
    assert further.config.data == ("x",)
    assert further.config.dir == tmp_path / "onward" / ("5" * 16)
    assert load_key(further.config.dir / "identity.key").public == key.public
    assert onward(WAY, config.model_copy(update={"max_steps": 30}), tmp_path, tmp_path) is None
    (tmp_path / "num-steps").write_text("many")
    counted_anew = onward(WAY, config, tmp_path, tmp_path)
    assert counted_anew is not None
    assert counted_anew.config.max_steps == 100


def test_the_note_of_the_run_before(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.before() is None
    (tmp_path / AFTER_FILE).write_text(json.dumps({"run_dir": "/elsewhere"}))
    assert run.before() == RunDir(Path("/elsewhere"))
    for damage in ("{", "[]", "{}"):
        (tmp_path / AFTER_FILE).write_text(damage)
        with pytest.raises(ConfigError, match=r"after\.json is damaged"):
            run.before()


def test_a_run_goes_on_with_a_model_and_a_key_only(tmp_path: Path) -> None:
    create(tmp_path / "old", None, ())
    with pytest.raises(ConfigError, match="give it as --model"):
        create(tmp_path / "new", None, (), after=tmp_path / "old")
    (tmp_path / "old" / "run.key").rename(tmp_path / "kept.key")
    with pytest.raises(ConfigError, match=r"run\.key is missing; whoever has it"):
        create(tmp_path / "new", None, (), model=tmp_path, after=tmp_path / "old")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["placement.frozen_experts=[0]", "placement.mode=held"], "use mode 'mirror'"),
        (["placement.frozen_experts=[0,1,2,3,4,5,6,7]"], "leave one to train"),
        (["placement.frozen_experts=[8]"], "experts 0 to 7"),
    ],
)
def test_experts_that_cannot_be_frozen(tmp_path: Path, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create(tmp_path / "run", None, settings)
