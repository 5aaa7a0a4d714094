"""Domain values to protobuf and back: equal after a round trip, bounded, and every malformed thing is one kind of error."""

from __future__ import annotations

import hashlib
import math
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.errors import RejectedPayload
from decentra.ids import Digest, FragmentId, PeerId
from decentra.pb import averaging_pb2, messages_pb2
from decentra.protocol import messages as domain
from decentra.wire import limits
from decentra.wire.convert import PAIRS, decode, encode, from_wire, parse, to_wire

ROOT = Path(__file__).parents[3]

text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc")), max_size=40)
numbers = st.integers(0, limits.MAX_INT)
finite = st.floats(allow_nan=False, allow_infinity=False)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex()))
peers = st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=1, max_size=64).map(PeerId)
fragments = st.builds(
    lambda m, i: FragmentId(f"{m}/{i}"), st.sampled_from(["trunk", "router", "expert.3", "expert.4095"]), st.integers(0, 999)
)

# Hypothesis builds every dataclass from these rules; a new type or field without a rule fails here first.
_LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: text,
    int: numbers,
    float: finite,
    bool: st.booleans(),
    bytes: st.binary(max_size=64),
    Digest: digests,
    PeerId: peers,
    FragmentId: fragments,
}


def strategy(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    if name.endswith("_bits"):
        return st.integers(0, limits.MAX_FLOAT_BITS)
    if hint in _LEAVES:
        return _LEAVES[hint]
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{one.name: strategy(hints[one.name], one.name) for one in fields(hint)})
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return st.lists(strategy(arguments[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) is tuple:
        return st.tuples(*[strategy(one) for one in arguments])
    if type(None) in arguments:
        return st.none() | strategy(next(one for one in arguments if one is not type(None)))
    return st.sampled_from(list(hint))


@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type) -> None:
    @given(strategy(cls))
    @settings(max_examples=40)
    def check(value: Any) -> None:
        back = decode(cls, encode(value))
        assert back == value
        assert getattr(back, "proof", b"") == getattr(value, "proof", b"")  # proof does not take part in ==
        assert encode(back) == encode(value)

    check()


def test_every_word_of_the_protocol_has_a_pair() -> None:
    words = typing.get_args(domain.MemberMessage) + typing.get_args(domain.ServiceMessage)
    assert set(words) <= set(PAIRS)


def test_every_pair_has_the_same_field_names() -> None:
    for cls, message in PAIRS.items():
        assert [one.name for one in fields(cls)] == [one.name for one in message.DESCRIPTOR.fields], cls.__name__


@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_foreign_bytes_are_a_value_or_malformed(cls: type) -> None:
    @given(st.binary(max_size=300))
    @settings(max_examples=60)
    def check(data: bytes) -> None:
        value_or_reason(cls, data)

    check()


@given(strategy(domain.FragmentView), st.data())
@settings(max_examples=150)
def test_damaged_views_are_a_value_or_malformed(view: domain.FragmentView, data: st.DataObject) -> None:
    raw = bytearray(encode(view))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    value_or_reason(domain.FragmentView, bytes(raw))


def value_or_reason(cls: type, data: bytes) -> None:
    """Foreign bytes give a value of ``cls``, or RejectedPayload('malformed') and nothing else."""
    try:
        value = decode(cls, data)
    except RejectedPayload as error:
        if error.reason == "malformed":
            return
        raise
    assert isinstance(value, cls)


PEER = "12D3KooWPeer"
OFFER = {"fragment": "trunk/0", "round": 1, "peer": PEER, "base": bytes(32), "packet": bytes(32)}


def offer(**changes: Any) -> Message:
    return messages_pb2.Offer(**{**OFFER, **changes})


def view(**changes: Any) -> Message:
    usual = {
        "tally": messages_pb2.Tally(),
        "fragment": "trunk/0",
        "anchor": bytes(32),
        "phase": messages_pb2.PHASE_OPEN,
        "receipts": messages_pb2.Receipts(),
    }
    return messages_pb2.FragmentView(**{**usual, **changes})


def hello(**changes: Any) -> Message:
    return messages_pb2.Hello(**{"peer": PEER, "role": messages_pb2.ROLE_TRAINER, "name": "a", "nonce": "n", **changes})


def test_the_usual_forms_below_are_valid() -> None:
    for message in (offer(), view(), hello()):
        from_wire(message)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (offer(base=bytes(31)), "Offer.base.*32 bytes"),
        (offer(round=-1), "Offer.round"),
        (offer(num_tokens=-5), "Offer.num_tokens"),
        (offer(fragment="trunk"), "Offer.fragment"),
        (offer(fragment="../../etc/0"), "Offer.fragment"),
        (offer(fragment="t" * 65 + "/0"), "Offer.fragment.*64"),
        (offer(peer=""), "Offer.peer"),
        (offer(peer="0OIl"), "Offer.peer"),
        (offer(peer="1" * 65), "Offer.peer.*64"),
        (offer(proof=bytes(4097)), "Offer.proof.*4096"),
        (hello(role=0), "Hello.role"),
        (hello(role=99), "Hello.role"),
        (hello(name="x" * 65), "Hello.name.*64"),
        (hello(name="evil\x1b[2J"), "Hello.name.*printable"),
        (hello(addresses=["a"] * 17), "Hello.addresses.*16"),
        (hello(addresses=["a" * 257]), "Hello.addresses.*256"),
        (hello(experts=messages_pb2.IntList(items=[-1])), "Hello.experts"),
        (messages_pb2.Heartbeat(peer=PEER, seq=1), "Heartbeat.counters is missing"),
        (messages_pb2.Heartbeat(peer=PEER, counters=messages_pb2.Counters(loss=math.nan)), "Counters.loss.*finite"),
        (messages_pb2.Heartbeat(peer=PEER, counters=messages_pb2.Counters(tokens_per_s=math.inf)), "Counters.tokens_per_s"),
        (messages_pb2.Goodbye(peer=PEER, why="x" * 1001), "Goodbye.why.*1000"),
        (offer(norm_bits=1 << 32), "Offer.norm_bits"),
        (messages_pb2.Entry(peer=PEER, packet=bytes(32), weight_bits=1 << 32), "Entry.weight_bits"),
        (messages_pb2.Entry(peer=PEER, packet=bytes(32), clip_bits=-1), "Entry.clip_bits"),
        (view(phase=0), "FragmentView.phase"),
        (view(recent=[messages_pb2.Outcome(phase=messages_pb2.PHASE_VOID)] * 65), "FragmentView.recent.*64"),
        (view(ready=[PEER] * (limits.MAX_LIST_ITEMS + 1)), "FragmentView.ready"),
        (view(receipts=messages_pb2.Receipts(peers=[PEER], pairs=[0, 1])), "receipts.*index"),
        (view(receipts=messages_pb2.Receipts(peers=[PEER], pairs=[0])), "receipts.*pairs"),
    ],
)
def test_malformed_names_the_field(message: Message, says: str) -> None:
    with pytest.raises(RejectedPayload, match=says) as caught:
        from_wire(message)
    assert caught.value.reason == "malformed"


