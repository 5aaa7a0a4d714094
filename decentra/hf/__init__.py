"""Hugging Face checkpoints in and out, without transformers: names, shapes and config.json."""
