"""Bad input at the command line: one clear line that says what was expected, what came and what to do, and the documented exit code.

2 the user's own input, 3 nobody answers, 4 the other side refuses, 5 damaged bytes, 6 another version or another run's contract.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_world import Said, decentra
from processes import Command, Lab, lab

from decentra.cli.rundir import RunDir
from decentra.identity import Keypair, save_key
from decentra.invite import Invite, parse_invite

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Hosted:
    """A run whose host is up, as a real process."""

    world: Lab
    run: RunDir
    host: Command
    invite: str


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with lab(tmp_path_factory.mktemp("hosted")) as world:
        run = world.init()
        host = world.host(run)
        yield Hosted(world, run, host, world.invite_of(host.start()))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that nobody hosts."""
    world = Lab(tmp_path_factory.mktemp("offline"))
    run = world.init()
    run.remember_addresses(("/ip4/127.0.0.1/tcp/7410/p2p/" + Keypair.generate().peer_id,), (f"127.0.0.1:{free_port()}",))
    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def invite_from(run: RunDir, *args: str) -> str:
    said = decentra("invite", str(run.root), "--json", *args)
    assert said.code == 0, said.err
    return str(said.json["invite"])


def join(invite: str, state: Path, *args: str) -> Said:
    """``join`` in this process; it leaves after 60 steps at the latest, so that what should have been refused does not train for ever."""
    steps = () if "--max-steps" in args else ("--max-steps", "60")
    return decentra("join", invite, "--dir", str(state), "--listen", "/ip4/127.0.0.1/tcp/0", "--json", "--log-json", *steps, *args)


# ---------------------------------------------------------------- the invite line


def good_line() -> str:
    return Invite(
        "ab" * 32, bytes(32), ("/ip4/127.0.0.1/tcp/1/p2p/" + Keypair.from_seed(bytes(32)).peer_id,), ("127.0.0.1:1",), b"t" * 20
    ).encode()


BAD_INVITES = {
    "no invite at all": ("hello", "starts with 'decentra1_'"),
    "empty": ("", "starts with 'decentra1_'"),
    "truncated": (good_line()[:-9], "truncated or mistyped"),
    "mistyped": (good_line()[:40] + ("A" if good_line()[40] != "A" else "B") + good_line()[41:], "truncated or mistyped"),
    "newer format": ("decentra7_" + good_line()[10:], "update decentra"),
    "foreign character": (good_line()[:30] + "!" + good_line()[31:], "copy the whole line"),
    "a file that is not there": ("no/such/invite.txt", "no such file"),
    "far too long": ("decentra1_" + "A" * 5000, "at most 4096 characters"),
}


@pytest.mark.parametrize("name", BAD_INVITES)
@pytest.mark.parametrize("verb", ["join", "status", "show", "keep"])
def test_a_bad_invite_line_is_a_usage_error(name: str, verb: str, tmp_path: Path) -> None:
    text, words = BAD_INVITES[name]
    said = decentra(verb, text, "--json")
    line = said.refused(2, words)
    assert said.json == {"ok": False, "error": line.removeprefix("decentra: "), "kind": "InviteError", "exit_code": 2}


def test_an_invite_may_be_a_file_and_a_wrapped_line(offline: RunDir, tmp_path: Path) -> None:
    line = invite_from(offline)
    (tmp_path / "invite.txt").write_text(line[:50] + "\n  " + line[50:] + "\n")
    decentra("status", str(tmp_path / "invite.txt")).refused(3, "cannot be reached")


def test_an_expired_invite_is_refused(hosted: Hosted, tmp_path: Path) -> None:
    said = join(invite_from(hosted.run, "--days", "0"), tmp_path / "peer")
    said.refused(4, "has expired", "ask the organiser")
    assert said.json["ok"] is False


def test_a_used_up_invite_is_refused_and_its_user_stays(hosted: Hosted, tmp_path: Path) -> None:
    line = invite_from(hosted.run, "--uses", "1")
    first = join(line, tmp_path / "first", "--max-steps", "1")
    assert first.code == 0, first.err
    join(line, tmp_path / "second").refused(4, "used up", "ask for a new one")
    again = join(line, tmp_path / "first", "--max-steps", "2")
    assert again.code == 0, again.err


