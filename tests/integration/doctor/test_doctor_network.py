"""The doctor against a real run on loopback: a real averaging service and bootstrap node, then each of them gone or somebody else."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import typer
from typer.testing import CliRunner

from decentra.averaging.tls import TLS_NAME, create_tls
from decentra.cli.create import create
from decentra.cli.doctor import doctor_command, state_dir_of
from decentra.cli.rundir import RunDir
from decentra.cli.service import averaging_service
from decentra.cli.wiring import state_dir
from decentra.config import Manifest, PeerConfig
from decentra.doctor import network
from decentra.doctor.examine import Plan, examine
from decentra.doctor.finding import Finding, Level, exit_code
from decentra.errors import ExitCode
from decentra.gossip.bootstrap import run_bootstrap
from decentra.gossip.node import MAX_CLOCK_SKEW_S
from decentra.identity import Keypair
from decentra.invite import Invite, parse_invite

torch.set_num_threads(1)

T = TypeVar("T")
DEADLINE_S = 100.0
SMALL = (
    "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16",
    "model.expert_hidden_size=8", "model.num_experts=2",
)  # fmt: skip


def run(job: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(DEADLINE_S):
            return await job

    return asyncio.run(bounded())


@dataclass
class Lab:
    """One run with its service, and the invite to it."""

    run: RunDir
    manifest: Manifest
    service: str
    invite: Invite


@asynccontextmanager
async def lab(root: Path, *, bootstrap: str = "/ip4/127.0.0.1/tcp/9", days: float = 1.0) -> AsyncIterator[Lab]:
    made, manifest = create(root / "run", None, SMALL)
    async with averaging_service(made, manifest, "127.0.0.1:0", network.Silent()) as service:
        address = f"127.0.0.1:{service.port}"
        invite = made.make_invite(3, days, bootstrap=(f"{bootstrap}",), services=(address,))
        yield Lab(made, manifest, address, invite)


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {f.check: f for f in findings}


def test_a_healthy_run_then_a_dead_bootstrap_node_and_service(tmp_path: Path) -> None:
    async def story() -> tuple[list[Finding], list[Finding], Invite]:
        bootstrap = await run_bootstrap(tmp_path / "b.key", ("/ip4/127.0.0.1/tcp/0",), (), network.Silent())
        try:
            async with lab(tmp_path, bootstrap=bootstrap.addresses[0]) as one:
                heard: list[Finding] = []
                alive = await examine(Plan(tmp_path / "state", one.invite), heard.append)
                assert heard == alive
        finally:
            await bootstrap.close()
        return alive, await examine(Plan(tmp_path / "state", one.invite)), one.invite

    alive, dead, invite = run(story())
    assert [f for f in alive if f.level is not Level.OK] == []
    assert exit_code(alive) is ExitCode.OK
    found = by_check(alive)
    assert found["bootstrap"].found.startswith(invite.bootstrap[0].split("/p2p/")[0] + " is 12D3KooW")
    assert "signed for by the run key" in found["averaging service"].found
    assert {"clock", "invite", "embedded text", "memory for this run", "p2p node", "p2pd file", "arithmetic"} <= found.keys()
    assert not any(check.startswith("port ") for check in found), "a joiner needs no fixed port"

    assert exit_code(dead) is ExitCode.UNREACHABLE
    bad = {f.check: f for f in dead if f.is_bad}
    assert bad.keys() == {"bootstrap", "averaging service"}
    for finding in bad.values():
        assert finding.level is Level.UNREACHABLE
        assert "127.0.0.1" in finding.found
        assert "organiser" in finding.fix


def test_bootstrap_that_is_another_node_than_the_invite_names(tmp_path: Path) -> None:
    async def story() -> list[Finding]:
        bootstrap = await run_bootstrap(tmp_path / "b.key", ("/ip4/127.0.0.1/tcp/0",), (), network.Silent())
        probe: list[Finding] = []
        try:
            wrong = bootstrap.addresses[0].split("/p2p/")[0] + f"/p2p/{Keypair.generate().peer_id}"
            async with network.probe_node(probe) as node:
                alone = await network.check_bootstrap((wrong,), node)
                together = await network.check_bootstrap((wrong, bootstrap.addresses[0]), node)
        finally:
            await bootstrap.close()
        return [*alone, *together]

    alone, wrong, right = run(story())
    assert alone.level is Level.UNREACHABLE
    assert "not behind it" in alone.found
    assert (wrong.level, right.level) == (Level.WARN, Level.OK), "one bootstrap node that answers is enough"


@asynccontextmanager
async def man_in_the_middle(service: str, folder: Path) -> AsyncIterator[str]:
    """Speaks TLS with a certificate of its own, and passes every byte on to the real service."""
    tls = create_tls()
    (folder / "middle.pem").write_bytes(tls.key_pem + tls.certificate_pem)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(folder / "middle.pem")
    client_side = ssl.create_default_context()
    client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE
    for context in (server_side, client_side):
        context.set_alpn_protocols(["h2"])
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = service.split(":")
        to_service = await asyncio.open_connection(host, int(port), ssl=client_side, server_hostname=TLS_NAME)
        tasks.update(asyncio.create_task(pass_on(*pair)) for pair in ((reader, to_service[1]), (to_service[0], writer)))

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_side)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_services_that_are_not_the_runs_own(tmp_path: Path) -> None:
    """The same manifest under another run key, and one that stands between: its answers are the service's, its TLS certificate is not."""

    async def story() -> list[Finding]:
        async with lab(tmp_path / "mine") as mine, lab(tmp_path / "other") as other, man_in_the_middle(mine.service, tmp_path) as middle:
            found = [await network.ask_service(replace(mine.invite, services=(where,))) for where in (other.service, middle, mine.service)]
        return [one for findings, _ in found for one in findings if one.check == "averaging service"]

    other_run, middle, mine = run(story())
    assert other_run.level is middle.level is Level.FAIL
    assert "no valid certificate of the run key" in other_run.found
    assert "somebody stands between" in middle.found
    assert "do not join" in middle.fix
    assert exit_code([middle]) is ExitCode.FAILED
    assert mine.level is Level.OK


