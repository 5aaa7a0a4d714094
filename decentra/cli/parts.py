"""The model builders' commands: import, export, verify, upcycle, moefy, expand, merge, soup, expert, route, tune, distil, continual, forget, audit, inspect.

Arguments in, one call out; what they do is in ``workshop``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from decentra.cli.app import JsonOpt, app, numbers_of
from decentra.errors import ConfigError

SourceArg = Annotated[Path, typer.Argument(help="a checkpoint's folder: of decentra, or of Hugging Face (see import)", metavar="DIR")]
VerifiedArg = Annotated[Path, typer.Argument(help="a checkpoint's folder, or a run's (while its host does not run there)", metavar="DIR")]
TargetArg = Annotated[Path, typer.Argument(help="folder to write", metavar="OUT")]
TextOpt = Annotated[list[str] | None, typer.Option("--text", help="embedded domain (code, prose, headers, math) or NAME=PATH; repeatable")]
SeedOpt = Annotated[int, typer.Option(min=0)]
StepsOpt = Annotated[int, typer.Option(min=1, help="training steps")]
LrOpt = Annotated[float, typer.Option(min=0.0, help="learning rate")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _done(found: dict[str, Any], as_json: bool, *keys: str) -> None:
    """JSON, or a few of the values for people."""
    from decentra.cli.console import print_json, print_table

    if as_json:
        print_json(found)
    else:
        print_table({key.replace("_", " "): _told(found[key]) for key in keys if key in found})


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)


@app.command("import")
def import_(source: SourceArg, target: TargetArg, as_json: JsonOpt = False) -> None:
    """Read a Hugging Face model (Qwen3, Llama, Mistral, Mixtral, OLMoE) exactly, as a checkpoint of decentra. Example: decentra import Qwen3-0.6B my-dense"""
    from decentra.workshop import making

    _done(making.convert(source, target, "import"), as_json, "dir", "kind", "num_parameters")


@app.command()
def export(
    source: SourceArg,
    target: TargetArg,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    per_module: Annotated[bool, typer.Option("--per-module", help="a file for the trunk, the router and each expert")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a checkpoint that transformers and vLLM load, with a model card. Example: decentra export my-model my-model-hf --dtype bf16"""
    from decentra.workshop import making

    if dtype not in making.DTYPES:
        raise ConfigError(f"dtype: expected fp32 or bf16, got {dtype!r}")
    _done(making.convert(source, target, "export", dtype, per_module=per_module), as_json, "dir", "kind", "num_parameters", "files")


@app.command()
def verify(source: VerifiedArg, as_json: JsonOpt = False) -> None:
    """A checkpoint: compare its files with the hashes in its card. A run's folder: its ledger, every signature and link. Example: decentra verify my-model"""
    from decentra.hf.checkpoint import open_checkpoint
    from decentra.hf.checkpoint import verify as verified

    if (source / "manifest.json").is_file():
        from decentra.cli.standby import describe_ledger

        return _done(
            describe_ledger(source),
            as_json,
            "dir",
            "run",
            "term",
            "num_records",
            "num_signed",
            "num_unsigned",
            "rounds_confirmed",
            "heights",
        )
    files = verified(source)
    open_checkpoint(source).weights.__exit__()
    return _done({"ok": True, "dir": str(source), "files": files}, as_json, "dir", "files")


@app.command()
def upcycle(
    source: SourceArg,
    target: TargetArg,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="experts per token")] = 2,
    method: Annotated[str, typer.Option(help="copy, noise:0.01, drop:0.5, virtual-group:2, or btx")] = "copy",
    others: Annotated[list[Path] | None, typer.Option("--with", help="btx: a dense model of the same shape; repeatable")] = None,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Make a mixture of experts out of a dense model. Example: decentra upcycle my-dense my-moe --experts 8 --top-k 2"""
    from decentra.doctor.machine import free_memory_bytes
    from decentra.workshop import making

    found = making.upcycled(
        source, target, experts=experts, top_k=top_k, method=method, others=others or (), seed=seed, free_bytes=free_memory_bytes()
    )
    _done(found, as_json, "dir", "before", "after", "is_exact", "start_logit_gap", "why_no_gap")


@app.command()
def moefy(
    source: SourceArg,
    target: TargetArg,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    active: Annotated[int, typer.Option(min=1, help="experts per token; as many as experts: exact")] = 4,
    cluster: Annotated[str, typer.Option(help="coact (needs --text), kmeans or random")] = "coact",
    shared: Annotated[
        int | None,
        typer.Option(min=0, help="experts of the strongest neurons; default with coact: half of the active"),
    ] = None,
    text: TextOpt = None,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Split a dense model's FFN into experts by which neurons fire together. Example: decentra moefy my-dense my-split --active 4 --text code"""
    from decentra.doctor.machine import free_memory_bytes
    from decentra.workshop import making

    found = making.moefied(
        source,
        target,
        experts=experts,
        active=active,
        cluster=cluster,
        shared=shared,
        texts=text or (),
        seed=seed,
        free_bytes=free_memory_bytes(),
    )
    _done(found, as_json, "dir", "before", "after", "is_exact", "start_logit_gap", "why_no_gap")


