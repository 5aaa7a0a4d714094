"""A liar was in: its run's ledger is replayed to the moment before, and its members go on from there."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import decentra
from processes import TINY, ctrl_c, lab, ledger_records
from test_judging import CLIMBING, MODEL

from decentra.cli.rundir import RunDir
from decentra.protocol import ledger


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_goes_on_from_before_a_liar_came(tmp_path: Path) -> None:
    code_file = tmp_path / "model.py"
    code_file.write_text(MODEL.read_text() + CLIMBING)
    own = ("--model-code", str(code_file))
    settings = [part for setting in (*TINY, "placement.experts_per_peer=4") for part in ("--set", setting)]
    with lab(tmp_path) as world:
        code, _, err = world.run("init", str(tmp_path / "run"), *own, *settings, "--json")
        assert code == 0, err
        run = RunDir(tmp_path / "run")
        host = world.host(run, *own, "--archive-every", "4")
        invite = world.invite_of(host.start())
        honest, liar = (world.member("join", invite, name, *own) for name in ("honest", "liar"))
        liar.env["CLIMB"] = "1"
        honest.start()
        world.wait_for("rounds without the liar", lambda: host.heights().get("trunk/0", 0) >= 6)
        liar.start()
        world.wait_for("it is in", lambda: liar.events("training"))
        height = host.heights()["trunk/0"]
        world.wait_for("rounds with the liar", lambda: host.heights()["trunk/0"] >= height + 10)
        assert world.run("pull", invite, str(tmp_path / "dirty"), *own, "--json")[0] == 0
        peer = next(m["peer"] for m in world.run("status", invite, "--json")[1]["members"] if m["name"] == "liar")
        assert world.run("revoke", str(run.root), peer, "--json")[0] == 0
        world.wait_for("it is out", lambda: not liar.is_running)

        audited = decentra("replay", str(run.root), *own, "--json").json
        assert audited["rounds_equal"] >= 6 * 12, audited
        assert audited["rounds_not_kept"] == 0, audited
        unknown = decentra("rollback", str(run.root), "--before", "nobody", *own)
        unknown.refused(2, "no member of this run; names here: honest, host")
        replayed = decentra("replay", str(run.root), "--before", "liar", "--out", str(tmp_path / "clean"), *own, "--json").json
        assert replayed["before"] == [peer]
        losses = {name: decentra("eval", str(tmp_path / name), *own, "--json").json["loss"] for name in ("dirty", "clean")}
        assert losses["clean"] < losses["dirty"], "what it climbed is gone"
        replayed = decentra("replay", str(run.root), "--without", peer, *own, "--json").json
        assert replayed["rounds_that_stay"] == 0
        assert replayed["rounds_changed"] >= 6

        rolled = decentra("rollback", str(run.root), "--before", peer, *own, "--json").json
        assert rolled["fragments_moved"] == len(rolled["fragments"])
        assert {e["fragment"] for e in host.events("rolled-back")} == {f["fragment"] for f in rolled["fragments"]}
        num_rounds = len(host.events("round-confirmed"))
        world.wait_for("it goes on", lambda: len(host.events("round-confirmed")) >= num_rounds + 12)
        decentra("rollback", str(run.root), "--to", "100000", *own).refused(2, "the trunk never had 100000 confirmed rounds")
        assert ctrl_c(honest)[0] == 0
        assert ctrl_c(host)[0] == 0
        records = ledger_records(run, tmp_path / "ledger")
        last_back = max(i for i, r in enumerate(records) if isinstance(r, ledger.RolledBack))
        since = [r for r in records[last_back:] if isinstance(r, ledger.Settled)]
        assert since
        assert all(e.peer != peer for r in since for e in r.settlement.entries)
        assert decentra("replay", str(run.root), *own, "--json").json["rounds_not_kept"] == 0
        assert decentra("verify", str(run.root), "--json").code == 0
        world.assert_nothing_left()
