"""``host``, ``bootstrap`` and ``averager``: the organiser's processes, alone or all in one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from decentra.averaging.client import AveragingClient, meet
from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.averaging.server import AveragingServer, ServiceIdentity
from decentra.averaging.tls import load_or_create_tls
from decentra.cli.rundir import DAY_S, RunDir
from decentra.cli.running import StopRequest, locked_dir, watch_loop
from decentra.cli.standby import ledger_file, take_over
from decentra.cli.succession import tell_members
from decentra.cli.wiring import Door, gossip, member_runtime, new_nonce, service_addresses
from decentra.config import Manifest, PeerConfig, differing_keys, load_toml, manifest_from_bytes
from decentra.errors import ConfigError, DecentraError, InviteError, ManifestMismatch, Refused
from decentra.gossip import records
from decentra.gossip.bootstrap import run_bootstrap
from decentra.gossip.exchange import HivemindExchange
from decentra.gossip.node import GossipNode
from decentra.identity import load_or_create_key
from decentra.invite import Invite, parse_invite
from decentra.model.custom import model_for
from decentra.peer.compute import DeltaThread, SystemClock
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.protocol.ledger import Certified, Ledger
from decentra.protocol.messages import Role
from decentra.service.driver import Driver
from decentra.service.mailbox import Mailbox
from decentra.wire.ledgers import LedgerReader, open_record
from decentra.wire.signed import purpose_of
from decentra.wire.trust import (
    LEDGER,
    Admission,
    ServiceCertificate,
    TrustChain,
    pack_credentials,
    seal_admission,
    seal_certificate,
    seal_manifest,
)

CERTIFICATE_DAYS = 90
BEACON_S, BEACON_TTL_S = 60.0, 300.0
NUM_FIRST_BEACONS, FIRST_BEACON_S = 6, 10.0  # at the start the node knows few others yet
TERMS_S = 15.0
OVER_S, ADVERTISE_S = 2.0, 120.0


@dataclass
class Service:
    """A running averaging service."""

    driver: Driver
    identity: ServiceIdentity
    port: int
    pump: asyncio.Task[None]  # ends only with an error, such as a full disk under the ledger

    async def until(self, *others: asyncio.Task[None]) -> None:
        """Wait for all of ``others``. Raises the service's error if that comes first."""
        waiting: asyncio.Future[list[None]] = asyncio.ensure_future(asyncio.gather(*others))
        try:
            await asyncio.wait((waiting, self.pump), return_when=asyncio.FIRST_COMPLETED)
            if self.pump.done():
                self.pump.result()
            await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def service_identity(run: RunDir, manifest: Manifest, term: int = 1) -> ServiceIdentity:
    """Keys, TLS and papers of the averaging service of this term, made at the first start. Raises ConfigError."""
    service_key = load_or_create_key(run.host / "service.key")
    tls = load_or_create_tls(run.host / "tls.pem")
    disk = RealDisk(run.host)
    certificate, sealed_manifest = disk.read("certificate"), disk.read("manifest.sealed")
    run_public = disk.read("run.public")
    if run.has_run_key():
        key = run.run_key()
        if run_public not in (None, key.public):
            raise ConfigError(
                f"{run.run_key_file} is not the key this run began with; its invites name another. Restore it from your backup"
            )
        not_after_s = int(time.time() + CERTIFICATE_DAYS * DAY_S)
        papers = ServiceCertificate(service_key.public, tls.fingerprint, not_after_s, term)
        certificate = seal_certificate(key, manifest.run_id(), papers)
        sealed_manifest, run_public = seal_manifest(key, manifest), key.public
        for name, data in (("certificate", certificate), ("manifest.sealed", sealed_manifest), ("run.public", run_public)):
            write_atomic(disk, name, data)
    if certificate is None or sealed_manifest is None or run_public is None:
        raise ConfigError(f"{run.root} has neither run.key nor papers made with it; start the host once where run.key is")
    return ServiceIdentity(TrustChain(manifest.run_id(), run_public), manifest, sealed_manifest, certificate, service_key, tls)


def check_frozen(run: RunDir, manifest: Manifest, events: Events) -> None:
    """A run's manifest is frozen. Raises ManifestMismatch when it is not the one of the first start; says which keys of run.toml are ignored."""
    disk = RealDisk(run.host)
    served = disk.read("manifest.json")
    if served is None:
        write_atomic(disk, "manifest.json", manifest.canonical_bytes())
    elif served != manifest.canonical_bytes():
        before = manifest_from_bytes(served, str(run.host / "manifest.json"))
        keys = differing_keys(manifest, before)
        what = f"{run.root / 'manifest.json'} was changed after the run began (put it back, or make a new run with 'decentra init'): it"
        raise ManifestMismatch(manifest.run_id()[:12], before.run_id()[:12], keys, what)
    if run.toml.exists() and (ignored := ignored_settings(run.toml, manifest)):
        why = "run.toml was changed after 'decentra init'; the frozen manifest.json counts. Make a new run to use them"
        events.emit("settings-ignored", keys=list(ignored), why=why)


