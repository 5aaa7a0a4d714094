"""Mean loss of a model on held-out tokens. No training and no side effect on the model.

Shapes: B batch, T window length in tokens, N tokens of the text.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decentra.data.tokens import Tokens, numbers_of, read
from decentra.errors import DataError
from decentra.model.output import NOT_LEARNT, num_learnt


def evaluate(model: nn.Module, tokens_N: Tensor | Tokens, seq_len: int, batch_size: int = 16, max_windows: int | None = None) -> float:
    """Mean nats per token (of a byte model: per byte) over windows of ``seq_len`` predictions that do not overlap.

    ``tokens_N`` is int64 [N], or what a tokenizer gives; tokens that are not to be learnt do not count, and a tail shorter than a window is left out.
    With ``max_windows`` evenly spread windows are used.
    Raises DataError when not even one window fits.
    """
    windows_WT1 = _windows(tokens_N, seq_len, max_windows)
    device = next(model.parameters()).device
    total_nats, num_tokens, was_training = 0.0, 0, model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(windows_WT1), batch_size):
                batch_BT1 = windows_WT1[start : start + batch_size].to(device)
                logits_BTV = model(read(batch_BT1[:, :-1])).logits_BTV
                targets = batch_BT1[:, 1:].flatten().clamp_min(NOT_LEARNT)
                total_nats += F.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="sum", ignore_index=NOT_LEARNT).item()
                num_tokens += int(num_learnt(targets))
    finally:
        model.train(was_training)
    if not num_tokens:
        raise DataError("evaluation: no token of this text is to be learnt; give completions or plain text")
    return total_nats / num_tokens


def _windows(tokens_N: Tensor | Tokens, seq_len: int, max_windows: int | None) -> Tensor:
    if not isinstance(tokens_N, Tensor):
        tokens_N = torch.from_numpy(numbers_of(tokens_N).astype(np.int64))
    num_windows = (len(tokens_N) - 1) // seq_len
    if num_windows < 1:
        raise DataError(f"evaluation needs more than {seq_len} tokens (one window), got {len(tokens_N)}; give a longer text")
    windows_WT1 = tokens_N.long().unfold(0, seq_len + 1, seq_len)
    if max_windows is None or max_windows >= num_windows:
        return windows_WT1
    return windows_WT1[torch.arange(max_windows) * num_windows // max_windows]
