from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch

from decentra.delta.codec import support
from decentra.delta.golden import GOLDEN, check_golden, golden_digest
from decentra.errors import IntegrityError

from .history import HISTORY, SETTLED, swarm_history

ROOT = Path(__file__).parents[3]
PROGRAM = """
import torch
from decentra.delta.codec import support
from decentra.delta.golden import golden_digest
print(torch.backends.cpu.get_cpu_capability())
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    print(golden_digest())
"""


def test_every_cpu_capability_and_thread_count_gives_the_golden_digest() -> None:
    """Of torch and of numpy: the plainest instructions and the machine's own."""
    plain = {"NPY_DISABLE_CPU_FEATURES": ",".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability} | (plain if capability == "default" else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in ("default", "avx2")
    ]
    answers = [process.communicate(timeout=90)[0].split() for process in running]
    assert answers[0][0] == "DEFAULT"  # the setting was heard
    assert [digests for _, *digests in answers] == [[GOLDEN, GOLDEN]] * 2


def test_this_machine_may_take_part() -> None:
    check_golden()
    assert golden_digest() == golden_digest()


def test_flush_to_zero_arithmetic_is_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    try:
        with pytest.raises(IntegrityError, match=GOLDEN):
            check_golden()
    finally:
        torch.set_flush_denormal(False)


def test_another_table_of_the_coder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose entropy coder agrees with itself and with nobody else must not take part."""

    def other(half: int, count: int, concentration: int) -> object:
        low, high = max(0, count - half), min(count, half)
        return constriction.stream.model.Categorical(np.full(high - low + 1, 1 / (high - low + 1)), perfect=False)

    monkeypatch.setattr(support, "_split_model", other)
    with pytest.raises(IntegrityError, match=GOLDEN):
        check_golden()


def test_the_history_of_a_small_swarm_has_not_changed() -> None:
    expected = json.loads(HISTORY.read_text())
    assert len(expected) == len(SETTLED)
    for ours, golden in zip(swarm_history(), expected, strict=True):
        assert ours == golden


def test_a_void_round_moves_nothing() -> None:
    history = swarm_history()
    void = SETTLED.index("")
    assert history[void]["anchor"] == history[void - 1]["anchor"]
    assert history[void]["residuals"] == history[void - 1]["residuals"]
    assert len({h["anchor"] for h in history}) == len(SETTLED) - 1
