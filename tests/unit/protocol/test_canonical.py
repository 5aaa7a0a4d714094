"""Canonical JSON: equal values give equal bytes, bytes give back the value, and nothing else is taken."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.errors import RejectedPayload
from decentra.ids import Digest, PeerId
from decentra.protocol import ledger
from decentra.protocol.canonical import from_bytes, to_bytes
from decentra.protocol.messages import Entry, FragmentView, Hello, Holding, Phase, Role, Settlement, SwarmView


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    count: int
    share: float
    raw: bytes
    role: Role
    pairs: tuple[tuple[str, int], ...] = ()
    maybe: float | None = None
    inner: Holding | None = None
    flag: bool = False


texts = st.text(max_size=20)
samples = st.builds(
    Sample, texts, st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False, allow_infinity=False), st.binary(max_size=20),
    st.sampled_from(Role), st.lists(st.tuples(texts, st.integers()), max_size=3).map(tuple),
    st.none() | st.floats(allow_nan=False, allow_infinity=False), st.none() | st.builds(Holding, texts, texts, texts), st.booleans(),
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(samples)
def test_round_trip(sample: Sample) -> None:
    data = to_bytes(sample)
    assert from_bytes(Sample, data) == sample
    assert to_bytes(from_bytes(Sample, data)) == data


@given(st.from_type(Settlement) | st.from_type(SwarmView) | st.from_type(Hello) | st.from_type(FragmentView))
@settings(max_examples=60)
def test_round_trip_of_the_protocols_own_words(value: object) -> None:
    try:
        data = to_bytes(value)
    except ValueError:  # a loss that is not a number has no canonical form
        return
    assert to_bytes(from_bytes(type(value), data)) == data


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_foreign_bytes_are_a_value_or_refused(data: bytes) -> None:
    for cls in (Sample, Settlement, ledger.Confirmed, FragmentView):
        try:
            value = from_bytes(cls, data)
        except RejectedPayload as error:
            assert error.reason in ("malformed", "size")  # noqa: PT017
        else:
            assert isinstance(value, cls)


@given(samples, st.data())
def test_a_changed_field_is_noticed(sample: Sample, data: st.DataObject) -> None:
    raw = json.loads(to_bytes(sample))
    key = data.draw(st.sampled_from(sorted(raw)))
    raw[key] = data.draw(json_values)
    try:
        value = from_bytes(Sample, json.dumps(raw).encode())
    except RejectedPayload as error:
        assert error.reason == "malformed"  # noqa: PT017
        return
    assert json.loads(to_bytes(value))[key] == raw[key]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"count": "1"}, "count"),
        ({"count": True}, "count"),
        ({"count": 1.0}, "count"),
        ({"flag": 1}, "flag"),
        ({"raw": "zz"}, "hex"),
        ({"raw": None}, "hex"),
        ({"role": "king"}, "king"),
        ({"pairs": [["a"]]}, "pairs"),
        ({"pairs": {}}, "list"),
        ({"inner": {"peer": "p"}}, "missing"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"name": None}, "name"),
    ],
)
def test_strictness(change: dict[str, object], what: str) -> None:
    raw = json.loads(to_bytes(Sample("a", 1, 0.5, b"\1", Role.KEEPER)))
    with pytest.raises(RejectedPayload, match=what):
        from_bytes(Sample, json.dumps({**raw, **change}).encode())


def test_hex_has_one_form() -> None:
    raw = json.loads(to_bytes(Sample("a", 1, 0.5, b"\xab\xcd", Role.KEEPER)))
    for other in ("ABCD", "ab cd"):
        with pytest.raises(RejectedPayload, match="hex"):
            from_bytes(Sample, json.dumps({**raw, "raw": other}).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    line = to_bytes(Sample("a", 1, 0.5, b"", Role.KEEPER)).replace(b'"share":0.5', f'"share":{number}'.encode())
    with pytest.raises(RejectedPayload):
        from_bytes(Sample, line)


def test_a_huge_integer_is_no_crash() -> None:
    line = to_bytes(Sample("a", 1, 0.5, b"", Role.KEEPER))
    for text in (line.replace(b'"share":0.5', b'"share":' + b"9" * 400), line.replace(b'"count":1', b'"count":' + b"9" * 5000)):
        with pytest.raises(RejectedPayload):
            from_bytes(Sample, text)


def test_limits() -> None:
    with pytest.raises(RejectedPayload, match="at most 10"):
        from_bytes(Sample, b"{" + b" " * 10 + b"}", max_bytes=10)
    with pytest.raises(RejectedPayload):
        from_bytes(Sample, b"[" * 100_000)


def test_defaults_may_be_absent_and_keys_are_sorted() -> None:
    line = b'{"clip_bits":5,"norm_bits":4,"num_bytes":1,"num_tokens":2,"packet":"x","peer":"p","weight_bits":3}'
    entry = Entry(PeerId("p"), Digest("x"), 1, 2, 3, 4, 5)
    assert from_bytes(Entry, line) == entry
    whole = b'{"clip_bits":5,"norm_bits":4,"num_bytes":1,"num_steps":0,"num_tokens":2,"packet":"x","peer":"p","proof":"","weight_bits":3}'
    assert to_bytes(entry) == whole
    assert from_bytes(Entry, whole) == entry
    assert from_bytes(ledger.GaveUp, to_bytes(ledger.GaveUp("trunk/0", 1, Phase.VOID, ""))).phase is Phase.VOID  # type: ignore[arg-type]
