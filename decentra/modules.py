"""Which parameter belongs to which module and fragment, and where it lies in the fragment's flat vector. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from decentra.errors import ConfigError
from decentra.ids import ROUTER, TRUNK, Digest, FragmentId, ModuleId, digest_of, expert_module

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_ROUTER = re.compile(r"\.mlp\.gate\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter inside a fragment: its elements are ``offset .. offset + size`` of the flat vector, row-major."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Fragment:
    """The unit of exchange: a fixed set of parameters of one module, laid out as one flat fp32 vector of ``num_elements``."""

    id: FragmentId
    module: ModuleId
    slots: tuple[Slot, ...]
    num_elements: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All fragments of a model in a fixed order; equal on every peer of a run."""

    fragments: tuple[Fragment, ...]

    def __getitem__(self, fragment: FragmentId) -> Fragment:
        for f in self.fragments:
            if f.id == fragment:
                return f
        raise KeyError(fragment)

    def of_module(self, module: ModuleId) -> tuple[Fragment, ...]:
        return tuple(f for f in self.fragments if f.module == module)

    @property
    def modules(self) -> tuple[ModuleId, ...]:
        return tuple(dict.fromkeys(f.module for f in self.fragments))

    @property
    def num_elements(self) -> int:
        return sum(f.num_elements for f in self.fragments)

    def digest(self) -> Digest:
        """Digest of names, shapes and order: two machines that disagree on it must not exchange deltas."""
        return digest_of(repr([(f.id, [(s.name, s.shape) for s in f.slots]) for f in self.fragments]).encode())


def module_of_parameter(name: str) -> ModuleId:
    """Module of a parameter with a Qwen3-MoE checkpoint name: expert FFNs, router rows, everything else is trunk."""
    if found := _EXPERT.search(name):
        return expert_module(int(found.group(1)))
    return ROUTER if _ROUTER.search(name) else TRUNK


def build_layout(
    parameters: Iterable[tuple[str, tuple[int, ...]]],
    *,
    trunk_fragments: int = 1,
    module_of: Callable[[str], ModuleId] = module_of_parameter,
) -> Layout:
    """Lay out parameters (name, shape): sorted by name inside a module; the trunk is cut into ``trunk_fragments`` of similar size.

    A part takes every so-many-th layer, not neighbouring ones: with staggered rounds no stretch of the network is out of step as a whole (strided
    fragments of Streaming DiLoCo, arXiv 2501.18512).
    """
    by_module: dict[ModuleId, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in sorted(parameters):
        by_module.setdefault(module_of(name), []).append((name, tuple(shape)))
    fragments: list[Fragment] = []
    for module in sorted(by_module, key=_module_order):
        num_parts = trunk_fragments if module == TRUNK else 1
        for index, part in enumerate(_cut(by_module[module], num_parts)):
            fragments.append(_fragment(FragmentId(f"{module}/{index}"), module, part))
    if not fragments:
        raise ConfigError("the model has no parameters")
    return Layout(tuple(fragments))


def _module_order(module: ModuleId) -> tuple[int, int, str]:
    if module.startswith("expert."):
        return (2, int(module[7:]), module)
    return (0 if module == TRUNK else 1, 0, module)


def _cut(parameters: list[tuple[str, tuple[int, ...]]], num_parts: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Part i gets layers i, i + P, ...; what is in no layer, or everything where there are fewer layers than parts, goes where least is so far."""
    num_parts = min(num_parts, len(parameters))
    layers: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    rest: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in parameters:
        found = _LAYER.search(name)
        (layers.setdefault(int(found.group(1)), []) if found else rest).append((name, shape))
    if len(layers) < num_parts:
        layers, rest = {}, parameters
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(num_parts)]
    for index, layer in enumerate(sorted(layers)):
        parts[index % num_parts] += layers[layer]
    sizes = [sum(prod(shape) for _, shape in part) for part in parts]
    for name, shape in sorted(rest, key=lambda p: (-prod(p[1]), p[0])):
        least = min(range(num_parts), key=lambda k: (bool(parts[k]), sizes[k]))
        parts[least].append((name, shape))
        sizes[least] += prod(shape)
    return [sorted(part) for part in parts]


def _fragment(fragment: FragmentId, module: ModuleId, parameters: list[tuple[str, tuple[int, ...]]]) -> Fragment:
    slots, offset = [], 0
    for name, shape in parameters:
        slots.append(Slot(name, shape, offset))
        offset += prod(shape)
    return Fragment(fragment, module, tuple(slots), offset)
