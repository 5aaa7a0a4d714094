"""Loss curves as a PNG file and as text for the terminal. Data in, picture out; imports its plotting library only when asked to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[float, float]]  # (seconds since the start, loss in nats per byte)
Mark = tuple[float, str]  # (seconds, what happened)


def loss_png(path: Path, curves: Mapping[str, Curve], marks: Sequence[Mark], levels: Mapping[str, float], title: str) -> None:
    """Write a PNG of training losses with vertical marks and horizontal reference levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    for name, curve in curves.items():
        axes.plot([t for t, _ in curve], [y for _, y in curve], label=name, linewidth=1.4)
    for index, (name, level) in enumerate(levels.items()):
        axes.axhline(level, linestyle="--", linewidth=1.0, color=f"C{index + len(curves)}", label=f"{name} {level:.3f}")
    for at, what in marks:
        axes.axvline(at, color="0.6", linewidth=0.8)
        axes.annotate(what, (at, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8, color="0.3")
    axes.set(xlabel="seconds", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def loss_text(curves: Mapping[str, Curve], title: str, width: int = 78, height: int = 16) -> str:
    """The same curves with text characters."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    for name, curve in curves.items():
        if curve:
            plotext.plot([t for t, _ in curve], [y for _, y in curve], label=name, marker="braille")
    plotext.title(title)
    plotext.xlabel("seconds")
    return str(plotext.uncolorize(plotext.build()))


def experts_png(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Write a PNG: tokens that trained each expert over the trunk's rounds. Who lags behind, or stands still, has no holder or no tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    for expert, curve in enumerate(curves):
        colour = pyplot.get_cmap("viridis")(expert / max(1, len(curves) - 1))
        axes.step([x for x, _ in curve], [y for _, y in curve], where="post", color=colour, label=f"expert {expert}", linewidth=1.2)
    axes.set(xlabel="confirmed rounds of the trunk", ylabel="tokens", title=title)
    axes.grid(alpha=0.25)
    if len(curves) <= 24:
        axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def heat_png(path: Path, share: Mapping[str, Sequence[float]], title: str) -> None:
    """Which share of each domain's tokens goes to which expert, darker for more."""
    from matplotlib.figure import Figure

    names, values = list(share), [list(row) for row in share.values()]
    figure = Figure(figsize=(2 + 0.6 * len(values[0]), 1.5 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0.0, aspect="auto")
    axes.set_xticks(range(len(values[0])))
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("expert")
    axes.set_title(title)
    for row, mine in enumerate(values):
        for column, value in enumerate(mine):
            dark = value > 0.6 * max(map(max, values))
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
    figure.colorbar(image, label="share of its tokens")
    figure.savefig(path, dpi=110, format="png")


def experts_text(curves: Sequence[Curve], title: str, width: int = 78, height: int = 16) -> str:
    """The same with text characters."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    for expert, curve in enumerate(curves):
        plotext.plot(
            [x for x, _ in curve], [y for _, y in curve], label=f"expert {expert}" if len(curves) <= 12 else None, marker="braille"
        )
    plotext.title(title)
    plotext.xlabel("rounds")
    return str(plotext.uncolorize(plotext.build()))
