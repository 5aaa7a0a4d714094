"""A whole swarm of real processes: four peers train, one is killed and returns, the host is killed and returns, and nothing confirmed is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import Command, Lab, confirmed, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.protocol import ledger

NUM_PEERS = 4
NUM_ROUNDS = 20  # of the trunk, at least; the organiser ends the run when the story is told, however fast the machine is
INNER_STEPS = 20
WHY = "the story is told"


def trunk(host: Command) -> int:
    return host.heights().get("trunk/0", 0)


def entries_of(records: list[ledger.Record], peer: str) -> list[int]:
    """Heights of the trunk whose settlement holds a packet of ``peer``, in confirmed rounds only."""
    settled = {(r.settlement.fragment, r.settlement.round): r.settlement for r in records if isinstance(r, ledger.Settled)}
    done = [settled[r.fragment, r.round] for r in records if isinstance(r, ledger.Confirmed) and r.fragment == "trunk/0"]
    return [s.height for s in done if any(e.peer == peer for e in s.entries)]


def assert_status_names_everything(status: dict[str, Any], run: RunDir, names: set[str]) -> None:
    """Members, modules, holders, rounds and why each waits, in one JSON object."""
    assert status["run"] == run.manifest().run_id()
    members = {m["name"]: m for m in status["members"]}
    assert names | {"host"} <= members.keys()
    assert members["host"]["role"] == "keeper"
    for name in names:
        assert members[name]["role"] == "trainer"
        assert len(members[name]["experts"]) == 2
    modules = {m["module"]: m for m in status["modules"]}
    assert modules.keys() == {"trunk", "router", "expert.0", "expert.1", "expert.2", "expert.3"}
    assert set(modules["trunk"]["holders"]) <= names
    for expert in range(4):
        expected = {n for n in names if members[n]["is_live"] and expert in members[n]["experts"]}
        assert set(modules[f"expert.{expert}"]["holders"]) == expected
    for module in modules.values():
        for fragment in module["fragments"]:
            assert fragment["round"] >= 1
            assert fragment["phase"]
            assert fragment["why"], f"{fragment['fragment']} does not say what it waits for"


def start_swarm(world: Lab, host: Command) -> tuple[str, list[Command]]:
    invite = world.invite_of(host.start())
    domains = ("code", "prose", "headers", "math")
    peers = [
        world.member("join", invite, f"peer-{i}", "--domain", domain, "--threads", "1", "--verbose").start()
        for i, domain in enumerate(domains[:NUM_PEERS])
    ]
    world.wait_for("everybody trains", lambda: all(p.events("training") for p in peers))
    return invite, peers


def in_rounds_of_trunk(peer: Command) -> int:
    """How many confirmed rounds of the trunk held a packet of this peer, by its own log, of all its lives."""
    return sum(e["fragment"] == "trunk/0" and e["ending"] == "applied" for e in peer.events("committed"))


def kill_and_return(world: Lab, host: Command, victim: Command) -> tuple[int, int]:
    """The trunk's heights when the peer was killed and when it was back. The run goes on meanwhile, for as long as that takes."""
    world.wait_for("the peer has contributed", lambda: in_rounds_of_trunk(victim))
    victim.kill()
    killed_at, num_before = trunk(host), in_rounds_of_trunk(victim)
    world.wait_for("rounds go on without the killed peer", lambda: trunk(host) > killed_at + 1)
    victim.start()
    world.wait_for("the killed peer trains again", lambda: len(victim.events("training")) == 2)
    back_at = trunk(host)
    world.wait_for("the killed peer contributes again", lambda: in_rounds_of_trunk(victim) > num_before + 1)
    return killed_at, back_at