@app.command()
def expand(
    source: SourceArg,
    target: TargetArg,
    factor: Annotated[int, typer.Option(min=2, help="how many times as many experts")] = 2,
    keep_active: Annotated[bool, typer.Option("--keep-active", help="choose no more per token than before")] = False,
    noise: Annotated[float, typer.Option(min=0.0, help="of the copies, in units of each tensor's deviation")] = 0.0,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Give a mixture of experts more experts, copies of those it has. Example: decentra expand my-moe my-larger-moe --factor 2 --noise 0.01"""
    from decentra.doctor.machine import free_memory_bytes
    from decentra.workshop import making

    found = making.expanded(source, target, factor=factor, keep_chosen=keep_active, noise=noise, seed=seed, free_bytes=free_memory_bytes())
    _done(found, as_json, "dir", "before", "after", "is_exact", "start_logit_gap", "why_no_gap")


@app.command()
def merge(
    target: TargetArg,
    models: Annotated[list[Path] | None, typer.Argument(help="checkpoints of one architecture", metavar="[MODEL]...")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="linear, slerp, karcher, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, model_stock, fisher, regmean"
        ),
    ] = "linear",
    base: Annotated[Path | None, typer.Option(help="their common ancestor")] = None,
    weights: Annotated[str | None, typer.Option(help="one per model, such as 0.5,0.5")] = None,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of each task vector that is kept")] = 1.0,
    t: Annotated[float, typer.Option(min=0.0, max=1.0, help="slerp: 0 the first, 1 the second")] = 0.5,
    scale: Annotated[float, typer.Option(help="of the merged task vector")] = 1.0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="pattern of names, such as '*.experts.3.*'; the rest comes from the base or the first"),
    ] = None,
    config: Annotated[Path | None, typer.Option("--yaml", help="a mergekit configuration with models; instead of the options")] = None,
    rebasin: Annotated[bool, typer.Option("--rebasin", help="first put neurons and experts in the first model's order")] = False,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="fisher, regmean: embedded domain or NAME=PATH, one for all or one per model, in their order"),
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="regmean: what correlations between inputs count")] = 0.9,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Merge checkpoints, a tensor at a time. Example: decentra merge both one two --method ties --base my-dense --density 0.2"""
    from decentra.modular.combine import Recipe, recipe_from
    from decentra.workshop import merging

    folders = list(models or ())
    if config is not None:
        if folders or weights or only:
            raise ConfigError("merge: with --yaml the models, their weights and what is merged stand in the file")
        import yaml

        try:
            raw = yaml.safe_load(config.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} is no YAML file that can be read: {error}") from None
        recipe, named, named_base = recipe_from(raw)
        folders, base = [config.parent / n for n in named], base or (None if named_base is None else config.parent / named_base)
    else:
        recipe = Recipe(method, _numbers(weights), (density,), t=t, scale=scale, alpha=alpha, seed=seed, only=tuple(only or ()))
    if not folders:
        raise ConfigError("merge: no model was given; name two folders or more, or --yaml")
    found = merging.merge(folders, target, recipe, base, rebasin=rebasin, texts=text or (), say=_say)
    _done(found, as_json, "dir", "method", "num_models", "kind")


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"weights: expected numbers such as 0.5,0.5, got {text!r}") from None


