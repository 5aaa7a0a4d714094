"""The golden aggregation: a fixed small history that must give the same digest on every machine of a run. No files, no randomness.

It walks the real path (account, four codecs, three merges, nesterov) over values that need carries, ties, partial blocks and subnormals, and is
large enough for torch to use several threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decentra.bits import float_bits
from decentra.delta.account import Account
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.merge import merge
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet
from decentra.delta.raw import float_bytes
from decentra.errors import IntegrityError, RejectedPayload
from decentra.ids import Digest, FragmentId, PeerId, digest_of
from decentra.modules import Fragment, build_layout

# N elements of a fragment

GOLDEN = Digest("de976c3cf30b45d566c8179ff6157afc6db532bca090c999ba6c42bad9d6c97a")
_CODECS = ("int8", "bf16", "fp32", "topk64")
# Packets of ``_wire_fragment`` as another machine would send them: with them the coder and its tables are checked, not only that it agrees with itself.
_WIRE = (
    "4443504b03001000655f97a9121d226000000000e3b0c44298fc1c141f000000000000000000000000000000ffd891ab000011001f11000bb5120e4db227228815"
    "67a8c7f350c69d58a200b7f67c97",
    "4443504b03001300655f97a9121d226000000000e3b0c44298fc1c1472000000000000000000000000000000fcd4df066749435a20578d6499236e721f3aab9431"
    "1100c000000daa0de002bf1a5309b850463dce4a1ff3d872179d586766c12c1731acb2a6f2895cd3906c157701856e19d1066e825209324daa6a292d22e52b85f3"
    "7397ce924442ac4482a0a5cc4ddf7d7c4b4b6cbd51741bc0badb0fc0b8c5fba2",
)
_PEERS = (PeerId("peer-a"), PeerId("peer-b"), PeerId("peer-c"))
_NUM_ROUNDS = 3


def golden_digest() -> Digest:
    """Digest over every decoded packet and its norm, merges, residual and anchor of three peers in three rounds.

    The same in every process that may take part.
    """
    parts: list[str] = []
    fragment = golden_fragment()
    state = AnchorState(golden_values(fragment.num_elements, 1))
    digest = anchor_digest(encode_anchor(fragment, state))
    accounts = {peer: Account(fragment, state, digest) for peer in _PEERS}
    lives = dict.fromkeys(_PEERS, state.anchor_N)
    weights = {peer: float_bits(w) for peer, w in zip(_PEERS, (0.1, 0.3, 0.6), strict=True)}
    clips = {peer: float_bits(c) for peer, c in zip(_PEERS, (1.0, 0.7, 0.3), strict=True)}
    for round in range(1, _NUM_ROUNDS + 1):
        deltas = {}
        for index, peer in enumerate(_PEERS):
            lives[peer] = torch.add(lives[peer], golden_values(fragment.num_elements, 10 * round + index))
            pending = accounts[peer].encode(round, lives[peer], _CODECS[(round + index) % len(_CODECS)], 0.9, 0, 0)
            deltas[peer] = decode_packet(pending.packet, fragment)
            parts.append(f"{pending.norm_bits:08x}")
            parts.append(digest_of(float_bytes(deltas[peer].dense())))  # decoding is the same everywhere, encoding need not be
        parts.append(digest_of(float_bytes(merge(fragment, deltas, weights, clips, rule="radial"))))
        parts.append(digest_of(float_bytes(merge(fragment, deltas, weights, clips, rule="contributors"))))
        mean_N = merge(fragment, deltas, weights, clips, rule="mean")
        state = outer_step(state, mean_N, rule="nesterov", lr_bits=float_bits(0.7), momentum_bits=float_bits(0.9))
        digest = anchor_digest(encode_anchor(fragment, state))
        for peer in _PEERS:
            lives[peer] = torch.add(lives[peer], accounts[peer].applied(state, digest, clips[peer]))
            parts.append(digest_of(float_bytes(accounts[peer].residual_N)))
        parts.append(digest)
    parts += [digest_of(float_bytes(decode_packet(bytes.fromhex(packet), _wire_fragment()).dense())) for packet in _WIRE]
    return digest_of("\n".join(parts).encode())


def check_golden() -> None:
    """Raises IntegrityError when this machine computes other bits than the run agreed on; it must not take part then."""
    try:
        ours = golden_digest()
    except RejectedPayload as error:
        ours = Digest(f"nothing ({error.detail})")
    if ours != GOLDEN:
        raise IntegrityError(
            f"this machine's arithmetic differs: the golden aggregation gives {ours}, every peer must get {GOLDEN};"
            f" compare your torch {torch.__version__} with the tested range, and switch off flush-to-zero and fast-math settings"
        )


def _wire_fragment() -> Fragment:
    return build_layout([("b.weight", (65, 70))])[FragmentId("trunk/0")]


def golden_fragment() -> Fragment:
    """A fragment with a matrix large enough for several threads, matrices with partial int8 blocks, and norms."""
    shapes = [("a.norm", (37,)), ("b.weight", (301, 307)), ("c.weight", (3, 43)), ("d.norm", (1,)), ("e.weight", (2, 64))]
    return build_layout(shapes)[FragmentId("trunk/0")]


def golden_values(num_elements: int, seed: int) -> Tensor:
    """fp32 [N] made from integers only: 24-bit mantissas times powers of two; the first 4096 are around fp32's smallest numbers."""
    index_N = torch.arange(num_elements, dtype=torch.int64)
    hash_N = ((index_N + 7919 * seed) * 2654435761) % 2**32
    hash_N = ((hash_N ^ (hash_N >> 15)) * 1540483477) % 2**32
    mantissa_N = ((hash_N >> 8) - 2**23).to(torch.float32)  # exact: 24 bits
    scales = [2.0**-149, 2.0**-140, 0.0] + [2.0**-e for e in range(24, 40)]
    choice_N = torch.where(index_N < 4096, hash_N % 2, hash_N % len(scales))
    return torch.mul(mantissa_N, torch.tensor(scales, dtype=torch.float32)[choice_N])
