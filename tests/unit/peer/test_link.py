"""Lateness from receipts, and the codec that follows."""

from __future__ import annotations

from decentra.bits import ONE_BITS
from decentra.config import CodecSpec, PeerConfig
from decentra.ids import Digest, FragmentId, PeerId
from decentra.modules import build_layout
from decentra.peer.link import RateControl, limits_of
from decentra.protocol.messages import Entry, FragmentView, Offer, Phase, Settlement

ME, A, B, K = PeerId("me"), PeerId("a"), PeerId("b"), PeerId("k")
LAYOUT = build_layout(
    [("model.norm.weight", (64,)), ("model.layers.0.w.weight", (256, 256)), ("model.layers.0.mlp.experts.0.w.weight", (64, 64))]
)
TRUNK, EXPERT = FragmentId("trunk/0"), FragmentId("expert.0/0")
PACKET = Digest("1" * 64)
ROUND_S = 20.0


def control(up: str | None = None, sparsest: str | None = "topk16") -> RateControl:
    spec = CodecSpec(name="int8", sparsest=sparsest)  # type: ignore[arg-type]
    return RateControl(spec, LAYOUT, limits_of(spec, PeerConfig(up=up)), ME)


def view(
    number: int = 1, *holders: PeerId, phase: Phase = Phase.OPEN, fragment: FragmentId = TRUNK, settled: tuple[PeerId, ...] = ()
) -> FragmentView:
    entries = tuple(Entry(p, PACKET if p == ME else Digest("2" * 64), 10, 10, 0, ONE_BITS, ONE_BITS) for p in settled)
    settlement = Settlement(fragment, number, number, Digest("0" * 64), entries, 0, 0, "") if phase is not Phase.OPEN else None
    receipts = tuple((ME, p) for p in holders)
    return FragmentView(fragment, 1, 0, Digest("0" * 64), number, phase, "", (ME, A, B), (K,), receipts=receipts, settlement=settlement)


def offer(number: int, fragment: FragmentId = TRUNK) -> Offer:
    return Offer(fragment, number, ME, Digest("0" * 64), PACKET, 1000, 10, 1, ONE_BITS)


def at_ease() -> RateControl:
    """After enough calm rounds: at the dense end."""
    rate = control()
    assert rounds(rate, [1.0] * 8, first=-7) == ["topk16", "topk32", "topk64", "topk128", "topk256", "int4", "int8", "int8"]
    return rate


def rounds(rate: RateControl, takes_s: list[float], first: int = 1) -> list[str]:
    """Rounds of 20 s; a majority of the others has the packet after ``takes_s``."""
    codecs = []
    for number, took_s in enumerate(takes_s, first):
        start = ROUND_S * number
        codecs.append(rate.codec(TRUNK, start))
        rate.encoded(offer(number), start)
        rate.saw(view(number, A), start + took_s / 2)
        rate.saw(view(number, A, K), start + took_s)
        rate.saw(view(number, phase=Phase.SETTLED, settled=(ME, A)), start + took_s + 0.1)
    return codecs


def test_a_fast_link_stays_dense_a_slow_one_gets_sparse_and_finds_back() -> None:
    rate = at_ease()
    assert rounds(rate, [1.0] * 6) == ["int8"] * 6
    assert rounds(rate, [15.0] * 8, first=7)[1:] == ["int4", "topk256", "topk128", "topk64", "topk32", "topk16", "topk16"]
    assert rounds(rate, [0.5] * 8, first=15)[-1] == "int8"
    assert rate.why.startswith("sends int8 (a packet took")


def test_two_seconds_of_latency_are_no_slow_link() -> None:
    rate = at_ease()
    rounds(rate, [15.0], first=1)
    assert rounds(rate, [2.0] * 6, first=2)[-1] == "int8"


def test_one_member_without_a_receipt_proves_nothing() -> None:
    rate = at_ease()
    for number in range(1, 8):
        rate.codec(TRUNK, ROUND_S * number)
        rate.encoded(offer(number), ROUND_S * number)
        rate.saw(view(number, A, K), ROUND_S * number + 0.5)  # B never answers
        rate.saw(view(number, A, K, phase=Phase.SETTLED, settled=(ME, A)), ROUND_S * number + 19)
    assert rate.codec_now == "int8"


def test_a_missed_round_counts_and_an_outage_does_not() -> None:
    rate = at_ease()
    rounds(rate, [1.0] * 3)
    rate.encoded(offer(4), 80.0)
    rate.saw(view(4, phase=Phase.SETTLED, settled=(A,)), 99.0)
    assert rate.codec(TRUNK, 100.0) == "int4"
    rate.encoded(offer(5), 100.0)
    rate.disconnected()
    rate.saw(view(5, A, K), 5000.0)
    assert rate.codec(TRUNK, 5000.0) == "int4"
    assert rate.round_s is not None
    assert rate.round_s < 60


def test_a_round_that_went_by_unseen_is_closed() -> None:
    rate = at_ease()
    rate.codec(TRUNK, 0.0)
    rate.encoded(offer(1), 0.0)
    rate.saw(view(2), 30.0)
    rate.encoded(offer(2), 31.0)
    rate.saw(view(2, A, K), 32.0)
    assert rate.codec(TRUNK, 40.0) == "int8"


def test_fragments_in_flight_together_are_judged_one_by_one() -> None:
    rate = at_ease()
    rounds(rate, [1.0, 1.0])
    for fragment in (TRUNK, EXPERT):
        rate.codec(fragment, 60.0)
        rate.encoded(offer(3, fragment), 60.0)
    rate.saw(view(3, A, K), 61.0)
    rate.saw(view(3, A, K, fragment=EXPERT), 75.0)
    assert rate.codec(TRUNK, 80.0) == "int4"


def test_one_codec_needs_no_choice_and_no_words() -> None:
    rate = control(sparsest=None)
    assert rounds(rate, [19.0] * 5) == ["int8"] * 5
    assert rate.why == ""


def test_the_owners_limit_is_obeyed_from_the_first_packet() -> None:
    rate = control(up="10kbit")
    assert rounds(rate, [0.1] * 8) == ["topk16", "topk32", "topk64", "topk128", *["topk256"] * 4]
    assert "limit of 0.01 Mbit/s" in rate.why
