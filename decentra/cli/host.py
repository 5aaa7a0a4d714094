"""What a host runs beside its averaging service, bootstrap node and keeper; and a bootstrap node alone."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from decentra.averaging.client import AveragingClient
from decentra.cli.rundir import RunDir
from decentra.cli.running import StopRequest, locked_dir, watch_loop
from decentra.cli.service import Service, end, stopped
from decentra.cli.succession import tell_members
from decentra.cli.wiring import Door, gossip, meet_all, member_runtime, new_nonce, service_addresses
from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError, DecentraError, InviteError, Refused
from decentra.gossip import records
from decentra.gossip.bootstrap import run_bootstrap
from decentra.gossip.exchange import HivemindExchange
from decentra.gossip.node import GossipNode
from decentra.identity import load_or_create_key
from decentra.invite import Invite, parse_invite
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.protocol.messages import Role
from decentra.wire.trust import (
    Admission,
    TrustChain,
    pack_credentials,
    seal_admission,
)

BEACON_S, BEACON_TTL_S = 60.0, 300.0
NUM_FIRST_BEACONS, FIRST_BEACON_S = 6, 10.0  # at the start the node knows few others yet
TERMS_S = 15.0
OVER_S, ADVERTISE_S = 2.0, 120.0


async def run_beside(
    service: Service, run: RunDir, manifest: Manifest, *, address: str, bootstrap_port: int, listen_host: str, uses: int, days: float, stop: StopRequest,
    events: Events, on_ready: object, model_code: Path | None, archive_every: int,
) -> str:  # fmt: skip
    """Bootstrap node and keeper beside a service that runs, until Ctrl-C. ``on_ready(invite, ports)`` is called once."""
    async with AsyncExitStack() as stack:
        key = load_or_create_key(run.host / "identity.key")
        config = PeerConfig(
            name="host",
            role="keeper",
            model_code=model_code,
            listen=(f"/ip4/{listen_host}/tcp/{bootstrap_port}",),
            archive_every=archive_every,
        )
        door = await _own_door(service, key.peer_id, run, manifest, events)
        node, exchange = await stack.enter_async_context(
            gossip(run.host, (), config, service.identity.chain, lambda: door.client.credentials, events)
        )
        for digest, blob in run.genesis_blobs(manifest).items():
            await exchange.put(digest, blob)
            exchange.pin(digest)
        bootstrap = _public_multiaddr(node, address)
        services = (f"[{address}]:{service.port}" if ":" in address else f"{address}:{service.port}",)
        run.remember_addresses((bootstrap,), services)
        invite = _invite(run, uses, days, bootstrap, services) if run.has_run_key() else None
        if callable(on_ready):
            on_ready(invite, (bootstrap,), services)
        chores = [
            watch_loop(events),
            _beacon(node, service, services, events),
            _watch_terms(node, service),
            _advertise_result(exchange, service),
        ]
        if invite is not None:
            chores.append(tell_members(run, ((bootstrap,), services), events))
        tasks = [asyncio.create_task(chore) for chore in chores]
        for task in tasks:
            stack.push_async_callback(end, task)
        keeping = asyncio.create_task(_keep(service, door, config, run, node, exchange, stop, events))
        await service.until(keeping, asyncio.create_task(stopped(stop)))
        return stop.why


def _invite(run: RunDir, uses: int, days: float, bootstrap: str, services: Sequence[str]) -> Invite:
    """The host's own invite: made once and shown again at each start, so that a restart does not use invites up."""
    disk = RealDisk(run.host)
    stored = disk.read("invite")
    invite = None if stored is None else _parsed(stored)
    is_usable = invite is not None and (invite.bootstrap, invite.services) == ((bootstrap,), tuple(services))
    if invite is not None and is_usable and _is_valid(invite):
        return invite
    invite = run.make_invite(uses, days, bootstrap=(bootstrap,), services=services)
    write_atomic(disk, "invite", invite.encode().encode())
    return invite


def _is_valid(invite: Invite) -> bool:
    try:
        TrustChain(invite.run_id, invite.run_public).check_token(invite.token, time.time())
    except Refused:
        return False  # expired: a new one is made
    return True