def test_an_invite_of_another_run_says_so(hosted: Hosted, offline: RunDir, tmp_path: Path) -> None:
    """Exit code 6: the address answers, but with another contract."""
    other = invite_from(offline, "--service", parse_invite(hosted.invite).services[0])
    line = join(other, tmp_path / "peer").refused(6, "the run served at")
    assert offline.manifest().run_id()[:12] in line
    assert hosted.run.manifest().run_id()[:12] in line


def test_a_token_of_another_run_is_refused(hosted: Hosted, offline: RunDir, tmp_path: Path) -> None:
    mine, theirs = parse_invite(hosted.invite), parse_invite(invite_from(offline))
    mixed = Invite(mine.run_id, mine.run_public, mine.bootstrap, mine.services, theirs.token)
    join(mixed.encode(), tmp_path / "peer").refused(4, "belongs to another run")


def test_a_run_key_that_is_not_the_runs_is_an_integrity_error(hosted: Hosted, tmp_path: Path) -> None:
    mine = parse_invite(hosted.invite)
    forged = Invite(mine.run_id, Keypair.generate().public, mine.bootstrap, mine.services, mine.token)
    join(forged.encode(), tmp_path / "peer").refused(5, "no valid certificate")


def test_a_keeper_invite_does_not_let_a_trainer_in(hosted: Hosted, tmp_path: Path) -> None:
    join(invite_from(hosted.run, "--role", "keeper"), tmp_path / "peer").refused(4, "for a keeper")
    decentra("invite", str(hosted.run.root), "--role", "boss").refused(2, "trainer, keeper or watcher", "boss")


# ---------------------------------------------------------------- nobody there


@pytest.mark.parametrize("command", [("join", "--wait", "1"), ("keep", "--wait", "1"), ("status",), ("show",)], ids=lambda c: c[0])
def test_a_service_that_is_away_is_unreachable(offline: RunDir, tmp_path: Path, command: tuple[str, ...]) -> None:
    verb, *rest = command
    more = ("--dir", str(tmp_path / "peer")) if verb in ("join", "keep") else ()
    said = decentra(verb, invite_from(offline), *more, *rest, "--json")
    said.refused(3, "averaging service at 127.0.0.1:", "is it running")
    assert said.json["exit_code"] == 3


def test_pull_stop_and_revoke_without_a_service(offline: RunDir, tmp_path: Path) -> None:
    decentra("pull", invite_from(offline), str(tmp_path / "model"), "--json").refused(3, "is it running")
    assert not (tmp_path / "model").exists()
    decentra("stop", str(offline.root)).refused(3, "is it running")
    decentra("revoke", str(offline.root), "0011223344556677").refused(3, "is it running")


def test_an_invite_without_a_service_address_says_what_is_missing(offline: RunDir, tmp_path: Path) -> None:
    line = parse_invite(invite_from(offline))
    join(Invite(line.run_id, line.run_public, line.bootstrap, (), line.token).encode(), tmp_path / "peer").refused(
        2, "no address of an averaging"
    )


# ---------------------------------------------------------------- ports, directories, keys


def test_a_taken_service_port_is_named(hosted: Hosted, tmp_path: Path) -> None:
    port = parse_invite(hosted.invite).services[0].split(":")[1]
    run = Lab(tmp_path).init()
    args = ("--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", "0", "--service-port", port)
    decentra("host", str(run.root), *args).refused(2, port, "in use", "--service-port")


def test_a_taken_bootstrap_port_is_named(hosted: Hosted, tmp_path: Path) -> None:
    port = parse_invite(hosted.invite).bootstrap[0].split("/")[4]
    run = Lab(tmp_path).init()
    args = ("--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", port, "--service-port", "0")
    decentra("host", str(run.root), *args).refused(2, port, "in use")
    decentra("bootstrap", "--dir", str(tmp_path / "b"), "--listen", f"/ip4/127.0.0.1/tcp/{port}").refused(2, port, "in use")


def test_the_same_run_is_hosted_once(hosted: Hosted) -> None:
    decentra("host", str(hosted.run.root), *HOST_ARGS).refused(2, "in use by another process")
    decentra("averager", str(hosted.run.root), "--listen", "127.0.0.1:0").refused(2, "in use by another process")


