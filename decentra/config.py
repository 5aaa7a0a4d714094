"""The two configurations: Manifest (hashed, shared by every peer of a run) and PeerConfig (local). They never mix. No environment reads."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from math import cos, pi
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from decentra.errors import ConfigError
from decentra.ids import ROUTER, Digest, FragmentId, RunId, digest_of, module_of_fragment

MAX_CONFIG_BYTES = 1 << 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=False)


class ModelSpec(_Frozen):
    """Shape of the mixture-of-experts decoder; names follow Qwen3-MoE's config with units where they help."""

    code: str = Field("decoder", description="'decoder', or sha256:<hex> of a local file given with --model-code")
    vocab_size: int = Field(256, ge=2, le=1_000_000)
    hidden_size: int = Field(128, ge=8, le=65536)
    num_layers: int = Field(4, ge=1, le=512)
    num_heads: int = Field(4, ge=1, le=512)
    num_kv_heads: int = Field(2, ge=1, le=512)
    head_dim: int = Field(32, ge=2, le=1024)
    expert_hidden_size: int = Field(96, ge=1, le=1_000_000)
    num_experts: int = Field(8, ge=1, le=4096)
    num_experts_per_token: int = Field(2, ge=1, le=256)
    norm_topk_prob: bool = True
    qk_norm: Literal["head", "all", "none"] = Field(
        "head", description="RMSNorm on queries and keys: of each head (Qwen3), over all heads at once (OLMoE), or none (Llama, Mixtral)"
    )
    rope_theta: float = Field(10_000.0, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    max_seq_len: int = Field(1024, ge=2, le=1 << 20)
    aux_loss_weight: float = Field(0.01, ge=0, description="Switch load-balancing loss, eq. 4-6 of arXiv 2101.03961")
    bias_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="loss-free balancing, arXiv 2408.15664: each step moves a bias on every expert's logit, for the choice only, by so much",
    )
    z_loss_weight: float = Field(0.001, ge=0, description="router z-loss, eq. 5 of arXiv 2202.08906")

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(f"num_experts_per_token {self.num_experts_per_token} is more than num_experts {self.num_experts}")
        if self.num_experts_per_token == 1 and self.norm_topk_prob and self.num_experts > 1:
            raise ValueError(
                "num_experts_per_token = 1 with norm_topk_prob = true gives the router a constant weight of 1 and no gradient;"
                " use 2 experts per token or norm_topk_prob = false"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        return self


class DataSpec(_Frozen):
    """What text the run is about. Training text stays with its peer; only held-out digests are shared."""

    seq_len: int = Field(128, ge=2, le=1 << 20)
    domains: tuple[str, ...] = Field(("code", "prose", "headers", "math"), description="names of the embedded domains, or free names")
    bytes_per_domain: int = Field(400_000, ge=1024)
    held_out_bytes: int = Field(32_768, ge=1024, description="tail of each domain that nobody trains on")
    shared_fraction: float = Field(0.3, ge=0, le=1, description="share of a peer's windows drawn from all domains")
    held_out: dict[str, Digest] = Field(default_factory=dict, description="domain -> sha256 of its held-out bytes")
    tokenizer: Digest | None = Field(None, description="sha256 of the model's tokenizer.json; null: bytes are the tokens")


class TrainSpec(_Frozen):
    """The inner loop of every peer."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for hidden matrices, AdamW for the rest; slower per step on a CPU"
    )

    batch_size: int = Field(8, ge=1, le=65536)
    lr: float = Field(1.4e-3, gt=0, le=10)
    warmup_steps: int = Field(20, ge=0, description="of each peer's own steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how lr falls to final_share over decay_tokens, counted over the whole run: confirmed tokens of all peers"
    )
    decay_tokens: int | None = Field(None, ge=1)
    final_share: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0, le=10)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    grad_clip: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.schedule != "constant" and self.decay_tokens is None:
            raise ValueError(f"schedule {self.schedule!r} needs decay_tokens, the tokens of the whole run over which lr falls")
        return self

    def lr_at(self, num_steps: int, run_tokens: int) -> float:
        """Learning rate of a peer's own step ``num_steps`` (0: the first) once the run has ``run_tokens`` confirmed tokens.

        Peers of different speeds follow one schedule: it is a function of what the swarm did, not of what one of them did.
        """
        warm = min(1.0, (num_steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant" or self.decay_tokens is None:
            return self.lr * warm
        done = min(1.0, run_tokens / self.decay_tokens)
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + cos(pi * done))
        return self.lr * warm * (self.final_share + (1.0 - self.final_share) * left)


class RoundSpec(_Frozen):
    """The outer loop's timing. Times are seconds."""

    inner_steps: int = Field(10, ge=1, le=100_000, description="H: inner steps between two outer steps of a fragment")
    cut_off_s: float = Field(60.0, gt=0, description="a round settles with its quorum at this age until arrivals are known")
    grace_s: float = Field(60.0, gt=0, description="without a quorum the round is abandoned this long after the cut-off")
    attest_s: float = Field(30.0, gt=0, description="a settled round nobody attests is voided after this")
    gather_s: float = Field(5.0, ge=0, description="the next round opens after this even if some of the last roster are not ready")
    heartbeat_s: float = Field(5.0, gt=0)
    lease_s: float = Field(15.0, gt=0, description="a member silent for this long is suspected")
    reduce_from: int | None = Field(
        9, ge=2, description="from so many holders two reducers merge a round's packets into one, which all others fetch; null: never"
    )
    merge_s: float = Field(20.0, gt=0, description="without their packet after this everybody fetches every packet")
    rollback_s: float = Field(60.0, gt=0, description="an anchor nobody present holds is given up after this")
    trunk_fragments: int = Field(1, ge=1, le=1024)
    stagger: bool = Field(
        False, description="spread the fragments' rounds over the inner steps, so that links are used evenly (arXiv 2501.18512)"
    )
    overlap: bool = Field(
        True, description="train on while a round settles; false: inner steps wait for it, which idles and is never stale"
    )

    @model_validator(mode="after")
    def _check(self) -> RoundSpec:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s {self.lease_s:g} is less than two heartbeats of {self.heartbeat_s:g} s; members would be suspected between them"
            )
        return self