def _parsed(stored: bytes) -> Invite | None:
    try:
        return parse_invite(stored.decode(errors="replace"))
    except InviteError:
        return None  # damaged: a new one is made


async def _own_door(service: Service, peer: str, run: RunDir, manifest: Manifest, events: Events) -> Door:
    """The host's keeper is let in by its own service: same admission, no invite."""
    identity, key = service.identity, load_or_create_key(run.host / "identity.key")
    expires_at_s = identity.check(time.time()).not_after_s
    admission = seal_admission(identity.service_key, Admission(identity.run, key.peer_id, Role.KEEPER, expires_at_s))
    credentials = pack_credentials(identity.sealed_certificate, admission)
    client = AveragingClient((f"127.0.0.1:{service.port}",), identity.chain, events, key=key, credentials=credentials)
    nonce = new_nonce()
    try:
        await service.driver.join(key.peer_id, Role.KEEPER, nonce, f"host-{key.peer_id}", 1)
    except Refused as error:
        events.emit("waiting", why=str(error))
    return Door(manifest, key, identity.chain, client, nonce, is_admitted=True)


async def _watch_terms(node: GossipNode, service: Service) -> None:
    """End the service when the DHT shows one of a higher term: another machine has taken the run over, and this folder is out of date."""
    chain, own = TrustChain(service.identity.run, service.identity.chain.run_public), service.identity.check(time.time())
    chain.note(own)
    while True:
        await meet_all(await service_addresses(node, service.identity.run), chain)
        if (replaced := chain.why_replaced(own)) is not None:
            service.driver.retire(f"another machine has taken the run over: {replaced}")
            return
        await asyncio.sleep(TERMS_S)


async def _keep(
    service: Service, door: Door, config: PeerConfig, run: RunDir, node: GossipNode, exchange: object, stop: StopRequest, events: Events
) -> None:
    """Follow and serve until the run is over or Ctrl-C; afterwards the blobs are served on for those who pull."""
    if service.driver.book.is_over:
        return
    runtime = member_runtime(door, config, run.host, node, exchange, events)  # type: ignore[arg-type]
    stop.on_stop(runtime.leave)
    why = await runtime.run()
    if runtime.saw_the_end:
        events.emit("run-over", why=f"{why}; its result is served on, Ctrl-C when everybody has pulled it")
    else:
        events.emit("leaving", why=why)


def _public_multiaddr(node: GossipNode, address: str) -> str:
    """The address to put into invites: the node's port at the host's public name."""
    if not node.addresses:
        raise ConfigError("the host listens nowhere; give a listen address")
    port = node.addresses[0].split("/tcp/")[1].split("/")[0]
    kind = "ip6" if ":" in address else "ip4" if address.replace(".", "").isdigit() else "dns4"
    return f"/{kind}/{address}/tcp/{port}/p2p/{node.peer_id}"


async def _beacon(node: GossipNode, service: Service, services: Sequence[str], events: Events) -> None:
    """Advertise the service in the DHT, for peers whose invite is older than its address."""
    for number in itertools.count():
        with suppress(DecentraError):  # the node reports its own troubles
            await records.publish(node, records.service_key(service.identity.run), "\n".join(services).encode(), BEACON_TTL_S)
        await asyncio.sleep(FIRST_BEACON_S if number < NUM_FIRST_BEACONS else BEACON_S)


async def _advertise_result(exchange: HivemindExchange, service: Service) -> None:
    """Once the run is over no member has to stay: the host keeps its anchors findable for those who come late or pull."""
    while True:
        if not service.driver.book.is_over:
            await asyncio.sleep(OVER_S)
            continue
        await exchange.announce([book.anchor for book in service.driver.book.fragments.values()])
        await asyncio.sleep(ADVERTISE_S)


async def run_bootstrap_node(
    root: Path, *, listen: Sequence[str], announce: Sequence[str], peers: Sequence[str], stop: StopRequest, events: Events
) -> str:
    """A bootstrap node alone; it needs no run directory, one can serve many runs."""
    with locked_dir(root):
        node = await run_bootstrap(root / "identity.key", listen, announce, events, initial_peers=peers)
        try:
            for address in node.addresses:
                print(address, flush=True)
            await stop.event.wait()
            return stop.why
        finally:
            await node.close()
