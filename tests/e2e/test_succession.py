"""A run goes on as another one: it ends with every round confirmed, its model gets experts, and its members follow by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import confirmed, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.protocol import ledger


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_gets_experts_and_its_members_follow(tmp_path: Path) -> None:
    """One peer waits in its process, one was stopped meanwhile and is started with the invite it has. Both keep their identity."""
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        waiting = world.member("join", invite, "waiting", "--experts", "0,1").start()
        stopped = world.member("join", invite, "stopped", "--max-steps", "100000").start()
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 2)

        new_dir = tmp_path / "next"
        code, refused, err = world.run("init", str(new_dir), "--after", str(run.root), "--json")
        assert (code, "give it as --model" in refused["error"]) == (2, True), err
        code, answer, err = world.run("stop", str(run.root), "--why", "it gets experts", "--pass-on", "--json")
        assert (code, answer["answer"]) == (0, "stopping: it gets experts"), err
        world.wait_for("both wait", lambda: all("goes on as another" in p.tail() for p in (waiting, stopped)))
        assert ctrl_c(stopped)[0] == 0
        peer = stopped.last_json()["peer"]
        status = world.run("status", invite, "--json")[1]
        assert status["is_stopped"]

        assert world.run("pull", invite, str(tmp_path / "last"), "--json")[0] == 0
        code, _, err = world.run("expand", str(tmp_path / "last"), str(tmp_path / "larger"), "--json")
        assert code == 0, err
        code, made, err = world.run(
            "init", str(new_dir), "--after", str(run.root), "--model", str(tmp_path / "larger"), "--set", "placement.frozen_experts=[0]", "--set",
            "placement.experts_per_peer=7", "--json",
        )  # fmt: skip
        assert code == 0, err
        manifest = RunDir(new_dir).manifest()
        assert (manifest.model.num_experts, manifest.rounds) == (8, run.manifest().rounds), "its rules are those of the run before"
        where = ("--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", "0", "--service-port", "0")
        succeeding = world.command("next-host", "host", str(new_dir), *where, "--json", "--log-json")
        onward = world.invite_of(succeeding.start())
        world.wait_for("the waiting one trains on", lambda: len(waiting.events("training")) == 2)
        stopped.start()
        world.wait_for("the stopped one trains on", lambda: len(stopped.events("training")) == 2)
        before = succeeding.heights()
        world.wait_for(
            "rounds with both", lambda: all(succeeding.heights().get(f, 0) > before.get(f, 0) for f in ("trunk/0", "expert.7/0"))
        )
        assert world.run("stop", str(new_dir), "--json")[0] == 0
        assert [p.exit_code(150) for p in (waiting, stopped)] == [0, 0], waiting.tail() + stopped.tail()
        for member in (waiting, stopped):
            assert member.last_json()["runs"] == [run.manifest().run_id(), made["run"]]
            assert 0 not in member.last_json()["experts"], "it is frozen"
        assert stopped.last_json()["peer"] == peer
        assert len(waiting.last_json()["experts"]) == 2, "as many as its owner chose"

        code, refused, _ = world.run("join", onward, "--dir", str(tmp_path / "waiting"), "--json")
        assert (code, "every run needs a directory of its own" in refused["error"]) == (2, True)
        status = world.run("status", onward, "--json")[1]
        assert 0 not in map(int, status["experts_short"])
        assert ctrl_c(succeeding)[0] == 0
        assert ctrl_c(host)[0] == 0
        records = ledger_records(run, tmp_path / "ledger")
        assert [r.run for r in records if isinstance(r, ledger.Succeeded)] == [made["run"]], "the ledger says where the run goes on"
        moved = {fragment for fragment, *_ in confirmed(ledger_records(RunDir(new_dir), tmp_path / "ledger-2"))}
        assert "expert.0/0" not in moved
        assert "expert.7/0" in moved, "the new experts are trained"
        world.assert_nothing_left()
