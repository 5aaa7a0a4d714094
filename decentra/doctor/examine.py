"""All checks in order, reported one by one. Decides which apply; judges nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decentra.doctor import machine, network
from decentra.doctor.finding import Finding, Level, failure
from decentra.errors import DecentraError
from decentra.invite import Invite

if TYPE_CHECKING:
    from decentra.config import Manifest

HOST_PORTS = (7410, 7411)  # of 'decentra host': bootstrap node, averaging service


@dataclass(frozen=True)
class Plan:
    """What to look at. Without an invite the machine is judged as a host, with one as a member of that run."""

    state_dir: Path
    invite: Invite | None = None
    host_ports: Sequence[int] = HOST_PORTS
    port: int = 0  # at which the averaging service calls back; 0: any


async def examine(plan: Plan, on_finding: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Every finding, in order; ``on_finding`` hears each as soon as it is known. Takes a few seconds, at most about two minutes."""
    findings: list[Finding] = []

    def report(found: Sequence[Finding]) -> None:
        findings.extend(found)
        for one in found:
            on_finding(one)

    report(machine.check_versions())
    report(await asyncio.to_thread(machine.check_disk, plan.state_dir))
    report(machine.check_keys(plan.state_dir))
    report([*machine.check_memory(), *machine.check_open_files()])
    if plan.invite is None:
        report(await asyncio.to_thread(machine.check_ports, plan.host_ports))
    report(await asyncio.to_thread(machine.check_arithmetic))
    report(await asyncio.to_thread(machine.check_p2pd_file))
    started: list[Finding] = []
    async with network.probe_node(started) as node:
        report(started)
        if plan.invite is not None:
            report(await network.check_bootstrap(plan.invite.bootstrap, node))
    if plan.invite is not None:
        found, described = await network.ask_service(plan.invite)
        report(found)
        if described is not None:
            report([await network.check_reachability(plan.invite, plan.port)])
            report(await asyncio.to_thread(_check_run, described.manifest))
    return findings


def _check_run(manifest: Manifest) -> list[Finding]:
    """Whether this machine's memory and embedded text fit the run."""
    from decentra.data.domains import differing_held_out
    from decentra.model.custom import layout_for
    from decentra.peer.footprint import footprint

    found = []
    if manifest.model.code == "decoder":
        layout = layout_for(manifest)
        need = footprint(manifest, layout, is_partial=manifest.placement.mode == "held")
        found += machine.check_memory(need.total(1), need.total(min(manifest.model.num_experts, manifest.placement.experts_per_peer)))
    else:
        fix = "get its file from the organiser and join with --model-code FILE"
        found.append(Finding("model", Level.WARN, f"the run trains a model of its own, {manifest.model.code[:19]}", fix))
    if manifest.data.held_out:
        try:
            differing = differing_held_out(manifest.data)
        except DecentraError as error:
            return [*found, failure("embedded text", error, "join with text of your own: --data FOLDER")]
        if differing:
            what = f"{', '.join(differing)} differ from the organiser's (another Python, torch or sympy): held-out losses do not compare"
            found.append(Finding("embedded text", Level.WARN, what, "install the organiser's versions, or ignore your own held-out losses"))
        else:
            found.append(Finding("embedded text", Level.OK, f"held-out text of {', '.join(manifest.data.held_out)} is the organiser's"))
    return found
