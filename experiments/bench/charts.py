"""What the benches show: tables of ratios, and pictures with bars of them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.table import Table

from experiments.common import results
from experiments.common.panels import DPI
from experiments.common.study import Output

COLOURS = {
    "flax": "#d55e00",
    "flax remat": "#e69f00",
    "bnjax": "#0072b2",
    "bnjax fused": "#56b4e9",
    "bnjax remat": "#009e73",
}
OTHERS = "#d55e00 #56b4e9 #009e73 #cc79a7 #e69f00 #7f7f7f #f0e442".split()
"""The colours of bars with other names, in their order."""

Groups = dict[str, dict[str, float]]
"""The values of the bars of each group, by their names. A bar may be absent."""


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
    records = results.read(path) if path.exists() else []
    if not records:
        raise LookupError(f"{path} holds no run: expected one. Run the bench first.")
    return [record for record in records if record["run"] == records[-1]["run"]]


def measured(
    name: str, config: Output, run: Callable[[Any, Path], None]
) -> tuple[results.Record, list[results.Record], Path]:
    """Runs a bench, unless only to plot.

    Args:
        name: of its file of records and of its picture.
        config: where they go.
        run: (config, path) appends records to the file.

    Returns:
        What was run, the records of the newest run, and the path of the picture.
    """
    path, folder = results.places(name, config.out, config.record)
    if not config.plot_only:
        run(config, path)
    start, *records = last_run(path)
    return start, records, folder / f"{name}.png"


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
    made = Table(by, "variant", title=title)
    for measure in measures.values():
        unit = f" ({measure.unit})" if measure.unit else ""
        made.add_column(measure.name + unit, justify="right")
    for record in records:
        cells = []
        for key, measure in measures.items():
            ratio = over_flax(records, record, by, key)
            value = math.nan if math.isnan(ratio) else record[key] / measure.scale
            text = f"{ratio:.2f} ({value:,.{measure.decimals}f})"
            cells.append("" if math.isnan(ratio) else text)
        made.add_row(record[by], record["variant"], *cells)
    return made


def panels(
    title: str, count: int, *, height: float = 3.3, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side; `share` their axes if they are the same."""
    figure = Figure((8.0, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(1, count, sharex=share, sharey=share, squeeze=False)[0]
    for each in axes:
        each.tick_params(labelsize=8)
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
        each.grid(alpha=0.3)
    return figure, list(axes)


def bars_over_flax(
    axes: Axes, records: list[results.Record], by: str, measures: dict[str, Measure]
) -> None:
    """A group of bars for each measure, over Flax's."""
    groups = {
        measure.name: {r["variant"]: over_flax(records, r, by, key) for r in records}
        for key, measure in measures.items()
    }
    _bars(axes, groups)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.1)
    axes.grid(visible=False, axis="x")


def horizontal_bars(axes: Axes, groups: Groups, *, start: float = 0) -> None:
    """Groups of bars, one below the other."""
    _bars(axes, groups, start, horizontal=True)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def bars_of_ratios(axes: Axes, groups: Groups, label: str) -> None:
    """Horizontal bars that begin at 1, on a logarithmic axis."""
    horizontal_bars(axes, groups, start=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)  # room for the values
    axes.axvline(1, color=COLOURS["bnjax"], lw=1.5)
    axes.set_xlabel(label, fontsize=9)


def _bars(
    axes: Axes, groups: Groups, start: float = 0, *, horizontal: bool = False
) -> None:
    """Bars from `start` to their values, which are written at the ends."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colours = dict(zip(names, OTHERS)) | COLOURS
    width = 0.85 / len(names)
    draw = axes.barh if horizontal else axes.bar
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * width
        values = {
            place + shift: group[name]
            for place, group in enumerate(groups.values())
            if math.isfinite(group.get(name, math.nan))
        }
        lengths = [value - start for value in values.values()]
        colour = colours.get(name)
        draw(list(values), lengths, 0.9 * width, start, color=colour, label=name)
        for place, value in values.items():
            x, y = (value, place) if horizontal else (place, value)
            side = 1 if value >= start else -1
            axes.annotate(
                f"{value:.2f}",
                (x, y),
                xytext=(2 * side, 0) if horizontal else (0, 2 * side),
                textcoords="offset points",
                ha=("left" if side > 0 else "right") if horizontal else "center",
                va="center_baseline" if horizontal else "bottom",
                fontsize=6.5 if horizontal else 5.8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
            )


def save(figure: Figure, path: Path, legend: Sequence[Axes] = ()) -> None:
    """Writes the PNG, with one legend below the panels if `legend` names one."""
    for axes in legend:
        handles, labels = axes.get_legend_handles_labels()
        style = {"ncols": len(labels), "fontsize": 8, "frameon": False}
        figure.legend(handles, labels, loc="outside lower center", **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
