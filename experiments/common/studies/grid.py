"""Errors against the size of the groups that batches are normalized in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

from experiments.common.data.batches import Order
from experiments.common.models.norms import Method

Curves = dict[Order, dict[str, np.ndarray]]
"""Errors (seed, size), by order and name of the row; NaN where there is none."""

ORDERS: dict[Order, str] = {
    "mixed": "groups drawn at random (iid)",
    "by class": "groups of one class, or few (not iid)",
}
INCHES, DPI = (9.4, 4.4), 180
TICKS = 1, 2, 3, 5, 10, 20, 30, 50, 100  # percent


class Row(NamedTuple):
    """What is compared: a method, evaluated in one way, and the style of its line."""

    name: str
    method: Method
    kind: str
    style: dict[str, Any]


ORANGE, AMBER, PINK, BLUE = "#d55e00", "#e69f00", "#cc79a7", "#0072b2"
GREEN, SKY, VIOLET = "#009e73", "#56b4e9", "#6a3d9a"
RUNNING = {"color": ORANGE, "lw": 2.2}
POOLED = {"color": ORANGE, "ls": "--"}
AS_TRAINED = {"color": ORANGE, "ls": ":"}
REPLICAS = {"color": BLUE, "lw": 2.2}
GROUP, LAYER = {"color": "0.3", "ls": "--"}, {"color": "0.6", "ls": "--"}
ROWS = (
    Row("BN, running average", "batch_norm", "running", RUNNING),
    Row("BN, pooled, groups of 128", "batch_norm", "pooled", POOLED),
    Row("BN, pooled, as trained", "batch_norm", "pooled_groups", AS_TRAINED),
    Row("BN, by the test group", "batch_norm", "batch", {"color": AMBER}),
    Row("ghost BN", "ghost", "running", {"color": SKY}),
    Row("BN, frozen at the end", "frozen", "running", {"color": PINK}),
    Row("batch renorm", "renorm", "running", {"color": GREEN}),
    Row("decorrelated BN", "decorrelated", "running", {"color": VIOLET}),
    Row("cross-replica BN", "cross_replica", "running", REPLICAS),
    Row("group norm", "group_norm", "running", GROUP),
    Row("layer norm", "layer_norm", "running", LAYER),
)


def table(rows: dict[str, np.ndarray], sizes: Sequence[int]) -> Table:
    """Errors in percent, mean and standard deviation (n - 1) over the seeds."""
    found = Table(box=box.MARKDOWN)
    found.add_column("method", no_wrap=True)
    for size in sizes:
        found.add_column(f"{size}", justify="right", no_wrap=True)
    for name, errors in rows.items():
        found.add_row(name, *map(with_spread, errors.T))
    return found


def with_spread(errors: np.ndarray) -> str:
    """(seed,) -> mean and standard deviation, in percent."""
    known = 100 * errors[np.isfinite(errors)]
    if len(known) < 2:
        return f"{known[0]:.1f}" if len(known) else "-"
    return f"{known.mean():.1f} ± {known.std(ddof=1):.1f}"


def draw(curves: Curves, sizes: Sequence[int], title: str, path: Path) -> None:
    """A panel for each order, and a line for each row."""
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (order, description) in zip(panels, ORDERS.items(), strict=True):
        axes.set_title(description, fontsize=9)
        _panel(axes, curves[order], sizes)
    drawn = [100 * e for order in ORDERS for e in curves[order].values()]
    panels[0].set_ylim(0.9 * np.nanmin(drawn), 1.1 * np.nanmax(drawn))
    panels[0].set_ylabel("test error (%)", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, rows: dict[str, np.ndarray], sizes: Sequence[int]) -> None:
    for row in ROWS:
        if row.name in rows:
            errors = 100 * rows[row.name]
            style = {"lw": 1.4, "marker": "o", "ms": 3, **row.style}
            axes.plot(sizes, errors.mean(0), label=row.name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_yticks(TICKS, map(str, TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images per normalized group, of 128 per step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
