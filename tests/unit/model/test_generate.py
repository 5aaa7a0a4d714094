from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from decentra.errors import ConfigError
from decentra.model.decoder import Decoder, build_model
from decentra.model.generate import generate, generate_stream
from tests.unit.tiny import SPEC

torch.set_num_threads(1)


def lively_model() -> Decoder:
    """Weights large enough that greedy text is not one token repeated."""
    model = build_model(SPEC, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15.0)
    return model


class Uncached(nn.Module):
    """The same model without its cache, as a bring-your-own model would be."""

    def __init__(self, inner: Decoder) -> None:
        super().__init__()
        self.inner, self.spec = inner, inner.spec

    def forward(self, tokens_BT: torch.Tensor) -> object:
        return self.inner(tokens_BT)


def test_cached_logits_equal_the_full_forward_for_any_split() -> None:
    model = lively_model()
    tokens_BT = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens_BT).logits_BTV
        for splits in ([24], [10, 14], [1] * 24, [5, 1, 1, 9, 8]):
            cache = model.new_cache(2, 24)
            parts = [model(part, cache).logits_BTV for part in tokens_BT.split(splits, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)


def test_greedy_text_is_identical_with_and_without_cache_even_past_the_context() -> None:
    model = lively_model()
    ours = generate(model, [1, 2, 3], 60, temperature=0.0)
    assert ours == generate(Uncached(model), [1, 2, 3], 60, temperature=0.0)
    assert len(set(ours)) > 2


def test_the_seed_decides_the_sample() -> None:
    model = build_model(SPEC, 0)
    assert generate(model, [1], 20, seed=4) == generate(model, [1], 20, seed=4)
    assert generate(model, [1], 20, seed=4) != generate(model, [1], 20, seed=5)


def test_top_1_and_a_tiny_temperature_are_greedy() -> None:
    model = lively_model()
    greedy = generate(model, [1, 2], 12, temperature=0.0)
    assert generate(model, [1, 2], 12, top_k=1) == greedy
    assert generate(model, [1, 2], 12, temperature=1e-9) == greedy


def test_a_stream_yields_before_it_is_complete() -> None:
    model = build_model(SPEC, 0)
    assert list(islice(generate_stream(model, [1], 10_000, seed=1), 3)) == generate(model, [1], 3, seed=1)


@pytest.mark.parametrize("bad", [{"prompt_tokens": []}, {"prompt_tokens": [50]}, {"temperature": -1.0}, {"top_k": 0}, {"num_tokens": -1}])
def test_impossible_requests_are_refused_at_once(bad: dict[str, object]) -> None:
    request = {"prompt_tokens": [1], "num_tokens": 1, **bad}
    with pytest.raises(ConfigError):
        generate_stream(build_model(SPEC, 0), **request)  # type: ignore[arg-type]
