"""The uplink's rate from receipts, and the codec that follows."""

from __future__ import annotations

from decentra.config import CodecSpec, PeerConfig
from decentra.delta.packet import max_packet_bytes
from decentra.ids import Digest, FragmentId, PeerId
from decentra.modules import build_layout
from decentra.peer.link import RateControl, Uplink, limits_of
from decentra.protocol.messages import FragmentView, Offer, Phase

ME, A, K = PeerId("me"), PeerId("a"), PeerId("k")
LAYOUT = build_layout([("model.norm.weight", (64,)), ("model.layers.0.w.weight", (256, 256))])
TRUNK = FragmentId("trunk/0")


def control(up: str | None = None, sparsest: str | None = "topk16") -> tuple[RateControl, list[int]]:
    spec, sent = CodecSpec(name="int8", sparsest=sparsest), [0]  # type: ignore[arg-type]
    rate = RateControl(spec, LAYOUT, limits_of(spec, PeerConfig(up=up)), Uplink(lambda: sent[0]), ME)
    return rate, sent


def view(receipts: tuple[tuple[PeerId, PeerId], ...] = (), phase: Phase = Phase.OPEN) -> FragmentView:
    return FragmentView(TRUNK, 1, 0, Digest("0" * 64), 1, phase, "", holders=(ME, A), keepers=(K,), receipts=receipts)


def offer(num_bytes: int) -> Offer:
    return Offer(TRUNK, 1, ME, Digest("0" * 64), Digest("1" * 64), num_bytes, 10, 1)


def play(rate: RateControl, sent: list[int], *, starts: float, takes: float, copies: int = 2) -> str:
    """One round of 20 s: encode, upload, receipts."""
    codec = rate.codec(TRUNK, starts).codec
    num_bytes = max_packet_bytes(LAYOUT.fragments[0], codec)
    rate.encoded(offer(num_bytes), starts)
    sent[0] += copies * num_bytes
    rate.saw(view(((ME, A),)), starts + takes / 2)
    rate.saw(view(((ME, A), (ME, K))), starts + takes)
    return codec


def test_the_rate_is_what_left_while_packets_were_under_way() -> None:
    rate, sent = control()
    play(rate, sent, starts=0.0, takes=4.0)
    num_bytes = max_packet_bytes(LAYOUT.fragments[0], "int8")
    assert rate.uplink.bytes_per_s == 2 * num_bytes / 4.0
    assert rate.uplink.fanout == 2.0


def test_a_fast_link_stays_dense_and_a_slow_one_gets_sparse_and_back() -> None:
    rate, sent = control()
    assert [play(rate, sent, starts=20.0 * i, takes=1.0) for i in range(4)] == ["int8"] * 4
    slow = [play(rate, sent, starts=100.0 + 60.0 * i, takes=60.0) for i in range(3)]
    assert slow[0] == "int8"
    assert "int8" not in slow[1:]
    fast = [play(rate, sent, starts=300.0 + 20.0 * i, takes=0.2) for i in range(9)]
    assert fast[-1] == "int8", "a link that is fast again is used again"
    assert "sends int8" in rate.why


def test_a_settled_round_ends_the_measurement() -> None:
    rate, sent = control()
    rate.codec(TRUNK, 0.0)
    rate.encoded(offer(1000), 0.0)
    sent[0] += 1000
    rate.saw(view(phase=Phase.SETTLED), 5.0)
    assert rate.uplink.bytes_per_s == 200.0


def test_one_codec_needs_no_choice_and_no_words() -> None:
    rate, sent = control(sparsest=None)
    assert play(rate, sent, starts=0.0, takes=1000.0) == "int8"
    assert play(rate, sent, starts=2000.0, takes=1000.0) == "int8"
    assert rate.why == ""


def test_the_owners_limit_is_obeyed() -> None:
    rate, sent = control(up="10kbit")
    play(rate, sent, starts=0.0, takes=0.1)
    assert play(rate, sent, starts=20.0, takes=0.1) == "topk256"
    assert "limit of 0.01 Mbit/s" in rate.why
