"""The organiser's machine is gone for good: another one, which kept a copy of the ledger in step, serves the run on, and members find it by themselves.

Taking over from a service that lives, and what may go wrong: tests/integration/cli/test_standby.py.
"""

from __future__ import annotations

import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
from processes import Command, Lab, confirmed, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.invite import parse_invite
from decentra.protocol import ledger
from decentra.protocol.fragment import TERM_GAP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]
NUM_PEERS = 3
MAX_BATCH_RECORDS = 24  # of one commit of this small run


def start(world: Lab) -> tuple[RunDir, RunDir, Command, list[Command], str]:
    """(the run, the second machine's folder without any state, host, peers, where the service is), with a few rounds done."""
    run = world.init()
    second = RunDir(world.root / "second")
    shutil.copytree(run.root, second.root)
    host = world.host(run)
    invite = world.invite_of(host.start())
    service = parse_invite(invite).services[0]
    peers = [world.member("join", invite, f"peer-{i}", "--verbose").start() for i in range(NUM_PEERS)]
    world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 2)
    return run, second, host, peers, service


def keep_copy(world: Lab, second: RunDir, service: str) -> Command:
    standby = world.command("standby", "averager", str(second.root), "--standby", "--service", service, "--log-json").start()
    world.wait_for("the copy is in step", lambda: standby.events("copy-in-step"))
    return standby


def second_host(world: Lab, second: RunDir) -> Command:
    host = world.host(second, "--take-over")
    host.name = "second-host"
    return host.start()


def test_a_copy_takes_over_from_a_machine_that_is_gone(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run, second, host, peers, service = start(world)
        standby = keep_copy(world, second, service)
        height = host.heights()["trunk/0"]
        world.wait_for("rounds with a copy", lambda: host.heights()["trunk/0"] >= height + 3)
        host.kill()
        told = {(e["fragment"], e["round"], e["anchor"]) for p in peers for e in p.events("committed")}
        gone = ledger_records(run, tmp_path / "gone")
        assert ctrl_c(standby)[0] == 0
        new = second_host(world, second)
        world.wait_for("rounds at the second machine", lambda: new.heights().get("trunk/0", 0) >= height + 6, 90)

        # the first machine comes back and does not know: nobody follows it, and it finds out
        line = parse_invite(host.last_json()["invite"])
        back = world.host(run, bootstrap_port=int(line.bootstrap[0].split("/")[4]), service_port=int(service.rpartition(":")[2])).start()
        assert back.exit_code(90) == 4, back.tail()
        assert "another machine has taken the run over" in back.tail()
        height = new.heights()["trunk/0"]
        world.wait_for("rounds go on", lambda: new.heights()["trunk/0"] >= height + 2)
        assert [ctrl_c(p)[0] for p in peers] == [0] * NUM_PEERS
        ctrl_c(new)
        world.assert_nothing_left()
        records = ledger_records(second, tmp_path / "kept")
        known = {(f, digest) for f, _, _, digest in confirmed(records)}
        for peer in peers:
            assert set(peer.last_json()["anchors"].items()) <= known

    # nothing that members were told of is lost, and no round number of the old term is used again
    kept = {(r.fragment, r.round, r.anchor[:12]) for r in records if isinstance(r, ledger.Confirmed)}
    assert told <= kept
    num_common = next((i for i, (a, b) in enumerate(zip(gone, records, strict=False)) if a != b), len(gone))
    assert len(gone) - num_common <= MAX_BATCH_RECORDS, "more than what the service was just writing, and had told nobody, is missing"
    terms = [r.term for r in records if isinstance(r, ledger.Certified)]
    assert terms[0] == 1
    assert len(set(terms)) == 2
    assert terms[-1] > time.time() - 3600, "terms are Unix seconds"
    numbers = [r.round for r in records if isinstance(r, ledger.Opened) and r.fragment == "trunk/0"]
    assert max(b - a for a, b in pairwise(numbers)) == TERM_GAP + 1
    said = world.run("verify", str(second.root), "--json")
    assert said[0] == 0, said
    assert said[1]["term"] == terms[-1]
    assert said[1]["num_records"] >= len(records)
