"""The averaging service as a process: alone, or first of all in a host. Loads no torch and no hivemind, so it listens a second after it was started."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentra.averaging.journal_sqlite import SqliteJournal
from decentra.averaging.server import AveragingServer, ServiceIdentity
from decentra.averaging.tls import load_or_create_tls
from decentra.cli.rundir import DAY_S, RunDir
from decentra.cli.running import StopRequest, locked_dir
from decentra.cli.standby import ledger_file, take_over
from decentra.config import Manifest, differing_keys, load_toml, manifest_from_bytes
from decentra.errors import ConfigError, ManifestMismatch, PortTaken, Refused
from decentra.identity import load_or_create_key
from decentra.peer.compute import DeltaThread, SystemClock
from decentra.peer.disk import RealDisk, write_atomic
from decentra.ports import Events
from decentra.protocol.ledger import Certified, Ledger
from decentra.service.driver import Driver
from decentra.service.mailbox import Mailbox
from decentra.wire.frames import sign_told
from decentra.wire.ledgers import LedgerReader, open_record
from decentra.wire.signed import purpose_of
from decentra.wire.trust import LEDGER, ServiceCertificate, TrustChain, seal_certificate, seal_manifest

CERTIFICATE_DAYS = 90


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
        newest = await asyncio.to_thread(_newest_certificate, journal)
        if term is None and newest is not None:
            term = _own_term(run, newest)
        identity = service_identity(run, manifest, term or 1)
        own = identity.check(time.time())
        if newest is not None and own.term < newest.term:
            raise ConfigError(
                f"{run.host / 'certificate'} is of term {own.term}, the ledger of {newest.term}: start it once where run.key is, or put the newer"
                " certificate back"
            )
        identity.chain.note(own)
        purpose, reader = purpose_of(LEDGER, identity.run), LedgerReader(identity.chain, str(ledger_file(run)))
        driver = Driver(
            manifest, journal, SystemClock(), compute, events, seal=lambda line: identity.service_key.sign(purpose, line),
            vouch=reader.vouch, certificate=(own.term, identity.sealed_certificate), on_read=lambda: reader.finish(own.service_public),
            vow=lambda told: sign_told(identity.service_key, identity.run, told),
        )  # fmt: skip
        await asyncio.to_thread(driver.recover)
        for subject in driver.book.revoked:
            identity.chain.revoke(subject)
        server: AveragingServer[Mailbox] = AveragingServer(identity, driver, Mailbox, events)
        port = await server.start(listen)
        stack.push_async_callback(server.close)
        pump = asyncio.create_task(driver.run())
        stack.push_async_callback(end, pump)
        yield Service(driver, identity, port, pump)


def _newest_certificate(journal: SqliteJournal) -> Certified | None:
    """That the ledger names; its lines are checked afterwards."""
    newest = None
    for sealed in journal.load():
        if b'"Certified"' in sealed:
            record = Ledger.peek(open_record(sealed)[1])
            newest = record if isinstance(record, Certified) else newest
    return newest


def _own_term(run: RunDir, newest: Certified) -> int:
    """The term in which this folder's service goes on. Raises ConfigError where another one wrote its ledger last: this folder is a copy."""
    run_public = run.run_key().public if run.has_run_key() else RealDisk(run.host).read("run.public")
    own = load_or_create_key(run.host / "service.key").public
    if run_public is not None:
        with suppress(Refused):  # a ledger that was tampered with is refused when its lines are checked
            wrote = TrustChain(run.manifest().run_id(), run_public).check_certificate(newest.certificate, None).service_public
            if wrote != own:
                raise ConfigError(
                    f"{run.root} is a copy: another machine's service wrote its ledger. Keep it in step with 'decentra averager {run.root} --standby',"
                    f" or serve the run from it with 'decentra host {run.root} --take-over'"
                )
    return newest.term


def check_before_take_over(run: RunDir, manifest: Manifest, listen_host: str, ports: Sequence[int], events: Events) -> None:
    """What would keep this machine from serving, before the other one is sent home. Raises ConfigError, IntegrityError, ManifestMismatch, PortTaken."""
    check_frozen(run, manifest, events)
    run.genesis_blobs(manifest)
    for port in ports:
        with socket.socket(socket.AF_INET6 if ":" in listen_host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((listen_host, port))
            except OSError as error:
                raise PortTaken(f"cannot listen on {listen_host}:{port}: {error.strerror}; nothing was taken over") from None


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def run_host(
    run: RunDir, *, address: str, bootstrap_port: int, service_port: int, listen_host: str, uses: int, days: float, stop: StopRequest,
    events: Events, on_ready: object = None, model_code: Path | None = None, archive_every: int = 0,
    take_from: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Bootstrap node, averaging service and keeper in one process, until Ctrl-C. ``on_ready(invite, ports)`` is called once.

    The service comes first and the rest when its libraries are loaded, which takes seconds: after a restart rounds need not wait for them.
    ``take_from``: this machine takes the run over from a service at these addresses, or none: at those it copied from.
    """
    manifest = run.manifest()
    if manifest.model.code != "decoder" or model_code is not None:
        await asyncio.to_thread(_check_code, manifest, model_code)  # before any port is taken
    with locked_dir(run.host):
        async with AsyncExitStack() as stack:
            term = None
            if take_from is not None:
                check_before_take_over(run, manifest, listen_host, (service_port, bootstrap_port), events)
                term = await take_over(run, take_from, events)
            service = await stack.enter_async_context(averaging_service(run, manifest, f"{listen_host}:{service_port}", events, term))
            beside = await asyncio.to_thread(_load_rest)
            why: str = await beside.run_beside(
                service, run, manifest, address=address, bootstrap_port=bootstrap_port, listen_host=listen_host, uses=uses, days=days, stop=stop,
                events=events, on_ready=on_ready, model_code=model_code, archive_every=archive_every,
            )  # fmt: skip
            return why


def _check_code(manifest: Manifest, model_code: Path | None) -> None:
    from decentra.model.custom import model_for

    model_for(manifest, model_code)


def _load_rest() -> Any:
    from decentra.cli import host

    return host


async def stopped(stop: StopRequest) -> None:
    await stop.event.wait()


async def run_averager(run: RunDir, *, listen: str, address: str, stop: StopRequest, events: Events) -> str:
    """The averaging service alone."""
    with locked_dir(run.host):
        async with averaging_service(run, run.manifest(), listen, events) as service:
            where = f"{address}:{service.port}"
            run.remember_addresses(run.addresses()[0] if run.has_addresses() else (), (where,))
            print(f"averaging service of run {service.identity.run[:12]} at {where}", flush=True)
            await service.until(asyncio.create_task(stopped(stop)))
            return stop.why
