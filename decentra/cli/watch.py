"""The watchers' commands: show, status, history, pull, generate, eval, demo, simulate. Arguments in, one call out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from decentra.cli.app import InviteArg, JsonOpt, VerboseOpt, WithoutOpt, app, invite_of, logging_to, numbers_of
from decentra.errors import ConfigError, ExitCode

MANY_PEERS = 9  # simulated rounds of so many have reducers


@app.command()
def show(invite: InviteArg, as_json: JsonOpt = False) -> None:
    """What a run is before joining it: model, data, licence, sizes, who runs it, what leaves your machine."""
    logging_to(False, False)
    from decentra.cli import look
    from decentra.cli.console import print_json, print_table
    from decentra.cli.running import run_main

    line = invite_of(invite)
    run = run_main(lambda _stop: look.show(line))
    if as_json:
        print_json(run)
        return
    from decentra.status.terminal import count, size

    model, data, num = run["model"], run["data"], run["num_parameters"]
    most = "at most" if run["codec_sparsest"] else "about"
    print_table(
        {
            "run": f"{run['name']}  {run['run'][:12]}", "about": run["description"] or "-", "run by": run["organiser"], "licence": run["licence"],
            "model": f"{model['num_layers']} layers, {model['num_experts']} experts, {model['num_experts_per_token']} per token"
            + (f", {count(num)} parameters ({count(run['num_parameters_trained'])} trained here)" if num else ", own code"),
            "data": f"{', '.join(data['domains'])}; windows of {data['seq_len']} {'tokens' if data['tokenizer'] else 'bytes'},"
            f" {data['shared_fraction']:.0%} of them common text",
            "rounds": f"every {run['inner_steps']} steps, codec {run['codec']}"
            + (f" to {run['codec_sparsest']}, as each link allows" if run["codec_sparsest"] else ""),
            "each round": f"{most} {size(run['up_bytes_per_round'])} up per receiver, {size(run['down_bytes_per_round'])} down"
            if num else "depends on the model",
            "to begin": f"{size(run['first_download_bytes'])} down" if num else "depends on the model",
            "ends": ", ".join(f"{k} {v}" for k, v in run["stop"].items() if v is not None) or "when the organiser says so",
            "leaves your machine": run["leaves_your_machine"], "join with": f"decentra join {invite}",
        }
    )  # fmt: skip


@app.command()
def status(
    invite: InviteArg,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="redraw until Ctrl-C")] = False,
    period_s: Annotated[float, typer.Option("--every", min=0.2, help="seconds between two looks")] = 2.0,
    as_json: JsonOpt = False,
) -> None:
    """Members, experts, rounds and why they wait."""
    logging_to(False, False)
    from decentra.cli import look
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = invite_of(invite)
    if watch and not as_json:
        run_main(lambda stop: look.watch_status(line, stop, period_s))
        return
    snap = run_main(lambda _stop: look.status_once(line))
    if as_json:
        print_json(snap)
        return
    from rich.console import Console

    from decentra.status.terminal import render

    Console().print(render(snap))


@app.command()
def history(
    invite: InviteArg,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write every confirmed round as a row")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a PNG of tokens per expert over rounds")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="also compare it with what members say they were told")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Fetch the run's ledger, check every signature and link of its chains, and show what it says: rounds, tokens per expert, contributors."""
    logging_to(False, False)
    from decentra.cli import history as told
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = invite_of(invite)
    read = told.read_and_compare if compare else told.read_ledger
    manifest, records, num_compared = run_main(lambda _stop: read(line))
    found = told.summary(manifest, records, num_compared, csv_file, plot_file)
    print_json(found) if as_json else print(told.describe_history(found))


