"""How much memory a trainer needs, and so how many experts fit into a machine. Arithmetic only: no torch, looks at nothing.

Measured on CPUs, estimated for GPUs: the copies of a parameter below are the slope of resident memory over parameters of ``python -m tests.bench.experts``
(40 M parameters; all experts, a quarter mirrored, a quarter held), which are more than the tensors one can name: packets and anchors are on their way too.
"""

from __future__ import annotations

from dataclasses import dataclass

from decentra.config import Manifest, ModelSpec
from decentra.errors import ConfigError
from decentra.ids import expert_of
from decentra.modules import Layout

PROCESS_BYTES = 600 << 20  # an idle trainer: Python, torch, hivemind, grpc
WORK_BYTES = 300 << 20  # threads, buffers and what the allocator keeps
TRAINED_COPIES, FROZEN_COPIES = 15.5, 3.5  # fp32 copies of a parameter that is trained, and of one that is only mirrored
GPU_TRAINED_COPIES, GPU_FROZEN_COPIES = 6.5, 1.5  # estimates, on the device: weights, gradient, two moments, bf16 copies and temporaries
GPU_BYTES = 500 << 20  # CUDA's own


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a trainer: what it needs with no expert of its own, and what each one adds."""

    fixed_bytes: int
    per_expert_bytes: int
    num_experts: int  # of the run

    def total(self, num_experts: int) -> int:
        return self.fixed_bytes + num_experts * self.per_expert_bytes

    def room(self, memory_bytes: int) -> int:
        """How many experts fit; negative when not even the rest does."""
        return min(self.num_experts, (memory_bytes - self.fixed_bytes) // max(1, self.per_expert_bytes))

    def fitting(self, memory_bytes: int, where: str) -> int:
        """How many experts fit into so much memory; ``where`` names it. Raises ConfigError when not even one does, and says what is missing."""
        count = self.room(memory_bytes)
        if count < 1:
            missing = self.total(1) - memory_bytes
            raise ConfigError(
                f"{where}: {mib(memory_bytes)} are {mib(missing)} too few for one expert of this run, which needs {mib(self.total(1))}"
            )
        return count


def footprint(manifest: Manifest, layout: Layout, *, is_partial: bool, on_gpu: bool = False, num_processes: int = 1) -> Footprint:
    """Of a trainer of this run. ``is_partial``: it holds its own experts only; ``on_gpu``: of the device's memory, not the machine's, where
    ``num_processes`` with a device each share the parameters."""
    trained, frozen = (GPU_TRAINED_COPIES, GPU_FROZEN_COPIES) if on_gpu else (TRAINED_COPIES, FROZEN_COPIES)
    trained, frozen = trained / num_processes, frozen / num_processes
    expert_elements = sum(f.num_elements for f in layout.fragments if expert_of(f.module) is not None)
    common_elements = layout.num_elements - expert_elements
    per_expert = expert_elements / manifest.model.num_experts
    fixed = 4 * trained * common_elements + activation_bytes(manifest) + (GPU_BYTES if on_gpu else PROCESS_BYTES + WORK_BYTES)
    if is_partial:
        return Footprint(int(fixed), int(4 * trained * per_expert), manifest.model.num_experts)
    return Footprint(int(fixed + 4 * frozen * expert_elements), int(4 * (trained - frozen) * per_expert), manifest.model.num_experts)


def activation_bytes(manifest: Manifest) -> int:
    """What one inner step keeps for its backward pass, fp32: an estimate from above."""
    m, tokens = manifest.model, manifest.train.batch_size * manifest.data.seq_len
    return 4 * tokens * (m.num_layers * _floats_per_token(m) + 4 * m.vocab_size)


def _floats_per_token(m: ModelSpec) -> int:
    """Of one layer: norms and residuals, queries, keys, values and their output, the chosen experts' gates, ups and products, router logits."""
    attention = 3 * m.num_heads * m.head_dim + 3 * m.num_kv_heads * m.head_dim
    return 8 * m.hidden_size + attention + m.num_experts_per_token * (4 * m.expert_hidden_size + 2 * m.hidden_size) + 4 * m.num_experts


def mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB" if num_bytes < 10 << 30 else f"{num_bytes / (1 << 30):.1f} GiB"
