"""Before joining and after training: what a plan says is measured and costs the run nothing; what history says is the ledger."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from cli_world import decentra
from processes import ctrl_c, lab

MODEL = ("model.hidden_size=64", "model.expert_hidden_size=256")  # anchors of a megabyte, so that a download can be measured


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_plan_then_join_then_history(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init(*MODEL, "placement.mode=held", "codec.name=int8", "codec.sparsest=topk32")
        host = world.host(run)
        invite = world.invite_of(host.start())
        here = ("--dir", str(tmp_path / "peer"), "--name", "peer")
        planning = world.command("plan", "plan", invite, *here, "--up", "1mbit", "--memory", "2GiB", "--json")
        assert planning.start().exit_code(90) == 0, planning.tail()
        found = planning.last_json()
        assert (found["experts"], found["experts_fit"], found["mode"]) == (2, 4, "held")
        assert found["address"] == "127.0.0.1"
        assert found["fetched_bytes"] > 400_000
        assert found["down_mbit"] > 1
        assert 0 < found["step_s"] < 10
        assert found["num_trainers"] == 1
        assert found["up_bytes_per_round"] <= 125_000 * found["round_s"] or found["codec"] == "topk32"
        _, status, _ = world.run("status", invite, "--json")
        assert [m["role"] for m in status["members"]] == ["keeper"], "nobody has joined"

        small = world.command("small", "plan", invite, *here, "--memory", "500MiB", "--json")
        assert small.start().exit_code(60) == 2
        assert "MiB too few for one expert" in small.err

        peer = world.member("join", invite, "peer", "--threads", "1").start()
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 3 and len(host.heights()) == 4, 120)
        asked = "history", invite, "--compare", "--json"
        world.wait_for("members say what they were told", lambda: world.run(*asked)[1]["num_compared"] > 0, 60)
        table, picture = tmp_path / "rounds.csv", tmp_path / "experts.png"
        code, told, err = world.run("history", invite, "--csv", str(table), "--plot", str(picture), "--json")
        assert code == 0, err
        rows = list(csv.DictReader(table.open()))
        assert len(rows) == told["rounds_confirmed"] >= 5
        assert [sum(int(r["num_tokens"]) for r in rows if r["fragment"] == f"expert.{e}/0") for e in range(4)] == told["tokens_per_expert"]
        assert set(told["tokens_per_peer"]) == {
            next(m["peer"] for m in world.run("status", invite, "--json")[1]["members"] if m["name"] == "peer")
        }
        assert picture.stat().st_size > 5_000
        shown = decentra("history", invite)
        assert shown.code == 0, shown.err
        assert "words of members checked, 0 unsigned" in shown.out
        assert ctrl_c(peer)[0] == 0
        assert peer.last_json()["rx_bytes"] < found["fetched_bytes"] / 2, "what plan fetched is here"
        doctor = world.command("doctor", "doctor", invite, "--json")
        assert doctor.start().exit_code(120) == 0, doctor.tail()
        (reach,) = [c for c in doctor.last_json()["checks"] if c["check"] == "reachability"]
        assert "127.0.0.1" in reach["found"]
        assert reach["level"] == "ok"
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()
