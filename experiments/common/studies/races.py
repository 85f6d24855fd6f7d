"""Accuracy against steps of several networks: who gets where first, and how far.

A result is what a training comes to: `steps` and `accuracy`, as measured, `diverged`,
and `seconds`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from experiments.common.results import Record

INCHES, DPI = (8.0, 4.4), 180
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Curve(NamedTuple):
    """The mean over seeds.

    Attributes:
        steps: at which all seeds were measured.
        accuracy: on the test images, at these.
        spread: the standard deviation (n - 1) of the seeds' best accuracies; 0 for one.
        diverged: how many seeds ended in something that is not finite.
        seconds: of one training.
    """

    steps: np.ndarray
    accuracy: np.ndarray
    spread: float
    diverged: int
    seconds: float

    def best(self) -> float:
        """The highest accuracy; NaN if none was measured."""
        return float(self.accuracy.max(initial=-1)) if len(self.steps) else float("nan")

    def steps_to(self, target: float) -> float:
        """The first measured step with an accuracy of `target`; or infinity."""
        reached = self.accuracy >= target
        return float(self.steps[reached.argmax()]) if reached.any() else float("inf")


def mean(results: Sequence[Record]) -> Curve:
    """The curve of the seeds of one network."""
    length = min(len(result["steps"]) for result in results)
    accuracy = np.array([result["accuracy"][:length] for result in results], float)
    best = [max(result["accuracy"], default=0.0) for result in results]
    return Curve(
        np.array(results[0]["steps"][:length]),
        accuracy.mean(0),
        float(np.std(best, ddof=1)) if len(best) > 1 else 0.0,
        sum(result["diverged"] for result in results),
        float(np.mean([result["seconds"] for result in results])),
    )


class Row(NamedTuple):
    """A line of the table; numbers that there are not are NaN or infinite.

    Attributes:
        steps: to the first network's best accuracy.
        share: these, over those of the first network.
        best: the highest accuracy.
        diverged: how many seeds did.
        seconds: of one training.
    """

    name: str
    steps: float
    share: float
    best: float
    diverged: int
    seconds: float


def rows(curves: Mapping[str, Curve], first: str) -> list[Row]:
    """What each network comes to, against the best accuracy of `first`."""
    target = curves[first].best() if first in curves else float("nan")
    needed = curves[first].steps_to(target) if first in curves else float("nan")
    found = []
    for name, curve in curves.items():
        steps = curve.steps_to(target)
        measured = curve.best(), curve.diverged, curve.seconds
        found.append(Row(name, steps, steps / needed, *measured))
    return found


def table(
    title: str,
    lines: Sequence[Row],
    names: Mapping[str, str],
    paper: Mapping[str, tuple[str, str, str]],
) -> Table:
    """The rows next to the paper's steps, their share and accuracy."""
    shown = Table(title=title, box=box.SIMPLE, show_edge=False, collapse_padding=True)
    shown.add_column("model")
    for name in ("steps", "share", "best %", "minutes"):
        shown.add_column(name, justify="right")
    for name in ("steps", "share", "best %"):
        shown.add_column(f"paper's\n{name}", justify="right")
    for row in lines:
        number = f"{100 * row.best:.2f}" if np.isfinite(row.best) else "-"
        shown.add_row(
            names.get(row.name, row.name),
            f"{row.steps:,.0f}" if np.isfinite(row.steps) else "-",
            f"{row.share:.2f}" if np.isfinite(row.share) else "-",
            number + (" (diverged)" if row.diverged else ""),
            f"{row.seconds / 60:.1f}",
            *paper.get(row.name, ("", "", "")),
        )
    return shown


def picture(
    curves: Mapping[str, Curve],
    first: str,
    names: Mapping[str, str],
    title: str,
    path: Path,
) -> None:
    """Draws accuracy against steps; a mark where each reaches the first one's best."""
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        # Dashes in the gaps of the line before, which may be at the same height.
        colour = COLOURS[index % 7]
        dashed = "-" if index < 5 else (4 * (index % 2), (4, 4))
        label = names.get(name, name) + (" (diverged)" if curve.diverged else "")
        percent = 100 * curve.accuracy
        axes.plot(curve.steps, percent, ls=dashed, color=colour, lw=1.5, label=label)
        if first in curves:
            step = curve.steps_to(target := curves[first].best())
            axes.plot([step], [100 * target], "D", color=colour, ms=6, mec="white")
    if first in curves:
        axes.axhline(100 * curves[first].best(), color=COLOURS[0], lw=0.8, ls=":")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("training steps")
    axes.set_ylabel("test accuracy (%)")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, frameon=False, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
