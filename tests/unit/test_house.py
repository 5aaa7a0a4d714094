"""The house keeps its word: documents quote commands that exist, trees name files that exist, verbs are verbs, words are the glossary's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.unit.cli_lines import cli, in_markdown, problem_of, read

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "decentra/ARCHITECTURE.md", "peers/README.md", ".github/SECURITY.md")
VERBS = ("demo", "test", "check", "bench", "acceptance", "chaos", "proto")


def tracked() -> list[Path]:
    """Text files of the house; a checkout without git is walked instead."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listed = subprocess.run(
            [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30
        )
        names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    else:
        folders = ("decentra", "proto", "peers", "tests", "deploy", ".ci", ".github")
        names = [str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*")] + ["README.md", "Makefile", "pyproject.toml"]
    wanted = {".py", ".md", ".toml", ".proto", ".yaml", ".yml", ".html", ".js", ".css", ""}
    return [p for n in names if (p := ROOT / n).is_file() and p.suffix in wanted and "__pycache__" not in n and "/vendor/" not in n]


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_quoted_command_exists_with_its_options(name: str) -> None:
    lines = list(in_markdown(read(ROOT / name)))
    assert lines, f"{name} quotes commands"
    assert [problem for line in lines if (problem := problem_of(line))] == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("decentra jion INVITE", "jion"), ("decentra join INVITE --experst 3", "--experst"), ("decentra join ONE TWO", "2 arguments"),
        ("decentra --verson", "--verson"),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_noticed(line: str, word: str) -> None:
    assert word in (problem_of(line) or "")
    assert list(in_markdown(f"text\n\n    {line}\n\nmore")) == [line]
    assert list(in_markdown(f"text `{line}` more")) == [line]
    assert list(in_markdown(f"```\n{line}  # a comment\n```")) == [line]


def test_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in in_markdown(read(ROOT / "README.md")) if len(line.split()) > 1}
    assert shown >= set(cli().commands)


def test_exit_codes_are_the_documented_ones() -> None:
    from decentra.errors import ExitCode

    told = re.search(r"Exit codes: (.*?)\.\n", read(ROOT / "README.md"), re.DOTALL)
    assert told is not None
    assert [int(n) for n in re.findall(r"\b\d\b", told.group(1))] == [int(code) for code in ExitCode]


# ---------------------------------------------------------------- trees and names


def tree_entries() -> list[str]:
    block = re.search(r"## File tree\n```\n(.*?)```", read(ROOT / "README.md"), re.DOTALL)
    assert block is not None
    return [line.split()[0] for line in block.group(1).splitlines() if line.strip()]


def test_readme_tree_is_there_and_complete() -> None:
    entries = tree_entries()
    missing = [e for e in entries if not (ROOT / e).exists() or e.endswith("/") != (ROOT / e).is_dir()]
    assert missing == []
    rooms = {f"decentra/{p.name}/" for p in (ROOT / "decentra").iterdir() if (p / "__init__.py").is_file()}
    assert rooms <= set(entries)


def test_architecture_names_every_room_and_only_existing_files() -> None:
    text = read(ROOT / "decentra/ARCHITECTURE.md")
    for room in sorted(p for p in (ROOT / "decentra").iterdir() if (p / "__init__.py").is_file() and p.name != "pb"):
        row = re.search(rf"^\| `{room.name}/` \|(.*)$", text, re.MULTILINE)
        assert row is not None, f"{room.name} has no row"
        for name in re.findall(r"`([a-z_0-9]+\.py)`", row.group(1)):
            assert (room / name).is_file(), f"{room.name}/{name}"
    for path in re.findall(r"`([a-z_]+/[a-z_0-9]+\.py)`", text):
        assert (ROOT / "decentra" / path).is_file(), path


def test_links_between_documents_lead_somewhere() -> None:
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", read(ROOT / name)):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:decentra|peers|deploy|tests|proto|\.github|\.ci)/[\w./-]+)`", read(ROOT / name)):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_floors_of_the_architecture_are_those_that_are_checked() -> None:
    told = re.findall(r"^floor [0-5] +(.*)$", read(ROOT / "decentra/ARCHITECTURE.md"), re.MULTILINE)
    contracts = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(c for c in contracts if c["type"] == "layers")["layers"]
    checked = [{m.strip().removeprefix("decentra.") for m in layer.split("|")} for layer in layers]
    for line, floor in zip(told[:5], checked[:5], strict=True):
        assert set(re.split(r"\s{3,}", line)[:-1] if "   " in line.strip() else [line]) == floor, line


