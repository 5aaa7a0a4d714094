"""Checks that need this machine only: versions, arithmetic, disk, memory, files, ports, keys. Blocking; opens no connection.

Every check returns findings and raises nothing. torch, hivemind and grpc are imported inside, so that a broken installation is a finding too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from decentra.doctor.finding import Finding, Level, failure, gib
from decentra.errors import ConfigError, DecentraError, PortTaken

Version = tuple[int, ...]

# Tested ranges, as in pyproject.toml (a test compares them): at least, below.
RANGES: dict[str, tuple[Version, Version]] = {
    "torch": ((2, 10), (2, 14)),
    "hivemind": ((1, 1, 12), (1, 2)),
    "grpcio": ((1, 76), (2,)),
    "protobuf": ((6, 33, 5), (8,)),
}
PYTHON: tuple[Version, Version] = ((3, 11), (3, 15))

CGROUPS = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
LIBRARY_BYTES = 300 << 20  # resident once torch and hivemind are loaded
FEW_DISK_BYTES, GOOD_DISK_BYTES = 1 << 30, 8 << 30  # the default blob budget has 8 GiB
FEW_RAM_BYTES, GOOD_RAM_BYTES = 1 << 30, 2 << 30
SLOW_FSYNC_S = 0.1
NUM_FSYNCS, FSYNC_BYTES = 5, 64 << 10
FEW_OPEN_FILES, GOOD_OPEN_FILES = 1024, 4096


def check_versions() -> list[Finding]:
    """Python and the packages whose versions decide whether peers compute and speak alike."""
    found = [_in_range("python", sys.version_info[:3], PYTHON, "install Python 3.11 to 3.14, then make a new virtual environment")]
    for package, wanted in RANGES.items():
        fix = f"pip install '{package}>={_dotted(wanted[0])},<{_dotted(wanted[1])}'"
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, Level.FAIL, "not installed", fix))
            continue
        found.append(_in_range(package, _version(text), wanted, fix, text))
    return found


def _in_range(name: str, version: Version, wanted: tuple[Version, Version], fix: str, text: str = "") -> Finding:
    text = text or _dotted(version)
    if wanted[0] <= version and version[: len(wanted[1])] < wanted[1]:
        return Finding(name, Level.OK, text)
    return Finding(name, Level.FAIL, f"{text}, tested are {_dotted(wanted[0])} up to, not including, {_dotted(wanted[1])}", fix)


def _version(text: str) -> Version:
    """Leading numbers of a version, without what follows a letter or a plus."""
    head = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in head.group().split(".")) if head else (0,)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def check_arithmetic() -> list[Finding]:
    """The golden aggregation: a machine with other bits would be refused at its first round."""
    fix = "pip install 'torch>=2.10,<2.14', and unset fast-math or flush-to-zero settings"
    try:
        from decentra.delta.golden import check_golden

        start_s = time.perf_counter()
        check_golden()
    except (DecentraError, ImportError, OSError) as error:
        return [failure("arithmetic", error, fix)]
    return [Finding("arithmetic", Level.OK, f"golden aggregation is bit-equal ({time.perf_counter() - start_s:.1f} s)")]


def check_p2pd_file(path: Path | None = None) -> list[Finding]:
    """hivemind's p2p daemon is there, may be run, and is the file that was installed (sha256 of the package's own record)."""
    fix = "pip install --force-reinstall --no-deps 'hivemind>=1.1.12,<1.2'"
    if sys.platform != "linux":
        return [
            Finding("p2pd file", Level.FAIL, f"decentra runs on Linux, this is {sys.platform}", "on Windows use WSL2, on macOS a container")
        ]
    expected = _recorded_sha256()
    path = path or _p2pd_path()
    if path is None or not path.is_file():
        return [Finding("p2pd file", Level.FAIL, "hivemind's p2pd is not installed", fix)]
    if not os.access(path, os.X_OK):
        return [Finding("p2pd file", Level.FAIL, f"{path} may not be executed", f"chmod +x {path}")]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is None:
        return [Finding("p2pd file", Level.WARN, f"sha256 {digest[:12]}; the installation keeps no record to compare it with", fix)]
    if digest != expected:
        return [Finding("p2pd file", Level.FAIL, f"{path} has sha256 {digest[:12]}, installed was {expected[:12]}", fix)]
    return [Finding("p2pd file", Level.OK, f"sha256 {digest[:12]} as installed, {platform.machine()}")]


def _p2pd_path() -> Path | None:
    found = importlib.util.find_spec("hivemind")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "hivemind_cli" / "p2pd"


def _recorded_sha256() -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("hivemind") or ():
            if file.name == "p2pd" and file.hash is not None and file.hash.mode == "sha256":
                return base64.urlsafe_b64decode(file.hash.value + "=").hex()
    return None


def existing_part(path: Path) -> Path:
    """The nearest folder on the way to ``path`` that exists: same disk, and nothing is made just to look."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def check_disk(state_dir: Path) -> list[Finding]:
    """Free space and the time of one durable write where this peer keeps its state."""
    where = existing_part(state_dir)
    try:
        free_bytes = shutil.disk_usage(where).free
        fsync_s = _fsync_s(where)
    except OSError as error:
        what = f"cannot write in {where}: {error.strerror}"
        return [Finding("disk", Level.FAIL, what, "give a folder of your own with --dir, on a disk that has space")]
    found = [
        _enough("disk", free_bytes, FEW_DISK_BYTES, GOOD_DISK_BYTES, f"free at {where}", "free some space, or use another disk with --dir")
    ]
    text = f"{1000 * fsync_s:.1f} ms for {FSYNC_BYTES >> 10} KiB at {where}"
    if fsync_s > SLOW_FSYNC_S:
        return [*found, Finding("fsync", Level.WARN, f"{text}: every round waits for it", "put the state on a local disk with --dir")]
    return [*found, Finding("fsync", Level.OK, text)]


