"""Modular operations on real checkpoints: texts, training and judging around the pure functions of ``modular``. Starts no network."""
