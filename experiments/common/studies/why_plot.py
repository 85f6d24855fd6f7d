"""The picture of `why_it_works`."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.common import panels
from experiments.common.models.layers import Name
from experiments.common.studies.rated import Rated

Net = Literal["plain", "bn", "noisy bn", "noisy plain"]
SMOOTHED = 10  # steps whose losses are averaged
FIRST = tuple(float(f"{10 ** (k / 4):.2g}") for k in range(-8, 5))
"""Step sizes along the first gradient, 0.01 to 10."""
QUIET = "plain", "bn"


class Look(NamedTuple):
    """Of a network: its name, its layers and its colour."""

    name: str
    layers: Name
    colour: str


NETS: dict[str, Look] = {
    "plain": Look("without BN", "none", "#d55e00"),
    "bn": Look("with BN", "batch", "#0072b2"),
    "noisy bn": Look("BN and noise", "noisy batch", "#009e73"),
    "noisy plain": Look("noise alone", "noise", "#cc79a7"),
}


def style(net: str) -> dict[str, Any]:
    """How lines of a network are drawn."""
    return {"color": NETS[net].colour, "label": NETS[net].name}


def shared(runs: Rated) -> float:
    """The rate at which networks are compared: the best of the plain one."""
    return runs.best("plain" if "plain" in runs.names() else runs.names()[0])


def draw(runs: Rated, data: str, every: int, path: Path) -> None:
    """Six panels: training, learning rates, and what is around the weights.

    Args:
        runs: the results.
        data: the name of the images.
        every: steps between two measurements.
        path: of the PNG.
    """
    seeds, rate = max(map(len, runs.records.values())), shared(runs)
    depth = runs.of(runs.names()[0], rate, "cosine").shape[-1] - 1
    title = (
        f"{panels.DATA[data]}, {depth} convolutions, {seeds} seed{'s' * (seeds > 1)}; "
        f"second row: at the learning rate {rate:g}, the best without BN"
    )
    figure, axes = panels.make(title, (9.6, 5.6), 2, 3)
    _training(axes[0], runs)
    _rates(axes[1], runs)
    _first(axes[2], runs)
    _ranges(axes[3], runs, rate, every)
    for panel, field in zip(axes[4:], ("smoothness", "cosine"), strict=True):
        _measured(panel, runs, rate, every, field)
    title = "Smoothness along the gradient"
    name = "most change of gradient per distance"
    panels.label(axes[4], title, "training steps", name, log="y")
    title = "Covariate shift: a cosine of 1 is none"
    panels.label(axes[5], title, "training steps", "cosine of G and G', mean of layers")
    axes[0].legend(fontsize=7, frameon=False)
    handles, names = axes[1].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(names)}
    figure.legend(handles, names, fontsize=8, frameon=False, **place)
    panels.save(figure, path)


def _training(axes: Axes, runs: Rated) -> None:
    """Each network at its best rate, and with BN at the plain one's."""
    shown = [(net, runs.best(net), "-") for net in runs.names()]
    if "bn" in runs.names() and shared(runs) != runs.best("bn"):
        shown.append(("bn", shared(runs), "--"))
    for net, rate, dashes in shown:
        loss = runs.of(net, rate, "loss")
        steps = SMOOTHED * (np.arange(loss.shape[1]) + 0.5)
        look = style(net) | {"label": f"{NETS[net].name}, {rate:g}"}
        panels.line(axes, steps, loss, ls=dashes, **look)
    title = "Training, at each one's best rate"
    panels.label(axes, title, "training steps", "training loss", log="y")


def _rates(axes: Axes, runs: Rated) -> None:
    for net in runs.names():
        rates = runs.rates(net)
        test = np.stack([runs.of(net, rate, "test") for rate in rates], 1)
        panels.line(axes, rates, 100 * test, marker="o", ms=3, **style(net))
    title = "At the end of training"
    panels.label(axes, title, "learning rate", "test accuracy (%)", log="x")


def _first(axes: Axes, runs: Rated) -> None:
    """It does not depend on the rate of training."""
    for net in QUIET:
        if net in runs.names():
            first = runs.of(net, runs.rates(net)[0], "first")
            panels.line(axes, FIRST, first, **style(net))
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    title = "Along the gradient before training"
    panels.label(axes, title, "step size", "loss after over loss before", log="x")


def _ranges(axes: Axes, runs: Rated, rate: float, every: int) -> None:
    """Of the first seed: a band from the least to the most."""
    for net in QUIET:
        if (net, rate) in runs.records:
            low, high = runs.of(net, rate, "losses")[0].T
            steps = every * np.arange(len(low))
            axes.fill_between(steps, low, high, alpha=0.4, **style(net))
    title = "Range of the loss along the gradient"
    name = "loss, 1/2 to 4 steps ahead"
    panels.label(axes, title, "training steps", name, log="y")


def _measured(axes: Axes, runs: Rated, rate: float, every: int, field: str) -> None:
    """A line for each network; of layers the mean, without the first."""
    for net in runs.names():
        if net != "noisy plain" and (net, rate) in runs.records:
            values = runs.of(net, rate, field)
            values = values[..., 1:].mean(-1) if values.ndim == 3 else values
            steps = every * np.arange(values.shape[1])
            panels.line(axes, steps, values, marker="o", ms=3, **style(net))
