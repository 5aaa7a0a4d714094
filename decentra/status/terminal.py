"""A snapshot as tables for the terminal. Pure: data in, rich renderables out."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from decentra.ids import ROUTER, TRUNK

_PHASE_STYLE = {
    "open": "cyan",
    "settled": "yellow",
    "tentative": "yellow",
    "confirmed": "green",
    "abandoned": "red",
    "void": "red",
    "idle": "dim",
}


def render(snap: dict[str, Any], height: int | None = None) -> RenderableType:
    """The whole view: headline, members, modules, and why anything waits. With ``height`` lines to fill, experts share a row if they must."""
    num_fragments = sum(len(m["fragments"]) for m in snap["modules"])
    is_short = height is not None and len(snap["members"]) + num_fragments + 12 > height
    return Group(
        _headline(snap), Text(), members_table(snap), reasons({m["name"] or m["peer"][-8:]: m["state"] for m in snap["members"] if m["state"]}),
        Text(), modules_table(snap, is_short=is_short),
        reasons({_label(m, f): why for m in _ordered(snap) for f in m["fragments"] if (why := _why(f))}),
    )  # fmt: skip


def _why(fragment: dict[str, Any]) -> str:
    """What it waits for, and whose delta of the last round was out of line."""
    clipped = ", ".join(f"{name} to {factor:g}" for name, factor in sorted(fragment["clipped"].items()))
    return "; ".join(words for words in (fragment["why"], f"last round clipped {clipped}" if clipped else "") if words)


def reasons(why_of: dict[str, str]) -> RenderableType:
    """One line per reason, with everybody it holds for."""
    who_of: dict[str, list[str]] = {}
    for name, why in why_of.items():
        who_of.setdefault(why, []).append(name)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(ratio=1, style="dim")
    for why, names in who_of.items():
        who = ", ".join(names) if len(names) < 5 else f"{names[0]} and {len(names) - 1} more"
        table.add_row(f"{who}: {why}")
    return table


def _ordered(snap: dict[str, Any]) -> list[dict[str, Any]]:
    """Trunk, router, experts by number."""
    return sorted(snap["modules"], key=lambda m: (m["module"] != TRUNK, m["module"] != ROUTER, len(m["module"]), m["module"]))


def _label(module: dict[str, Any], fragment: dict[str, Any]) -> str:
    return str(fragment["fragment"] if len(module["fragments"]) > 1 else module["module"])


def _headline(snap: dict[str, Any]) -> Text:
    state = "over" if snap["is_stopped"] else "ending" if snap["is_stopping"] else "running"
    text = Text.assemble(
        ("run ", "dim"), (snap["name"], "bold"), (f"  {snap['run'][:12]}  ", "dim"), (state, "green" if state == "running" else "yellow")
    )
    if snap["why"]:
        text.append(f" ({snap['why']})", "dim")
    loss = "-" if snap["loss"] is None else f"{snap['loss']:.3f}"
    text.append(
        f"\nlive {snap['num_live']}   participating {snap['num_participating']}   rounds: trunk {snap['rounds_confirmed_trunk']},"
        f" least expert {snap['rounds_confirmed_min_expert']}, given up {snap['rounds_abandoned']}, thin {snap['rounds_thin']}"
        f"   loss {loss}   tokens {count(snap['num_tokens'])}   up {size(snap['tx_bytes'])}   down {size(snap['rx_bytes'])}"
    )
    if snap["experts_short"] and not snap["is_stopped"]:
        few = ", ".join(f"{expert} ({number} of {snap['holders_wanted']})" for expert, number in snap["experts_short"].items())
        text.append(f"\nexperts with fewer holders than wanted: {few}; the run goes on, another trainer would take them", "yellow")
    for m in snap["members"]:
        if m["quarantine"]:
            text.append(f"\n{m['name']} is in quarantine: {m['quarantine']}", "yellow")
    has_defence = snap["is_judged"] or len(snap["unprotected"]) < len(snap["modules"])
    if has_defence and snap["unprotected"]:
        names = ", ".join(f"{module} ({n})" for module, n in snap["unprotected"].items())
        text.append(f"\nno protection from a lying holder, with its holders: {names}", "yellow")
    if snap["is_judged"] and 0 < (num := sum(m["role"] == "trainer" and m["is_live"] for m in snap["members"])) < 3:
        text.append(f"\nnobody is protected from a liar: {num} trainers, and judging takes three", "yellow")
    agree = ("   anchors agree", "green") if snap["anchors_equal"] else ("   anchors differ for now", "yellow")
    text.append(*agree)
    return text


def members_table(snap: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("member", "role", "live", "in"):
        table.add_column(name, no_wrap=True)
    table.add_column("experts")
    for name in ("steps", "tok/s", "loss", "up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in snap["members"]:
        is_trainer = m["role"] == "trainer"
        table.add_row(
            Text(m["name"] or m["peer"][-8:], "bold" if m["is_live"] else "dim"), m["role"], _mark(m["is_live"]),
            _mark(m["is_participating"]) if is_trainer else "", _experts(m), count(m["num_steps"]) if is_trainer else "",
            f"{m['tokens_per_s']:.0f}" if is_trainer else "", "-" if m["loss"] is None else f"{m['loss']:.3f}", size(m["tx_bytes"]), size(m["rx_bytes"]),
        )  # fmt: skip
    return table


def modules_table(snap: dict[str, Any], *, is_short: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("module", no_wrap=True)
    table.add_column("holders")
    for name in ("confirmed", "thin", "lost", "tokens", "round"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    experts = [m for m in _ordered(snap) if m["module"].startswith("expert.")]
    shown = [m for m in _ordered(snap) if m not in experts] if is_short else _ordered(snap)
    for module in shown:
        for f in module["fragments"]:
            table.add_row(
                _label(module, f), ", ".join(module["holders"]) or Text("nobody", "red"), str(f["num_confirmed"]), str(f["num_thin"]),
                str(f["num_abandoned"] + f["num_void"]), count(f["num_tokens"]), str(f["round"]), Text(f["phase"], _PHASE_STYLE.get(f["phase"], "")),
            )  # fmt: skip
    if is_short and experts:
        fragments = [f for m in experts for f in m["fragments"]]
        fewest = min(len(m["holders"]) for m in experts)
        table.add_row(
            f"{len(experts)} experts", Text(f"at least {fewest} each", "" if fewest else "red"), f"{min(f['num_confirmed'] for f in fragments)}+",
            str(sum(f["num_thin"] for f in fragments)), str(sum(f["num_abandoned"] + f["num_void"] for f in fragments)),
            count(sum(f["num_tokens"] for f in fragments)), f"{min(f['round'] for f in fragments)}+", "",
        )  # fmt: skip
    return table


def _experts(member: dict[str, Any]) -> str:
    numbers = ",".join(map(str, member["experts"]))
    return f"{numbers} (held)" if member["mode"] == "held" else numbers


def _mark(is_so: bool) -> Text:
    return Text("yes", "green") if is_so else Text("no", "red")


def count(number: int) -> str:
    """1234567 -> 1.23M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale * 10 or (unit != "k" and number >= scale):
            return f"{number / scale:.3g}{unit}"
    return str(number)


def size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"
