"""The organiser's run directory: run.toml, run.key, manifest.json, genesis/ and what the host keeps beside them. No network."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decentra.config import Manifest, manifest_from_bytes
from decentra.errors import ConfigError, IntegrityError
from decentra.identity import Keypair, load_key
from decentra.ids import Digest, digest_of
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
