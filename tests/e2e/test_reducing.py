"""Reducers in real processes: three peers over p2p and gRPC, two of the roster merge every round, and all end at the same anchors."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ctrl_c, lab, ledger_records

from decentra.protocol import ledger

NUM_ROUNDS = 4  # of every fragment, with everybody there
NUM_FRAGMENTS = 6  # trunk, router, four experts


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_rounds_are_merged_and_every_peer_ends_with_the_same_anchors(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        settings = (
            "rounds.reduce_from=3",
            "codec.name=topk256",
            "placement.experts_per_peer=4",
            "outer.merge=contributors",
            "outer.clip=4",
        )
        run = world.init("rounds.gather_s=30", *settings)
        host = world.host(run)
        invite = world.invite_of(host.start())
        peers = [world.member("join", invite, f"peer-{i}", "--threads", "1").start() for i in range(3)]
        world.wait_for("everybody trains", lambda: all(p.events("training") for p in peers))
        before = host.heights()
        world.wait_for("rounds of everything", lambda: host.has_advanced(before, NUM_ROUNDS, NUM_FRAGMENTS), 120)
        assert world.run("stop", str(run.root), "--json")[0] == 0
        assert [p.exit_code(100) for p in peers] == [0] * 3
        anchors = [p.last_json()["anchors"] for p in peers]
        assert anchors[0] == anchors[1] == anchors[2]
        code, seconds = ctrl_c(host)
        assert (code, seconds < 5.0) == (0, True), host.tail()

        records = ledger_records(run, world.root / "ledger")
        settled = {(r.settlement.fragment, r.settlement.round): r.settlement for r in records if isinstance(r, ledger.Settled)}
        confirmed = [settled[r.fragment, r.round] for r in records if isinstance(r, ledger.Confirmed)]
        merged = [s for s in confirmed if s.merged is not None]
        assert {s.fragment for s in merged} == {s.fragment for s in confirmed}, "every fragment had rounds with reducers"
        assert all(s.merged for s in confirmed if len(s.entries) == 3), "whenever three were there"
        assert any(s.residual is not None for s in merged), "the rest of one merge went into the next"
        assert {r.fragment: r.anchor for r in records if isinstance(r, ledger.Confirmed)} == anchors[0]
        world.assert_nothing_left()
