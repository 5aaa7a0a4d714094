"""The snapshot, its tables and its plots, from views made by the real RoundBook."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from decentra.bits import ONE_BITS, float_bits
from decentra.config import Manifest, ModelSpec, OuterSpec
from decentra.ids import Digest, FragmentId, PeerId
from decentra.protocol.messages import Attestation, Counters, Heartbeat, Hello, Holding, Offer, Receipt, Role
from decentra.protocol.rounds import RoundBook
from decentra.status.plot import loss_png, loss_text
from decentra.status.snapshot import snapshot
from decentra.status.terminal import count, render, size

GENESIS = Digest("a" * 64)
NEW, PACKET = Digest("b" * 64), Digest("c" * 64)
TRAINER, KEEPER = PeerId("12D3KooWTrainer1"), PeerId("12D3KooWKeeper01")
FRAGMENTS = (FragmentId("trunk/0"), FragmentId("router/0"), FragmentId("expert.0/0"), FragmentId("expert.1/0"))


def a_swarm(num_rounds: int) -> tuple[Manifest, RoundBook]:
    """A trainer that holds expert 0, a keeper, and confirmed rounds of the fragments they can do."""
    manifest = Manifest(name="looked-at", model=ModelSpec(num_experts=2), genesis=dict.fromkeys(FRAGMENTS, GENESIS))
    book, _ = RoundBook.start(manifest, 0.0)
    for peer, role, experts in ((KEEPER, Role.KEEPER, None), (TRAINER, Role.TRAINER, (0,))):
        book.admit(peer, role, "n", "token", 9, 0.0)
        holdings = tuple(Holding(peer, f, GENESIS) for f in FRAGMENTS)
        book.handle(Hello(peer, role, role.value, "n", experts=experts, holdings=holdings), 1.0)
    if num_rounds:
        fragment = FragmentId("expert.0/0")
        book.handle(Offer(fragment, 1, TRAINER, GENESIS, PACKET, 10, 500, 12, ONE_BITS), 2.0)
        book.handle(Receipt(fragment, 1, KEEPER, TRAINER, PACKET), 3.0)
        for peer in (TRAINER, KEEPER):
            book.handle(Attestation(fragment, 1, peer, NEW), 4.0)
    book.handle(Heartbeat(TRAINER, 1, Counters(12, 900, 1000, 2000, 2.5, 99.0, 0, "training", ((0, 500),))), 5.0)
    return manifest, book


def snap_of(manifest: Manifest, book: RoundBook) -> dict[str, object]:
    return snapshot(manifest, book.swarm(), [book.view(f, 5.0) for f in FRAGMENTS])


def test_live_participating_and_tokens_are_three_numbers() -> None:
    before = snap_of(*a_swarm(0))
    after = snap_of(*a_swarm(1))
    assert (before["num_live"], before["num_participating"], before["tokens_per_expert"]) == (2, 0, [0, 0])
    assert (after["num_live"], after["num_participating"], after["tokens_per_expert"]) == (2, 1, [500, 0])
    assert after["loss"] == 2.5
    assert after["rounds_confirmed_min_expert"] == 0


def test_the_snapshot_names_members_modules_holders_and_reasons() -> None:
    snap = snap_of(*a_swarm(1))
    json.dumps(snap)
    assert {m["name"]: m["role"] for m in snap["members"]} == {"keeper": "keeper", "trainer": "trainer"}  # type: ignore[attr-defined]
    modules = {m["module"]: m for m in snap["modules"]}  # type: ignore[attr-defined]
    assert modules["trunk"]["holders"] == ["trainer"]
    assert modules["expert.0"]["holders"] == ["trainer"]
    assert modules["expert.1"]["holders"] == []
    assert "nobody present trains it" in modules["expert.1"]["fragments"][0]["why"]
    assert modules["trunk"]["fragments"][0]["why"] == "waits for offers of trainer (0 of 1 in)"  # by name, not by the end of an id


def test_agreement_is_about_everybody_who_takes_part() -> None:
    manifest, book = a_swarm(1)
    assert snap_of(manifest, book)["anchors_equal"]
    book.handle(Holding(KEEPER, FragmentId("trunk/0"), NEW), 6.0)
    assert not snap_of(manifest, book)["anchors_equal"]


def test_who_was_clipped_is_said_by_name() -> None:
    """A settlement's clip, from the offers on: in the snapshot, in the tables and in the settlement's own words."""
    manifest = Manifest(
        name="looked-at", outer=OuterSpec(clip=2.0), model=ModelSpec(num_experts=2), genesis=dict.fromkeys(FRAGMENTS, GENESIS)
    )
    book, _ = RoundBook.start(manifest, 0.0)
    trainers = [PeerId(f"12D3KooWTrainer{i}") for i in range(3)]
    fragment = FRAGMENTS[0]
    for index, peer in enumerate(trainers):
        book.admit(peer, Role.TRAINER, "n", "token", 9, 0.0)
        book.handle(Hello(peer, Role.TRAINER, f"trainer-{index}", "n"), 1.0)
    for peer in trainers:  # a round opens when all who are here are ready
        book.handle(Holding(peer, fragment, GENESIS), 1.0)
    for index, peer in enumerate(trainers):
        packet = Digest(str(index) * 64)
        book.handle(Offer(fragment, 1, peer, GENESIS, packet, 10, 500, 12, float_bits((1.0, 8.0, 1.0)[index])), 2.0)
        book.handle(Receipt(fragment, 1, trainers[index - 1], peer, packet), 3.0)
    settlement = book.view(fragment, 3.0).settlement
    assert settlement is not None
    assert settlement.why == "all 3 due offers are in; clipped Trainer1 to 0.25"
    for peer in trainers:
        book.handle(Attestation(fragment, 1, peer, NEW), 4.0)
    snap = snapshot(manifest, book.swarm(), [book.view(f, 5.0) for f in FRAGMENTS])
    (trunk,) = (f for m in snap["modules"] if m["module"] == "trunk" for f in m["fragments"])
    assert trunk["clipped"] == {"trainer-1": 0.25}
    out = io.StringIO()
    Console(file=out, width=160).print(render(snap))
    assert "last round clipped trainer-1 to 0.25" in out.getvalue()
    assert all(f["clipped"] == {} for m in snap_of(*a_swarm(1))["modules"] for f in m["fragments"])  # type: ignore[attr-defined]


def test_tables_hold_what_the_snapshot_says() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(render(snap_of(*a_swarm(1))))
    text = out.getvalue()
    for word in ("looked-at", "trainer", "keeper", "expert.1", "nobody", "participating 1", "anchors agree"):
        assert word in text


def test_tables_fit_eighty_columns_and_short_windows() -> None:
    """Nothing is cut off: modules keep their names, reasons have lines of their own, and many experts share a row where lines are few."""
    snap = snap_of(*a_swarm(1))
    for height in (None, 14):
        out = io.StringIO()
        Console(file=out, width=80).print(render(snap, height))
        text = out.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        for word in ("trunk", "router", "trainer", "waits for offers of trainer (0 of 1 in)"):
            assert word in text, word
        assert any(line.startswith("expert.1 ") for line in text.splitlines()) == (height is None)
    assert "2 experts" in text


def test_numbers_for_people() -> None:
    assert [count(n) for n in (7, 9_999, 12_345, 1_234_567)] == ["7", "9999", "12.3k", "1.23M"]
    assert [size(n) for n in (999, 1_500, 2_500_000, 3_000_000_000)] == ["999 B", "1.5 kB", "2.5 MB", "3 GB"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    curves = {"peer-1": [(0.0, 5.5), (10.0, 3.0)], "peer-2": [(1.0, 5.4), (9.0, 3.2)]}
    loss_png(tmp_path / "loss.png", curves, [(4.0, "killed")], {"swarm": 2.5}, "loss")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = loss_text(curves, "loss")
    assert "peer-1" in text
    assert "\x1b" not in text


def test_experts_with_too_few_holders_and_who_holds_only_its_own_are_said() -> None:
    manifest, book = a_swarm(1)
    book.handle(Hello(TRAINER, Role.TRAINER, "trainer", "n", experts=(0,), is_partial=True), 6.0)
    snap = snap_of(manifest, book)
    assert snap["experts_short"] == {0: 1, 1: 0}
    assert {m["name"]: m["mode"] for m in snap["members"]} == {"keeper": None, "trainer": "held"}  # type: ignore[attr-defined]
    console = Console(file=io.StringIO(), width=120)
    console.print(render(snap))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0 (1 of 2), 1 (0 of 2)" in text
    assert "0 (held)" in text
