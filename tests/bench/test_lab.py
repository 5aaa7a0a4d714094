"""Checks of the learning lab itself: its swarm is the runtime's arithmetic, its schedule and its settings are what they say. Trains a toy model."""

from __future__ import annotations

import pytest
import torch

from decentra.errors import ConfigError
from decentra.ids import PeerId
from tests.bench.lab import Lab, build_swarm, lr_share, main, mean_loss, parse_settings, placements, run_alone, run_swarm

TINY = [
    "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16",
    "model.expert_hidden_size=8", "data.seq_len=16", "data.bytes_per_domain=20000", "data.held_out_bytes=2048",
    "train.batch_size=2", "rounds.inner_steps=4", "lab.steps=12", "lab.report_every=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _silent(line: str) -> None:
    pass


def test_a_lone_peer_with_exact_packets_is_the_model_alone() -> None:
    settings = ["codec.name=fp32", "placement.experts_per_peer=8", "lab.peers=1", "data.shared_fraction=0"]
    for delay_steps in (0, 2):
        manifest, lab = parse_settings([*TINY, *settings, f"lab.delay_steps={delay_steps}"])
        swarm_model, swarm = run_swarm(manifest, lab, _silent)
        alone = dict(run_alone(manifest, lab, "peer-0", manifest.data.domains[0], _silent).named_parameters())
        assert swarm.num_rounds == 3
        for name, parameter in swarm_model.named_parameters():
            torch.testing.assert_close(parameter, alone[name], atol=1e-5, rtol=1e-4)


def test_followed_experts_are_the_anchors_and_trained_ones_move() -> None:
    manifest, lab = parse_settings([*TINY, "lab.delay_steps=0"])
    swarm = build_swarm(manifest, lab)
    for step in range(1, 7):
        swarm.step()
        if step == 4:
            swarm.encode()
            swarm.adopt()
    for peer in swarm.peers:
        for fragment in swarm.layout.fragments:
            live_N = peer.inner.snapshot(fragment.id).live_N
            is_anchor = torch.allclose(live_N, swarm.anchors[fragment.id].anchor_N, atol=1e-6)
            assert is_anchor == (fragment.id not in peer.accounts), (peer.id, fragment.id)


def test_four_peers_give_every_expert_two_holders_and_no_two_peers_the_same_set() -> None:
    manifest, lab = parse_settings([])
    placed = placements(manifest, [PeerId(f"peer-{i}") for i in range(lab.peers)])
    for expert in range(manifest.model.num_experts):
        assert sum(expert in experts for experts in placed.values()) == 2
    assert len(set(placed.values())) == lab.peers


def test_training_lowers_the_loss_of_the_anchors() -> None:
    manifest, lab = parse_settings([*TINY, "lab.steps=80", "train.lr=1e-2"])
    before = mean_loss(build_swarm(manifest, lab).assembled(), manifest)
    assert mean_loss(run_swarm(manifest, lab, _silent)[0], manifest) < before - 0.5


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_learning_rate_falls_from_one_to_its_end(decay: str) -> None:
    lab = Lab(decay=decay, decay_from=0.5, decay_to=0.1)
    shares = [lr_share(i / 100, lab) for i in range(101)]
    assert shares[:51] == [1.0] * 51
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert shares[75] == pytest.approx(0.55)
    assert shares[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("pair", ["lab.stepz=3", "train.lrr=1", "nonsense"])
def test_an_unknown_setting_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="settings"):
        parse_settings([pair])


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["--json", "--seeds", "1", "--settings", *TINY, "lab.steps=4", "lab.delay_steps=0"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"median_loss_end", "median_loss_solo", "median_loss_solo_own", "median_loss_ddp_like"} <= summary.keys()
