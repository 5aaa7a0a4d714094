"""Muon for the hidden matrices (Keller Jordan 2024; ``torch.optim.Muon``), AdamW for everything else, behind one interface.

Hidden matrices are the 2-D parameters inside the layers; embeddings, the output head, router rows and vectors are AdamW's (MuLoCo, arXiv 2505.23725).
Muon's steps are scaled to AdamW's usual size (arXiv 2502.16982, eq. 4: 0.2 sqrt(max(rows, columns))), so one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from decentra.ids import ROUTER
from decentra.modules import module_of_parameter
from decentra.peer.adamw import MOMENTS, AdamW

MOMENTUM = 0.95
MUON_MOMENTS = ("momentum_buffer",)  # of every matrix that was ever updated, of its shape
_NOT_HIDDEN = ("embed", "lm_head")


class MuonWithAdamW:
    """The interface of ``AdamW``; ``state`` holds both optimizers' moments."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, beta1: float, beta2: float, weight_decay: float) -> None:
        from torch.optim import Muon  # loads torch's compiler: only for runs that ask for it

        self.parameters = list(parameters.values())
        matrices = [p for name, p in parameters.items() if is_hidden_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        self._rest = AdamW([p for p in self.parameters if id(p) not in chosen], beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        self._muon = None
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._rest.state = self.state
        if matrices:
            self._muon = Muon(matrices, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
            self._muon.state = self.state

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, lr: float) -> None:
        if self._muon is not None:
            for group in self._muon.param_groups:
                group["lr"] = lr
            self._muon.step()  # type: ignore[no-untyped-call]
        self._rest.step(lr)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and module_of_parameter(name) != ROUTER and not any(part in name for part in _NOT_HIDDEN)


def moments_of(name: str, parameter: nn.Parameter, optimizer: str) -> tuple[str, ...]:
    """Names of the moments that ``optimizer`` (a manifest's word) keeps of a parameter."""
    return MUON_MOMENTS if optimizer == "muon" and is_hidden_matrix(name, parameter) else MOMENTS
