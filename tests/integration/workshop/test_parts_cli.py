"""The model builders' commands on a small byte model, one after the other as a user would; and what they say to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_world import decentra

from decentra.config import DataSpec, Manifest, ModelSpec
from decentra.data.domains import embedded_domain
from decentra.data.windows import WindowSource
from decentra.hf.checkpoint import open_checkpoint, save_checkpoint
from decentra.model.decoder import build_model
from decentra.workshop import making
from decentra.workshop.training import Plan, train
from tests.unit.tokenizer import saved

DATA = DataSpec(seq_len=64, bytes_per_domain=60_000, held_out_bytes=8192)
DENSE = ModelSpec(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, expert_hidden_size=64, num_experts=1, num_experts_per_token=1, max_seq_len=128
)  # fmt: skip


def ran(*args: str) -> dict[str, object]:
    said = decentra(*args, "--json")
    assert said.code == 0, said.err
    return said.json


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has read some prose."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base") / "base"
    model = build_model(DENSE, 1)
    train(
        model,
        WindowSource([embedded_domain("prose", DATA).train], 64, 0, "base"),
        Plan(60, frozenset(n for n, _ in model.named_parameters()), lr=4e-3),
    )
    save_checkpoint(folder, Manifest(name="base", model=DENSE, data=DATA), model.state_dict().items(), {"made_by": "a test"})
    return folder


def test_from_a_dense_model_to_experts_and_back(base: Path, tmp_path: Path) -> None:
    moe, split, big, kept, hf = (str(tmp_path / name) for name in ("moe", "split", "big", "kept", "hf"))
    assert ran("verify", str(base))["ok"]
    up = ran("upcycle", str(base), moe, "--experts", "4", "--top-k", "2")
    assert (up["before"], up["after"], up["is_exact"]) == ("dense", "4 experts, 2 per token", True)
    assert float(str(up["start_logit_gap"])) < 1e-5
    for method in ("noise:0.05", "drop:0.5", "virtual-group:2"):
        assert ran("upcycle", str(base), str(tmp_path / method.partition(":")[0]), "--experts", "4", "--method", method)["ok"]
    assert ran("upcycle", str(base), str(tmp_path / "btx"), "--method", "btx", "--with", str(base))["after"] == "2 experts, 2 per token"
    assert float(str(ran("moefy", str(base), split, "--active", "8", "--text", "code")["start_logit_gap"])) < 1e-5
    assert ran("moefy", str(base), str(tmp_path / "half"), "--active", "4", "--text", "code")["is_exact"] is False
    assert ran("expand", moe, big, "--factor", "2")["after"] == "8 experts, 4 per token"
    assert ran("expert", "keep", big, kept, "--experts", "0,5")["kept"] == [0, 5]
    assert ran("export", kept, hf, "--dtype", "bf16")["kind"] == "2 experts, 2 per token"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_experts"] == 2
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "2 experts of width 64" in card
    assert "expert keep" in card, "where it comes from is on the model card"
    assert ran("import", hf, str(tmp_path / "again"))["kind"] == "2 experts, 2 per token"
    shown = decentra("inspect", moe, "--text", "code", "--text", "prose")
    assert shown.code == 0, shown.err
    assert "max violation" in shown.out
    ran("inspect", moe, "--text", "code", "--text", "prose", "--plot", str(tmp_path / "heat.png"))
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_other_words_do_not_merge(tmp_path: Path) -> None:
    spec = DENSE.model_copy(update={"vocab_size": 384})
    for name, num_tokens in (("one", 320), ("other", 330)):
        folder = tmp_path / name
        save_checkpoint(folder, Manifest(name=name, model=spec, data=DATA), build_model(spec, 1).state_dict().items(), {})
        saved(folder / "tokenizer.json", num_tokens)
        (folder / "decentra.json").unlink()  # a stranger's model, whose tokenizer is the file beside it
    folders = [str(tmp_path / name) for name in ("out", "one", "other")]
    for command in (("merge", *folders), ("soup", *folders, "--text", "code")):
        said = decentra(*command)
        assert said.code == 2, said.err
        assert "equal numbers would be other words" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["copy", "noise:0.05", "drop:0.5", "btx"])
def test_a_model_larger_than_memory_is_made_a_layer_at_a_time(base: Path, tmp_path: Path, method: str) -> None:
    """The same weights with and without room for both models; only the comparison at the end is left out, and said."""
    found = [
        making.upcycled(
            base, tmp_path / str(free), experts=2, top_k=2, method=method, others=[base] * (method == "btx"), seed=3, free_bytes=free
        )
        for free in (0, 1 << 40)
    ]
    assert "were not compared" in str(found[0]["why_no_gap"])
    assert (found[1]["why_no_gap"], found[0]["start_logit_gap"]) == (None, None)
    with open_checkpoint(tmp_path / "0") as one, open_checkpoint(tmp_path / str(1 << 40)) as other:
        assert one.hashes == other.hashes
        layers = [one(f"model.layers.{n}.mlp.gate.weight") for n in range(2)]
    assert not layers[0].equal(layers[1]), "each layer has draws of its own"


def test_an_expert_comes_and_goes_without_a_trace(base: Path, tmp_path: Path) -> None:
    mine, plus, without, tuned = (str(tmp_path / name) for name in ("mine", "plus", "without", "tuned"))
    notes = tmp_path / "notes.txt"
    notes.write_bytes(embedded_domain("headers", DATA).train[:50_000])
    trained = ran(
        "expert", "train", str(base), mine, "--text", f"notes={notes}", "--name", "alice", "--steps", "40", "--lr", "4e-3", "--gate", "30"
    )
    assert float(str(trained["loss_after"])) < float(str(trained["loss_before"]))
    assert ran("expert", "add", str(base), plus, "--expert", mine)["kind"] == "2 experts, 2 per token"
    assert "alice" in decentra("expert", "list", plus).out
    page = tmp_path / "page.html"
    card = str(tmp_path / "card")
    assert ran("expert", "card", str(base), card, "--text", "prose")["name"] == "public"
    assert (
        "none of the experts has a gate" in decentra("route", plus, "int", "--router", "phatgoose", "--expert", card, "--expert", card).err
    )
    for router in ("own", "evidence", "prefix", "phatgoose"):
        more = ("--html", str(page)) if router == "evidence" else ()
        cards = ("--expert", card, "--expert", mine) if router in ("prefix", "phatgoose") else ()
        told = ran("route", plus, "int main(void) { return 0; }", "--router", router, *more, *cards)
        assert sum(map(float, told["share_per_expert"])) == pytest.approx(1.0, abs=1e-3)  # type: ignore[call-overload]
    assert "<span" in page.read_text()
    assert ran("tune", plus, tuned, "--text", "prose", "--text", "headers", "--steps", "10")["ok"]
    gone = ran("forget", plus, without, "--owner", "alice", "--text", f"notes={notes}", "--text", "prose")
    assert (gone["mode"], gone["forgotten"]) == ("isolated", [1])
    assert gone["loss_after"]["notes"] > gone["loss_before"]["notes"], "nothing of it is left"  # type: ignore[call-overload, index]
    with open_checkpoint(base) as before, open_checkpoint(Path(without)) as after:
        assert before.hashes == after.hashes, "the very bytes of the model that never had it"
    for source, expert, words in ((plus, ("--experts", "0"), "not put in with"), (tuned, ("--owner", "alice"), "was trained since")):
        joint = ran("forget", source, f"{source}-joint", *expert)
        assert joint["mode"] == "joint", "it cannot be proven, so it is not said"
        assert words in str(joint["why"])
    second, both, kept = (str(tmp_path / name) for name in ("second", "both", "kept"))
    ran("expert", "train", plus, second, "--text", "math", "--name", "bob", "--steps", "5")
    ran("expert", "add", plus, both, "--expert", second)
    told = ran("forget", both, kept, "--owner", "alice")
    assert told["mode"] == "joint", "bob's was trained beside a model that had alice's"
    assert "beside another model" in str(told["why"])
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    seen.write_text("the same line of text\nanother line of text\n")
    unseen.write_text("zq#kx!w vvv qqq\nxx ## zz ww\n")
    assert float(str(ran("audit", str(base), "--members", str(seen), "--others", str(unseen))["auc"])) == 1.0


def test_merging_and_lasting(base: Path, tmp_path: Path) -> None:
    models = []
    for number, lr in enumerate(("1e-3", "3e-3")):
        models.append(str(tmp_path / f"m{number}"))
        assert ran(
            "continual", str(base), models[-1], "--text", "code", "--strategy", "naive", "--steps", "15", "--lr", lr, "--seed", str(number)
        )["ok"]
    assert ran("merge", str(tmp_path / "mean"), *models)["num_models"] == 2
    assert ran("merge", str(tmp_path / "ties"), *models, "--method", "ties", "--base", str(base), "--density", "0.5", "--rebasin")["ok"]
    (tmp_path / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: b\nmodels:\n- model: m0\n- model: m1\n  parameters: {weight: 0.5}\n"
    )
    (tmp_path / "b").symlink_to(base)
    assert ran("merge", str(tmp_path / "yaml"), "--yaml", str(tmp_path / "recipe.yml"))["method"] == "task_arithmetic"
    for method, texts in (("fisher", ("code",)), ("regmean", ("code", "headers"))):
        named = [part for text in texts for part in ("--text", text)]
        assert ran("merge", str(tmp_path / method), *models, "--method", method, *named)["method"] == method
        assert float(str(ran("inspect", str(tmp_path / method), "--text", "code")["loss_per_domain"]["code"])) < 6  # type: ignore[index]
    soup = ran("soup", str(tmp_path / "soup"), *models, "--text", "code")
    assert float(str(soup["loss"])) <= min(float(t["loss"]) for t in soup["tried"] if t["model"] in soup["ingredients"][:1])  # type: ignore[attr-defined,index,operator]
    grown = ran("continual", str(base), str(tmp_path / "grown"), "--text", "code", "--text", "headers", "--steps", "10", "--lr", "3e-3")
    assert len(grown["loss_matrix"]) == 3  # type: ignore[arg-type]
    for strategy in ("replay", "lwf", "ewc"):
        told = ran(
            "continual", str(base), str(tmp_path / strategy), "--text", "code", "--text", "headers", "--steps", "3", "--strategy", strategy
        )
        assert told["strategy"] == strategy


def test_wrong_input_is_said_in_one_line(base: Path, tmp_path: Path) -> None:
    out, moe = str(tmp_path / "out"), str(tmp_path / "moe")
    ran("upcycle", str(base), moe, "--experts", "3")
    for args, words in (
        (("upcycle", moe, out), ("has 3 experts already",)),
        (("upcycle", str(tmp_path / "none"), out), ("is no folder",)),
        (("upcycle", str(base), out, "--method", "magic"), ("method", "virtual-group")),
        (("upcycle", str(base), out, "--method", "drop:x"), ("after the colon",)),
        (("upcycle", str(base), out, "--method", "btx"), ("--with",)),
        (("merge", out, str(base), moe), ("num_experts", "do not merge")),
        (("merge", out, str(base), str(base), "--method", "ties"), ("--base",)),
        (("merge", out, str(base), str(base), "--weights", "a,b"), ("0.5,0.5",)),
        (("merge", out, str(base), str(base), "--method", "fisher"), ("--text",)),
        (("merge", out, str(base), str(base), "--text", "code"), ("fisher and regmean", "linear looks at weights only")),
        (("merge", out, str(base), str(base), "--method", "regmean", *3 * ("--text", "code")), ("one for each of 2 models", "got 3")),
        (("merge", out, str(base), str(base), "--method", "regmean", "--text", "code", "--rebasin"), ("align each model first",)),
        (("merge", out), ("no model",)),
        (("merge", out, str(base)), ("is not merged with anything",)),
        (("merge", str(base), moe, moe), ("nothing is written over",)),
        (("upcycle", str(base), out, "--experts", "5000"), ("num_experts",)),
        (("forget", moe, out, "--experts", "99"), ("expert 99 is not there",)),
        (("route", moe, "text", "--router", "magic"), ("expected one of own",)),
        (("inspect", moe, "--text", "code", "--text", "code"), ("two texts are called",)),
        (("expert", "keep", moe, out, "--experts", "7"), ("expert 7 is not there",)),
        (("expert", "add", str(base), out, "--expert", moe), ("is no expert",)),
        (("expert", "train", str(base), out), ("--text",)),
        (("expert", "train", str(base), out, "--text", "nowhere"), ("no embedded domain",)),
        (("forget", moe, out), ("--owner",)),
        (("forget", moe, out, "--owner", "bob"), ("no expert of 'bob'",)),
        (("forget", moe, out, "--experts", "0,1,2"), ("leaves no model",)),
        (("route", moe, "text", "--router", "prefix"), ("a card of each",)),
        (("route", moe, "x"), ("too short",)),
        (("export", moe, out, "--dtype", "int3"), ("fp32 or bf16",)),
        (("continual", str(base), out, "--text", "code", "--strategy", "hope"), ("strategy",)),
    ):  # fmt: skip
        decentra(*args).refused(2, *words)
    mine = tmp_path / "mine"
    ran("expert", "train", str(base), str(mine), "--text", "code", "--steps", "1")
    decentra("expert", "add", moe, out, "--expert", str(mine)).refused(2, "trained beside another model")
    (mine / "expert.safetensors").write_bytes(b"short")
    decentra("expert", "add", str(base), out, "--expert", str(mine)).refused(5, "not the file that expert.json describes")
    weights = base.parent / "damaged"
    weights.mkdir()
    for file in base.iterdir():
        (weights / file.name).write_bytes(file.read_bytes()[: -1 if file.suffix == ".safetensors" else None])
    decentra("verify", str(weights)).refused(5, "changed or damaged")


def test_a_router_is_baked_and_an_adapter_becomes_an_expert(base: Path, tmp_path: Path) -> None:
    mine, plus, baked, adapted = (str(tmp_path / name) for name in ("mine", "plus", "baked", "adapted"))
    ran("expert", "train", str(base), mine, "--text", "headers", "--steps", "20", "--lr", "4e-3")
    ran("expert", "add", str(base), plus, "--expert", mine)
    told = ran("distil", plus, baked, "--text", "prose", "--text", "headers", "--steps", "5")
    assert float(str(told["kl"])) > 0
    with open_checkpoint(Path(plus)) as before, open_checkpoint(Path(baked)) as after:
        gate, other = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.1.up_proj.weight"
        assert not before(gate).equal(after(gate))
        assert before(other).equal(after(other))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    at = "base_model.model.model.layers.0.mlp.up_proj"
    import safetensors.torch

    safetensors.torch.save_file(
        {f"{at}.lora_A.weight": torch.ones(2, 32), f"{at}.lora_B.weight": torch.ones(64, 2)}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    assert ran("expert", "lora", str(base), str(adapter), adapted, "--name", "carol")["adapter"] == "adapter"
    assert ran("expert", "add", str(base), str(tmp_path / "with"), "--expert", adapted)["kind"] == "2 experts, 2 per token"
    decentra("expert", "lora", plus, str(adapter), str(tmp_path / "no")).refused(2, "an adapter is of a dense model's FFN")
