"""The organiser's commands: init, host, bootstrap, averager, invite, revoke, drain, kick, stop. Arguments in, one call out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from decentra.cli.app import JsonOpt, LogJsonOpt, RunDirArg, VerboseOpt, app, logging_to
from decentra.errors import ConfigError

ARCHIVE_EVERY = 25  # rounds between two anchors that a host keeps to replay from
TakeOverOpt = Annotated[
    bool, typer.Option("--take-over", help="serve the run from this folder's copy of the ledger; members leave the service it had before")
]
FromServiceOpt = Annotated[
    list[str] | None, typer.Option("--service", help="host:port of the service to copy or to take over from; default: the one last known")
]


@app.command()
def init(
    run_dir: RunDirArg,
    source: Annotated[
        Path | None, typer.Option("--from", help="a run.toml to start from; default: RUN_DIR/run.toml, else the defaults")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, over the file; repeatable")] = None,
    model: Annotated[Path | None, typer.Option(help="a checkpoint to start from: a folder of 'decentra upcycle', 'import', 'pull'")] = None,
    model_code: Annotated[Path | None, typer.Option(help="a model of your own: its file (peers need the same file)")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer.json for a model from nothing; default: the checkpoint's, else bytes are tokens")
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            help="directory of the run that this one continues: its rules, and its members come over; with --model, its changed model"
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make a run: run.toml, run.key (keep it safe), manifest.json and the first anchors."""
    from decentra.cli.console import print_json
    from decentra.cli.create import create

    values = list(settings or ())
    if model_code is not None:
        from decentra.model.custom import model_code_digest

        values.append(f'model.code="{model_code_digest(model_code)}"')
    run, manifest = create(run_dir, source, values, model_code, model, tokenizer, after)
    num_bytes = sum(p.stat().st_size for p in run.genesis.iterdir())
    if as_json:
        print_json(
            {"ok": True, "run": manifest.run_id(), "dir": str(run_dir), "num_fragments": len(manifest.genesis), "genesis_bytes": num_bytes}
        )
        return
    print(
        f"run {manifest.run_id()[:12]} '{manifest.name}': {len(manifest.genesis)} fragments, {num_bytes / 4e6:.2f} M parameters in {run_dir}"
    )
    print(f"keep {run.run_key_file} safe: it is the only proof that this run is yours")
    print(f"next: decentra host {run_dir} --address YOUR_PUBLIC_NAME")


def _own_address() -> str:
    """The address of this machine that others on its network see, without sending anything."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation range: nothing is sent, the kernel only picks a route
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


@app.command()
def host(
    run_dir: RunDirArg,
    address: Annotated[str | None, typer.Option(help="public name or address of this machine; default: its own address")] = None,
    bootstrap_port: Annotated[int, typer.Option(min=0, max=65535)] = 7410,
    service_port: Annotated[int, typer.Option(min=0, max=65535)] = 7411,
    listen: Annotated[str, typer.Option(help="interface to listen on")] = "0.0.0.0",
    uses: Annotated[int, typer.Option(min=1, help="how many peers may use the printed invite")] = 32,
    days: Annotated[float, typer.Option(min=0.001, help="how long it is valid")] = 30.0,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    archive_every: Annotated[
        int, typer.Option(min=0, help="keep old packets, and every so many rounds an anchor, while the disk budget lasts; 0: none")
    ] = ARCHIVE_EVERY,
    take_over: TakeOverOpt = False,
    service: FromServiceOpt = None,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Run bootstrap node, averaging service and keeper in one process; prints an invite."""
    logging_to(verbose, log_json)
    from decentra.cli.console import LogEvents, print_json
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main
    from decentra.cli.service import run_host

    run, where = RunDir(run_dir), address or _own_address()

    def ready(invite: Any, bootstrap: tuple[str, ...], services: tuple[str, ...]) -> None:
        line = invite.encode() if invite is not None else None
        if as_json:
            print_json({"ok": True, "invite": line, "bootstrap": list(bootstrap), "services": list(services)})
            return
        print(f"\nbootstrap {bootstrap[0]}\naveraging service {services[0]}\n", flush=True)
        print(f"decentra join {line}\n" if line else "run.key is not here: make invites where it is with 'decentra invite'\n", flush=True)

    why = run_main(
        lambda stop: run_host(
            run, address=where, bootstrap_port=bootstrap_port, service_port=service_port, listen_host=listen, uses=uses, days=days, stop=stop,
            events=LogEvents(peer="host"), on_ready=ready, model_code=model_code, archive_every=archive_every,
            take_from=tuple(service or ()) if take_over else None,
        )
    )  # fmt: skip
    print(f"host ended: {why}", file=sys.stderr)


