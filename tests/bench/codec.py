"""What the sparse codec costs in bits and in time, on real pseudo-gradients, next to a copy and to the information-theoretic bound.

    python -m tests.bench.codec --json

bits_per_param        of tensors that are cut into chunks, scales and signs included
bits_per_param_model  of whole packets, everything included
index_bits            per kept value, against index_bound_bits = log2 binomial(C, k) / k
encode_over_copy      time to encode all packets of the model, as a multiple of copying its fp32 values; one thread
decode_over_copy      time to decode all packets and add them to an fp32 sum, in the same unit
roundtrip_exact       the decoded values are exactly the k largest of every chunk, with their signs and the scale of the chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decentra.delta.codec import CODECS
from decentra.delta.codec.support import CHUNK_ELEMENTS, encode_support
from decentra.delta.codec.topk import TopK, top_rows
from decentra.delta.packet import decode_packet, encode_packet
from decentra.ids import FragmentId
from decentra.modules import Fragment, Layout
from tests.bench.deltas import bench_manifest, layout_of, pseudo_gradients
from tests.bench.measure import arguments, machine, over_copy, show


def measure(layout: Layout, deltas: dict[FragmentId, Tensor], codec_name: str) -> dict[str, Any]:
    """One setting on all fragments of a model."""
    fragments = layout.fragments
    packets = [encode_packet(f, deltas[f.id], codec_name) for f in fragments]
    whole_N = torch.cat([deltas[f.id] for f in fragments])
    sums = [torch.zeros(f.num_elements) for f in fragments]

    def encode() -> None:
        for fragment in fragments:
            encode_packet(fragment, deltas[fragment.id], codec_name)

    def decode() -> None:
        for fragment, packet, sum_N in zip(fragments, packets, sums, strict=True):
            decode_packet(packet, fragment).add_to(sum_N, 0.25)

    row: dict[str, Any] = {"codec": codec_name}
    if codec_name.startswith("topk"):
        row |= _sparse_bits(layout, deltas, int(codec_name.removeprefix("topk")))
        row["roundtrip_exact"] = all(_is_exact(f, deltas[f.id], p, row["k"]) for f, p in zip(fragments, packets, strict=True))
    bits = 8 * sum(map(len, packets)) / len(whole_N)
    row |= {"bits_per_param_model": bits, "times_smaller_than_fp32": 32 / bits}
    row |= {"encode_over_copy": over_copy(encode, whole_N), "decode_over_copy": over_copy(decode, whole_N)}
    return row


def _sparse_bits(layout: Layout, deltas: dict[FragmentId, Tensor], k: int) -> dict[str, Any]:
    """Bits of the tensors that are cut into chunks, and of their positions alone."""
    codec = next(c for c in CODECS if isinstance(c, TopK) and c.kept_per_chunk == k)
    chunked = [deltas[f.id][s.offset : s.offset + s.size] for f in layout.fragments for s in f.slots if s.size % CHUNK_ELEMENTS == 0]
    num_bytes = sum(len(codec.encode(x_n.contiguous(), (x_n.numel(),))) for x_n in _joined(layout, deltas))
    rows_MC = torch.cat(chunked).view(-1, CHUNK_ELEMENTS).numpy()
    positions_K = top_rows(rows_MC, k)
    index_bits = 8 * len(encode_support(positions_K, np.full(len(rows_MC), k))) / len(positions_K)
    bound = log2(comb(CHUNK_ELEMENTS, k)) / k
    num_chunked = sum(x_n.numel() for x_n in _joined(layout, deltas))
    return {
        "k": k,
        "chunk": CHUNK_ELEMENTS,
        "bits_per_param": 8 * num_bytes / num_chunked,
        "index_bits": index_bits,
        "index_bound_bits": bound,
    }


def _joined(layout: Layout, deltas: dict[FragmentId, Tensor]) -> list[Tensor]:
    """The chunked tensors of each fragment, end to end."""
    parts = []
    for fragment in layout.fragments:
        large = [deltas[fragment.id][s.offset : s.offset + s.size] for s in fragment.slots if s.size % CHUNK_ELEMENTS == 0]
        parts += [torch.cat(large)] if large else []
    return parts


def _is_exact(fragment: Fragment, values_N: Tensor, packet: bytes, k: int) -> bool:
    decoded_N = decode_packet(packet, fragment).dense()
    for slot in fragment.slots:
        if slot.size % CHUNK_ELEMENTS:
            continue
        ours = decoded_N[slot.offset : slot.offset + slot.size].view(-1, CHUNK_ELEMENTS)
        x_MC = values_N[slot.offset : slot.offset + slot.size].view(-1, CHUNK_ELEMENTS)
        order = torch.argsort(x_MC.abs(), dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
        kept_Mk = ours.gather(1, order)
        is_where = int(ours.count_nonzero()) == order.numel() and bool((kept_Mk.sign() == x_MC.gather(1, order).sign()).all())
        if not (is_where and bool((kept_Mk.abs() == kept_Mk.abs()[:, :1]).all())):
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(__doc__ or "", argv)
    torch.set_num_threads(1)
    manifest = bench_manifest()
    layout, deltas = layout_of(manifest), pseudo_gradients(manifest)
    names = ["topk64", "topk32", "topk16", "topk128", "topk256", "int8", "bf16", "fp32"]
    settings = [measure(layout, deltas, name) for name in names]
    show({"num_params": layout.num_elements, "machine": machine(), "settings": settings}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
