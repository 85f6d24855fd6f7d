"""What the benches tell: tables and pictures, from their records, over Flax's."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments.common import results
from experiments.common.panels import DPI

# Flax's are warm, ours are cold; the first of each is that of the figure for MNIST.
COLOURS = {
    "flax": "#d55e00",
    "flax remat": "#e69f00",
    "bnjax": "#0072b2",
    "bnjax fused": "#56b4e9",
    "bnjax remat": "#009e73",
}


class Measure(NamedTuple):
    """A field of a record: its name, unit, how many of that a unit is, and decimals."""

    name: str
    unit: str = ""
    scale: float = 1.0
    decimals: int = 0


def last_run(path: Path) -> list[results.Record]:
    """The records of the newest run in a file; the first says what was run, on what.

    Raises:
        LookupError: there is none.
    """
    records = results.read(path)
    if not records:
        raise LookupError(f"{path} holds no run: expected one. Run the bench first.")
    return [record for record in records if record["run"] == records[-1]["run"]]


def machine(start: results.Record) -> str:
    """The hardware and versions of a run, for a title."""
    hardware, versions = start["hardware"], start["versions"]
    where = f"{hardware['cores']} cores of {hardware['cpu']}"
    if hardware["platform"] != "cpu":
        where = hardware["device"]
    return f"{where}; jax {versions['jax']}, flax {versions['flax']}"


def over_flax(
    records: list[results.Record], record: results.Record, by: str, key: str
) -> float:
    """A number of a record over that of "flax" where `by` is the same; or NaN."""
    (flax,) = (r for r in records if r["variant"] == "flax" and r[by] == record[by])
    if record.get(key) is None:
        return math.nan
    return record[key] / flax[key]


def table(
    title: str, records: list[results.Record], by: str, measures: dict[str, Measure]
) -> Table:
    """A row for each record: its numbers over Flax's, and in brackets themselves."""
    made = Table(title=title)
    for name in (by, "variant"):
        made.add_column(name)
    for measure in measures.values():
        unit = f" ({measure.unit})" if measure.unit else ""
        made.add_column(measure.name + unit, justify="right")
    for record in records:
        cells = []
        for key, measure in measures.items():
            ratio = over_flax(records, record, by, key)
            if math.isnan(ratio):
                cells.append("")
                continue
            value = record[key] / measure.scale
            cells.append(f"{ratio:.2f} ({value:,.{measure.decimals}f})")
        made.add_row(record[by], record["variant"], *cells)
    return made


def panels(title: str, count: int, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure((8.0, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.tick_params(labelsize=8)
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
        each.grid(alpha=0.3)
    return figure, axes


def bars(
    axes: Axes, records: list[results.Record], by: str, measures: dict[str, Measure]
) -> None:
    """A group of bars for each measure, over Flax's."""
    width = 0.85 / len(records)
    for index, record in enumerate(records):
        ratios = [over_flax(records, record, by, key) for key in measures]
        x = np.arange(len(measures)) + (index - (len(records) - 1) / 2) * width
        name = record["variant"]
        drawn = axes.bar(x, ratios, 0.9 * width, color=COLOURS[name], label=name)
        labels = axes.bar_label(drawn, fmt="%.2f", fontsize=5.8, padding=2)
        for label in labels:  # legible over a line
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.2})
    names = [measure.name for measure in measures.values()]
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.1)
    axes.grid(visible=False, axis="x")


def save(figure: Figure, path: Path, legend: Iterable[Axes] = ()) -> None:
    """Writes the PNG, with one legend below the panels if `legend` names one."""
    for axes in legend:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(labels),
            fontsize=8,
            frameon=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
