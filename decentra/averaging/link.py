"""A checked connection to an averaging service: its TLS certificate is pinned through the run key before anything of ours is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from decentra.averaging import rpc
from decentra.averaging.mapping import calling
from decentra.averaging.tls import TLS_NAME, fetch_certificate, fingerprint_of, pem_of
from decentra.config import Manifest
from decentra.errors import ConfigError, DecentraError, IntegrityError, ManifestMismatch, Refused, Unreachable, VersionMismatch
from decentra.ids import RunId
from decentra.pb import averaging_pb2 as pb
from decentra.wire import limits
from decentra.wire.convert import dump, parse, take_digest
from decentra.wire.trust import ServiceCertificate, TrustChain

MAX_DESCRIBE_BYTES = 2 << 20


@dataclass(frozen=True)
class LinkRules:
    """Deadlines of a client. ``wall`` is Unix time in seconds."""

    wall: Callable[[], float]
    call_s: float = rpc.CALL_S
    keepalive_s: float = rpc.KEEPALIVE_S


@dataclass(frozen=True)
class Link:
    """One channel to the service the run key vouches for. ``clock_offset_s``: add it to our Unix time to get the service's."""

    address: str
    channel: Any
    certificate: ServiceCertificate
    sealed_certificate: bytes
    clock_offset_s: float
    rules: LinkRules

    @property
    def service_time_s(self) -> float:
        return self.rules.wall() + self.clock_offset_s

    async def call(self, name: str, data: bytes, *, credentials: bytes = b"", token: bytes = b"") -> bytes:
        """One request, one reply. Raises the errors of ``mapping``."""
        with calling(self.address):
            method = rpc.multicallable(self.channel, name)
            reply: bytes = await method(data, timeout=self.rules.call_s, metadata=rpc.metadata_of(credentials, token))
            return reply

    async def read_all(self, name: str, data: bytes, most: int, *, credentials: bytes = b"", token: bytes = b"") -> list[bytes]:
        """One request, a stream of at most ``most`` replies. Raises the errors of ``mapping``."""
        replies: list[bytes] = []
        call = rpc.multicallable(self.channel, name)(data, timeout=6 * self.rules.call_s, metadata=rpc.metadata_of(credentials, token))
        with calling(self.address, call):
            async for reply in call:
                replies.append(reply)
                if len(replies) >= most:
                    call.cancel()
                    break
        return replies

    async def close(self) -> None:
        await self.channel.close()


@dataclass(frozen=True)
class RunDescription:
    """What a service says about its run, checked against the run key."""

    manifest: Manifest
    certificate: ServiceCertificate
    sealed_certificate: bytes
    address: str
    clock_offset_s: float  # add it to our Unix time to get the service's


async def describe(addresses: Sequence[str], trust: TrustChain, token: bytes | None, *, rules: LinkRules) -> RunDescription:
    """Ask the first service that answers for the run's manifest. Raises what ``open_link`` raises, and Refused."""
    link = await open_link(addresses, trust, rules)
    try:
        return await describe_over(link, trust, token=token or b"")
    finally:
        await link.close()


async def describe_over(link: Link, trust: TrustChain, *, credentials: bytes = b"", token: bytes = b"") -> RunDescription:
    reply = parse(pb.DescribeReply, await link.call("Describe", dump(pb.DescribeRequest()), credentials=credentials, token=token))
    if not reply.manifest:
        raise Refused(f"the averaging service at {link.address} shows the manifest to invited peers only; use an invite with a token")
    manifest = trust.check_manifest(reply.manifest)
    return RunDescription(manifest, link.certificate, link.sealed_certificate, link.address, link.clock_offset_s)


async def open_link(addresses: Sequence[str], trust: TrustChain, rules: LinkRules) -> Link:
    """Connect to the first address behind which the right service answers.

    Raises Unreachable (nobody answers), IntegrityError (somebody else answers), VersionMismatch, ManifestMismatch (another run's
    service): of several failures the one that says most.
    """
    if not addresses:
        raise ConfigError("no address of an averaging service is known; give one, or an invite that has one")
    errors: list[DecentraError] = []
    for address in addresses:
        try:
            return await _open_one(address, trust, rules)
        except DecentraError as error:
            errors.append(error)
    raise next((error for error in errors if not isinstance(error, Unreachable)), errors[0])


async def _open_one(address: str, trust: TrustChain, rules: LinkRules) -> Link:
    der = await fetch_certificate(address, rules.call_s)
    credentials = grpc.ssl_channel_credentials(root_certificates=pem_of(der))
    channel = grpc.aio.secure_channel(address, credentials, options=rpc.client_options(rules.keepalive_s, TLS_NAME))
    try:
        return await _check_service(address, channel, fingerprint_of(der), trust, rules)
    except BaseException:
        await asyncio.shield(channel.close())
        raise


async def _check_service(address: str, channel: Any, fingerprint: bytes, trust: TrustChain, rules: LinkRules) -> Link:
    asked_s = rules.wall()
    with calling(address):
        # Nothing of ours goes out before the answer is checked: no credentials, no token, not even which run we mean.
        data = await rpc.multicallable(channel, "Describe")(dump(pb.DescribeRequest()), timeout=rules.call_s)
    now_s = rules.wall()
    reply = parse(pb.DescribeReply, data, max_bytes=MAX_DESCRIBE_BYTES)
    if reply.protocol_version != limits.PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the averaging service at {address} speaks protocol {reply.protocol_version}, we speak {limits.PROTOCOL_VERSION};"
            " update the older side"
        )
    run = RunId(take_digest(reply.run, "DescribeReply.run"))
    if run != trust.run_id:
        raise ManifestMismatch(trust.run_id, run, what=f"the run served at {address}")
    try:
        certificate = trust.check_certificate(reply.certificate, now_s)
    except Refused as error:
        raise IntegrityError(f"the averaging service at {address} has no valid certificate of the run key: {error}") from None
    if certificate.tls_fingerprint != fingerprint:
        raise IntegrityError(
            f"the averaging service at {address} shows TLS certificate {fingerprint.hex()[:16]}, the run key vouches for"
            f" {certificate.tls_fingerprint.hex()[:16]}: somebody stands between, or the organiser has to issue a new service certificate"
        )
    if (replaced := trust.why_replaced(certificate)) is not None:
        raise Unreachable(f"the averaging service at {address} was replaced: {replaced}")
    trust.note(certificate)
    offset_s = reply.server_time_s - (asked_s + now_s) / 2
    return Link(address, channel, certificate, reply.certificate, offset_s, rules)
