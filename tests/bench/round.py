"""How long a round takes: decentra's through its real commands, next to hivemind's averager (fp16) and torchft's DiLoCo (fp32, gloo), in one run.

    python -m tests.bench.round --json [--peers 4] [--params 10] [--rate-mbit 50 --rtt-ms 50]

decentra_s   median time between two heights that all fragments have confirmed, one tiny inner step included; a keeper and the service run beside the peers
hivemind_s   median of ``DecentralizedAverager.step`` over the members, group found anew each round as it does
torchft_s    median of one sync of ``torchft.DiLoCo`` with ``sync_every=1``
star_s       the same of the barest star: whole fp32 weights over sockets to one server and back, as SPES does with its server
cpu_s        CPU seconds of all processes per round
phases_ms    median and 95th percentile of the parts of a fragment's round, see tests.bench.control
load_before  how many processes wanted a core in the minute before

Without a rate everything is on loopback. With one, every member is a host of its own in network namespaces and has an access line of that rate in each
direction; a thread of this process carries the packets (9000 bytes each, so that it can).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from decentra.cli.create import create
from decentra.cli.running import die_with_parent
from decentra.config import Manifest
from decentra.model.custom import model_code_digest
from tests.bench.deltas import SHAPE, bench_manifest, layout_of
from tests.bench.measure import arguments, load, machine, show
from tests.bench.padded import model_code
from tests.bench.story import ROUND_EVENTS, Log, in_ms, phases

sys.path.insert(0, str(Path(__file__).parents[1] / "netlab"))
import itertools

from wan import Link, WanLab

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TORCHFT_PYTHON = ROOT / ".venv-torchft" / "bin" / "python"
NUM_ROUNDS, NUM_WARMUP = 7, 2
MIN_ROUNDS = 10  # of a measurement that is cut short
LIGHTHOUSE_PORT = 29510
DEADLINE_S, RIVAL_S = 900.0, 400.0
MODELS = {10: {}, 50: {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, "expert_hidden_size": 384}}


class Place:
    """Where members run: on loopback, or each on a host of a lab."""

    def __init__(self, lab: WanLab | None, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.processes: list[subprocess.Popen[str]] = []

    def address(self, host: str) -> str:
        return "127.0.0.1" if self.lab is None else self.lab.address(host)

    def start(self, host: str, args: Sequence[str], name: str, out: str | None = None) -> subprocess.Popen[str]:
        """Its stderr is ``name.log``; its stdout is a pipe, or the file ``out``."""
        line = list(args) if self.lab is None else self.lab.command(host, args)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "XDG_STATE_HOME": str(self.folder / "state"),
            "PYTHONPATH": str(ROOT),
        }
        with open(self.folder / f"{name}.log", "w") as log, open(os.devnull if out is None else self.folder / out, "w") as kept:
            process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if out is None else kept,
                stderr=log,
                text=True,
                env=env,
                cwd=ROOT,
                preexec_fn=die_with_parent,
            )
        self.processes.append(process)
        return process

    def cpu_s(self) -> float:
        """CPU seconds of everything started here, children included."""
        total = 0.0
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in (root := psutil.Process(process.pid), *root.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        times = one.cpu_times()
                        total += times.user + times.system
        return total

    def check(self) -> None:
        """Raise SystemExit when something started here has ended."""
        for process in self.processes:
            if process.poll() is not None:
                raise SystemExit(f"a member ended with {process.returncode}; last words in {self.folder}")

    def close(self) -> None:
        """End everything, also what members have forked: hivemind's DHT process and its daemon outlive a member that is ended."""
        children: list[psutil.Process] = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _, alive = psutil.wait_procs(children, timeout=4)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def place(args: argparse.Namespace) -> Iterator[Place]:
    hosts = ("org", *(f"p{i}" for i in range(args.peers)))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decentra-bench-")))
        lab = None
        if args.rate_mbit:
            link = Link(delay_s=args.rtt_ms / 2000)
            lab = stack.enter_context(WanLab(hosts, link, access_bytes_per_s=args.rate_mbit * 1e6 / 8, mtu_bytes=9000))
        found = Place(lab, folder)
        stack.callback(found.close)
        yield found


# ---------------------------------------------------------------- the three


