"""The benchmarks' own arithmetic: what they report is what they say. Small models; nobody's speed is judged."""

from __future__ import annotations

import torch

from decentra.config import Manifest, parse_config
from tests.bench import all as everything
from tests.bench.codec import measure
from tests.bench.deltas import layout_of
from tests.bench.lab import Lab
from tests.bench.learning import Cache, Method, ddp_bytes, plot, table

TINY = {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "expert_hidden_size": 64, "num_experts": 2}
SETTINGS = (
    "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16", "model.expert_hidden_size=8",
    "data.seq_len=16", "data.bytes_per_domain=20000", "data.held_out_bytes=2048", "train.batch_size=2", "lab.eval_windows=4",
)  # fmt: skip


def test_the_codec_benchmark_counts_whole_packets() -> None:
    layout = layout_of(parse_config(Manifest, {"name": "b", "model": TINY}, "test"))
    deltas = {f.id: torch.randn(f.num_elements, generator=torch.Generator().manual_seed(1)) for f in layout.fragments}
    row = measure(layout, deltas, "topk64")
    assert row["roundtrip_exact"]
    assert abs(row["index_bits"] - row["index_bound_bits"]) < 0.2
    assert row["bits_per_param"] < row["bits_per_param_model"] < 1.0
    assert row["times_smaller_than_fp32"] == 32 / row["bits_per_param_model"]
    dense = measure(layout, deltas, "fp32")
    assert 32.0 < dense["bits_per_param_model"] < 32.5


def test_the_learning_table_compares_what_it_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    methods = (
        Method("alone", "solo"),
        Method("big batch", "ddp"),
        Method("int8", "swarm", ("codec.name=int8", "rounds.inner_steps=4")),
        Method("fp32", "swarm", ("codec.name=fp32", "rounds.inner_steps=4")),
    )
    rows = {r["method"]: r for r in table(methods, [1, 2], 8, SETTINGS, lambda _: None, Cache(tmp_path / "cache"))}
    again = table(methods, [1, 2], 8, SETTINGS, lambda _: None, Cache(tmp_path / "cache"))
    assert again == list(rows.values())
    assert rows["alone"]["gap_closed"] == 0.0
    assert rows["big batch"]["gap_closed"] == 1.0
    assert rows["big batch"]["bytes_ratio_to_ddp"] == 1.0
    assert 3.5 < rows["fp32"]["bytes_per_peer"] / rows["int8"]["bytes_per_peer"] < 4.0
    assert rows["int8"]["loss_sem"] > 0
    assert ddp_bytes(Lab(), 100, 8) == 2 * 3 / 4 * 4 * 100 * 8
    plot(list(rows.values()), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_whole_table_says_what_failed() -> None:
    rows = everything.table(
        {"codec": {"failed": "out of memory"}, "control": {"num_peers": 8, "p50_ms": 1, "p95_ms": 2, "cpu_s_per_round": 3}}
    )
    assert rows[0] == ("codec", "failed", "out of memory")
    assert rows[1][1] == "p50 1 ms, p95 2 ms"
