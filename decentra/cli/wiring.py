"""Adapters put together: how a process gets its p2p node, its blob exchange and its line to the averaging service."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from torch import nn

from decentra.averaging.client import AveragingClient, meet
from decentra.cli.capacity import limit_gpu, max_experts
from decentra.cli.members import KNOWN_FILE
from decentra.cli.ranks import check_ranks, num_ranks
from decentra.config import Manifest, PeerConfig, manifest_from_bytes
from decentra.data.tokens import BYTES, Tokenizer
from decentra.data.windows import source_for, texts_for
from decentra.errors import AlreadyHere, ConfigError, DataError, DecentraError, Expired, Unreachable
from decentra.gossip import records
from decentra.gossip.blobs import BlobStore
from decentra.gossip.exchange import HivemindExchange
from decentra.gossip.node import GossipNode
from decentra.identity import Keypair, load_or_create_key
from decentra.ids import PeerId, RunId
from decentra.invite import Invite, split_address
from decentra.model.custom import Builder, layout_for, model_for
from decentra.model.decoder import build_model
from decentra.peer.compute import DeltaThread, SystemClock
from decentra.peer.disk import RealDisk, write_atomic
from decentra.peer.runtime import PeerRuntime, Ports
from decentra.ports import Events
from decentra.protocol.messages import Role
from decentra.protocol.placement import check_experts
from decentra.wire.trust import TrustChain

RETRY_S, MAX_RETRY_S = 2.0, 15.0
MAX_PER_PUBLISHER, MEET_S = 2, 5.0
SERVICE_LOOKUP_S, AWAY_LOOKUP_S, MAX_SERVICE_ADDRESSES = 30.0, 5.0, 8  # often only while there is no stream
MANIFEST_FILE, CREDENTIALS_FILE, TERM_FILE = "manifest.json", "credentials", "term"


def state_dir(run: RunId, config: PeerConfig) -> Path:
    """Where this peer keeps its key, checkpoints and blobs."""
    return config.dir or platformdirs.user_state_path("decentra") / run[:16] / config.name


def new_nonce() -> str:
    return os.urandom(8).hex()


@dataclass
class Door:
    """The checked way into a run: its manifest, this peer's key, and a client that is admitted or will be."""

    manifest: Manifest
    key: Keypair
    trust: TrustChain
    client: AveragingClient
    nonce: str
    is_admitted: bool


async def open_door(
    invite: Invite,
    config: PeerConfig,
    root: Path,
    events: Events,
    *,
    patience_s: float,
    check: Callable[[Manifest, PeerId], None] | None = None,
) -> Door:
    """Fetch and check the manifest and be admitted. ``check`` sees the manifest first: what it raises costs no place in the run.

    A peer that was here before goes on with its stored manifest and credentials while the service is away. Raises Refused at once, Unreachable
    after ``patience_s``.
    """
    key = load_or_create_key(root / "identity.key")
    trust = TrustChain(invite.run_id, invite.run_public)
    disk, nonce = RealDisk(root), new_nonce()
    credentials = stored_credentials(disk, trust, key.peer_id, events)
    load_term(disk, trust)
    client = AveragingClient(invite.services, trust, events, key=key, token=invite.token, credentials=credentials)
    stored = _stored_manifest(disk, invite.run_id, events)
    deadline, retry_s = time.monotonic() + patience_s, RETRY_S
    async with AsyncExitStack() as unfinished:
        unfinished.push_async_callback(client.close)  # unless it comes to a door
        while True:
            try:
                manifest = (await client.describe()).manifest
                if check is not None:
                    await asyncio.to_thread(check, manifest, key.peer_id)
                await client.join(Role(config.role), nonce, config.name)
                break
            except Unreachable as error:
                if stored is not None and credentials:
                    if check is not None:
                        await asyncio.to_thread(check, stored, key.peer_id)
                    events.emit("waiting", why=f"{error}; going on with what this peer has, the service is asked again")
                    unfinished.pop_all()
                    return Door(stored, key, trust, client, nonce, is_admitted=False)
                if time.monotonic() + retry_s > deadline:
                    raise
                events.emit("waiting", why=f"{error}; trying again in {retry_s:g} s")
            except Expired:
                if stored is None or not credentials:
                    raise
                # the invite was for coming in; this peer is in, and its admission still holds. Whether it may stay is decided at the stream
                unfinished.pop_all()
                return Door(stored, key, trust, client, nonce, is_admitted=True)
            except AlreadyHere as error:
                if time.monotonic() + retry_s > deadline:
                    raise
                events.emit("waiting", why=f"{error}; trying again in {retry_s:g} s")
            await asyncio.sleep(retry_s)
            retry_s = min(MAX_RETRY_S, 1.5 * retry_s)
        write_atomic(disk, MANIFEST_FILE, manifest.canonical_bytes())
        write_atomic(disk, CREDENTIALS_FILE, client.credentials)
        store_term(disk, trust)
        unfinished.pop_all()
    return Door(manifest, key, trust, client, nonce, is_admitted=True)


