from __future__ import annotations

import pytest
import torch

from decentra.delta.flat import gather, scatter
from decentra.delta.pseudo_gradient import pseudo_gradient
from decentra.errors import ConfigError

from .helpers import small_fragment, vector


def params() -> dict[str, torch.Tensor]:
    return {
        "a.norm": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        "b.weight": vector(130, 1).reshape(13, 10).T,  # not contiguous
        "c.empty": torch.empty(0, 5),
        "d.scalar": torch.nn.Parameter(torch.tensor(7.0)),
        "other": torch.zeros(4),
    }


def test_gather_is_a_copy_in_layout_order() -> None:
    fragment, given = small_fragment(), params()
    flat_N = gather(given, fragment)
    assert flat_N.dtype == torch.float32
    assert not flat_N.requires_grad
    assert flat_N[:3].tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(flat_N[3:133], given["b.weight"].reshape(-1))
    assert flat_N[133] == 7.0
    given["b.weight"].zero_()
    assert bool(flat_N[3:133].any())


def test_scatter_gives_views_of_the_same_shapes() -> None:
    fragment, given = small_fragment(), params()
    flat_N = gather(given, fragment)
    views = scatter(flat_N, fragment)
    assert {name: tuple(v.shape) for name, v in views.items()} == {s.name: s.shape for s in fragment.slots}
    assert torch.equal(views["b.weight"], given["b.weight"])
    views["d.scalar"].fill_(9.0)
    assert flat_N[133] == 9.0


def test_a_model_that_does_not_fit_is_named() -> None:
    missing = params()
    del missing["d.scalar"]
    with pytest.raises(ConfigError, match=r"d\.scalar"):
        gather(missing, small_fragment())
    with pytest.raises(ConfigError, match=r"\(10, 13\).*\(13, 10\)"):
        gather(params() | {"b.weight": torch.zeros(13, 10)}, small_fragment())


def test_pseudo_gradient_points_against_the_progress() -> None:
    assert pseudo_gradient(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])).tolist() == [2.0, -3.0]
