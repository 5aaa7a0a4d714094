"""The learning lab: P peers as plain objects in one process, to choose a run's defaults by loss. No network, no threads, no service, no clock.

It uses the runtime's own inner loop, accounts, codec, aggregation and outer step; only the waiting is modelled: a packet encoded at step s
is adopted at step s + delay, by holders and followers alike. Four numbers come out, all mean held-out nats per byte over the domains:

loss_end        the assembled anchors of the swarm
loss_solo       one peer alone, all experts, text of all domains
loss_solo_own   one peer alone, all experts, text of its own domain only; mean over the peers
loss_ddp_like   one model, all experts, text of all domains, a batch of all peers together

    python -m tests.bench.lab --json --settings train.lr=4e-3 lab.steps=300 --seeds 1,2,3
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from decentra.bits import bits_float, float_bits
from decentra.config import Manifest, PeerConfig, parse_config
from decentra.data.domains import embedded_domain
from decentra.data.windows import source_for
from decentra.delta.account import Account
from decentra.delta.anchor import AnchorState, anchor_digest, encode_anchor
from decentra.delta.decoded import Decoded
from decentra.delta.flat import gather, scatter, with_untouched
from decentra.delta.merge import merge
from decentra.delta.outer import outer_step
from decentra.delta.packet import decode_packet
from decentra.errors import ConfigError, DecentraError, TrainingError
from decentra.ids import ROUTER, Digest, FragmentId, PeerId, expert_of
from decentra.model.decoder import Decoder, build_model
from decentra.model.evaluate import evaluate
from decentra.modules import Layout, build_layout
from decentra.peer.inner import InnerLoop
from decentra.protocol.placement import place

ARMS = ("swarm", "solo", "solo_own", "ddp_like")


@dataclass(frozen=True)
class Lab:
    """What the manifest does not say. Set with ``lab.NAME=VALUE``; every other setting is a dotted manifest key."""

    steps: int = 450  # inner steps of every peer
    peers: int = 4
    delay_steps: int = 2  # from encode to adoption
    speeds: str = ""  # inner steps of each peer per step of the lab, such as 1,1,2,4; empty: one each
    decay: str = "none"  # or linear, cosine
    decay_from: float = 0.0  # share of the steps after which the learning rate falls
    decay_to: float = 0.1  # share of the learning rate at the end
    refit: int = 0  # router-only steps of the assembled model at the end, on text of all domains
    eval_windows: int = 0  # per domain, evenly spread; 0: all of the held-out text
    report_every: int = 60  # inner steps between progress lines; 0: none
    arms: str = ",".join(ARMS)


class ScheduledLoop(InnerLoop):
    """The runtime's inner loop with a learning rate that may fall towards the end of a known number of steps."""

    lab: Lab | None = None

    def step(self) -> int:
        assert self.lab is not None, "a lab loop knows its lab"
        base = self._manifest
        share = lr_share(self._counters.num_steps / self.lab.steps, self.lab)
        self._manifest = base.model_copy(update={"train": base.train.model_copy(update={"lr": base.train.lr * share})})
        try:
            return super().step()
        finally:
            self._manifest = base


def lr_share(progress: float, lab: Lab) -> float:
    """Share of the learning rate at ``progress`` (0 to 1) of the run, before warm-up."""
    if lab.decay == "none" or progress <= lab.decay_from:
        return 1.0
    x = min(1.0, (progress - lab.decay_from) / (1.0 - lab.decay_from))
    if lab.decay == "linear":
        return 1.0 - (1.0 - lab.decay_to) * x
    if lab.decay == "cosine":
        return lab.decay_to + (1.0 - lab.decay_to) * 0.5 * (1.0 + math.cos(math.pi * x))
    raise ConfigError(f"lab.decay: expected none, linear or cosine, got {lab.decay!r}")


# ---------------------------------------------------------------- the swarm


