"""deploy/: the image and the compose file say what the CLI can do, listen where it listens, and run without rights."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from decentra.cli import organise
from decentra.config import Manifest, PeerConfig, load_toml
from tests.unit.cli_lines import cli, in_comments, problem_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MEMBERS = ("keeper", "trainer")


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if not x.lstrip().startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def default_of(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


# ---------------------------------------------------------------- compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_starts_a_command_that_exists(name: str) -> None:
    words = SERVICES[name]["command"]
    assert all(isinstance(w, str) for w in words)
    assert problem_of(shlex.join(["decentra", *words])) is None
    required = sum(p.required and p.param_type_name == "argument" for p in cli().commands[words[0]].params)
    assert sum(not w.startswith("-") for w in words[1:]) >= required


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_to_lose(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "/tmp" in service["tmpfs"], "the p2p daemon's sockets lie there"
    assert not service.get("privileged")
    assert "docker.sock" not in json.dumps(service)


@pytest.mark.parametrize("name", SERVICES)
def test_state_lies_in_a_declared_volume(name: str) -> None:
    volumes = [v.split(":") for v in SERVICES[name]["volumes"]]
    named = [source for source, target, *_ in volumes if target == "/state"]
    assert len(named) == 1
    assert named[0] in COMPOSE["volumes"]
    for source, _, *mode in volumes:
        if source.startswith("."):
            assert (DEPLOY / source).resolve().is_dir()
            assert mode == ["ro"]


def test_every_named_volume_and_secret_is_used() -> None:
    used = {v.split(":")[0] for s in SERVICES.values() for v in s["volumes"]}
    assert set(COMPOSE["volumes"]) <= used
    assert set(COMPOSE["secrets"]) == {secret for s in SERVICES.values() for secret in s.get("secrets", ())}


def test_the_host_publishes_the_ports_it_listens_on() -> None:
    expected = {default_of(organise.host, "bootstrap_port"), default_of(organise.host, "service_port")}
    assert {tuple(map(int, p.split(":"))) for p in SERVICES["host"]["ports"]} == {(p, p) for p in expected}
    assert {int(p) for p in of("EXPOSE")[0].split()} == expected


@pytest.mark.parametrize("name", [n for n, s in SERVICES.items() if s.get("profiles") != ["setup"]])
def test_a_healthcheck_asks_a_port_the_service_listens_on(name: str) -> None:
    service = SERVICES[name]
    check = service["healthcheck"]
    asked = int(re.search(r"'127\.0\.0\.1', (\d+)", " ".join(check["test"])).group(1))  # type: ignore[union-attr]
    listens = (
        {default_of(organise.host, "service_port")}
        if name == "host"
        else {int(x) for x in re.findall(r"/tcp/(\d+)", " ".join(service["command"]))}
    )
    assert asked in listens
    compile(check["test"][-1], "healthcheck", "exec")
    assert check["retries"] >= 2
    assert check["start_period"]


@pytest.mark.parametrize("name", MEMBERS)
def test_an_invite_is_a_secret_file_and_the_end_of_the_run_ends_the_container(name: str) -> None:
    service = SERVICES[name]
    assert service["command"][1] == "/run/secrets/invite"
    assert service["secrets"] == ["invite"]
    assert service["restart"].startswith("on-failure")
    assert COMPOSE["secrets"]["invite"]["file"].startswith("./secrets/")
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().split()


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_configurations_exist_and_load(name: str) -> None:
    words = SERVICES[name]["command"]
    for option, cls in (("--config", PeerConfig), ("--from", Manifest)):
        if option in words:
            load_toml(cls, ROOT / words[words.index(option) + 1].lstrip("/"))  # /peers is mounted from peers/


def test_the_image_is_built_from_this_dockerfile() -> None:
    for service in SERVICES.values():
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


# ---------------------------------------------------------------- Dockerfile


def test_dockerfile_is_sound() -> None:
    known = {"FROM", "ARG", "WORKDIR", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert set(names) <= known
    assert names[0] == "FROM"
    assert all(":" in image.split()[0] and not image.split()[0].endswith(":latest") for image in of("FROM"))
    assert names.count("ENTRYPOINT") == names.count("CMD") == names.count("HEALTHCHECK") == 1


def test_image_runs_as_a_user_without_rights_that_owns_the_state() -> None:
    last_from = max(i for i, (name, _) in enumerate(instructions()) if name == "FROM")
    final = instructions()[last_from:]
    uid = next(rest for name, rest in final if name == "USER").split(":")[0]
    assert int(uid) >= 1000
    made = next(rest for name, rest in final if name == "RUN")
    assert f"--uid {uid}" in made
    assert re.search(r"install -d -o decentra -g decentra .* /state", made)
    order = [name for name, _ in final]
    assert order.index("RUN") < order.index("USER") < order.index("ENTRYPOINT")
    assert {service["user"].split(":")[0] for service in SERVICES.values()} == {uid}


def test_image_copies_what_pyproject_needs_and_nothing_secret() -> None:
    copied = {source for rest in of("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "decentra"} == copied, "readme and licence are named in pyproject.toml"
    assert all((ROOT / source).exists() for source in copied)


def test_image_starts_decentra() -> None:
    entry, command = json.loads(of("ENTRYPOINT")[0]), json.loads(of("CMD")[0])
    assert problem_of(shlex.join([*entry, *command])) is None
    assert entry == ["decentra"]
    state = next(rest for rest in of("ENV"))
    assert "XDG_STATE_HOME=/state" in state, "the default state directory follows it"
    assert json.loads(of("VOLUME")[0]) == ["/state"]


def test_commands_in_comments_exist() -> None:
    for path in (DEPLOY / "compose.yaml", DEPLOY / "Dockerfile"):
        for line in in_comments(path.read_text()):
            assert problem_of(line) is None, path
