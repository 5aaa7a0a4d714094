"""Routings from cards and from evidence, soups by a judge, and the arithmetic of forgetting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.errors import ConfigError
from decentra.model.decoder import build_model
from decentra.modular import lasting, soup
from decentra.modular.route import Card, CardWriter, Evidence, Fixed, Linear, Prefix, centroid_rows, classify, lda_rows, uniform_rows
from tests.unit import tiny

SPEC = tiny.SPEC.model_copy(update={"vocab_size": 40, "num_experts": 3, "max_seq_len": 64})


def cloud(mean: float, seed: int, count: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, generator=generator) + mean * torch.nn.functional.one_hot(torch.tensor(seed), 16)


def card(mean: float, seed: int) -> Card:
    writer = CardWriter(2, 16)
    for layer in range(2):
        writer.see(layer, cloud(mean, seed))
    return writer.card()


CARDS = [card(3.0, seed) for seed in range(3)]


def test_a_card_is_mean_and_covariance_whatever_the_batches() -> None:
    x, whole, parts = cloud(1.0, 1), CardWriter(1, 16), CardWriter(1, 16)
    whole.see(0, x)
    for part in x.split(37):
        parts.see(0, part)
    torch.testing.assert_close(whole.card().covariance_LDD, parts.card().covariance_LDD)
    torch.testing.assert_close(whole.card().mean_LD[0], x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.card().covariance_LDD[0], torch.cov(x.T, correction=0), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="two tokens"):
        CardWriter(1, 16).card()


@pytest.mark.parametrize("rows", [centroid_rows, lda_rows])
def test_rows_send_text_to_its_owner(rows: object) -> None:
    table = rows(CARDS)  # type: ignore[operator]
    assert table.shape == (2, 3, 16)
    for owner in range(3):
        chosen = (cloud(3.0, owner, 200) @ table[0].T).argmax(-1)
        assert float((chosen == owner).float().mean()) > 0.8
    assert not uniform_rows(CARDS).any()


def test_the_prefix_grows_surer_and_looks_at_nothing_ahead() -> None:
    x = torch.cat([cloud(0.5, 2, 64)])
    weak = [card(0.5, seed) for seed in range(3)]
    router = Prefix(weak)
    router.start(torch.zeros(1, 64, dtype=torch.int64), 0)
    logits = router.logits(0, x)
    assert logits is not None
    sure = logits.softmax(-1)[:, 2]
    assert sure[-1] > sure[0]
    router.start(torch.zeros(1, 64, dtype=torch.int64), 0)
    changed = x.clone()
    changed[40:] = 9.0
    again = router.logits(0, changed)
    assert again is not None
    assert again[:40].equal(logits[:40])
    steps = Prefix(weak)
    found = []
    for start in range(0, 64, 16):
        steps.start(torch.zeros(1, 16, dtype=torch.int64), start)
        part = steps.logits(0, x[start : start + 16])
        assert part is not None
        found.append(part)
    torch.testing.assert_close(torch.cat(found), logits, atol=1e-3, rtol=1e-3)
    assert int(classify(CARDS, cloud(3.0, 1, 30)).argmax()) == 1


def test_evidence_follows_who_predicts_better_and_is_causal() -> None:
    def predict(expert: int, tokens_BT: torch.Tensor) -> torch.Tensor:
        right = (tokens_BT[:, 1:] % 3) == expert
        return torch.where(right, -0.1, -5.0)

    tokens = torch.cat([torch.zeros(1, 20), torch.ones(1, 20)], 1).long()
    router = Evidence(3, predict)
    router.start(tokens, 0)
    logits = router.logits(0, torch.empty(0))
    assert logits is not None
    assert logits.shape == (40, 3)
    assert logits[0].tolist() == [0.0, 0.0, 0.0], "nothing is known before the first token was predicted"
    assert int(logits[15].argmax()) == 0
    assert int(logits[39].argmax()) == 1, "what is long ago counts less"
    changed = tokens.clone()
    changed[:, 30:] = 2
    router.start(changed, 0)
    again = router.logits(0, torch.empty(0))
    assert again is not None
    assert again[:30].equal(logits[:30])
    router.start(tokens[:, :25], 0)
    router.start(tokens[:, 25:], 25)
    later = router.logits(0, torch.empty(0))
    assert later is not None
    torch.testing.assert_close(later, logits[25:])


def test_a_routing_replaces_the_models_own_and_goes_again() -> None:
    model = build_model(SPEC, 0).eval()
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model(tokens).logits_BTV
        rows = torch.stack([model.model.layers[n].mlp.gate.weight for n in range(2)])  # type: ignore[union-attr]
        model.routing = Linear(rows)
        torch.testing.assert_close(model(tokens).logits_BTV, own)
        model.routing = Fixed(torch.tensor([0.0, 0.0, 9.0]))
        assert not torch.allclose(model(tokens).logits_BTV, own)
        model.routing = None
        assert model(tokens).logits_BTV.equal(own)


def test_a_greedy_soup_is_no_worse_than_its_best_ingredient() -> None:
    target = torch.tensor([1.0, 2.0, 3.0])
    states = [{"w": target + d} for d in (torch.tensor([0.3, 0.0, 0.0]), torch.tensor([-0.3, 0.1, 0.0]), torch.tensor([5.0, 5.0, 5.0]))]

    def judge(state: soup.State) -> float:
        return float((state["w"] - target).square().sum())

    made = soup.greedy_soup(states, judge)
    assert made.ingredients == (0, 1)
    assert made.loss <= min(map(judge, states))
    path, height = soup.barrier(states[0], states[1], judge)
    assert [t for t, _ in path] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert height <= 1e-6, "a bowl has no barrier"


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=4, max_size=4))
def test_transfer_is_zero_for_who_changes_nothing(rows: list[list[float]]) -> None:
    still = lasting.transfer([rows[0]] * 4)
    assert (still.backward, still.forward) == (0.0, 0.0)
    assert still.final == pytest.approx(sum(rows[0]) / 3)


def test_transfer_and_auc() -> None:
    found = lasting.transfer([[2.0, 2.0], [1.0, 1.8], [1.5, 1.0]])
    assert found.backward == pytest.approx(-0.5)
    assert found.forward == pytest.approx(0.1)
    assert lasting.auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert lasting.auc([1.0, 1.0], [1.0, 1.0]) == 0.5
    with pytest.raises(ConfigError):
        lasting.auc([], [1.0])
    with pytest.raises(ConfigError, match="T tasks"):
        lasting.transfer([[1.0]])
