"""Experts as parts: rows move with them, numbering has no holes, out and in again is nothing at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.config import ModelSpec
from decentra.errors import ConfigError
from decentra.model.decoder import build_model
from decentra.modular.align import aligned
from decentra.modular.parts import State, check_numbering, experts_of, extract, insert, select, spec_with
from tests.unit import tiny

SPEC = tiny.SPEC.model_copy(update={"vocab_size": 40, "num_experts": 5})
STATE: State = {k: v.detach() for k, v in build_model(SPEC, 3).state_dict().items()}
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(state: State, spec: ModelSpec) -> torch.Tensor:
    model = build_model(spec, 0)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(TOKENS).logits_BTV


@given(st.permutations(range(5)))
def test_a_model_does_not_depend_on_its_experts_order(order: list[int]) -> None:
    torch.testing.assert_close(logits(select(STATE, order), SPEC), logits(STATE, SPEC), atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
def test_what_is_kept_is_kept_and_numbered_from_zero(kept: list[int]) -> None:
    small = select(STATE, kept)
    assert experts_of(small) == tuple(range(len(kept)))
    check_numbering(small, len(kept))
    for new, old in enumerate(kept):
        one, other = extract(small, new), extract(STATE, old)
        assert all(one.weights[k].equal(v) for k, v in other.weights.items())
        assert all(one.rows[k].equal(v) for k, v in other.rows.items())


@given(st.integers(0, 4))
def test_out_and_in_again_is_nothing(expert: int) -> None:
    left = [e for e in range(5) if e != expert]
    back = insert(select(STATE, left), extract(STATE, expert))
    order = [*range(expert), 4, *range(expert, 4)]
    again = select(back, order)
    assert again.keys() == STATE.keys()
    assert all(again[k].equal(STATE[k]) for k in STATE)


def test_holes_and_foreign_parts_are_refused() -> None:
    holes = {k.replace(".experts.4.", ".experts.7."): v for k, v in STATE.items()}
    with pytest.raises(ConfigError, match="rows, for experts up to 7"):
        experts_of(holes)
    with pytest.raises(ConfigError, match="number 0 is missing"):
        check_numbering({k: v for k, v in STATE.items() if ".experts.0." not in k}, 5)
    with pytest.raises(ConfigError, match="no expert in this checkpoint"):
        experts_of({"lm_head.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match="expert 9 is not there"):
        select(STATE, [9])
    wide = ModelSpec(**SPEC.model_dump() | {"expert_hidden_size": 8})
    foreign = extract({k: v.detach() for k, v in build_model(wide, 0).state_dict().items()}, 0)
    with pytest.raises(ConfigError, match="widths differ"):
        insert(STATE, foreign)
    uneven = {k: v for k, v in STATE.items() if "layers.1.mlp.experts.2." not in k}
    with pytest.raises(ConfigError, match="every layer needs the same ones"):
        experts_of(uneven)


def test_a_spec_of_fewer_experts_is_one_that_can_be_trained() -> None:
    assert spec_with(SPEC, 1).num_experts_per_token == 1
    assert not spec_with(SPEC, 3, 1).norm_topk_prob, "one of several with weight 1 has no gradient"
    assert spec_with(SPEC, 3).num_experts_per_token == 2


def test_rebasin_recovers_permutations_exactly() -> None:
    generator = torch.Generator().manual_seed(4)
    moved = select(STATE, torch.randperm(5, generator=generator).tolist())
    for layer in range(2):
        for expert in range(5):
            order = torch.randperm(12, generator=generator)
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            for name in ("gate_proj", "up_proj"):
                moved[f"{at}.{name}.weight"] = moved[f"{at}.{name}.weight"][order]
            moved[f"{at}.down_proj.weight"] = moved[f"{at}.down_proj.weight"][:, order]
    torch.testing.assert_close(logits(moved, SPEC), logits(STATE, SPEC), atol=1e-5, rtol=1e-5)
    back = aligned(moved, STATE)
    assert all(back[k].equal(STATE[k]) for k in STATE), "every neuron and every expert is where it was"
    mean = {k: (moved[k] + STATE[k]) / 2 for k in STATE}
    assert float((logits(mean, SPEC) - logits(STATE, SPEC)).abs().max()) > 1e-3, "averaged without, it is another model"
