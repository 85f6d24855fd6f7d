"""The picture of a report: a panel for each kind of finding, over the layers.

The one file of the library that needs matplotlib. Text and lines have the colours of
its current style; what marks data is legible on white and on black.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bnjax.diagnostics._measures import Drift
from bnjax.diagnostics._momentum import SMALLEST
from bnjax.diagnostics._report import Measures, Report

Layers = Sequence[Measures]

BLUE, ORANGE = "#2f86c8", "#d55e00"
DOT: dict[str, Any] = {"marker": "o", "color": BLUE, "linestyle": "none"}
REPORTED: dict[str, Any] = {"marker": "D", "color": ORANGE, "linestyle": "none"}
SMALL, MEDIUM, LARGE = 7, 8, 10  # points of type
CHARACTER, LINE = 0.065, 0.13  # inches, of small type


class Picture(Figure):
    """A figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def draw(report: Report) -> Figure:
    """The picture of a report, of the panels that have something to show."""
    layers = report.measures
    panels: list[tuple[float, Callable[[Axes], None]]] = []  # (height, panel)
    if layers:
        panels.append((1.3, lambda axes: draw_channels(axes, layers)))
    has_drift = any(of.drift and np.isfinite(of.drift.std).any() for of in layers)
    if has_drift:
        limit = report.largest_drift
        panels.append((1.8, lambda axes: draw_mean_drift(axes, layers, limit)))
        panels.append((1.8, lambda axes: draw_std_drift(axes, layers, limit)))
    has_momentum = bool(np.isfinite(momenta_of(layers)).any())
    if has_momentum:
        panels.append((1.4, lambda axes: draw_momentum(axes, layers)))
    if any(of.difference for of in layers):
        panels.append((1.1, lambda axes: draw_differences(axes, layers)))

    names = [shortened(of.name) for of in layers]
    heights = [height for height, _ in panels]
    width = float(np.clip(4.5 + 0.13 * len(layers), 6.4, 14))
    below = CHARACTER * max(map(len, names), default=0)
    figure = Picture((width, 0.9 + below + sum(heights)), layout="constrained")
    title = f"{report.layers} layers, {len(report)} findings"
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE)
    if not panels:
        return figure
    grid = figure.subplots(
        len(panels), sharex=True, squeeze=False, height_ratios=heights
    )
    axes = grid[:, 0]
    axes[0].set_xlim(-0.6, len(layers) - 0.4)
    for each, (_, panel) in zip(axes, panels):
        each.grid(axis="x", alpha=0.15)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=SMALL)
        panel(each)
    label_layers(axes[-1], names, [in_trouble(of) for of in layers], 0.7 * width)
    if has_drift or has_momentum:
        draw_legend(figure)
    return figure


# Panels


def draw_channels(axes: Axes, layers: Layers) -> None:
    """A strip for each kind of trouble, with the share of each layer's channels."""
    label(axes, "Share of channels in trouble (full height: all of the layer)")
    channels = [of.channels for of in layers]
    total = f"{sum(flags.dead.size for flags in channels):,} channels"
    never = [np.array([of.never_updated]) for of in layers]
    strips = {
        "gamma near zero": ([flags.gamma_near_zero for flags in channels], total),
        "dead": ([flags.dead for flags in channels], total),
        "exploded": ([flags.exploded for flags in channels], total),
        "never updated": (never, f"{len(layers)} layers"),
    }
    for y, (flags, of_all) in enumerate(strips.values()):
        share = np.array([flag.mean() for flag in flags])
        visible = np.where(share > 0, np.maximum(0.8 * share, 0.12), 0)
        axes.bar(np.arange(len(layers)), visible, 0.6, bottom=y, color=ORANGE)
        axes.axhline(y, color=matplotlib.rcParams["axes.edgecolor"], lw=0.6)
        count = sum(int(flag.sum()) for flag in flags)
        axes.text(
            1.01,
            y + 0.4,
            f"{count:,} of {of_all}" if count else "none",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL,
        )
    axes.set_ylim(0, len(strips))
    axes.set_yticks(np.arange(len(strips)) + 0.4, list(strips))
    axes.tick_params("y", length=0)