def test_a_state_directory_belongs_to_one_process(hosted: Hosted, tmp_path: Path) -> None:
    from decentra.cli.running import locked_dir

    with locked_dir(tmp_path / "peer"):
        join(hosted.invite, tmp_path / "peer").refused(2, "in use by another process", "--dir")


@pytest.mark.parametrize("verb", ["host", "averager", "invite", "stop", "revoke"])
def test_a_directory_that_is_no_run(verb: str, tmp_path: Path) -> None:
    more = ("token",) if verb == "revoke" else ()
    decentra(verb, str(tmp_path / "nothing"), *more).refused(2, "no run directory", "decentra init")


def test_init_never_overwrites_a_run(offline: RunDir) -> None:
    before = (offline.root / "manifest.json").read_bytes(), offline.run_key_file.read_bytes()
    said = decentra("init", str(offline.root), "--json")
    said.refused(2, "holds a run already")
    assert said.json["ok"] is False
    assert ((offline.root / "manifest.json").read_bytes(), offline.run_key_file.read_bytes()) == before


def test_a_run_key_that_is_missing_or_damaged(offline: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(offline.root, tmp_path / "run")))
    key = run.run_key_file.read_bytes()
    run.run_key_file.write_bytes(key[:40])
    decentra("invite", str(run.root)).refused(2, "run.key", "68-byte", "restore it")
    run.run_key_file.write_bytes(key[:10] + bytes([key[10] ^ 1]) + key[11:])
    decentra("invite", str(run.root)).refused(2, "run.key", "restore it")
    run.run_key_file.unlink()
    decentra("invite", str(run.root)).refused(2, "run.key", "No such file")
    decentra("host", str(run.root), "--service-port", "0", "--bootstrap-port", "0").refused(2, "neither run.key nor papers")


def test_a_damaged_genesis_anchor_stops_the_host(offline: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(offline.root, tmp_path / "run")))
    path = next(run.genesis.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    decentra("host", str(run.root), *HOST_ARGS).refused(5, path.name, "missing or damaged")


def test_a_damaged_or_edited_manifest(offline: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(offline.root, tmp_path / "run")))
    path = run.root / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    decentra("host", str(run.root)).refused(2, "manifest.json", "not JSON")
    path.write_bytes(b"[1, 2]")
    decentra("host", str(run.root)).refused(2, "expected a JSON object, got list")


def test_a_state_directory_that_cannot_be_written(hosted: Hosted) -> None:
    join(hosted.invite, Path("/proc/decentra-test/peer")).refused(2, "/proc/decentra-test/peer", "choose another with --dir")


def test_a_state_directory_that_is_a_file(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "peer").write_text("in the way")
    join(hosted.invite, tmp_path / "peer").refused(2, str(tmp_path / "peer"), "--dir")


HOST_ARGS = ("--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", "0", "--service-port", "0")


def copy_of(run: RunDir, target: Path) -> RunDir:
    """The folder of a run that goes on, less what comes and goes while it does."""
    return RunDir(Path(shutil.copytree(run.root, target, ignore=shutil.ignore_patterns("lock", "blobs", "*.tmp"))))


def test_a_manifest_edited_after_the_run_began_names_the_keys(hosted: Hosted, tmp_path: Path) -> None:
    run = copy_of(hosted.run, tmp_path / "run")
    manifest = run.root / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"lr":0.005', '"lr":0.5').replace('"inner_steps":5', '"inner_steps":50'))
    for said in (decentra("host", str(run.root), *HOST_ARGS), decentra("averager", str(run.root), "--listen", "127.0.0.1:0")):
        said.refused(6, "manifest.json was changed", "rounds.inner_steps, train.lr", "put it back")


def test_another_run_key_is_noticed(hosted: Hosted, tmp_path: Path) -> None:
    run = copy_of(hosted.run, tmp_path / "run")
    run.run_key_file.unlink()
    save_key(run.run_key_file, Keypair.generate())
    decentra("host", str(run.root), *HOST_ARGS).refused(2, "run.key is not the key this run began with", "Restore it")