@dataclass
class LabPeer:
    """One peer: its inner loop over all experts, and an account of every fragment it trains."""

    id: PeerId
    inner: ScheduledLoop
    accounts: dict[FragmentId, Account]
    speed: int = 1
    tokens_at_encode: dict[FragmentId, int] = field(default_factory=dict)


@dataclass
class Swarm:
    """All peers and the confirmed anchors they share."""

    manifest: Manifest
    layout: Layout
    peers: list[LabPeer]
    anchors: dict[FragmentId, AnchorState]
    num_rounds: int = 0
    packet_bytes: int = 0

    def step(self) -> None:
        for peer in self.peers:
            for _ in range(peer.speed):
                peer.inner.step()
            if peer.inner.is_diverged:
                raise TrainingError(f"{peer.id}: five inner steps in a row were not finite; lower train.lr")

    def encode(self) -> None:
        """Every holder encodes every fragment it trains; the rounds of all fragments open and close together."""
        self.num_rounds += 1
        for peer in self.peers:
            for fragment, account in peer.accounts.items():
                snapshot = peer.inner.snapshot(fragment)
                num_tokens = snapshot.num_tokens - peer.tokens_at_encode.get(fragment, 0)
                peer.tokens_at_encode[fragment] = snapshot.num_tokens
                codec = self.manifest.codec
                live_N = with_untouched(snapshot.live_N, account.anchor_state.anchor_N, snapshot.untouched)
                pending = account.encode(self.num_rounds, live_N, codec.name, codec.error_feedback, num_tokens, snapshot.num_steps)
                self.packet_bytes += len(pending.packet)

    def adopt(self) -> None:
        """The rounds are confirmed: holders close their pending packets, followers move to the new anchors."""
        for fragment in self.layout.fragments:
            old = self.anchors[fragment.id]
            new, clips = self._aggregated(fragment.id, old)
            digest = anchor_digest(encode_anchor(fragment, new))
            self.anchors[fragment.id] = new
            for peer in self.peers:
                account = peer.accounts.get(fragment.id)
                if account is None:
                    shift_N = new.anchor_N - old.anchor_N
                elif peer.id in clips:
                    shift_N = account.applied(new, digest, clips[peer.id])
                else:
                    shift_N = account.excluded(new, digest)
                if account is not None or self.manifest.placement.mode == "mirror":
                    peer.inner.shift(fragment.id, shift_N)

    def altered(
        self, fragment: FragmentId, deltas: dict[PeerId, Decoded], norms: dict[PeerId, float]
    ) -> tuple[dict[PeerId, Decoded], dict[PeerId, float]]:  # fmt: skip
        """What is merged instead of what was sent: nothing else, where all are honest."""
        del fragment
        return deltas, norms

    def _aggregated(self, fragment: FragmentId, old: AnchorState) -> tuple[AnchorState, dict[PeerId, int]]:
        """The next anchor and every peer's clip; weights are tokens, as a settlement computes them."""
        pendings = {p.id: p.accounts[fragment].pending for p in self.peers if fragment in p.accounts}
        tokens = {id: pending.num_tokens for id, pending in pendings.items() if pending is not None}
        deltas = {id: decode_packet(p.packet, self.layout[fragment]) for id, p in pendings.items() if p is not None}
        deltas, norms = self.altered(fragment, deltas, {id: bits_float(p.norm_bits) for id, p in pendings.items() if p is not None})
        tokens = {id: tokens[id] for id in deltas}
        total = sum(tokens.values())
        weights = {id: float_bits(n / total if total else 1.0 / len(tokens)) for id, n in tokens.items()}
        outer = self.manifest.outer_of(fragment)
        lr, momentum = outer.scalars(self.num_rounds, total)
        clips = dict(zip(norms, map(float_bits, outer.clips(list(norms.values()))), strict=True))
        merged_N = merge(self.layout[fragment], deltas, weights, clips, rule=self.manifest.merge_of(fragment), trim=outer.trim)
        return outer_step(old, merged_N, rule=outer.rule, lr_bits=float_bits(lr), momentum_bits=float_bits(momentum)), clips

    def assembled(self) -> Decoder:
        """A model made of the confirmed anchors."""
        model = build_model(self.manifest.model, self.manifest.seed)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for fragment in self.layout.fragments:
                for name, values in scatter(self.anchors[fragment.id].anchor_N, fragment).items():
                    parameters[name].copy_(values)
        return model


