"""Signed, expiring DHT records: what a peer says about itself under a key, one subkey per peer. Soft state only: nothing here is proof.

A record is canonical JSON of run, key, peer, expiry and body, signed by the peer. Storing nodes and readers check it alike, so a forged
record is neither kept nor believed. Who may say what (is this the service? is this peer admitted?) is decided above.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.serializer import MSGPackSerializer

from decentra.errors import DecentraError, RejectedPayload, Unreachable
from decentra.identity import Keypair, is_signed, public_key_of
from decentra.ids import Digest, PeerId, RunId

if TYPE_CHECKING:
    from decentra.gossip.node import GossipNode

MAX_RECORD_BYTES = 8 << 10
MAX_TTL_S = 600.0
CLOCK_SLACK_S = 60.0  # a storing node's clock may be behind the publisher's
DHT_TIMEOUT_S = 10.0
NUM_HEARD_KEYS = 16  # a node keeps 128 KiB under one: enough for a thousand members

_FIELDS = {"body", "expires", "key", "peer", "run", "sig"}
_PURPOSE = "record"


@dataclass(frozen=True, slots=True)
class RecordKey:
    """Where records of one kind are found; ``name`` is the DHT key."""

    run: RunId
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """What ``peer`` signed. ``expires`` is Unix time in seconds."""

    key: RecordKey
    peer: PeerId
    body: bytes
    expires: float


def service_key(run: RunId) -> RecordKey:
    """Where the averaging service advertises itself."""
    return RecordKey(run, f"svc/{run}")


def heard_key(run: RunId, peer: PeerId) -> RecordKey:
    """Where ``peer`` says what the averaging service told it: members are spread over ``NUM_HEARD_KEYS`` by the end of their ids, which begin alike."""
    return heard_keys(run)[sum(peer[-2:].encode()) % NUM_HEARD_KEYS]


def heard_keys(run: RunId) -> tuple[RecordKey, ...]:
    return tuple(RecordKey(run, f"heard/{run}/{number}") for number in range(NUM_HEARD_KEYS))


def blob_key(run: RunId, digest: Digest) -> RecordKey:
    """Where the providers of a blob are found."""
    return RecordKey(run, f"blob/{run}/{digest}")


async def publish(node: GossipNode, key: RecordKey, body: bytes, ttl_s: float, *, timeout_s: float = DHT_TIMEOUT_S) -> bool:
    """Sign and store our record under ``key`` for ``ttl_s`` seconds (at most ``MAX_TTL_S``), replacing the one before.

    True when a node took it, which proves nothing: publish again well before it expires. Raises RejectedPayload (body too large),
    Unreachable (no answer within ``timeout_s``).
    """
    expires = round(time.time() + min(ttl_s, MAX_TTL_S), 3)
    record = encode_record(node.keypair, key, body, expires)
    with _mapped(f"storing {key.name}", timeout_s):
        async with asyncio.timeout(timeout_s):
            # a peer that only dials out cannot be asked, so a copy on itself alone would be lost to the others
            return bool(await node.dht.store(key.name, record, expires, subkey=node.peer_id, exclude_self=node.is_client))


async def lookup(node: GossipNode, key: RecordKey, *, timeout_s: float = DHT_TIMEOUT_S) -> list[tuple[PeerId, bytes]]:
    """The valid records under ``key``, sorted by peer id. Forged, foreign, expired and oversized ones are left out and counted.

    Raises Unreachable when the DHT gives no answer within ``timeout_s``; an empty list is an answer.
    """
    with _mapped(f"looking up {key.name}", timeout_s):
        async with asyncio.timeout(timeout_s):
            found = await node.dht.get(key.name, latest=True)
    if found is None or not isinstance(found.value, dict):
        return []
    records: list[tuple[PeerId, bytes]] = []
    for subkey, item in found.value.items():
        try:
            record = check_record(item.value, key, subkey, time.time())
        except RejectedPayload as error:
            node.count_ignored_record(key.name, error)
            continue
        records.append((record.peer, record.body))
    return sorted(records)


def encode_record(pair: Keypair, key: RecordKey, body: bytes, expires: float) -> bytes:
    """The signed form of a record. Raises RejectedPayload when it would not fit ``MAX_RECORD_BYTES``."""
    fields = {"body": base64.b64encode(body).decode(), "expires": expires, "key": key.name, "peer": pair.peer_id, "run": key.run}
    fields["sig"] = base64.b64encode(pair.sign(_PURPOSE, _canonical(fields))).decode()
    record = _canonical(fields)
    if len(record) > MAX_RECORD_BYTES:
        detail = f"a DHT record has at most {MAX_RECORD_BYTES} bytes, this one {len(record)}; shorten its body of {len(body)} bytes"
        raise RejectedPayload("size", detail, peer=pair.peer_id)
    return record


def check_record(data: Any, key: RecordKey, subkey: Any, now: float) -> Record:
    """The record in ``data`` when it is valid at Unix time ``now`` under this key and subkey. Raises RejectedPayload."""
    record = decode_record(data)
    if record.key != key:
        detail = f"a record of run {record.key.run[:8]}, key {record.key.name}, lies under {key.name}"
        raise RejectedPayload("malformed", detail, peer=record.peer)
    if subkey != record.peer:
        raise RejectedPayload("malformed", f"the record of {record.peer} lies under the subkey {str(subkey)[:60]!r}", peer=record.peer)
    if record.expires <= now:
        raise RejectedPayload("expired", f"the record of {record.peer} ended {now - record.expires:.0f} s ago", peer=record.peer)
    if record.expires > now + MAX_TTL_S + CLOCK_SLACK_S:
        detail = f"a record lives at most {MAX_TTL_S:.0f} s, this one {record.expires - now:.0f} s; check the clock"
        raise RejectedPayload("expiry", detail, peer=record.peer)
    return record


def decode_record(data: Any) -> Record:
    """Parse and verify the signature. Says nothing about expiry. Raises RejectedPayload."""
    if not isinstance(data, bytes):
        raise RejectedPayload("malformed", f"a record is bytes, got {type(data).__name__}")
    if len(data) > MAX_RECORD_BYTES:
        raise RejectedPayload("size", f"a record has at most {MAX_RECORD_BYTES} bytes, got {len(data)}")
    result = _verified(data)
    if isinstance(result, str):
        raise RejectedPayload("malformed" if result != _FORGED else "signature", result)
    return result


_FORGED = "the signature is not the named peer's"


@lru_cache(maxsize=1024)  # one record is seen from several nodes again and again until it expires
def _verified(data: bytes) -> Record | str:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return "a record is JSON"
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        return f"a record has the fields {sorted(_FIELDS)}"
    expires = fields["expires"]
    if not isinstance(expires, float) or not all(isinstance(fields[name], str) for name in _FIELDS - {"expires"}):
        return "a record's expiry is a number with a point, its other fields are text"
    try:
        if _canonical(fields) != data:
            return "a record is canonical JSON"
        signature, body = _from_base64(fields.pop("sig")), _from_base64(fields["body"])
        public = public_key_of(PeerId(fields["peer"]))
    except (ValueError, binascii.Error, DecentraError) as error:
        return str(error)[:200]
    if not is_signed(public, _PURPOSE, _canonical(fields), signature):
        return _FORGED
    return Record(RecordKey(RunId(fields["run"]), fields["key"]), PeerId(fields["peer"]), body, expires)


def _from_base64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:  # spare bits at the end would give one record many forms
        raise ValueError("a record's base64 is canonical")
    return data


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's door: a node stores and passes on only records that their peer signed for this key, subkey and expiry.

    A record that has just expired is let through: hivemind drops a whole key when one of its records is refused.
    """

    def __init__(self) -> None:
        self.num_refused = 0

    def validate(self, record: DHTRecord) -> bool:
        # Any exception is the record's fault and must end here: hivemind would answer nobody's question about this key.
        try:
            is_valid = _is_valid(record)
        except Exception:
            is_valid = False
        self.num_refused += not is_valid
        return is_valid


def _is_valid(record: DHTRecord) -> bool:
    if len(record.value) > MAX_RECORD_BYTES + 8:
        return False
    signed = decode_record(MSGPackSerializer.loads(record.value))
    return bool(
        record.key == DHTID.generate(signed.key.name).to_bytes()
        and record.subkey == MSGPackSerializer.dumps(signed.peer)
        and record.expiration_time == signed.expires
        and signed.expires <= time.time() + MAX_TTL_S + CLOCK_SLACK_S
    )


@contextmanager
def _mapped(doing: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except DecentraError:
        raise
    except TimeoutError:
        raise Unreachable(f"{doing}: the DHT gave no answer within {timeout_s:g} s; it is tried again") from None
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        raise Unreachable(f"{doing}: the DHT failed ({type(error).__name__}: {str(error)[:200]}); it is tried again") from None