def test_damaged_files_of_the_host(hosted: Hosted, tmp_path: Path) -> None:
    run = copy_of(hosted.run, tmp_path / "run")
    (run.host / "addresses.json").write_text("{")
    decentra("invite", str(run.root)).refused(2, "addresses.json is damaged", "decentra host")
    decentra("stop", str(run.root)).refused(2, "addresses.json is damaged")
    ledger = run.host / "ledger.db"
    for path in run.host.glob("ledger.db-*"):
        path.unlink()
    ledger.write_bytes(b"no database at all, for long enough to be noticed" * 100)
    decentra("host", str(run.root), *HOST_ARGS).refused(5, "ledger.db is damaged", "restore")
    ledger.unlink()
    (run.host / "service.key").write_bytes(b"short")
    decentra("averager", str(run.root), "--listen", "127.0.0.1:0").refused(2, "service.key", "68-byte")


# ---------------------------------------------------------------- configuration


def test_unknown_keys_have_a_suggestion(tmp_path: Path, offline: RunDir) -> None:
    decentra("init", str(tmp_path / "run"), "--set", "rounds.inner_step=3").refused(
        2, "unknown key 'rounds.inner_step'", "did you mean 'inner_steps'"
    )
    (tmp_path / "run.toml").write_text('name = "x"\n[modle]\nhidden_size = 8\n')
    decentra("init", str(tmp_path / "run"), "--from", str(tmp_path / "run.toml")).refused(2, "unknown key 'modle'", "did you mean 'model'")
    (tmp_path / "peer.toml").write_text('nmae = "x"\n')
    decentra("join", invite_from(offline), "--config", str(tmp_path / "peer.toml")).refused(2, "peer.toml", "did you mean 'name'")
    assert not (tmp_path / "run").exists()


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    decentra("init", str(tmp_path / "run"), "--from", str(tmp_path / "no.toml")).refused(2, "no.toml", "No such file")
    (tmp_path / "bad.toml").write_text("name = \n")
    decentra("init", str(tmp_path / "run"), "--from", str(tmp_path / "bad.toml")).refused(2, "bad.toml", "not TOML")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    decentra("init", str(tmp_path / "run"), "--from", str(tmp_path / "binary.toml")).refused(2, "binary.toml", "not TOML")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.lr=-1", ("train.lr", "greater than 0", "-1")),
        ("model.num_experts=0", ("model.num_experts", "0")),
        ("model.num_experts_per_token=99", ("num_experts_per_token 99",)),
        ("codec.name=gzip", ("codec.name", "gzip")),
        ("rounds.inner_steps", ("section.key=value",)),
        ("name.x=1", ("no section",)),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, setting: str, words: tuple[str, ...]) -> None:
    decentra("init", str(tmp_path / "run"), "--set", setting).refused(2, *words)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("join",), ("join", "x", "--nonsense"), ("nonsense",), ("join", "x", "--num-experts", "many"), ("join", "x", "--max-steps", "0"),
        ("host", "x", "--service-port", "99999"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_do_not_exist_or_do_not_fit(args: tuple[str, ...]) -> None:
    decentra(*args).refused(2, "see 'decentra --help'")


def test_usage_errors_are_json_too() -> None:
    said = decentra("status", "--nonsense", "--json")
    said.refused(2)
    assert said.json["ok"] is False
    assert said.json["exit_code"] == 2


def test_what_is_wrong_here_costs_no_place_in_the_run(hosted: Hosted, tmp_path: Path) -> None:
    """The run is not even asked for what no run could use; and what this run cannot use does not make a member."""

    def members() -> set[str]:
        return {m["peer"] for m in decentra("status", hosted.invite, "--json").json["members"]}

    before = members()
    join(hosted.invite, tmp_path / "gone", "--data", str(tmp_path / "missing")).refused(2, "no such file")
    assert not (tmp_path / "gone").exists()
    join(hosted.invite, tmp_path / "odd", "--name", "odd", "--domain", "poetry").refused(2, "poetry")
    assert members() == before


def test_a_run_that_is_over_is_not_trained_for(hosted: Hosted, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "peer"))
    (state / "over").write_text("the demo has its 8 rounds")
    join(hosted.invite, state).refused(4, "is over", "decentra pull")


def test_limits_that_are_none(offline: RunDir) -> None:
    line = invite_from(offline)
    decentra("join", line, "--up", "fast").refused(2, "up: expected a number above 0", "5mbit")
    decentra("join", line, "--cap", "20").refused(2, "cap: expected", "20GB/day")


