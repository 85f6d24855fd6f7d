"""The picture of a bench: bars of ratios, by library, within groups, within panels."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from experiments.common.panels import COLOURS

# Of Okabe and Ito, as plot.COLOURS; blue is bnjax's.
PALETTE = (COLOURS["plain"], "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f")
WIDTH, DPI = 7.8, 180
HEAD, BAR, GAP = 0.7, 0.135, 0.11  # inches

Panel = dict[str, dict[str, float]]


def draw(
    panels: dict[str, Panel], path: Path, *, title: str, note: str, label: str
) -> None:
    """Draws one panel beside the other, as a PNG of WIDTH * DPI pixels.

    Args:
        panels: the ratio of each bar of each group of each panel. A bar may be absent,
            then its place stays empty; the groups are those of the first panel.
        path: of the file.
        title: of the picture.
        note: below the title, in small print: the hardware, the versions.
        label: of the horizontal axis, which is logarithmic.
    """
    groups = list(next(iter(panels.values())))
    bars = list(
        dict.fromkeys(b for p in panels.values() for group in p.values() for b in group)
    )
    colours = {bar: PALETTE[i % len(PALETTE)] for i, bar in enumerate(bars)}
    height = len(groups) * (len(bars) * BAR + GAP) + 0.7
    figure = Figure((WIDTH, HEAD + height), dpi=DPI, layout="constrained")
    rows = figure.subfigures(2, 1, squeeze=False, height_ratios=(HEAD, height))
    head, body = rows[:, 0]
    axes = body.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        _panel(ax, panel, groups, colours)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(label, fontsize=9)
    _ticks(
        axes[0], [r for p in panels.values() for g in p.values() for r in g.values()]
    )
    head.suptitle(title, fontsize=11)
    head.text(0.5, 0.58, note, fontsize=7.5, color="0.35", ha="center", va="center")
    handles, names = axes[0].get_legend_handles_labels()
    head.legend(
        handles,
        names,
        loc="lower center",
        ncols=len(names),
        fontsize=9,
        frameon=False,
        handlelength=1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(
    axes: Axes, panel: Panel, groups: list[str], colours: dict[str, str]
) -> None:
    """The bars of one panel: from 1 to the ratio, whose value is written at the end."""
    pitch = len(colours) * BAR + GAP
    for i, (bar, colour) in enumerate(colours.items()):
        at = [
            g * pitch + i * BAR for g, name in enumerate(groups) if bar in panel[name]
        ]
        ratios = [panel[name][bar] for name in groups if bar in panel[name]]
        widths = [ratio - 1 for ratio in ratios]
        axes.barh(at, widths, 0.9 * BAR, left=1, color=colour, label=bar)
        for y, ratio in zip(at, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}",
                (ratio, y),
                xytext=(2 if ratio >= 1 else -2, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center_baseline",
                fontsize=7,
            )
    axes.axvline(1, color=COLOURS["bn"], lw=1.5)
    centre = (len(colours) - 1) / 2 * BAR
    axes.set_yticks([g * pitch + centre for g in range(len(groups))], groups)
    axes.set_ylim(len(groups) * pitch - BAR / 2, -BAR / 2 - GAP)
    axes.tick_params(labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ticks(axes: Axes, ratios: list[float]) -> None:
    """A logarithmic axis with plain numbers, and room at its ends for the values."""
    axes.set_xscale("log")
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    room = (high / low) ** 0.15
    low, high = low / (room if low < 1 else 1.05), high * room
    marks = [m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