def test_oversized_bytes_are_refused_before_parsing() -> None:
    with pytest.raises(RejectedPayload) as caught:
        parse(messages_pb2.Offer, bytes(101), max_bytes=100)
    assert caught.value.reason == "size"


def test_prose_is_cut_when_sent() -> None:
    goodbye = decode(domain.Goodbye, encode(domain.Goodbye(PeerId(PEER), "because\n" + "x" * 5000)))
    assert len(goodbye.why) == limits.MAX_WHY_CHARS
    assert goodbye.why.startswith("because xxx")
    assert goodbye.why.endswith("...")


def test_long_lists_of_addresses_and_outcomes_are_cut_when_sent() -> None:
    member = domain.Hello(PeerId(PEER), domain.Role.KEEPER, "a", "n", addresses=tuple(f"/ip4/10.0.0.{i}/tcp/1" for i in range(40)))
    assert decode(domain.Hello, encode(member)).addresses == member.addresses[:16]
    outcomes = tuple(domain.Outcome(i, domain.Phase.VOID, "") for i in range(100))
    anchor = Digest("0" * 64)
    one = domain.FragmentView(FragmentId("trunk/0"), 1, 1, anchor, 100, domain.Phase.VOID, "", recent=outcomes)
    assert decode(domain.FragmentView, encode(one)).recent == outcomes[-64:]


def test_a_number_nobody_can_use_is_left_out() -> None:
    counters = domain.Counters(loss=math.nan, tokens_per_s=math.inf)
    assert decode(domain.Counters, encode(counters)) == domain.Counters(loss=None, tokens_per_s=0.0)


def test_none_and_empty_are_told_apart() -> None:
    for experts in (None, (), (3,)):
        value = domain.Hello(PeerId(PEER), domain.Role.TRAINER, "a", "n", experts=experts, num_experts=0)
        assert decode(domain.Hello, encode(value)) == value


def test_our_own_mistakes_are_assertions() -> None:
    with pytest.raises(AssertionError):
        to_wire(domain.Holding(PeerId(PEER), FragmentId("trunk/0"), Digest("abc")))
    with pytest.raises(AssertionError):
        to_wire(domain.Holding(PeerId("not base58!"), FragmentId("trunk/0"), Digest("0" * 64)))


def test_receipts_of_a_full_round_are_small() -> None:
    names = [PeerId(f"12D3KooW{'A' * 42}{a}{b}") for a in "ABCDEFGH" for b in "ABCDEFGH"]
    pairs = tuple((sender, holder) for sender in names for holder in names)
    one = domain.FragmentView(FragmentId("trunk/0"), 1, 1, Digest("0" * 64), 1, domain.Phase.OPEN, "", receipts=pairs)
    assert len(pairs) == 4096
    assert len(encode(one)) < 16_000


def test_unknown_fields_of_a_newer_version_are_ignored() -> None:
    raw = encode(domain.Goodbye(PeerId(PEER), "bye")) + b"\xfa\x3f\x03new"
    assert decode(domain.Goodbye, raw) == domain.Goodbye(PeerId(PEER), "bye")


# ---------------------------------------------------------------- generated code


def test_generated_code_was_made_from_the_committed_proto_files() -> None:
    sources = sorted((ROOT / "proto/decentra/pb").glob("*.proto"))
    assert len(sources) == 2
    digest = hashlib.sha256(b"".join(one.read_bytes() for one in sources)).hexdigest()
    assert (ROOT / "decentra/pb/PROTO_SHA256").read_text().strip() == digest, "run `make proto`"


def test_generated_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    from google.protobuf import descriptor_pb2

    out = tmp_path / "set.bin"
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", "--include_imports"]
    assert protoc.main([*arguments, "decentra/pb/messages.proto", "decentra/pb/averaging.proto"]) == 0
    compiled = {one.name: one for one in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file}
    for module in (messages_pb2, averaging_pb2):
        committed = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(committed)
        assert without_json_names(committed) == without_json_names(compiled[module.DESCRIPTOR.name]), "run `make proto`"


def without_json_names(file: Any) -> Any:
    for message in file.message_type:
        for one in message.field:
            one.ClearField("json_name")
    return file
