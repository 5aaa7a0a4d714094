"""``show``, ``status``, ``pull``, ``generate``: looking at a run and taking its model home. Changes nothing in the run."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from decentra.averaging.client import AveragingClient
from decentra.averaging.link import RunDescription
from decentra.cli.console import LogEvents
from decentra.cli.members import by_reachability, directory_of
from decentra.cli.running import StopRequest
from decentra.config import Manifest, PeerConfig
from decentra.errors import ConfigError, IntegrityError, Unreachable
from decentra.identity import Keypair, save_key
from decentra.ids import FragmentId
from decentra.invite import Invite
from decentra.protocol.messages import FragmentView, Role
from decentra.wire.trust import TrustChain

PULL_PATIENCE_S = 120.0


@asynccontextmanager
async def watching(invite: Invite) -> AsyncIterator[AveragingClient]:
    """A client that can only read."""
    client = AveragingClient(invite.services, TrustChain(invite.run_id, invite.run_public), LogEvents(), token=invite.token)
    try:
        yield client
    finally:
        await client.close()


async def fetch_status(client: AveragingClient, manifest: Manifest | None = None) -> tuple[Manifest, dict[str, Any]]:
    """The run's snapshot; the manifest is fetched once and handed back."""
    from decentra.status.snapshot import snapshot

    known = manifest if manifest is not None else (await client.describe()).manifest
    swarm, views = await client.status()
    return known, snapshot(known, swarm, views)


async def status_once(invite: Invite) -> dict[str, Any]:
    async with watching(invite) as client:
        return (await fetch_status(client))[1]


