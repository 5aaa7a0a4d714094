"""The doctor's local checks against real faults: a taken port, a key others can read, a tampered daemon, a folder that refuses writes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.doctor import machine
from decentra.doctor.finding import Finding, Level, as_json, exit_code
from decentra.doctor.network import MAX_CLOCK_SKEW_S, check_clock
from decentra.errors import ExitCode
from decentra.identity import Keypair, save_key

torch.set_num_threads(1)

ROOT = Path(__file__).parents[3]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_taken_port_is_named_with_its_owner_and_a_free_one_is_fine() -> None:
    with socket.socket() as taken, socket.socket() as other:
        for one in (taken, other):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        bad, good = machine.check_ports((port, free), "127.0.0.1")
    assert bad.level is Level.FAIL
    assert bad.check == f"port {port}"
    assert str(os.getpid()) in bad.found
    assert "--bootstrap-port" in bad.fix
    assert good == Finding(f"port {free}", Level.OK, "free")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_key_that_others_can_read_is_found_and_the_fix_fixes_it(mode: int, tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    save_key(key, Keypair.generate())
    assert only(machine.check_keys(tmp_path)).level is Level.OK
    key.chmod(mode)
    finding = only(machine.check_keys(tmp_path))
    assert finding.level is Level.FAIL
    assert f"{mode:04o}" in finding.found
    assert finding.fix == f"chmod 600 {key}"
    subprocess.run(finding.fix.split(), check=True)
    assert only(machine.check_keys(tmp_path)).level is Level.OK


def test_damaged_key_is_found(tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    save_key(key, Keypair.generate())
    key.write_bytes(key.read_bytes()[:40])
    finding = only(machine.check_keys(tmp_path))
    assert finding.level is Level.FAIL
    assert "backup" in finding.fix


def test_a_state_directory_to_come_is_no_fault_and_is_not_made(tmp_path: Path) -> None:
    state = tmp_path / "a" / "b"
    assert only(machine.check_keys(state)).level is Level.OK
    assert [f.level for f in machine.check_disk(state)] == [Level.OK, Level.OK]
    assert list(tmp_path.iterdir()) == []


def test_disk_that_takes_no_file_fails() -> None:
    finding = only(machine.check_disk(Path("/proc/self/nothing")))
    assert finding.level is Level.FAIL
    assert "--dir" in finding.fix


def test_tampered_missing_and_unexecutable_daemon(tmp_path: Path) -> None:
    installed = machine._p2pd_path()
    assert installed is not None
    assert only(machine.check_p2pd_file()).level is Level.OK
    copy = tmp_path / "p2pd"
    shutil.copy(installed, copy)
    assert only(machine.check_p2pd_file(copy)).level is Level.OK
    with open(copy, "r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    changed = only(machine.check_p2pd_file(copy))
    assert changed.level is Level.FAIL
    assert "sha256" in changed.found
    copy.chmod(0o600)
    assert only(machine.check_p2pd_file(copy)).fix == f"chmod +x {copy}"
    copy.unlink()
    missing = only(machine.check_p2pd_file(copy))
    assert missing.level is Level.FAIL
    assert "hivemind" in missing.fix


def test_arithmetic_of_this_machine_is_the_agreed_one() -> None:
    assert only(machine.check_arithmetic()).level is Level.OK


def test_versions_here_are_inside_the_ranges_of_pyproject() -> None:
    findings = {f.check: f for f in machine.check_versions()}
    assert {f.level for f in findings.values()} == {Level.OK}
    assert findings["torch"].found == importlib.metadata.version("torch")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {re.match(r"[a-z]+", line).group(): line for line in project["dependencies"]}  # type: ignore[union-attr]
    for package, (least, below) in machine.RANGES.items():
        assert f">={machine._dotted(least)},<{machine._dotted(below)}" in stated[package]
    assert project["requires-python"] == f">={machine._dotted(machine.PYTHON[0])},<{machine._dotted(machine.PYTHON[1])}"


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("2.10.0", True),
        ("2.13.1+cpu", True),
        ("2.9.9", False),
        ("2.14.0", False),
        ("2.14.0.dev1", False),
        ("3.0", False),
        ("nonsense", False),
    ],
)
def test_version_ranges(text: str, is_fine: bool) -> None:
    finding = machine._in_range("torch", machine._version(text), machine.RANGES["torch"], "pip install it", text)
    assert (finding.level is Level.OK) is is_fine
    assert bool(finding.fix) is not is_fine


def test_memory_is_judged_by_the_model() -> None:
    assert only(machine.check_memory(1_000_000, 2_000_000)).level is Level.OK
    assert only(machine.check_memory(1_000_000, 10**15)).level is Level.WARN, "enough for one expert, not for the usual number"
    huge = only(machine.check_memory(10**15, 10**15))
    assert huge.level is Level.FAIL
    assert "at least" in huge.found


def test_open_file_limit_of_a_shell_that_set_it_low() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from decentra.doctor.machine import check_open_files; print(*[f.level for f in check_open_files()])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert out.stdout.split() == ["fail"]


@given(st.floats(-1e6, 1e6))
def test_clock_is_fine_exactly_within_the_tolerance_of_the_dht(offset_s: float) -> None:
    assert (check_clock(offset_s).level is Level.OK) is (abs(offset_s) <= MAX_CLOCK_SKEW_S)


findings_of = st.lists(st.builds(Finding, st.just("c"), st.sampled_from(Level), st.just("f"), st.just("x")), max_size=6)


@given(findings_of)
def test_exit_code_says_the_worst(findings: list[Finding]) -> None:
    levels = {f.level for f in findings}
    expected = ExitCode.UNREACHABLE if Level.UNREACHABLE in levels else ExitCode.FAILED if Level.FAIL in levels else ExitCode.OK
    assert exit_code(findings) is expected
    report = as_json(findings)
    assert report["ok"] is (expected is ExitCode.OK)
    assert len(report["checks"]) == len(findings)


def test_doctor_starts_without_torch_hivemind_and_grpc() -> None:
    """It has to be able to say that they are missing."""
    code = "import sys, decentra.cli.doctor, decentra.doctor.examine; print(sorted({'torch', 'hivemind', 'grpc'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert out.stdout.strip() == "[]"
