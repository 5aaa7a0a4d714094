"""Checks that open connections: the p2p daemon starts, the bootstrap nodes answer, the averaging service is the run's own. Joins nothing.

Every check returns findings and raises nothing but programming errors; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decentra.doctor.finding import Finding, Level, failure
from decentra.errors import ConfigError, DecentraError, Refused, Unreachable
from decentra.invite import Invite

if TYPE_CHECKING:
    from decentra.averaging.link import RunDescription
    from decentra.gossip.node import GossipNode

MAX_CLOCK_SKEW_S = 3.0  # more, and DHT nodes refuse this peer's records
TCP_S, HANDSHAKE_S, START_S, SERVICE_S = 5.0, 10.0, 60.0, 10.0
DAY_S = 86_400
SOON_S = 7 * DAY_S


class Silent:
    """ports.Events for a probe: the findings tell the story."""

    def emit(self, event: str, **fields: Any) -> None:
        del event, fields


@asynccontextmanager
async def probe_node(findings: list[Finding]) -> AsyncIterator[GossipNode | None]:
    """A real p2p node on loopback with a throw-away identity, ended afterwards; None when it does not start. Adds one finding."""
    with tempfile.TemporaryDirectory(prefix="decentra-doctor-") as folder:
        node = None
        try:
            from decentra.gossip.node import GossipNode
            from decentra.identity import load_or_create_key

            key_file = Path(folder) / "probe.key"
            load_or_create_key(key_file)
            start_s = time.perf_counter()
            async with asyncio.timeout(START_S):
                node = await GossipNode.start(key_file, listen=("/ip4/127.0.0.1/tcp/0",), events=Silent())
            findings.append(Finding("p2p node", Level.OK, f"started in {time.perf_counter() - start_s:.1f} s, process {node.daemon.pid}"))
        except TimeoutError:
            findings.append(Finding("p2p node", Level.FAIL, f"did not start within {START_S:g} s", "close other programs and try again"))
        except (DecentraError, OSError, ImportError) as error:
            fix = "pip install --force-reinstall --no-deps 'hivemind>=1.1.12,<1.2'; look for a full /tmp or a security module"
            what = ConfigError(str(error)) if isinstance(error, Unreachable) else error  # nobody far away is at fault
            findings.append(failure("p2p node", what, fix))
        try:
            yield node
        finally:
            if node is not None:
                await node.close()


async def check_bootstrap(addresses: Sequence[str], node: GossipNode | None) -> list[Finding]:
    """Each bootstrap node accepts TCP and, where a local node runs, proves the peer id its address names.

    One that answers is enough to join: the others are warnings then.
    """
    fix = "ask the organiser whether 'decentra host' runs and its port is open; try another network"
    found = [await _ask_bootstrap(text, node, fix) for text in addresses]
    if any(f.level is Level.OK for f in found):
        return [f if f.level is not Level.UNREACHABLE else Finding(f.check, Level.WARN, f.found, f.fix) for f in found]
    return found or [Finding("bootstrap", Level.FAIL, "the invite names no bootstrap node", "ask the organiser for a new invite")]


async def _ask_bootstrap(text: str, node: GossipNode | None, fix: str) -> Finding:
    from decentra.gossip.address import parse_multiaddr

    try:
        address = parse_multiaddr(text)
    except ConfigError as error:
        return failure("bootstrap", error, "ask the organiser for a new invite")
    start_s = time.perf_counter()
    try:
        async with asyncio.timeout(TCP_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
        writer.transport.abort()
    except TimeoutError:
        return failure("bootstrap", Unreachable(f"{text} does not answer within {TCP_S:g} s"), fix)
    except OSError as error:
        return failure("bootstrap", Unreachable(f"{text}: {error.strerror or error}"), fix)
    connect_ms = 1000 * (time.perf_counter() - start_s)
    if node is None or address.peer is None:
        return Finding("bootstrap", Level.OK, f"{address.dial} accepts connections ({connect_ms:.0f} ms)")
    try:
        await node.connect(address.peer, (text,), HANDSHAKE_S)
    except DecentraError as error:
        return failure("bootstrap", Unreachable(f"{address.dial} is open, but the node of the invite is not behind it: {error}"), fix)
    return Finding("bootstrap", Level.OK, f"{address.dial} is {address.peer} ({connect_ms:.0f} ms)")


async def ask_service(invite: Invite, *, wall_s: float | None = None) -> tuple[list[Finding], RunDescription | None]:
    """The averaging service shows a TLS certificate that the run key vouches for, and takes the invite's token for reading.

    ``wall_s``: Unix time to measure this machine's clock by; its own by default.
    """
    from decentra.averaging.client import AveragingClient
    from decentra.wire.trust import TrustChain

    trust = TrustChain(invite.run_id, invite.run_public)
    now_s = time.time() if wall_s is None else wall_s
    findings = _check_token(invite, trust, now_s)
    client = AveragingClient(invite.services, trust, Silent(), token=invite.token, wall=lambda: now_s, call_s=SERVICE_S)
    try:
        described = await client.describe()
    except Refused as error:
        return [*findings, failure("averaging service", error, "ask the organiser for a new invite")], None
    except Unreachable as error:
        fix = "ask the organiser whether 'decentra host' runs and its port is open; try another network"
        return [*findings, failure("averaging service", error, fix)], None
    except DecentraError as error:
        fix = "do not join; ask the organiser over another channel, this may be somebody else's service or another version"
        return [*findings, failure("averaging service", error, fix)], None
    finally:
        await client.close()
    return [*findings, _service_finding(described, now_s), check_clock(described.clock_offset_s)], described


def _check_token(invite: Invite, trust: Any, now_s: float) -> list[Finding]:
    if not invite.token:
        return [Finding("invite", Level.OK, f"run {invite.run_id[:12]}, no token: admission has to be open")]
    try:
        token = trust.check_token(invite.token, now_s)
    except Refused as error:
        return [failure("invite", error, "ask the organiser for a new invite")]
    role = f", as {token.role} only" if token.role is not None else ""
    return [
        Finding(
            "invite", Level.OK, f"run {invite.run_id[:12]}, {token.uses} uses, {(token.expires_at_s - now_s) / DAY_S:.1f} days left{role}"
        )
    ]


def _service_finding(described: RunDescription, now_s: float) -> Finding:
    left_s = described.certificate.not_after_s - now_s
    what = (
        f"run '{described.manifest.name}' at {described.address}; TLS certificate {described.certificate.tls_fingerprint.hex()[:12]}"
        f" is signed for by the run key, {left_s / DAY_S:.0f} days left"
    )
    if left_s < SOON_S:
        return Finding("averaging service", Level.WARN, what, "organiser: restart 'decentra host' where run.key is")
    return Finding("averaging service", Level.OK, what)


def check_clock(offset_s: float) -> Finding:
    """``offset_s``: what has to be added to this machine's clock to get the service's."""
    what = f"{abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} the averaging service"
    if abs(offset_s) > MAX_CLOCK_SKEW_S:
        return Finding("clock", Level.FAIL, f"{what}, at most {MAX_CLOCK_SKEW_S:g} s are tolerated", "sudo timedatectl set-ntp true")
    return Finding("clock", Level.OK, what)


def _listening(port: int) -> socket.socket:
    """A socket for IPv4, and for IPv6 where this machine has it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


