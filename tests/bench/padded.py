"""Model code for a run (``--model-code``): the built-in decoder whose training steps are padded by sleeping, as one module or as the usual ones.

A run pins the bytes of its model code, so the two settings are written into a copy of this file (``model_code``) and not read from outside.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decentra.config import ModelSpec
from decentra.model.decoder import build_model
from decentra.modules import module_of_parameter

PAD_S = 0.0  # of every training step
IS_ONE_MODULE = False  # everything is trunk: a run with a single fragment


def build(spec: ModelSpec, seed: int) -> nn.Module:
    model = build_model(spec, seed)
    model.register_forward_pre_hook(_pad)
    return model


def module_of(name: str) -> str:
    return "trunk" if IS_ONE_MODULE else module_of_parameter(name)


def _pad(_module: nn.Module, _args: Any) -> None:
    if PAD_S and torch.is_grad_enabled():
        time.sleep(PAD_S)


def model_code(target: Path, *, pad_s: float = 0.0, is_one_module: bool = False) -> Path:
    """A copy of this file at ``target`` with these settings."""
    text = Path(__file__).read_text()
    for line, value in (("PAD_S = 0.0", f"PAD_S = {pad_s!r}"), ("IS_ONE_MODULE = False", f"IS_ONE_MODULE = {is_one_module!r}")):
        assert text.count(f"\n{line}") == 1
        text = text.replace(f"\n{line}", f"\n{value}")
    target.write_text(text)
    return target
