"""Addresses: TCP only, checked before they reach anything that dials."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decentra.errors import ConfigError
from decentra.gossip.address import MAX_ADDRESSES, check_multiaddr, dialable
from decentra.gossip.contacts import MAX_FAILURES, MAX_KNOWN, Contacts
from decentra.identity import Keypair

PEER, OTHER = (Keypair.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/tcp/80", f"/dns4/a-b.example/tcp/1/p2p/{PEER}", "/ip6/::1/tcp/65535", "/dns/x/tcp/0"])
def test_good_addresses_are_kept(text: str) -> None:
    assert check_multiaddr(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.2.3.4:80",
        "/ip4/1.2.3.4/udp/80/quic-v1",
        "/ip4/1.2.3.4/udp/80",
        "/ip4/1.2.3.4/tcp/80/ws",
        f"/ip4/1.2.3.4/tcp/80/p2p/{PEER}/p2p-circuit",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.400/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1/x",
        "/unix/tmp/x/tcp/1",
        "/dns4/a b/tcp/1",
        "/ip4/1.2.3.4/tcp/1/p2p/QmNotEd25519",
        "/ip4/1.2.3.4/tcp/1/" + "x" * 400,
    ],
)
def test_bad_addresses_say_what_was_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|at most|uses TCP|Expected|Octet|not permitted|host name"):
        check_multiaddr(text)


@given(st.text(max_size=200))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert check_multiaddr(check_multiaddr(text)) == check_multiaddr(text)


def test_dialable_leaves_out_what_is_not_this_peers() -> None:
    texts = [
        f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/1",
        f"/ip4/6.6.6.6/tcp/1/p2p/{OTHER}",
        "/ip4/1.2.3.4/udp/1/quic-v1",
        "/ip4/1.2.3.4/tcp/0",
        "nonsense",
    ]
    assert dialable(PEER, texts) == ("/ip4/1.2.3.4/tcp/1", "/ip6/2001:db8::1/tcp/1")
    assert len(dialable(PEER, [f"/ip4/1.2.3.4/tcp/{port}" for port in range(1, 100)])) == MAX_ADDRESSES


def test_contacts_forget_the_silent_but_never_a_bootstrap_node() -> None:
    contacts = Contacts(PEER, [f"/ip4/1.2.3.4/tcp/1/p2p/{OTHER}"])
    third = Keypair.from_seed(b"\3" * 32).peer_id
    contacts.remember(third, ["/ip4/5.6.7.8/tcp/2"])
    contacts.remember(PEER, ["/ip4/9.9.9.9/tcp/2"])
    assert contacts.known() == (f"/ip4/5.6.7.8/tcp/2/p2p/{third}",)
    for _ in range(MAX_FAILURES):
        contacts.failed(third)
        contacts.failed(OTHER)
    assert contacts.known() == ()
    assert [peer for peer, _ in contacts.to_greet(8)] == [OTHER]
    for number in range(MAX_KNOWN + 5):
        contacts.remember(Keypair.from_seed(number.to_bytes(32, "big")).peer_id, ["/ip4/5.6.7.8/tcp/2"])
    assert len(contacts.known()) == MAX_KNOWN
