"""One entry for every model of a run: the built-in decoder, or code the user gave whose hash the manifest pins. Never fetches code."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from decentra.config import Manifest, ModelSpec
from decentra.errors import ConfigError, ManifestMismatch
from decentra.ids import ROUTER, TRUNK, ModuleId, digest_of, expert_of
from decentra.model.decoder import Decoder, build_model
from decentra.modules import Layout, build_layout, module_of_parameter

Builder = Callable[[ModelSpec, int], nn.Module]
ModuleOf = Callable[[str], ModuleId]


class _VerifiedSource(importlib.abc.InspectLoader):
    """Imports exactly the bytes that were hashed: the file is not read a second time and no cached bytecode is used."""

    def __init__(self, source: bytes, path: Path) -> None:
        self._source, self._path = source, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]  # types.CodeType; the base class is untyped here
        return self.source_to_code(self._source, str(self._path))


def model_code_digest(path: Path) -> str:
    """What ``ModelSpec.code`` must be for this file: ``sha256:<hex>``. Raises ConfigError."""
    return f"sha256:{digest_of(_read(path))}"


def load_model_code(path: Path, expected: str) -> ModuleType:
    """Import the user's model file after checking that it is the one the run was made with.

    The file defines ``build(spec: ModelSpec, seed: int) -> nn.Module`` whose forward returns ``ForwardOutput``, and optionally
    ``module_of(name: str) -> str`` which says to which module ("trunk", "router", "expert.N") a parameter belongs.
    Raises ManifestMismatch when the hash differs, ConfigError when the file cannot be read or imported or defines no ``build``.
    """
    source = _read(path)
    found = f"sha256:{digest_of(source)}"
    if found != expected:
        raise ManifestMismatch(found, expected, what="model code")
    name = f"decentra_model_code_{found[7:23]}"
    loader = _VerifiedSource(source, path)
    spec = importlib.util.spec_from_loader(name, loader, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look classes up there
    try:
        loader.exec_module(module)
    except Exception as error:  # foreign code: whatever it raises is the file's fault, and the user must see which file
        del sys.modules[name]
        raise ConfigError(f"model code {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "build", None)):
        raise ConfigError(f"model code {path} defines no build(spec, seed); see peers/bring_your_own_model.py for the contract")
    return module


def model_for(manifest: Manifest, model_code: Path | None = None) -> tuple[Builder, ModuleOf]:
    """How to build the run's model and how to name the module of a parameter. Raises ConfigError, ManifestMismatch."""
    code = manifest.model.code
    if code == "decoder":
        if model_code is not None:
            raise ConfigError(f"run '{manifest.name}' uses the built-in decoder; leave out the model code {model_code}")
        return build_model, module_of_parameter
    if not code.startswith("sha256:"):
        raise ConfigError(f"model.code of run '{manifest.name}': expected 'decoder' or 'sha256:<hex>', got {code[:80]!r}")
    if model_code is None:
        raise ConfigError(
            f"run '{manifest.name}' trains a model of its own ({code[:19]}); get its file from the organiser, give it as --model-code"
        )
    module = load_model_code(model_code, code)
    named = getattr(module, "module_of", None)
    return _checked_build(module.build, model_code), _checked_module_of(named, manifest.model) if named else module_of_parameter


def layout_for(manifest: Manifest, model_code: Path | None = None) -> Layout:
    """The run's layout: of the built-in decoder without allocating weights, of own code by building it once.

    Raises ConfigError, ManifestMismatch.
    """
    build, module_of = model_for(manifest, model_code)
    model = _shapes_of(build, manifest)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return build_layout(shapes, trunk_fragments=manifest.rounds.trunk_fragments, module_of=module_of)


def _shapes_of(build: Builder, manifest: Manifest) -> nn.Module:
    if build is not build_model:
        # foreign initialisation rarely runs without storage, and where it does torch first loads seconds' worth of decompositions
        return build(manifest.model, manifest.seed)
    with torch.device("meta"):
        return Decoder(manifest.model)


def _checked_build(build: Builder, path: Path) -> Builder:
    def checked(spec: ModelSpec, seed: int) -> nn.Module:
        try:
            model = build(spec, seed)
        except Exception as error:  # foreign code, as above
            raise ConfigError(f"model code {path}: build(spec, seed) failed: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model code {path}: build(spec, seed) must return a torch.nn.Module, got {type(model).__name__}")
        return model

    return checked


def _checked_module_of(named: Callable[[str], str], spec: ModelSpec) -> ModuleOf:
    def checked(name: str) -> ModuleId:
        module = ModuleId(str(named(name)))
        if module in (TRUNK, ROUTER):
            return module
        index = module.removeprefix("expert.")
        # only the canonical spelling: "expert.03" would be a second name of expert 3
        if module.startswith("expert.") and index.isdecimal() and str(int(index)) == index and expert_of(module) in range(spec.num_experts):
            return module
        raise ConfigError(
            f"model code: module_of({name!r}) must be 'trunk', 'router' or 'expert.0' .. 'expert.{spec.num_experts - 1}',"
            f" got {str(module)[:80]!r}"
        )

    return checked


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model code {path}: cannot be read ({error.strerror}); give the path of a Python file") from None