def test_wrong_clock_and_expired_invite(tmp_path: Path) -> None:
    async def story() -> tuple[list[Finding], list[Finding]]:
        async with lab(tmp_path, days=1 / 24) as one:
            early, _ = await network.ask_service(one.invite, wall_s=time.time() - 60)
            late, _ = await network.ask_service(one.invite, wall_s=time.time() + 7200)
        return early, late

    early, late = run(story())
    clock = by_check(early)["clock"]
    assert clock.level is Level.FAIL
    assert clock.found.startswith("60")
    assert "behind" in clock.found
    assert by_check(late)["invite"].level is Level.FAIL
    assert "expired" in by_check(late)["invite"].found


def test_tolerance_is_the_dhts() -> None:
    assert network.MAX_CLOCK_SKEW_S == MAX_CLOCK_SKEW_S


def test_command_prints_json_last_and_exits_with_3_when_nobody_answers(tmp_path: Path) -> None:
    async def make() -> str:
        async with lab(tmp_path) as one:
            return one.invite.encode()

    line = run(make())
    app = typer.Typer()
    app.command()(doctor_command)
    file = tmp_path / "invite"
    file.write_text(line + "\n")
    result = CliRunner().invoke(app, [str(file), "--json", "--dir", str(tmp_path / "state")])
    assert result.exit_code == 3, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["exit_code"] == 3
    assert not report["ok"]
    assert {c["check"] for c in report["checks"] if c["level"] == "unreachable"} == {"bootstrap", "averaging service"}
    assert all(bool(c["fix"]) is (c["level"] != "ok") for c in report["checks"])


def test_table_names_every_fix(tmp_path: Path) -> None:
    from decentra.identity import save_key

    save_key(tmp_path / "identity.key", Keypair.generate())
    (tmp_path / "identity.key").chmod(0o644)
    app = typer.Typer()
    app.command()(doctor_command)
    result = CliRunner().invoke(app, ["--dir", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "chmod 600" in result.stdout


@pytest.mark.parametrize("name", ["peer", "second"])
def test_state_directory_is_the_one_join_uses(name: str, tmp_path: Path) -> None:
    invite = Invite(Manifest(name="x").run_id(), bytes(32))
    assert state_dir_of(parse_invite(invite.encode()), name, None) == state_dir(invite.run_id, PeerConfig(name=name))
    assert state_dir_of(invite, name, tmp_path) == tmp_path