def draw_mean_drift(axes: Axes, layers: Layers, limit: float) -> None:
    """A dot for each channel; linear between the limits, logarithmic beyond them."""
    label(
        axes, "Mean of the batch, from the running mean", "running standard\ndeviations"
    )
    x, values, reported = by_channel(layers, lambda drift: np.real(drift.mean))
    dots(axes, x, values, reported)
    shown = limit if np.isfinite(limit) else 0.0
    farthest = max(np.abs(values).max(), shown) or 1.0
    if farthest > 3 * limit > 0:
        axes.set_yscale("symlog", linthresh=limit, linscale=0.7)
        powers = limit * 10.0 ** np.arange(np.log10(farthest / limit) + 0.5)
        ticks(axes, FixedLocator([*-powers[::-1], 0, *powers]), plain)
    axes.set_ylim(-1.3 * farthest, 1.3 * farthest)
    if np.isfinite(limit):
        limits(axes, -limit, limit)


def draw_std_drift(axes: Axes, layers: Layers, limit: float) -> None:
    """A dot for each channel; logarithmic."""
    label(axes, "Standard deviation of the batch, over the running one", "ratio")
    x, values, reported = by_channel(layers, lambda drift: drift.std)
    values = np.maximum(values, 1e-9)  # of layers whose epsilon is 0
    dots(axes, x, values, reported)
    axes.set_yscale("log")
    shown = limit if np.isfinite(limit) else 0.0
    top = 1.3 * max(values.max(), 1 / values.min(), 1 + shown)
    axes.set_ylim(1 / top, top)
    ticks(axes, LogLocator(subs=(1, 2, 5) if top < 20 else (1,)), plain)
    if np.isfinite(limit):
        limits(axes, 1 / (1 + limit), 1 + limit)


def draw_momentum(axes: Axes, layers: Layers) -> None:
    """A dot for each layer, by how many steps it averages: 1 / (1 - momentum)."""
    label(axes, "Momentum that the step shows", "steps averaged\n(momentum)")
    momentum = momenta_of(layers)
    steps = 1 / np.where(momentum < 1, 1 - momentum, np.nan)
    dots(axes, np.arange(len(layers)), steps, momentum < SMALLEST, large=True)
    axes.set_yscale("log")
    most = float(np.nanmax([*steps, 10]))
    axes.set_ylim(0.8, 2.5 * most)
    shown = [10.0**power for power in range(7)] + [2.0] * (most < 50)
    ticks(axes, FixedLocator(shown), lambda n: f"{n:,.0f} ({1 - 1 / n:g})")
    limits(axes, 1 / (1 - SMALLEST), None)
    note(axes, np.flatnonzero(momentum == 1), "not updated")


def draw_differences(axes: Axes, layers: Layers) -> None:
    """A bar for each layer whose replicas differ."""
    label(axes, "Difference between replicas, over the largest value", "ratio")
    values = np.array([of.difference or 0 for of in layers])
    x = np.flatnonzero((values > 0) & np.isfinite(values))
    axes.bar(x, values[x], 0.6, color=ORANGE)
    axes.set_yscale("log")
    low, high = min(values[x], default=0.1), max(values[x], default=0.1)
    axes.set_ylim(10 ** np.floor(np.log10(low) - 0.5), 3 * high)
    ticks(axes, LogLocator(numticks=5), lambda value: f"{value:.0e}")
    note(axes, np.flatnonzero(np.isinf(values)), "not finite")


# What panels share


