"""How the panels of a picture look: small type, no frame above and to the right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

DATA = {
    "digits": "Digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
}
"""What the data are called."""
DPI = 180
COLOURS = {"plain": "#d55e00", "bn": "#0072b2"}
"""Of networks without and with batch normalization."""


def make(
    title: str, inches: tuple[float, float], rows: int, columns: int
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    figure = Figure(inches, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.ravel())


def label(axes: Axes, title: str, x: str, y: str, *, log: str = "") -> None:
    """Names a panel and its axes, those in `log` ("", "x", "y", "xy") logarithmic."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_xscale("log" if "x" in log else "linear")
    axes.set_yscale("log" if "y" in log else "linear")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def line(
    axes: Axes, x: Sequence[float] | np.ndarray, values: np.ndarray, **style
) -> None:
    """The mean of (seed, x), and a shade from the least to the most of the seeds."""
    (drawn,) = axes.plot(x, values.mean(0), **{"lw": 1.5, **style})
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, lw=0)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, with plain numbers along logarithmic axes."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                subs = (1, 2, 5) if high < 100 * low else (1,)
                axis.set_major_locator(LogLocator(subs=subs))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(NullFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
