"""Data affinity: a peer trains on the common text that the router sends to its experts."""

from __future__ import annotations

import torch

from decentra.config import Manifest, parse_config
from decentra.data.windows import WindowSource
from decentra.model.decoder import build_model
from decentra.peer.affinity import OwnShare, preference
from tests.unit.tiny import SPEC

TEXTS = [bytes(range(256)) * 8]


def source(shared_fraction: float) -> WindowSource:
    return WindowSource([b"own text, all of it alike. " * 40], 16, 0, "p", TEXTS, shared_fraction)


def test_the_best_window_is_taken_and_only_of_common_text() -> None:
    """With a score of its own the batch is the best of the candidates; own text is never chosen from, and the cursor moves the same."""
    seen: list[torch.Tensor] = []

    def first_byte(tokens_CT1: torch.Tensor) -> torch.Tensor:
        seen.append(tokens_CT1)
        return tokens_CT1[:, 0].float()

    plain, choosing = source(0.5), source(0.5)
    before, after = plain.next_batch(64), choosing.next_batch(64, 4, first_byte)
    assert choosing.cursor() == plain.cursor()
    is_own = torch.tensor([bytes(row.tolist()) in b"own text, all of it alike. " * 40 for row in before])
    assert 8 < int(is_own.sum()) < 56
    assert torch.equal(before[is_own], after[is_own])
    candidates_S4 = seen[0][:, 0].view(-1, 4)
    assert torch.equal(after[~is_own][:, 0], candidates_S4.max(-1).values)
    assert torch.equal(before[~is_own][:, 0], candidates_S4[:, 0]), "the first candidate is the window that would have been taken"


def test_shares_are_of_all_experts_and_leave_the_model_as_it_was() -> None:
    model = build_model(SPEC, 0)
    tokens_CT1 = torch.randint(0, SPEC.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    one, rest = OwnShare(model, [0])(tokens_CT1), OwnShare(model, range(1, SPEC.num_experts))(tokens_CT1)
    torch.testing.assert_close(one + rest, torch.ones(3))
    assert model.routing is None
    assert model.training


def test_who_holds_a_part_of_the_experts_asks_the_rows_of_all() -> None:
    tokens_CT1 = torch.randint(0, SPEC.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    shares_C = OwnShare(build_model(SPEC, 0, [1, 2]), [1, 2])(tokens_CT1)
    assert ((shares_C > 0) & (shares_C < 1)).all()


def test_no_preference_where_all_experts_are_ones_own() -> None:
    raw = {"name": "r", "model": SPEC.model_dump(), "data": {"seq_len": 16}, "placement": {"data_affinity": 4}}
    manifest = parse_config(Manifest, raw, "here")
    model = build_model(SPEC, 0)
    assert preference(model, range(SPEC.num_experts), manifest) == ()
    assert preference(model, [0], manifest)[0] == 4  # type: ignore[misc]
