"""A peer of two processes (torchrun, FSDP2 over gloo) beside a peer of one: both contribute to one run, and Ctrl-C ends all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from processes import Command, Lab, ctrl_c, lab

NUM_ROUNDS = 3
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def sharded(world: Lab, invite: str, name: str) -> Command:
    """``join`` under the launcher."""
    made = world.member("join", invite, name, "--threads", "1")
    made.prefix = (sys.executable, *LAUNCHER)
    return made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_are_one_peer(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        two, one = sharded(world, invite, "peer-two").start(), world.member("join", invite, "peer-one", "--threads", "1").start()
        world.wait_for("both train", lambda: all(p.events("training") for p in (one, two)))
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= NUM_ROUNDS, 120)
        _, status, _ = world.run("status", invite, "--json")
        both = {m["peer"] for m in status["members"] if m["role"] == "trainer"}
        world.wait_for("both are settled", lambda: set(world.run("history", invite, "--json")[1]["tokens_per_peer"]) == both, 60)
        assert world.run("stop", str(run.root), "--json")[0] == 0
        assert [p.exit_code(100) for p in (one, two)] == [0, 0], two.tail()
        results = [p.last_json() for p in (one, two)]
        assert results[0]["anchors"] == results[1]["anchors"], "bit-equal, however many processes a peer has"
        assert min(r["num_steps"] for r in results) > 0
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ctrl_c_ends_all_processes_of_a_peer(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        host = world.host(world.init())
        two = world.member("join", world.invite_of(host.start()), "peer-two", "--processes", "2").start()
        world.wait_for("it trains", lambda: bool(two.events("training")))
        two.group_signal(2)
        code = two.exit_code(40)
        assert code == 0, two.tail()
        assert two.last_json()["why"] == "Ctrl-C"
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()
