"""Sampling from a model, with a key/value cache where the model has one. No tokenizer: tokens in, tokens out.

Shapes: B batch (always 1 here), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from decentra.errors import ConfigError
from decentra.model.decoder import Decoder, KeyValueCache


def generate(
    model: nn.Module,
    prompt_tokens: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """``num_tokens`` tokens that continue ``prompt_tokens``; see ``generate_stream``."""
    return list(generate_stream(model, prompt_tokens, num_tokens, temperature=temperature, top_k=top_k, seed=seed))


def generate_stream(
    model: nn.Module,
    prompt_tokens: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new tokens one by one. ``temperature`` 0 is greedy; ``top_k`` keeps the k likeliest tokens; equal seeds give equal text.

    A text that outgrows the model's context goes on from its last half. Raises ConfigError for an empty prompt, tokens outside the
    vocabulary (of a Decoder), or settings out of range.
    """
    if not prompt_tokens or num_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ConfigError(
            "generate expects at least one prompt token, num_tokens >= 0, temperature >= 0 and top_k >= 1,"
            f" got {len(prompt_tokens)} prompt tokens, {num_tokens}, {temperature}, {top_k}"
        )
    if isinstance(model, Decoder) and not 0 <= min(prompt_tokens) <= max(prompt_tokens) < model.spec.vocab_size:
        raise ConfigError(f"expected prompt tokens in 0..{model.spec.vocab_size - 1}, got {min(prompt_tokens)}..{max(prompt_tokens)}")
    return _stream(model, list(prompt_tokens), num_tokens, temperature, top_k, torch.Generator().manual_seed(seed))


def _stream(
    model: nn.Module, tokens: list[int], num_tokens: int, temperature: float, top_k: int | None, generator: torch.Generator
) -> Iterator[int]:
    reader = _Reader(model)
    for _ in range(num_tokens):
        token = _choose(reader.next_logits(tokens), temperature, top_k, generator)
        tokens.append(token)
        yield token


class _Reader:
    """Feeds a model only the tokens it has not read yet; a model without a cache reads everything every time."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._device = model, next(model.parameters()).device
        spec = getattr(model, "spec", None)
        self._max_tokens: int | None = getattr(spec, "max_seq_len", None)
        self._cache: KeyValueCache | None = None
        self._start = 0  # the context is tokens[_start:]

    @torch.inference_mode()
    def next_logits(self, tokens: list[int]) -> Tensor:
        """Logits [V] of the token that follows ``tokens``, on the CPU."""
        if self._max_tokens is not None and len(tokens) - self._start > self._max_tokens:
            self._start, self._cache = len(tokens) - max(1, self._max_tokens // 2), None
        if not isinstance(self._model, Decoder):
            output = self._model(self._tensor(tokens[self._start :]))
        else:
            if self._cache is None:
                self._cache = self._model.new_cache(1, self._model.spec.max_seq_len)
            output = self._model(self._tensor(tokens[self._start + self._cache.num_tokens :]), self._cache)
        logits_V: Tensor = output.logits_BTV[0, -1].float().cpu()
        return logits_V

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=self._device)


def _choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        values, indices = logits_V.topk(top_k)
    else:
        values, indices = logits_V, torch.arange(len(logits_V))
    # subtract the maximum first: a tiny temperature would overflow
    probs = ((values - values.max()) / temperature).softmax(-1)
    return int(indices[torch.multinomial(probs, 1, generator=generator)])