@app.command("soup")
def soup_(
    target: TargetArg,
    models: Annotated[list[Path], typer.Argument(help="checkpoints of one ancestor", metavar="MODEL...")],
    text: TextOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Average those models whose average is no worse, best first, judged on held-out text. Example: decentra soup best one two three --text code"""
    from decentra.workshop import merging

    _done(merging.cooked(models, target, text or _default_texts(models[0]), _say), as_json, "dir", "ingredients", "loss", "barrier")


def _default_texts(folder: Path) -> tuple[str, ...]:
    from decentra.data.domains import embedded_domains
    from decentra.hf.checkpoint import open_checkpoint

    with open_checkpoint(folder) as opened:
        return tuple(d for d in opened.manifest.data.domains if d in embedded_domains())


expert_app = typer.Typer(
    no_args_is_help=True, help="Experts as parts: train one beside a frozen public model, add it to a model, keep some, list them."
)
app.add_typer(expert_app, name="expert")


@expert_app.command("train")
def expert_train(
    source: SourceArg,
    target: TargetArg,
    text: TextOpt = None,
    name: Annotated[str, typer.Option(help="whose it is; 'forget --owner' takes it out again")] = "me",
    steps: StepsOpt = 200,
    lr: LrOpt = 1.4e-3,
    start: Annotated[int, typer.Option(min=0, help="expert of the public model to start from")] = 0,
    gate_steps: Annotated[int, typer.Option("--gate", min=0, help="steps to train a gate for router phatgoose, such as 100")] = 0,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Train an expert on text that stays here; the public model is frozen. Example: decentra expert train my-base my-expert --text notes=NOTES"""
    from decentra.workshop import adding

    if not text:
        raise ConfigError("expert train: give the text to learn with --text")
    found = adding.expert_train(
        source, target, text, name=name, steps=steps, lr=lr, seed=seed, start=start, gate_steps=gate_steps, say=_say
    )
    _done(found, as_json, "dir", "name", "loss_before", "loss_after", "tokens")


@expert_app.command("card")
def expert_card(
    source: SourceArg,
    target: TargetArg,
    text: TextOpt = None,
    number: Annotated[int, typer.Option("--number", min=0, help="which of the model's experts")] = 0,
    name: Annotated[str, typer.Option(help="what to call it")] = "public",
    as_json: JsonOpt = False,
) -> None:
    """Write a model's own expert with the card of a text, for routers by cards. Example: decentra expert card my-base public --text prose"""
    from decentra.workshop import adding

    if not text:
        raise ConfigError("expert card: give the text that it is for with --text")
    _done(adding.expert_card(source, target, text, number=number, name=name), as_json, "dir", "name", "num_tokens")


@expert_app.command("lora")
def expert_lora(
    source: SourceArg,
    adapter: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter of this model's FFNs", metavar="ADAPTER")],
    target: TargetArg,
    name: Annotated[str, typer.Option(help="whose it is")] = "me",
    as_json: JsonOpt = False,
) -> None:
    """Make an expert of a LoRA adapter that was trained elsewhere. Example: decentra expert lora my-dense my-adapter my-expert"""
    from decentra.workshop import adding

    _done(adding.expert_lora(source, adapter, target, name=name), as_json, "dir", "name", "adapter")


@expert_app.command("add")
def expert_add(
    source: SourceArg,
    target: TargetArg,
    expert: Annotated[list[Path], typer.Option("--expert", help="folder of 'expert train'; repeatable")],
    any_base: Annotated[bool, typer.Option("--any-base", help="also one that was trained beside another model")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Put experts into a model; nothing of it changes. Example: decentra expert add my-base my-model --expert mine --expert yours"""
    from decentra.workshop import adding

    _done(adding.expert_add(source, target, expert, any_base=any_base), as_json, "dir", "kind")


@expert_app.command("keep")
def expert_keep(
    source: SourceArg,
    target: TargetArg,
    numbers: Annotated[str, typer.Option("--experts", help="those that stay, in their new order, such as 0,2,5")],
    as_json: JsonOpt = False,
) -> None:
    """A model with some of the experts, numbered without holes, router rows moved along. Example: decentra expert keep my-moe small --experts 0,2"""
    from decentra.workshop import adding

    _done(adding.expert_keep(source, target, list(numbers_of(numbers, "--experts"))), as_json, "dir", "kind", "kept")


@expert_app.command("list")
def expert_list(source: SourceArg, as_json: JsonOpt = False) -> None:
    """The experts of a model and what is known of each. Example: decentra expert list my-model"""
    from decentra.hf.checkpoint import open_checkpoint
    from decentra.workshop.saving import known_experts

    with open_checkpoint(source) as opened:
        known = known_experts(opened.lineage)
        rows = {f"expert {e}": known[e]["about"] if e in known else "of the model itself" for e in range(opened.spec.num_experts)}
    _done({"ok": True, **rows}, as_json, *rows)


@app.command()
def route(
    source: SourceArg,
    text: Annotated[str, typer.Argument(help="text to send through the model")],
    router: Annotated[str, typer.Option(help="own, evidence, prefix, document, uniform, centroid, lda, phatgoose")] = "own",
    expert: Annotated[
        list[Path] | None, typer.Option("--expert", help="folder with the card of expert 0, 1, ...; for routers by cards")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with the text coloured")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show which expert serves which part of a text. Example: decentra route my-model "def area(r): return 3.14" --router evidence"""
    from decentra.workshop import routing

    found = routing.routed(source, text, router, expert or ())
    if html is not None:
        from decentra.status.colours import page

        html.write_text(page(found["text"], found["expert_per_byte"], f"{source.name}, router {router}"))
    if as_json:
        _done(found, True)
        return
    from rich.console import Console

    from decentra.status.colours import coloured

    Console().print(coloured(found["text"], found["expert_per_byte"]))
    _done({"loss": found["loss"], "share_per_expert": found["share_per_expert"]}, False, "loss", "share_per_expert")


@app.command()
def tune(
    source: SourceArg, target: TargetArg, text: TextOpt = None, steps: StepsOpt = 60, lr: LrOpt = 3e-3, seed: SeedOpt = 0, as_json: JsonOpt = False
) -> None:  # fmt: skip
    """Train the router alone on public text, after experts were added or held apart. Example: decentra tune my-model my-tuned --text prose --text code"""
    from decentra.workshop import routing

    found = routing.tuned(source, target, text or _default_texts(source), steps=steps, lr=lr, seed=seed, say=_say)
    _done(found, as_json, "dir", "loss_before", "loss_after")


@app.command()
def distil(
    source: SourceArg,
    target: TargetArg,
    text: TextOpt = None,
    router: Annotated[str, typer.Option(help="evidence, prefix, centroid, lda, uniform, document")] = "evidence",
    expert: Annotated[
        list[Path] | None, typer.Option("--expert", help="folder with the card of expert 0, 1, ...; for routers by cards")
    ] = None,
    steps: StepsOpt = 100,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Bake a runtime router into rows that can be exported, and say what is lost (KL). Example: decentra distil my-model baked --router evidence"""
    from decentra.workshop import routing

    names = text or _default_texts(source)
    found = routing.distilled(source, target, names, router=router, experts=expert or (), steps=steps, seed=seed, say=_say)
    _done(found, as_json, "dir", "router", "kl", "loss_with_router", "loss_with_rows")


@app.command()
def continual(
    source: SourceArg,
    target: TargetArg,
    text: TextOpt = None,
    strategy: Annotated[str, typer.Option(help="grow (a new expert each, old ones frozen), naive, replay, lwf, ewc")] = "grow",
    steps: StepsOpt = 200,
    lr: LrOpt = 1.4e-3,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Learn texts one after the other and measure what stays. Example: decentra continual my-base my-lasting --text code --text headers"""
    from decentra.workshop import adding

    found = adding.continual(source, target, text or _default_texts(source), strategy=strategy, steps=steps, lr=lr, seed=seed, say=_say)
    _done(found, as_json, "dir", "strategy", "stream", "backward_transfer", "forward_transfer", "loss")


@app.command()
def forget(
    source: SourceArg,
    target: TargetArg,
    experts: Annotated[str | None, typer.Option("--experts", help="numbers, such as 3 or 3,5")] = None,
    owner: Annotated[str | None, typer.Option(help="all experts of this name")] = None,
    text: TextOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Take experts and all they learned out of a model; says whether that is exact and, with texts, what is still known of them.

    Example: decentra forget my-model without --owner alice --text notes=NOTES"""
    from decentra.workshop import adding

    if experts is None and owner is None:
        raise ConfigError("forget: say what, with --experts or --owner")
    found = adding.forget(source, target, experts=list(numbers_of(experts, "--experts")), owner=owner, texts=text or ())
    _done(found, as_json, "dir", "forgotten", "mode", "why", "kind", "loss_before", "loss_after")


@app.command()
def audit(
    source: SourceArg,
    members: Annotated[Path, typer.Option(help="file of lines that the model is said to have seen")],
    others: Annotated[Path, typer.Option(help="file of like lines that it has not")],
    as_json: JsonOpt = False,
) -> None:
    """Can what a model was trained on be told from its losses? AUC 0.5: no trace. Example: decentra audit my-model --members SEEN --others UNSEEN"""
    from decentra.workshop import adding

    try:
        lines = [[line for line in path.read_text().splitlines() if line.strip()] for path in (members, others)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"audit: a file of lines cannot be read: {error}") from None
    _done(adding.audit(source, *lines), as_json, "auc", "num_members", "num_others", "loss_members", "loss_others")


@app.command()
def inspect(
    source: SourceArg,
    text: TextOpt = None,
    plot: Annotated[Path | None, typer.Option(help="write the heat map of domains and experts here, as PNG")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Size, lineage and, with texts, losses, expert load by domain, MaxVio, router entropy, dead experts. Example: decentra inspect my-moe --text code"""
    from decentra.workshop import routing

    if plot is not None and not text:
        raise ConfigError("inspect --plot shows who serves which text; name texts with --text")
    if plot is not None and not plot.resolve().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {plot.resolve().parent}")
    found = routing.inspect(source, text or ())
    if plot is not None:
        from decentra.status.plot import heat_png

        heat_png(plot, found["experts_by_domain"], f"who serves what in {source.name}")
    keys = ("dir", "kind", "num_parameters", "loss_per_domain", "max_violation", "router_entropy", "dead_experts", "mutual_information")
    _done(found, as_json, *keys)
    if not as_json and "experts_by_domain" in found:
        from rich.console import Console

        from decentra.status.colours import heat_map

        Console().print(heat_map(found["experts_by_domain"]))
