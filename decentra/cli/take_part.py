"""The members' commands: join, keep, plan, autostart, pause, resume. Arguments in, one call out."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from decentra.cli.app import InviteArg, JsonOpt, LogJsonOpt, VerboseOpt, app, invite_of, logging_to, numbers_of


def _peer_config(path: Path | None, given: dict[str, Any]) -> Any:
    """Command line over TOML over defaults."""
    from decentra.config import PeerConfig, load_toml, parse_config

    base = load_toml(PeerConfig, path) if path is not None else PeerConfig()
    raw = base.model_dump(exclude_defaults=True) | {k: v for k, v in given.items() if v is not None and v != []}
    return parse_config(PeerConfig, raw, "options")


ConfigOpt = Annotated[Path | None, typer.Option("--config", help="peer TOML; see peers/")]
NameOpt = Annotated[str | None, typer.Option(help="names this peer and its state directory; default: peer")]
DirOpt = Annotated[Path | None, typer.Option("--dir", help="state directory; default: the user state directory, by run and name")]
ListenOpt = Annotated[list[str] | None, typer.Option(help="multiaddress to listen on; default: any port")]
OutboundOpt = Annotated[bool, typer.Option("--outbound-only", help="listen nowhere; take part through a keeper")]
GenesisOpt = Annotated[
    Path | None, typer.Option(help="RUN_DIR/genesis, the first anchors: for the first member of a run that has no host to get them from")
]
PatienceOpt = Annotated[
    float,
    typer.Option("--wait", help="seconds to try for the first contact; who has anchors trains meanwhile", min=0.0),
]

MemoryOpt = Annotated[str | None, typer.Option(help="most memory to plan with, such as 4GiB; as many experts are held as fit")]
GpuMemoryOpt = Annotated[str | None, typer.Option(help="most memory of the GPU to use, such as 6GiB")]


@app.command()
def join(
    invite: InviteArg,
    config: ConfigOpt = None,
    name: NameOpt = None,
    state: DirOpt = None,
    experts: Annotated[str | None, typer.Option(help="experts to train, such as 0,3; default: placed where needed")] = None,
    num_experts: Annotated[int | None, typer.Option(min=0, help="how many experts to hold; default: the run's")] = None,
    mode: Annotated[
        str | None, typer.Option(help="mirror: all experts in memory; held: only those this peer trains; default: the run's")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="text, JSONL or Parquet, file or folder; repeatable; default: embedded text")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="train on one embedded domain")] = None,
    shared_fraction: Annotated[float | None, typer.Option(help="share of common text; default: the run's")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N")] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads of the trainer")] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="train in so many processes, a GPU each, that share one model (FSDP); torchrun does it, too")
    ] = 1,
    listen: ListenOpt = None,
    announce: Annotated[list[str] | None, typer.Option(help="multiaddress to tell others, behind a forwarded port")] = None,
    outbound_only: OutboundOpt = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="leave after this many inner steps")] = None,
    up: Annotated[
        str | None,
        typer.Option(help="most that packets and anchors may take of the uplink, such as 5mbit"),
    ] = None,
    cap: Annotated[
        str | None, typer.Option(help="most that packets may send, such as 20GB/day, where the run lets peers choose their codec")
    ] = None,
    memory: MemoryOpt = None,
    gpu_memory: GpuMemoryOpt = None,
    hours: Annotated[str | None, typer.Option(help="local times to train at, such as 22-7; outside the peer leaves and waits")] = None,
    when_idle: Annotated[bool, typer.Option("--when-idle", help="give way to other work on this machine")] = False,
    on_battery: Annotated[bool, typer.Option("--on-battery", help="train on battery, too")] = False,
    nice: Annotated[int | None, typer.Option(min=0, max=19, help="scheduling priority; 19 gives way to everything else")] = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    genesis: GenesisOpt = None,
    patience_s: PatienceOpt = 300.0,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Join a run and train. Ctrl-C leaves cleanly, a second Ctrl-C at once; joining again goes on where it stopped."""
    given = {
        "name": name, "dir": state, "experts": None if experts is None else numbers_of(experts, "--experts"), "num_experts": num_experts,
        "mode": mode, "data": [str(d) for d in data or ()],
        "domain": domain, "shared_fraction": shared_fraction, "device": device, "threads": threads,
        "listen": list(listen or ()), "announce": list(announce or ()),
        "max_steps": max_steps, "up": up, "cap": cap, "model_code": model_code,
        "memory": memory, "gpu_memory": gpu_memory, "hours": hours, "when_idle": when_idle or None, "on_battery": on_battery or None, "nice": nice,
    }  # fmt: skip
    peer = _peer_config(config, given)
    _take_part(invite, peer, genesis, outbound_only, patience_s, as_json, verbose, log_json, processes)


