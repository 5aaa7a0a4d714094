"""A small tokenizer, trained on the spot: byte-level BPE with ChatML's marks, as Qwen's is."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "def area(r):\n    return 3.14 * r * r\n\nThe quick brown fox jumps over the lazy dog. Gr\u00fc\u00dfe an alle!\n"


def trained(num_tokens: int = 320) -> str:
    """The text of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, special_tokens=MARKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer.to_str()


def saved(path: Path, num_tokens: int = 320) -> Path:
    path.write_text(trained(num_tokens))
    return path
