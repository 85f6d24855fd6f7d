"""What each change of a training does to the test error, for networks of two kinds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from experiments.common.panels import COLOURS

INCHES, DPI = (8.6, 5.0), 180

Errors = dict[str, dict[str, np.ndarray]]
"""Errors (seed,) by the kind of network and the name of the change; the first is none.

The same seed gives the networks of all changes the same weights and batches.
"""


def spread(values: np.ndarray, sign: str = "") -> str:
    """(seed,) -> mean and standard deviation (n - 1), in percent."""
    percent = 100 * values
    if len(percent) < 2:
        return f"{percent.mean():{sign}.1f}"
    return f"{percent.mean():{sign}.1f} ± {percent.std(ddof=1):.1f}"


def differences(errors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each change but the first, seed by seed: the error minus that of the first."""
    base, *changes = errors
    return {name: errors[name] - errors[base] for name in changes}


def table(errors: Errors) -> Table:
    """Errors, and the changes against the first; a row for each change."""
    found = Table("removed", box=box.MARKDOWN)
    for kind in errors:
        found.add_column(f"{kind}: error (%)", justify="right", no_wrap=True)
        found.add_column("change", justify="right", no_wrap=True)
    columns = [(e, differences(e)) for e in errors.values()]
    for name in dict.fromkeys(name for e, _ in columns for name in e):
        cells = []
        for of_kind, change in columns:
            cells.append(spread(of_kind[name]) if name in of_kind else "-")
            cells.append(spread(change[name], "+") if name in change else "")
        found.add_row(name, *cells)
    return found


def draw(errors: Errors, title: str, path: Path) -> None:
    """Bars of the changes, beside each other for the kinds of network.

    Whiskers are one standard deviation over the seeds, dots the seeds.
    """
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(n for e in errors.values() for n in differences(e)))
    height = 0.8 / max(len(errors), 1)
    for place, (kind, of_kind) in enumerate(errors.items()):
        change = {n: 100 * v for n, v in differences(of_kind).items()}
        y = np.array([names.index(name) for name in change]) + place * height
        colour = COLOURS["bn" if kind == "with BN" else "plain"]
        base = spread(next(iter(of_kind.values())))
        label = f"{kind} (all on: {base} %)"
        mean = [values.mean() for values in change.values()]
        axes.barh(y, mean, height, color=colour, alpha=0.75, label=label)
        for at, values in zip(y, change.values(), strict=True):
            _whisker(axes, at, values)
    middle = np.arange(len(names)) + height * (len(errors) - 1) / 2
    axes.set_yticks(middle, names)
    axes.invert_yaxis()
    axes.axvline(0, color="0.2", lw=0.8)
    axes.set_xlabel("change of the test error (percentage points)", fontsize=9)
    axes.set_ylabel("removed", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _whisker(axes, at: float, values: Sequence[float] | np.ndarray) -> None:
    """The standard deviation of one bar, and its seeds."""
    axes.plot(values, np.full(len(values), at), ".", color="0.2", ms=3, zorder=3)
    if len(values) > 1:
        axes.errorbar(
            np.mean(values), at, xerr=np.std(values, ddof=1), color="0.2", capsize=2
        )
