"""A service goes on from an older copy of its ledger as if nothing was: members, who were told otherwise, have it in writing and leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import ctrl_c, lab

from decentra.identity import load_key
from decentra.peer.stories import EVIDENCE_FILE
from decentra.protocol.messages import Told
from decentra.wire.frames import is_told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def test_a_ledger_that_was_set_back_is_found_out_by_a_member_alone(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        peer = world.member("join", invite, "peer").start()
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 2)
        host.kill()
        backup = {file.name: file.read_bytes() for file in run.host.glob("ledger.db*")}
        world.host_again(host, run, invite)
        world.wait_for("more rounds", lambda: host.heights().get("trunk/0", 0) >= 4)
        host.kill()
        for file in run.host.glob("ledger.db*"):
            file.unlink()
        for name, data in backup.items():
            (run.host / name).write_bytes(data)
        world.host_again(host, run, invite)
        assert peer.exit_code(90) == 5, peer.tail()
        assert "told two stories" in peer.tail()
        assert "--take-over" in peer.tail()
        (evidence,) = world.root.rglob(EVIDENCE_FILE)
        words = [Told(**{**one, "proof": bytes.fromhex(one["proof"])}) for one in json.loads(evidence.read_text())["told"]]
        service = load_key(run.host / "service.key").public
        assert all(is_told(word, run.manifest().run_id(), service) for word in words)
        assert words[0].line != words[1].line
        # it does not go on where it knows better, until another term says that a ledger was lost
        assert peer.start().exit_code(60) == 5
        assert "an earlier process of this peer found out" in peer.tail()
        ctrl_c(host)
        world.assert_nothing_left()
