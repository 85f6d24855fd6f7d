"""Accuracy over learning rates and initial scales: what trains, as numbers and maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TRAINS = 0.5  # accuracy from which on a network counts as trained: five times chance
INCHES, DPI = (9.6, 6.0), 180
STYLE: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 100}


class Map(NamedTuple):
    """The accuracies of the networks of one kind, each (seed, rate, scale).

    Attributes:
        validation: on the images that decide which network is the best.
        test: on those that are reported.
    """

    validation: np.ndarray
    test: np.ndarray

    def trained(self) -> float:
        """The share of networks that train."""
        return float((self.test > TRAINS).mean())

    def largest(self, rates: Sequence[float]) -> float:
        """The largest rate at which, at some scale, the network trains; or NaN.

        The accuracy is the mean over the seeds.
        """
        trains = (self.test.mean(0) > TRAINS).any(1)
        return max((r for r, t in zip(rates, trains, strict=True) if t), default=np.nan)

    def best(self) -> np.ndarray:
        """(seed,): of the rate and scale with the best mean on the validation set."""
        where = np.unravel_index(
            self.validation.mean(0).argmax(), self.validation.shape[1:]
        )
        return self.test[:, *where]


def draw(
    maps: Sequence[Sequence[Map | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    rates: Sequence[float],
    scales: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """A panel for each map: the mean test accuracy over the seeds.

    Args:
        maps: by row and column; None where there is none.
        rows: their names.
        columns: their names.
        rates: of learning, along each panel.
        scales: of the first weights, up each panel.
        title: of the picture.
        path: of the file.
    """
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(
        len(rows), len(columns), sharex=True, sharey=True, squeeze=False
    )
    image = None
    for axes, found in zip(panels.flat, (m for row in maps for m in row), strict=True):
        if found is not None:
            image = _panel(axes, found)
    for axes, name in zip(panels[0], columns, strict=True):
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9)
    for axes, name in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(f"{name}\ninitial scale", fontsize=9)
        axes.set_yticks(range(len(scales)), [f"{s:g}" for s in scales])
    for axes in panels[-1]:
        axes.set_xlabel("learning rate", fontsize=9)
        labels = [f"{rate:g}" for rate in rates]
        rotation = 90 * (len(rates) > 6)
        axes.set_xticks(range(len(rates)), labels, rotation=rotation, fontsize=7)
    for axes in panels.flat:
        axes.tick_params(axis="y", labelsize=8, length=2)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01)
        bar.set_label("test accuracy (%)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, found: Map) -> Any:
    """One map, under the share of its networks that train."""
    axes.set_title(f"{found.trained():.0%} train", fontsize=8)
    mean = 100 * found.test.mean(0).T
    return axes.imshow(mean, origin="lower", aspect="auto", **STYLE)