def stored_credentials(disk: RealDisk, trust: TrustChain, peer: PeerId, events: Events) -> bytes:
    """What an earlier process was given, while it holds; what is damaged or has expired would only be refused, the token may still do."""
    credentials = disk.read(CREDENTIALS_FILE) or b""
    if not credentials:
        return b""
    try:
        trust.check_credentials(credentials, peer, time.time())
    except DecentraError as error:
        events.emit("damaged-file", file=CREDENTIALS_FILE, why=f"{error}; the service is asked for new ones")
        return b""
    return credentials


def load_term(disk: RealDisk, trust: TrustChain) -> None:
    """The highest that a service of this run was met with, and its key: whoever was replaced stays replaced over restarts."""
    try:
        term, _, public = (disk.read(TERM_FILE) or b"0 ").decode().partition(" ")
        trust.term, trust.service_public = max(0, int(term)), bytes.fromhex(public) or None
    except ValueError:
        return


def store_term(disk: RealDisk, trust: TrustChain) -> None:
    with suppress(OSError):  # a full disk: it is met again after a restart
        write_atomic(disk, TERM_FILE, f"{trust.term} {(trust.service_public or b'').hex()}".encode())


def _stored_manifest(disk: RealDisk, run: RunId, events: Events) -> Manifest | None:
    data = disk.read(MANIFEST_FILE)
    if data is None:
        return None
    try:
        manifest = manifest_from_bytes(data, f"stored {MANIFEST_FILE}")
    except ConfigError as error:
        events.emit("damaged-file", file=MANIFEST_FILE, why=f"{error}; the service is asked for it again")
        return None
    return manifest if manifest.run_id() == run else None


def _known_peers(disk: RealDisk, events: Events) -> list[str]:
    """Addresses that answered last time; a damaged file is said and forgotten, the invite has addresses too."""
    data = disk.read(KNOWN_FILE)
    if data is None:
        return []
    try:
        raw = json.loads(data)
        if isinstance(raw, list) and all(isinstance(one, str) for one in raw):
            return raw
        why = "it is no list of addresses"
    except ValueError as error:
        why = f"not JSON: {error}"
    events.emit("damaged-file", file=KNOWN_FILE, why=why)
    return []


def credential_check(trust: TrustChain) -> Callable[[PeerId, bytes], None]:
    """What every blob request is measured by."""

    def check(peer: PeerId, credentials: bytes) -> None:
        trust.check_credentials(credentials, peer, time.time())

    return check