class OuterSpec(_Frozen):
    """The outer optimizer (DiLoCo, arXiv 2311.08105, alg. 1). Its scalars are computed by the service and travel in the settlement."""

    rule: Literal["average", "nesterov"] = "average"
    merge: Literal["mean", "contributors", "radial", "trimmed"] = Field(
        "mean",
        description="contributors: mean over those whose packets hold an element; radial: mean norm and mean direction of each matrix; trimmed: of each"
        " element without its largest and smallest values, against hostile members",
    )
    trim: float = Field(0.375, ge=0, lt=0.5, description="trimmed: share of the peers that is left out at each end; so many may be hostile")
    lr: float = Field(1.0, gt=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1, description="used by nesterov only")
    restart_every: int | None = Field(None, ge=1, description="nesterov: forget the momentum every so many rounds (arXiv 2605.28585)")
    final_lr: float | None = Field(None, gt=0, le=10, description="lr falls to this in a line over anneal_rounds (as SparseLoCo's does)")
    anneal_rounds: int = Field(100, ge=1)
    shrink_tokens: int = Field(0, ge=0, description="n0: lr times n / (n + n0) for a round with n tokens, so little evidence moves little")
    clip: float | None = Field(
        None, ge=1, description="k: a delta longer than k times the round's median norm is cut to that; the rest stays with its sender"
    )

    @model_validator(mode="after")
    def _check(self) -> OuterSpec:
        if self.final_lr is not None and self.final_lr > self.lr:
            raise ValueError(f"final_lr {self.final_lr:g} is more than lr {self.lr:g}; lr falls to it")
        if self.restart_every is not None and self.rule != "nesterov":
            raise ValueError("restart_every needs rule = 'nesterov': the average keeps no momentum")
        return self

    def scalars(self, height: int, num_tokens: int) -> tuple[float, float]:
        """Learning rate and momentum of the round that leads to anchor ``height`` (1: the first)."""
        lr = self.lr
        if self.final_lr is not None:
            lr += (self.final_lr - self.lr) * min(1.0, (height - 1) / self.anneal_rounds)
        if self.shrink_tokens:
            lr *= num_tokens / (num_tokens + self.shrink_tokens)
        is_restart = self.restart_every is not None and (height - 1) % self.restart_every == 0
        return lr, 0.0 if is_restart else self.momentum

    def clips(self, norms: Sequence[float]) -> tuple[float, ...]:
        """What each delta of a round is multiplied with: min(1, clip * median / norm), the median of those that are not zero.

        A delta of zero says nothing about how long deltas are: were most of them zero, so would be the median. Of fewer than three nobody is
        clipped: the median of two lies in their middle and does not tell which of them is out of line.
        """
        known = [norm for norm in norms if norm > 0]
        if self.clip is None or len(known) < 3:
            return (1.0,) * len(norms)
        longest = self.clip * median(known)
        return tuple(1.0 if norm <= longest else longest / norm for norm in norms)