async def check_reachability(invite: Invite, port: int) -> Finding:
    """Whether others can connect to this machine: the averaging service sees its address and calls it back at ``port`` (0: any free one)."""
    import ipaddress
    import os

    import psutil

    from decentra.averaging.client import AveragingClient
    from decentra.averaging.probe import NONCE_BYTES
    from decentra.wire.trust import TrustChain

    nonce = os.urandom(NONCE_BYTES)

    async def show(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(nonce)
        writer.close()

    try:
        listener = await asyncio.start_server(show, sock=_listening(port))
    except OSError as error:
        fix = "end what listens there, or check another one with --port"
        return Finding("reachability", Level.WARN, f"cannot listen on port {port} ({error.strerror})", fix)
    client = AveragingClient(invite.services, TrustChain(invite.run_id, invite.run_public), Silent(), token=invite.token, call_s=SERVICE_S)
    try:
        async with listener:
            asked = listener.sockets[0].getsockname()[1]
            reply = await client.probe(asked, nonce)
    except Refused as error:
        return Finding("reachability", Level.WARN, str(error), "ask again")
    except DecentraError as error:
        return failure("reachability", error, "ask again; an older service cannot call back")
    finally:
        await client.close()
    own = {a.address.partition("%")[0] for each in psutil.net_if_addrs().values() for a in each}
    is_loopback = ipaddress.ip_address(reply.address).is_loopback
    place = "this machine's own address" if reply.address in own else "a router's address, this machine is behind it (NAT)"
    if reply.is_reachable:
        what = f"others can connect to {reply.address} port {asked}" + (
            " (loopback: the service runs on this machine)" if is_loopback else ""
        )
        return Finding("reachability", Level.OK, what)
    kind = f"ip{ipaddress.ip_address(reply.address).version}"
    fix = (
        f"nothing: 'join' needs outbound connections only, packets then pass through keepers. To be reachable forward TCP port {asked} to this"
        f" machine and join with --listen /ip4/0.0.0.0/tcp/{asked} --announce /{kind}/{reply.address}/tcp/{asked}"
    )
    return Finding("reachability", Level.WARN, f"seen as {reply.address}, {place}; {reply.why}", fix)
