"""A volunteer's machine is not ours: pause frees it within seconds, the peer keeps its place and its steps, and resume goes on with both."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from processes import ctrl_c, lab


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_paused_peer_leaves_and_comes_back_by_itself(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        other = world.member("join", invite, "other", "--threads", "1").start()
        peer = world.member("join", invite, "peer", "--threads", "1", "--nice", "5").start()
        world.wait_for("both train", lambda: all(p.events("training") for p in (other, peer)))
        before = host.heights()
        world.wait_for("rounds of the trunk", lambda: host.heights().get("trunk/0", 0) >= before.get("trunk/0", 0) + 3)
        assert peer.popen is not None
        process = psutil.Process(peer.popen.pid)
        assert process.nice() == 5
        experts = peer.events("placed-here")[-1]["experts"]

        where = ("--dir", str(world.root / "peer"))
        code, said, _ = world.run("pause", invite, *where, "--json")
        assert (code, said["is_paused"], said["is_running"]) == (0, True, True)
        world.wait_for("it has left", lambda: bool(peer.events("paused")))
        assert "owner" in peer.events("paused")[0]["why"]
        assert not process.children(), "its p2p daemon is gone, too"
        before = host.heights()
        world.wait_for("rounds go on without it", lambda: host.heights()["trunk/0"] >= before["trunk/0"] + 3)

        assert world.run("resume", invite, *where, "--json")[0] == 0
        world.wait_for("it trains again", lambda: len(peer.events("training")) == 2)
        assert peer.events("placed-here")[-1]["experts"] == experts, "its place was kept"
        assert peer.events("resumed")[-1]["num_steps"] > 0
        world.wait_for("it takes part again", lambda: len(peer.events("service-connected")) == 2)

        assert world.run("pause", invite, *where)[0] == 0
        world.wait_for("it has left again", lambda: len(peer.events("paused")) == 2)
        code, seconds = ctrl_c(peer)
        assert (code, seconds < 5.0) == (0, True), peer.tail()
        assert peer.last_json()["num_steps"] > 0
        for one in (other, host):
            assert ctrl_c(one)[0] == 0
        world.assert_nothing_left()
