"""``decentra init``: a run directory is made. The manifest is frozen here, the run key and the first anchors are made. No network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from decentra.cli.rundir import AFTER_FILE, RunDir
from decentra.config import Manifest, StopSpec, load_toml, parse_config
from decentra.data.tokens import BYTES, MAX_BYTE_VOCAB, FileTokenizer, check_vocabulary, load_tokenizer
from decentra.errors import ConfigError
from decentra.hf.checkpoint import Checkpoint, open_checkpoint
from decentra.hf.convert import parameter_shapes
from decentra.identity import Keypair, save_key
from decentra.ids import Digest, FragmentId, digest_of
from decentra.peer.disk import RealDisk, write_atomic


def create(
    root: Path, source: Path | None, settings: Sequence[str], model_code: Path | None = None, model: Path | None = None, tokenizer: Path | None = None,
    after: Path | None = None,
) -> tuple[RunDir, Manifest]:  # fmt: skip
    """``decentra init``: freeze the manifest, make the run key and the genesis anchors. Raises ConfigError; never overwrites a run.

    ``model``: a checkpoint's folder, whose shape, weights and tokenizer the run starts from. ``tokenizer``: a ``tokenizer.json`` for a model from nothing.
    ``after``: the directory of a run that ended, whose rules it takes over and whose members follow; it needs the run's model.
    """
    run = RunDir(root)
    if (root / "manifest.json").exists():
        raise ConfigError(f"{root} holds a run already; its manifest is frozen. Choose another directory")
    if after is not None:
        if model is None:
            raise ConfigError(f"init: --after {after} goes on with that run's model; get it with 'decentra pull', and give it as --model")
        if not RunDir(after).has_run_key():
            raise ConfigError(f"init: {RunDir(after).run_key_file} is missing; whoever has it can say where that run goes on")
        if source is not None:
            raise ConfigError(f"init: the rules come from {after}; leave --from out and change single ones with --set")
    with ExitStack() as stack:
        start = None if model is None else stack.enter_context(open_checkpoint(model))
        marks = _tokenizer(start, tokenizer)
        draft = _draft(run, source, settings, start, marks, None if after is None else RunDir(after).manifest())
        blobs, genesis = _make_genesis(draft, model_code, start)
    held_out = _held_out(draft)
    manifest = draft.model_copy(update={"genesis": genesis, "data": draft.data.model_copy(update={"held_out": held_out})})
    run.genesis.mkdir(parents=True, exist_ok=True)
    if after is not None:
        write_atomic(RealDisk(root), AFTER_FILE, json.dumps({"run_dir": str(after.resolve())}).encode())
    disk = RealDisk(run.genesis)
    if marks is not None:
        blobs[marks.digest] = marks.data
    for digest, blob in blobs.items():
        write_atomic(disk, digest, blob)
    if not run.has_run_key():
        save_key(run.run_key_file, Keypair.generate())
    write_atomic(RealDisk(root), "manifest.json", manifest.canonical_bytes())  # last: a directory without it is no run
    return run, manifest


def _tokenizer(start: Checkpoint | None, given: Path | None) -> FileTokenizer | None:
    """The run's own, None where bytes are the tokens. Raises ConfigError."""
    if start is None:
        return None if given is None else load_tokenizer(given)
    if given is not None:
        raise ConfigError(
            f"init: {start.folder} brings its own tokenizer; a model is read with the one it was made with: leave --tokenizer out"
        )
    found = start.tokenizer()
    return found if isinstance(found, FileTokenizer) else None


