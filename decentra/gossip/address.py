"""Multiaddresses as text: which ones decentra accepts, dials and listens on. Opens a socket only to see whether a port is free."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from decentra.errors import ConfigError, DecentraError, PortTaken
from decentra.identity import public_key_of
from decentra.ids import PeerId

MAX_ADDRESS_CHARS = 300
MAX_ADDRESSES = 16  # of one peer; more is an attempt to make us dial around

_HOST_KINDS = ("ip4", "dns4", "dns", "ip6", "dns6")  # in the order they are dialled: IPv6 alone is often broken at home
_DNS_NAME = re.compile(r"^(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?$")
_EXAMPLE = "/ip4/203.0.113.7/tcp/7410/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True)
class Address:
    """One TCP multiaddress, for example /ip4/203.0.113.7/tcp/7410, with the peer id it ends in, if any."""

    kind: str
    host: str
    port: int
    peer: PeerId | None = None

    @property
    def dial(self) -> str:
        """The address without the peer id."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    def __str__(self) -> str:
        return self.dial if self.peer is None else f"{self.dial}/p2p/{self.peer}"

    @property
    def is_loopback(self) -> bool:
        return self.kind.startswith("ip") and ipaddress.ip_address(self.host).is_loopback


def parse_multiaddr(text: str) -> Address:
    """Parse one address. Raises ConfigError, which says what is wrong with it."""
    if len(text) > MAX_ADDRESS_CHARS:
        raise ConfigError(f"address {text[:40]!r}... has {len(text)} characters, at most {MAX_ADDRESS_CHARS} are allowed")
    parts = text.strip().split("/")
    if len(parts) not in (5, 7) or parts[0] != "":
        raise ConfigError(f"address {text!r}: expected something like {_EXAMPLE}")
    kind, host, transport, port_text = parts[1:5]
    if transport != "tcp":
        raise ConfigError(f"address {text!r}: decentra uses TCP only, got {transport!r}; expected something like {_EXAMPLE}")
    if not port_text.isascii() or not port_text.isdigit() or len(port_text) > 5 or int(port_text) > 65535:
        raise ConfigError(f"address {text!r}: expected a port from 0 to 65535, got {port_text!r}")
    host = _check_host(text, kind, host)
    if len(parts) == 5:
        return Address(kind, host, int(port_text))
    if parts[5] != "p2p":
        raise ConfigError(f"address {text!r}: expected /p2p/PEER after the port, got /{parts[5]}")
    try:
        public_key_of(PeerId(parts[6]))
    except DecentraError as error:
        raise ConfigError(f"address {text!r}: {error}") from None
    return Address(kind, host, int(port_text), PeerId(parts[6]))


def check_multiaddr(text: str) -> str:
    """``text`` in its normal form. Raises ConfigError."""
    return str(parse_multiaddr(text))


def _check_host(text: str, kind: str, host: str) -> str:
    if kind in ("ip4", "ip6"):
        try:
            return str(ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host))
        except ValueError as error:
            raise ConfigError(f"address {text!r}: {error}") from None
    if kind not in _HOST_KINDS:
        raise ConfigError(f"address {text!r}: expected one of {', '.join(_HOST_KINDS)}, got {kind!r}")
    if not _DNS_NAME.match(host):
        raise ConfigError(f"address {text!r}: {host!r} is no host name")
    return host


def dialable(peer: PeerId, texts: Iterable[str]) -> tuple[str, ...]:
    """The addresses among ``texts`` at which ``peer`` may be dialled, without the peer id, IPv4 first.

    Foreign text: what is malformed, not TCP, port 0 or of another peer is left out; at most ``MAX_ADDRESSES`` are returned.
    """
    found: dict[str, Address] = {}
    for text in texts:
        try:
            address = parse_multiaddr(text)
        except ConfigError:
            continue
        if address.port and address.peer in (None, peer):
            found.setdefault(address.dial, address)
    return tuple(sorted(found, key=lambda dial: _HOST_KINDS.index(found[dial].kind)))[:MAX_ADDRESSES]


def visible_first(addresses: Iterable[Address]) -> tuple[Address, ...]:
    """Loopback last: it is of use on this machine only."""
    return tuple(sorted(addresses, key=lambda address: address.is_loopback))


def claim_ports(texts: Sequence[str]) -> tuple[str, ...]:
    """Listen addresses with every port 0 replaced by a free port, so that a restarted daemon comes back on the same one.

    The daemon shares ports with other daemons of this user (SO_REUSEPORT) and would not notice a taken one, so it is looked at here.
    Raises PortTaken, or ConfigError for an address that is not of this machine.
    """
    return tuple(_claim_port(parse_multiaddr(text)) for text in texts)


def _claim_port(address: Address) -> str:
    if not address.kind.startswith("ip"):
        raise ConfigError(f"listen address {address}: give an IP address of this machine, for example /ip4/0.0.0.0/tcp/{address.port}")
    family = socket.AF_INET if address.kind == "ip4" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"port {address.port} of {address.host} is in use by another process; stop it, or listen on another port"
                    f" (/{address.kind}/{address.host}/tcp/0 takes any free one)"
                ) from None
            raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
        return Address(address.kind, address.host, int(probe.getsockname()[1])).dial
