"""The laboratory itself: who reaches whom, and that nothing is left. A lab that lies would make every other test here worthless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import KernelLab, Lab, left_over, sweep, why_impossible
from wan import Link, WanLab, why_no_wan

WHY_NOT = why_impossible(needs_filter=True)
NO_WAN = why_no_wan()
pytestmark = [pytest.mark.netlab, pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}")]

LISTEN = (
    "import socket; s = socket.create_server(('0.0.0.0', 9000)); print('ready', flush=True)\nwhile True: s.accept()[0].sendall(b'hello')"
)
DIAL = "import socket, sys; s = socket.create_connection((sys.argv[1], 9000), 1.0); print(s.recv(5).decode())"


def dial(lab: Lab, source: str, target: str) -> bool:
    """Whether ``source`` can open a TCP connection to ``target``, where ``listening`` listens."""
    done = subprocess.run(
        lab.command(source, [sys.executable, "-c", DIAL, lab.address(target)]), capture_output=True, text=True, timeout=20
    )
    return done.returncode == 0 and done.stdout.strip() == "hello"


def listening(lab: Lab, host: str, program: str = LISTEN) -> subprocess.Popen[str]:
    child = subprocess.Popen(lab.command(host, [sys.executable, "-c", program]), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    child.stdout.close()
    return child


@pytest.mark.parametrize(
    "kind", [KernelLab, pytest.param(WanLab, marks=pytest.mark.skipif(NO_WAN is not None, reason=f"no WAN: {NO_WAN}"))]
)
def test_policies_hold_and_lift(kind: type[KernelLab] | type[WanLab]) -> None:
    with kind(("org", "a", "b")) as lab:
        children = [listening(lab, host) for host in lab.hosts]
        try:
            assert dial(lab, "a", "b")
            assert dial(lab, "a", "org")
            assert dial(lab, "org", "a")
            lab.block("a", "b")
            assert not dial(lab, "a", "b")
            assert not dial(lab, "b", "a")
            assert dial(lab, "a", "org")
            lab.unblock("a", "b")
            assert dial(lab, "b", "a")
            lab.outbound_only("a")
            assert not dial(lab, "org", "a")
            assert not dial(lab, "b", "a")
            assert dial(lab, "a", "org")
            lab.set_link("b", is_up=False)
            assert not dial(lab, "org", "b")
            assert not dial(lab, "b", "org")
            lab.set_link("b", is_up=True)
            assert dial(lab, "org", "b")
            assert dial(lab, "b", "org")
        finally:
            for child in children:
                child.kill()
                child.wait()
    assert left_over(os.getpid()) == []


WHO = (
    "import socket; s = socket.create_server(('0.0.0.0', 9000)); print('ready', flush=True)\n"
    "while True:\n c, address = s.accept(); c.sendall(address[0].encode()); c.close()"
)
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 9000), 1.0).recv(99).decode())"


def test_a_translating_router_hides_who_is_behind_it() -> None:
    with KernelLab(("org", "a", "b")) as lab:
        lab.masquerade("a", "b")
        children = [listening(lab, host, WHO) for host in lab.hosts]
        try:
            for home in ("a", "b"):
                args = lab.command(home, [sys.executable, "-c", ASK, lab.address("org")])
                seen = subprocess.run(args, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
                assert seen not in {lab.address(host) for host in lab.hosts}
                assert not dial(lab, "org", home)
            assert not dial(lab, "a", "b")
        finally:
            for child in children:
                child.kill()
                child.wait()


def test_close_ends_what_runs_inside() -> None:
    with KernelLab(("a",)) as lab:
        child = listening(lab, "a")
        assert lab.pids("a") == [child.pid]
    assert child.wait(timeout=5) == -signal.SIGKILL
    assert left_over(os.getpid()) == []


HOLD = "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom lab import KernelLab\nwith KernelLab(('a', 'b')):\n print('up', flush=True)\n time.sleep(60)"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_lab(how: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline().strip() == "up"
        assert len(left_over(holder.pid)) == 3
        holder.send_signal(how)
        holder.wait(timeout=30)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    if how is signal.SIGKILL:
        assert len(left_over(holder.pid)) == 3
        sweep()
    deadline = time.monotonic() + 5
    while left_over(holder.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over(holder.pid) == []


PULL = (
    "import socket, sys, time; t = time.monotonic(); s = socket.create_connection((sys.argv[1], 9000), 10.0); connected = time.monotonic() - t\n"
    "n = 0\nwhile chunk := s.recv(65536): n += len(chunk)\nprint(connected, n, time.monotonic() - t)"
)
PUSH = (
    "import socket; s = socket.create_server(('0.0.0.0', 9000)); print('ready', flush=True)\n"
    "while True:\n c = s.accept()[0]; c.sendall(b'x' * 150000); c.close()"
)


@pytest.mark.skipif(NO_WAN is not None, reason=f"no WAN: {NO_WAN}")
def test_links_are_as_slow_and_as_bad_as_asked_for() -> None:
    def pull() -> tuple[float, int, float]:
        args = lab.command("b", [sys.executable, "-c", PULL, lab.address("a")])
        connected_s, num_bytes, took_s = subprocess.run(args, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        return float(connected_s), int(num_bytes), float(took_s)

    with WanLab(("a", "b"), Link(delay_s=0.1), seed=7) as lab:
        child = listening(lab, "a", PUSH)
        try:
            connected_s, num_bytes, _ = pull()
            assert connected_s >= 0.2
            assert num_bytes == 150_000
            lab.shape("a", "b", delay_s=0.005, rate_bytes_per_s=100_000)
            assert pull()[2] >= 1.4
            lab.shape("a", "b", rate_bytes_per_s=0, loss=0.05, jitter_s=0.004)
            assert pull()[1] == 150_000
            assert lab.traffic["a", "b"].num_lost > 0
            assert lab.traffic["a", "b"].carried_bytes >= 450_000
            lab.partition(("a",), ("b",))
            num_cut = lab.traffic["b", "a"].num_cut
            assert not dial(lab, "b", "a")
            assert lab.traffic["b", "a"].num_cut > num_cut
            lab.heal()
            assert pull()[1] == 150_000
        finally:
            child.kill()
            child.wait()
    assert left_over(os.getpid()) == []
