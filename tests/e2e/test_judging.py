"""One of four peers trains against the others: they see it by their own loss, it is put into quarantine, and the run goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import TINY, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.protocol import ledger

MODEL = Path(__file__).parents[2] / "peers" / "bring_your_own_model.py"
# The same bytes for everybody, as the manifest's hash demands; who climbs the loss instead of descending it, says its environment.
CLIMBING = """
import os

_whole_build = build


def build(spec, seed):
    model = _whole_build(spec, seed)
    if "CLIMB" in os.environ:
        def climb(parameter):
            parameter.register_hook(lambda gradient: -gradient)
        for parameter in model.parameters():
            climb(parameter)
    return model
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_liar_is_put_into_quarantine_and_the_honest_are_not(tmp_path: Path) -> None:
    code_file = tmp_path / "model.py"
    code_file.write_text(MODEL.read_text() + CLIMBING)
    rules = (*TINY, "judging.share=0.2", "judging.quarantine_rounds=1000", "placement.experts_per_peer=4")
    settings = [part for setting in rules for part in ("--set", setting)]
    own = ("--model-code", str(code_file))
    with lab(tmp_path) as world:
        code, _, err = world.run("init", str(tmp_path / "run"), *own, *settings, "--json")
        assert code == 0, err
        run = RunDir(tmp_path / "run")
        host = world.host(run, *own)
        invite = world.invite_of(host.start())
        honest = [world.member("join", invite, name, *own) for name in ("one", "two", "three")]
        liar = world.member("join", invite, "liar", *own)
        liar.env["CLIMB"] = "1"
        for peer in (*honest, liar):
            peer.start()
        world.wait_for("the liar is condemned", lambda: host.events("quarantined"), 120)
        height = host.heights().get("trunk/0", 0)
        world.wait_for("the others go on", lambda: host.heights().get("trunk/0", 0) >= height + 4, 120)
        status = world.run("status", invite, "--json")[1]
        told = {m["name"]: m["quarantine"] for m in status["members"] if m["role"] == "trainer"}
        assert "does not help" in told.pop("liar")
        assert not any(told.values()), told
        assert sum(bool(p.events("objected")) for p in honest) >= 2, "a third may have come when it was over"
        for peer in (*honest, liar):
            assert ctrl_c(peer)[0] == 0
        assert liar.last_json()["ok"]
        assert honest[0].last_json()["loss"] < 3.5
        assert ctrl_c(host)[0] == 0
        records = ledger_records(run, tmp_path / "ledger")
        assert {r.peer for r in records if isinstance(r, ledger.Quarantined)} == {liar.last_json()["peer"]}
        since = [
            r
            for r in records[next(i for i, r in enumerate(records) if isinstance(r, ledger.Quarantined)) :]
            if isinstance(r, ledger.Opened)
        ]
        assert all(liar.last_json()["peer"] not in r.holders for r in since), "of any module"
        world.assert_nothing_left()