@app.command()
def bootstrap(
    state: Annotated[Path | None, typer.Option("--dir", help="where its key is kept; default: the user state directory")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="multiaddress to listen on")] = None,
    announce: Annotated[list[str] | None, typer.Option(help="multiaddress to tell others, behind a forwarded port")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="another bootstrap node of the same network")] = None,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Run a bootstrap node alone; it prints the address that invites need."""
    logging_to(verbose, log_json)
    import platformdirs

    from decentra.cli.console import LogEvents
    from decentra.cli.host import run_bootstrap_node
    from decentra.cli.running import run_main

    root = state or platformdirs.user_state_path("decentra") / "bootstrap"
    addresses = tuple(listen or ("/ip4/0.0.0.0/tcp/7410",))
    run_main(
        lambda stop: run_bootstrap_node(
            root, listen=addresses, announce=tuple(announce or ()), peers=tuple(peer or ()), stop=stop, events=LogEvents(peer="bootstrap")
        )
    )


@app.command()
def averager(
    run_dir: RunDirArg,
    listen: Annotated[str, typer.Option(help="host:port")] = "0.0.0.0:7411",
    address: Annotated[str | None, typer.Option(help="public name of this machine")] = None,
    standby: Annotated[bool, typer.Option("--standby", help="serve nobody: keep a copy of the ledger of the service that does")] = False,
    service: FromServiceOpt = None,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Run the averaging service alone, from the ledger in RUN_DIR; or a copy of it, on another machine, from which 'host --take-over' serves."""
    logging_to(verbose, log_json)
    from decentra.cli.console import LogEvents
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main
    from decentra.cli.service import run_averager

    run, events = RunDir(run_dir), LogEvents(peer="averager")
    if service and not standby:
        raise ConfigError("--service says where to copy from: it belongs to --standby")
    if standby:
        from decentra.cli.standby import run_standby

        why = run_main(lambda stop: run_standby(run, services=service, stop=stop, events=events))
        print(f"copy ended: {why}", file=sys.stderr)
        return
    where = address or _own_address()
    run_main(lambda stop: run_averager(run, listen=listen, address=where, stop=stop, events=events))


@app.command()
def invite(
    run_dir: RunDirArg,
    uses: Annotated[int, typer.Option(min=1)] = 1,
    days: Annotated[float, typer.Option(min=0.0)] = 7.0,
    role: Annotated[str | None, typer.Option(help="trainer, keeper or watcher; default: any")] = None,
    bootstrap: Annotated[list[str] | None, typer.Option(help="bootstrap multiaddress; default: the host's last")] = None,
    service: Annotated[list[str] | None, typer.Option(help="host:port of the averaging service; default: the host's last")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an invite line; needs run.key, not the network."""
    from decentra.cli.console import print_json
    from decentra.cli.rundir import RunDir

    if role is not None and role not in ("trainer", "keeper", "watcher"):
        raise ConfigError(f"--role is trainer, keeper or watcher, got {role!r}")
    run = RunDir(run_dir)
    run.manifest()  # a directory that is no run is the first thing to say
    if bootstrap and service:
        where = tuple(bootstrap), tuple(service)
    else:
        known = run.addresses()
        where = tuple(bootstrap or known[0]), tuple(service or known[1])
    if not where[0]:
        raise ConfigError("no bootstrap node is known; give the address that 'decentra bootstrap' printed as --bootstrap")
    made = run.make_invite(uses, days, bootstrap=where[0], services=where[1], role=role)
    token_id = made.token[1:9].hex()
    if as_json:
        print_json({"ok": True, "invite": made.encode(), "token": token_id, "uses": uses, "days": days})
    else:
        print(made.encode())
        print(f"valid for {uses} peers and {days:g} days; take it back with: decentra revoke {run_dir} {token_id}", file=sys.stderr)


def _command(run_dir: Path, kind: str, argument: str, services: list[str] | None, as_json: bool) -> None:
    from decentra.averaging.client import AveragingClient
    from decentra.cli.console import LogEvents, print_json
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main
    from decentra.wire.trust import TrustChain

    run = RunDir(run_dir)
    manifest, key = run.manifest(), run.run_key()
    where = tuple(services) if services else run.addresses()[1]

    async def ask(_stop: Any) -> str:
        client = AveragingClient(where, TrustChain(manifest.run_id(), key.public), LogEvents())
        try:
            return await client.command(key, kind, argument)
        finally:
            await client.close()

    answer = run_main(ask)
    print_json({"ok": True, "answer": answer}) if as_json else print(answer)


@app.command()
def revoke(
    run_dir: RunDirArg,
    subject: Annotated[str, typer.Argument(help="a token id (printed by 'invite'), or a member's name or peer id")],
    service: Annotated[list[str] | None, typer.Option()] = None,
    as_json: JsonOpt = False,
) -> None:
    """Take back an invite or a peer's admission."""
    _command(run_dir, "revoke", subject, service, as_json)


MemberArg = Annotated[str, typer.Argument(help="a member's name or peer id, see 'decentra status'", metavar="PEER")]


@app.command()
def drain(
    run_dir: RunDirArg, member: MemberArg, service: Annotated[list[str] | None, typer.Option()] = None, as_json: JsonOpt = False
) -> None:
    """Ask a member to leave: it ends like at Ctrl-C, and its experts have other holders. It may come again."""
    _command(run_dir, "drain", member, service, as_json)


@app.command()
def kick(
    run_dir: RunDirArg, member: MemberArg, service: Annotated[list[str] | None, typer.Option()] = None, as_json: JsonOpt = False
) -> None:
    """Put a member out at once, whatever it does. It may come again; 'decentra revoke' keeps it out."""
    _command(run_dir, "kick", member, service, as_json)


@app.command()
def stop(
    run_dir: RunDirArg,
    why: Annotated[str, typer.Option(help="told to every peer")] = "the organiser ended the run",
    pass_on: Annotated[
        bool,
        typer.Option(
            "--pass-on", help="it goes on as another run ('decentra init NEW --after RUN_DIR'): peers wait for that one and follow"
        ),
    ] = False,
    service: Annotated[list[str] | None, typer.Option()] = None,
    as_json: JsonOpt = False,
) -> None:
    """End the run: open rounds finish, then peers drain and leave."""
    _command(run_dir, "pass-on" if pass_on else "stop", why, service, as_json)
