"""How many experts fit: more memory never fits fewer, what fits is within the budget, and too little says how much is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.config import Manifest, ModelSpec
from decentra.errors import ConfigError
from decentra.model.custom import layout_for
from decentra.peer.footprint import FROZEN_COPIES, TRAINED_COPIES, footprint, mib

BIG = Manifest(name="big", model=ModelSpec(hidden_size=384, num_layers=8, num_experts=8, expert_hidden_size=512, head_dim=48))
LAYOUT = layout_for(BIG)
MEASURED_GB = {
    "full": 2.85,
    "mirror": 1.51,
    "held": 1.11,
}  # resident above the imports, tests/bench/LOG.md, 40 M parameters, a quarter of the experts


@given(st.integers(1 << 20, 1 << 34), st.booleans())
def test_what_fits_is_within_the_budget_and_one_more_is_not(memory: int, is_partial: bool) -> None:
    need = footprint(BIG, LAYOUT, is_partial=is_partial)
    if need.total(1) > memory:
        with pytest.raises(ConfigError, match=mib(need.total(1) - memory)):
            need.fitting(memory, "memory")
        return
    count = need.fitting(memory, "memory")
    assert 1 <= count <= 8
    assert need.total(count) <= memory
    assert count == 8 or need.total(count + 1) > memory


def test_a_held_peer_needs_less_and_all_experts_cost_the_same() -> None:
    held, mirror = (footprint(BIG, LAYOUT, is_partial=p) for p in (True, False))
    assert held.total(2) < mirror.total(2)
    assert held.total(8) == pytest.approx(mirror.total(8), rel=1e-6)
    assert mirror.per_expert_bytes < held.per_expert_bytes, "it is there already, frozen"
    assert TRAINED_COPIES > FROZEN_COPIES


def test_it_is_what_was_measured() -> None:
    """Within a quarter of the resident memory of real peers."""
    imports = 0.6
    for mode, count, is_partial in (("full", 8, False), ("mirror", 2, False), ("held", 2, True)):
        assert footprint(BIG, LAYOUT, is_partial=is_partial).total(count) / 1e9 - imports == pytest.approx(MEASURED_GB[mode], rel=0.25)


def test_more_layers_and_longer_windows_need_more() -> None:
    wide = BIG.model_copy(update={"data": BIG.data.model_copy(update={"seq_len": 1024})})
    assert footprint(wide, LAYOUT, is_partial=True).fixed_bytes > footprint(BIG, LAYOUT, is_partial=True).fixed_bytes
