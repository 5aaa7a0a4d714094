"""Learning one thing after another: how much stays. Pure arithmetic over a matrix of losses.

``loss[i][j]`` is the loss on task j after training on task i; i = 0 is before any. Losses, so lower is better; figures are relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decentra.errors import ConfigError

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Transfer:
    """Means over tasks, as shares of a loss; negative is bad (Lopez-Paz and Ranzato 2017, eq. 2-4, for losses).

    backward: of every task but the last, how much its loss fell from right after it was learned to the end; forward: of every task but the first, how much its
    loss fell before it was trained; final: mean loss at the end.
    """

    backward: float
    forward: float
    final: float


def transfer(loss: Matrix) -> Transfer:
    num_tasks = len(loss) - 1
    if num_tasks < 1 or any(len(row) != num_tasks for row in loss):
        raise ConfigError(
            f"expected losses of T tasks before and after each of them, (T + 1) x T, got {len(loss)} rows of {[len(r) for r in loss]}"
        )
    end = loss[num_tasks]
    kept = [(loss[j + 1][j] - end[j]) / loss[j + 1][j] for j in range(num_tasks - 1)]
    ahead = [(loss[0][j] - loss[j][j]) / loss[0][j] for j in range(1, num_tasks)]
    return Transfer(sum(kept) / len(kept) if kept else 0.0, sum(ahead) / len(ahead) if ahead else 0.0, sum(end) / num_tasks)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Chance that a text that was trained on has the lower loss of the two: 0.5 is no trace, 1.0 is certainty."""
    if not members or not others:
        raise ConfigError("an audit compares texts that were trained on with ones that were not; give both")
    wins = sum((m < o) + 0.5 * (m == o) for m in members for o in others)
    return wins / (len(members) * len(others))
