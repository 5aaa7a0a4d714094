"""``plan``: what joining a run would mean on this machine, measured before it joins. Trains a few throw-away steps; tells the swarm nothing."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from decentra.averaging.client import AveragingClient
from decentra.cli.capacity import is_partial, max_experts
from decentra.cli.running import locked_dir
from decentra.cli.wiring import check_fit, check_local, gossip, new_nonce, state_dir
from decentra.config import Manifest, PeerConfig
from decentra.data.windows import WindowSource, texts_for
from decentra.delta.anchor import max_anchor_bytes
from decentra.doctor.forecast import Measured, forecast
from decentra.doctor.machine import free_memory_bytes
from decentra.errors import DecentraError, Unreachable
from decentra.identity import Keypair, load_or_create_key
from decentra.ids import PeerId, expert_of
from decentra.invite import Invite
from decentra.model.custom import layout_for, model_for
from decentra.model.decoder import build_model
from decentra.modules import Layout
from decentra.peer.fetch import Fetcher
from decentra.peer.footprint import footprint, mib
from decentra.peer.inner import InnerLoop, resolve_device
from decentra.ports import Events
from decentra.protocol.messages import FragmentView, Role, SwarmView
from decentra.protocol.placement import place
from decentra.wire.trust import TrustChain

NUM_PINGS = 5
FIRST_FILLER, MAX_FILLER = 64 << 10, 3 << 20  # bytes sent to measure the uplink, the second ones for about two seconds
AIM_S = 2.0
STEPS_S, MAX_STEPS = 8.0, 8
DOWNLOAD_S = 60.0
MIN_MEASURED_BYTES = 256 << 10  # less says more about latency than about the link


async def plan(invite: Invite, config: PeerConfig, events: Events) -> dict[str, Any]:
    """Everything ``join`` would be told, without joining. What was downloaded stays for it. Raises what ``join`` would raise."""
    check_local(config)
    root = state_dir(invite.run_id, config)
    trust = TrustChain(invite.run_id, invite.run_public)
    with locked_dir(root):
        key = load_or_create_key(root / "identity.key")
        client = AveragingClient(invite.services, trust, events, key=key, token=invite.token)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            described = await client.describe()
            manifest = described.manifest
            check_fit(config, manifest, key.peer_id)
            layout = layout_for(manifest, config.model_code)
            events.emit("measuring", what="the way to the averaging service")
            rtt_s, up = await _uplink(client)
            address = (await client.probe()).address
            swarm, views = await client.status()
            most = _most(config, manifest, layout)
            experts = _experts(config, manifest, swarm, key.peer_id, most)
            count = len(experts)
            events.emit("measuring", what=f"inner steps with {count} experts")
            step_s = await asyncio.to_thread(_step_s, manifest, layout, config, key, experts)
            events.emit("measuring", what="the downlink, with anchors that joining needs")
            await client.join(Role.WATCHER, new_nonce(), config.name)
            down, num_fetched = await _downlink(root, invite, config, trust, client, layout, swarm, views, experts, events)
    trainers = sum(m.role is Role.TRAINER and m.is_live and m.peer != key.peer_id for m in swarm.members) + 1
    keepers = sum(m.role is Role.KEEPER and m.is_live for m in swarm.members)
    partial = is_partial(config, manifest)
    allowed_up = min((r for r in (up, config.up_bytes_per_s) if r is not None), default=None)
    seen = Measured(step_s, count, partial, trainers, keepers, allowed_up, down, config.cap_bytes_per_day)
    need = footprint(manifest, layout, is_partial=partial)
    return {
        "ok": True, "run": invite.run_id, "name": manifest.name, "address": address, "rtt_ms": 1000 * rtt_s,
        "clock_offset_s": described.clock_offset_s, "up_mbit": None if up is None else up * 8 / 1e6,
        "down_mbit": None if down is None else down * 8 / 1e6, "fetched_bytes": num_fetched, "free_bytes": free_memory_bytes(),
        "mode": "held" if partial else "mirror", "experts": count, "experts_fit": most,
        "memory_bytes": need.total(count), "step_s": step_s, "tokens_per_s": manifest.train.batch_size * manifest.data.seq_len / step_s,
        "inner_steps": manifest.rounds.inner_steps, "num_trainers": trainers, "num_keepers": keepers,
    } | forecast(manifest, layout, seen)  # fmt: skip


def _most(config: PeerConfig, manifest: Manifest, layout: Layout) -> int:
    most = max_experts(config, manifest, layout)
    return manifest.model.num_experts if most is None else most


def _experts(config: PeerConfig, manifest: Manifest, swarm: SwarmView, peer: PeerId, most: int) -> tuple[int, ...]:
    """Which experts this peer would train, as the service would place it now."""
    if config.experts is not None:
        return tuple(sorted(config.experts))
    wanted = manifest.placement.experts_per_peer if config.num_experts is None else config.num_experts
    present = {m.peer: m.experts for m in swarm.members if m.is_live and m.role is Role.TRAINER}
    return place(peer, min(wanted, most), manifest.model.num_experts, present, manifest.placement.frozen_experts)


def _step_s(manifest: Manifest, layout: Layout, config: PeerConfig, key: Keypair, held: tuple[int, ...]) -> float:
    """Median seconds of an inner step, after a first one that warms up."""
    import torch

    torch.set_num_threads(config.threads)
    build, _ = model_for(manifest, config.model_code)
    experts = held if is_partial(config, manifest) else None
    model = build(manifest.model, manifest.seed) if experts is None else build_model(manifest.model, manifest.seed, experts)
    trained = frozenset(f.id for f in layout.fragments if (e := expert_of(f.module)) is None or e in held)
    texts_for(manifest, config)  # what is wrong with them is said now
    size = max(1 << 16, manifest.data.seq_len + 1)
    numbers = np.random.default_rng(0).integers(manifest.model.vocab_size, size=size, dtype=np.int32)  # a step takes as long on any text
    source = WindowSource([numbers], manifest.data.seq_len, 0, key.peer_id)
    inner = InnerLoop(manifest, layout, model, source, resolve_device(config.device), trained)
    inner.step()
    times: list[float] = []
    while len(times) < MAX_STEPS and (not times or sum(times) + times[-1] < STEPS_S):
        began = time.perf_counter()
        inner.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


async def _uplink(client: AveragingClient) -> tuple[float, float | None]:
    """(round trip in seconds, bytes per second up). None where sending took no longer than a round trip varies."""
    pings = []
    for _ in range(NUM_PINGS):
        began = time.perf_counter()
        await client.probe()
        pings.append(time.perf_counter() - began)
    rtt_s, spread_s, rate, num_bytes = min(pings), max(pings) - min(pings), None, FIRST_FILLER
    for _ in range(2):
        began = time.perf_counter()
        try:
            await client.probe(num_filler_bytes=num_bytes)
        except Unreachable:  # not within the call's deadline: that is a measurement, too
            return rtt_s, num_bytes / (time.perf_counter() - began)
        took_s = time.perf_counter() - began - rtt_s
        if took_s > spread_s:
            rate = num_bytes / took_s
        num_bytes = MAX_FILLER if rate is None else min(MAX_FILLER, max(FIRST_FILLER, int(AIM_S * rate)))
    return rtt_s, rate


async def _downlink(
    root: Path, invite: Invite, config: PeerConfig, trust: TrustChain, client: AveragingClient, layout: Layout, swarm: SwarmView,
    views: tuple[FragmentView, ...], held: tuple[int, ...], events: Events,
) -> tuple[float | None, int]:  # fmt: skip
    """(bytes per second down, bytes fetched): newest anchors of what this peer would hold, for at most a minute."""
    anchors = {v.fragment: v for v in views}
    addresses = {m.peer: m.addresses for m in swarm.members}
    rank = {m.peer: m.role is not Role.KEEPER for m in swarm.members}
    async with gossip(root, invite.bootstrap, config, trust, lambda: client.credentials, events) as (_, exchange):
        fetcher = Fetcher(exchange, lambda peer: addresses.get(peer, ()), events)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(DOWNLOAD_S):
                for fragment in layout.fragments:
                    expert, view = expert_of(fragment.module), anchors.get(fragment.id)
                    if view is None or (expert is not None and expert not in held):
                        continue
                    sources = sorted(view.ready, key=lambda p: rank.get(p, True))
                    if not await exchange.has(view.anchor):
                        await exchange.put(view.anchor, await fetcher.fetch(view.anchor, max_anchor_bytes(fragment), sources))
        except (TimeoutError, Unreachable):
            pass  # what came until now measures it, too
        except DecentraError as error:
            events.emit("operation-failed", why=str(error))
        took_s = time.perf_counter() - began
    return (fetcher.rx_bytes / took_s if fetcher.rx_bytes >= MIN_MEASURED_BYTES else None), fetcher.rx_bytes


def describe_plan(found: dict[str, Any]) -> dict[str, str]:
    """Rows for a table."""
    up, down = found["up_mbit"], found["down_mbit"]
    link = f"{up:.3g} Mbit/s up" if up is not None else "up: faster than could be measured"
    link += f", {down:.3g} Mbit/s down" if down is not None else ", down: too little to fetch to measure it"
    late = "" if found["is_in_time"] else "; too slow for this run"
    return {
        "run": f"{found['name']}  {found['run'][:12]}: {found['num_trainers'] - 1} trainers, {found['num_keepers']} keepers",
        "way": f"{found['rtt_ms']:.0f} ms to the averaging service, {link}; clock {found['clock_offset_s']:+.1f} s; seen as {found['address']}",
        "memory": f"{mib(found['free_bytes'])} free; {found['experts_fit']} experts fit ({found['mode']}),"
        f" {found['experts']} are planned and need {mib(found['memory_bytes'])}",
        "speed": f"{found['step_s']:.3g} s an inner step, {found['tokens_per_s']:.0f} tokens/s; a round every"
        f" {found['inner_steps']} steps, {found['round_s']:.3g} s",
        "packets": f"{found['codec']}: {found['up_bytes_per_round'] / 1e6:.3g} MB up and {found['down_bytes_per_round'] / 1e6:.3g} MB down a round,"
        f" at most {found['up_mb_per_hour']:.0f} and {found['down_mb_per_hour']:.0f} MB an hour{late}",
        "time in steps": f"{found['utilisation']:.0%}: {found['why']}; {found['up_mbit_needed']:.3g} Mbit/s up are enough at the run's sparsest codec",
    }  # fmt: skip
