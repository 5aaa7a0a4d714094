"""``decentra demo`` as a person runs it, with a small model: a kill, a return, and every figure the README promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SMALL = (
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16", "model.expert_hidden_size=32",
    "data.seq_len=64", "train.batch_size=4", "rounds.inner_steps=8", "rounds.heartbeat_s=2", "rounds.lease_s=8",
)  # fmt: skip
FIELDS = {
    "ok", "num_peers", "num_experts", "experts_per_peer", "rounds_confirmed_trunk", "rounds_confirmed_min_expert", "rounds_abandoned", "rounds_thin",
    "seconds_to_first_confirmed", "loss_start", "loss_end", "anchors_equal", "peers_killed", "peers_rejoined", "tx_bytes_per_peer",
    "dense_bytes_per_peer", "sample", "plot",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_kills_a_peer_and_ends_with_one_model(tmp_path: Path) -> None:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "decentra.cli.main", "demo", "--json", "--rounds", "12", "--dir", str(tmp_path / "out"), *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= FIELDS
    assert result["ok"]
    assert result["anchors_equal"]
    assert (result["num_peers"], result["num_experts"], result["experts_per_peer"]) == (4, 8, 4)
    assert (result["peers_killed"], result["peers_rejoined"]) == (1, 1)
    assert result["rounds_confirmed_trunk"] >= 12
    assert result["loss_end"] < result["loss_start"] - 0.5
    assert len({tuple(e) for e in result["experts_of"].values()}) == 4  # each peer another subset
    assert all(sum(expert in e for e in result["experts_of"].values()) == 2 for expert in range(8))  # every expert on two of them
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert not left, left