# ---------------------------------------------------------------- make and continuous integration


def test_makefile_has_the_verbs_and_they_parse(tmp_path: Path) -> None:
    text = read(ROOT / "Makefile")
    assert [v for v in VERBS if not re.search(rf"^{v}: ", text, re.MULTILINE)] == []
    assert set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split()) == set(VERBS)  # type: ignore[union-attr]
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    (tmp_path / "Makefile").write_text(text)
    (tmp_path / "pyproject.toml").write_text("")
    for verb in VERBS:
        shown = subprocess.run(
            [make, "-n", verb, "PIP_ARGS=--index-url https://example.org/simple"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert "--index-url https://example.org/simple" in shown.stdout, f"{verb} makes its environment with PIP_ARGS"
    once = subprocess.run([make, "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "[dev]" not in once, "the demo needs no development tools"


def test_an_environment_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    (tmp_path / "pyproject.toml").write_text("")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".run", ".dev"):
        (tmp_path / ".venv" / name).touch()
    (tmp_path / ".venv-torchft").mkdir()
    (tmp_path / ".venv-torchft" / ".ready").touch()
    for verb in ("demo", "test", "check", "bench"):
        shown = subprocess.run([make, "-n", verb], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
        assert "pip" not in shown.stdout, verb
    os.utime(tmp_path / "pyproject.toml", (4e9, 4e9))
    shown = subprocess.run([make, "-n", "test"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    assert "pip install" in shown.stdout, "new dependencies are installed"


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    (tmp_path / "pyproject.toml").write_text("")
    shutil.copy(ROOT / "Makefile", tmp_path)
    bare = tmp_path / "bare-python"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *version_info\\[1\\]*) echo python3.11-venv;; esac\n')
    bare.chmod(0o755)
    told = subprocess.run([make, "demo", f"PYTHON={bare}"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert told.returncode != 0
    assert "sudo apt install python3.11-venv" in told.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_the_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    text = read(script)
    assert text.index("\nset -euo pipefail") < text.index("\nmake check") < text.index("\nmake test")
    workflow = yaml.safe_load(read(ROOT / ".github/workflows/ci.yml"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(step.get("run") == ".ci/run" for step in steps)
    assert workflow["permissions"] == {"contents": "read"}


def test_licence_is_whole_and_the_one_pyproject_names() -> None:
    text = read(ROOT / "LICENSE")
    assert "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
    assert tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["license"] == "Apache-2.0"


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("name", [*DOCUMENTS, "peers/host.toml", "peers/private-data.toml"])
def test_documents_use_the_words_of_the_glossary(name: str) -> None:
    text = re.sub(r"\b(bootstrap|p2p|DHT) nodes?\b", "", read(ROOT / name), flags=re.IGNORECASE)
    unused = r"\b(epochs?|workers?|nodes?|masters?|global model|sync_every|leecher|client-server)\b"
    found = [(m.group(), text[max(0, m.start() - 40) : m.end() + 20]) for m in re.finditer(unused, text, re.IGNORECASE)]
    assert [f for f in found if "node.py" not in f[1]] == []


def test_no_file_names_a_place_of_one_machine_or_leaves_a_conflict() -> None:
    private = re.compile(r"(?<![\w.~$-])/(?:work|root|home/[a-z]\w*|Users/\w+)/[\w.-]|^(?:<{7}|>{7}) ", re.MULTILINE)
    bad = [f"{p.relative_to(ROOT)}: {m.group()}" for p in tracked() for m in private.finditer(p.read_text(errors="replace"))]
    assert bad == []


def test_documents_are_ascii_and_have_no_unfinished_marks() -> None:
    for name in (*DOCUMENTS, "Makefile", ".ci/run", "deploy/Dockerfile", "deploy/compose.yaml"):
        text = read(ROOT / name)
        assert text.isascii(), name
        assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text), name