@app.command()
def keep(
    invite: InviteArg,
    config: ConfigOpt = None,
    name: NameOpt = None,
    state: DirOpt = None,
    listen: ListenOpt = None,
    announce: Annotated[list[str] | None, typer.Option()] = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    genesis: GenesisOpt = None,
    patience_s: PatienceOpt = 300.0,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Be a keeper: follow every module, serve blobs, attest; trains nothing. A run with two keepers survives its organiser's disk."""
    given = {
        "name": name or "keeper", "dir": state, "listen": list(listen or ()), "announce": list(announce or ()), "role": "keeper",
        "model_code": model_code,
    }  # fmt: skip
    _take_part(invite, _peer_config(config, given), genesis, False, patience_s, as_json, verbose, log_json)


@app.command()
def plan(
    invite: InviteArg,
    config: ConfigOpt = None,
    name: NameOpt = None,
    state: DirOpt = None,
    mode: Annotated[str | None, typer.Option(help="mirror or held; default: the run's")] = None,
    num_experts: Annotated[int | None, typer.Option(min=0, help="how many experts to hold; default: the run's, as far as they fit")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="text, JSONL or Parquet, file or folder; repeatable")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N")] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads of the trainer")] = None,
    up: Annotated[str | None, typer.Option(help="plan with an uplink of this, such as 5mbit")] = None,
    cap: Annotated[str | None, typer.Option(help="plan with so much a day, such as 20GB/day")] = None,
    memory: MemoryOpt = None,
    gpu_memory: GpuMemoryOpt = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """What joining would mean here: which experts fit, step time, codec, megabytes an hour. Measures; trains nothing that counts."""
    logging_to(verbose, False)
    line = invite_of(invite)
    given = {
        "name": name, "dir": state, "mode": mode, "num_experts": num_experts, "data": [str(d) for d in data or ()], "device": device,
        "threads": threads, "up": up, "cap": cap, "memory": memory, "gpu_memory": gpu_memory, "model_code": model_code,
    }  # fmt: skip
    peer = _peer_config(config, given)
    from decentra.cli import plan as planning
    from decentra.cli.console import LogEvents, print_json, print_table
    from decentra.cli.running import run_main

    found = run_main(lambda _stop: planning.plan(line, peer, LogEvents()))
    if as_json:
        print_json(found)
    else:
        print_table(planning.describe_plan(found))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def autostart(
    context: typer.Context,
    invite: InviteArg,
    name: NameOpt = None,
    state: DirOpt = None,
    remove: Annotated[bool, typer.Option("--remove", help="stop and remove the service")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Join this run whenever you log in, as a systemd user service; further options are those of 'join', such as --hours 22-7 --when-idle."""
    from decentra.cli import autostart as starting
    from decentra.cli.console import print_json

    line, peer = invite_of(invite), _peer_config(None, {"name": name, "dir": state})
    args = [*(("--name", name) if name else ()), *(("--dir", str(state.resolve())) if state else ()), *context.args]
    typer.main.get_command(app).commands["join"].make_context("join", [invite, *args])  # type: ignore[attr-defined]  # an option join lacks is said now
    home = Path.home()
    found = starting.remove(line.run_id, peer.name, home) if remove else starting.install(line, peer, args, home, Path.cwd())
    if as_json:
        print_json(found)
        return
    print(f"{found['unit']} {'removed' if remove else 'written; it joins at every login'}", file=sys.stderr)
    if found["left_to_do"]:
        print(f"{found['why']}. Left to do: " + "; ".join(found["left_to_do"]), file=sys.stderr)


@app.command()
def pause(invite: InviteArg, name: NameOpt = None, state: DirOpt = None, as_json: JsonOpt = False) -> None:
    """Make a peer of this machine leave its run and wait: it keeps its place and its files, and frees memory and processor."""
    _set_paused(invite, name, state, as_json, is_paused=True)


@app.command()
def resume(invite: InviteArg, name: NameOpt = None, state: DirOpt = None, as_json: JsonOpt = False) -> None:
    """Let a paused peer of this machine train again."""
    _set_paused(invite, name, state, as_json, is_paused=False)


def _set_paused(invite: str, name: str | None, state: Path | None, as_json: bool, *, is_paused: bool) -> None:
    from decentra.cli.console import print_json
    from decentra.cli.permit import set_paused
    from decentra.cli.running import is_locked
    from decentra.cli.wiring import state_dir

    config = _peer_config(None, {"name": name, "dir": state})
    root = state_dir(invite_of(invite).run_id, config)
    set_paused(root, is_paused)
    is_running = is_locked(root)
    does = "leaves its run within seconds" if is_paused else "trains again within seconds"
    late = "is not running; it waits when it is started" if is_paused else "is not running; start it with 'decentra join'"
    print(f"{config.name} {does if is_running else late}", file=sys.stderr)
    if as_json:
        print_json({"ok": True, "is_paused": is_paused, "is_running": is_running, "state_dir": str(root)})


def _take_part(
    invite: str,
    config: Any,
    genesis: Path | None,
    outbound_only: bool,
    patience_s: float,
    as_json: bool,
    verbose: bool,
    log_json: bool,
    processes: int = 1,
) -> None:
    logging_to(verbose, log_json)
    line = invite_of(invite)
    if outbound_only:
        config = config.model_copy(update={"listen": ()})
    from decentra.cli.console import print_json
    from decentra.doctor.machine import check_room_for_libraries

    check_room_for_libraries()  # before they are loaded: the kernel would end the process without a word
    from decentra.cli.join import describe_peer, run_member
    from decentra.cli.ranks import helpers, leading, num_ranks, with_ranks
    from decentra.cli.running import run_main

    if config.nice is not None:
        os.setpriority(os.PRIO_PROCESS, 0, config.nice)  # before there are threads, which inherit it

    def take_part(ranks: Any = None) -> dict[str, Any]:
        make_inner = None if ranks is None else leading(ranks)
        return run_main(lambda stop: run_member(line, config, stop, patience_s=patience_s, genesis=genesis, make_inner=make_inner))

    with helpers(processes) if processes > 1 and num_ranks() == 1 else nullcontext():
        result = with_ranks(config, take_part) if config.role == "trainer" and num_ranks() > 1 else take_part()
    if result is None:
        return  # not rank 0
    print(describe_peer(result), file=sys.stderr)
    if as_json:
        print_json(result)
    if not result["ok"]:
        raise typer.Exit(result["exit_code"])
