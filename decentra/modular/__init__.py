"""WHICH: models taken apart and put together. State dicts in, state dicts out; no files, no network."""
