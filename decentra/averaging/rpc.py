"""What both sides of the gRPC adapter share: method paths from the proto file, channel options, metadata. No state.

Calls carry raw bytes and wire/ parses them, so that foreign bytes are judged in one place and signatures cover what travelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from decentra.pb import averaging_pb2
from decentra.wire import limits

SERVICE = averaging_pb2.DESCRIPTOR.services_by_name["Averaging"]
METHODS = {method.name: method for method in SERVICE.methods}

PROTOCOL_KEY, CREDENTIALS_KEY, TOKEN_KEY = "decentra-protocol", "decentra-credentials-bin", "decentra-token-bin"

CALL_S = 10.0
FIRST_FRAME_S = 10.0
KEEPALIVE_S = 30.0
KEEPALIVE_TIMEOUT_S = 20.0  # a saturated home uplink can hold a ping back for seconds
MAX_STREAMS_PER_CONNECTION = 64

_MULTI = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def path_of(name: str) -> str:
    return f"/{SERVICE.full_name}/{METHODS[name].name}"


def multicallable(channel: grpc.aio.Channel, name: str) -> Any:
    """The channel's callable for a method of the proto file, over raw bytes."""
    method = METHODS[name]
    return getattr(channel, _MULTI[method.client_streaming, method.server_streaming])(path_of(name))


def generic_handler(handlers: dict[str, Any]) -> grpc.GenericRpcHandler:
    """Handlers by method name, one for each method of the proto file, over raw bytes."""
    assert handlers.keys() == METHODS.keys(), f"the proto file has {sorted(METHODS)}, there are handlers for {sorted(handlers)}"
    table = {}
    for name, method in METHODS.items():
        make = getattr(grpc, f"{_MULTI[method.client_streaming, method.server_streaming]}_rpc_method_handler")
        table[name] = make(handlers[name])
    return grpc.method_handlers_generic_handler(SERVICE.full_name, table)


def channel_options(keepalive_s: float) -> list[tuple[str, Any]]:
    """Options of both sides: bounded messages and metadata, dead connections noticed."""
    timeout_ms = int(min(KEEPALIVE_TIMEOUT_S, keepalive_s) * 1000)
    return [
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", 2 * limits.MAX_MESSAGE_BYTES),  # the receiver decides, and says so
        ("grpc.max_metadata_size", limits.MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", limits.MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # gRPC also pings to measure bandwidth, and sends no keepalive while such a ping is unanswered: it needs the same patience.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(keepalive_s: float) -> list[tuple[str, Any]]:
    return [
        *channel_options(keepalive_s),
        ("grpc.so_reuseport", 0),  # otherwise two services could share one port, each with half of the members
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(keepalive_s * 500)),
        # A busy client's pings bunch up, those that measure bandwidth among them; the default ends its connection ("too_many_pings").
        ("grpc.http2.max_ping_strikes", 0),
    ]


def client_options(keepalive_s: float, tls_name: str) -> list[tuple[str, Any]]:
    return [
        *channel_options(keepalive_s),
        ("grpc.ssl_target_name_override", tls_name),
        ("grpc.default_authority", tls_name),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel starts without the back-off of an old one
    ]


def metadata_of(credentials: bytes = b"", token: bytes = b"") -> tuple[tuple[str, str | bytes], ...]:
    """Metadata of a call; empty papers are left out."""
    papers = ((CREDENTIALS_KEY, credentials), (TOKEN_KEY, token))
    return ((PROTOCOL_KEY, str(limits.PROTOCOL_VERSION)), *((key, value) for key, value in papers if value))


def read_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str | bytes]:
    """Metadata as a dict; of a key that comes twice the first value counts."""
    found: dict[str, str | bytes] = {}
    for key, value in metadata or ():
        found.setdefault(key, value)
    return found


def papers_of(metadata: dict[str, str | bytes], key: str) -> bytes:
    value = metadata.get(key, b"")
    return value if isinstance(value, bytes) else b""
