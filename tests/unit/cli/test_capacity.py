"""What a machine's memory allows, and what its owner is told when it is not enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from decentra.cli.capacity import free_bytes, max_experts
from decentra.config import Manifest, ModelSpec, PeerConfig, PlacementSpec
from decentra.errors import ConfigError
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


@pytest.mark.parametrize("text", ["4", "4gigs", "0GiB", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        peer(memory=text)


def test_a_control_group_and_the_own_limits_are_seen(tmp_path: Path) -> None:
    groups, root = tmp_path / "groups", tmp_path / "root"
    assert free_bytes(groups, root) > 1 << 30, "a machine without control groups"
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
        assert 90 << 20 < free_bytes(groups, root) - own < 110 << 20
        (folder / "user" / names[0]).write_text("max")
        assert free_bytes(groups, root) > 1 << 30
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (123 << 20, 123 << 20))\n"
        "from decentra.cli.capacity import free_bytes; print(free_bytes() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.stdout.strip() == "123", done.stderr
