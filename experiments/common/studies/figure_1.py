"""The picture of Ioffe & Szegedy 2015, figure 1, from the curves of a run."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.common.studies.curves import NAMES, Curves

COLOURS = {"plain": "#d55e00", "bn": "#0072b2"}
INCHES, DPI = (8.0, 3.3), 180


def draw(curves: dict[str, Curves], title: str, path: Path) -> None:
    """Draws the three panels as a PNG of INCHES * DPI pixels.

    Args:
        curves: of the networks "plain" and "bn".
        title: of the picture.
        path: of the file.
    """
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    accuracy, *inputs = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    _accuracy(accuracy, curves)
    for axes, letter, (name, network) in zip(inputs, "bc", curves.items(), strict=True):
        rate = curves["plain"].best()
        _percentiles(axes, network, rate, COLOURS[name])
        value = network.rates[rate]
        axes.set_title(f"({letter}) {NAMES[name]}, rate {value:g}", fontsize=9)
    inputs[0].set_ylabel("input of one sigmoid (percentiles)", fontsize=9)
    low, high = zip(*(axes.get_ylim() for axes in inputs), strict=True)
    for axes in inputs:
        axes.set_ylim(min(low), max(high))
    for axes in (accuracy, *inputs):
        axes.set_xlabel("training steps", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _accuracy(axes: Axes, curves: dict[str, Curves]) -> None:
    """Panel (a): each network at its best rate, and with BN at the plain one's."""
    plain, normalized = curves["plain"], curves["bn"]
    best = {name: network.best() for name, network in curves.items()}
    if best["plain"] != best["bn"]:
        rate = normalized.rates[best["plain"]]
        mean = 100 * normalized.test[:, :, best["plain"]].mean(1)
        label = f"{NAMES['bn']}, rate {rate:g}"
        axes.plot(normalized.steps, mean, "--", color=COLOURS["bn"], lw=1, label=label)
    for name in ("bn", "plain"):
        network, colour = curves[name], COLOURS[name]
        test = 100 * network.test[:, :, best[name]]
        label = f"{NAMES[name]}, rate {network.rates[best[name]]:g} (best)"
        axes.plot(network.steps, test.mean(1), color=colour, lw=1.5, label=label)
        axes.fill_between(
            network.steps, test.min(1), test.max(1), color=colour, alpha=0.2, lw=0
        )
    final = 100 * plain.final(best["plain"])
    axes.axhline(final, color=COLOURS["plain"], lw=0.8, ls=":")
    top = 100 * max(network.test.max() for network in curves.values())
    axes.set_ylim(max(0, final - 2 * (100 - final)), top + 0.2 * (100 - top))
    axes.set_title("(a) Test accuracy", fontsize=9)
    axes.set_ylabel("test accuracy (%)", fontsize=9)
    axes.legend(fontsize=8, loc="lower right", frameon=False)


def _percentiles(axes: Axes, network: Curves, rate: int, colour: str) -> None:
    """Panel (b) or (c), for the first seed, with both networks at one rate.

    From the first step on: before it there are no running statistics.
    """
    lines = network.percentiles[1:, 0, rate]
    for values, label in zip(lines.T, ("15 %", "50 %", "85 %"), strict=True):
        axes.plot(
            network.steps[1:], values, color=colour, lw=1.5 if "50" in label else 1
        )
        if np.isfinite(values[-1]):
            axes.annotate(
                label,
                (network.steps[-1], values[-1]),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
