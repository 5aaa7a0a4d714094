"""A run's state as one plain dictionary, from the service's views; what ``status --json`` prints. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decentra.bits import ONE_BITS, bits_float
from decentra.config import Manifest
from decentra.ids import ROUTER, TRUNK, FragmentId, PeerId, expert_module, expert_of, module_of_fragment, short
from decentra.protocol.messages import FragmentView, MemberView, Phase, Role, SwarmView

NUM_RECENT_PARTICIPATION = 2  # a peer participates when one of the last two confirmed rounds of some fragment has its packet
MIN_HOLDERS = 3  # of two that disagree nobody can say which one lies


def snapshot(manifest: Manifest, swarm: SwarmView, views: Sequence[FragmentView]) -> dict[str, Any]:
    """Members, modules, rounds and sums. Keys are stable; new ones may be added."""
    active = participants(views)
    live = [m for m in swarm.members if m.is_live]
    losses = [m.counters.loss for m in live if m.counters.loss is not None]
    fragments = [_fragment(v, swarm) for v in views]
    return {
        "ok": True,
        "schema": 1,
        "run": manifest.run_id(),
        "name": manifest.name,
        "is_stopping": swarm.is_stopping,
        "is_stopped": swarm.is_stopped,
        "why": swarm.why,
        "num_live": len(live),
        "num_participating": len(active),
        "tokens_per_expert": tokens_per_expert(manifest, views),
        "members": [_member(m, m.peer in active) for m in sorted(swarm.members, key=lambda m: (m.role, m.name))],
        "modules": _modules(fragments, swarm),
        "holders_wanted": manifest.placement.holders,
        "experts_short": {
            e: n
            for e, n in enumerate(_num_holders(manifest, live))
            if n < manifest.placement.holders and e not in manifest.placement.frozen_experts
        },
        "is_judged": manifest.judging.share is not None,
        "unprotected": unprotected(manifest, live),
        "rounds_confirmed_trunk": min(
            (v.tally.num_confirmed for v in views if expert_of(module_of_fragment(v.fragment)) is None), default=0
        ),
        "rounds_confirmed_min_expert": min((v.tally.num_confirmed for v in views if _is_trained_expert(v.fragment, manifest)), default=0),
        "rounds_abandoned": sum(v.tally.num_abandoned + v.tally.num_void for v in views),
        "rounds_thin": sum(v.tally.num_thin for v in views),
        "loss": round(sum(losses) / len(losses), 4) if losses else None,
        "num_tokens": sum(m.counters.num_tokens for m in swarm.members),
        "tx_bytes": sum(m.counters.tx_bytes for m in swarm.members),
        "rx_bytes": sum(m.counters.rx_bytes for m in swarm.members),
        "anchors_equal": agreement(views, live),
    }


def participants(views: Sequence[FragmentView]) -> frozenset[PeerId]:
    """Peers whose packets are inside the newest confirmed rounds."""
    found: set[PeerId] = set()
    for view in views:
        confirmed = [o for o in view.recent if o.phase is Phase.CONFIRMED and o.settlement is not None]
        for outcome in confirmed[-NUM_RECENT_PARTICIPATION:]:
            assert outcome.settlement is not None
            found |= {e.peer for e in outcome.settlement.entries}
    return frozenset(found)


def tokens_per_expert(manifest: Manifest, views: Sequence[FragmentView]) -> list[int]:
    """Tokens routed to each expert inside confirmed rounds."""
    tokens = [0] * manifest.model.num_experts
    for view in views:
        if (expert := expert_of(module_of_fragment(view.fragment))) is not None:
            tokens[expert] = max(tokens[expert], view.tally.num_tokens)
    return tokens


def agreement(views: Sequence[FragmentView], live: Sequence[MemberView]) -> bool:
    """True when every live trainer and keeper that takes part in a fragment holds its confirmed anchor."""
    for view in views:
        expert = expert_of(module_of_fragment(view.fragment))
        expected = {m.peer for m in live if m.role is Role.KEEPER or (m.role is Role.TRAINER and (expert is None or expert in m.experts))}
        if not expected <= set(view.ready):
            return False
    return True


def unprotected(manifest: Manifest, live: Sequence[MemberView]) -> dict[str, int]:
    """Modules in which one lying holder moves the anchor as it likes, with their holders: no defence, or fewer than ``MIN_HOLDERS`` to outvote it."""
    num_trainers = sum(m.role is Role.TRAINER for m in live)
    holders = dict.fromkeys((TRUNK, ROUTER), num_trainers)
    frozen = manifest.placement.frozen_experts
    holders |= {expert_module(e): n for e, n in enumerate(_num_holders(manifest, live)) if e not in frozen}
    return {m: n for m, n in holders.items() if n < MIN_HOLDERS or not is_defended(manifest, m)}


def is_defended(manifest: Manifest, module: str) -> bool:
    """Whether the run's rules do anything against a well-formed lie about this module."""
    is_trimmed = manifest.merge_of(FragmentId(f"{module}/0")) == "trimmed"
    return is_trimmed or (module == TRUNK and manifest.judging.share is not None)


