"""What the protocol tests share: names, rules, small records and strategies for them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from decentra.bits import ONE_BITS, float_bits
from decentra.config import AdmissionSpec, Manifest, ModelSpec, OuterSpec, PlacementSpec, RoundSpec
from decentra.ids import Digest, FragmentId, PeerId, digest_of
from decentra.protocol import ledger
from decentra.protocol.fragment import Write
from decentra.protocol.messages import Abstention, Attestation, Hello, Holding, Merge, Offer, Receipt, Role
from decentra.protocol.round import Reject, Returned, Round, Rules, Suspected, Tick
from decentra.protocol.rounds import Effect, RoundBook

FRAGMENT = FragmentId("trunk/0")
RULES = Rules(cut_off_s=10.0, grace_s=5.0, attest_s=8.0, outer=OuterSpec(lr=0.7, momentum=0.9), merge_s=3.0)
PEERS = tuple(PeerId(f"peer-{i}") for i in range(5))
TOKEN = "token-1"


def digest(text: str) -> Digest:
    return digest_of(text.encode())


BASE = digest("base")


def packet_of(peer: PeerId, number: int = 1, variant: int = 0) -> Digest:
    return digest(f"packet {peer} {number} {variant}")


def offer(
    peer: PeerId, number: int = 1, *, num_tokens: int = 100, base: Digest = BASE, variant: int = 0, fragment: FragmentId = FRAGMENT,
    norm_bits: int = ONE_BITS,
) -> Offer:  # fmt: skip
    return Offer(fragment, number, peer, base, packet_of(peer, number, variant), 64, num_tokens, 10, norm_bits)


def receipt(
    peer: PeerId, sender: PeerId, number: int = 1, *, variant: int = 0, fragment: FragmentId = FRAGMENT, objects: bool = False
) -> Receipt:
    return Receipt(fragment, number, peer, sender, packet_of(sender, number, variant), objects)


def attestation(peer: PeerId, anchor: Digest, number: int = 1, *, fragment: FragmentId = FRAGMENT) -> Attestation:
    return Attestation(fragment, number, peer, anchor, proof=peer.encode())


def merge(peer: PeerId, number: int = 1, *, variant: int = 0, fragment: FragmentId = FRAGMENT) -> Merge:
    return Merge(fragment, number, peer, digest(f"merged {number} {variant}"), 32, digest(f"left {number} {variant}"))


def new_round(num_holders: int, num_keepers: int = 0, has_reducers: bool = False, number: int = 1) -> Round:
    """``has_reducers``: the last two of the roster, where there are two."""
    holders, keepers = PEERS[:num_holders], PEERS[num_holders : num_holders + num_keepers]
    pair = (*holders, *keepers)[-2:] if has_reducers and num_holders + num_keepers > 1 else ()
    return Round(
        FRAGMENT, number, 0, BASE, frozenset(holders), frozenset(keepers), opened_at=0.0, cut_off_at=10.0, reducers=pair,
        residual=digest("left 0 0") if pair else None,
    )  # fmt: skip


def manifest(*, num_experts: int = 2, genesis: tuple[str, ...] = ("expert.0/0", "expert.1/0", "trunk/0"), **changes: object) -> Manifest:
    values: dict[str, object] = {
        "name": "test",
        "model": ModelSpec(num_experts=num_experts),
        "rounds": RoundSpec(
            inner_steps=2, cut_off_s=10, grace_s=5, attest_s=8, gather_s=2, heartbeat_s=2, lease_s=6, rollback_s=20
        ),
        "placement": PlacementSpec(holders=2, experts_per_peer=1),
        "admission": AdmissionSpec(max_members=4),
        "genesis": {FragmentId(f): digest(f"genesis {f}") for f in genesis},
    }  # fmt: skip
    return Manifest.model_validate({**values, **changes})


peers = st.sampled_from(PEERS)
anchors = st.sampled_from([digest("anchor a"), digest("anchor b")])
norms = st.sampled_from([ONE_BITS, float_bits(0.25), float_bits(40.0), 0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000])


def round_events(number: int = 1) -> st.SearchStrategy[object]:
    """Events of one round, honest ones mostly, with strangers, lies and repetitions among them."""
    return st.one_of(
        st.builds(
            lambda p, t, v, n: offer(p, number, num_tokens=t, variant=v, norm_bits=n),
            peers, st.integers(-1, 1000), st.sampled_from([0, 0, 0, 0, 1]), norms,
        ),
        st.builds(lambda p: offer(p, number, base=digest("another base")), peers),
        st.builds(
            lambda p, s, v, o: receipt(p, s, number, variant=v, objects=o), peers, peers, st.sampled_from([0, 0, 0, 1]),
            st.sampled_from([False, False, True]),
        ),
        st.builds(lambda p: Abstention(FRAGMENT, number, p, "no tokens"), peers),
        st.builds(lambda p, a: attestation(p, a, number), peers, anchors),
        st.builds(lambda p, v: merge(p, number, variant=v), peers, st.sampled_from([0, 0, 0, 1])),
        st.builds(Suspected, peers),
        st.builds(Returned, peers),
        st.just(Tick()),
    )  # fmt: skip


class House:
    """A book with its clock and its ledger's records."""

    def __init__(self, **changes: object) -> None:
        self.manifest = manifest(**changes)  # type: ignore[arg-type]
        self.now = 100.0
        self.records: list[ledger.Record] = []
        self.book, effects = RoundBook.start(self.manifest, self.now)
        self.keep(effects)

    def keep(self, effects: Sequence[Effect]) -> list[Effect]:
        self.records += [e.record for e in effects if isinstance(e, Write)]
        return list(effects)

    def admit(self, peer: PeerId, role: Role = Role.TRAINER, nonce: str = "n", token: str | None = TOKEN, uses: int = 9) -> list[Effect]:
        return self.keep(self.book.admit(peer, role, nonce, token, uses, self.now))

    def handle(self, event: object, wait_s: float = 0.0) -> list[Effect]:
        self.now += wait_s
        return self.keep(self.book.handle(event, self.now))  # type: ignore[arg-type]

    def enter(self, peer: PeerId, role: Role = Role.TRAINER, *, holds: bool = True, **hello: object) -> list[Effect]:
        self.admit(peer, role)
        holdings = tuple(Holding(peer, f, b.anchor) for f, b in self.book.fragments.items()) if holds else ()
        return self.handle(Hello(peer, role, str(peer), "n", holdings=holdings, **hello))  # type: ignore[arg-type]

    def restored(self) -> RoundBook:
        return RoundBook.restore(self.manifest, self.records, self.now)


def rejects(effects: Sequence[Effect]) -> list[str]:
    return [e.reason for e in effects if isinstance(e, Reject)]