def kill_host_and_return(world: Lab, host: Command, run: RunDir, invite: str) -> list[tuple[str, int, int, str]]:
    """kill -9 of bootstrap node, averaging service and keeper together; the same ports afterwards. What was confirmed before."""
    host.kill()
    before = confirmed(ledger_records(run, world.root / "ledger-before"))
    world.host_again(host, run, invite)
    return before


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_swarm_survives_a_killed_peer_and_a_killed_host(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init(f"rounds.inner_steps={INNER_STEPS}")
        host = world.host(run, "--verbose")
        invite, peers = start_swarm(world, host)
        victim = peers[-1]
        killed_at, back_at = kill_and_return(world, host, victim)
        before = kill_host_and_return(world, host, run, invite)
        world.wait_for("the service resumed from its ledger", lambda: host.events("service-resumed"))
        at = max(h for f, _, h, _ in before if f == "trunk/0")
        world.wait_for("rounds after the restart", lambda: trunk(host) > at + 2 and trunk(host) >= NUM_ROUNDS, 120)
        assert_status_names_everything(status_of_all(world, invite, len(peers) + 1), run, {p.name for p in peers})

        code, answer, err = world.run("stop", str(run.root), "--why", WHY, "--json")
        assert (code, answer.get("ok")) == (0, True), err
        assert [p.exit_code(120) for p in peers] == [0] * NUM_PEERS
        results = [p.last_json() for p in peers]
        assert all(r["ok"] and WHY in r["why"] for r in results)
        check_model(world, invite)
        code, seconds = ctrl_c(host)
        assert (code, seconds < 5.0) == (0, True), host.tail()

        records = ledger_records(run, world.root / "ledger-after")
        check_ledger(before, records, results)
        contributed = entries_of(records, victim.last_json()["peer"])
        assert contributed[0] <= killed_at
        assert contributed[-1] > back_at, f"the killed peer returned at height {back_at} and contributed to {contributed}"
        world.assert_nothing_left()


def status_of_all(world: Lab, invite: str, num_members: int) -> dict[str, Any]:
    """The status once everybody has greeted the restarted service; a round may be confirmed before that."""

    def complete() -> dict[str, Any]:
        code, status, _ = world.run("status", invite, "--json")
        assert code == 0
        return status if len(status["members"]) == num_members else {}

    found: dict[str, Any] = world.wait_for("every member is back", complete)
    return found


def check_ledger(before: list[tuple[str, int, int, str]], records: list[ledger.Record], results: list[dict[str, Any]]) -> None:
    """Nothing confirmed is lost, heights only grow by one, and every peer ended with the ledger's last anchors, bit for bit."""
    after = confirmed(records)
    assert after[: len(before)] == before, "a round that was confirmed before the kill is not in the ledger after it"
    heights: dict[str, int] = {}
    newest: dict[str, str] = {}
    for fragment, _, height, anchor in after:
        assert height == heights.get(fragment, 0) + 1, f"{fragment} jumped from height {heights.get(fragment, 0)} to {height}"
        heights[fragment], newest[fragment] = height, anchor
    assert not [r for r in records if isinstance(r, ledger.RolledBack)]
    assert heights["trunk/0"] >= NUM_ROUNDS
    for result in results:
        assert result["anchors"] == newest, f"{result['name']} ended with other anchors than the ledger's"


def check_model(world: Lab, invite: str) -> None:
    """The pulled model is what the ledger says and has learned: clearly below the loss of the genesis anchors."""
    code, pulled, err = world.run("pull", invite, str(world.root / "model"), "--json")
    assert code == 0, err
    assert pulled["heights"]["trunk/0"] >= NUM_ROUNDS
    code, result, err = world.run("eval", str(world.root / "model"), "--json")
    assert code == 0, err
    genesis = genesis_loss(world)
    assert result["loss"] < genesis - 0.5, f"{result['loss']:.3f} after training, {genesis:.3f} before"


def genesis_loss(world: Lab) -> float:
    """Held-out loss of the model the run began with, from the files init made."""
    from decentra.cli.look import evaluate_checkpoint
    from decentra.peer.checkpoint import assemble, save_model

    run = RunDir(world.root / "run")
    manifest = run.manifest()
    blobs = run.genesis_blobs(manifest)
    save_model(world.root / "genesis", assemble(manifest, {f: blobs[d] for f, d in manifest.genesis.items()}, {}))
    return float(evaluate_checkpoint(world.root / "genesis")["loss"])