def start_swarm(here: Place, settings: Sequence[str], num_peers: int, model_code: Path | None = None) -> tuple[Manifest, str]:
    """``host`` and ``num_peers`` times ``join``, each at its place, with their whole log in the folder. Returns the manifest and the invite."""
    own = [] if model_code is None else ["--model-code", str(model_code)]
    settings = [*settings, *([] if model_code is None else [f'model.code="{model_code_digest(model_code)}"'])]
    run, manifest = create(here.folder / "run", None, settings, model_code)
    where = ["--address", here.address("org"), "--bootstrap-port", "7410", "--service-port", "7411"]
    if here.lab is None:
        where = ["--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", "0", "--service-port", "0"]
    cli = [sys.executable, "-m", "decentra.cli.main"]
    host = here.start("org", [*cli, "host", str(run.root), *where, "--json", "--log-json", "--verbose", *own], "host")
    invite = str(_line(host)["invite"])
    for index in range(num_peers):
        listen = ["--listen", f"/ip4/{here.address(f'p{index}')}/tcp/0"]
        join = ["join", invite, "--name", f"p{index}", "--dir", str(here.folder / f"p{index}"), "--log-json", "--verbose", *listen]
        here.start(f"p{index}", [*cli, *join, *own], f"p{index}")
    return manifest, invite


def measure_decentra(
    args: argparse.Namespace,
    shape: dict[str, Any] | None = None,
    num_rounds: int = NUM_ROUNDS,
    *,
    is_one_module: bool = False,
    patience_s: float = DEADLINE_S,
) -> dict[str, Any]:
    """Real ``host`` and ``join`` processes; the model's inner step is made as small as it gets.

    After ``patience_s`` the rounds so far have to do, if there are a few.
    """
    shape = SHAPE | MODELS[args.params] if shape is None else shape
    settings = [f"model.{key}={value}" for key, value in shape.items()]
    settings += [
        "name=bench", "data.seq_len=8", "train.batch_size=1", "data.bytes_per_domain=60000", "data.held_out_bytes=2048", "rounds.inner_steps=1",
        "rounds.overlap=false",
        f"placement.experts_per_peer={shape['num_experts']}", f"codec.name={args.codec}", f"codec.sparsest={args.sparsest}",
        "rounds.cut_off_s=300", "rounds.grace_s=300", "rounds.attest_s=300", "rounds.gather_s=120",
    ]  # fmt: skip
    with place(args) as here:
        code = model_code(here.folder / "model.py", is_one_module=True) if is_one_module else None
        manifest, _ = start_swarm(here, settings, args.peers, code)
        found = _heights(here, len(manifest.genesis), args.peers, num_rounds, patience_s)
    return {
        "decentra_s": statistics.median(found["durations_s"]), "decentra_durations_s": found["durations_s"], "decentra_cpu_s": found["cpu_s"],
        "codecs": found["codecs"] or [args.codec], "bytes_per_peer": found["bytes_per_peer"], "phases_s": found["phases_s"],
    }  # fmt: skip


def _heights(here: Place, num_fragments: int, num_peers: int, num_rounds: int, patience_s: float) -> dict[str, Any]:
    """Times between heights that all fragments reached, once all peers take part, and CPU seconds of everything per round."""
    deadline = time.monotonic() + patience_s
    host = Log(here.folder / "host.log", *ROUND_EVENTS)
    members = [Log(here.folder / f"p{i}.log", "training", "codec", *ROUND_EVENTS) for i in range(num_peers)]
    at_first: tuple[int, float] | None = None
    while True:
        for log in (host, *members):
            log.read()
        joined = [e["at_s"] for member in members for e in member.named("training")]
        reached: dict[int, list[float]] = {}
        for event in host.named("round-confirmed"):
            reached.setdefault(event["height"], []).append(event["at_s"])
        done = sorted(max(times) for times in reached.values() if len(times) == num_fragments)
        counted = [t for t in done if t > max(joined)][NUM_WARMUP:] if len(joined) == num_peers else []
        if counted and at_first is None:
            at_first = len(counted), here.cpu_s()
        is_late = time.monotonic() > deadline
        if at_first is not None and (len(counted) > num_rounds or (is_late and len(counted) > min(num_rounds, MIN_ROUNDS))):
            cpu_s = (here.cpu_s() - at_first[1]) / max(1, len(counted) - at_first[0])
            packets = [e["num_bytes"] for member in members for e in member.named("encoded")[-num_fragments:]]
            return {
                "durations_s": [b - a for a, b in itertools.pairwise(counted)], "cpu_s": cpu_s, "bytes_per_peer": sum(packets) / num_peers,
                "codecs": sorted({e["codec"] for member in members for e in member.named("codec")}),
                "phases_s": phases((e for log in (host, *members) for e in log.events), since_s=counted[0]),
            }  # fmt: skip
        here.check()
        if is_late:
            raise SystemExit(f"{len(done)} rounds in {patience_s:g} s")
        time.sleep(0.5)


