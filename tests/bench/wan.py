"""How much of their time trainers train when the lines between them are slow: real ``host`` and ``join`` processes, each a host of its own in a lab.

    python -m tests.bench.wan --json [--rate-mbit 50] [--rtt-ms 50] [--peers 4] [--seconds 180] [--stretch 1] [--no-overlap] [--rivals torchft]

The published case next to it: diloco-measured (github.com/Adnan082/diloco-measured), 30.8 M parameters, 4 machines, dense fp32, H = 128 steps of
26.3 ms: 11.6 % of the time is compute at 50 Mbit/s. So the fp32 values of its model need 5.9 times as long over such a line as its H steps. Ours has
another size and the same ratio: H steps last (32 bits per parameter) / (50 Mbit/s) / 5.9, whatever ``--rate-mbit`` says, and each inner step
sleeps for what the model's arithmetic leaves of it, because here one machine's cores are shared by all.

utilisation           share of the peers' time in which the trainer is inside an inner step, mean over peers; the time begins when all have joined, on
                      fast lines, and every fragment has confirmed a round on the slow ones
pace                  inner steps done, times what a step takes alone in this process, over the same time: also counts what steps lose to the others'
                      work on the same cores
steps_per_round       inner steps between two confirmed rounds of a fragment; H where rounds keep up. Trainers do not wait for rounds, so utilisation
                      alone would not show a round that takes long
rounds_of_one         rounds that opened with a single trainer, because nobody else was on the newest anchor in time
offers_per_round      packets in a settled round, of ``--peers``: who is late at the cut-off is not waited for
evictions             times the service took a peer whose process lives for gone
dense_utilisation     1 / (1 + dense time over H steps' time): a synchronous dense exchange at the line's full rate
torchft_utilisation   the same with a measured sync of ``torchft.DiLoCo`` (fp32) in the same lab, hivemind's with its averager (fp16)

``--stretch S``: lines S times slower and steps S times longer. All ratios stay; a machine with few cores then has S times as long for a round's arithmetic,
as it would have if it carried one peer instead of five processes. The time that a round waits for members to be ready is stretched as well.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decentra.config import Manifest, PeerConfig, parse_config
from decentra.data.windows import source_for
from decentra.identity import Keypair
from decentra.model.decoder import build_model
from decentra.peer.inner import InnerLoop
from tests.bench.deltas import SHAPE, bench_manifest, layout_of
from tests.bench.measure import arguments, load, machine, show
from tests.bench.padded import model_code
from tests.bench.round import Place, measure_hivemind, measure_torchft, place, start_swarm
from tests.bench.story import ROUND_EVENTS, Event, Log, in_ms, lines, phases

PUBLISHED = {"num_params": 30_846_720, "inner_steps": 128, "step_s": 0.0263, "rate_mbit": 50.0, "utilisation": 0.1155}
INNER_STEPS = 4
BATCH, SEQ_LEN = 1, 16
MODEL = SHAPE | {"num_experts": 2, "expert_hidden_size": 1024}
JOIN_S, BEGIN_S = 240.0, 480.0
START_MBIT = 1000.0  # while peers start: the first anchors are no part of the measurement
NUM_RIVAL_ROUNDS = 3
LONG_S = 600.0  # cut-off and grace: a slow line is no reason to settle without somebody


def dense_s(num_params: int, rate_mbit: float) -> float:
    """Seconds that the fp32 values of a model need over a line."""
    return 32 * num_params / (rate_mbit * 1e6)


def published_ratio() -> float:
    """Dense seconds over the seconds of H inner steps, in the published case."""
    return dense_s(int(PUBLISHED["num_params"]), PUBLISHED["rate_mbit"]) / (PUBLISHED["inner_steps"] * PUBLISHED["step_s"])


def step_s_of(num_params: int) -> float:
    """How long an inner step lasts for a model of this size to have the published ratio."""
    return dense_s(num_params, PUBLISHED["rate_mbit"]) / published_ratio() / INNER_STEPS


def utilisation_of(compute_s: float, exchange_s: float) -> float:
    """Of a system that trains and exchanges in turn."""
    return compute_s / (compute_s + exchange_s)


def training(steps: Sequence[tuple[float, float]], since_s: float, until_s: float) -> dict[str, float]:
    """Inner steps of one peer (begin and end, Unix time) between two moments: how many, and the share of the time inside them.

    A step that is only partly between them counts with that part.
    """
    inside = [(max(begin, since_s), min(end, until_s), end - begin) for begin, end in steps if begin < until_s and end > since_s]
    num_steps = sum((end - begin) / whole_s for begin, end, whole_s in inside)
    return {"steps_per_s": num_steps / (until_s - since_s), "share": sum(end - begin for begin, end, _ in inside) / (until_s - since_s)}


def evictions(looks: Sequence[Event]) -> dict[str, Any]:
    """What the service said of its members meanwhile: times somebody was taken for gone, and why.

    A member that is gone and back between two looks changes the membership's version twice.
    """
    gone: list[str] = []
    for before, after in itertools.pairwise(looks):
        gone += [
            f"{name}: {after['states'].get(name, '')}"
            for name, is_live in after["live"].items()
            if not is_live and before["live"].get(name)
        ]
    num_changes = looks[-1]["version"] - looks[0]["version"] if looks else 0
    return {"evictions": max(len(gone), (num_changes + 1) // 2), "evicted": gone, "num_looks": len(looks)}


def step_alone_s(manifest: Manifest) -> float:
    """The least time of an inner step without padding, in this process."""
    layout = layout_of(manifest)
    source = source_for(manifest, PeerConfig(name="bench"), Keypair.generate().peer_id)
    trained = frozenset(f.id for f in layout.fragments)
    inner = InnerLoop(manifest, layout, build_model(manifest.model, 0), source, torch.device("cpu"), trained)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        inner.step()
        times.append(time.perf_counter() - start)
    return min(times)


def settings_of(args: argparse.Namespace) -> list[str]:
    return [
        *(f"model.{key}={value}" for key, value in MODEL.items()), "name=bench", f"data.seq_len={SEQ_LEN}", f"train.batch_size={BATCH}",
        f"rounds.inner_steps={INNER_STEPS}", f"rounds.overlap={'true' if args.overlap else 'false'}",
        f"placement.experts_per_peer={MODEL['num_experts']}", f"codec.name={args.codec}", f"codec.sparsest={args.sparsest}",
        f"rounds.gather_s={args.gather_s * args.stretch}", f"rounds.cut_off_s={LONG_S}", f"rounds.grace_s={LONG_S}", f"rounds.attest_s={LONG_S}",
    ]  # fmt: skip


def measure(args: argparse.Namespace, pad_s: float) -> dict[str, Any]:
    """The swarm over ``--seconds``, with heartbeats and leases as they are by default."""
    with place(args) as here:
        manifest, invite = start_swarm(
            here, settings_of(args), args.peers, model_code(here.folder / "model.py", pad_s=pad_s, steps_folder=str(here.folder))
        )
        here.start("org", [sys.executable, "-m", "tests.bench.observer", invite], "observer", out="observer.out")
        host = Log(here.folder / "host.log", "round-abandoned", "round-void", *ROUND_EVENTS)
        members = [Log(here.folder / f"p{i}.log", "training", "service-away", "codec", *ROUND_EVENTS) for i in range(args.peers)]
        _set_rate(here, START_MBIT)
        _until_joined(here, members)
        _set_rate(here, args.rate_mbit)
        since_s = _until_begun(here, host, len(manifest.genesis))
        traffic, cpu_s, started_s = _sent_bytes(here), here.cpu_s(), time.time()
        while time.time() < since_s + args.seconds:
            time.sleep(2.0)
            here.check()
        until_s = time.time()
        traffic, cpu_s, lasted_s = _sent_bytes(here) - traffic, here.cpu_s() - cpu_s, until_s - started_s
        for log in (host, *members):
            log.read()
        looks = lines(here.folder / "observer.out")
        all_steps = [_steps(path) for path in here.folder.glob("steps-*")]
        if len(all_steps) != args.peers:
            raise SystemExit(f"{len(all_steps)} of {args.peers} peers have trained")
        looks = [look for look in looks if look["at_s"] >= since_s and "version" in look]
    peers = [training(steps, since_s, until_s) for steps in all_steps]
    confirmed = [e for e in host.named("round-confirmed") if e["at_s"] >= since_s]
    settled = [e for e in host.named("round-settled") if e["at_s"] >= since_s]
    rounds_per_s = len(confirmed) / len(manifest.genesis) / lasted_s
    steps_per_s = statistics.mean(p["steps_per_s"] for p in peers)
    return {
        "seconds": lasted_s, "utilisation": statistics.mean(p["share"] for p in peers),
        "utilisation_least": min(p["share"] for p in peers), "steps_per_s": steps_per_s,
        "rounds_settled": len(settled), "rounds_confirmed": len(confirmed), "num_fragments": len(manifest.genesis),
        "rounds_given_up": sum(e["at_s"] >= since_s for e in (*host.named("round-abandoned"), *host.named("round-void"))),
        "rounds_of_one": sum(e["at_s"] >= since_s and e["num_holders"] == 1 for e in host.named("round-opened")),
        "settled_with_all": sum(e["num_offers"] == args.peers for e in settled),
        "offers_per_round": statistics.mean(e["num_offers"] for e in settled) if settled else None,
        "steps_per_round": steps_per_s / rounds_per_s if rounds_per_s else None, "round_s": 1 / rounds_per_s if rounds_per_s else None,
        "streams_lost": sum(e["at_s"] >= since_s for member in members for e in member.named("service-away")),
        "codecs": sorted({e["codec"] for member in members for e in member.named("codec")}) or [args.codec],
        "line_use": traffic / args.peers / lasted_s / (args.rate_mbit * 1e6 / 8), "cpu_cores": cpu_s / lasted_s,
        "phases_ms": in_ms(phases((e for log in (host, *members) for e in log.events), since_s=since_s)),
    } | evictions(looks)  # fmt: skip


def _steps(path: Path) -> list[tuple[float, float]]:
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [(float(begin), float(end)) for begin, end in (line.split() for line in whole)]


def _set_rate(here: Place, rate_mbit: float) -> None:
    assert here.lab is not None
    for host in here.lab.hosts:
        here.lab.access_bytes_per_s[host] = rate_mbit * 1e6 / 8


def _until_joined(here: Place, members: Sequence[Log]) -> None:
    """All peers have the first anchors and train. Raises SystemExit."""
    deadline = time.monotonic() + JOIN_S
    while not all(any(e["event"] == "training" for e in member.read()) for member in members):
        here.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"not everybody trains after {JOIN_S:g} s")
        time.sleep(0.5)


def _until_begun(here: Place, host: Log, num_fragments: int) -> float:
    """Unix time at which every fragment has confirmed a round that opened on the slow lines. Raises SystemExit."""
    deadline, slow_s = time.monotonic() + BEGIN_S, time.time()
    while time.monotonic() < deadline:
        opened = {(e["fragment"], e["round"]) for e in host.read() if e["event"] == "round-opened" and e["at_s"] > slow_s}
        first: dict[str, float] = {}
        for event in host.named("round-confirmed"):
            if (event["fragment"], event["round"]) in opened:
                first.setdefault(event["fragment"], event["at_s"])
        if len(first) == num_fragments:
            return max(first.values())
        here.check()
        time.sleep(0.5)
    raise SystemExit(f"no confirmed round of each fragment in {BEGIN_S:g} s on the slow lines")


def _sent_bytes(here: Place) -> int:
    """What the peers have put on their lines so far."""
    assert here.lab is not None
    return sum(traffic.carried_bytes for (sender, _), traffic in here.lab.traffic.items() if sender != "org")


def rivals(args: argparse.Namespace, num_params: int, compute_s: float) -> dict[str, Any]:
    """Utilisation of systems that train H steps and exchange, from their measured exchange over the same lab."""
    found: dict[str, Any] = {}
    for name, call in (("hivemind", measure_hivemind), ("torchft", measure_torchft)):
        if name in args.rivals.split(","):
            print(f"{name} ...", file=sys.stderr, flush=True)
            found |= call(args, num_params, NUM_RIVAL_ROUNDS)
            if found.get(f"{name}_s"):
                found[f"{name}_utilisation"] = utilisation_of(compute_s, found[f"{name}_s"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--peers", type=int, default=4)
        parser.add_argument("--rate-mbit", type=float, default=50.0)
        parser.add_argument("--rtt-ms", type=float, default=50.0)
        parser.add_argument("--seconds", type=float, default=180.0)
        parser.add_argument("--gather-s", type=float, default=5.0, help="rounds.gather_s, times --stretch")
        parser.add_argument("--stretch", type=float, default=1.0)
        parser.add_argument(
            "--no-overlap", dest="overlap", action="store_false", help="trainers wait for rounds, as in a synchronous system"
        )
        parser.add_argument("--codec", default="int8", help="the densest allowed")
        parser.add_argument("--sparsest", default="topk16")
        parser.add_argument("--rivals", default="", help="hivemind, torchft or both, comma-separated: a few rounds of each in the same lab")

    args = arguments((__doc__ or "").splitlines()[0], argv, extra)
    torch.set_num_threads(1)
    manifest = bench_manifest(**MODEL)
    manifest = parse_config(Manifest, manifest.model_dump() | {"data": {"seq_len": SEQ_LEN}, "train": {"batch_size": BATCH}}, "bench")
    num_params = layout_of(manifest).num_elements
    step_s, bare_s = args.stretch * step_s_of(num_params), step_alone_s(manifest)
    if bare_s > step_s:
        raise SystemExit(f"a step takes {bare_s:.3f} s here, more than the {step_s:.3f} s it may: use --stretch")
    ratio = published_ratio() * PUBLISHED["rate_mbit"] / args.rate_mbit
    label_mbit, args.rate_mbit = args.rate_mbit, args.rate_mbit / args.stretch
    print(f"decentra ... steps of {step_s:.3f} s, {bare_s:.3f} s of them arithmetic", file=sys.stderr, flush=True)
    load_before = load()
    found = measure(args, step_s - bare_s)
    result = {
        "rate_mbit": label_mbit, "rtt_ms": args.rtt_ms, "num_peers": args.peers, "num_params": num_params, "stretch": args.stretch,
        "overlap": args.overlap, "gather_s": args.gather_s * args.stretch,
        "inner_steps": INNER_STEPS, "step_s": step_s, "step_alone_s": bare_s, "dense_over_steps": ratio,
        **found, "pace": found["steps_per_s"] * step_s, "dense_utilisation": utilisation_of(1.0, ratio),
        "published_dense_utilisation": PUBLISHED["utilisation"] if label_mbit == PUBLISHED["rate_mbit"] else None,
        "load_before": load_before, "machine": machine(),
    }  # fmt: skip
    show(result | rivals(args, num_params, INNER_STEPS * step_s), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
