from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.config import DataSpec, Manifest, ModelSpec, PeerConfig
from decentra.data.domains import embedded_domain
from decentra.data.windows import WindowSource, source_for
from decentra.errors import ConfigError, DataError
from decentra.ids import PeerId

OWN, COMMON = bytes(range(100)), bytes(range(100, 200))


def own_source(seed: int = 0, peer: str = "p") -> WindowSource:
    return WindowSource([OWN], 8, seed, peer)


@settings(max_examples=50)
@given(
    texts=st.lists(st.binary(max_size=40), min_size=1, max_size=5),
    common=st.binary(min_size=5, max_size=40),
    fraction=st.floats(0, 1),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
)
def test_windows_are_pieces_of_the_texts_and_independent_of_batching(
    texts: list[bytes], common: bytes, fraction: float, sizes: list[int], seed: int
) -> None:
    texts.append(b"long enough")

    def source() -> WindowSource:
        return WindowSource(texts, 4, seed, "peer", [common], fraction)

    batched = source()
    rows = torch.cat([batched.next_batch(size) for size in sizes])
    assert rows.dtype == torch.int64
    assert rows.shape == (sum(sizes), 5)
    assert torch.equal(rows, source().next_batch(sum(sizes)))
    assert all(any(bytes(row) in text for text in (*texts, common)) for row in rows.tolist())
    resumed = source()
    resumed.seek(batched.cursor())
    assert torch.equal(resumed.next_batch(6), batched.next_batch(6))


def test_seed_and_peer_decide_the_order() -> None:
    first = own_source().next_batch(8)
    assert torch.equal(first, own_source().next_batch(8))
    assert not torch.equal(first, own_source(seed=1).next_batch(8))
    assert not torch.equal(first, own_source(peer="q").next_batch(8))


def test_the_order_is_fixed_for_ever() -> None:
    assert own_source().next_batch(8)[:, 0].tolist() == [27, 1, 58, 24, 91, 48, 70, 46]


def test_every_start_is_drawn_evenly_over_texts_of_different_length() -> None:
    starts = WindowSource([bytes(range(10)), bytes(range(50, 80))], 4, 0, "p").next_batch(6400)[:, 0]
    counts = torch.bincount(starts, minlength=80)
    possible = [*range(6), *range(50, 76)]  # 32 starts, 200 draws each
    assert counts.sum() == counts[possible].sum()
    assert 140 < counts[possible].min() < counts[possible].max() < 260


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_shared_fraction_is_kept(fraction: float) -> None:
    rows = WindowSource([OWN], 8, 0, "p", [COMMON], fraction).next_batch(4000)
    found = (rows[:, 0] >= 100).double().mean().item()
    assert found == (fraction if fraction in (0.0, 1.0) else pytest.approx(fraction, abs=0.03))


@pytest.mark.parametrize(
    "cursor",
    [b"", b"x", b"[]", b"{}", b'{"format": 2, "index": 1}', b'{"format": 1, "index": -1}', b'{"format": 1, "index": true}', b"[" * 999],
)
def test_a_damaged_cursor_is_refused_and_changes_nothing(cursor: bytes) -> None:
    source = own_source()
    source.next_batch(3)
    with pytest.raises(DataError, match="cursor"):
        source.seek(cursor)
    assert source.cursor() == b'{"format": 1, "index": 3}'


def test_texts_without_room_for_a_window_are_refused() -> None:
    with pytest.raises(DataError, match=r"9 tokens.*longest text has 8"):
        WindowSource([b"12345678", b"abc"], 8, 0, "p")
    with pytest.raises(DataError, match="common text"):
        WindowSource([OWN], 8, 0, "p", [b"short"], 0.5)


# ---------------------------------------------------------------- source_for

ME = PeerId("12D3KooWtest")


def pieces_of(source: WindowSource, text: bytes) -> float:
    rows = source.next_batch(60).tolist()
    return sum(bytes(row) in text for row in rows) / len(rows)


def test_by_default_a_peer_trains_on_all_domains_and_never_on_held_out_text() -> None:
    manifest = Manifest(name="run")
    domains = [embedded_domain(name, manifest.data) for name in manifest.data.domains]
    source = source_for(manifest, PeerConfig(), ME)
    rows = [bytes(row) for row in source.next_batch(60).tolist()]
    assert len(rows[0]) == 129
    assert all(any(row in d.train for d in domains) for row in rows)
    assert all(sum(row in d.train for row in rows) >= 3 for d in domains)


def test_one_domain_with_the_runs_share_of_common_text() -> None:
    manifest = Manifest(name="run")
    code = embedded_domain("code", manifest.data).train
    assert pieces_of(source_for(manifest, PeerConfig(domain="code", shared_fraction=0.0), ME), code) == 1.0
    assert 0.6 < pieces_of(source_for(manifest, PeerConfig(domain="code"), ME), code) < 0.95  # 0.7 + 0.3 / 4


def test_own_files_mixed_with_common_text(tmp_path: Path) -> None:
    text = b"to be or not to be, " * 50
    (tmp_path / "mine.txt").write_bytes(text)
    config = PeerConfig(data=(str(tmp_path),))
    assert 0.5 < pieces_of(source_for(Manifest(name="run"), config, ME), text) < 0.9
    free = Manifest(name="run", data=DataSpec(domains=("hamlet",)))
    assert pieces_of(source_for(free, config, ME), text) == 1.0


def test_contradicting_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"x" * 500)
    manifest, free = Manifest(name="run"), Manifest(name="run", data=DataSpec(domains=("hamlet", "code")))
    mine = (str(tmp_path),)
    cases: list[tuple[Manifest, PeerConfig, str]] = [
        (manifest, PeerConfig(data=mine, domain="code"), "leave one out"),
        (manifest, PeerConfig(domain="poetry"), "it has: code, prose, headers, math"),
        (free, PeerConfig(), "give your own text"),
        (free, PeerConfig(data=mine, shared_fraction=0.5), "no common text"),
        (Manifest(name="run", model=ModelSpec(vocab_size=128)), PeerConfig(), "vocab_size >= 256"),
        (manifest, PeerConfig(data=(str(tmp_path / "absent"),)), "no such file"),
    ]
    for run, config, message in cases:
        with pytest.raises((ConfigError, DataError), match=message):
            source_for(run, config, ME)
