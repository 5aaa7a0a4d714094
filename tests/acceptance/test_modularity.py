"""The core of ``python -m tests.acceptance.modularity`` with one seed and few steps: the relations that do not need a long training."""

from __future__ import annotations

import pytest

from tests.acceptance.modularity import run

QUICK = ("exactness", "moefication", "forgetting", "slices")
STATISTICAL = ("loss of its domain", "worst loss", "co-activation")  # with so few steps they say nothing


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_relations_that_hold_at_any_size() -> None:
    rows = run([1], QUICK, 16, 1, num_windows=8)
    assert len(rows) >= 8
    for row in rows:
        if not any(words in row.relation for words in STATISTICAL):
            assert row.holds, f"{row.relation}: {row.value}"
