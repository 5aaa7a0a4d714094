"""Training windows in an order that is a pure function of (seed, peer, index), so a cursor is one number. No model, no hidden state.

Shapes: B batch, T window length in tokens; a window has T + 1 tokens because the targets are the inputs shifted by one.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from decentra.config import Manifest, PeerConfig
from decentra.data.domains import embedded_domain, embedded_domains
from decentra.data.files import read_texts
from decentra.data.tokens import BYTES, NUM_BYTE_TOKENS, Spans, Tokenizer, Tokens, check_vocabulary, numbers_of, read
from decentra.errors import ConfigError, DataError
from decentra.ids import PeerId

MAX_CURSOR_BYTES = 1024


class _Pool:
    """Texts to cut windows from; every possible start is equally likely."""

    def __init__(self, texts: Sequence[Tokens], window_size: int) -> None:
        self._arrays = [numbers_of(text) for text in texts if len(text) >= window_size]
        self._ends = list(accumulate(len(array) - window_size + 1 for array in self._arrays))
        self._window_size = window_size
        self.num_starts = self._ends[-1] if self._ends else 0

    def at(self, place: bytes) -> np.ndarray:
        """The window at a share of the way through all possible starts: eight bytes, little-endian, over 2^64."""
        number = int.from_bytes(place, "little") * self.num_starts >> 64
        index = bisect_right(self._ends, number)
        start = number - (self._ends[index - 1] if index else 0)
        return self._arrays[index][start : start + self._window_size]


class WindowSource:
    """Windows of ``seq_len`` + 1 tokens at places drawn by a counter-based generator (BLAKE2b of the window's index, keyed).

    A share ``shared_fraction`` of the windows comes from ``shared_texts``, the rest from ``texts``. Not thread-safe: one owner.
    Raises DataError when the texts have no room for one window.
    """

    def __init__(
        self,
        texts: Sequence[Tokens],
        seq_len: int,
        seed: int,
        peer_key: str,
        shared_texts: Sequence[Tokens] = (),
        shared_fraction: float = 0.0,
    ) -> None:
        self._own, self._shared = _Pool(texts, seq_len + 1), _Pool(shared_texts, seq_len + 1)
        if not self._own.num_starts:
            longest = max(map(len, texts), default=0)
            raise DataError(f"one window needs {seq_len + 1} tokens of text, the longest text has {longest}; add text or lower seq_len")
        if shared_fraction > 0 and not self._shared.num_starts:
            raise DataError(f"shared_fraction is {shared_fraction}, but no common text with {seq_len + 1} tokens was given")
        self.seq_len = seq_len
        self._key = hashlib.sha256(f"{seed}:{peer_key}".encode()).digest()
        # an integer threshold: float comparisons of a drawn number would be equal everywhere too, but this is exact at 0 and 1
        self._shared_below = round(shared_fraction * (1 << 64))
        self._index = 0

    def next_batch(self, batch_size: int, num_candidates: int = 1, score: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The next ``batch_size`` windows, int64 [B, T + 1]; tokens that are not to be learnt are complements (``tokens.read``).

        With ``score`` a window of common text is the best of ``num_candidates``; it maps windows [C, T + 1] to numbers [C].
        """
        drawn = [self._windows(self._index + i, num_candidates if score is not None else 1) for i in range(batch_size)]
        self._index += batch_size
        chosen = [0] * batch_size
        contested = [i for i, windows in enumerate(drawn) if len(windows) > 1]
        if score is not None and contested:
            scores_C = score(_stacked([window for i in contested for window in drawn[i]]))
            for i, best in zip(contested, scores_C.view(len(contested), num_candidates).argmax(-1).tolist(), strict=True):
                chosen[i] = best
        return _stacked([windows[best] for windows, best in zip(drawn, chosen, strict=True)])

    def aside(self, number: int, batch_size: int) -> Tensor:
        """Windows beside the training order, int64 [B, T + 1]: the same for the same ``number``, and training goes on as if they had not been read."""
        first = (1 << 64) + number * batch_size
        return _stacked([self._windows(first + i, 1)[0] for i in range(batch_size)])

    def next_inputs(self, batch_size: int) -> Tensor:
        """The same as a model reads them, without the last token of each: int64 [B, T]."""
        return read(self.next_batch(batch_size)[:, :-1])

    def cursor(self) -> bytes:
        """Where the source stands, as a small JSON object; ``seek`` goes back there exactly."""
        return json.dumps({"format": 1, "index": self._index}).encode()

    def seek(self, cursor: bytes) -> None:
        """Continue at a cursor of an earlier process. Raises DataError."""
        try:
            raw = json.loads(cursor) if len(cursor) <= MAX_CURSOR_BYTES else None
        except (ValueError, RecursionError):
            raw = None
        index = raw.get("index") if isinstance(raw, dict) and raw.get("format") == 1 else None
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            ours = self.cursor().decode()
            raise DataError(f"expected a data cursor like {ours}, got {cursor[:60]!r}; remove the saved cursor to start over")
        self._index = index

    def _windows(self, index: int, num_candidates: int) -> list[np.ndarray]:
        """One window of the peer's own text, or ``num_candidates`` of common text; the first does not depend on their number."""
        at = index.to_bytes(16, "little")
        drawn = hashlib.blake2b(at, key=self._key, digest_size=16).digest()
        if int.from_bytes(drawn[:8], "little") >= self._shared_below:
            return [self._own.at(drawn[8:])]
        others = [hashlib.blake2b(at + bytes([k]), key=self._key, digest_size=8).digest() for k in range(1, num_candidates)]
        return [self._shared.at(place) for place in (drawn[8:], *others)]


def _stacked(windows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(windows).astype(np.int64))


Text = tuple[bytes, Spans]  # and what of it is read and not learnt


def source_for(manifest: Manifest, config: PeerConfig, peer_id: PeerId, tokenizer: Tokenizer = BYTES) -> WindowSource:
    """The training windows of one peer: its own files, one embedded domain, or all of them, mixed with common text.

    Common text is all embedded domains of the run, as a share ``shared_fraction``; a run with free domain names has none.
    Raises ConfigError, DataError.
    """
    own, common = texts_for(manifest, config)
    check_vocabulary(tokenizer, manifest.model.vocab_size, f"run '{manifest.name}'")
    spec = manifest.data
    fraction = spec.shared_fraction if config.shared_fraction is None else config.shared_fraction
    encoded = {text: tokenizer.encode(text) for text in common}
    texts = [encoded[text] if text in encoded else tokenizer.encode(text, unlearnt) for text, unlearnt in own]
    if config.data and (longest := max(map(len, texts))) <= spec.seq_len:
        raise DataError(
            f"{', '.join(config.data)}: {longest} tokens of text, at least {spec.seq_len + 1} (one window) are needed; add text"
        )
    return WindowSource(texts, spec.seq_len, manifest.seed, peer_id, list(encoded.values()), fraction if common else 0.0)


def texts_for(manifest: Manifest, config: PeerConfig) -> tuple[list[Text], list[bytes]]:
    """A peer's own texts, and the run's common ones. Raises ConfigError, DataError."""
    if manifest.data.tokenizer is None and manifest.model.vocab_size < NUM_BYTE_TOKENS:
        raise ConfigError(
            f"text is read as bytes, which needs model.vocab_size >= 256; run '{manifest.name}' has {manifest.model.vocab_size}"
        )
    common = _common_texts(manifest)
    if not common and config.shared_fraction:
        raise DataError(f"run '{manifest.name}' has no embedded domains, so there is no common text; leave out shared_fraction")
    return _own_texts(manifest, config, common), list(common.values())


def _common_texts(manifest: Manifest) -> dict[str, bytes]:
    """Training text of all embedded domains of the run; empty when one of its domains is a free name."""
    names = manifest.data.domains
    if not names or any(name not in embedded_domains() for name in names):
        return {}
    return {name: embedded_domain(name, manifest.data).train for name in names}


def _own_texts(manifest: Manifest, config: PeerConfig, common: dict[str, bytes]) -> list[Text]:
    if config.data:
        if config.domain is not None:
            raise ConfigError(f"both data and domain '{config.domain}' are given; own files replace the embedded domain, leave one out")
        least = manifest.data.seq_len + 1 if manifest.data.tokenizer is None else 1
        found = read_texts(config.data, text_field=config.text_field, min_bytes=least)
        return [(found.data, found.unlearnt)]
    if not common:
        domains = ", ".join(manifest.data.domains) or "none"
        raise DataError(f"run '{manifest.name}' has domains that are not embedded ({domains}); give your own text: data = [\"folder\"]")
    if config.domain is None:
        return [(text, ()) for text in common.values()]
    if config.domain not in common:
        raise ConfigError(f"domain '{config.domain}' is not in run '{manifest.name}'; it has: {', '.join(common)}")
    return [(common[config.domain], ())]
