"""Run by torchrun in two processes: rank 0 drives the inner loop as the trainer does, the other follows; prints what rank 0 saw as JSON.

    torchrun --standalone --nproc-per-node 2 two_ranks.py FOLDER

writes FOLDER/seen.json: the same run in one process and in two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from decentra.config import DataSpec, Manifest, ModelSpec, PeerConfig, TrainSpec
from decentra.data.windows import WindowSource, source_for
from decentra.delta.flat import gather
from decentra.ids import FragmentId, PeerId
from decentra.model.custom import layout_for
from decentra.model.decoder import build_model
from decentra.peer.inner import InnerLoop
from decentra.peer.sharded import LeadInner, Ranks, follow

MANIFEST = Manifest(
    name="small",
    model=ModelSpec(
        hidden_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=12, expert_hidden_size=15, num_experts=4, max_seq_len=32,
        aux_loss_weight=0.0,  # the only part of the loss that is no mean over rows
    ),
    data=DataSpec(seq_len=24, domains=("prose",), bytes_per_domain=20_000, held_out_bytes=1024),
    train=TrainSpec(batch_size=4, lr=5e-3, warmup_steps=5),
)  # fmt: skip
LAYOUT = layout_for(MANIFEST)
TRAINED = frozenset(FragmentId(f) for f in ("trunk/0", "router/0", "expert.0/0", "expert.2/0"))
MORE = TRAINED | {FragmentId("expert.1/0")}
NUM_STEPS = 4


def as_lessons(source: WindowSource) -> WindowSource:
    """The same windows, of which the first rows are learnt to a small part and the others whole: the ranks do not learn equally much."""
    whole = source.next_batch

    def next_batch(batch_size: int, *choice: Any) -> torch.Tensor:
        tokens_BT1 = whole(batch_size, *choice)
        is_read = torch.arange(tokens_BT1.shape[1]) < torch.tensor([20, 15, 0, 0])[:, None]
        return torch.where(is_read, ~tokens_BT1, tokens_BT1)

    source.next_batch = next_batch  # type: ignore[method-assign]
    return source


def drive(inner: InnerLoop) -> tuple[dict[str, object], bytes]:
    """Steps, a shift, another placement, a record that is restored, more steps; what one can see of it from outside, and the record."""
    for _ in range(NUM_STEPS):
        inner.step()
    trunk = FragmentId("trunk/0")
    before_N = inner.snapshot(trunk).live_N
    inner.shift(trunk, torch.full_like(before_N, 1e-3))
    moved = (inner.snapshot(trunk).live_N - before_N).mean().item()
    inner.set_trained(MORE)
    inner.step()
    record = inner.record()
    losses = [_stepped(inner) for _ in range(2)]
    inner.restore(record)
    again = [_stepped(inner) for _ in range(2)]
    inner.load(FragmentId("expert.3/0"), torch.zeros(LAYOUT[FragmentId("expert.3/0")].num_elements))
    live_N = inner.snapshot(trunk).live_N
    inner.load(trunk, torch.full_like(live_N, torch.nan))
    inner.step()
    inner.load(trunk, live_N)
    skipped = inner.num_skipped_steps
    inner.step()
    totals = inner.totals(0.0)
    live = {f.id: inner.snapshot(f.id).live_N.tolist() for f in LAYOUT.fragments}
    return {
        "moved": moved, "losses": losses, "again": again, "live": live, "num_tokens": totals.num_tokens,
        "expert_tokens": sorted(totals.expert_tokens.items()), "skipped": [skipped, inner.num_skipped_steps],
    }, record  # fmt: skip


def _stepped(inner: InnerLoop) -> float | None:
    inner.step()
    return inner.totals(0.0).loss_ema


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.start(0)
    if ranks.rank:
        follow(ranks, lambda manifest: (layout_for(manifest), build_model(manifest.model, manifest.seed)))
        ranks.close()
        return
    config = PeerConfig()
    parts: list[dict[str, object]] = []
    records = b""
    for kind in ("one", "two"):
        source, model = as_lessons(source_for(MANIFEST, config, PeerId("p"))), build_model(MANIFEST.model, MANIFEST.seed)
        start = {f.id: gather(dict(model.named_parameters()), f).tolist() for f in LAYOUT.fragments}
        if kind == "one":
            inner: InnerLoop = InnerLoop(MANIFEST, LAYOUT, model, source, torch.device("cpu"), TRAINED)
        else:
            inner = LeadInner(MANIFEST, LAYOUT, model, source, ranks, TRAINED)
        seen, record = drive(inner)
        parts.append({"start": start} | seen)
        if kind == "one":
            records = record
        else:  # a record that one process wrote
            inner.restore(records)
            parts[-1]["from_one"] = [_stepped(inner) for _ in range(2)]
        inner.close()
    ranks.tell("exit")
    ranks.close()
    (folder / "seen.json").write_text(json.dumps(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