def placements(manifest: Manifest, ids: Sequence[PeerId]) -> dict[PeerId, tuple[int, ...]]:
    """Experts of every peer, placed one after the other as a run does."""
    placed: dict[PeerId, tuple[int, ...]] = {}
    for peer in ids:
        placed[peer] = place(peer, manifest.placement.experts_per_peer, manifest.model.num_experts, placed)
    return placed


def build_swarm(manifest: Manifest, lab: Lab, domains: Sequence[str] = (), start: Mapping[str, torch.Tensor] | None = None) -> Swarm:
    """Peer i trains on domain i (modulo their number; default: the manifest's) from the common genesis of ``manifest.seed``, or from ``start``."""
    domains = domains or manifest.data.domains
    ids = [PeerId(f"peer-{i}") for i in range(lab.peers)]
    layout = _layout(manifest)
    genesis = dict(build_model(manifest.model, manifest.seed).named_parameters()) if start is None else dict(start)
    anchors = {f.id: AnchorState(gather(genesis, f)) for f in layout.fragments}
    digests = {f.id: anchor_digest(encode_anchor(f, anchors[f.id])) for f in layout.fragments}
    placed, speeds = placements(manifest, ids), _speeds(lab)
    peers = []
    for index, peer in enumerate(ids):
        trained = [f for f in layout.fragments if (e := expert_of(f.module)) is None or e in placed[peer]]
        config = PeerConfig(domain=domains[index % len(domains)])
        held = placed[peer] if manifest.placement.mode == "held" else None
        inner = inner_loop(manifest, lab, layout, config, peer, frozenset(f.id for f in trained), held)
        if start is not None:
            for fragment in layout.fragments:
                inner.load(fragment.id, anchors[fragment.id].anchor_N)
        accounts = {f.id: Account(f, anchors[f.id], Digest(digests[f.id])) for f in trained}
        peers.append(LabPeer(peer, inner, accounts, speeds[index]))
    return Swarm(manifest, layout, peers, anchors)


def _speeds(lab: Lab) -> list[int]:
    speeds = [int(text) for text in lab.speeds.split(",")] if lab.speeds else [1] * lab.peers
    if len(speeds) != lab.peers or min(speeds) < 1:
        raise ConfigError(f"lab.speeds: expected {lab.peers} whole numbers above 0, got {lab.speeds!r}")
    return speeds


def run_swarm(manifest: Manifest, lab: Lab, say: Callable[[str], None]) -> tuple[Decoder, Swarm]:
    """All steps of all peers; a round begins every ``rounds.inner_steps`` and its result is adopted ``lab.delay_steps`` later."""
    return run_steps(build_swarm(manifest, lab), lab, say)


def run_steps(swarm: Swarm, lab: Lab, say: Callable[[str], None]) -> tuple[Decoder, Swarm]:
    """The same with a swarm that is there."""
    manifest, horizon = swarm.manifest, swarm.manifest.rounds.inner_steps
    if not 0 <= lab.delay_steps < horizon:
        raise ConfigError(f"lab.delay_steps: expected 0 to rounds.inner_steps - 1 = {horizon - 1}, got {lab.delay_steps}")
    for step in range(1, lab.steps + 1):
        swarm.step()
        if step % horizon == 0:
            swarm.encode()
        if step % horizon == lab.delay_steps and swarm.num_rounds:
            swarm.adopt()
        if lab.report_every and step % lab.report_every == 0:
            loss = statistics.fmean(p.inner.totals(0.0).loss_ema or 0.0 for p in swarm.peers)
            quick = mean_loss(swarm.assembled(), manifest, 24)
            say(f"swarm step {step}: train {loss:.3f}, anchors {quick:.3f} (24 windows)")
    if lab.delay_steps and any(a.pending is not None for p in swarm.peers for a in p.accounts.values()):
        swarm.adopt()
    return refitted(swarm.assembled(), manifest, lab), swarm


