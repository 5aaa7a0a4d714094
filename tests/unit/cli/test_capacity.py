"""What a machine's memory allows, and what its owner is told when it is not enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from decentra.cli.capacity import max_experts
from decentra.config import Manifest, ModelSpec, PeerConfig, PlacementSpec
from decentra.doctor import machine
from decentra.doctor.machine import LIBRARY_BYTES, check_room_for_libraries, free_memory_bytes, total_memory_bytes
from decentra.errors import ConfigError, NoRoomNow
from decentra.model.custom import layout_for
from decentra.peer.footprint import footprint

SHAPE = ModelSpec(hidden_size=384, num_layers=8, num_experts=8, expert_hidden_size=512, head_dim=48)
HELD = Manifest(name="held", model=SHAPE, placement=PlacementSpec(mode="held"))
MIRROR = Manifest(name="mirror", model=SHAPE)
LAYOUT = layout_for(HELD)


def peer(**options: object) -> PeerConfig:
    return PeerConfig(device="cpu", **options)  # type: ignore[arg-type]


def test_a_budget_decides_how_many_experts() -> None:
    need = footprint(HELD, LAYOUT, is_partial=True)
    assert max_experts(peer(memory=f"{need.total(3) / 2**20 + 1:.0f}MiB"), HELD, LAYOUT) == 3
    assert max_experts(peer(), HELD, LAYOUT) is None, "all fit here"
    assert max_experts(PeerConfig(role="keeper"), HELD, LAYOUT) is None


def test_too_little_says_what_is_missing_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"memory: 400 MiB are \d+ MiB too few for one expert"):
        max_experts(peer(memory="400MiB"), HELD, LAYOUT)
    need = footprint(HELD, LAYOUT, is_partial=False)
    little = f"{need.total(1) / 2**20 - 50:.0f}MiB"
    assert (max_experts(peer(memory=little), HELD, LAYOUT) or 8) >= 1
    with pytest.raises(ConfigError, match="leave out --mode mirror"):
        max_experts(peer(memory=little, mode="mirror"), HELD, LAYOUT)
    with pytest.raises(ConfigError, match="a smaller model"):
        max_experts(peer(memory=little), MIRROR, LAYOUT)


def test_experts_that_a_peer_insists_on_have_to_fit() -> None:
    need = footprint(HELD, LAYOUT, is_partial=True)
    two = f"{need.total(2) / 2**20 + 1:.0f}MiB"
    assert max_experts(peer(memory=two, experts=(0, 5)), HELD, LAYOUT) == 2
    with pytest.raises(ConfigError, match=r"3 experts of this run need .* is enough for 2"):
        max_experts(peer(memory=two, num_experts=3), HELD, LAYOUT)


def test_what_others_use_now_is_another_matter_than_a_machine_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decentra.cli.capacity.free_memory_bytes", lambda: 300 << 20)
    with pytest.raises(NoRoomNow, match="other programs have the rest"):
        max_experts(peer(), HELD, LAYOUT)
    assert machine.total_memory_bytes() > 1 << 30
    monkeypatch.setattr("decentra.cli.capacity.total_memory_bytes", lambda: 300 << 20)
    with pytest.raises(ConfigError, match="too few for one expert"):
        max_experts(peer(), HELD, LAYOUT)


def test_who_wants_no_expert_needs_room_for_none() -> None:
    need = footprint(MIRROR, LAYOUT, is_partial=False)
    assert max_experts(peer(memory=f"{need.total(0) / 2**20 + 1:.0f}MiB", num_experts=0), MIRROR, LAYOUT) == 0


@pytest.mark.parametrize("text", ["4", "4gigs", "0GiB", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        peer(memory=text)


def test_a_control_group_and_the_own_limits_are_seen(tmp_path: Path) -> None:
    groups, root = tmp_path / "groups", tmp_path / "root"
    assert free_memory_bytes(groups, root) > 1 << 30, "a machine without control groups"
    for line, folder, names in (
        ("0::/user/me", root, ("memory.max", "memory.current")),
        ("3:cpu,memory:/user/me", root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        groups.write_text(line + "\n")
        (folder / "user" / "me").mkdir(parents=True)
        (folder / "user" / names[0]).write_text(str(300 << 20))
        (folder / "user" / names[1]).write_text(str(200 << 20))
        (folder / "user" / "me" / names[0]).write_text("max")
        own = psutil.Process().memory_info().rss
        (folder / "user" / "memory.stat").write_text("anon 5\ninactive_file 52428800\n")
        assert total_memory_bytes(groups, root) == 300 << 20
        assert 140 << 20 < free_memory_bytes(groups, root) - own < 160 << 20, "file pages are given up when asked"
        (folder / "user" / "memory.stat").unlink()
        assert 90 << 20 < free_memory_bytes(groups, root) - own < 110 << 20
        (folder / "user" / names[0]).write_text("max")
        assert free_memory_bytes(groups, root) > 1 << 30
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (123 << 20, 123 << 20))\n"
        "from decentra.doctor.machine import free_memory_bytes; print(free_memory_bytes() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.stdout.strip() == "123", done.stderr


def test_too_little_memory_for_the_libraries_is_said_before_they_are_loaded() -> None:
    with pytest.raises(ConfigError, match=r"this process may have 200 MiB of memory .* the libraries alone take 300 MiB: give it more"):
        check_room_for_libraries(200 << 20)
    check_room_for_libraries(LIBRARY_BYTES)
    check_room_for_libraries()
