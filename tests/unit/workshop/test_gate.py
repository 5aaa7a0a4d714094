"""A gate that opens where its expert is better than the public one."""

from __future__ import annotations

import torch

from decentra.model.decoder import build_model
from decentra.modular.parts import extract, insert, select, spec_with
from decentra.modular.route import Gated
from decentra.workshop.experts import train_expert, train_gate
from decentra.workshop.looking import watching
from decentra.workshop.training import model_of
from tests.unit.tiny import SPEC

DENSE = spec_with(SPEC.model_copy(update={"vocab_size": 256}), 1)
TEXT = b"abcabdabe" * 200


def test_a_gate_opens_on_its_experts_text() -> None:
    state = {k: v.detach() for k, v in build_model(DENSE, 0).named_parameters()}
    expert = train_expert(state, DENSE, TEXT, name="me", steps=40, seq_len=16, lr=1e-2)
    gate_LD = train_gate(state, DENSE, expert.part, TEXT, steps=40, seq_len=16)
    assert gate_LD.shape == (DENSE.num_layers, DENSE.hidden_size)
    opened: list[float] = []
    two = model_of(insert(select(state, [0]), expert.part), spec_with(DENSE, 2, 2))
    with watching(two, lambda layer, _moe, x_TD: opened.append(float((x_TD @ gate_LD[layer]).sigmoid().mean()))), torch.no_grad():
        two(torch.tensor([list(TEXT[:30])]))
    assert min(opened) > 0.5


def test_without_a_difference_there_is_nothing_to_learn() -> None:
    state = {k: v.detach() for k, v in build_model(DENSE, 0).named_parameters()}
    gate_LD = train_gate(state, DENSE, extract(state, 0), TEXT, steps=5, seq_len=16)
    assert float(gate_LD.abs().max()) < 1e-3


def test_gates_compare_by_direction_only() -> None:
    gates_LED = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    one, larger = Gated(gates_LED).logits(1, x_TD), Gated(7.0 * gates_LED).logits(1, 3.0 * x_TD)
    torch.testing.assert_close(one, larger, atol=1e-3, rtol=1e-3)
    assert one.shape == (5, 3)