@asynccontextmanager
async def gossip(
    root: Path, invite_bootstrap: Sequence[str], config: PeerConfig, trust: TrustChain, credentials: Callable[[], bytes], events: Events
) -> AsyncIterator[tuple[GossipNode, HivemindExchange]]:
    """This peer's node and blob exchange, closed in reverse; known peers are remembered for the next start."""
    disk = RealDisk(root)
    known = _known_peers(disk, events)
    async with AsyncExitStack() as stack:
        node = await GossipNode.start(
            root / "identity.key", listen=config.listen, announce=config.announce, initial_peers=invite_bootstrap, known_peers=known, events=events
        )  # fmt: skip
        stack.push_async_callback(node.close)
        store = BlobStore(root / "blobs", config.blob_budget_bytes)
        exchange = HivemindExchange(node, store, trust.run_id, credentials, credential_check(trust), up_bytes_per_s=config.up_bytes_per_s)
        await exchange.start()
        stack.push_async_callback(exchange.close)
        try:
            yield node, exchange
        finally:
            write_atomic(disk, KNOWN_FILE, json.dumps(list(node.known_peers())).encode())


def member_runtime(
    door: Door, config: PeerConfig, root: Path, node: GossipNode, exchange: HivemindExchange, events: Events, tokenizer: Tokenizer = BYTES
) -> PeerRuntime:
    """A trainer or keeper over the real adapters. Raises ConfigError, ManifestMismatch, DataError."""
    manifest = door.manifest
    layout = layout_for(manifest, config.model_code)
    most = max_experts(config, manifest, layout, num_ranks())
    if config.role == "trainer":
        limit_gpu(config)
        if most is not None and most < manifest.placement.experts_per_peer and config.num_experts is None and config.experts is None:
            why = f"{most} of the {manifest.placement.experts_per_peer} experts that this run gives a peer fit into this machine's memory"
            events.emit("capacity", max_experts=most, why=why)
    runtime = PeerRuntime(
        manifest, layout, config, door.key.peer_id, door.nonce,
        Ports(door.client, exchange, RealDisk(root), SystemClock(), DeltaThread(), events),
        addresses=lambda: node.addresses, traffic=lambda: (exchange.tx_bytes, exchange.rx_bytes), on_revoked=door.trust.revoke,
        is_told=door.trust.is_told, contradicts=door.trust.contradicts, certificate=lambda: door.client.certificate, max_experts=most,
    )  # fmt: skip
    if config.role == "trainer":
        build, _ = model_for(manifest, config.model_code)
        runtime.make_model = functools.partial(_built, build, manifest)
        runtime.make_source = lambda: source_for(manifest, config, door.key.peer_id, tokenizer)
    return runtime


def _built(build: Builder, manifest: Manifest, experts: Sequence[int] | None) -> nn.Module:
    """The run's model with these experts, None: all. Own code is always built whole; ``check_fit`` has refused anything else."""
    return build(manifest.model, manifest.seed) if experts is None else build_model(manifest.model, manifest.seed, experts)


def check_local(config: PeerConfig) -> None:
    """What is wrong with this machine's part whatever the run is. Raises ConfigError, DataError."""
    for path in map(Path, config.data):
        if not path.expanduser().exists():
            raise DataError(f"{path}: no such file or folder; check the path in 'data'")
    if config.role == "trainer" and config.device not in ("auto", "cpu"):
        from decentra.peer.inner import resolve_device

        resolve_device(config.device)


def check_fit(config: PeerConfig, manifest: Manifest, peer: PeerId, *, is_following: bool = False) -> None:
    """What is wrong with this machine's part in this run. ``is_following``: its owner's words were for the run before. Raises ConfigError, DataError."""
    if config.role != "trainer":
        return
    num_experts = manifest.model.num_experts
    if config.experts is not None:
        check_experts(config.experts, num_experts, manifest.placement.frozen_experts)
    if config.num_experts is not None and config.num_experts > num_experts and not is_following:
        raise ConfigError(f"num_experts {config.num_experts}: this run has {num_experts}")
    mode = config.mode or manifest.placement.mode
    if mode == "held" and manifest.placement.mode != "held":
        raise ConfigError(
            f"mode 'held': run '{manifest.name}' is of members that have all experts in memory (placement.mode = 'mirror'), and its router is"
            " merged as theirs; leave out --mode, or ask the organiser for a run with placement.mode = 'held'"
        )
    if mode == "held" and (config.num_experts == 0 or config.experts == ()):
        raise ConfigError("mode 'held' with no expert: a model without any cannot run; hold at least one, or join with --mode mirror")
    if mode == "held" and manifest.model.code != "decoder":
        raise ConfigError(f"mode 'held': the model of run '{manifest.name}' is its own code, which is held whole; join with --mode mirror")
    check_ranks(config, manifest)
    max_experts(config, manifest, layout_for(manifest, config.model_code), num_ranks())
    if manifest.data.tokenizer is None:
        source_for(manifest, config, peer)
    else:
        texts_for(manifest, config)  # its tokenizer is fetched once it is in