def test_experts(offline: RunDir, hosted: Hosted, tmp_path: Path) -> None:
    decentra("join", invite_from(offline), "--experts", "0,x").refused(2, "--experts expects numbers", "0,x")
    join(hosted.invite, tmp_path / "peer", "--experts", "0,99").refused(2, "99", "experts 0 to 3")
    join(hosted.invite, tmp_path / "peer", "--num-experts", "99").refused(2, "99", "this run has 4")


def test_hours_and_pauses(hosted: Hosted, tmp_path: Path) -> None:
    join(hosted.invite, tmp_path / "peer", "--hours", "at night").refused(2, "such as 22-7", "at night")
    for verb in ("pause", "resume"):
        decentra(verb, hosted.invite, "--dir", str(tmp_path / "nobody")).refused(2, "no peer's state directory", "--name or --dir")


def test_modes(hosted: Hosted, tmp_path: Path) -> None:
    join(hosted.invite, tmp_path / "peer", "--mode", "whole").refused(2, "mode", "'mirror' or 'held'", "whole")
    join(hosted.invite, tmp_path / "peer", "--mode", "held").refused(2, "placement.mode = 'mirror'", "leave out --mode")


def test_names_devices_and_domains(hosted: Hosted, tmp_path: Path) -> None:
    join(hosted.invite, tmp_path / "a", "--name", "no/slashes").refused(2, "'name'", "no/slashes")
    join(hosted.invite, tmp_path / "b", "--device", "gpu").refused(2, "'cuda:N'", "gpu")
    join(hosted.invite, tmp_path / "c", "--domain", "poetry").refused(2, "poetry", "code, prose, headers, math")
    join(hosted.invite, tmp_path / "d", "--shared-fraction", "1.5").refused(2, "shared_fraction", "1.5")
    join(hosted.invite, tmp_path / "e", "--listen", "127.0.0.1:7000").refused(2, "/ip4/", "127.0.0.1:7000")
    join(hosted.invite, tmp_path / "f", "--announce", "nowhere").refused(2, "/ip4/", "nowhere")


# ---------------------------------------------------------------- data


def test_training_text_that_cannot_be_used(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "typo"}\n')
    for number, (name, words) in enumerate(
        {"missing.txt": "no such file", "empty.txt": "empty.txt", "binary.bin": "UTF-8", "short.txt": "one window", "folder": "folder",
         "bad.jsonl": "text"}.items()
    ):  # fmt: skip
        said = join(hosted.invite, tmp_path / f"peer{number}", "--data", str(tmp_path / name))
        said.refused(2, str(tmp_path / name), words)
        assert said.json["kind"] == "DataError"


# ---------------------------------------------------------------- models


def test_model_code_that_is_not_the_runs(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def build(spec, seed): ...\n")
    join(hosted.invite, tmp_path / "peer", "--model-code", str(tmp_path / "model.py")).refused(2, "built-in decoder")
    decentra("init", str(tmp_path / "a"), "--model-code", str(tmp_path / "no.py")).refused(2, "no.py", "No such file")
    (tmp_path / "broken.py").write_text("def build(:\n")
    decentra("init", str(tmp_path / "b"), "--model-code", str(tmp_path / "broken.py")).refused(2, "broken.py", "SyntaxError")
    (tmp_path / "nobuild.py").write_text("x = 1\n")
    decentra("init", str(tmp_path / "c"), "--model-code", str(tmp_path / "nobuild.py")).refused(2, "defines no build")


def test_a_checkpoint_that_is_none_or_damaged(tmp_path: Path, offline: RunDir) -> None:
    from decentra.peer.checkpoint import assemble, save_model

    decentra("generate", str(tmp_path / "nothing"), "--json").refused(2, "no finished checkpoint", "decentra pull")
    decentra("eval", str(tmp_path / "nothing"), "--json").refused(2, "no finished checkpoint")
    manifest = offline.manifest()
    blobs = offline.genesis_blobs(manifest)
    save_model(tmp_path / "model", assemble(manifest, {f: blobs[d] for f, d in manifest.genesis.items()}, {}))
    assert decentra("generate", str(tmp_path / "model"), "--num-tokens", "4", "--without", "0", "--json").json["ok"]
    decentra("eval", str(tmp_path / "model"), "--without", "9").refused(2, "expert 9 is not in this model")
    decentra("eval", str(tmp_path / "model"), "--without", "x").refused(2, "--without expects numbers such as 0,3, got 'x'")
    decentra("generate", str(tmp_path / "model"), "").refused(2, "prompt is empty")
    weights = tmp_path / "model" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-4] + bytes(4))
    decentra("eval", str(tmp_path / "model")).refused(5, "damaged", "pull the model again")
    weights.write_bytes(raw)
    (tmp_path / "model" / "decentra.json").write_text("{")
    decentra("eval", str(tmp_path / "model")).refused(5, "damaged", "pull the model again")