CodecName = Literal["fp32", "bf16", "int8", "int4", "topk256", "topk128", "topk64", "topk32", "topk16"]  # densest first


class CodecSpec(_Frozen):
    """How deltas are packed. With ``sparsest`` every peer picks its own codec between the two, by its link and its owner's limits."""

    name: CodecName = Field("int8", description="the densest codec a peer may use, and the only one unless sparsest is set")
    sparsest: CodecName | None = None
    merged: CodecName | None = Field(None, description="codec of merged packets; default: name")
    share: float = Field(0.5, gt=0, le=1, description="share of a round's time that sending may take where a peer picks its codec")
    error_feedback: float = Field(1.0, ge=0, le=1, description="beta: share of the residual carried into the next round")

    @model_validator(mode="after")
    def _check(self) -> CodecSpec:
        names = get_args(CodecName)
        if self.sparsest is not None and names.index(self.sparsest) < names.index(self.name):
            raise ValueError(f"sparsest {self.sparsest!r} is denser than name {self.name!r}")
        return self


class PlacementSpec(_Frozen):
    holders: int = Field(2, ge=1, le=1024, description="wanted number of holders of every expert")
    experts_per_peer: int = Field(4, ge=1, le=4096)
    adopt_s: float = Field(
        120.0,
        gt=0,
        description="an expert without a present holder for this long is given to whoever trains fewest, beyond experts_per_peer",
    )
    adopt_rounds: int | None = Field(
        None,
        ge=1,
        description="or, where that comes first, once so many rounds of the trunk were confirmed since its last holder went; counted anew"
        " when the service starts again, and only of experts that somebody held",
    )
    affinity: float = Field(
        0.0, ge=0, le=100, description="while training, a token's choice of experts adds this to the logits of those its peer trains"
    )
    data_affinity: int = Field(
        1,
        ge=1,
        le=16,
        description="of so many windows of common text a peer trains on the one that the router sends to its experts most; of one window in a"
        " peer of several processes and in a run with its own model code",
    )
    frozen_experts: tuple[int, ...] = Field(
        (), description="experts that nobody trains and that stay as the run began; their router rows learn on"
    )
    mode: Literal["mirror", "held"] = Field(
        "mirror",
        description="mirror: every member has all experts in memory; held: only those it trains, unless it joins with --mode mirror",
    )


class JudgeSpec(_Frozen):
    """Whose packets are left out because they do not help: every holder judges the others' trunk packets by the loss of its own text.

    So every holder fetches every packet: there are no reducers then.
    """

    share: float | None = Field(
        None, ge=0, le=1, description="of the gain that a judge's own packet brings, which another's has to bring; null: nobody judges"
    )
    windows: int = Field(8, ge=1, le=1024, description="of text that a judge reads for a packet, and once more for the anchor")
    quarantine_rounds: int = Field(
        16, ge=1, description="rounds of the trunk for which whoever was condemned offers nothing; twice as many the next time"
    )


class AdmissionSpec(_Frozen):
    mode: Literal["open", "invited"] = "invited"
    max_members: int = Field(64, ge=1, le=4096)


class StopSpec(_Frozen):
    """The run ends at whichever comes first; peers then drain and leave."""

    rounds: int | None = Field(None, ge=1, description="confirmed rounds of the trunk")
    tokens: int | None = Field(None, ge=1)
    date: float | None = Field(None, description="Unix time in seconds")


