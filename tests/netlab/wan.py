"""A laboratory whose links are slow and bad on purpose: hosts joined by a user-space network with delay, jitter, loss, rate and partitions.

Every host has one TUN device; a thread of this process carries packets between them and keeps the clock of every directed link. No queueing
discipline of the kernel is needed, and one seed gives one sequence of losses. It carries some ten thousand packets a second: enough for home links.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from lab import Lab, run_ip, why_impossible

TUN_PATH = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU_BYTES = 1500
READ_AT_ONCE = 64
_UP, _DOWN = "UP", "DOWN"  # no names of hosts: those are in small letters
QUEUE_S = 0.5  # a link holds this much before it drops what comes


def why_no_wan() -> str | None:
    """Why this lab cannot be made here, in words; None when it can."""
    if not os.access(TUN_PATH, os.R_OK | os.W_OK):
        return f"{TUN_PATH} cannot be opened"
    return why_impossible(needs_filter=True)


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two hosts. ``rate_bytes_per_s`` of 0 is as fast as it goes."""

    delay_s: float = 0.0
    jitter_s: float = 0.0  # uniform, to either side; packets of a link stay in order
    loss: float = 0.0  # share of packets
    rate_bytes_per_s: float = 0.0
    is_up: bool = True


@dataclass
class Traffic:
    """What a directed link did with its packets."""

    num_carried: int = 0
    carried_bytes: int = 0
    num_lost: int = 0  # by chance
    num_dropped: int = 0  # its queue was full
    num_cut: int = 0  # it was down


