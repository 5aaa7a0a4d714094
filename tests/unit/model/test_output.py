"""The training loss: what is read and not learnt is no target."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from decentra.model.decoder import build_model
from decentra.model.evaluate import evaluate
from decentra.model.output import loss_of
from tests.unit.tiny import SPEC

TOKENS = torch.randint(0, SPEC.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))


def test_complements_are_read_and_are_no_targets() -> None:
    model = build_model(SPEC, 0)
    masked = TOKENS.clone()
    masked[:, :9] = ~masked[:, :9]
    told = model(TOKENS[:, :-1]).logits_BTV[:, 8:].flatten(0, 1)
    expected = F.cross_entropy(told, TOKENS[:, 9:].flatten())
    torch.testing.assert_close(loss_of(model, SPEC, masked).cross_entropy, expected)
    plain = F.cross_entropy(model(TOKENS[:, :-1]).logits_BTV.flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(loss_of(model, SPEC, TOKENS).cross_entropy, plain)
    assert abs(evaluate(model, masked[0], 16) - float(F.cross_entropy(told[:8], TOKENS[0, 9:]))) < 1e-5


def test_a_batch_with_nothing_to_learn_has_a_loss_of_zero() -> None:
    model = build_model(SPEC, 0)
    loss = loss_of(model, SPEC, ~TOKENS)
    assert loss.cross_entropy.item() == 0.0
    assert torch.isfinite(loss.total)
