"""Machines too small for the model: each holds the experts that fit, under a limit the kernel enforces, and together they train all of it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from processes import lab

NUM_ROUNDS = 2
# 12 M parameters, nearly all of them experts': one with all of them needs 0.6 GiB more than one with two
WIDE = (
    "model.hidden_size=128", "model.num_layers=4", "model.head_dim=16", "model.num_heads=4", "model.num_experts=8", "model.expert_hidden_size=1024",
    "train.batch_size=2", "rounds.inner_steps=2", "codec.name=topk64", "rounds.cut_off_s=30", "rounds.grace_s=30", "rounds.attest_s=30",
)  # fmt: skip
LIMIT_BYTES = 1500 << 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_fits_into_no_machine_is_trained(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init(*WIDE, "placement.mode=held", "placement.experts_per_peer=8", "placement.holders=1")
        host = world.host(run)
        invite = world.invite_of(host.start())
        whole = world.member("join", invite, "whole", "--num-experts", "8", "--threads", "1")
        whole.limits = {resource.RLIMIT_DATA: LIMIT_BYTES}
        assert whole.start().exit_code(60) == 2
        assert "8 experts of this run need" in whole.err
        assert "is enough for" in whole.err

        peers = [world.member("join", invite, f"peer-{i}", "--threads", "1") for i in range(3)]
        for peer in peers:
            peer.limits = {resource.RLIMIT_DATA: LIMIT_BYTES}
            peer.start()
        world.wait_for("all train", lambda: all(p.events("training") for p in peers), 90)
        held = [set(p.events("training")[-1]["experts"]) for p in peers]
        assert all(0 < len(h) < 8 for h in held), "what the run gives a peer is more than fits"
        assert set.union(*held) == set(range(8)), "together they hold the whole model"
        assert all(p.events("capacity") for p in peers), "and it is said"
        modules = 10  # trunk, router and eight experts
        world.wait_for("rounds of everything", lambda: sum(h >= NUM_ROUNDS for h in host.heights().values()) == modules, 150)
        assert world.run("stop", str(run.root), "--json")[0] == 0
        assert [p.exit_code(100) for p in peers] == [0, 0, 0]
