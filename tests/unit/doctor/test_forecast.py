"""What a plan says follows from what was measured: slow links mean sparse codecs, limits are kept, more peers mean more to download."""

from __future__ import annotations

import pytest

from decentra.config import CodecSpec, Manifest, ModelSpec, PlacementSpec, RoundSpec
from decentra.delta.rate import LADDER
from decentra.doctor.forecast import Measured, forecast
from decentra.model.custom import layout_for

CHOICE = Manifest(name="a", model=ModelSpec(), codec=CodecSpec(name="int8", sparsest="topk32"))
LAYOUT = layout_for(CHOICE)


def measured(**changes: object) -> Measured:
    return Measured(**({"step_s": 1.0, "num_experts": 4, "is_partial": False, "num_trainers": 4, "num_keepers": 1} | changes))  # type: ignore[arg-type]


def test_a_slow_uplink_is_answered_by_a_sparse_codec() -> None:
    fast, slow, slower = (forecast(CHOICE, LAYOUT, measured(up_bytes_per_s=rate)) for rate in (1e8, 2e4, 4e3))
    assert fast["codec"] == "int8"
    assert LADDER.index("int8") < LADDER.index(slow["codec"]) < LADDER.index(slower["codec"])
    assert slow["up_bytes_per_round"] <= 2e4 * slow["round_s"] * CHOICE.codec.share
    assert forecast(CHOICE, LAYOUT, measured(up_bytes_per_s=1e8, cap_bytes_per_day=2e8))["codec"] != "int8", "the owner's cap counts, too"


def test_a_link_that_is_too_slow_is_said() -> None:
    told = forecast(CHOICE, LAYOUT, measured(up_bytes_per_s=100.0))
    assert not told["is_in_time"]
    assert "miss rounds" in told["why"]
    waits = CHOICE.model_copy(update={"rounds": RoundSpec(overlap=False)})
    assert forecast(waits, LAYOUT, measured(up_bytes_per_s=2e4))["utilisation"] < 1.0


def test_what_is_not_held_is_not_downloaded() -> None:
    held = CHOICE.model_copy(update={"placement": PlacementSpec(mode="held")})
    partial, whole = (forecast(held, LAYOUT, measured(is_partial=p, num_experts=2)) for p in (True, False))
    assert partial["down_bytes_per_round"] < whole["down_bytes_per_round"]
    many = forecast(CHOICE, LAYOUT, measured(num_trainers=30))
    few = forecast(CHOICE, LAYOUT, measured(num_trainers=8))
    assert many["down_bytes_per_round"] < 4 * few["down_bytes_per_round"], "beyond a number reducers send one packet"


def test_an_hour_is_rounds() -> None:
    told = forecast(CHOICE, LAYOUT, measured())
    assert told["round_s"] == 10.0
    assert told["up_mb_per_hour"] == pytest.approx(told["up_bytes_per_round"] * 360 / 1e6)