def compare_held_out(door: Door, config: PeerConfig, events: Events) -> None:
    """Say when embedded domains differ from the organiser's."""
    from decentra.data.domains import differing_held_out

    if config.role != "trainer":
        return
    if door.manifest.data.held_out and (differing := differing_held_out(door.manifest.data)):
        events.emit(
            "held-out-differs", domains=list(differing),
            why="this machine has other versions of Python, torch or sympy than the organiser; its held-out losses of these domains differ",
        )  # fmt: skip


async def join_again(door: Door, config: PeerConfig, root: Path, events: Events) -> None:
    """Renew an admission that was not given at the start because the service was away."""
    retry_s = RETRY_S
    while not door.is_admitted:
        try:
            await door.client.join(Role(config.role), door.nonce, config.name)
        except Unreachable:
            await asyncio.sleep(retry_s)
            retry_s = min(MAX_RETRY_S, 1.5 * retry_s)
            continue
        except DecentraError as error:
            events.emit("operation-failed", why=str(error))
            raise
        write_atomic(RealDisk(root), CREDENTIALS_FILE, door.client.credentials)
        door.is_admitted = True


async def follow_service(door: Door, node: GossipNode, invited: Sequence[str], root: Path, events: Events) -> None:
    """Learn from the DHT where the averaging service is now; an invite may be older than its address, and another machine may have taken over.

    Anybody can publish an address: the certificate chain to the run key decides whom we talk to, and of several the highest term.
    """
    disk, stored = RealDisk(root), -1
    looked_at = 0.0
    while True:
        await asyncio.sleep(AWAY_LOOKUP_S)
        if door.trust.term != stored:
            stored = door.trust.term
            store_term(disk, door.trust)
        if door.client.is_attached and time.monotonic() < looked_at + SERVICE_LOOKUP_S:
            continue
        looked_at = time.monotonic()
        found = await service_addresses(node, door.trust.run_id)
        addresses = tuple(dict.fromkeys([*door.client.addresses[:1], *invited, *found]))[:MAX_SERVICE_ADDRESSES]
        if set(addresses) != set(door.client.addresses):
            door.client.use_addresses(addresses)
            events.emit("service-addresses", addresses=list(addresses))
        await meet_all(found, door.trust)


async def meet_all(addresses: Sequence[str], trust: TrustChain) -> None:
    """Let ``trust`` know of the services behind these addresses: a higher term, once seen, ends streams of a lower one."""

    async def one(address: str) -> None:
        with suppress(DecentraError, TimeoutError):
            async with asyncio.timeout(MEET_S):
                await meet((address,), trust)

    await asyncio.gather(*(one(address) for address in addresses))


async def service_addresses(node: GossipNode, run: RunId) -> list[str]:
    """What the DHT says, in nobody's name; empty when it says nothing."""
    try:
        answers = await records.lookup(node, records.service_key(run))
    except DecentraError:
        return []  # the node reports its own troubles
    found = [line for _, body in answers for line in _address_lines(body)[:MAX_PER_PUBLISHER]]
    return random.sample(found, min(MAX_SERVICE_ADDRESSES, len(found)))  # anybody can publish some; nobody can fill the list for good


def _address_lines(body: bytes) -> list[str]:
    lines = []
    for line in body.decode(errors="replace").splitlines()[:MAX_SERVICE_ADDRESSES]:
        try:
            split_address(line)
        except DecentraError:
            continue
        lines.append(line)
    return lines
