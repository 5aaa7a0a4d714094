"""One admitted member floods the service and the keeper: what does it cost the others?

    python -m tests.chaos.flood --json [--seconds 60] [--peers 3]

Real processes on loopback. First ``--seconds`` in peace, then as long under each flood, by one process with the lowest priority (it shares two cores with
everybody, which a flood from afar does not):

messages   facts about its own holdings on its stream, as fast as the stream takes them
calls      Join, the whole ledger, and Describe on new TLS connections, in turn, eight at a time

round_ratio   median time between confirmed rounds of the trunk, under the flood over in peace (asked: 1.25); host_mb: memory of the host
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from processes import TINY, Command, ctrl_c, lab

from decentra.averaging.client import AveragingClient, describe
from decentra.cli.console import LogEvents, set_up_logging
from decentra.cli.create import create
from decentra.errors import DecentraError
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId
from decentra.invite import parse_invite
from decentra.model.custom import model_code_digest
from decentra.protocol.messages import Hello, Holding, Role
from decentra.wire.trust import TrustChain
from tests.bench.padded import model_code
from tests.chaos import annals
from tests.chaos.telling import teller

READY_S, PAD_S, NUM_AT_ONCE = 120.0, 0.2, 8
SETTINGS = ("rounds.inner_steps=10",)
FLOODS = ("messages", "calls")


def measure(seconds: float, num_peers: int, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="decentra-flood-") as name, lab(Path(name)) as world:
        code = model_code(Path(name) / "model.py", pad_s=PAD_S)
        run = create(world.root / "run", None, ['name="flood"', *TINY, *SETTINGS, f'model.code="{model_code_digest(code)}"'], code)[0]
        host = world.host(run, "--model-code", str(code)).start()
        invite = world.invite_of(host)
        peers = [world.member("join", invite, f"peer-{i}", "--model-code", str(code)).start() for i in range(num_peers)]
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 3, READY_S)
        assert host.popen is not None
        process = psutil.Process(host.popen.pid)
        time.sleep(seconds)
        peace_s, before_mb = _gap(host, seconds), process.memory_info().rss / 1e6
        say(f"in peace a round takes {peace_s:.2f} s")
        rows = []
        for number, flood in enumerate(FLOODS):
            attack = [sys.executable, "-m", "tests.chaos.flood", "--attack", flood, "--invite", invite, "--number", str(number)]
            attacker = subprocess.Popen(attack, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(19) and None)
            assert attacker.stdout is not None
            attacker.stdout.readline()  # it has begun
            used_s, began = sum(process.cpu_times()[:2]), time.monotonic()
            time.sleep(seconds)
            share = (sum(process.cpu_times()[:2]) - used_s) / (time.monotonic() - began)
            attacker.terminate()
            sent = attacker.communicate(timeout=20)[0].strip().splitlines()
            gap_s = _gap(host, seconds)
            rows.append(
                {
                    "flood": flood, "round_ratio": gap_s / peace_s, "round_s": gap_s, "host_mb": round(process.memory_info().rss / 1e6),
                    "host_cpu_share": round(share, 2), "sent": int(sent[-1]) if sent else 0,
                }
            )  # fmt: skip
            say(f"{flood}: {rows[-1]}")
        given_up = len(host.events("round-abandoned")) + len(host.events("round-void"))
        ended = [ctrl_c(p)[0] for p in peers]
        ctrl_c(host)
    return {
        "peers": num_peers,
        "seconds": seconds,
        "round_s": peace_s,
        "host_mb": round(before_mb),
        "rows": rows,
        "rounds_given_up": given_up,
        "exit_codes": ended,
    }


def _gap(host: Command, seconds: float) -> float:
    """Median time between the trunk's confirmed rounds of the last so many seconds."""
    times = [annals.unix_s(e) for e in host.events("round-confirmed") if e["fragment"] == "trunk/0"]
    gaps = [b - a for a, b in pairwise(t for t in times if t > time.time() - seconds)]
    return statistics.median(gaps) if gaps else float("inf")


# ---------------------------------------------------------------- the member that floods


async def _attack(kind: str, line: str, number: int) -> None:
    set_up_logging(is_verbose=False, is_json=True)
    invite, key = parse_invite(line), Keypair.from_seed(bytes([200 + number]) * 32)
    trust = TrustChain(invite.run_id, invite.run_public)
    client = AveragingClient(invite.services, trust, LogEvents(), key=key, token=invite.token)
    await client.join(Role.KEEPER, "flood", "flood")
    print("begun", flush=True)
    sent = [0]
    if kind == "messages":
        jobs = [_messages(client, key, sent)]
    else:
        jobs = [_calls(client, invite, trust, sent, turn) for turn in range(NUM_AT_ONCE)]
    tasks = [asyncio.create_task(job) for job in jobs]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(15, stop.set)
    await stop.wait()
    for task in tasks:
        task.cancel()
    print(sent[0], flush=True)
    os._exit(0)


async def _messages(client: AveragingClient, key: Keypair, sent: list[int]) -> None:
    while True:
        try:
            session = await client.attend(Hello(key.peer_id, Role.KEEPER, "flood", "flood"))
            while True:
                await session.send(Holding(key.peer_id, FragmentId("trunk/0"), Digest(f"{sent[0]:064x}")))
                sent[0] += 1
        except DecentraError:
            await asyncio.sleep(0.1)


async def _calls(client: AveragingClient, invite: Any, trust: TrustChain, sent: list[int], turn: int) -> None:
    while True:
        try:
            match turn % 3:
                case 0:
                    await client.join(Role.KEEPER, "flood", "flood")
                case 1:
                    await client.ledger()
                case _:
                    await describe(invite.services, trust, invite.token)
        except DecentraError:
            await asyncio.sleep(0.05)
        turn += 1
        sent[0] += 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--invite", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.attack:
        asyncio.run(_attack(args.attack, args.invite, args.number))
        return 0
    found = measure(args.seconds, args.peers, teller())
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
