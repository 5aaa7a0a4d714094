"""The invite line: round trips, every slip is noticed, every error says what is wrong."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.errors import ConfigError, InviteError
from decentra.identity import Keypair
from decentra.ids import RunId
from decentra.invite import PREFIX, Invite, parse_invite, split_address

RUN = RunId(hashlib.sha256(b"run").hexdigest())
KEY = Keypair.from_seed(bytes(range(32)))
BOOTSTRAP = f"/ip4/203.0.113.145/tcp/7410/p2p/{KEY.peer_id}"

addresses = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255)
services = st.builds(
    lambda host, port: f"{host}:{port}",
    st.one_of(st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True), st.just("[2001:db8::1]")),
    st.integers(0, 65535),
)
invites = st.builds(
    Invite,
    run_id=st.binary(min_size=32, max_size=32).map(lambda raw: RunId(raw.hex())),
    run_public=st.binary(min_size=32, max_size=32),
    bootstrap=st.lists(addresses, max_size=8).map(tuple),
    services=st.lists(services, max_size=4).map(tuple),
    token=st.binary(max_size=255),
)


def example() -> Invite:
    return Invite(RUN, KEY.public, (BOOTSTRAP,), ("averager.example.org:7411",), bytes(range(86)))


@given(invites)
def test_round_trip(invite: Invite) -> None:
    assert parse_invite(invite.encode()) == invite


def test_every_single_character_slip_is_detected() -> None:
    line = example().encode()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_ =+"
    for index in range(len(line)):
        for char in alphabet:
            if char != line[index]:
                with pytest.raises(InviteError):
                    parse_invite(line[:index] + char + line[index + 1 :])


@given(invites, st.data())
@settings(max_examples=50)
def test_a_slip_is_detected_in_every_length_of_invite(invite: Invite, data: st.DataObject) -> None:
    line = invite.encode()
    index = data.draw(st.integers(0, len(line) - 1))
    char = data.draw(st.characters(codec="ascii").filter(lambda c: c != line[index]))
    with pytest.raises(InviteError):
        parse_invite(line[:index] + char + line[index + 1 :])
    with pytest.raises(InviteError):
        parse_invite(line[:index] + line[index + 1 :])


def test_a_usual_invite_is_short() -> None:
    line = example().encode()
    assert len(line) < 500
    assert line.startswith("decentra1_")


def test_white_space_of_a_wrapped_line_does_not_matter() -> None:
    line = example().encode()
    assert parse_invite(f"  {line[:70]}\n   {line[70:140]}\r\n{line[140:]} \n") == example()


def sealed(payload: bytes) -> str:
    checksum = hashlib.sha256(PREFIX.encode() + payload).digest()[:6]
    return PREFIX + base64.urlsafe_b64encode(payload + checksum).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "starts with 'decentra1_'"),
        ("https://example.org/join", "starts with 'decentra1_'"),
        (example().encode().replace("decentra1_", "decentra2_"), "format 2"),
        (example().encode()[:-7], "truncated or mistyped"),
        (example().encode()[:40], "truncated or mistyped"),
        (PREFIX, "no character|truncated|holds"),
        (PREFIX + "AAAAA", "truncated or mistyped"),
        (example().encode() + "!", "'!'"),
        (PREFIX + "A" * 5000, "at most 4096"),
        (sealed(b"too short"), "written wrongly"),
        (sealed(bytes(64) + b"\x09"), "list of 9 items"),
        (sealed(bytes(64) + b"\x01\x05ab"), "cut off"),
        (sealed(bytes(64) + b"\x00\x00\x00" + b"x"), "left over"),
        (sealed(bytes(64) + b"\x01\x01\xff\x00\x00"), "written wrongly"),
        (sealed(bytes(64) + b"\x00\x01\x03a:b\x00"), "service address"),
    ],
)
def test_errors_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(InviteError, match=says):
        parse_invite(text)


@given(st.binary(max_size=200))
def test_well_sealed_rubbish_is_an_invite_error_or_an_invite(payload: bytes) -> None:
    with contextlib.suppress(InviteError):
        assert isinstance(parse_invite(sealed(payload)), Invite)


def test_the_token_is_not_printed() -> None:
    assert repr(bytes(range(86)))[2:20] not in repr(example())


def test_what_cannot_be_written_is_refused() -> None:
    for broken in (
        Invite(RunId("x"), KEY.public),
        Invite(RUN, b"short"),
        Invite(RUN, KEY.public, ("a",) * 9),
        Invite(RUN, KEY.public, ("",)),
        Invite(RUN, KEY.public, ("x" * 256,)),
        Invite(RUN, KEY.public, ("/dns/k\u00f6ln/tcp/1",)),
        Invite(RUN, KEY.public, (), ("nowhere",)),
    ):
        with pytest.raises(InviteError):
            broken.encode()


def test_split_address() -> None:
    assert split_address("averager.example.org:7411") == ("averager.example.org", 7411)
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[2001:db8::1]:7411") == ("2001:db8::1", 7411)
    for wrong in ("", "host", "host:", ":7411", "host:70000", "2001:db8::1:7411", "ho st:1", "host:7411/x"):
        with pytest.raises(ConfigError, match="expected an address"):
            split_address(wrong)
