"""A machine's owner decides when it trains: hours, pause, battery and other work."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from decentra.cli.permit import Hours, OtherWork, Permit, set_paused
from decentra.config import PeerConfig
from decentra.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22-7", (22 * 60, 0, 6 * 60 + 59), (7 * 60, 12 * 60, 21 * 60 + 59)),
        ("9:30-17:15", (9 * 60 + 30, 17 * 60 + 14), (9 * 60 + 29, 17 * 60 + 15)),
        ("18-24", (18 * 60, 1439), (0, 17 * 60 + 59)),
    ],
)
def test_hours(text: str, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    hours = Hours.parse(text)
    assert all(hours.holds(minute) for minute in inside)
    assert not any(hours.holds(minute) for minute in outside)
    assert Hours.parse(str(hours)) == hours


@pytest.mark.parametrize("text", ["", "22", "22-25", "9:75-10", "nine-five", "-1-5"])
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 22-7"):
        Hours.parse(text)


def test_hours_that_end_when_they_begin() -> None:
    with pytest.raises(ConfigError, match="all day"):
        Hours.parse("0-24:00")


def permit(root: Path, *, minute: int = 0, battery: bool = False, share: float = 0.0, **config: object) -> Permit:
    return Permit(PeerConfig(**config), root, lambda: minute, lambda: battery, lambda: share)  # type: ignore[arg-type]


def test_every_rule_says_why(tmp_path: Path) -> None:
    assert permit(tmp_path).refusal() == ""
    assert "outside the hours 22:00-7:00" in permit(tmp_path, minute=600, hours="22-7").refusal()
    assert "--on-battery" in permit(tmp_path, battery=True).refusal()
    assert permit(tmp_path, battery=True, on_battery=True).refusal() == ""
    assert "60%" in permit(tmp_path, share=0.6, when_idle=True).refusal()
    assert permit(tmp_path, share=0.6).refusal() == "", "it was not asked for"


def test_giving_way_does_not_flap(tmp_path: Path) -> None:
    now = 0.4
    rule = Permit(PeerConfig(when_idle=True), tmp_path, lambda: 0, lambda: False, lambda: now)
    assert rule.refusal() == ""
    now = 0.6
    assert rule.refusal() != ""
    now = 0.4
    assert rule.refusal() != "", "it comes back when the others use a quarter"
    now = 0.2
    assert rule.refusal() == ""


def test_the_owners_word_is_a_file_of_the_peer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no peer's state directory"):
        set_paused(tmp_path, True)
    (tmp_path / "identity.key").touch()
    set_paused(tmp_path, True)
    set_paused(tmp_path, True)
    assert "decentra resume" in permit(tmp_path).refusal()
    set_paused(tmp_path, False)
    set_paused(tmp_path, False)
    assert permit(tmp_path).refusal() == ""


class Scripted(OtherWork):
    """What the machine's counters say at each look: (busy seconds of all cores, our own, clock)."""

    def __init__(self, *looks: tuple[float, float, float]) -> None:
        self._looks = list(looks)
        super().__init__()

    def _now(self) -> tuple[float, float, float]:
        return self._looks.pop(0)


def test_other_work_is_a_share_of_all_cores_and_ones_own_is_not_in_it() -> None:
    cores = psutil.cpu_count() or 1
    work = Scripted((0, 0, 0), (8 * cores, 8 * cores, 10), (13 * cores, 8 * cores, 20), (23 * cores, 3 * cores, 30))
    assert work.share() == 0.0, "all of it was ours"
    assert work.share() == pytest.approx(0.25), "a half after nothing"
    assert work.share() == pytest.approx(0.5), "a child that ended takes seconds out of ours, and no core works more than all the time"


def test_this_machine_has_counters() -> None:
    assert 0.0 <= OtherWork().share() <= 1.0
