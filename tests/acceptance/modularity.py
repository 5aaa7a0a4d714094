"""Modularity, relation by relation, on models trained here: each row is a claim that a stub cannot pass.

    python -m tests.acceptance.modularity --json [--seeds 1,2,3] [--only TOPIC,...] [--steps 200]

Models are byte-level, two layers of 96, and text is what every installation has. Values are means over the seeds; a threshold is half the effect that was
measured while this was built, or stricter. A row holds when its relation does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from decentra.config import DataSpec, Manifest, ModelSpec, PlacementSpec, RoundSpec, TrainSpec
from decentra.data.domains import embedded_domain
from decentra.data.windows import WindowSource
from decentra.model.decoder import Decoder, build_model
from decentra.modular import combine, lasting, route, soup, upcycle
from decentra.modular.combine import Recipe
from decentra.modular.parts import State, extract, insert, select, spec_with
from decentra.workshop import experts as made
from decentra.workshop.looking import calibration_of, card_of, losses, mean, routing_of
from decentra.workshop.training import Plan, model_of, squared_gradients, train
from tests.bench.lab import Lab, build_swarm, run_steps

SEQ_LEN = 128
DOMAINS = ("prose", "code", "headers", "math")
DATA = DataSpec(seq_len=SEQ_LEN, bytes_per_domain=300_000, held_out_bytes=16_384)
DENSE = ModelSpec(
    hidden_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24, expert_hidden_size=256, num_experts=1, num_experts_per_token=1,
    max_seq_len=SEQ_LEN, aux_loss_weight=0.01, z_loss_weight=0.001,
)  # fmt: skip
NUM_WINDOWS = 96


@dataclass(frozen=True)
class Row:
    topic: str
    relation: str
    value: float
    threshold: float
    holds: bool
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]


def state_of(model: Decoder) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass
class Story:
    """What several topics need, made once per seed: texts, a dense base, experts trained beside it."""

    seed: int
    steps: int
    say: Callable[[str], None]
    num_windows: int = NUM_WINDOWS  # of held-out text per domain
    train_text: dict[str, bytes] = field(init=False)
    held_out: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.train_text = {d: embedded_domain(d, DATA).train for d in DOMAINS}
        self.held_out = {d: embedded_domain(d, DATA).held_out for d in DOMAINS}

    def loss(self, state: State, spec: ModelSpec, domains: Sequence[str] = DOMAINS) -> dict[str, float]:
        return losses(model_of(state, spec), {d: self.held_out[d] for d in domains}, SEQ_LEN, self.num_windows)

    def fit(self, model: Decoder, domains: Sequence[str], steps: int, key: str, **plan: Any) -> State:
        source = WindowSource([self.train_text[d] for d in domains], SEQ_LEN, self.seed, key)
        every = frozenset(n for n, _ in model.named_parameters())
        train(model, source, Plan(steps, plan.pop("names", every), lr=plan.pop("lr", 2e-3), seed=self.seed, **plan))
        return state_of(model)

    @cached_property
    def base(self) -> State:
        """A dense model of prose."""
        self.say("base: dense, prose")
        return self.fit(build_model(DENSE, self.seed), ["prose"], 2 * self.steps, "base")

    @cached_property
    def all_dense(self) -> State:
        """A dense model of everything."""
        self.say("base: dense, all domains")
        return self.fit(build_model(DENSE, self.seed), DOMAINS, 2 * self.steps, "all")

    @cached_property
    def experts(self) -> list[made.Expert]:
        """One for each domain but the public one, each trained where its text is; the public model's own FFN is the first."""
        found = [
            made.Expert(extract(self.base, 0), card_of(model_of(self.base, DENSE), self.train_text["prose"], SEQ_LEN), {"name": "prose"})
        ]
        for domain in DOMAINS[1:]:
            self.say(f"expert: {domain}")
            found.append(
                made.train_expert(
                    self.base, DENSE, self.train_text[domain], name=domain, steps=2 * self.steps, seq_len=SEQ_LEN, lr=2e-3, seed=self.seed
                )
            )
        return found

    @cached_property
    def merged(self) -> tuple[State, ModelSpec]:
        state, spec = self.base, DENSE
        for expert in self.experts[1:]:
            state, spec = made.added(state, spec, expert)
        return state, spec

    def routed(self, kind: str | None, num_chosen: int, routing: Any = None) -> dict[str, float]:
        """Losses of the merged model under a routing."""
        state, spec = self.merged
        model = model_of(state, spec_with(spec, spec.num_experts, num_chosen))
        model.routing = routing if routing is not None else made.routing(kind or "own", [e.card for e in self.experts], state, self.base)
        return losses(model, self.held_out, SEQ_LEN, self.num_windows)

    @cached_property
    def oracle(self) -> dict[str, float]:
        """Each domain by its own expert."""
        state, spec = self.merged
        return {
            domain: losses(
                model_of(select(state, [number]), spec_with(spec, 1)), {domain: self.held_out[domain]}, SEQ_LEN, self.num_windows
            )[domain]
            for number, domain in enumerate(DOMAINS)
        }