def measure_hivemind(args: argparse.Namespace, num_params: int, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    with place(args) as here:
        members, first = [], ""
        for index in range(args.peers):
            line = [sys.executable, str(HERE / "rival_hivemind.py"), str(num_params), str(args.peers), str(num_rounds + 1), str(index)]
            members.append(here.start(f"p{index}", [*line, here.address(f"p{index}"), *([first] if first else [])], f"hivemind-{index}"))
            maddr = _line(members[-1])["maddr"]
            first = first or maddr
        return {"hivemind_s": None} | _rival(here, "hivemind", members, num_rounds, begin=lambda p: _say(p, "go\n"))


def measure_torchft(args: argparse.Namespace, num_params: int, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    if not TORCHFT_PYTHON.exists():
        return {"torchft_s": None, "torchft_why": f"{TORCHFT_PYTHON.parent.parent.name} is missing; 'make bench' makes it"}
    with place(args) as here:
        lighthouse = TORCHFT_PYTHON.with_name("torchft_lighthouse")
        bind = [f"--bind=[::]:{LIGHTHOUSE_PORT}", f"--min_replicas={args.peers}", "--quorum_tick_ms=50", "--join_timeout_ms=20000"]
        here.start("org", [str(lighthouse), *bind], "lighthouse")
        time.sleep(2.0)
        members = []
        for index in range(args.peers):
            line = [str(TORCHFT_PYTHON), str(HERE / "rival_torchft.py"), str(num_params), str(args.peers), str(num_rounds + 1), str(index)]
            address = here.address(f"p{index}")
            members.append(here.start(f"p{index}", [*line, f"http://{here.address('org')}:{LIGHTHOUSE_PORT}", address], f"torchft-{index}"))
        return {"torchft_s": None} | _rival(here, "torchft", members, num_rounds)


def measure_star(args: argparse.Namespace, num_params: int, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    with place(args) as here:
        line = [sys.executable, str(HERE / "rival_star.py")]
        what = [str(num_params), str(args.peers), str(num_rounds + 1), here.address("org")]
        port = _line(here.start("org", [*line, "server", *what], "star"))["port"]
        members = [here.start(f"p{i}", [*line, "peer", *what, str(port)], f"star-{i}") for i in range(args.peers)]
        return {"star_s": None} | _rival(here, "star", members, num_rounds)


def _rival(
    here: Place,
    name: str,
    members: list[subprocess.Popen[str]],
    num_rounds: int,
    begin: Callable[[subprocess.Popen[str]], None] = lambda _: None,
) -> dict[str, Any]:
    """Median over members and rounds; the first round connects and does not count. Failed rounds are counted apart."""
    cpu_s = here.cpu_s()
    for member in members:
        begin(member)
    watchdog = threading.Timer(RIVAL_S, lambda: [member.terminate() for member in members])
    watchdog.daemon = True
    watchdog.start()
    try:
        found = [_line(member) for member in members]
    except SystemExit as error:
        return {f"{name}_s": None, f"{name}_why": f"not done after {RIVAL_S:g} s, or broken off: {str(error)[-80:]}"}
    finally:
        watchdog.cancel()
    cpu_s = here.cpu_s() - cpu_s
    rounds = [d for member in found for d in member["durations_s"][1:]]
    good = [d for d in rounds if d is not None]
    return {
        f"{name}_s": statistics.median(good) if good else None, f"{name}_failed": len(rounds) - len(good),
        f"{name}_cpu_s": cpu_s / (num_rounds + 1),
    }  # fmt: skip


def _say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON line a process says. Raises SystemExit when it ends without one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    raise SystemExit(f"{process.args} ended with {process.wait()} and said nothing")


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--peers", type=int, default=4)
        parser.add_argument("--params", type=int, choices=sorted(MODELS), default=10, help="millions")
        parser.add_argument("--rate-mbit", type=float, default=0.0)
        parser.add_argument("--rtt-ms", type=float, default=0.0)
        parser.add_argument("--codec", default="int8", help="the densest allowed")
        parser.add_argument("--sparsest", default="topk16")
        parser.add_argument("--only", default="decentra,hivemind,torchft,star")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    num_params = layout_of(bench_manifest(**MODELS[args.params])).num_elements
    result: dict[str, Any] = {
        "num_peers": args.peers, "num_params": num_params, "rate_mbit": args.rate_mbit, "rtt_ms": args.rtt_ms, "machine": machine(),
    }  # fmt: skip
    for name, call in (
        ("decentra", lambda: measure_decentra(args)),
        ("hivemind", lambda: measure_hivemind(args, num_params)),
        ("torchft", lambda: measure_torchft(args, num_params)),
        ("star", lambda: measure_star(args, num_params)),
    ):
        if name in args.only.split(","):
            print(f"{name} ...", file=sys.stderr, flush=True)
            found = {f"{name}_load_before": load()} | call()
            print(json.dumps({key: value for key, value in found.items() if key != "phases_s"}), file=sys.stderr, flush=True)
            result |= found
    if "phases_s" in result:
        result["phases_ms"] = in_ms(result.pop("phases_s"))
    show(result, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
