"""A laboratory of hosts in network namespaces, made and removed by the test that uses it. It knows nothing of decentra and needs root.

Nothing touches the machine's own network: every link is inside the lab's namespaces. Names carry the process id, so labs run side by side, and what
a killed test left behind is removed by the next one.

- ``block(a, b)``: no route between two hosts; packets vanish, as they do at most home routers.
- ``outbound_only(a)``: a stateful filter inside the host lets answers in and nothing else.
- ``masquerade(a, b)``: both live behind one router, which gives what they open its own address and lets nothing else in, not even from one to the other.
- ``set_link(a, is_up=False)``: the cable is pulled at the other end; the host keeps its address and its routes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "dclab"
NETNS_DIR = Path("/run/netns")
COMMAND_S = 20.0
_BLOCK_PRIORITY = 100


class LabError(Exception):
    """A command of the lab failed; the message holds the command and what it said."""


def why_impossible(*, needs_filter: bool = False) -> str | None:
    """Why no lab can be made here, in words; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the 'ip' command (iproute2) is missing"
    if needs_filter and _filter_tool() is None:
        return "neither 'nft' nor 'iptables' is installed"
    probe = f"{PREFIX}{os.getpid()}probe"
    try:
        run_ip("netns", "add", probe)
        try:
            run_ip("-n", probe, "link", "add", "name", "probe0", "type", "veth", "peer", "name", "probe1")
            if needs_filter:
                _filter(probe)
        finally:
            run_ip("netns", "del", probe)
    except (LabError, OSError, subprocess.TimeoutExpired) as error:
        return f"this machine makes no network namespaces: {error}"
    return None


class Lab:
    """What every kind of laboratory has; ``_build`` makes the hosts, ``address`` says where they are."""

    def __init__(self, hosts: Sequence[str]) -> None:
        assert 1 <= len(hosts) <= 60, "a lab has 1 to 60 hosts"
        assert all(re.fullmatch(r"[a-z0-9]{1,8}", host) for host in hosts), "host names are short lower-case words"
        self.hosts = tuple(hosts)
        self._made: list[str] = []

    def __enter__(self) -> Self:
        sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def address(self, host: str) -> str:
        """The host's IPv4 address."""
        raise NotImplementedError

    def block(self, one: str, other: str) -> None:
        """From now on no packet passes between the two, in either direction, and nobody is told."""
        raise NotImplementedError

    def unblock(self, one: str, other: str) -> None:
        raise NotImplementedError

    def set_link(self, host: str, *, is_up: bool) -> None:
        """Pull or plug the cable of ``host``."""
        raise NotImplementedError

    def _build(self) -> None:
        raise NotImplementedError

    def namespace(self, host: str) -> str:
        assert host in self.hosts, f"no host {host}"
        return f"{PREFIX}{os.getpid()}{host}"

    def command(self, host: str, args: Sequence[str]) -> list[str]:
        """``args`` as a command line that runs on ``host``; the process keeps the id that starting it gives."""
        return ["ip", "netns", "exec", self.namespace(host), *args]

    def pids(self, host: str) -> list[int]:
        """Processes that live on ``host``."""
        return [int(pid) for pid in run_ip("netns", "pids", self.namespace(host)).split()]

    def outbound_only(self, host: str) -> None:
        """Nobody can open a connection to ``host``; what it opens itself works. Raises LabError where no packet filter is installed."""
        _filter(self.namespace(host))

    def close(self) -> None:
        """Kill what still runs inside and remove every namespace; the links go with them. Safe to call twice."""
        for name in reversed(self._made):
            _remove(name)
        self._made.clear()

    def _namespace(self, name: str) -> None:
        self._made.append(name)
        run_ip("netns", "add", name)
        run_ip("-n", name, "link", "set", "lo", "up")