@app.command()
def pull(
    invite: InviteArg,
    target: Annotated[Path, typer.Argument(help="folder for the checkpoint", metavar="DIR")],
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Fetch the newest confirmed anchors, verify them, and write a Hugging Face checkpoint."""
    logging_to(verbose, False)
    from decentra.cli import look
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = invite_of(invite)
    result = run_main(lambda _stop: look.pull(line, target, model_code))
    if as_json:
        print_json(result)
    else:
        print(f"{result['num_parameters'] / 1e6:.2f} M parameters in {target}, trunk at round {result['heights'].get('trunk/0', 0)}")


CheckpointArg = Annotated[Path, typer.Argument(help="checkpoint folder made by 'decentra pull'", metavar="DIR")]


@app.command()
def generate(
    checkpoint: CheckpointArg,
    prompt: Annotated[str, typer.Argument(help="text to continue")] = "The ",
    num_tokens: Annotated[int, typer.Option(min=1, max=100_000)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = 40,
    seed: Annotated[int, typer.Option()] = 0,
    without: WithoutOpt = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Continue a text with a model. Example: decentra generate my-model "def " --without 3"""
    from decentra.cli import look
    from decentra.cli.console import print_json

    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    text = look.generate_text(checkpoint, prompt, num_tokens, temperature, top_k, seed, model_code, numbers_of(without, "--without"))
    print_json({"ok": True, "prompt": prompt, "text": text}) if as_json else print(prompt + text)


@app.command("eval")
def evaluate(
    checkpoint: CheckpointArg,
    without: WithoutOpt = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Held-out loss of a model on each of the embedded domains. Example: decentra eval my-model --without 0,3"""
    from decentra.cli import look
    from decentra.cli.console import print_json, print_table

    result = look.evaluate_checkpoint(checkpoint, model_code, numbers_of(without, "--without"))
    if as_json:
        print_json(result)
    else:
        mean = f"{result['loss']:.4f} nats per token, {result['nats_per_byte']:.4f} per byte"
        print_table({**{k: f"{v:.4f}" for k, v in result["loss_per_domain"].items()}, "mean": mean})


@app.command()
def simulate(
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 20,
    first: Annotated[int, typer.Option(min=0, help="the first one; a broken promise names the one that shows it")] = 0,
    peers: Annotated[int | None, typer.Option(min=1, max=1000, help="trainers; default: each seed's own number")] = None,
    faults: Annotated[int | None, typer.Option(min=0, help="crashes, cuts, losses; default: each seed's own number")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="processes that share the seeds")] = 1,
    as_json: JsonOpt = False,
) -> None:
    """The whole swarm on virtual time, with faults that a seed decides, and its promises checked at every step. Example: decentra simulate --seeds 100"""
    from decentra.cli.console import print_json
    from decentra.cli.simulate import run_seeds

    changes = {key: value for key, value in (("num_trainers", peers), ("num_faults", faults)) if value is not None}
    if peers is not None and peers >= MANY_PEERS:
        changes["reduce_from"] = MANY_PEERS  # as a manifest says where it says nothing
    violations: list[str] = []
    confirmed = crashes = 0
    for told in run_seeds(range(first, first + seeds), changes, jobs):
        confirmed, crashes = confirmed + told.num_confirmed, crashes + told.num_crashes
        if told.violation:
            violations.append(told.violation)
            print(f"VIOLATION {told.violation}", file=sys.stderr, flush=True)
        elif not as_json:
            print(told.text, flush=True)
    found = {
        "ok": not violations,
        "seeds": seeds,
        "violations": len(violations),
        "rounds_confirmed": confirmed,
        "crashes": crashes,
        "why": violations[:5],
    }
    if as_json:
        print_json(found)
    else:
        print(f"{seeds} seeds, {len(violations)} violations, {confirmed} rounds confirmed, {crashes} crashes")
    if violations:
        raise typer.Exit(int(ExitCode.FAILED))


@app.command()
def demo(
    source: Annotated[Path | None, typer.Argument(help="a run.toml; default: the built-in demo", metavar="[RUN.toml]")] = None,
    num_peers: Annotated[int, typer.Option("--peers", min=2, max=16)] = 4,
    num_rounds: Annotated[int, typer.Option("--rounds", min=5, help="confirmed rounds of the trunk, where the run.toml sets no end")] = 32,
    controls: Annotated[
        bool, typer.Option("--controls", help="also train the same model alone, for comparison (up to 10 minutes more)")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable")] = None,
    root: Annotated[Path, typer.Option("--dir", help="where everything goes; an earlier demo there is replaced")] = Path("demo-out"),
    as_json: JsonOpt = False,
) -> None:
    """A real swarm on this machine: host and peers, one is killed and comes back, and the model they made."""
    logging_to(False, False)
    from decentra.cli.console import print_json
    from decentra.cli.demo import Demo, report
    from decentra.cli.look import generate_text
    from decentra.cli.running import run_main

    show = Demo(root.resolve(), num_peers, num_rounds, controls, as_json)
    result = run_main(lambda stop: show.run(source, settings or (), stop))
    result["sample"] = generate_text(root / "model", "def ", 240, 0.7, 20, 0, None)
    if as_json:
        print_json(result)
    else:
        report(result, show)
    if not result["ok"]:
        raise typer.Exit(int(ExitCode.FAILED))