def _fsync_s(where: Path) -> float:
    """Median seconds of write and fsync. Raises OSError."""
    times_s = []
    with tempfile.TemporaryFile(dir=where) as file:
        for _ in range(NUM_FSYNCS):
            start_s = time.perf_counter()
            file.write(b"\0" * FSYNC_BYTES)
            file.flush()
            os.fsync(file.fileno())
            times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def _enough(check: str, num_bytes: int, few: int, good: int, what: str, fix: str) -> Finding:
    if num_bytes < few:
        return Finding(check, Level.FAIL, f"{gib(num_bytes)} {what}, at least {gib(few)} are needed", fix)
    if num_bytes < good:
        return Finding(check, Level.WARN, f"{gib(num_bytes)} {what}, {gib(good)} are comfortable", fix)
    return Finding(check, Level.OK, f"{gib(num_bytes)} {what}")


def free_memory_bytes(groups: Path = GROUPS, cgroups: Path = CGROUPS) -> int:
    """What this process may still take, its own memory included: the machine's, its control group's and its own limits."""
    own = psutil.Process().memory_info()
    found = [psutil.virtual_memory().available + own.rss]
    found += [left + own.rss for _, left in _in_groups(groups, cgroups)]
    return max(0, min([*found, *_own_limits(own)]))


def total_memory_bytes(groups: Path = GROUPS, cgroups: Path = CGROUPS) -> int:
    """What this process could have if nobody else used any."""
    found = [psutil.virtual_memory().total, *(limit for limit, _ in _in_groups(groups, cgroups))]
    return max(0, min([*found, *_own_limits(psutil.Process().memory_info())]))


def check_room_for_libraries(total_bytes: int | None = None) -> None:
    """Raise ConfigError where this process can never have what torch and hivemind alone take."""
    total_bytes = total_memory_bytes() if total_bytes is None else total_bytes
    if total_bytes < LIBRARY_BYTES:
        raise ConfigError(
            f"this process may have {total_bytes / 2**20:.0f} MiB of memory (the machine's, its control group's or its own limit), and the libraries alone take"
            f" {LIBRARY_BYTES / 2**20:.0f} MiB: give it more, for instance with 'docker run --memory' or MemoryMax in its systemd unit"
        )


