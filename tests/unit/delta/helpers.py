"""What the delta tests share: a small fragment, exact random vectors and bit equality."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.raw import float_bytes
from decentra.ids import Digest, FragmentId
from decentra.modules import Fragment, build_layout

torch.set_num_threads(1)

DENSE_NAMES = ("fp32", "bf16", "int8", "int4")
SPARSE_NAMES = ("topk16", "topk32", "topk64", "topk128", "topk256")
CODEC_NAMES = DENSE_NAMES + SPARSE_NAMES


def small_fragment() -> Fragment:
    """A norm, a matrix with a partial int8 block, an empty matrix and a scalar: 3 + 130 + 0 + 1 elements."""
    return build_layout([("a.norm", (3,)), ("b.weight", (10, 13)), ("c.empty", (0, 5)), ("d.scalar", ())])[FragmentId("trunk/0")]


def large_fragment() -> Fragment:
    """A norm, a matrix of two chunks and a bit, a router's few rows, and a matrix of exactly one chunk."""
    shapes = [("a.norm", (64,)), ("b.weight", (64, 130)), ("c.rows", (8, 64)), ("d.weight", (64, 64))]
    return build_layout(shapes)[FragmentId("trunk/0")]


def vector(num_elements: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)) * scale


def dyadic(num_elements: int, seed: int) -> Tensor:
    """Multiples of 1/64 below 1: sums of a few hundred of them are exact in fp32."""
    return torch.randint(-63, 64, (num_elements,), generator=torch.Generator().manual_seed(seed)).float() / 64


def same_bits(a_N: Tensor, b_N: Tensor) -> bool:
    return float_bytes(a_N) == float_bytes(b_N)


def digest_of_state(fragment: Fragment, state: AnchorState) -> Digest:
    return anchor_digest(encode_anchor(fragment, state))


finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
