"""Which expert serves what, as colours: a text in the terminal, the same as a page, and a heat map of domains and experts. Data in, renderables out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#bab0ac")


def colour(expert: int) -> str:
    return PALETTE[expert % len(PALETTE)]


def _runs(text: str, expert_per_byte: Sequence[int]) -> list[tuple[int, str]]:
    """(expert, piece) of neighbouring characters; a character is its first byte's."""
    at, found = 0, []
    for character in text:
        size = len(character.encode())
        found.append((expert_per_byte[min(at, len(expert_per_byte) - 1)], character))
        at += size
    return [(expert, "".join(c for _, c in group)) for expert, group in groupby(found, key=lambda pair: pair[0])]


def coloured(text: str, expert_per_byte: Sequence[int]) -> Text:
    shown = Text()
    for expert, piece in _runs(text, expert_per_byte):
        shown.append(piece, f"black on {colour(expert)}")
    shown.append("\n")
    for expert in sorted(set(expert_per_byte)):
        shown.append(f" {expert} ", f"black on {colour(expert)}")
    return shown


def page(text: str, expert_per_byte: Sequence[int], title: str) -> str:
    """A page without scripts."""
    pieces = "".join(
        f'<span style="background:{colour(e)}" title="expert {e}">{html.escape(piece)}</span>' for e, piece in _runs(text, expert_per_byte)
    )
    legend = " ".join(f'<span style="background:{colour(e)}">&nbsp;expert {e}&nbsp;</span>' for e in sorted(set(expert_per_byte)))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1><p>{legend}</p>'
        f'<pre style="white-space:pre-wrap">{pieces}</pre>\n'
    )


def heat_map(share: Mapping[str, Sequence[float]]) -> Table:
    """Rows are domains, columns experts; the share of a domain's tokens as a shade and a number."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("domain")
    width = max(map(len, share.values()), default=0)
    for expert in range(width):
        table.add_column(str(expert), justify="right")
    top = max((max(row) for row in share.values()), default=1.0) or 1.0
    for domain, row in share.items():
        cells = [Text(f"{value:.0%}", f"white on rgb({30 + int(150 * value / top)},60,{160 - int(120 * value / top)})") for value in row]
        table.add_row(domain, *cells)
    return table
