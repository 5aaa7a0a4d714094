"""Training without a swarm, for comparison: the same model, data and inner loop, alone. ``python -m decentra.cli.controls`` trains one and prints JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.config import Manifest, PeerConfig, manifest_from_bytes


@dataclass(frozen=True)
class Control:
    """One training alone. ``domain`` None: text of all domains; ``batch_factor``: how many peers' batches one step takes."""

    name: str
    domain: str | None
    batch_factor: int = 1


def controls_of(manifest: Manifest, num_peers: int) -> list[Control]:
    """``solo_own``: each domain's owner alone on its own text; ``solo``: alone on all; ``ddp_like``: one with everybody's batch."""
    alone = [Control(f"solo_own/{domain}", domain) for domain in manifest.data.domains[:num_peers]]
    return [Control("ddp_like", None, num_peers), *alone, Control("solo", None)]


def train_alone(manifest: Manifest, control: Control, num_steps: int) -> dict[str, Any]:
    """Train every parameter for ``num_steps`` and evaluate on all domains' held-out parts (nats per byte)."""
    import torch

    from decentra.data.domains import embedded_domain
    from decentra.data.windows import source_for
    from decentra.ids import PeerId
    from decentra.model.custom import layout_for, model_for
    from decentra.model.evaluate import evaluate
    from decentra.peer.inner import InnerLoop

    torch.set_num_threads(1)
    wide = manifest.model_copy(
        update={"train": manifest.train.model_copy(update={"batch_size": manifest.train.batch_size * control.batch_factor})}
    )
    layout = layout_for(manifest)
    build, _ = model_for(manifest)
    model = build(manifest.model, manifest.seed)
    config = PeerConfig(domain=control.domain, shared_fraction=0.0 if control.domain else 1.0)
    source = source_for(wide, config, PeerId(control.name))
    inner = InnerLoop(wide, layout, model, source, torch.device("cpu"), frozenset(f.id for f in layout.fragments))
    for _ in range(num_steps):
        inner.step()
    losses = {d: evaluate(model, embedded_domain(d, manifest.data).held_out, manifest.data.seq_len) for d in manifest.data.domains}
    return {"name": control.name, "num_steps": num_steps, "loss": sum(losses.values()) / len(losses), "loss_per_domain": losses}


def main() -> None:
    """``python -m decentra.cli.controls MANIFEST NAME DOMAIN|- BATCH_FACTOR NUM_STEPS``."""
    path, name, domain, factor, num_steps = sys.argv[1:6]
    manifest = manifest_from_bytes(Path(path).read_bytes(), path)
    control = Control(name, None if domain == "-" else domain, int(factor))
    print(json.dumps(train_alone(manifest, control, int(num_steps))))


if __name__ == "__main__":
    main()
