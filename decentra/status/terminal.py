"""A snapshot as tables for the terminal. Pure: data in, rich renderables out."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_PHASE_STYLE = {
    "open": "cyan",
    "settled": "yellow",
    "tentative": "yellow",
    "confirmed": "green",
    "abandoned": "red",
    "void": "red",
    "idle": "dim",
}


def render(snap: dict[str, Any]) -> RenderableType:
    """The whole view: headline, members, modules."""
    return Group(_headline(snap), Text(), members_table(snap), Text(), modules_table(snap))


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
    agree = ("   anchors agree", "green") if snap["anchors_equal"] else ("   anchors differ for now", "yellow")
    text.append(*agree)
    return text


def members_table(snap: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("member", "role", "live", "in", "experts"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "tokens", "tok/s", "loss", "up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("doing", ratio=1)
    for m in snap["members"]:
        is_trainer = m["role"] == "trainer"
        table.add_row(
            Text(m["name"] or m["peer"][-8:], "bold" if m["is_live"] else "dim"), m["role"], _mark(m["is_live"]),
            _mark(m["is_participating"]) if is_trainer else "",
            ",".join(map(str, m["experts"])), count(m["num_steps"]) if is_trainer else "", count(m["num_tokens"]) if is_trainer else "",
            f"{m['tokens_per_s']:.0f}" if is_trainer else "", "-" if m["loss"] is None else f"{m['loss']:.3f}", size(m["tx_bytes"]), size(m["rx_bytes"]),
            Text(m["state"] or "", "dim" if m["is_live"] else "red"),
        )  # fmt: skip
    return table


def modules_table(snap: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("module", "holders"):
        table.add_column(name, no_wrap=True)
    for name in ("confirmed", "thin", "given up", "tokens", "round"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("waits for", ratio=1)
    for module in snap["modules"]:
        for f in module["fragments"]:
            label = f["fragment"] if len(module["fragments"]) > 1 else module["module"]
            table.add_row(
                label, ", ".join(module["holders"]) or Text("nobody", "red"), str(f["num_confirmed"]), str(f["num_thin"]),
                str(f["num_abandoned"] + f["num_void"]), count(f["num_tokens"]), str(f["round"]),
                Text(f["phase"], _PHASE_STYLE.get(f["phase"], "")), Text(f["why"], "dim"),
            )  # fmt: skip
    return table


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
