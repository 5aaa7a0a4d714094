"""Text to token numbers and back, by bytes and by a tokenizer's file; what is read and not learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decentra.config import Manifest, ModelSpec, PeerConfig
from decentra.data import tokens
from decentra.data.tokens import BYTES, FileTokenizer, check_vocabulary, load_tokenizer, numbers_of, read, tensor_of
from decentra.data.windows import WindowSource, source_for
from decentra.errors import ConfigError, IntegrityError
from decentra.ids import Digest, PeerId
from tests.unit.tokenizer import TEXT, saved, trained

BPE = FileTokenizer(trained().encode())


@given(st.text(max_size=200))
def test_what_is_encoded_comes_back(text: str) -> None:
    data = text.encode()
    assert BYTES.decode(tensor_of(BYTES.encode(data)).tolist()) == text
    assert BPE.decode(tensor_of(BPE.encode(data)).tolist()) == text


@given(st.lists(st.tuples(st.text(max_size=20), st.booleans()), max_size=6))
def test_spans_that_are_not_learnt_are_complements(parts: list[tuple[str, bool]]) -> None:
    data, spans = b"", []
    for text, is_learnt in parts:
        start = len(data)
        data += text.encode()
        if not is_learnt:
            spans.append((start, len(data)))
    for tokenizer in (BYTES, BPE):
        numbers = numbers_of(tokenizer.encode(data, spans)).astype(np.int64)
        assert tokenizer.decode(tensor_of(numbers).tolist()) == data.decode()
        learnt = b"".join(t.encode() for t, is_learnt in parts if is_learnt)
        assert tokenizer.decode(numbers[numbers >= 0].tolist()) == learnt.decode()


def test_a_long_text_is_cut_at_lines_and_characters() -> None:
    for text in (TEXT * 3000, "\u00fc" * 100_001, "x" * 70_000):
        assert BPE.decode(tensor_of(BPE.encode(text.encode())).tolist()) == text


def test_marks_are_one_token() -> None:
    assert len(BPE.encode(b"<|im_start|><|im_end|>")) == 2


def test_values_of_tokens_are_spread_over_their_bytes() -> None:
    text = TEXT.encode()
    count = len(BPE.encode(text))
    spread = BPE.spread(text, list(range(count)))
    assert len(spread) == len(text)
    assert spread == sorted(spread)
    assert set(spread) == set(range(count))
    assert BYTES.spread(b"abc", [1, 2, 3]) == [1, 2, 3]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "tokenizer.json")
    assert load_tokenizer(path, BPE.digest).num_tokens == 320
    with pytest.raises(IntegrityError, match="get its own again"):
        load_tokenizer(path, Digest("0" * 64))
    for bad in (b"", b"{}", b"not json", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="at most"):
        FileTokenizer(bytes(tokens.MAX_TOKENIZER_BYTES + 1))


def test_vocabularies_that_do_not_fit() -> None:
    check_vocabulary(BPE, 320, "here")
    with pytest.raises(ConfigError, match="320 tokens, the model 300"):
        check_vocabulary(BPE, 300, "here")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json is with it"):
        check_vocabulary(BYTES, 151_936, "here")


def test_windows_of_lessons_carry_what_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "def area", "completion": "(r):"}\n' * 40)
    manifest = Manifest(name="run", model=ModelSpec(vocab_size=320, max_seq_len=32), data={"seq_len": 16, "tokenizer": BPE.digest})  # type: ignore[arg-type]
    source = source_for(manifest, PeerConfig(data=(str(tmp_path),), shared_fraction=0.0), PeerId("p"), BPE)
    batch = source.next_batch(8)
    assert (batch < 0).any()
    assert (batch >= 0).any()
    assert int(read(batch).max()) < 320
    source.seek(b'{"format": 1, "index": 0}')
    assert torch.equal(source.next_inputs(8), read(batch[:, :-1]))


def test_bytes_and_numbers_make_the_same_windows() -> None:
    numbers = np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.int32)
    one, other = WindowSource([TEXT.encode()], 8, 0, "p"), WindowSource([numbers], 8, 0, "p")
    assert torch.equal(one.next_batch(16), other.next_batch(16))


def test_a_tokenizer_that_puts_a_mark_before_a_text_reads_it_in_one_piece() -> None:
    """Llama's and Mistral's do; cut apart, a text would have the mark at every cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    foreign.decoder = decoders.Metaspace(prepend_scheme="always")
    foreign.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    tokenizer = FileTokenizer(foreign.to_str().encode())
    text = TEXT.replace("\u00fc", "u").replace("\u00df", "s").encode()
    numbers = numbers_of(tokenizer.encode(text, [(0, 10), (20, 30)])).astype(np.int64)
    assert read(torch.from_numpy(numbers)).tolist() == foreign.encode(text.decode()).ids
    assert 0 < int((numbers < 0).sum()) < len(numbers)
    long = text * 1000
    assert tensor_of(tokenizer.encode(long)).tolist() == foreign.encode(long.decode()).ids