class Manifest(_Frozen):
    """The frozen contract of a run. Its digest is the run id."""

    format: Literal[1] = 1
    name: str = Field(min_length=1, max_length=64)
    description: str = Field("", max_length=1000)
    licence: str = Field("Apache-2.0", max_length=100)
    organiser: str = Field("", max_length=200)
    seed: int = Field(0, ge=0, lt=1 << 63)
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    rounds: RoundSpec = RoundSpec()
    outer: OuterSpec = OuterSpec()
    outer_experts: OuterSpec | None = Field(None, description="the outer optimizer of experts, where it is another one")
    codec: CodecSpec = CodecSpec()
    placement: PlacementSpec = PlacementSpec()
    judging: JudgeSpec = JudgeSpec()
    admission: AdmissionSpec = AdmissionSpec()
    stop: StopSpec = StopSpec()
    genesis: dict[FragmentId, Digest] = Field(default_factory=dict, description="fragment -> digest of its first anchor")

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} is more than model.max_seq_len {self.model.max_seq_len}")
        if outside := [e for e in self.placement.frozen_experts if not 0 <= e < self.model.num_experts]:
            raise ValueError(f"placement.frozen_experts names expert {outside[0]}; the model has experts 0 to {self.model.num_experts - 1}")
        frozen = set(self.placement.frozen_experts)
        if frozen and self.placement.mode == "held":
            raise ValueError(
                "placement.frozen_experts: in a run of 'held' peers nobody would hold them, and all train without them; use mode 'mirror'"
            )
        if len(frozen) == self.model.num_experts:
            raise ValueError("placement.frozen_experts names all experts; leave one to train")
        is_trimmed = any(outer is not None and outer.merge == "trimmed" for outer in (self.outer, self.outer_experts))
        if is_trimmed and (sparse := [c for c in (self.codec.name, self.codec.sparsest) if c is not None and c.startswith("topk")]):
            raise ValueError(
                f"outer.merge 'trimmed' needs packets that hold every element; codec {sparse[0]!r} does not, int4 and denser ones do"
            )
        return self

    def canonical_bytes(self) -> bytes:
        """UTF-8 JSON with sorted keys and no spaces: equal manifests give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def outer_of(self, fragment: FragmentId) -> OuterSpec:
        """The outer optimizer of a fragment."""
        return self.outer_experts if self.outer_experts is not None and fragment.startswith("expert.") else self.outer

    def merge_of(self, fragment: FragmentId) -> str:
        """How a fragment's deltas become one: where members hold a part of the experts, the router is merged row by row."""
        return "rows" if self.placement.mode == "held" and module_of_fragment(fragment) == ROUTER else self.outer_of(fragment).merge

    def run_id(self) -> RunId:
        return RunId(digest_of(self.canonical_bytes()))


