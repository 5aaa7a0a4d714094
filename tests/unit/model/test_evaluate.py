from __future__ import annotations

from math import log

import pytest
import torch

from decentra.config import ModelSpec
from decentra.errors import DataError
from decentra.model.decoder import build_model
from decentra.model.evaluate import evaluate

torch.set_num_threads(1)

SPEC = ModelSpec(
    vocab_size=256,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    expert_hidden_size=8,
    num_experts=2,
    max_seq_len=32,
)


def test_uniform_logits_cost_log_v() -> None:
    model = build_model(SPEC, 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate(model, bytes(range(256)), 16) == pytest.approx(log(256), abs=1e-5)


def test_value_is_the_mean_over_windows_whatever_the_batch_size() -> None:
    model = build_model(SPEC, 0)
    tokens_N = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        singles = [model.loss(tokens_N[None, s : s + 17]).cross_entropy.item() for s in range(0, 83, 16)]
    assert len(singles) == 6
    for batch_size in (1, 4, 16):
        assert evaluate(model, tokens_N, 16, batch_size) == pytest.approx(sum(singles) / 6, abs=1e-5)
    assert evaluate(model, tokens_N, 16, max_windows=2) == pytest.approx((singles[0] + singles[3]) / 2, abs=1e-5)
    assert evaluate(model, bytes(tokens_N.tolist()), 16) == pytest.approx(sum(singles) / 6, abs=1e-5)


def test_training_mode_is_given_back() -> None:
    model = build_model(SPEC, 0)
    for mode in (True, False):
        model.train(mode)
        evaluate(model, bytes(40), 16)
        assert model.training is mode


@pytest.mark.parametrize("data", [b"", b"x" * 16])
def test_a_text_shorter_than_a_window_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="16"):
        evaluate(build_model(SPEC, 0), data, 16)