# ---------------------------------------------------------------- a peer's own files


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "empty": b""}[how])


@pytest.fixture(scope="module")
def used(hosted: Hosted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a peer that trained twice: it has a checkpoint, the one before, records and notes."""
    state = tmp_path_factory.mktemp("used") / "peer"
    for num_steps in (40, 80):
        said = join(hosted.invite, state, "--max-steps", str(num_steps))
        assert said.code == 0, said.err
        assert said.json["num_steps"] >= num_steps
    return state


DAMAGES = [
    ("trainer.state", "truncated"), ("trainer.state", "empty"), ("*.record", "truncated"), ("*.record", "flipped"), ("*.note", "truncated"),
    ("*.note", "flipped"), ("*.note", "empty"), ("trained.json", "truncated"), ("known-peers.json", "truncated"), ("manifest.json", "truncated"),
    ("credentials", "flipped"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "how"), DAMAGES, ids=lambda x: str(x))
def test_damaged_files_of_a_peer_cost_no_more_than_themselves(hosted: Hosted, used: Path, tmp_path: Path, pattern: str, how: str) -> None:
    """The peer says what is damaged, goes on from what is left (the checkpoint before, the confirmed anchors), and ends well."""
    state = Path(shutil.copytree(used, tmp_path / "peer"))
    files = sorted(state.glob(pattern))
    assert files, f"the peer left no {pattern}"
    for path in files:
        damage(path, how)
    said = join(hosted.invite, state, "--max-steps", "90")
    assert said.code == 0, said.err
    assert "Traceback" not in said.err
    assert said.json["ok"]
    assert said.json["num_steps"] >= 90
    assert all(said.json["anchors"].values())
    named = {e["file"] for e in said.events("damaged-file")}
    assert {p.name for p in files} <= named
    if pattern == "trainer.state":
        assert said.events("resumed")[0]["file"] == "trainer.state.prev"
    else:
        assert said.events("resumed")[0]["file"] == "trainer.state"


def test_with_both_checkpoints_damaged_training_starts_from_the_anchors(hosted: Hosted, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "peer"))
    for name in ("trainer.state", "trainer.state.prev"):
        damage(state / name, "truncated")
    said = join(hosted.invite, state, "--max-steps", "10")
    assert said.code == 0, said.err
    assert [e["file"] for e in said.events("damaged-file")] == ["trainer.state", "trainer.state.prev"]
    assert not said.events("resumed")
    assert said.json["num_steps"] >= 10


def test_half_written_files_are_swept(hosted: Hosted, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "peer"))
    (state / "trunk-0.record.tmp").write_bytes(b"half")
    said = join(hosted.invite, state, "--max-steps", "90")
    assert said.code == 0, said.err
    assert not list(state.glob("*.tmp"))


def test_a_damaged_identity_is_never_replaced(hosted: Hosted, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "peer"))
    damage(state / "identity.key", "truncated")
    raw = (state / "identity.key").read_bytes()
    join(hosted.invite, state).refused(2, "identity.key", "68-byte", "restore it")
    assert (state / "identity.key").read_bytes() == raw


def test_a_copied_identity_is_refused_while_its_owner_runs(hosted: Hosted, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "owner"))
    owner = hosted.world.command(
        "owner", "join", hosted.invite, "--dir", str(state), "--listen", "/ip4/127.0.0.1/tcp/0", "--log-json"
    ).start()  # fmt: skip
    try:
        hosted.world.wait_for("the owner trains", lambda: owner.events("training"))
        copy = Path(shutil.copytree(used, tmp_path / "copy"))
        join(hosted.invite, copy, "--wait", "1").refused(4, "in use by a running process", "state directory of its own")
    finally:
        owner.kill()
