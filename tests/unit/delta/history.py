"""Three peers that pull one fragment towards targets of their own: the parameter history that must never change by accident.

``python tests/unit/delta/history.py`` from the repository root rewrites tests/golden/history.json; say in the commit why the bits moved.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from decentra.delta.account import Account, account_from_record, to_record
from decentra.delta.aggregate import aggregate, float_bits
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.golden import golden_values
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet
from decentra.delta.raw import float_bytes
from decentra.ids import FragmentId, PeerId, digest_of
from decentra.modules import build_layout

HISTORY = Path(__file__).parents[2] / "golden" / "history.json"
PEERS = tuple(PeerId(name) for name in ("ada", "bob", "cyd"))
SETTLED = ("ada bob cyd", "ada bob cyd", "ada cyd", "", "ada bob cyd", "bob", "ada bob", "ada bob cyd")  # "": the round is void
FRAGMENT = build_layout([("norm", (12,)), ("up", (24, 12)), ("down", (12, 24))])[FragmentId("trunk/0")]
NUM_INNER_STEPS = 4


def swarm_history() -> list[dict[str, object]]:
    """Per round: who was in, the anchor's digest and the digest of the three residuals."""
    num = FRAGMENT.num_elements
    state = AnchorState(torch.zeros(num))
    digest = anchor_digest(encode_anchor(FRAGMENT, state))
    # golden values start with 4096 tiny ones; targets are of ordinary size
    targets = {p: golden_values(4096 + num, i + 1)[4096:] for i, p in enumerate(PEERS)}
    accounts = {p: Account(FRAGMENT, state, digest) for p in PEERS}
    lives = dict.fromkeys(PEERS, state.anchor_N)
    history: list[dict[str, object]] = []
    for round, names in enumerate(SETTLED, start=1):
        settled = [p for p in PEERS if p in names.split()]
        for p in PEERS:
            for _ in range(NUM_INNER_STEPS):
                lives[p] = torch.sub(lives[p], torch.mul(torch.sub(lives[p], targets[p]), 0.125))
            accounts[p].encode(round, lives[p], "int8", 1.0, 64, NUM_INNER_STEPS)
            accounts[p] = account_from_record(FRAGMENT, to_record(accounts[p]), accounts[p].anchor_state)
        if settled:
            deltas = {p: decode_packet(pending.packet, FRAGMENT) for p in settled if (pending := accounts[p].pending)}
            mean_N = aggregate(deltas, dict.fromkeys(deltas, float_bits(1 / len(deltas))))
            state = outer_step(state, mean_N, rule="nesterov", lr_bits=float_bits(0.7), momentum_bits=float_bits(0.6))
            digest = anchor_digest(encode_anchor(FRAGMENT, state))
        for p in PEERS:
            if not settled:
                accounts[p].cancelled()
            else:
                shift_N = accounts[p].applied(state, digest) if p in settled else accounts[p].excluded(state, digest)
                lives[p] = torch.add(lives[p], shift_N)
        residuals = digest_of(b"".join(float_bytes(accounts[p].residual_N) for p in PEERS))
        history.append({"round": round, "settled": settled, "anchor": digest, "residuals": residuals})
    return history


if __name__ == "__main__":
    HISTORY.write_text(json.dumps(swarm_history(), indent=2) + "\n")