def by_channel(
    layers: Layers, measure: Callable[[Drift], Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each channel stands, its value, and whether it is reported.

    The channels of a layer lie side by side; those that are not judged are left out.
    """
    parts = [
        (
            i + np.linspace(-0.3, 0.3, of.drift.std.size + 2)[1:-1],
            measure(of.drift).astype(np.float64),
            measure(of.drifted).astype(bool),
        )
        for i, of in enumerate(layers)
        if of.drift and of.drifted
    ]
    x, values, reported = map(np.concatenate, zip(*parts))
    known = np.isfinite(values)
    return x[known], values[known], reported[known]


def in_trouble(of: Measures) -> bool:
    """Whether it has a part in a finding."""
    flags = [of.never_updated, *of.channels, *(of.drifted or ())]
    momentum = np.nan if of.momentum is None else of.momentum
    flags += [momentum < SMALLEST, momentum == 1, bool(of.difference)]
    return any(map(np.any, flags))


def momenta_of(layers: Layers) -> np.ndarray:
    """The momentum of each layer; NaN where it is not known."""
    momenta = [np.nan if of.momentum is None else of.momentum for of in layers]
    return np.array(momenta, np.float64)


def dots(
    axes: Axes,
    x: np.ndarray,
    values: np.ndarray,
    reported: np.ndarray,
    *,
    large: bool = False,
) -> None:
    """Those that are reported lie above the others, in another colour and shape."""
    size = 4 if large else 2.5 if len(x) < 2000 else 1.5
    for which, style, add in ((~reported, DOT, 0), (reported, REPORTED, 1)):
        axes.plot(
            x[which], values[which], markersize=size + add, markeredgewidth=0, **style
        )


def limits(axes: Axes, low: float, high: float | None) -> None:
    """Dashed lines; what lies beyond them is shaded."""
    bottom, top = axes.get_ylim()
    for limit, end in ((low, bottom), (high, top)):
        if limit is not None:
            axes.axhline(limit, **limit_style())
            axes.axhspan(limit, end, color=ORANGE, alpha=0.16, lw=0)


def limit_style() -> dict[str, Any]:
    return {"color": matplotlib.rcParams["text.color"], "ls": "--", "lw": 0.8}


def label(axes: Axes, title: str, y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=MEDIUM)
    axes.set_ylabel(y, fontsize=SMALL)


def ticks(axes: Axes, locator, text: Callable[[float], str]) -> None:
    """Ticks along y, named by `text`, and none between them."""
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def plain(value: float) -> str:
    return FuncFormatter.fix_minus(f"{value:g}")


def note(axes: Axes, layers: np.ndarray, text: str) -> None:
    """A triangle at the top instead of a value, and the text where there is room."""
    at_top = {"transform": axes.get_xaxis_transform(), "color": ORANGE}
    axes.plot(layers, np.full(len(layers), 0.95), "^", markersize=4, **at_top)
    low, high = axes.get_xlim()
    for x in spread_out(layers.tolist(), (high - low) / 60):
        style = {"rotation": 90, "ha": "center", "va": "top", "fontsize": SMALL}
        axes.text(x, 0.88, text, **style, **at_top)


def spread_out(positions: Sequence[int], apart: float) -> list[int]:
    """Those of the positions, the first ones first, that are so far from each other."""
    chosen: list[int] = []
    for position in positions:
        if all(abs(position - other) >= apart for other in chosen):
            chosen.append(position)
    return chosen


def label_layers(
    axes: Axes, names: Sequence[str], found: Sequence[bool], width: float
) -> None:
    """As many names as fit into `width` inches, those with findings first."""
    room = width / len(names)
    upright = CHARACTER * (max(map(len, names)) + 2) > room
    found_first = sorted(range(len(names)), key=lambda i: not found[i])
    chosen = sorted(spread_out(found_first, LINE / room if upright else 1))
    axes.set_xticks(chosen, [names[i] for i in chosen], rotation=90 * upright)
    for i, text in zip(chosen, axes.get_xticklabels()):
        if found[i]:
            text.set_color(ORANGE)


def shortened(name: str, longest: int = 14) -> str:
    """The name with long pieces cut in their middles: 'Bottlen…ock_15/norm'.

    A dollar would begin a formula of matplotlib's.
    """
    half = longest // 2
    pieces = (
        piece if len(piece) <= longest else f"{piece[:half]}…{piece[1 - half :]}"
        for piece in name.split("/")
    )
    return "/".join(pieces).replace("$", r"\$")


def draw_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], label="a channel, or a layer", markersize=4, **DOT),
        Line2D([], [], label="reported", markersize=4, **REPORTED),
        Line2D([], [], label="limit", **limit_style()),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper right",
        ncols=3,
        fontsize=SMALL,
        frameon=False,
    )
