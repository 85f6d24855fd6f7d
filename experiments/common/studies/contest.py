"""Methods against each other, each at its best rate: by steps and by time."""

from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from experiments.common import panels
from experiments.common.studies.grid import with_spread
from experiments.common.studies.rated import Rated

SHOWN = {
    "batch": ("batch norm", "#0072b2"),
    "whitening": ("whitening, eigenvalues", "#6a3d9a"),
    "iternorm": ("whitening, Newton", "#cc79a7"),
    "group": ("group norm", "#009e73"),
    "layer": ("layer norm", "#56b4e9"),
    "weight": ("weight norm", "#e69f00"),
    "none": ("none", "#d55e00"),
}


def summary(known: Rated, timed: dict[str, float]) -> Table:
    """Each method at its best rate, and when it is as good as none is in the end."""
    curves = {m: known.of(m, known.best(m), "test").mean(0) for m in known.names()}
    goal = curves["none"][-1] if "none" in curves else np.nan
    found = Table(
        *("method", "rate", "test error (%)", "ms per step", "of batch norm's"),
        *(f"steps to {100 * (1 - goal):.1f} %", "seconds"),
        box=box.MARKDOWN,
    )
    for method, curve in curves.items():
        rate, time = known.best(method), timed.get(method, np.nan)
        steps = known.of(method, rate, "steps")[0]
        reached = steps[curve >= goal].min(initial=np.inf)
        found.add_row(
            SHOWN[method][0],
            f"{rate:g}",
            with_spread(1 - known.of(method, rate, "final")),
            f"{1e3 * time:.1f}",
            f"{time / timed.get('batch', np.nan):.2f}",
            f"{reached:g}",
            f"{reached * time:.1f}",
        )
    return found


def draw(known: Rated, timed: dict[str, float], task: str, path: Path) -> None:
    """Errors against steps and against time, each method at its best rate.

    Args:
        known: with "test", accuracies after each of "steps".
        timed: the seconds of a step by method.
        task: what all were trained on, for the title.
        path: of the PNG.
    """
    seeds = max(map(len, known.records.values()))
    title = f"{task}; each at its best learning rate; mean of {seeds} seed"
    figure, axes = panels.make(title + "s" * (seeds > 1), (9.6, 4.0), 1, 2)
    lowest, highest = 100.0, 0.0
    for method in known.names():
        rate, (name, colour) = known.best(method), SHOWN[method]
        errors = 100 * (1 - known.of(method, rate, "test"))
        steps = known.of(method, rate, "steps")[0]
        style = {"color": colour, "marker": "o", "ms": 2.5}
        panels.line(axes[0], steps, errors, label=f"{name} ({rate:g})", **style)
        panels.line(axes[1], steps * timed.get(method, np.nan), errors, **style)
        lowest = min(lowest, errors.mean(0).min())
        highest = max(highest, errors.mean(0).max())
    panels.label(axes[0], "By steps", "training steps", "test error (%)", log="y")
    panels.label(axes[1], "By time", "seconds of training", "test error (%)", log="y")
    for panel in axes:
        panel.set_ylim(0.9 * lowest, 1.1 * highest)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    panels.save(figure, path)
