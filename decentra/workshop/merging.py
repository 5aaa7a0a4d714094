"""Several models of one architecture into one: merges by weights or by text, greedy soups. Checkpoints in, checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from decentra.data.windows import WindowSource
from decentra.errors import ConfigError
from decentra.hf.checkpoint import Checkpoint, check_target, open_checkpoint, save_checkpoint
from decentra.modular import align, combine, soup
from decentra.modular.combine import Recipe
from decentra.modular.parts import State
from decentra.workshop import texts as text_of
from decentra.workshop.looking import grams_of, losses, mean
from decentra.workshop.saving import (
    NUM_WINDOWS,
    Result,
    Say,
    check_same_function,
    kind_of,
    lineage_of,
    save,
    state_of_same_shape,
    with_spec,
)
from decentra.workshop.training import model_of, squared_gradients


def merge(
    folders: Sequence[Path], target: Path, recipe: Recipe, base: Path | None, *, rebasin: bool = False, texts: Sequence[str] = (),
    say: Say = lambda _: None,
) -> Result:  # fmt: skip
    """Models of one architecture into one, a parameter at a time. ``rebasin``: first their neurons and experts are put in the base's order, or in the
    first one's, which takes all of them in memory. ``texts``: one for all or one of each model, for fisher and regmean, which keep what they see of each
    model in memory: as much as the model, or a matrix of its inputs per matrix."""
    check_target(target)
    if len(folders) + (base is not None) < 2:
        raise ConfigError(f"merge: one model, {folders[0]}, is not merged with anything; the first folder is OUT, the models follow")
    opened = [open_checkpoint(folder) for folder in folders]
    origin = None if base is None else open_checkpoint(base)
    try:
        first = opened[0]
        for folder in [*folders[1:], *([] if base is None else [base])]:
            check_same_function(folder, first)
        seen = [] if not texts else _seen(opened, recipe.method, texts, say, rebasin=rebasin)
        picks: list[combine.Pick] = list(opened)
        if rebasin:
            order = first.state() if origin is None else origin.state()  # task vectors are taken from the base: its order is the one
            picks = [align.aligned(one.state(), order).__getitem__ for one in opened]
        merged = combine.merged(first.shapes, picks, origin, recipe, seen)
        models = [{"name": one.folder.resolve().name, "files": one.hashes} for one in opened]
        lineage = lineage_of(first, "merge", recipe=vars(recipe), models=models, base=None if origin is None else origin.hashes)
        save_checkpoint(target, with_spec(first.manifest, first.spec), merged, lineage, tokenizer=first.folder)
    finally:
        for one in [*opened, *([] if origin is None else [origin])]:
            one.weights.__exit__()
    return {"ok": True, "dir": str(target), "method": recipe.method, "num_models": len(folders), "kind": kind_of(first.spec)}


def _seen(opened: Sequence[Checkpoint], method: str, texts: Sequence[str], say: Say, *, rebasin: bool) -> list[combine.Statistics]:
    """What each model's own text says of its parameters."""
    if method not in combine.STATISTICAL:
        raise ConfigError(f"--text is for {' and '.join(combine.STATISTICAL)}; {method} looks at weights only")
    if rebasin:
        raise ConfigError(
            f"--rebasin changes the order of what {method} has measured; align each model first: decentra merge OUT MODEL --base BASE --rebasin"
        )
    if len(texts) not in (1, len(opened)):
        raise ConfigError(f"--text: expected one for all or one for each of {len(opened)} models, in their order, got {len(texts)}")
    tokenizer = opened[0].tokenizer()
    data = opened[0].manifest.data
    found: list[combine.Statistics] = []
    for index, one in enumerate(opened):
        name = texts[index % len(texts)]
        train, _ = text_of.split([name], data, tokenizer)
        model = model_of(one.state(), one.spec)
        [text] = train.values()
        if method == "fisher":
            values = squared_gradients(model, WindowSource([text], data.seq_len, 0, "fisher"), NUM_WINDOWS)
        else:
            values = grams_of(model, text, data.seq_len, NUM_WINDOWS)
        say(f"{one.folder.name}: {method} has read {NUM_WINDOWS} windows of {name}")
        found.append(values.get)
    return found


def cooked(folders: Sequence[Path], target: Path, texts: Sequence[str], say: Say) -> Result:
    """A greedy soup by held-out loss."""
    check_target(target)
    if len(folders) < 2:
        raise ConfigError(f"soup: one model, {folders[0] if folders else 'none'}, makes none; the first folder is OUT, the models follow")
    opened = [open_checkpoint(folder) for folder in folders]
    tokenizer = opened[0].tokenizer()
    states = [o.state() if n == 0 else state_of_same_shape(o.folder, opened[0]) for n, o in enumerate(opened)]
    _, held_out = text_of.split(texts, opened[0].manifest.data, tokenizer)
    spec, seq_len = opened[0].spec, opened[0].manifest.data.seq_len

    def judge(state: State) -> float:
        return mean(losses(model_of(state, spec), held_out, seq_len, NUM_WINDOWS))

    chosen = soup.greedy_soup(states, judge, say)
    path, barrier = (
        soup.barrier(states[chosen.ingredients[0]], states[chosen.ingredients[-1]], judge) if len(chosen.ingredients) > 1 else ([], 0.0)
    )
    save(
        target,
        opened[0],
        spec,
        chosen.state,
        lineage_of(
            opened[0],
            "soup",
            models=[{"name": folders[i].resolve().name, "files": opened[i].hashes} for i in chosen.ingredients],
            loss=chosen.loss,
        ),
    )
    for one in opened:
        one.weights.__exit__()
    return {
        "ok": True, "dir": str(target), "ingredients": [str(folders[i]) for i in chosen.ingredients], "loss": chosen.loss,
        "tried": [{"model": str(folders[i]), "loss": loss} for i, loss in chosen.tried], "barrier": barrier, "path": path,
    }  # fmt: skip