def _own_limits(own: Any) -> list[int]:
    """Of this process alone: RLIMIT_DATA, and RLIMIT_AS less what is only reserved."""
    import resource

    data, space = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    infinite = resource.RLIM_INFINITY
    return ([data] if data != infinite else []) + ([space - own.vms + own.rss] if space != infinite else [])


def _reclaimable(folder: Path) -> int:
    """File pages that a control group counts as used and gives up when asked."""
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def _in_groups(groups: Path, cgroups: Path) -> list[tuple[int, int]]:
    """(limit, bytes left) of each control group above this process, versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.strip("/")
        for folder in (here, *here.parents):
            with suppress(OSError, ValueError):  # "max", or a level that has no files here
                limit, used = (int((folder / name).read_text()) for name in names)
                found.append((limit, limit - used + _reclaimable(folder)))
            if folder == root:
                break
    return found


def check_memory(need_bytes: int | None = None, good_bytes: int = 0) -> list[Finding]:
    """Free memory; with ``need_bytes`` against a run: with one expert, and (``good_bytes``) with as many as its manifest gives a peer."""
    free_bytes = free_memory_bytes()
    if need_bytes is None:
        fix = "close other programs, or join a run with a smaller model"
        return [_enough("memory", free_bytes, FEW_RAM_BYTES, GOOD_RAM_BYTES, "available", fix)]
    fix = "close other programs; a peer holds as many experts as fit, and needs room for one"
    return [_enough("memory for this run", free_bytes, need_bytes, good_bytes, "available", fix)]


def check_open_files() -> list[Finding]:
    """The hard limit of open files: every blob stream is a socket here and one in p2pd, and the soft limit is raised at start."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "ulimit -Hn 32768 as root, or LimitNOFILE=32768 in the systemd unit"
    if hard == resource.RLIM_INFINITY or hard >= GOOD_OPEN_FILES:
        return [Finding("open files", Level.OK, "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")]
    level = Level.FAIL if hard < FEW_OPEN_FILES else Level.WARN
    return [Finding("open files", level, f"up to {hard}, {GOOD_OPEN_FILES} are comfortable", fix)]


def check_ports(ports: Sequence[int], host: str = "0.0.0.0") -> list[Finding]:
    """The ports an organiser's host listens on are free. A joiner takes any free port and needs none of them."""
    from decentra.gossip.address import claim_ports

    found = []
    for port in ports:
        try:
            claim_ports((f"/ip4/{host}/tcp/{port}",))
        except PortTaken:
            fix = "nothing if that is your own 'decentra host'; otherwise end it, or host with --bootstrap-port and --service-port"
            found.append(Finding(f"port {port}", Level.FAIL, f"in use by {_owner(port)}", fix))
        except DecentraError as error:
            found.append(failure(f"port {port}", error, "host on another port with --bootstrap-port and --service-port"))
        else:
            found.append(Finding(f"port {port}", Level.OK, "free"))
    return found


def _owner(port: int) -> str:
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            at = connection.laddr
            if at and at.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another process"


def check_keys(state_dir: Path) -> list[Finding]:
    """Key files can be read by their owner only, and are keys."""
    from decentra.identity import load_key

    files = sorted(p for pattern in ("*.key", "tls.pem") for p in state_dir.expanduser().glob(pattern) if p.is_file())
    if not files:
        return [Finding("key file", Level.OK, f"none in {state_dir} yet; made at the first start")]
    found = []
    for path in files:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            found.append(
                Finding("key file", Level.FAIL, f"{path} has mode {mode:04o}: others on this machine can use it", f"chmod 600 {path}")
            )
            continue
        try:
            who = f", {load_key(path).peer_id}" if path.suffix == ".key" else ""
        except DecentraError as error:
            found.append(failure("key file", error, "restore it from your backup; a new key is a new identity"))
            continue
        found.append(Finding("key file", Level.OK, f"{path} has mode {mode:04o}{who}"))
    return found
