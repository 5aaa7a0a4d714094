"""peers/: every file a participant copies is loaded by the classes that read it, and the example model is made into a run and trained."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from cli_lines import in_comments, problem_of

from decentra.cli.create import create
from decentra.config import Manifest, PeerConfig, differing_keys, load_toml
from decentra.data.windows import WindowSource, source_for
from decentra.errors import DecentraError
from decentra.gossip.address import parse_multiaddr
from decentra.ids import ROUTER, TRUNK, FragmentId, PeerId, expert_module
from decentra.model.custom import layout_for, model_code_digest, model_for
from decentra.model.output import loss_of
from decentra.peer.inner import InnerLoop
from decentra.peer.runtime import check_layout

torch.set_num_threads(1)

PEERS = Path(__file__).parents[2] / "peers"
MODEL_CODE = PEERS / "bring_your_own_model.py"
CONFIGS = ("trainer-cpu.toml", "trainer-gpu.toml", "private-data.toml")
SMALL = (
    "model.hidden_size=16",
    "model.expert_hidden_size=16",
    "model.num_layers=2",
    "model.num_experts=4",
    "data.seq_len=32",
    "train.lr=1e-2",
)


def test_every_toml_is_tested() -> None:
    assert {p.name for p in PEERS.glob("*.toml")} == {"host.toml", *CONFIGS}


def test_host_toml_shows_every_key_with_its_default() -> None:
    manifest = load_toml(Manifest, PEERS / "host.toml")
    assert differing_keys(manifest, Manifest(name=manifest.name)) == ("description", "organiser", "stop.rounds")
    shown = tomllib.loads((PEERS / "host.toml").read_text())
    left_out = {"format", "genesis", "data.held_out", "data.tokenizer", "stop.tokens", "stop.date"}
    left_out |= {
        "outer.restart_every",
        "outer.final_lr",
        "outer.clip",
        "outer_experts",
        "codec.sparsest",
        "codec.merged",
        "train.decay_tokens",
        "placement.adopt_rounds",
        "judging.share",
    }
    everything = {
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in manifest.model_dump().items()
        for key in (value if isinstance(value, dict) and section != "genesis" else ["-"])
    }
    here = {f"{s}.{k}" if isinstance(v, dict) else s for s, v in shown.items() for k in (v if isinstance(v, dict) else ["-"])}
    assert here == {k for k in everything if k not in left_out and not k.startswith("genesis")}


def test_host_toml_makes_a_run(tmp_path: Path) -> None:
    _, manifest = create(tmp_path / "run", PEERS / "host.toml", ())
    assert set(manifest.data.held_out) == set(manifest.data.domains)
    num_elements = layout_for(manifest).num_elements
    assert f"{num_elements / 1e6:.2f} M parameters" in (PEERS / "host.toml").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_peer_configurations_load_and_their_addresses_are_addresses(name: str) -> None:
    config = load_toml(PeerConfig, PEERS / name)
    assert config.role == "trainer"
    for text in (*config.listen, *config.announce):
        parse_multiaddr(text)


def test_private_data_is_read_from_files_beside_common_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_toml(PeerConfig, PEERS / "private-data.toml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecentraError, match="texts"):
        source_for(Manifest(name="x"), config, PeerId("p"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Z" * 1000)
    (tmp_path / "notes.jsonl").write_text('{"text": "%s"}\n' % ("Z" * 1000))
    batch = source_for(Manifest(name="x"), config, PeerId("p")).next_batch(100)
    num_private = int((batch[:, 0] == ord("Z")).sum())
    assert 50 <= num_private <= 90, "about 70 of 100 windows are the peer's own"
    assert config.listen == (), "the file says that this machine listens nowhere"


def test_own_model_becomes_a_run_and_learns(tmp_path: Path) -> None:
    settings = [*SMALL, f'model.code="{model_code_digest(MODEL_CODE)}"']
    run, manifest = create(tmp_path / "run", None, settings, MODEL_CODE)
    layout = layout_for(manifest, MODEL_CODE)
    check_layout(manifest, layout)
    assert set(layout.modules) == {TRUNK, ROUTER, *map(expert_module, range(4))}
    assert len(run.genesis_blobs(manifest)) == len(manifest.genesis)

    build, _ = model_for(manifest, MODEL_CODE)
    model = build(manifest.model, manifest.seed)
    trained = frozenset(f.id for f in layout.fragments if f.id != FragmentId("expert.3/0"))
    source = WindowSource([b"to and fro, " * 100], manifest.data.seq_len, 0, "p")
    tokens_BT1 = source.next_batch(8)
    frozen_before = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts.3." in n}
    before = loss_of(model, manifest.model, tokens_BT1)
    inner = InnerLoop(manifest, layout, model, source, torch.device("cpu"), trained)
    for _ in range(12):
        assert inner.step() == 8 * manifest.data.seq_len
    after = loss_of(model, manifest.model, tokens_BT1)
    assert after.cross_entropy < before.cross_entropy - 0.5
    slots = manifest.model.num_layers * manifest.model.num_experts_per_token * 8 * manifest.data.seq_len
    assert int(after.tokens_per_expert_E.sum()) == slots, "every token counts once per layer and chosen expert"
    assert all(torch.equal(p, frozen_before[n]) for n, p in model.named_parameters() if n in frozen_before)
    assert inner.totals(0.0).expert_tokens.keys() == {0, 1, 2}


def test_own_model_is_causal() -> None:
    """A model that sees the next token would learn nothing else."""
    manifest = Manifest.model_validate(
        {"name": "x", "model": {"code": model_code_digest(MODEL_CODE), "hidden_size": 16, "num_layers": 2, "num_experts": 4}}
    )
    build, _ = model_for(manifest, MODEL_CODE)
    model = build(manifest.model, 3)
    tokens_BT = torch.arange(24).reshape(1, 24)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 12] = 200
    with torch.no_grad():
        one, other = model(tokens_BT).logits_BTV, model(changed_BT).logits_BTV
    torch.testing.assert_close(one[:, :12], other[:, :12])
    assert not torch.equal(one[:, 12], other[:, 12])


def test_equal_seeds_build_equal_models_and_leave_the_random_state_alone() -> None:
    manifest = Manifest.model_validate({"name": "x", "model": {"code": model_code_digest(MODEL_CODE), "num_layers": 1}})
    build, _ = model_for(manifest, MODEL_CODE)
    state = torch.get_rng_state()
    first, again, other = build(manifest.model, 1), build(manifest.model, 1), build(manifest.model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)


@pytest.mark.parametrize("path", sorted(p for p in PEERS.iterdir() if p.suffix in (".toml", ".py")), ids=lambda p: p.name)
def test_commands_in_comments_exist(path: Path) -> None:
    lines = list(in_comments(path.read_text()))
    assert lines, f"{path.name} says how it is used"
    for line in lines:
        assert problem_of(line) is None