async def watch_status(invite: Invite, stop: StopRequest, period_s: float) -> None:
    """Redraw the status until Ctrl-C or the end of the run."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from decentra.status.terminal import render

    manifest: Manifest | None = None
    async with watching(invite) as client:
        with Live(
            Text("asking the averaging service ..."), console=Console(), screen=False, auto_refresh=False, vertical_overflow="crop"
        ) as live:
            while not stop.event.is_set():
                try:
                    manifest, snap = await fetch_status(client, manifest)
                    live.update(render(snap, live.console.height), refresh=True)
                    if snap["is_stopped"]:
                        return
                except Unreachable as error:
                    live.update(Text(f"{error}; trying again", "yellow"), refresh=True)
                try:
                    async with asyncio.timeout(period_s):
                        await stop.event.wait()
                except TimeoutError:
                    continue


def describe_run(invite: Invite, run: RunDescription) -> dict[str, Any]:
    """What joining means, before joining: sizes in bytes, steps and what leaves the machine."""
    from decentra.delta.packet import max_packet_bytes
    from decentra.ids import expert_of
    from decentra.model.custom import layout_for

    manifest = run.manifest
    spec, packets = manifest.model, 0
    num_parameters = num_trained = None
    if spec.code == "decoder":
        layout = layout_for(manifest)
        num_parameters = layout.num_elements
        count = manifest.placement.experts_per_peer
        mine = [f for f in layout.fragments if (e := expert_of(f.module)) is None or e < count]
        num_trained = sum(f.num_elements for f in mine)
        packets = sum(max_packet_bytes(f, manifest.codec.name) for f in mine)
        everything = sum(max_packet_bytes(f, manifest.codec.name) for f in layout.fragments)
    else:
        everything = 0
    return {
        "ok": True, "run": manifest.run_id(), "name": manifest.name, "description": manifest.description, "licence": manifest.licence,
        "organiser": manifest.organiser or f"whoever holds run key {invite.run_public.hex()[:16]}", "services": list(invite.services),
        "bootstrap": list(invite.bootstrap), "model": spec.model_dump(), "num_parameters": num_parameters, "num_parameters_trained": num_trained,
        "data": manifest.data.model_dump(mode="json", exclude={"held_out"}), "inner_steps": manifest.rounds.inner_steps,
        "codec": manifest.codec.name, "codec_sparsest": manifest.codec.sparsest,
        "up_bytes_per_round": packets, "down_bytes_per_round": everything * max(1, manifest.placement.holders),
        "first_download_bytes": 4 * num_parameters if num_parameters else None, "admission": manifest.admission.mode,
        "stop": manifest.stop.model_dump(), "clock_offset_s": round(run.clock_offset_s, 2),
        "leaves_your_machine": "compressed weight differences, counts of steps and tokens, training loss, addresses and the peer's name; never text",
    }  # fmt: skip


async def show(invite: Invite) -> dict[str, Any]:
    async with watching(invite) as client:
        return describe_run(invite, await client.describe())


async def pull(invite: Invite, target: Path, model_code: Path | None = None, *, keep_raw: bool = False) -> dict[str, Any]:
    """Assemble the confirmed anchors of now into a checkpoint folder; every blob is verified against its digest."""
    from decentra.cli.tokenizers import fetch_tokenizer
    from decentra.cli.wiring import gossip
    from decentra.delta.anchor import max_anchor_bytes
    from decentra.model.custom import layout_for
    from decentra.peer.checkpoint import assemble, save_model
    from decentra.peer.fetch import Fetcher

    events = LogEvents(run=invite.run_id[:8])
    with tempfile.TemporaryDirectory(prefix="decentra-pull-") as scratch:
        root, key = Path(scratch), Keypair.generate()
        save_key(root / "identity.key", key)
        trust = TrustChain(invite.run_id, invite.run_public)
        client = AveragingClient(invite.services, trust, events, key=key, token=invite.token)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            manifest = (await client.describe()).manifest
            await client.join(Role.WATCHER, os.urandom(8).hex(), "pull")
            layout = layout_for(manifest, model_code)
            config = PeerConfig(name="pull", role="watcher", listen=())
            _, exchange = await stack.enter_async_context(gossip(root, invite.bootstrap, config, trust, lambda: client.credentials, events))
            deadline, blobs, views = time.monotonic() + PULL_PATIENCE_S, {}, {}
            for fragment in layout.fragments:
                blobs[fragment.id], views[fragment.id] = await _newest_anchor(
                    client, exchange, fragment.id, max_anchor_bytes(fragment), Fetcher, events, deadline
                )
            heights = {f: v.height for f, v in views.items()}
            assembled = assemble(manifest, blobs, heights, model_code)
            _, snap = await fetch_status(client, manifest)
            digest = manifest.data.tokenizer
            marks = None if digest is None else await fetch_tokenizer(digest, client, exchange, events, deadline)
            told = {"members": [m["name"] for m in snap["members"]], "num_tokens": snap["num_tokens"]}
            await asyncio.to_thread(save_model, target, assembled, told, marks)
    return {
        "ok": True, "dir": str(target), "run": manifest.run_id(), "num_parameters": sum(t.numel() for t in assembled.state.values()),
        "heights": heights, "anchors": assembled.anchors, "num_bytes": sum(map(len, blobs.values())),
    }  # fmt: skip


async def _newest_anchor(
    client: AveragingClient, exchange: Any, fragment: FragmentId, max_bytes: int, make_fetcher: Any, events: LogEvents, deadline: float
) -> tuple[bytes, FragmentView]:
    """A running swarm moves on while we fetch: ask again with the newest view until one anchor arrived whole."""
    while True:
        swarm, views = await client.status()
        view = next((v for v in views if v.fragment == fragment), None)
        if view is None:
            raise IntegrityError(f"the service does not know fragment {fragment}, which the manifest names")
        fetcher = make_fetcher(exchange, directory_of(swarm), events)
        try:
            return await fetcher.fetch(view.anchor, max_bytes, by_reachability(view.ready, swarm)), view
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            events.emit("waiting", why=f"{error}; asking again")
            await asyncio.sleep(1.0)


def generate_text(
    path: Path, prompt: str, num_tokens: int, temperature: float, top_k: int | None, seed: int, model_code: Path | None,
    without: Sequence[int] = (),
) -> str:  # fmt: skip
    """Continue ``prompt`` with the model in a checkpoint folder; bytes that are no UTF-8 are shown as replacement characters."""
    from decentra.data.tokens import tensor_of
    from decentra.hf.checkpoint import tokenizer_of
    from decentra.model.generate import generate
    from decentra.peer.checkpoint import load_model

    manifest, model = load_model(path, model_code)
    _leave_out(model, without)
    tokenizer = tokenizer_of(path, manifest)
    tokens = tensor_of(tokenizer.encode(prompt.encode(errors="replace"))).tolist()
    new = generate(model, tokens, num_tokens, temperature=temperature, top_k=top_k, seed=seed)
    if tokenizer.digest is None:
        return tokenizer.decode(new)
    whole, start = tokenizer.decode([*tokens, *new]), tokenizer.decode(tokens)  # a character may have several tokens
    return whole[len(start) :]


def _leave_out(model: Any, without: Sequence[int]) -> None:
    if not without:
        return
    if not hasattr(model, "leave_out"):
        raise ConfigError("--without: this model is its own code and has no leave_out; experts are known of the built-in decoder only")
    model.leave_out(without)


def evaluate_checkpoint(path: Path, model_code: Path | None = None, without: Sequence[int] = ()) -> dict[str, Any]:
    """Held-out loss of each embedded domain and their mean, nats per token and per byte (the same where bytes are the tokens)."""
    from decentra.data.domains import embedded_domain, embedded_domains
    from decentra.errors import DataError
    from decentra.hf.checkpoint import tokenizer_of
    from decentra.model.evaluate import evaluate
    from decentra.peer.checkpoint import load_model

    manifest, model = load_model(path, model_code)
    _leave_out(model, without)
    tokenizer = tokenizer_of(path, manifest)
    names = [n for n in manifest.data.domains if n in embedded_domains()]
    if not names:
        raise DataError(f"run '{manifest.name}' has no embedded domains; its held-out text is not on this machine")
    losses, per_byte = {}, {}
    for name in names:
        text = embedded_domain(name, manifest.data).held_out
        tokens = tokenizer.encode(text)
        losses[name] = evaluate(model, tokens, manifest.data.seq_len)
        per_byte[name] = losses[name] * len(tokens) / len(text)
    return {
        "ok": True, "dir": str(path), "without": list(without), "loss": sum(losses.values()) / len(losses), "loss_per_domain": losses,
        "nats_per_byte": sum(per_byte.values()) / len(per_byte), "nats_per_byte_per_domain": per_byte,
    }  # fmt: skip