def _draft(
    run: RunDir, source: Path | None, settings: Sequence[str], start: Checkpoint | None = None, tokenizer: FileTokenizer | None = None,
    before: Manifest | None = None,
) -> Manifest:  # fmt: skip
    if before is not None:
        base = _rules_of(before)
    elif source is not None:
        base = load_toml(Manifest, source)
    elif run.toml.exists():
        base = load_toml(Manifest, run.toml)
    else:
        base = Manifest(name=run.root.resolve().name[:64] or "run")
    raw = base.model_dump(mode="json")
    if start is not None:
        raw["model"] = start.spec.model_dump(mode="json")
        raw["data"]["seq_len"] = min(raw["data"]["seq_len"], start.spec.max_seq_len)
        raw["placement"]["experts_per_peer"] = min(raw["placement"]["experts_per_peer"], start.spec.num_experts)
    if raw["data"]["tokenizer"] is not None or any(setting.strip().startswith("data.tokenizer") for setting in settings):
        raise ConfigError("init: data.tokenizer is computed; give the file with --tokenizer, or a checkpoint that has one")
    raw["data"]["tokenizer"] = None if tokenizer is None else tokenizer.digest
    if start is None and tokenizer is not None:
        raw["model"]["vocab_size"] = tokenizer.num_tokens
    for setting in settings:
        _set(raw, setting)
    manifest = parse_config(Manifest, raw, "init")
    if tokenizer is not None or (manifest.model.code == "decoder" and manifest.model.vocab_size > MAX_BYTE_VOCAB):
        check_vocabulary(tokenizer or BYTES, manifest.model.vocab_size, "init")
    shape = set(parameter_shapes(manifest.model).items())
    if start is not None and shape != set(start.shapes.items()):
        raise ConfigError(f"init: a setting changes the shape of the model in {start.folder}; leave model.* out, or start from nothing")
    run.root.mkdir(parents=True, exist_ok=True)
    if start is not None or not run.toml.exists():
        run.toml.write_text(to_toml(manifest))
    return manifest


def _rules_of(before: Manifest) -> Manifest:
    """What a run that follows takes over: everything but the model's contents, what names single experts, and when it ends."""
    data = before.data.model_copy(update={"held_out": {}, "tokenizer": None})
    placement = before.placement.model_copy(update={"frozen_experts": ()})
    return before.model_copy(update={"genesis": {}, "data": data, "placement": placement, "stop": StopSpec()})


def _set(raw: dict[str, Any], setting: str) -> None:
    """Apply ``section.key=value``; the value is JSON, or text where it is no JSON."""
    path, eq, text = setting.partition("=")
    if not eq:
        raise ConfigError(f"--set expects section.key=value, got {setting[:80]!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *sections, key = path.strip().split(".")
    at = raw
    for section in sections:
        inner = at.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {path}: '{section}' is no section")
        at = inner
    at[key] = value


def to_toml(manifest: Manifest) -> str:
    """The manifest as TOML for people; ``genesis``, ``held_out`` and ``tokenizer`` are left out, init computes them."""
    raw = manifest.model_dump(mode="json", exclude={"genesis": True, "data": {"held_out", "tokenizer"}}, exclude_none=True)
    plain = [f"{k} = {_toml_value(v)}" for k, v in raw.items() if not isinstance(v, dict)]
    for name, section in raw.items():
        if isinstance(section, dict) and section:
            plain += ["", f"[{name}]", *(f"{k} = {_toml_value(v)}" for k, v in section.items())]
    return "\n".join(plain) + "\n"


def _toml_value(value: Any) -> str:
    return json.dumps(value)


def _make_genesis(
    manifest: Manifest, model_code: Path | None, start: Checkpoint | None = None
) -> tuple[dict[Digest, bytes], dict[FragmentId, Digest]]:
    from decentra.delta.anchor import AnchorState, encode_anchor
    from decentra.delta.flat import gather
    from decentra.model.custom import layout_for, model_for

    if start is not None:
        parameters = start.state()
    else:
        build, _ = model_for(manifest, model_code)
        parameters = {name: p.detach() for name, p in build(manifest.model, manifest.seed).named_parameters()}
    blobs: dict[Digest, bytes] = {}
    genesis: dict[FragmentId, Digest] = {}
    for fragment in layout_for(manifest, model_code).fragments:
        blob = encode_anchor(fragment, AnchorState(gather(parameters, fragment)))
        genesis[fragment.id] = digest_of(blob)
        blobs[digest_of(blob)] = blob
    return blobs, genesis


def _held_out(manifest: Manifest) -> dict[str, Digest]:
    from decentra.data.domains import embedded_domains, held_out_digests

    if any(name not in embedded_domains() for name in manifest.data.domains):
        return dict(manifest.data.held_out)
    return held_out_digests(manifest.data)
