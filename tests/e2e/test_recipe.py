"""The whole way of a model: a dense Qwen3 checkpoint and its tokenizer -> experts -> a swarm trains it on text and on chats -> pulled -> exported -> another
library reads and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import ctrl_c, lab

from decentra.config import DataSpec, Manifest, ModelSpec
from decentra.data.tokens import tensor_of
from decentra.hf.checkpoint import open_checkpoint, save_checkpoint
from decentra.model.decoder import build_model
from tests.unit.tokenizer import saved

DENSE = ModelSpec(
    vocab_size=384, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, expert_hidden_size=32, num_experts=1,
    num_experts_per_token=1, max_seq_len=64,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_dense_to_experts_to_swarm_to_export(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    save_checkpoint(dense, Manifest(name="dense", model=DENSE, data=DataSpec(seq_len=32)), build_model(DENSE, 1).state_dict().items(), {})
    tokenizer = saved(dense / "tokenizer.json").read_bytes()
    chats = tmp_path / "chats.jsonl"
    lesson = {"messages": [{"role": "user", "content": "area of a circle?"}, {"role": "assistant", "content": "3.14 * r * r"}]}
    chats.write_text("\n".join([json.dumps(lesson)] * 200))
    with lab(tmp_path) as world:
        (dense / "decentra.json").unlink()  # as it would come from anywhere
        assert world.run("import", str(dense), str(tmp_path / "mine"), "--json")[0] == 0
        assert world.run("upcycle", str(tmp_path / "mine"), str(tmp_path / "moe"), "--experts", "4", "--json")[1]["is_exact"]
        settings = ("name=recipe", "data.bytes_per_domain=60000", "data.held_out_bytes=2048", "placement.experts_per_peer=4", "rounds.inner_steps=5",
                    "rounds.heartbeat_s=1", "rounds.lease_s=4", "rounds.gather_s=2", "stop.rounds=4", "train.batch_size=4")  # fmt: skip
        sets = [part for setting in settings for part in ("--set", setting)]
        code, _, err = world.run("init", str(tmp_path / "run"), "--model", str(tmp_path / "moe"), *sets, "--json")
        assert code == 0, err
        host = world.command(
            "host", "host", str(tmp_path / "run"), "--address", "127.0.0.1", "--listen", "127.0.0.1", "--bootstrap-port", "0", "--service-port", "0",
            "--json", "--log-json",
        ).start()  # fmt: skip
        invite = world.invite_of(host)
        data = ((), ("--data", str(chats)))
        peers = [world.member("join", invite, f"peer-{i}", "--threads", "1", *data[i]).start() for i in range(2)]
        assert [p.exit_code(150) for p in peers] == [0, 0], peers[0].tail()
        assert world.run("pull", invite, str(tmp_path / "pulled"), "--json")[0] == 0
        for folder in ("pulled", "peer-0", "peer-1"):
            assert (tmp_path / folder / "tokenizer.json").read_bytes() == tokenizer, "the run's tokenizer came with it"
        chats_learnt, text_learnt = (p.last_json()["num_tokens"] / p.last_json()["num_steps"] for p in reversed(peers))
        assert chats_learnt < 0.9 * text_learnt, "what the user says is read and not learnt"
        judged = world.run("eval", str(tmp_path / "pulled"), "--json")[1]
        assert judged["nats_per_byte"] < 0.9 * judged["loss"], "a token is more than a byte"
        assert world.run("generate", str(tmp_path / "pulled"), "def area", "--num-tokens", "8", "--json")[1]["text"]
        assert world.run("route", str(tmp_path / "pulled"), "def area(r):", "--json")[1]["text"] == "def area(r):"
        assert ctrl_c(host)[0] == 0
        assert world.run("export", str(tmp_path / "pulled"), str(tmp_path / "hf"), "--json")[1]["kind"] == "4 experts, 2 per token"
        with open_checkpoint(tmp_path / "moe") as before, open_checkpoint(tmp_path / "hf") as after:
            name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
            assert before(name.format(0)).equal(before(name.format(1))), "upcycled experts begin as copies"
            assert not after(name.format(0)).equal(after(name.format(1))), "the swarm made them differ"
            model = build_model(after.spec, 0)
            model.load_state_dict(after.state())
        transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        reads = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        text = "<|im_start|>user\nGr\u00fc\u00dfe<|im_end|>\n"
        with open_checkpoint(tmp_path / "hf") as after:
            assert reads(text, add_special_tokens=False)["input_ids"] == tensor_of(after.tokenizer().encode(text.encode())).tolist()
        tokens = torch.randint(0, 320, (2, 30))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits_BTV, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