class KernelLab(Lab):
    """``with KernelLab(("org", "a", "b")) as lab``: each host has a /30 and one link into a router namespace, its only way out."""

    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__(hosts)
        self._router = f"{PREFIX}{os.getpid()}router"

    def address(self, host: str) -> str:
        return f"10.99.{self.hosts.index(host) + 1}.2"

    def block(self, one: str, other: str) -> None:
        self._rule("add", one, other)
        self._rule("add", other, one)

    def unblock(self, one: str, other: str) -> None:
        self._rule("del", one, other)
        self._rule("del", other, one)

    def masquerade(self, *hosts: str) -> None:
        """Address translation, as at home and at carriers: others see the router's address, and nobody can open a connection to these hosts."""
        tool = _filter_tool()
        for host in hosts:
            subnet, link = f"10.99.{self.hosts.index(host) + 1}.0/30", f"to-{host}"
            if tool == "nft":
                translate = "add chain ip nat out { type nat hook postrouting priority 100; }"
                drop = "add chain ip nat through { type filter hook forward priority 0; }"
                rules = f"add rule ip nat out ip saddr {subnet} masquerade; add rule ip nat through oifname {link} ct state new drop"
                _in(self._router, "nft", f"add table ip nat; {translate}; {drop}; {rules}")
            elif tool == "iptables":
                _in(self._router, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", subnet, "-j", "MASQUERADE")
                _in(self._router, "iptables", "-A", "FORWARD", "-o", link, "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP")
            else:
                raise LabError("a router that translates addresses needs 'nft' or 'iptables'")

    def set_link(self, host: str, *, is_up: bool) -> None:
        run_ip("-n", self._router, "link", "set", f"to-{host}", "up" if is_up else "down")

    def _build(self) -> None:
        self._namespace(self._router)
        _in(self._router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for number, host in enumerate(self.hosts, 1):
            name = self.namespace(host)
            self._namespace(name)
            run_ip("link", "add", "name", "net0", "netns", name, "type", "veth", "peer", "name", f"to-{host}", "netns", self._router)
            run_ip("-n", self._router, "addr", "add", f"10.99.{number}.1/30", "dev", f"to-{host}")
            run_ip("-n", self._router, "link", "set", f"to-{host}", "up")
            run_ip("-n", name, "addr", "add", f"10.99.{number}.2/30", "dev", "net0")
            run_ip("-n", name, "link", "set", "net0", "up")
            run_ip("-n", name, "route", "add", "default", "via", f"10.99.{number}.1")

    def _rule(self, verb: str, source: str, target: str) -> None:
        priority = str(_BLOCK_PRIORITY + self.hosts.index(source))
        subnet = f"10.99.{self.hosts.index(target) + 1}.0/30"
        run_ip("-n", self._router, "rule", verb, "priority", priority, "iif", f"to-{source}", "to", subnet, "blackhole")


def sweep() -> None:
    """Remove what labs of processes that no longer exist have left."""
    for name in left_over():
        found = re.match(rf"{PREFIX}(\d+)", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)


def left_over(pid: int | None = None) -> list[str]:
    """Namespaces of labs, or of one process's labs."""
    names = [path.name for path in NETNS_DIR.glob(f"{PREFIX}*")] if NETNS_DIR.is_dir() else []
    return sorted(name for name in names if pid is None or re.match(rf"{PREFIX}{pid}\D", name))


def _remove(name: str) -> None:
    with suppress(LabError, subprocess.TimeoutExpired):
        for pid in run_ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
    with suppress(LabError, subprocess.TimeoutExpired):
        run_ip("netns", "del", name)


def _filter_tool() -> str | None:
    return next((tool for tool in ("nft", "iptables") if shutil.which(tool)), None)


def _filter(name: str) -> None:
    """Answers and loopback may come in, nothing else."""
    tool = _filter_tool()
    if tool == "nft":
        rules = "ct state established,related accept; iif lo accept"
        _in(name, "nft", f"add table ip lab; add chain ip lab in {{ type filter hook input priority 0; policy drop; {rules}; }}")
    elif tool == "iptables":
        _in(name, "iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        _in(name, "iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
        _in(name, "iptables", "-P", "INPUT", "DROP")
    else:
        raise LabError("a host that only dials out needs 'nft' or 'iptables'")


def _in(name: str, *args: str) -> str:
    return _run("ip", "netns", "exec", name, *args)


def run_ip(*args: str) -> str:
    """``ip`` with ``args``. Raises LabError."""
    return _run("ip", *args)


def _run(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise LabError(f"{' '.join(args)}: {done.stderr.strip() or done.stdout.strip() or f'status {done.returncode}'}")
    return done.stdout