def ignored_settings(toml: Path, manifest: Manifest) -> tuple[str, ...]:
    """Keys of run.toml that say something else than the manifest; the ones that ``init`` computes are left out."""
    try:
        written = load_toml(Manifest, toml)
    except ConfigError:
        return ("run.toml cannot be read",)
    computed = ("genesis", "data.held_out", "data.tokenizer")
    return tuple(key for key in differing_keys(written, manifest) if not key.startswith(computed) or key == "data.held_out_bytes")


@asynccontextmanager
async def averaging_service(
    run: RunDir, manifest: Manifest, listen: str, events: Events, term: int | None = None
) -> AsyncIterator[Service]:
    """The averaging service of a run directory, from its ledger on. Raises ManifestMismatch when the manifest was edited since.

    ``term``: a new one, when this machine takes the run over; None: the one it served in before.
    """
    check_frozen(run, manifest, events)
    async with AsyncExitStack() as stack:
        compute = DeltaThread("ledger")
        stack.callback(compute.close)
        journal = await asyncio.to_thread(SqliteJournal, ledger_file(run))
        stack.callback(journal.close)
        if term is None:
            term = await asyncio.to_thread(_term_of, journal)
        identity = service_identity(run, manifest, term)
        identity.chain.term = identity.check(time.time()).term
        purpose, reader = purpose_of(LEDGER, identity.run), LedgerReader(identity.chain, str(ledger_file(run)))
        driver = Driver(
            manifest, journal, SystemClock(), compute, events, seal=lambda line: identity.service_key.sign(purpose, line),
            vouch=reader.vouch, certificate=(identity.chain.term, identity.sealed_certificate),
        )  # fmt: skip
        await asyncio.to_thread(driver.recover)
        reader.finish(identity.service_key.public)
        for subject in driver.book.revoked:
            identity.chain.revoke(subject)
        server: AveragingServer[Mailbox] = AveragingServer(identity, driver, Mailbox, events)
        port = await server.start(listen)
        stack.push_async_callback(server.close)
        pump = asyncio.create_task(driver.run())
        stack.push_async_callback(_end, pump)
        yield Service(driver, identity, port, pump)


def _term_of(journal: SqliteJournal) -> int:
    """The newest that the ledger names; its lines are checked afterwards."""
    term = 1
    for sealed in journal.load():
        if b'"Certified"' in sealed:
            record = Ledger.peek(open_record(sealed)[1])
            term = record.term if isinstance(record, Certified) else term
    return term


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def run_host(
    run: RunDir, *, address: str, bootstrap_port: int, service_port: int, listen_host: str, uses: int, days: float, stop: StopRequest,
    events: Events, on_ready: object = None, model_code: Path | None = None, take_from: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Bootstrap node, averaging service and keeper in one process, until Ctrl-C. ``on_ready(invite, ports)`` is called once.

    ``take_from``: this machine takes the run over from a service at these addresses, or none: at those it copied from.
    """
    manifest = run.manifest()
    model_for(manifest, model_code)  # before any port is taken
    with locked_dir(run.host):
        async with AsyncExitStack() as stack:
            term = None if take_from is None else await take_over(run, take_from, events)
            service = await stack.enter_async_context(averaging_service(run, manifest, f"{listen_host}:{service_port}", events, term))
            key = load_or_create_key(run.host / "identity.key")
            config = PeerConfig(name="host", role="keeper", model_code=model_code, listen=(f"/ip4/{listen_host}/tcp/{bootstrap_port}",))
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
                stack.push_async_callback(_end, task)
            keeping = asyncio.create_task(_keep(service, door, config, run, node, exchange, stop, events))
            await service.until(keeping, asyncio.create_task(_stopped(stop)))
            return stop.why


async def _stopped(stop: StopRequest) -> None:
    await stop.event.wait()


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
    chain = TrustChain(service.identity.run, service.identity.chain.run_public)
    while True:
        for address in await service_addresses(node, service.identity.run):
            with suppress(DecentraError):
                await meet((address,), chain)
        if (replaced := chain.why_replaced(service.identity.check(time.time()))) is not None:
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
        await exchange.announce([view.anchor for view in service.driver.status()[1]])
        await asyncio.sleep(ADVERTISE_S)


async def run_averager(
    run: RunDir, *, listen: str, address: str, stop: StopRequest, events: Events, take_from: Sequence[str] | None = None
) -> str:
    """The averaging service alone. ``take_from`` as in ``run_host``."""
    with locked_dir(run.host):
        term = None if take_from is None else await take_over(run, take_from, events)
        async with averaging_service(run, run.manifest(), listen, events, term) as service:
            where = f"{address}:{service.port}"
            run.remember_addresses(run.addresses()[0] if run.has_addresses() else (), (where,))
            print(f"averaging service of run {service.identity.run[:12]} at {where}", flush=True)
            await service.until(asyncio.create_task(_stopped(stop)))
            return stop.why


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
