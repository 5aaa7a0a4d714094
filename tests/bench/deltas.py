"""Real pseudo-gradients to measure codecs on: a model of ten million parameters trains a few rounds with error feedback. Kept in the user's cache.

What is kept is what an encoder sees in the last round: beta * residual + (anchor - live), per fragment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decentra.config import Manifest, PeerConfig, parse_config
from decentra.data.windows import source_for
from decentra.delta.account import Account
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.flat import gather
from decentra.ids import FragmentId, PeerId, digest_of
from decentra.model.decoder import Decoder, build_model
from decentra.modules import Layout, build_layout
from decentra.peer.inner import InnerLoop

SHAPE: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "expert_hidden_size": 256, "num_experts": 8,
}  # fmt: skip
WARMUP_STEPS, INNER_STEPS, NUM_ROUNDS, BETA = 20, 10, 4, 0.95
CODEC = "topk64"


def bench_manifest(**model: Any) -> Manifest:
    """10.9 million parameters unless ``model`` says otherwise."""
    return parse_config(Manifest, {"name": "bench", "model": SHAPE | model, "train": {"lr": 1e-3}}, "bench")


def layout_of(manifest: Manifest) -> Layout:
    with torch.device("meta"):
        model = Decoder(manifest.model)
    return build_layout([(name, tuple(p.shape)) for name, p in model.named_parameters()])


def pseudo_gradients(manifest: Manifest) -> dict[FragmentId, Tensor]:
    """fp32 [N] per fragment; trained on the first call (about a minute), read from the cache afterwards."""
    settings = (manifest.run_id(), WARMUP_STEPS, INNER_STEPS, NUM_ROUNDS, BETA, CODEC)
    path = Path(platformdirs.user_cache_dir("decentra")) / f"deltas-{digest_of(repr(settings).encode())[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({str(name): values_N for name, values_N in _trained(manifest).items()}, path)
    return {FragmentId(name): values_N for name, values_N in load_file(path).items()}


def _trained(manifest: Manifest) -> dict[FragmentId, Tensor]:
    layout, model = layout_of(manifest), build_model(manifest.model, manifest.seed)
    everything = frozenset(f.id for f in layout.fragments)
    source = source_for(manifest, PeerConfig(), PeerId("bench"))
    inner = InnerLoop(manifest, layout, model, source, torch.device("cpu"), everything)
    _train(inner, WARMUP_STEPS)
    accounts = {}
    for fragment in layout.fragments:
        state = AnchorState(gather(dict(model.named_parameters()), fragment))
        accounts[fragment.id] = Account(fragment, state, anchor_digest(encode_anchor(fragment, state)))
    seen: dict[FragmentId, Tensor] = {}
    for number in range(1, NUM_ROUNDS + 1):
        _train(inner, INNER_STEPS)
        for name, account in accounts.items():
            live_N = inner.snapshot(name).live_N
            seen[name] = BETA * account.residual_N + (account.anchor_state.anchor_N - live_N)
            pending = account.encode(number, live_N, CODEC, BETA, 0, 0)
            sent_N = pending.residual_before_N * BETA + (account.anchor_state.anchor_N - live_N) - pending.residual_after_N
            state = AnchorState(account.anchor_state.anchor_N - sent_N)
            inner.shift(name, account.applied(state, anchor_digest(encode_anchor(account.fragment, state))))
        print(f"pseudo-gradients: round {number} of {NUM_ROUNDS}, loss {inner.totals(0).loss_ema:.3f}", file=sys.stderr, flush=True)
    return seen


def _train(inner: InnerLoop, num_steps: int) -> None:
    for _ in range(num_steps):
        inner.step()