def _num_holders(manifest: Manifest, live: Sequence[MemberView]) -> list[int]:
    """Live trainers of each expert."""
    return [sum(m.role is Role.TRAINER and e in m.experts for m in live) for e in range(manifest.model.num_experts)]


def _is_trained_expert(fragment: FragmentId, manifest: Manifest) -> bool:
    expert = expert_of(module_of_fragment(fragment))
    return expert is not None and expert not in manifest.placement.frozen_experts


def _member(m: MemberView, is_participating: bool) -> dict[str, Any]:
    c = m.counters
    return {
        "peer": m.peer, "name": m.name, "role": str(m.role), "is_live": m.is_live, "is_participating": is_participating, "experts": list(m.experts),
        "mode": ("held" if m.is_partial else "mirror") if m.role is Role.TRAINER else None,
        "quarantine": m.quarantine or None,
        "state": c.state, "num_steps": c.num_steps, "num_tokens": c.num_tokens, "tokens_per_s": round(c.tokens_per_s, 1), "loss": c.loss,
        "tx_bytes": c.tx_bytes, "rx_bytes": c.rx_bytes, "skipped_rounds": c.skipped_rounds, "addresses": list(m.addresses),
    }  # fmt: skip


def _fragment(v: FragmentView, swarm: SwarmView) -> dict[str, Any]:
    names = {m.peer: m.name or m.peer for m in swarm.members}
    return {
        "fragment": v.fragment, "module": module_of_fragment(v.fragment), "height": v.height, "anchor": v.anchor, "round": v.round,
        "phase": str(v.phase), "why": _with_names(v.why, names), "ready": [names.get(p, p) for p in v.ready],
        "offers": [names.get(o.peer, o.peer) for o in v.offers], "attesters": [names.get(p, p) for p in v.attesters],
        "num_confirmed": v.tally.num_confirmed, "num_thin": v.tally.num_thin, "num_abandoned": v.tally.num_abandoned,
        "num_void": v.tally.num_void, "num_tokens": v.tally.num_tokens, "contributed": _contributed(v, names), "clipped": _clipped(v, names),
    }  # fmt: skip


def _contributed(view: FragmentView, names: dict[PeerId, str]) -> dict[str, int]:
    """Member -> the newest confirmed round that has its packet, as far as the view remembers."""
    found: dict[str, int] = {}
    for outcome in view.recent:
        if outcome.phase is Phase.CONFIRMED and outcome.settlement is not None:
            found |= {names.get(e.peer, e.peer): outcome.round for e in outcome.settlement.entries}
    return found


def _clipped(view: FragmentView, names: dict[PeerId, str]) -> dict[str, float]:
    """Member -> what its delta was multiplied with in the newest confirmed round, for those whose norm was out of line."""
    last = next((o.settlement for o in reversed(view.recent) if o.phase is Phase.CONFIRMED and o.settlement is not None), None)
    entries = () if last is None else last.entries
    return {names.get(e.peer, e.peer): float(f"{bits_float(e.clip_bits):.2g}") for e in entries if e.clip_bits != ONE_BITS}


def _with_names(why: str, names: dict[PeerId, str]) -> str:
    """The service speaks of peers by the end of their id; people know them by name."""
    for peer, name in names.items():
        why = why.replace(short(peer), name)
    return why


def _modules(fragments: list[dict[str, Any]], swarm: SwarmView) -> list[dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    for fragment in fragments:
        name = fragment["module"]
        expert = expert_of(name)
        holders = [m.name for m in swarm.members if m.role is Role.TRAINER and m.is_live and (expert is None or expert in m.experts)]
        modules.setdefault(name, {"module": name, "holders": holders, "fragments": []})["fragments"].append(fragment)
    return list(modules.values())
