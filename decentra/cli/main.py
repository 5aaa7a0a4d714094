"""The ``decentra`` command. Imports neither torch nor hivemind until a command needs them; maps every error to its exit code."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from decentra import __version__
from decentra.cli.doctor import doctor_command
from decentra.errors import ConfigError, DecentraError, ExitCode

app = typer.Typer(
    name="decentra", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="People who share no cluster train one mixture-of-experts model together over ordinary internet links.",
)  # fmt: skip

InviteArg = Annotated[str, typer.Argument(help="the line the organiser sent, or a file that holds it", metavar="INVITE")]
RunDirArg = Annotated[Path, typer.Argument(help="run directory made by 'decentra init'", metavar="RUN_DIR")]
JsonOpt = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="every protocol message")]
LogJsonOpt = Annotated[bool, typer.Option("--log-json", help="log lines as JSON")]


def main() -> None:
    """Entry point: runs the command and turns errors into one clear line and an exit code."""
    from decentra.cli.console import fail

    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # the p2p daemon is started with exec; gRPC would warn about the fork before it
    try:
        app(prog_name="decentra", standalone_mode=False)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (DecentraError, OSError) as error:
        sys.exit(fail(error, as_json="--json" in sys.argv).exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        usage = ConfigError(f"{error.format_message().rstrip('.')}; see 'decentra --help'")
        sys.exit(fail(usage, as_json="--json" in sys.argv).exit_code)
    finally:
        gc.freeze()  # the collector would walk all of torch and sympy once more at exit, a second of CPU after the last word


def _version(asked: bool) -> None:
    if asked:
        print(f"decentra {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    pass


def _logging(verbose: bool, log_json: bool) -> None:
    from decentra.cli.console import set_up_logging

    set_up_logging(is_verbose=verbose, is_json=log_json)


def _invite(text: str) -> Any:
    from decentra.invite import parse_invite

    if not text.startswith("decentra") and len(text) < 4096 and (path := Path(text).expanduser()).is_file():
        text = path.read_text()
    return parse_invite(text)


# ---------------------------------------------------------------- the organiser


@app.command()
def init(
    run_dir: RunDirArg,
    source: Annotated[
        Path | None, typer.Option("--from", help="a run.toml to start from; default: RUN_DIR/run.toml, else the defaults")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, over the file; repeatable")] = None,
    model_code: Annotated[Path | None, typer.Option(help="a model of your own: its file (peers need the same file)")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make a run: run.toml, run.key (keep it safe), manifest.json and the first anchors."""
    from decentra.cli.console import print_json
    from decentra.cli.rundir import create

    values = list(settings or ())
    if model_code is not None:
        from decentra.model.custom import model_code_digest

        values.append(f'model.code="{model_code_digest(model_code)}"')
    run, manifest = create(run_dir, source, values, model_code)
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
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Run bootstrap node, averaging service and keeper in one process; prints an invite."""
    _logging(verbose, log_json)
    from decentra.cli.console import LogEvents, print_json
    from decentra.cli.host import run_host
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main

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
            events=LogEvents(peer="host"), on_ready=ready, model_code=model_code,
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
    _logging(verbose, log_json)
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
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Run the averaging service alone, from the ledger in RUN_DIR."""
    _logging(verbose, log_json)
    from decentra.cli.console import LogEvents
    from decentra.cli.host import run_averager
    from decentra.cli.rundir import RunDir
    from decentra.cli.running import run_main

    where = address or _own_address()
    run_main(lambda stop: run_averager(RunDir(run_dir), listen=listen, address=where, stop=stop, events=LogEvents(peer="averager")))


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
    subject: Annotated[str, typer.Argument(help="a token id (printed by 'invite') or a peer id")],
    service: Annotated[list[str] | None, typer.Option()] = None,
    as_json: JsonOpt = False,
) -> None:
    """Take back an invite or a peer's admission."""
    _command(run_dir, "revoke", subject, service, as_json)


