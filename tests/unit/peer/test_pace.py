"""How far training may go before rounds are over, and rounds that are spread over the inner steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from decentra.bits import ONE_BITS
from decentra.ids import Digest, FragmentId, PeerId
from decentra.peer.runtime import checkpoint_pause_s
from decentra.peer.sync import PeerLoop
from decentra.protocol import member as m
from decentra.protocol.duties import Encode, FragmentLife, Self
from decentra.protocol.member import MemberMachine
from decentra.protocol.messages import FragmentView, Offer, Phase, Role

ME, BASE = PeerId("me"), Digest("0" * 64)
NAMES = [FragmentId(f"trunk/{i}") for i in range(5)]
H = 10


def loop(head_start: int) -> PeerLoop:
    nothing: Any = None
    replicas: Any = {f: SimpleNamespace(anchor=BASE, pending_offer=None) for f in NAMES}
    return PeerLoop(
        Self(ME, Role.TRAINER, H), nothing, 5.0, nothing, nothing, replicas, nothing, nothing, num_steps=40, head_start=head_start
    )


def due_at(machine: MemberMachine, num_rounds: int) -> dict[FragmentId, list[int]]:
    """Inner steps after which each fragment encodes, when every round is confirmed at once."""
    machine.handle(m.Connected(), 0.0)
    found: dict[FragmentId, list[int]] = {f: [] for f in NAMES}
    for name in NAMES:
        machine.lives[name] = FragmentLife(**{**_fields(machine.lives[name]), "trains": True})
        machine.handle(m.Viewed(FragmentView(name, 1, 0, BASE, 1, Phase.OPEN, "", (ME,), cut_off_in_s=1e9)), 0.0)
    for step in range(41, 41 + H * num_rounds):
        for effect in machine.handle(m.Stepped(step), 0.0):
            if isinstance(effect, Encode):
                name, number = effect.fragment, effect.round
                found[name].append(step)
                machine.handle(m.Encoded(Offer(name, number, ME, BASE, Digest(f"{step:064d}"), 1, 1, 1, ONE_BITS)), 0.0)
                life = machine.lives[name]
                machine.lives[name] = FragmentLife(**{**_fields(life), "pending": None, "told": frozenset()})
                machine.handle(m.Viewed(FragmentView(name, 1, 0, BASE, number + 1, Phase.OPEN, "", (ME,), cut_off_in_s=1e9)), 0.0)
    return found


def _fields(life: FragmentLife) -> dict[str, Any]:
    return {name: getattr(life, name) for name in life.__slots__}


def test_staggered_fragments_take_turns_and_keep_their_horizon() -> None:
    assert set(map(tuple, due_at(loop(0).machine, 3).values())) == {(50, 60, 70)}
    staggered = due_at(loop(H).machine, 3)
    assert staggered[NAMES[0]] == [50, 60, 70]
    assert staggered[NAMES[1]] == [48, 58, 68]
    assert sorted(steps[0] for steps in staggered.values()) == [42, 44, 46, 48, 50]


def test_without_overlap_no_step_begins_while_a_round_is_out() -> None:
    machine = loop(0).machine
    machine.handle(m.Connected(), 0.0)
    name = NAMES[0]
    machine.lives = {name: FragmentLife(**{**_fields(machine.lives[name]), "trains": True})}
    assert machine.step_limit == 50
    machine.handle(m.Viewed(FragmentView(name, 1, 0, BASE, 1, Phase.OPEN, "", (ME,), cut_off_in_s=1e9)), 0.0)
    machine.handle(m.Stepped(50), 0.0)
    assert machine.step_limit == 50, "encoding"
    machine.handle(m.Encoded(Offer(name, 1, ME, BASE, Digest("1" * 64), 1, 1, 1, ONE_BITS)), 0.0)
    assert machine.step_limit == 50, "out"
    machine.handle(m.Committed(name, Digest("2" * 64)), 0.0)
    assert machine.step_limit == 60, "the next ten may begin"


def test_checkpoints_come_often_where_they_are_small_and_wear_no_disk_out_where_they_are_large() -> None:
    assert [checkpoint_pause_s(n) for n in (0, 20_000_000, 100_000_000, 600_000_000, 10**12)] == [10, 10, 50, 300, 300]