def refitted(model: Decoder, manifest: Manifest, lab: Lab) -> Decoder:
    """The model after ``lab.refit`` steps of its router alone."""
    if lab.refit:
        layout = _layout(manifest)
        config = PeerConfig(shared_fraction=0.0)
        inner = ScheduledLoop(
            manifest.model_copy(update={"placement": manifest.placement.model_copy(update={"affinity": 0.0})}), layout, model,
            source_for(manifest, config, PeerId("refit")), torch.device("cpu"), frozenset(f.id for f in layout.of_module(ROUTER)),
        )  # fmt: skip
        inner.lab = lab
        for _ in range(lab.refit):
            inner.step()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    return model


# ---------------------------------------------------------------- one model alone


def run_alone(manifest: Manifest, lab: Lab, key: str, domain: str | None, say: Callable[[str], None]) -> Decoder:
    """One model with all experts, ``lab.steps`` inner steps on one domain (None: on all), nothing exchanged."""
    layout = _layout(manifest)
    config = PeerConfig(domain=domain, shared_fraction=0.0)
    inner = inner_loop(manifest, lab, layout, config, PeerId(key), frozenset(f.id for f in layout.fragments))
    for step in range(1, lab.steps + 1):
        inner.step()
        if inner.is_diverged:
            raise TrainingError(f"{key}: five inner steps in a row were not finite; lower train.lr")
        if lab.report_every and domain is None and step % lab.report_every == 0:
            say(
                f"{key} step {step}: train {inner.totals(0.0).loss_ema:.3f}, model {mean_loss(inner._model, manifest, 24):.3f} (24 windows)"
            )
    assert isinstance(inner._model, Decoder), "the lab trains the reference decoder"
    return inner._model


def _layout(manifest: Manifest) -> Layout:
    with torch.device("meta"):
        model = Decoder(manifest.model)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return build_layout(shapes, trunk_fragments=manifest.rounds.trunk_fragments)


def inner_loop(
    manifest: Manifest,
    lab: Lab,
    layout: Layout,
    config: PeerConfig,
    peer: PeerId,
    trained: frozenset[FragmentId],
    held: tuple[int, ...] | None = None,
) -> ScheduledLoop:
    model = build_model(manifest.model, manifest.seed, held)
    inner = ScheduledLoop(manifest, layout, model, source_for(manifest, config, peer), torch.device("cpu"), trained)
    inner.lab = lab
    return inner


def mean_loss(model: torch.nn.Module, manifest: Manifest, max_windows: int = 0) -> float:
    """Mean over the domains of nats per byte on their held-out text."""
    return statistics.fmean(domain_losses(model, manifest, max_windows).values())


def domain_losses(model: torch.nn.Module, manifest: Manifest, max_windows: int = 0) -> dict[str, float]:
    return {
        name: evaluate(model, embedded_domain(name, manifest.data).held_out, manifest.data.seq_len, max_windows=max_windows or None)
        for name in manifest.data.domains
    }


# ---------------------------------------------------------------- one seed, all arms