@app.command()
def stop(
    run_dir: RunDirArg,
    why: Annotated[str, typer.Option(help="told to every peer")] = "the organiser ended the run",
    service: Annotated[list[str] | None, typer.Option()] = None,
    as_json: JsonOpt = False,
) -> None:
    """End the run: open rounds finish, then peers drain and leave."""
    _command(run_dir, "stop", why, service, as_json)


# ---------------------------------------------------------------- members


def _peer_config(path: Path | None, given: dict[str, Any]) -> Any:
    """Command line over TOML over defaults."""
    from decentra.config import PeerConfig, load_toml, parse_config

    base = load_toml(PeerConfig, path) if path is not None else PeerConfig()
    raw = base.model_dump(exclude_defaults=True) | {k: v for k, v in given.items() if v is not None and v != []}
    return parse_config(PeerConfig, raw, "options")


def _experts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--experts expects numbers such as 0,3, got {text!r}") from None


ConfigOpt = Annotated[Path | None, typer.Option("--config", help="peer TOML; see peers/")]
NameOpt = Annotated[str | None, typer.Option(help="names this peer and its state directory; default: peer")]
DirOpt = Annotated[Path | None, typer.Option("--dir", help="state directory; default: the user state directory, by run and name")]
ListenOpt = Annotated[list[str] | None, typer.Option(help="multiaddress to listen on; default: any port")]
OutboundOpt = Annotated[bool, typer.Option("--outbound-only", help="listen nowhere; take part through a keeper")]
GenesisOpt = Annotated[
    Path | None, typer.Option(help="RUN_DIR/genesis, the first anchors: for the first member of a run that has no host to get them from")
]
PatienceOpt = Annotated[float, typer.Option("--wait", help="seconds to keep trying while the service is away", min=0.0)]


@app.command()
def join(
    invite: InviteArg,
    config: ConfigOpt = None,
    name: NameOpt = None,
    state: DirOpt = None,
    experts: Annotated[str | None, typer.Option(help="experts to train, such as 0,3; default: placed where needed")] = None,
    num_experts: Annotated[int | None, typer.Option(min=0, help="how many experts to hold; default: the run's")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="text or JSONL file or folder; repeatable; default: embedded text")] = None,
    domain: Annotated[str | None, typer.Option(help="train on one embedded domain")] = None,
    shared_fraction: Annotated[float | None, typer.Option(help="share of common text; default: the run's")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N")] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads of the trainer")] = None,
    listen: ListenOpt = None,
    announce: Annotated[list[str] | None, typer.Option(help="multiaddress to tell others, behind a forwarded port")] = None,
    outbound_only: OutboundOpt = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="leave after this many inner steps")] = None,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    genesis: GenesisOpt = None,
    patience_s: PatienceOpt = 300.0,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
    log_json: LogJsonOpt = False,
) -> None:
    """Join a run and train. Ctrl-C leaves cleanly, a second Ctrl-C at once; joining again goes on where it stopped."""
    given = {
        "name": name, "dir": state, "experts": _experts(experts), "num_experts": num_experts, "data": [str(d) for d in data or ()], "domain": domain,
        "shared_fraction": shared_fraction, "device": device, "threads": threads, "listen": list(listen or ()), "announce": list(announce or ()),
        "max_steps": max_steps, "model_code": model_code,
    }  # fmt: skip
    peer = _peer_config(config, given)
    _take_part(invite, peer, genesis, outbound_only, patience_s, as_json, verbose, log_json)


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


def _take_part(
    invite: str, config: Any, genesis: Path | None, outbound_only: bool, patience_s: float, as_json: bool, verbose: bool, log_json: bool
) -> None:
    _logging(verbose, log_json)
    line = _invite(invite)
    if outbound_only:
        config = config.model_copy(update={"listen": ()})
    from decentra.cli.console import print_json
    from decentra.cli.join import describe_peer, run_member
    from decentra.cli.running import run_main

    result = run_main(lambda stop: run_member(line, config, stop, patience_s=patience_s, genesis=genesis))
    print(describe_peer(result), file=sys.stderr)
    if as_json:
        print_json(result)
    if not result["ok"]:
        raise typer.Exit(result["exit_code"])