class PeerConfig(_Frozen):
    """What one machine brings: identity, place on disk, data, device and addresses. Never shared."""

    name: str = Field("peer", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    dir: Path | None = Field(None, description="state directory; default: the user state directory by run and name")
    role: Literal["trainer", "keeper", "watcher"] = "trainer"
    device: str = "auto"
    threads: int = Field(1, ge=1, le=1024, description="torch threads of the trainer")
    experts: tuple[int, ...] | None = Field(None, description="experts this peer insists on; default: placed")
    num_experts: int | None = Field(None, ge=0, description="how many experts to hold; default: the manifest's")
    mode: Literal["mirror", "held"] | None = Field(
        None, description="mirror: all experts in memory; held: only those this peer trains; default: the run's"
    )
    data: tuple[str, ...] = Field((), description="files or folders of text, JSONL or Parquet; empty: embedded domains")
    domain: str | None = Field(None, description="embedded domain this peer trains on; default: all of them")
    shared_fraction: float | None = Field(None, ge=0, le=1, description="overrides the manifest's share of common text")
    text_field: str = "text"
    model_code: Path | None = Field(None, description="local file with the model's code; its hash must be the manifest's")
    listen: tuple[str, ...] = Field(("/ip4/0.0.0.0/tcp/0",), description="p2p listen addresses; empty: outbound only")
    announce: tuple[str, ...] = ()
    max_steps: int | None = Field(None, ge=1, description="stop training after this many inner steps")
    up: str | None = Field(
        None, description="most that uploads may take of the uplink, such as '5mbit'; where the run lets peers choose, the codec follows it"
    )
    cap: str | None = Field(None, description="most that packets may send, such as '20GB/day'; heard where the run lets peers choose")
    memory: str | None = Field(
        None, description="most memory to plan with, such as '4GiB'; default: what is free. Experts are chosen to fit it"
    )
    gpu_memory: str | None = Field(None, description="most memory of the GPU to use, such as '6GiB'")
    hours: str | None = Field(None, description="train at these local times only, such as '22-7'; outside the peer leaves and waits")
    when_idle: bool = Field(False, description="give way while other work uses more than half of the processor")
    on_battery: bool = Field(False, description="train on battery, too")
    nice: int | None = Field(None, ge=0, le=19, description="scheduling priority; 19 gives way to everything else")
    blob_budget_bytes: int = Field(8 << 30, ge=1 << 20)
    archive_every: int = Field(
        0, ge=0, description="keep packets of old rounds, and an anchor every so many, while the blob budget lasts; what 'replay' needs"
    )

    @model_validator(mode="after")
    def _check(self) -> PeerConfig:
        _ = self.cap_bytes_per_day, self.memory_bytes, self.gpu_memory_bytes  # they raise
        if self.up_bytes_per_s is not None and self.up_bytes_per_s < MIN_UP_BYTES_PER_S:
            raise ValueError(f"up: expected at least {MIN_UP_BYTES_PER_S * 8 / 1e3:g}kbit; with less no transfer ends in time")
        return self

    @property
    def up_bytes_per_s(self) -> float | None:
        return None if self.up is None else _measure(self.up, _BITS_PER_S, "up", "5mbit") / 8

    @property
    def cap_bytes_per_day(self) -> float | None:
        return None if self.cap is None else _measure(self.cap, _BYTES_PER_DAY, "cap", "20GB/day")

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else int(_measure(self.memory, _BYTES, "memory", "4GiB"))

    @property
    def gpu_memory_bytes(self) -> int | None:
        return None if self.gpu_memory is None else int(_measure(self.gpu_memory, _BYTES, "gpu_memory", "6GiB"))


MIN_UP_BYTES_PER_S = 1_000
_BITS_PER_S = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BYTES = {"mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES_PER_DAY = {"mb/day": 1e6, "gb/day": 1e9, "tb/day": 1e12, "mb/hour": 24e6, "gb/hour": 24e9}


def _measure(text: str, units: dict[str, float], key: str, example: str) -> float:
    """A number with one of ``units``. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([A-Za-z/]+)\s*", text)
    factor = units.get(found.group(2).lower()) if found else None
    if found is None or factor is None or float(found.group(1)) == 0:
        raise ValueError(f"{key}: expected a number above 0 and one of {', '.join(units)}, such as {example}")
    return float(found.group(1)) * factor


M = TypeVar("M", bound=BaseModel)


def parse_config(cls: type[M], raw: dict[str, Any], where: str) -> M:
    """Validate ``raw`` as ``cls``; every problem becomes one line that names the key, what was expected and a near miss."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(cls, e) for e in error.errors())) from None


def load_toml(cls: type[M], path: Path) -> M:
    """Read a TOML file as ``cls``. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes, a configuration has at most {MAX_CONFIG_BYTES}")
    try:
        raw = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    return parse_config(cls, raw, str(path))


def manifest_from_bytes(data: bytes, where: str = "manifest") -> Manifest:
    """Parse canonical manifest bytes that came from outside. Raises ConfigError."""
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: {len(data)} bytes, a manifest has at most {MAX_CONFIG_BYTES}")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    return parse_config(Manifest, raw, where)


def differing_keys(ours: Manifest, theirs: Manifest) -> tuple[str, ...]:
    """Dotted names of the entries in which two manifests differ, in order."""
    a, b = _flatten(ours.model_dump(mode="json")), _flatten(theirs.model_dump(mode="json"))
    return tuple(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _explain(cls: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{key}'; {hint}"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"'{key}': {said}, got {str(error.get('input'))[:80]!r}" if key else said


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = cls
    for part in path:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)