def run_seed(manifest: Manifest, lab: Lab, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The losses of every wanted arm for one seed; a run that diverged has the loss None."""
    manifest = manifest.model_copy(update={"seed": seed})
    result: dict[str, Any] = {"seed": seed}
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "swarm": lambda: _swarm_arm(manifest, lab, say),
        "solo": lambda: {"loss_solo": mean_loss(run_alone(manifest, lab, "solo", None, say), manifest, lab.eval_windows)},
        "solo_own": lambda: _own_arm(manifest, lab, say),
        "ddp_like": lambda: _ddp_arm(manifest, lab, say),
    }
    for arm in lab.arms.split(","):
        start_s = time.process_time()
        try:
            if arm not in arms:
                raise ConfigError(f"lab.arms: expected some of {', '.join(ARMS)}, got {arm!r}")
            result |= arms[arm]()
        except TrainingError as error:
            result |= {f"loss_{arm if arm != 'swarm' else 'end'}": None, f"{arm}_failed": str(error)}
        result[f"{arm}_cpu_s"] = round(time.process_time() - start_s, 1)
        say(f"seed {seed}: " + json.dumps(_rounded(result)))
    return result


def _swarm_arm(manifest: Manifest, lab: Lab, say: Callable[[str], None]) -> dict[str, Any]:
    model, swarm = run_swarm(manifest, lab, say)
    losses = domain_losses(model, manifest, lab.eval_windows)
    tokens: dict[int, int] = {}
    for peer in swarm.peers:
        for expert, count in peer.inner.totals(0.0).expert_tokens.items():
            tokens[expert] = tokens.get(expert, 0) + count
    return {
        "loss_end": statistics.fmean(losses.values()),
        "loss_end_by_domain": losses,
        "num_rounds": swarm.num_rounds,
        "packet_bytes": swarm.packet_bytes,
        "expert_tokens": [tokens.get(e, 0) for e in range(manifest.model.num_experts)],
    }


def _own_arm(manifest: Manifest, lab: Lab, say: Callable[[str], None]) -> dict[str, Any]:
    losses = {}
    for index in range(lab.peers):
        domain = manifest.data.domains[index % len(manifest.data.domains)]
        losses[f"{index}:{domain}"] = mean_loss(run_alone(manifest, lab, f"peer-{index}", domain, say), manifest, lab.eval_windows)
        say(f"solo_own {domain}: {losses[f'{index}:{domain}']:.3f}")
    return {"loss_solo_own": statistics.fmean(losses.values()), "loss_solo_own_by_peer": losses}


def _ddp_arm(manifest: Manifest, lab: Lab, say: Callable[[str], None]) -> dict[str, Any]:
    train = manifest.train.model_copy(update={"batch_size": manifest.train.batch_size * lab.peers})
    big = manifest.model_copy(update={"train": train})
    return {"loss_ddp_like": mean_loss(run_alone(big, lab, "ddp", None, say), manifest, lab.eval_windows)}


# ---------------------------------------------------------------- command line


def parse_settings(pairs: Sequence[str]) -> tuple[Manifest, Lab]:
    """``key=value`` pairs: dotted manifest keys and ``lab.`` names. Raises ConfigError."""
    raw: dict[str, Any] = {"name": "learning"}
    lab = Lab()
    known = {f.name: type(getattr(lab, f.name)) for f in fields(Lab)}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--settings: expected key=value, got {pair!r}")
        section, _, name = key.rpartition(".")
        if section == "lab":
            if name not in known:
                raise ConfigError(f"--settings: unknown key '{key}'; known: {', '.join(f'lab.{n}' for n in known)}")
            lab = replace(lab, **{name: known[name](text)})
            continue
        at = raw
        for part in section.split(".") if section else []:
            at = at.setdefault(part, {})
        at[name] = _value(text)
    return parse_config(Manifest, raw, "--settings"), lab


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="losses of a swarm and of peers alone, in one process")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", file=sys.stdout if args.json else sys.stderr, flush=True)

    try:
        manifest, lab = parse_settings(args.settings)
        runs = [run_seed(manifest, lab, int(seed), say) for seed in args.seeds.split(",")]
    except (DecentraError, ValueError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, DecentraError) else 2
    summary: dict[str, Any] = {"settings": args.settings, "runs": runs}
    for key in ("loss_end", "loss_solo", "loss_solo_own", "loss_ddp_like"):
        values = [run[key] for run in runs if run.get(key) is not None]
        if values:
            summary[f"median_{key}"] = statistics.median(values)
    print(json.dumps(_rounded(summary)) if args.json else json.dumps(_rounded(summary), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
