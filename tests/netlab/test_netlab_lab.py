"""The laboratory itself: who reaches whom, and that nothing is left. A lab that lies would make every other test here worthless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import KernelLab, left_over, sweep, why_impossible

WHY_NOT = why_impossible(needs_filter=True)
pytestmark = [pytest.mark.netlab, pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}")]

LISTEN = (
    "import socket; s = socket.create_server(('0.0.0.0', 9000)); print('ready', flush=True)\nwhile True: s.accept()[0].sendall(b'hello')"
)
DIAL = "import socket, sys; s = socket.create_connection((sys.argv[1], 9000), 1.0); print(s.recv(5).decode())"


def dial(lab: KernelLab, source: str, target: str) -> bool:
    """Whether ``source`` can open a TCP connection to ``target``, where ``listening`` listens."""
    done = subprocess.run(
        lab.command(source, [sys.executable, "-c", DIAL, lab.address(target)]), capture_output=True, text=True, timeout=20
    )
    return done.returncode == 0 and done.stdout.strip() == "hello"


def listening(lab: KernelLab, host: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(lab.command(host, [sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    child.stdout.close()
    return child


def test_policies_hold_and_lift() -> None:
    with KernelLab(("org", "a", "b")) as lab:
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
