"""How a trunk is cut into fragments: every parameter once, strided layers, similar sizes, the same whatever the order of the parameters."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.ids import TRUNK
from decentra.modules import build_layout

Parameters = list[tuple[str, tuple[int, ...]]]


def decoder(num_layers: int) -> Parameters:
    found: Parameters = [("model.embed_tokens.weight", (256, 32)), ("model.norm.weight", (32,)), ("lm_head.weight", (256, 32))]
    for layer in range(num_layers):
        found += [(f"model.layers.{layer}.self_attn.q_proj.weight", (32, 32)), (f"model.layers.{layer}.input_layernorm.weight", (32,))]
        found += [(f"model.layers.{layer}.mlp.experts.0.up_proj.weight", (16, 32)), (f"model.layers.{layer}.mlp.gate.weight", (1, 32))]
    return found


def trunk_parts(parameters: Parameters, num_parts: int) -> list[list[str]]:
    layout = build_layout(parameters, trunk_fragments=num_parts)
    return [[s.name for s in f.slots] for f in layout.fragments if f.module == TRUNK]


def layers_of(names: list[str]) -> set[int]:
    return {int(found.group(1)) for name in names if (found := re.search(r"layers\.(\d+)\.", name))}


def test_a_part_takes_every_third_layer() -> None:
    parts = trunk_parts(decoder(8), 3)
    assert [layers_of(part) for part in parts] == [{0, 3, 6}, {1, 4, 7}, {2, 5}]
    where = {name: index for index, part in enumerate(parts) for name in part}
    assert where["model.embed_tokens.weight"] != where["lm_head.weight"], "the large tensors outside the layers are spread"


@given(st.integers(1, 9), st.integers(1, 12), st.randoms(use_true_random=False))
def test_every_parameter_is_in_one_part_and_order_does_not_matter(num_layers: int, num_parts: int, rng: Random) -> None:
    parameters = decoder(num_layers)
    parts = trunk_parts(parameters, num_parts)
    assert sorted(name for part in parts for name in part) == sorted(n for n, _ in parameters if "experts" not in n and "gate" not in n)
    assert all(parts), "no part is empty"
    assert all(part == sorted(part) for part in parts)
    rng.shuffle(parameters)
    assert trunk_parts(parameters, num_parts) == parts


@pytest.mark.parametrize("num_parts", [2, 3, 4])
def test_fewer_layers_than_parts_are_cut_by_size(num_parts: int) -> None:
    parameters = decoder(1)
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in parameters}
    totals = [sum(sizes[name] for name in part) for part in trunk_parts(parameters, num_parts)]
    assert len(totals) == num_parts
    assert max(totals) <= max(max(sizes.values()), 1.5 * sum(totals) / num_parts)