Found = list[tuple[str, str, float, float, bool]]  # topic, relation, value, threshold, larger is better


def exactness(story: Story) -> Found:
    """Upcycling and MoE-fication change nothing at the start."""
    model = model_of(story.all_dense, DENSE)
    tokens = WindowSource([story.train_text["code"]], SEQ_LEN, 0, "exact").next_batch(4)[:, :-1]

    def gap(made_of: upcycle.Upcycled) -> float:
        with torch.inference_mode():
            return float((model(tokens).logits_BTV - model_of(made_of.state, made_of.spec)(tokens).logits_BTV).abs().max())

    calibration = calibration_of(model, story.train_text["code"], SEQ_LEN)
    up = upcycle.upcycle(story.all_dense, DENSE, 4)
    return [
        ("upcycle", "copy: largest logit difference at the start", gap(up), 1e-5, False),
        ("upcycle", "virtual groups: the same", gap(upcycle.virtual_groups(story.all_dense, DENSE, 8, 2)), 1e-5, False),
        ("upcycle", "moefy with k = E: the same", gap(upcycle.moefy(story.all_dense, DENSE, 8, 8, calibration)), 1e-5, False),
        ("upcycle", "expand, all copies chosen: the same against the smaller MoE", _expand_gap(up, tokens), 1e-5, False),
    ]


def _expand_gap(up: upcycle.Upcycled, tokens: Tensor) -> float:
    wider = upcycle.expand(up.state, up.spec, 2)
    with torch.inference_mode():
        return float((model_of(up.state, up.spec)(tokens).logits_BTV - model_of(wider.state, wider.spec)(tokens).logits_BTV).abs().max())


def upcycling(story: Story) -> Found:
    """An upcycled model learns more from the same tokens than the dense one that goes on, and than a dense one of the same cost."""
    up = upcycle.upcycle(story.all_dense, DENSE, 4, seed=story.seed)
    dense = mean(story.loss(story.fit(model_of(story.all_dense, DENSE), DOMAINS, story.steps, "go on"), DENSE))
    moe = mean(story.loss(story.fit(model_of(up.state, up.spec), DOMAINS, story.steps, "go on"), up.spec))
    # both chosen: a dense FFN of twice the width and the same FLOPs; noise, so that its halves part as a wide FFN's would
    wide = upcycle.upcycle(story.all_dense, DENSE, 2, noise=0.02, seed=story.seed)
    iso = mean(story.loss(story.fit(model_of(wide.state, wide.spec), DOMAINS, story.steps, "go on"), wide.spec))
    return [
        ("upcycle", f"upcycled over dense after {story.steps} equal steps: loss ratio", moe / dense, 0.995, False),
        ("upcycle", "upcycled over iso-FLOP dense: loss ratio", moe / iso, 1.0, False),
    ]


