"""Model code for a run (``--model-code``): the built-in decoder whose training steps are padded by sleeping, as one module or as the usual ones.

A run pins the bytes of its model code, so the settings are written into a copy of this file (``model_code``) and not read from outside. With a
folder for them, each process writes when its inner steps began and ended: a line of two Unix times per step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decentra.config import ModelSpec
from decentra.model.decoder import build_model
from decentra.modules import module_of_parameter
from decentra.peer.inner import InnerLoop

PAD_S = 0.0  # of every training step
IS_ONE_MODULE = False  # everything is trunk: a run with a single fragment
STEPS_FOLDER = ""  # where the times of steps go; empty: nowhere


def build(spec: ModelSpec, seed: int) -> nn.Module:
    model = build_model(spec, seed)
    model.register_forward_pre_hook(_pad)
    if STEPS_FOLDER:
        _write_times()
    return model


def module_of(name: str) -> str:
    return "trunk" if IS_ONE_MODULE else module_of_parameter(name)


def _pad(_module: nn.Module, _args: Any) -> None:
    if PAD_S and torch.is_grad_enabled():
        time.sleep(PAD_S)


def _write_times() -> None:
    """From now on every inner step of this process leaves a line."""
    plain = InnerLoop.step
    if hasattr(plain, "is_timed"):
        return
    path = Path(STEPS_FOLDER) / f"steps-{os.getpid()}"

    def step(self: InnerLoop) -> int:
        start_s = time.time()
        num_tokens = plain(self)
        with open(path, "a") as out:
            out.write(f"{start_s:.6f} {time.time():.6f}\n")
        return num_tokens

    step.is_timed = True  # type: ignore[attr-defined]
    InnerLoop.step = step  # type: ignore[method-assign]


def model_code(target: Path, *, pad_s: float = 0.0, is_one_module: bool = False, steps_folder: str = "") -> Path:
    """A copy of this file at ``target`` with these settings."""
    text = Path(__file__).read_text()
    settings = (
        ("PAD_S = 0.0", f"PAD_S = {pad_s!r}"), ("IS_ONE_MODULE = False", f"IS_ONE_MODULE = {is_one_module!r}"),
        ('STEPS_FOLDER = ""', f"STEPS_FOLDER = {steps_folder!r}"),
    )  # fmt: skip
    for line, value in settings:
        assert text.count(f"\n{line}") == 1
        text = text.replace(f"\n{line}", f"\n{value}")
    target.write_text(text)
    return target
