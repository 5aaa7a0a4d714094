"""The organiser's run directory: run.toml, run.key, manifest.json, genesis/ and what the host keeps beside them. No network."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.config import Manifest, StopSpec, load_toml, manifest_from_bytes, parse_config
from decentra.data.tokens import BYTES, MAX_BYTE_VOCAB, FileTokenizer, check_vocabulary, load_tokenizer
from decentra.errors import ConfigError, IntegrityError
from decentra.hf.checkpoint import Checkpoint, open_checkpoint
from decentra.hf.convert import parameter_shapes
from decentra.identity import Keypair, load_key, load_or_create_key, save_key
from decentra.ids import Digest, FragmentId, digest_of
from decentra.invite import Invite
from decentra.peer.disk import RealDisk, write_atomic

DAY_S = 86_400
AFTER_FILE = "after.json"  # where the run before this one lies


@dataclass(frozen=True)
class RunDir:
    """Paths and contents of one run directory."""

    root: Path

    @property
    def toml(self) -> Path:
        return self.root / "run.toml"

    @property
    def run_key_file(self) -> Path:
        return self.root / "run.key"

    @property
    def genesis(self) -> Path:
        return self.root / "genesis"

    @property
    def host(self) -> Path:
        """What the host process keeps: keys, TLS, ledger, keeper state."""
        return self.root / "host"

    def manifest(self) -> Manifest:
        path = self.root / "manifest.json"
        if not path.exists():
            raise ConfigError(f"{self.root} is no run directory (no manifest.json); make one with 'decentra init {self.root}'")
        return manifest_from_bytes(path.read_bytes(), str(path))

    def run_key(self) -> Keypair:
        return load_key(self.run_key_file)

    def has_run_key(self) -> bool:
        return self.run_key_file.exists()

    def before(self) -> RunDir | None:
        """The run that this one continues. Raises ConfigError for a damaged note."""
        data = RealDisk(self.root).read(AFTER_FILE)
        if data is None:
            return None
        try:
            return RunDir(Path(str(json.loads(data)["run_dir"])))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'{self.root / AFTER_FILE} is damaged; put {{"run_dir": PATH}} with the path of the run before into it'
            ) from None

    def genesis_blobs(self, manifest: Manifest) -> dict[Digest, bytes]:
        """The first anchors and the tokenizer, verified. Raises IntegrityError."""
        return read_genesis(self.genesis, manifest)

    def remember_addresses(self, bootstrap: Sequence[str], services: Sequence[str]) -> None:
        body = json.dumps({"bootstrap": list(bootstrap), "services": list(services)}, indent=2).encode()
        write_atomic(RealDisk(self.host), "addresses.json", body)

    def has_addresses(self) -> bool:
        return (self.host / "addresses.json").exists()

    def addresses(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Bootstrap multiaddresses and service addresses of the last start. Raises ConfigError."""
        path = self.host / "addresses.json"
        if not self.has_addresses():
            raise ConfigError(f"the host of {self.root} has not run yet; start 'decentra host {self.root}' first, or give the addresses")
        try:
            raw = json.loads(path.read_bytes())
            return tuple(map(str, raw["bootstrap"])), tuple(map(str, raw["services"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is damaged; start 'decentra host {self.root}' again, or give the addresses") from None

    def make_invite(self, uses: int, days: float, *, bootstrap: Sequence[str], services: Sequence[str], role: str | None = None) -> Invite:
        from decentra.protocol.messages import Role
        from decentra.wire.trust import Token, seal_token

        manifest, key = self.manifest(), self.run_key()
        token = Token.generate(uses, int(time.time() + days * DAY_S), None if role is None else Role(role))
        return Invite(manifest.run_id(), key.public, tuple(bootstrap), tuple(services), seal_token(key, manifest.run_id(), token))


def read_genesis(folder: Path, manifest: Manifest) -> dict[Digest, bytes]:
    """The first anchors and the tokenizer in a folder, each checked against the manifest's digest. Raises IntegrityError."""
    blobs = {}
    named = {digest: f"genesis anchor of {fragment}" for fragment, digest in manifest.genesis.items()}
    if manifest.data.tokenizer is not None:
        named[manifest.data.tokenizer] = "the tokenizer"
    for digest, what in named.items():
        path = folder / digest
        data = path.read_bytes() if path.is_file() else b""
        if digest_of(data) != digest:
            raise IntegrityError(f"{what}: {path} is missing or damaged; restore it from the copy you made at init")
        blobs[digest] = data
    return blobs


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


def host_identity(run: RunDir) -> Keypair:
    return load_or_create_key(run.host / "identity.key")