def moefication(story: Story) -> Found:
    """Which neurons form an expert matters: those that fire together, better than any."""
    model = model_of(story.all_dense, DENSE)
    text = b"".join(t[:60_000] for t in story.train_text.values())
    calibration = calibration_of(model, text, SEQ_LEN, 64)
    found = {}
    for cluster in ("coact", "random"):
        split = upcycle.moefy(story.all_dense, DENSE, 8, 4, calibration, cluster=cluster, seed=story.seed)
        found[cluster] = mean(story.loss(split.state, split.spec))
    return [
        (
            "upcycle",
            "moefy, half of the neurons: co-activation over random split, loss ratio",
            found["coact"] / found["random"],
            0.99,
            False,
        )
    ]


def soups(story: Story) -> Found:
    """A greedy soup is no worse than its best ingredient, on text that it was not chosen by."""
    ingredients = [
        story.fit(model_of(story.all_dense, DENSE), DOMAINS, story.steps, f"soup {number}", lr=lr)
        for number, lr in enumerate((1e-3, 2e-3, 3e-3))
    ]
    half = {d: t[: len(t) // 2] for d, t in story.held_out.items()}
    other = {d: t[len(t) // 2 :] for d, t in story.held_out.items()}

    def judge(text: dict[str, bytes]) -> Callable[[State], float]:
        return lambda state: mean(losses(model_of(state, DENSE), text, SEQ_LEN, story.num_windows // 2))

    chosen = soup.greedy_soup(ingredients, judge(half))
    best = min(judge(other)(s) for s in ingredients)
    return [
        ("merge", "greedy soup over its best ingredient, separate text: loss ratio", judge(other)(chosen.state) / best, 1.002, False),
        ("merge", "ingredients of the soup", float(len(chosen.ingredients)), 2.0, True),
    ]


def specialists(story: Story) -> Found:
    """Two models of a common base, each of a domain of its own: what their text says of them merges them better than their mean."""
    pair = DOMAINS[1:3]
    made_of = [story.fit(model_of(story.all_dense, DENSE), [d], story.steps, f"specialist {d}") for d in pair]
    shapes = {name: tuple(value.shape) for name, value in made_of[0].items()}
    models = [model_of(state, DENSE) for state in made_of]
    texts = [story.train_text[d] for d in pair]

    def of(method: str, seen: Sequence[combine.Statistics]) -> float:
        state = dict(combine.merged(shapes, [s.__getitem__ for s in made_of], None, Recipe(method), seen))
        return mean(story.loss(state, DENSE, pair))

    linear = of("linear", [])
    diagonals = [
        squared_gradients(model, WindowSource([text], SEQ_LEN, 0, "fisher"), 64).get for model, text in zip(models, texts, strict=True)
    ]
    return [
        ("merge", "fisher over the mean, two specialists: loss ratio", of("fisher", diagonals) / linear, 1.0, False),
    ]


def routing(story: Story) -> Found:
    """Experts trained apart, routed by what their owners gave away."""
    num_experts = len(story.experts)
    uniform, oracle = mean(story.routed("uniform", num_experts)), mean(story.oracle)

    def closed(loss: float) -> float:
        return (uniform - loss) / (uniform - oracle)

    prefix = closed(mean(story.routed("prefix", 2)))
    linear = {kind: closed(mean(story.routed(kind, 2))) for kind in ("centroid", "lda")}
    state, spec = story.merged
    spec = spec_with(spec, num_experts, 2)
    texts = list(story.train_text.values())
    model = model_of(state, spec)
    model.routing = made.evidence_of(model)
    evidence = closed(mean(losses(model, story.held_out, SEQ_LEN, story.num_windows)))
    every = spec_with(spec, num_experts, num_experts)  # all of them, weighted: what a linear router does best
    tuned = made.tune_router(
        state, every, texts, steps=100, seq_len=SEQ_LEN, rows=route.lda_rows([e.card for e in story.experts]), seed=story.seed
    )
    linear["tuned"] = closed(mean(losses(model_of(tuned, every), story.held_out, SEQ_LEN, story.num_windows)))
    averaged = mean(story.loss(_average(story), DENSE))
    story.say(
        f"uniform {uniform:.3f}, oracle {oracle:.3f}, evidence {evidence:.2f}, prefix {prefix:.2f}, linear {linear}, average of weights {averaged:.3f}"
    )
    return [
        ("route", "evidence router, no training: share of the gap between uniform and oracle closed", evidence, 0.5, True),
        ("route", "best exportable linear router: the same", max(linear.values()), 0.2, True),
        ("route", "experts side by side over the mean of their weights: loss ratio", uniform / averaged, 0.99, False),
    ]


def _with_routing(state: State, spec: ModelSpec, routing: Any) -> Decoder:
    model = model_of(state, spec)
    model.routing = routing
    return model


def _by_evidence(story: Story, state: State, spec: ModelSpec, domains: Sequence[str] = DOMAINS) -> dict[str, float]:
    model = model_of(state, spec)
    model.routing = made.evidence_of(model)
    return losses(model, {d: story.held_out[d] for d in domains}, SEQ_LEN, story.num_windows)


def _average(story: Story) -> State:
    state, spec = story.merged
    return soup.mean_of([select(state, [e]) for e in range(spec.num_experts)])


def forgetting(story: Story) -> Found:
    """Taking an isolated expert out leaves the model that never had it, to the bit, and the memory of its text goes with it."""
    state, spec = story.merged
    gone = DOMAINS.index("headers")
    left = [e for e in range(spec.num_experts) if e != gone]
    without, never, never_spec = select(state, left), story.base, DENSE
    for number, expert in enumerate(story.experts[1:], 1):
        if number != gone:
            never, never_spec = made.added(never, never_spec, expert)
    is_equal = without.keys() == never.keys() and all(without[n].equal(never[n]) for n in never)
    is_equal = is_equal and spec_with(spec, len(left)) == never_spec
    before = _by_evidence(story, state, spec_with(spec, spec.num_experts, 2))
    after = _by_evidence(story, without, spec_with(never_spec, len(left), 2))
    others = max(after[d] / before[d] for d in DOMAINS if d != "headers")
    back = insert(without, story.experts[gone].part)
    order = [*range(gone), len(left), *range(gone, len(left))]
    is_back = all(select(back, order)[n].equal(state[n]) for n in state)
    return [
        ("forget", "expert taken out: bitwise the model that never had it (1: yes)", float(is_equal), 1.0, True),
        ("forget", "put back: bitwise as before (1: yes)", float(is_back), 1.0, True),
        ("forget", "loss of its domain afterwards: ratio", after["headers"] / before["headers"], 1.2, True),
        ("forget", "worst loss of the others: ratio", others, 1.01, False),
    ]


def canaries(story: Story) -> Found:
    """Random strings that an expert learned can be told from strings it did not see; once it is out of a model of several, they cannot."""
    generator = torch.Generator().manual_seed(1000 + story.seed)
    strings = [bytes(torch.randint(97, 123, (64,), generator=generator).tolist()) for _ in range(240)]
    members, count = strings[:40], 40
    text = b"\n".join([story.train_text["math"][:20_000], *members * 12])
    secret = made.train_expert(story.base, DENSE, text, name="canary", steps=2 * story.steps, seq_len=SEQ_LEN, lr=3e-3, seed=story.seed)
    state, spec = made.added(story.base, DENSE, story.experts[1])
    state, spec = made.added(state, spec, secret)
    left = select(state, [0, 1])

    def trace(state: State, num_experts: int) -> float:
        model = _with_routing(state, spec_with(spec, num_experts, 2), None)
        model.routing = made.evidence_of(model)
        told = [losses(model, {"c": s}, len(s) - 1)["c"] for s in strings]
        return lasting.auc(told[:count], told[count:])

    return [
        ("forget", "canaries: AUC with the expert, 40 members against 200 others", trace(state, 3), 0.95, True),
        ("forget", "canaries: distance of the AUC from chance once it is out", abs(trace(left, 2) - 0.5), 0.1, False),
    ]


def slices(story: Story) -> Found:
    """A part of an owner's text out of its expert: back to the expert before that slice and on without it, which is the expert that never saw it."""
    text, steps = story.train_text["math"], story.steps // 4
    parts = [text[i * 20_000 : (i + 1) * 20_000] for i in range(4)]
    common: dict[str, Any] = {"name": "sliced", "steps": steps, "seq_len": SEQ_LEN, "seed": story.seed}
    whole = made.train_sliced(story.base, DENSE, parts, **common)
    found = made.unlearned(whole, 2, story.base, DENSE, parts, **common)
    never = made.train_sliced(story.base, DENSE, [parts[n] for n in (0, 1, 3)], numbers=(0, 1, 3), **common)
    same = all(found.expert.part.weights[k].equal(v) for k, v in never.expert.part.weights.items())
    return [
        ("forget", "a slice out of an expert: bitwise the expert that never saw it (1: yes)", float(same), 1.0, True),
        ("forget", "steps that took, as a share of training without it from the start", found.num_steps / never.num_steps, 0.6, False),
    ]


def continual(story: Story) -> Found:
    """One domain after another: growing an expert for each keeps the old ones; training the whole model does not."""
    stream = ("code", "headers", "math")
    naive_matrix = [list(story.loss(story.base, DENSE, stream).values())]
    model = model_of(story.base, DENSE)
    for domain in stream:
        state = story.fit(model, [domain], story.steps, f"naive {domain}")
        naive_matrix.append(list(story.loss(state, DENSE, stream).values()))
    grow_matrix = [naive_matrix[0]]
    state, spec = story.base, DENSE
    for domain in stream:
        expert = made.train_expert(
            story.base, DENSE, story.train_text[domain], name=domain, steps=story.steps, seq_len=SEQ_LEN, lr=2e-3, seed=story.seed
        )
        state, spec = made.added(state, spec, expert)
        grow_matrix.append(list(_by_evidence(story, state, spec_with(spec, spec.num_experts, 2), stream).values()))
    grow, naive = lasting.transfer(grow_matrix), lasting.transfer(naive_matrix)
    story.say(f"continual: grow {grow}, naive {naive}")
    return [
        ("continual", "grow: backward transfer", grow.backward, -0.01, True),
        ("continual", "naive: backward transfer (it forgets)", naive.backward, -0.2, False),
        ("continual", "loss at the end, grow over naive: ratio", grow.final / naive.final, 0.95, False),
    ]


def together(story: Story) -> Found:
    """A model that a swarm trained and an expert that somebody trained alone, in one."""
    moe = upcycle.upcycle(story.base, DENSE, 2, seed=story.seed)
    manifest = Manifest(
        name="swarm", seed=story.seed, model=moe.spec, data=DATA, train=TrainSpec(lr=2e-3), rounds=RoundSpec(inner_steps=10),
        placement=PlacementSpec(experts_per_peer=2),
    )  # fmt: skip
    swarm = build_swarm(manifest, Lab(steps=story.steps, peers=2), ("prose", "code"), moe.state)
    trained, _ = run_steps(swarm, Lab(steps=story.steps, peers=2, report_every=0), lambda _: None)
    state = state_of(trained)
    private = made.train_expert(
        state, moe.spec, story.train_text["headers"], name="private", steps=story.steps, seq_len=SEQ_LEN, lr=2e-3, seed=story.seed
    )
    both, spec = made.added(state, moe.spec, private)
    domains = ("code", "headers")
    merged = mean(_by_evidence(story, both, spec_with(spec, 3, 2), domains))
    alone = {
        "the swarm's": mean(losses(model_of(state, moe.spec), {d: story.held_out[d] for d in domains}, SEQ_LEN, story.num_windows)),
        "the private one": mean(
            losses(model_of(select(both, [2]), spec_with(spec, 1)), {d: story.held_out[d] for d in domains}, SEQ_LEN, story.num_windows)
        ),
    }
    story.say(f"together {merged:.3f}, alone {alone}")
    return [
        (
            "compose",
            "a swarm's model and a private expert in one, over the better of the two alone: loss ratio",
            merged / min(alone.values()),
            0.99,
            False,
        )
    ]


def mixture(story: Story) -> Found:
    """More experts for the same cost per token learn more; balance keeps them all at work."""
    half = ModelSpec(**DENSE.model_dump() | {"num_experts": 8, "num_experts_per_token": 2, "expert_hidden_size": 128})
    moe = mean(story.loss(story.fit(build_model(half, story.seed), DOMAINS, 2 * story.steps, "all"), half))
    dense = mean(story.loss(story.all_dense, DENSE))
    found = {}
    for name, changes in {"none": {"aux_loss_weight": 0.0}, "loss-free": {"aux_loss_weight": 0.0, "bias_rate": 0.01}}.items():
        model = build_model(ModelSpec(**half.model_dump() | changes), story.seed)
        story.fit(model, DOMAINS, 2 * story.steps, "all")
        load = routing_of(model.eval(), story.held_out, SEQ_LEN)["max_violation"]
        found[name] = (load, mean(losses(model, story.held_out, SEQ_LEN, story.num_windows)))
    return [
        ("moe", "8 experts, 2 of half the width chosen, over dense at equal steps: loss ratio", moe / dense, 1.0, False),
        ("moe", "MaxVio of loss-free balancing over none: ratio", found["loss-free"][0] / found["none"][0], 0.5, False),
        ("moe", "loss of loss-free balancing over the balancing loss: ratio", found["loss-free"][1] / moe, 1.01, False),
    ]


TOPICS: dict[str, Callable[[Story], Found]] = {
    "exactness": exactness, "upcycling": upcycling, "moefication": moefication, "soups": soups, "specialists": specialists, "routing": routing,
    "forgetting": forgetting, "canaries": canaries, "slices": slices, "continual": continual, "together": together, "mixture": mixture,
}  # fmt: skip


Values = list[tuple[tuple[str, str, float, bool], float]]


def run_seed(seed: int, topics: Sequence[str], steps: int, num_windows: int = NUM_WINDOWS) -> Values:
    """All relations of one seed, told on stderr as they come."""
    torch.set_num_threads(1)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[seed {seed}, {time.monotonic() - began:5.1f} s] {line}", file=sys.stderr, flush=True)

    story, found = Story(seed, steps, say, num_windows), []
    for topic in topics:
        cpu_s = time.process_time()
        for kind, relation, value, threshold, larger in TOPICS[topic](story):
            found.append(((kind, relation, threshold, larger), value))
            say(f"{kind}: {relation}: {value:.4g} ({'at least' if larger else 'at most'} {threshold:g})")
        say(f"{topic}: {time.process_time() - cpu_s:.0f} CPU-s")
    return found


def run(seeds: Sequence[int], topics: Sequence[str], steps: int, jobs: int, num_windows: int = NUM_WINDOWS) -> list[Row]:
    """Seeds side by side in ``jobs`` processes; a row's value is their mean."""
    found: dict[tuple[str, str, float, bool], list[float]] = {}
    if jobs == 1:
        per_seed = [run_seed(seed, topics, steps, num_windows) for seed in seeds]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            per_seed = list(pool.map(run_seed, seeds, [topics] * len(seeds), [steps] * len(seeds)))
    for values in per_seed:
        for key, value in values:
            found.setdefault(key, []).append(value)
    rows = []
    for (kind, relation, threshold, larger), values_of in found.items():
        value = statistics.fmean(values_of)
        rows.append(
            Row(kind, relation, value, threshold, value >= threshold if larger else value <= threshold, tuple(seeds), tuple(values_of))
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--only", default=",".join(TOPICS), help="topics, separated by commas")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at one time, a core each")
    args = parser.parse_args(argv)
    rows = run([int(seed) for seed in args.seeds.split(",")], args.only.split(","), args.steps, args.jobs)
    for row in rows:
        print(f"{'holds ' if row.holds else 'FAILS '} {row.topic:10} {row.relation}: {row.value:.4g} ({row.threshold:g})", file=sys.stderr)
    if args.json:
        print(json.dumps({"ok": all(r.holds for r in rows), "steps": args.steps, "rows": [vars(r) for r in rows]}))
    return 0 if all(r.holds for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
