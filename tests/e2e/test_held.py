"""Peers that hold only the experts they train, in real processes: what they have, who takes over from one that is killed, and a mirroring peer beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import ctrl_c, lab, ledger_records

from decentra.ids import FragmentId, PeerId, expert_of, module_of_fragment
from decentra.protocol import ledger

NUM_ROUNDS = 3
NUM_FRAGMENTS = 6  # trunk, router, four experts
ALONE_S = 4


def experts_in(fragments: object) -> set[int]:
    assert isinstance(fragments, dict | list)
    return {e for f in fragments if (e := expert_of(module_of_fragment(FragmentId(f)))) is not None}


def num_rounds_until_adopted(records: Sequence[ledger.Record], victim: PeerId) -> int:
    """Rounds of the trunk that were settled without ``victim`` and confirmed before somebody was given all four experts."""
    offered: dict[int, bool] = {}
    num_rounds = 0
    for record in records:
        if isinstance(record, ledger.Settled) and record.settlement.fragment == "trunk/0":
            offered[record.settlement.round] = any(entry.peer == victim for entry in record.settlement.entries)
        if isinstance(record, ledger.Confirmed) and record.fragment == "trunk/0":
            num_rounds = 0 if offered[record.round] else num_rounds + 1
        if isinstance(record, ledger.Placed) and len(record.experts) == 4:
            return num_rounds
    raise AssertionError("nobody was given the dead peer's experts")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_peer_has_only_what_it_trains_and_takes_over_from_the_dead(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init(
            "placement.mode=held", "placement.experts_per_peer=2", "placement.adopt_rounds=1", "placement.adopt_s=600",
            f"rounds.gather_s={ALONE_S}",
        )  # fmt: skip
        host = world.host(run)
        invite = world.invite_of(host.start())
        first, second = (world.member("join", invite, f"peer-{i}", "--threads", "1").start() for i in range(2))
        world.wait_for("both train", lambda: all(p.events("training") for p in (first, second)))
        own, others = (set(p.events("placed-here")[-1]["experts"]) for p in (first, second))
        assert (len(own), len(others), own | others) == (2, 2, {0, 1, 2, 3})
        before = host.heights()
        world.wait_for("rounds of all experts", lambda: host.has_advanced(before, NUM_ROUNDS, NUM_FRAGMENTS), 120)

        first.kill()
        world.wait_for(
            "the dead peer's experts are trained by the other", lambda: set(second.events("placed-here")[-1]["experts"]) == {0, 1, 2, 3}
        )
        before = host.heights()
        world.wait_for("rounds of all experts again", lambda: host.has_advanced(before, NUM_ROUNDS, NUM_FRAGMENTS), 120)
        mirror = world.member("join", invite, "peer-2", "--threads", "1", "--mode", "mirror").start()
        world.wait_for("a mirroring peer trains, too", lambda: bool(mirror.events("training")))
        first.start()
        world.wait_for("the dead peer is back", lambda: len(first.events("training")) == 2)
        before = host.heights()
        world.wait_for("rounds with all three", lambda: host.has_advanced(before, NUM_ROUNDS, NUM_FRAGMENTS), 120)

        assert world.run("stop", str(run.root), "--json")[0] == 0
        assert [p.exit_code(100) for p in (first, second, mirror)] == [0, 0, 0]
        anchors = [p.last_json()["anchors"] for p in (first, second, mirror)]
        assert [experts_in(mine) for mine in anchors] == [own, {0, 1, 2, 3}, {0, 1, 2, 3}], "nothing else is in its process"
        code, seconds = ctrl_c(host)
        assert (code, seconds < 5.0) == (0, True), host.tail()
        records = ledger_records(run, world.root / "ledger")
        assert num_rounds_until_adopted(records, victim=PeerId(str(first.last_json()["peer"]))) <= 2
        confirmed = {r.fragment: r.anchor for r in records if isinstance(r, ledger.Confirmed)}
        for mine in anchors:
            assert mine == {f: confirmed[FragmentId(f)] for f in mine}, json.dumps(mine)
        world.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_who_leaves_for_good_hands_its_experts_over_and_who_is_paused_keeps_them(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init("placement.mode=held", "placement.experts_per_peer=2", "placement.adopt_s=600", f"rounds.gather_s={ALONE_S}")
        host = world.host(run)
        invite = world.invite_of(host.start())
        first, second = (world.member("join", invite, f"peer-{i}", "--threads", "1").start() for i in range(2))
        world.wait_for("both train", lambda: all(p.events("training") for p in (first, second)))
        assert world.run("pause", invite, "--name", "peer-0", "--dir", str(tmp_path / "peer-0"), "--json")[0] == 0
        world.wait_for("it has left", lambda: bool(first.events("paused")))
        before = host.heights().get("trunk/0", 0)
        world.wait_for("the other goes on alone", lambda: host.heights().get("trunk/0", 0) >= before + 2)
        assert len(second.events("placed-here")[-1]["experts"]) == 2, "it comes back, so its experts are its own"
        assert world.run("resume", invite, "--name", "peer-0", "--dir", str(tmp_path / "peer-0"), "--json")[0] == 0
        world.wait_for("it is back", lambda: len(first.events("service-connected")) == 2)
        assert ctrl_c(first)[0] == 0
        world.wait_for("its experts are the other's at once", lambda: len(second.events("placed-here")[-1]["experts"]) == 4)
        before = host.heights()
        world.wait_for("all experts go on", lambda: host.has_advanced(before, 1, NUM_FRAGMENTS), 60)
        assert [ctrl_c(p)[0] for p in (second, host)] == [0, 0]
        world.assert_nothing_left()