# ---------------------------------------------------------------- looking


def _print_table(rows: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)


@app.command()
def show(invite: InviteArg, as_json: JsonOpt = False) -> None:
    """What a run is before joining it: model, data, licence, sizes, who runs it, what leaves your machine."""
    _logging(False, False)
    from decentra.cli import look
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = _invite(invite)
    run = run_main(lambda _stop: look.show(line))
    if as_json:
        print_json(run)
        return
    from decentra.status.terminal import count, size

    model, data, num = run["model"], run["data"], run["num_parameters"]
    _print_table(
        {
            "run": f"{run['name']}  {run['run'][:12]}", "about": run["description"] or "-", "run by": run["organiser"], "licence": run["licence"],
            "model": f"{model['num_layers']} layers, {model['num_experts']} experts, {model['num_experts_per_token']} per token"
            + (f", {count(num)} parameters ({count(run['num_parameters_trained'])} trained here)" if num else ", own code"),
            "data": f"{', '.join(data['domains'])}; windows of {data['seq_len']} bytes, {data['shared_fraction']:.0%} of them common text",
            "rounds": f"every {run['inner_steps']} steps, codec {run['codec']}",
            "each round": f"about {size(run['up_bytes_per_round'])} up per receiver, {size(run['down_bytes_per_round'])} down"
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
    _logging(False, False)
    from decentra.cli import look
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = _invite(invite)
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
def pull(
    invite: InviteArg,
    target: Annotated[Path, typer.Argument(help="folder for the checkpoint", metavar="DIR")],
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Fetch the newest confirmed anchors, verify them, and write a Hugging Face checkpoint."""
    _logging(verbose, False)
    from decentra.cli import look
    from decentra.cli.console import print_json
    from decentra.cli.running import run_main

    line = _invite(invite)
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
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Continue a text with a pulled model."""
    from decentra.cli import look
    from decentra.cli.console import print_json

    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    text = look.generate_text(checkpoint, prompt, num_tokens, temperature, top_k, seed, model_code)
    print_json({"ok": True, "prompt": prompt, "text": text}) if as_json else print(prompt + text)


@app.command("eval")
def evaluate(
    checkpoint: CheckpointArg,
    model_code: Annotated[Path | None, typer.Option(help="the run's own model code")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Held-out loss of a pulled model on the embedded domains."""
    from decentra.cli import look
    from decentra.cli.console import print_json

    result = look.evaluate_checkpoint(checkpoint, model_code)
    if as_json:
        print_json(result)
    else:
        _print_table({**{k: f"{v:.4f}" for k, v in result["loss_per_domain"].items()}, "mean": f"{result['loss']:.4f} nats per byte"})


@app.command()
def demo(
    source: Annotated[Path | None, typer.Argument(help="a run.toml; default: the built-in demo", metavar="[RUN.toml]")] = None,
    num_peers: Annotated[int, typer.Option("--peers", min=2, max=16)] = 4,
    num_rounds: Annotated[int, typer.Option("--rounds", min=5, help="confirmed rounds of the trunk, where the run.toml sets no end")] = 25,
    controls: Annotated[
        bool, typer.Option("--controls", help="also train the same model alone, for comparison (up to 10 minutes more)")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable")] = None,
    root: Annotated[Path, typer.Option("--dir", help="where everything goes; an earlier demo there is replaced")] = Path("demo-out"),
    as_json: JsonOpt = False,
) -> None:
    """A real swarm on this machine: host and peers, one is killed and comes back, and the model they made."""
    _logging(False, False)
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


app.command("doctor")(doctor_command)


if __name__ == "__main__":
    main()
