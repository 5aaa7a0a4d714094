"""``demo``: a whole swarm on this machine through the real commands: host, peers, a kill, a return, the end, the model. Only starts and watches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from decentra.cli import look
from decentra.cli.controls import controls_of
from decentra.cli.create import create
from decentra.cli.rundir import RunDir
from decentra.cli.running import StopRequest, die_with_parent
from decentra.config import Manifest
from decentra.errors import ConfigError, DecentraError, Unreachable
from decentra.ids import expert_of
from decentra.invite import parse_invite
from decentra.model.custom import layout_for
from decentra.peer.disk import RealDisk, write_atomic

DEMO_SETTINGS: tuple[str, ...] = ('name="demo"',)  # the manifest's defaults were chosen for this run: tests/bench/LOG.md
KILL_AT, BACK_AFTER, EXPERT_SHARE = 0.35, 0.12, 0.6  # shares of the run's rounds; the last: what the least trained expert must have
LOOK_S, DEADLINE_S, END_S = 1.0, 1500.0, 30.0
MARKER = "decentra-demo.json"


@dataclass
class Child:
    """One process of the demo; its output goes to files."""

    name: str
    args: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self._file("out") as out, self._file("log") as err:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "decentra.cli.main", *self.args, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err, env=env,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def _file(self, kind: str) -> BinaryIO:
        self.log.mkdir(parents=True, exist_ok=True)
        return open(self.log / f"{self.name}.{kind}", "ab")

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def end(self, patience_s: float = END_S) -> int | None:
        """Ask it to leave, insist after ``patience_s``."""
        if self.process is None:
            return None
        self.signal(signal.SIGINT)
        try:
            async with asyncio.timeout(patience_s):
                return await self.process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.process.wait()

    def last_json(self) -> dict[str, Any]:
        lines = [x for x in (self.log / f"{self.name}.out").read_text().splitlines() if x.startswith("{")]
        value: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return value

    def tail(self) -> str:
        return "\n".join((self.log / f"{self.name}.log").read_text(errors="replace").splitlines()[-8:])


@dataclass
class Demo:
    """State of one demonstration."""

    root: Path
    num_peers: int
    num_rounds: int  # the demo ends the run at this many confirmed rounds, once the killed peer is back
    with_controls: bool
    is_quiet: bool
    manifest: Manifest = field(init=False)
    began: float = field(init=False, default_factory=time.monotonic)
    host: Child = field(init=False)
    peers: list[Child] = field(init=False, default_factory=list)
    invite_line: str = field(init=False, default="")
    curves: dict[str, list[tuple[float, float]]] = field(init=False, default_factory=dict)
    marks: list[tuple[float, str]] = field(init=False, default_factory=list)
    first_confirmed_s: float | None = field(init=False, default=None)
    num_rejoined: int = field(init=False, default=0)
    snap: dict[str, Any] = field(init=False, default_factory=dict)

    # ------------------------------------------------------------ the story

    async def run(self, source: Path | None, settings: Sequence[str], stop: StopRequest) -> dict[str, Any]:
        self._prepare()
        base = [] if source is not None else list(DEMO_SETTINGS)
        run, self.manifest = await asyncio.to_thread(create, self.root / "run", source, [*base, *settings])
        self.num_rounds = self.manifest.stop.rounds or self.num_rounds
        self.say(f"run {self.manifest.run_id()[:12]}: {self.manifest.model.num_experts} experts in {run.root}")
        story = asyncio.ensure_future(self._story(run, stop))
        stop.on_stop(lambda _why: story.cancel())  # wherever it is, controls included
        try:
            return await story
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            await asyncio.gather(*(c.end(5.0) for c in self.peers), self.host.end(10.0), return_exceptions=True)

    async def _story(self, run: RunDir, stop: StopRequest) -> dict[str, Any]:
        await self._start_all(run.root)
        await self._watch(run, stop)
        return await self._finish(run.root)

    def _prepare(self) -> None:
        if self.root.exists():
            if any(self.root.iterdir()) and not (self.root / MARKER).exists():
                raise ConfigError(f"{self.root} is not empty and not an earlier demo; choose another --dir")
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True)
        (self.root / MARKER).write_text("{}")
        self.host = Child("host", [], self.root / "logs")

    async def _start_all(self, run: Path) -> None:
        self.host.args = [
            "host",
            str(run),
            "--address",
            "127.0.0.1",
            "--listen",
            "127.0.0.1",
            "--bootstrap-port",
            "0",
            "--service-port",
            "0",
            "--json",
        ]
        await self.host.start()
        self.say("bootstrap node, averaging service and keeper: starting in one process")
        self.invite_line = await self._host_invite()
        write_atomic(RealDisk(self.root), "invite.txt", self.invite_line.encode())  # a file: command lines are for everybody to see
        domains = self.manifest.data.domains
        for index in range(self.num_peers):
            name, domain = f"peer-{index + 1}", domains[index % len(domains)]
            args = ["join", str(self.root / "invite.txt"), "--name", name, "--dir", str(self.root / name), "--domain", domain]
            child = Child(name, [*args, "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--on-battery", "--json"], self.root / "logs")
            self.peers.append(child)
            await child.start()
            self.say(f"{name}: joining, own text: {domain}, {self.manifest.data.shared_fraction:.0%} common text")

    async def _host_invite(self) -> str:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if not self.host.is_running:
                raise Unreachable(f"the host ended before it was ready:\n{self.host.tail()}")
            if invite := self.host.last_json().get("invite"):
                return str(invite)
            await asyncio.sleep(0.2)
        raise Unreachable(f"the host was not ready within 120 s:\n{self.host.tail()}")

    async def _watch(self, run: RunDir, stop: StopRequest) -> None:
        """Look every second until the run is over; kill one peer on the way, bring it back, and end the run as its organiser."""
        goal = self.num_rounds
        victim, killed_at, back_at = self.peers[-1], None, None
        rounds_at_kill, rounds_at_return = 0, {}
        deadline, manifest = time.monotonic() + DEADLINE_S, None
        async with look.watching(parse_invite(self.invite_line)) as client, _view(self) as show:
            while not stop.event.is_set():
                self._check_alive(victim if killed_at is not None and back_at is None else None)
                if time.monotonic() > deadline:
                    raise Unreachable(f"the demo did not end within {DEADLINE_S:g} s; its logs are in {self.root / 'logs'}")
                try:
                    manifest, self.snap = await look.fetch_status(client, manifest)
                except DecentraError as error:
                    self.say(f"status: {error}")
                    await asyncio.sleep(LOOK_S)
                    continue
                self._note()
                show()
                rounds = self.snap["rounds_confirmed_trunk"]
                if killed_at is None and rounds >= KILL_AT * goal and self._participates(victim.name):
                    victim.signal(signal.SIGKILL)
                    killed_at, rounds_at_kill = self.elapsed(), rounds
                    self.mark(f"{victim.name} killed (kill -9)")
                elif killed_at is not None and back_at is None and rounds >= rounds_at_kill + max(1, BACK_AFTER * goal):
                    await victim.start()
                    back_at, rounds_at_return = self.elapsed(), self._newest_rounds()
                    self.mark(f"{victim.name} started again")
                elif back_at is not None and not self.num_rejoined and self._has_contributed(victim.name, rounds_at_return):
                    self.num_rejoined = 1
                    self.mark(f"{victim.name} is in a confirmed round again")
                elif self.num_rejoined and not self.snap["is_stopping"] and self._is_enough():
                    await client.command(run.run_key(), "stop", f"the demo has its {goal} rounds")
                if self.snap["is_stopped"]:
                    return
                await asyncio.sleep(LOOK_S)
        raise KeyboardInterrupt

    def _is_enough(self) -> bool:
        least_expert = min(self.num_rounds, max(1, round(EXPERT_SHARE * self.num_rounds)))
        return bool(self.snap["rounds_confirmed_trunk"] >= self.num_rounds and self.snap["rounds_confirmed_min_expert"] >= least_expert)

    async def _finish(self, run: Path) -> dict[str, Any]:
        self.say(f"the run is over: {self.snap['why']}")
        await asyncio.gather(*(self._wait(p) for p in self.peers))
        invite = parse_invite(self.invite_line)
        pulled = await look.pull(invite, self.root / "model")
        self.say("evaluating on the held-out parts of all domains")
        end = await asyncio.to_thread(look.evaluate_checkpoint, self.root / "model")
        start = await asyncio.to_thread(_evaluate_genesis, run, self.manifest)
        ends = {p.name: p.last_json() for p in self.peers}
        result = self._result(pulled, start, end, ends)
        if self.with_controls:
            result |= await self._controls(run, ends)
        is_back = result["peers_killed"] == result["peers_rejoined"] == 1
        has_learned = result["loss_end"] < result["loss_start"]
        result["ok"] = bool(result["anchors_equal"] and is_back and has_learned and self._is_enough())
        self._draw(result)
        return result

    async def _wait(self, peer: Child) -> None:
        assert peer.process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await peer.process.wait()

    # ------------------------------------------------------------ figures

    def _result(
        self, pulled: dict[str, Any], start: dict[str, Any], end: dict[str, Any], ends: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        members = [m for m in self.snap["members"] if m["role"] == "trainer"]
        num_rounds = self.snap["rounds_confirmed_trunk"]
        return {
            "num_peers": len(members), "num_experts": self.manifest.model.num_experts,
            "experts_per_peer": max((len(m["experts"]) for m in members), default=0), "experts_of": {m["name"]: m["experts"] for m in members},
            "rounds_confirmed_trunk": num_rounds, "rounds_confirmed_min_expert": self.snap["rounds_confirmed_min_expert"],
            "rounds_abandoned": self.snap["rounds_abandoned"], "rounds_thin": self.snap["rounds_thin"],
            "seconds_to_first_confirmed": self.first_confirmed_s, "seconds": round(self.elapsed(), 1),
            "loss_start": round(start["loss"], 4), "loss_end": round(end["loss"], 4), "loss_per_domain": end["loss_per_domain"],
            "anchors_equal": _all_equal(pulled["anchors"], ends, len(self.peers)),
            "peers_killed": sum("killed" in what for _, what in self.marks), "peers_rejoined": self.num_rejoined,
            "num_steps": {name: e.get("num_steps", 0) for name, e in ends.items()},
            "tx_bytes_per_peer": round(sum(m["tx_bytes"] for m in members) / max(1, len(members))),
            "dense_bytes_per_peer": self._dense_bytes(members),
            "dir": str(self.root),
        }  # fmt: skip

    def _dense_bytes(self, members: list[dict[str, Any]]) -> int:
        """What a peer would send if each confirmed round of each fragment it trains took its fp32 difference once: mean over the peers."""
        sizes = {f.id: 4 * f.num_elements for f in layout_for(self.manifest).fragments}
        total = 0
        for f in self._fragments():
            expert = expert_of(f["module"])
            num_trainers = sum(expert is None or expert in m["experts"] for m in members)
            total += num_trainers * f["num_confirmed"] * sizes[f["fragment"]]
        return round(total / max(1, len(members)))

    async def _controls(self, run: Path, ends: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Two trainings at a time, each as many steps as the peer that did most."""
        num_steps = max((int(e.get("num_steps", 0)) for e in ends.values()), default=0) or self.manifest.rounds.inner_steps
        gate, done = asyncio.Semaphore(2), []

        async def train(name: str, domain: str | None, factor: int) -> None:
            async with gate:
                args = [str(run / "manifest.json"), name, domain or "-", str(factor), str(num_steps)]
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "decentra.cli.controls", *args, stdout=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                    preexec_fn=die_with_parent,
                )  # fmt: skip
                try:
                    out, _ = await process.communicate()
                except asyncio.CancelledError:
                    process.kill()
                    raise
                if process.returncode:
                    raise ConfigError(f"control {name} failed with exit code {process.returncode}")
                done.append(json.loads(out.decode().splitlines()[-1]))
                self.say(f"control {name}: {done[-1]['loss']:.3f} after {num_steps} steps")

        self.say(f"controls: the same model alone, {num_steps} steps each")
        await asyncio.gather(*(train(c.name, c.domain, c.batch_factor) for c in controls_of(self.manifest, self.num_peers)))
        losses = {d["name"]: d["loss"] for d in done}
        own = [loss for name, loss in losses.items() if name.startswith("solo_own/")]
        return {
            "loss_solo_own": round(sum(own) / len(own), 4), "loss_solo": round(losses["solo"], 4), "loss_ddp_like": round(losses["ddp_like"], 4),
            "control_steps": num_steps,
        }  # fmt: skip

    def _draw(self, result: dict[str, Any]) -> None:
        from decentra.status.plot import loss_png

        levels = {"swarm, held out": result["loss_end"]}
        levels |= {
            f"{k[5:].replace('_', ' ')}, held out": result[k] for k in ("loss_solo_own", "loss_solo", "loss_ddp_like") if k in result
        }
        result["plot"] = str(self.root / "loss.png")
        loss_png(self.root / "loss.png", self.curves, self.marks, levels, "training loss of each peer")
        (self.root / MARKER).write_text(json.dumps(result, indent=1))

    # ------------------------------------------------------------ watching

    def elapsed(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", file=sys.stderr, flush=True)

    def mark(self, what: str) -> None:
        self.marks.append((self.elapsed(), what))
        self.say(what)

    def _note(self) -> None:
        if self.first_confirmed_s is None and any(f["num_confirmed"] for f in self._fragments()):
            self.first_confirmed_s = self.elapsed()
            self.mark("first confirmed round")
        for member in self.snap["members"]:
            if member["role"] == "trainer" and member["loss"] is not None and member["is_live"]:
                curve = self.curves.setdefault(member["name"], [])
                if not curve or curve[-1][1] != member["loss"]:
                    curve.append((self.elapsed(), member["loss"]))

    def _fragments(self) -> list[dict[str, Any]]:
        return [f for m in self.snap["modules"] for f in m["fragments"]]

    def _newest_rounds(self) -> dict[str, int]:
        return {f["fragment"]: f["round"] for f in self._fragments()}

    def _has_contributed(self, name: str, since: dict[str, int]) -> bool:
        """True when a round that opened after ``since`` is confirmed with this peer's packet in it."""
        return any(f["contributed"].get(name, 0) > since.get(f["fragment"], 0) for f in self._fragments())

    def _participates(self, name: str) -> bool:
        return any(m["name"] == name and m["is_live"] and m["is_participating"] for m in self.snap["members"])

    def _check_alive(self, expected_dead: Child | None) -> None:
        for child in (self.host, *self.peers):
            is_done_well = self.snap.get("is_stopping") and child is not self.host
            if not child.is_running and child is not expected_dead and not is_done_well:
                raise Unreachable(f"{child.name} ended on its own; the end of its log:\n{child.tail()}")


@contextlib.asynccontextmanager
async def _view(demo: Demo) -> Any:
    """A live table on a terminal, a line every ten seconds elsewhere."""
    if demo.is_quiet or not sys.stderr.isatty():
        last = [0.0]

        def line() -> None:
            if time.monotonic() - last[0] >= 10:
                last[0] = time.monotonic()
                s = demo.snap
                loss = "-" if s["loss"] is None else f"{s['loss']:.3f}"
                demo.say(
                    f"live {s['num_live']}, participating {s['num_participating']}, trunk rounds {s['rounds_confirmed_trunk']}/{demo.num_rounds},"
                    f" least expert {s['rounds_confirmed_min_expert']}, loss {loss}"
                )

        yield line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from decentra.status.terminal import render

    with Live(Text("waiting for the swarm"), console=Console(stderr=True), auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda: live.update(render(demo.snap, live.console.height), refresh=True)


def _evaluate_genesis(run: Path, manifest: Manifest) -> dict[str, Any]:
    """Held-out loss before training."""
    from decentra.peer.checkpoint import assemble, save_model

    blobs = RunDir(run).genesis_blobs(manifest)
    assembled = assemble(manifest, {f: blobs[d] for f, d in manifest.genesis.items()}, dict.fromkeys(manifest.genesis, 0))
    save_model(run / "genesis-model", assembled)
    return look.evaluate_checkpoint(run / "genesis-model")


def _all_equal(pulled: dict[str, str], ends: dict[str, dict[str, Any]], num_peers: int) -> bool:
    """Every peer that was there at the end left with the anchors that were pulled."""
    anchors = [e["anchors"] for e in ends.values() if "anchors" in e]
    return len(anchors) == num_peers and all(a == pulled for a in anchors)


def report(result: dict[str, Any], demo: Demo) -> None:
    """Table, plot, sample and the next step, for people."""
    from rich.console import Console
    from rich.table import Table

    from decentra.status.plot import loss_text
    from decentra.status.terminal import size

    console = Console()
    print(loss_text(demo.curves, "training loss of each peer (nats per byte)"))
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "held-out loss": f"{result['loss_start']:.3f} at the start, {result['loss_end']:.3f} at the end (assembled model, mean over the domains)",
        "rounds": f"{result['rounds_confirmed_trunk']} of the trunk, at least {result['rounds_confirmed_min_expert']} of each expert,"
        f" {result['rounds_abandoned']} given up, {result['rounds_thin']} thin",
        "first confirmed": f"{result['seconds_to_first_confirmed']} s after the start; all of it {result['seconds']} s",
        "killed, returned": f"{result['peers_killed']}, {result['peers_rejoined']}",
        "anchors": "bit-equal on every peer" if result["anchors_equal"] else "NOT equal",
        "sent per peer": f"{size(result['tx_bytes_per_peer'])} to all receivers together;"
        f" the same differences in fp32, sent once: {size(result['dense_bytes_per_peer'])}",
    }  # fmt: skip
    for key, text in (("loss_solo_own", "alone, own text"), ("loss_solo", "alone, all text"), ("loss_ddp_like", "one, everybody's batch")):
        if key in result:
            rows[text] = f"{result[key]:.3f} at {result['control_steps']} steps"
    rows |= {"plot": result["plot"], "model": f"{result['dir']}/model"}
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)
    console.print("\nsample:", style="dim")
    console.print(result["sample"], highlight=False, markup=False)
    console.print("\nwith other people's machines, on the reachable one:", style="dim")
    console.print("  decentra init my-run && decentra host my-run --address YOUR_PUBLIC_NAME", highlight=False)
    console.print("and on each of the others the line that it prints:", style="dim")
    console.print("  decentra join decentra1_...", highlight=False)