class WanLab(Lab):
    """``with WanLab(("org", "a", "b"), Link(delay_s=0.04)) as lab``: every pair of hosts has a link in each direction.

    ``access_bytes_per_s``: what a host sends to all others together, and gets from them, is no faster than this (0: no limit). Large packets
    (``mtu_bytes``) let the carrying thread move more.
    """

    def __init__(
        self, hosts: Sequence[str], link: Link = Link(), *, seed: int = 0, access_bytes_per_s: float = 0.0, mtu_bytes: int = MTU_BYTES
    ) -> None:
        super().__init__(hosts)
        self.links = {(one, other): link for one in hosts for other in hosts if one != other}
        self.traffic = {pair: Traffic() for pair in self.links}
        self.access_bytes_per_s = dict.fromkeys(hosts, access_bytes_per_s)
        self._mtu_bytes = mtu_bytes
        self._rng = random.Random(seed)
        self._devices: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._wake_r, self._wake_w = -1, -1

    def address(self, host: str) -> str:
        return f"10.98.0.{self.hosts.index(host) + 1}"

    # ------------------------------------------------------------ what the links are like

    def shape(self, one: str, other: str, *, both: bool = True, **changes: float) -> None:
        """Change fields of the link from ``one`` to ``other``, and of the way back."""
        for pair in [(one, other), (other, one)] if both else [(one, other)]:
            self.links[pair] = replace(self.links[pair], **changes)  # type: ignore[arg-type]

    def block(self, one: str, other: str) -> None:
        self.shape(one, other, is_up=False)

    def unblock(self, one: str, other: str) -> None:
        self.shape(one, other, is_up=True)

    def set_link(self, host: str, *, is_up: bool) -> None:
        for other in self.hosts:
            if other != host:
                self.shape(host, other, is_up=is_up)

    def partition(self, *groups: Sequence[str]) -> None:
        """Links within a group are up, all others down; a host in no group is alone."""
        group_of = {host: number for number, group in enumerate(groups) for host in group}
        for one, other in self.links:
            is_up = one in group_of and group_of[one] == group_of.get(other)
            self.shape(one, other, both=False, is_up=is_up)

    def heal(self) -> None:
        for one, other in self.links:
            self.shape(one, other, both=False, is_up=True)

    # ------------------------------------------------------------ building and removing

    def _build(self) -> None:
        for number, host in enumerate(self.hosts, 1):
            name, device = self.namespace(host), f"dcl{os.getpid()}x{number}"
            self._namespace(name)
            self._devices[host] = _open_tun(device)
            run_ip("link", "set", device, "netns", name)
            run_ip("-n", name, "link", "set", device, "name", "net0")
            run_ip("-n", name, "link", "set", "net0", "mtu", str(self._mtu_bytes), "up")
            run_ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "net0")
        self._wake_r, self._wake_w = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wan", daemon=True)
        self._thread.start()

    def close(self) -> None:
        super().close()
        if self._thread is not None:
            os.write(self._wake_w, b"x")
            self._thread.join()
            self._thread = None
            os.close(self._wake_r)
            os.close(self._wake_w)
        for fd in self._devices.values():
            os.close(fd)
        self._devices.clear()

    # ------------------------------------------------------------ the thread that carries

    def _carry(self) -> None:
        on_the_way: list[tuple[float, int, tuple[str, str], bytes]] = []
        free_at_s = dict.fromkeys([*self.links, *((way, host) for host in self.hosts for way in (_UP, _DOWN))], 0.0)
        last_due_s = dict.fromkeys(self.links, 0.0)
        order = itertools.count()  # packets due at the same time leave as they came
        by_number = dict(enumerate(self.hosts, 1))
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_r, selectors.EVENT_READ, None)
            for host, fd in self._devices.items():
                selector.register(fd, selectors.EVENT_READ, host)
            while True:
                timeout_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
                for key, _ in selector.select(timeout_s):
                    if key.data is None:
                        return
                    for packet in _read(key.fd):
                        pair = (key.data, by_number.get(packet[19], ""))
                        if pair in self.links and (due_s := self._due(pair, len(packet), free_at_s, last_due_s)) is not None:
                            heapq.heappush(on_the_way, (due_s, next(order), pair, packet))
                self._deliver(on_the_way)

    def _due(
        self, pair: tuple[str, str], num_bytes: int, free_at_s: dict[tuple[str, str], float], last_due_s: dict[tuple[str, str], float]
    ) -> float | None:
        """When a packet that starts now arrives; None when it never does."""
        link, traffic, now = self.links[pair], self.traffic[pair], time.monotonic()
        if not link.is_up:
            traffic.num_cut += 1
            return None
        if link.loss and self._rng.random() < link.loss:
            traffic.num_lost += 1
            return None
        at_s = now
        stages = (
            ((_UP, pair[0]), self.access_bytes_per_s[pair[0]]),
            (pair, link.rate_bytes_per_s),
            ((_DOWN, pair[1]), self.access_bytes_per_s[pair[1]]),
        )
        for stage, rate_bytes_per_s in stages:
            if free_at_s[stage] - at_s > QUEUE_S:
                traffic.num_dropped += 1
                return None
            if rate_bytes_per_s:
                at_s = free_at_s[stage] = max(at_s, free_at_s[stage]) + num_bytes / rate_bytes_per_s
        jitter_s = self._rng.uniform(-link.jitter_s, link.jitter_s) if link.jitter_s else 0.0
        last_due_s[pair] = max(last_due_s[pair], at_s + max(0.0, link.delay_s + jitter_s))
        return last_due_s[pair]

    def _deliver(self, on_the_way: list[tuple[float, int, tuple[str, str], bytes]]) -> None:
        now = time.monotonic()
        while on_the_way and on_the_way[0][0] <= now:
            _, _, pair, packet = heapq.heappop(on_the_way)
            traffic = self.traffic[pair]
            if not self.links[pair].is_up:
                traffic.num_cut += 1
                continue
            with suppress(OSError):  # the host's device is down or its queue is full
                os.write(self._devices[pair[1]], packet)
                traffic.num_carried += 1
                traffic.carried_bytes += len(packet)


def _open_tun(name: str) -> int:
    fd = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def _read(fd: int) -> list[bytes]:
    """IPv4 packets of the lab that wait on a device."""
    packets = []
    for _ in range(READ_AT_ONCE):
        try:
            packet = os.read(fd, 1 << 16)
        except OSError:
            break
        if len(packet) >= 20 and packet[0] >> 4 == 4 and packet[16:19] == b"\x0a\x62\x00":
            packets.append(packet)
    return packets
