"""The organiser's commands for going back: replay, rollback. Arguments in, one call out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decentra.cli.app import JsonOpt, RunDirArg, app, logging_to
from decentra.errors import ConfigError

ToOpt = Annotated[int | None, typer.Option("--to", min=0, help="as it was after so many confirmed rounds of the trunk; default: now")]
LeftOutOpt = Annotated[
    list[str] | None,
    typer.Option("--without", help="as it would be without this peer's packets: a peer id or, while the host runs, a name"),
]
BeforeOpt = Annotated[list[str] | None, typer.Option("--before", help="as it was before this peer's first packet counted")]
StoreOpt = Annotated[list[Path] | None, typer.Option("--store", help="state directory of another keeper, for what the host has not kept")]
CodeOpt = Annotated[Path | None, typer.Option(help="the run's own model code")]


@app.command()
def replay(
    run_dir: RunDirArg,
    to: ToOpt = None,
    before: BeforeOpt = None,
    without: LeftOutOpt = None,
    out: Annotated[Path | None, typer.Option("--out", help="write the model as a checkpoint")] = None,
    store: StoreOpt = None,
    model_code: CodeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compute a run's rounds again from its ledger and the packets its host kept. Alone: is every anchor what its packets give? With --to, --before
    or --without: the model as it was, or as it would be without somebody. Changes nothing. Example: decentra replay my-run --without mallory --out clean"""
    logging_to(False, False)
    from decentra.cli import replay as replays
    from decentra.cli.console import print_json
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main

    run = RunDir(run_dir)
    read = replays.reader_of(run, store or ())
    told, swarm = run_main(lambda _stop: replays.tell(run, model_code))
    if to is None and not before and not without and out is None:
        found = replays.audit(told, read)
        text = (
            f"{found['rounds_equal']} rounds computed again, every anchor is the ledger's; of {found['rounds_not_kept']} too little is kept"
        )
        return print_json(found) if as_json else print(text)
    what = replays.wanted(told, swarm, to, before or (), without or ())
    done = replays.replay(told, read, what)
    if out is not None:
        replays.save(told, done, out, what.without, read, model_code)
    found = replays.summary(told, done, what) | {"dir": None if out is None else str(out)}
    if as_json:
        return print_json(found)
    return print(_text(found) + (f"; the model is in {out}" if out is not None else ""))


@app.command()
def rollback(
    run_dir: RunDirArg,
    to: ToOpt = None,
    before: BeforeOpt = None,
    without: LeftOutOpt = None,
    store: StoreOpt = None,
    service: Annotated[list[str] | None, typer.Option(help="host:port of the averaging service; default: the host's last")] = None,
    model_code: CodeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Let the run go on from what 'replay' gives: from an earlier round, or from before a liar came. Run it on the host's machine while the host runs;
    members fetch the anchors. Keep the peer out first: decentra revoke RUN_DIR PEER. Example: decentra rollback my-run --before mallory"""
    logging_to(False, False)
    from decentra.cli import replay as replays
    from decentra.cli.console import print_json
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main

    if to is None and not before and not without:
        raise ConfigError("rollback: say where to, with --to ROUND or --before PEER, or without whom, with --without PEER")
    run = RunDir(run_dir)
    run.run_key()  # the order needs it: say so before the work
    read = replays.reader_of(run, store or ())

    async def work(_stop: Any) -> dict[str, Any]:
        told, swarm = await replays.tell(run, model_code)
        what = replays.wanted(told, swarm, to, before or (), without or ())
        done = replays.replay(told, read, what)
        return replays.summary(told, done, what) | await replays.roll_back(run, told, done, what.why(), service)

    found = run_main(work)
    text = f"{_text(found)}; {found['fragments_moved']} fragments go on from there, held again after {found['held_again_s']:.1f} s"
    print_json(found) if as_json else print(text)


def _text(found: dict[str, Any]) -> str:
    text = f"{found['rounds']} rounds computed again"
    if found["without"]:
        text += f", {found['rounds_changed']} of them without somebody who was in them"
    if found["rounds_that_stay"]:
        text += f"; {found['rounds_that_stay']} rounds with them stay in: nothing is kept of those"
    return text
