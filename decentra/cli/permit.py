"""When this machine may train: its owner's word, hours, battery and other work on it. Looks at the machine; starts and stops nothing."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from decentra.config import PeerConfig
from decentra.errors import ConfigError

PAUSED_FILE = "paused"  # in the state directory: the owner said 'decentra pause'
POLL_S = 2.0
WINDOW = 15  # polls over which other work is averaged
BUSY_SHARE, IDLE_SHARE = 0.5, 0.25  # of all cores, used by other processes: from the first on we give way, below the second we come back
_HOURS = re.compile(r"(\d{1,2})(?::(\d{2}))?-(\d{1,2})(?::(\d{2}))?")


@dataclass(frozen=True, slots=True)
class Hours:
    """A part of the day in local time, minutes since midnight; it may cross midnight."""

    begin: int
    end: int

    @staticmethod
    def parse(text: str) -> Hours:
        """``22-7`` or ``22:30-6:45``. Raises ConfigError."""
        found = _HOURS.fullmatch(text.strip())
        parts = [] if found is None else [int(part or 0) for part in found.groups()]
        if not parts or max(parts[0], parts[2]) > 24 or max(parts[1], parts[3]) > 59:
            raise ConfigError(f"hours: expected two times of the day such as 22-7 or 22:30-6:45, got {text[:40]!r}")
        begin, end = (60 * parts[0] + parts[1]) % 1440, (60 * parts[2] + parts[3]) % 1440
        if begin == end:
            raise ConfigError(f"hours: {text[:40]!r} begins when it ends; leave it out to train all day")
        return Hours(begin, end)

    def holds(self, minute: int) -> bool:
        return self.begin <= minute < self.end if self.begin < self.end else minute >= self.begin or minute < self.end

    def __str__(self) -> str:
        return f"{self.begin // 60}:{self.begin % 60:02}-{self.end // 60}:{self.end % 60:02}"


def is_on_battery() -> bool:
    """False on machines without one."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is not None and battery.power_plugged is False


class OtherWork:
    """The share of all cores that processes other than this one and its children used lately; 0 to 1, 0 before the first interval."""

    def __init__(self) -> None:
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._before = self._now()

    def share(self) -> float:
        now = self._now()
        all_s, own_s = now[0] - self._before[0], now[1] - self._before[1]
        elapsed_s = (now[2] - self._before[2]) * (psutil.cpu_count() or 1)
        self._before = now
        if elapsed_s > 0:
            self._shares.append(min(1.0, max(0.0, all_s - own_s) / elapsed_s))  # a child that ended takes its seconds out of our own
        return sum(self._shares) / len(self._shares) if self._shares else 0.0

    def _now(self) -> tuple[float, float, float]:
        """(busy seconds of all cores, of this process and its children, clock)."""
        times = psutil.cpu_times()
        busy_s = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own_s, me = 0.0, psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.Error):
                used = process.cpu_times()
                own_s += used.user + used.system
        return busy_s, own_s, time.monotonic()


@dataclass
class Permit:
    """The owner's rules for one peer. ``refusal`` is asked every ``POLL_S``."""

    config: PeerConfig
    root: Path
    minute: Callable[[], int] = lambda: time.localtime().tm_hour * 60 + time.localtime().tm_min
    on_battery: Callable[[], bool] = is_on_battery
    other_share: Callable[[], float] | None = None
    _gives_way: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.config.when_idle and self.other_share is None:
            self.other_share = OtherWork().share
        self._hours = None if self.config.hours is None else Hours.parse(self.config.hours)

    def refusal(self) -> str:
        """Why this machine may not train now, in words; empty when it may."""
        if (self.root / PAUSED_FILE).exists():
            return "its owner said pause; 'decentra resume' goes on"
        if self._hours is not None and not self._hours.holds(self.minute()):
            return f"it is outside the hours {self._hours}"
        if self.config.role == "trainer" and not self.config.on_battery and self.on_battery():
            return "the machine runs on battery (--on-battery trains all the same)"
        if self.other_share is not None and self.config.when_idle:
            share = self.other_share()
            self._gives_way = share > (IDLE_SHARE if self._gives_way else BUSY_SHARE)
            if self._gives_way:
                return f"other work uses {share:.0%} of the processor (--when-idle)"
        return ""


def set_paused(root: Path, is_paused: bool) -> None:
    """Write or take back the owner's word. Raises ConfigError for a directory that is no peer's."""
    if not (root / "identity.key").exists():
        raise ConfigError(f"{root} is no peer's state directory; give the --name or --dir that it was joined with")
    if is_paused:
        (root / PAUSED_FILE).touch()
    else:
        (root / PAUSED_FILE).unlink(missing_ok=True)
