"""Time and collectives of a layer against devices, features and batch.

    python -m experiments.bench.scaling            # a good minute on two cores
    python -m experiments.bench.scaling --smoke    # few and small, under ten seconds

Claim: forward + backward take time in proportion to the bytes of the input, by features
as by examples: the slope of log time against log bytes is 1, over inputs of 4 MiB and
more; and the number of collectives is the same on 2, 4 and 8 devices, one forward and
one backward. Control: flax.linen.BatchNorm, compiled and called the same way, in turns.

The devices are those that XLA makes of one CPU, and they share its cores: with the same
batch split over more of them nothing can become faster. How much slower it becomes is
what the split costs, and all that the times against devices show.

Measured: see docs/pages/performance.md.
"""

import dataclasses
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from experiments.bench import charts, collectives
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results, study

IMAGE = (16, 16)
EXAMPLES, FEATURES = 32, 64  # where they are not what is varied
MODES = ("jit", "shard_map")
AXES = ("devices", "features", "batch")
SMOKE = {
    "devices": (2,),
    "features": (8, 16),
    "batch": (2, 4),
    "large": 0,
    "seconds": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Config(study.Output):
    """What is measured."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Over which 128 examples are split."""
    features: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    """Of 32 examples on one device."""
    batch: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Of 64 features on one device."""
    large: int = 4 * 2**20
    """Bytes of an input from which on the slopes are fitted."""
    seconds: float = 2.0
    """For each point, both layers together."""


def run(config: Config, path: Path) -> None:
    """Appends one record per point and layer: its time and its collectives."""
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    points = [
        ("devices", n, m, n, FEATURES, 128 // n) for n in config.devices for m in MODES
    ]
    points += [("features", n, "jit", 1, n, EXAMPLES) for n in config.features]
    points += [("batch", n, "jit", 1, FEATURES, n) for n in config.batch]
    with results.Log(path, digits=9) as log:
        settings = results.settings_of(config)
        log.add("start", bench="scaling", settings=settings, **results.stamp())
        for axis, count, mode, devices, features, examples in points:
            of = collectives.Config(devices, features, examples, IMAGE)
            size = 4 * devices * examples * features * IMAGE[0] * IMAGE[1]
            calls, sent = {}, {}
            for name in collectives.LAYERS:
                program, arrays = collectives.compiled(of, mode, name, False, True)
                calls[name] = partial(program, *arrays)
                sent[name] = len(collectives.counted(program))
            point = {"axis": axis, "count": count, "mode": mode, "bytes": size}
            for name, time in interleaved(calls, config.seconds).items():
                found = {"layer": name, "time": time, "collectives": sent[name]}
                log.add("point", **point, **found)


def chosen(records: list[results.Record], **fields: str) -> list[results.Record]:
    """The records that have these fields."""
    return [r for r in records if all(r[key] == v for key, v in fields.items())]


def slope(
    start: results.Record, records: list[results.Record], axis: str, layer: str
) -> float:
    """Of log time against log bytes, over the large inputs."""
    large = start["settings"]["large"]
    points = [r for r in chosen(records, axis=axis, layer=layer) if r["bytes"] >= large]
    size, seconds = ([point[key] for point in points] for key in ("bytes", "time"))
    return float(np.polyfit(np.log(size), np.log(seconds), 1)[0])


def table(records: list[results.Record]) -> Table:
    """Milliseconds, their ratio and the collectives of each point."""
    made = Table(title="Forward + backward (ratio below 1: bnjax is faster)")
    for name in ("against", "", "mode", "MiB", "flax, ms", "bnjax, ms", "ratio"):
        made.add_column(
            name, justify="left" if name in ("against", "mode") else "right"
        )
    made.add_column("collectives: flax, bnjax", justify="right")
    pairs = zip(*(chosen(records, layer=name) for name in collectives.LAYERS))
    for flax, ours in pairs:
        times = (f"{1e3 * r['time']:.2f}" for r in (flax, ours))
        made.add_row(
            flax["axis"],
            str(flax["count"]),
            flax["mode"],
            f"{flax['bytes'] / 2**20:.1f}",
            *times,
            f"{ours['time'] / flax['time']:.2f}",
            f"{flax['collectives']}, {ours['collectives']}",
        )
    return made


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """Time against bytes, by features and by batch; and against devices."""
    title = f"One layer, forward + backward, float32\n{charts.machine(start)}"
    figure, panels = charts.panels(title, 3)
    for axes, axis in zip(panels, AXES[1:]):
        for name in collectives.LAYERS:
            label = f"{name}, slope {slope(start, records, axis, name):.2f}"
            points = chosen(records, axis=axis, layer=name)
            line(axes, [r["bytes"] / 2**20 for r in points], points, label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(f"MiB, by {axis}", fontsize=9)
    for name, mode in product(collectives.LAYERS, MODES):
        points = chosen(records, axis="devices", layer=name, mode=mode)
        line(panels[2], [r["count"] for r in points], points, f"{name}, {mode}")
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("virtual devices on the same cores", fontsize=9)
    panels[0].set_ylabel("milliseconds", fontsize=9)
    charts.save(figure, path)


def line(axes: Axes, x: list[float], points: list[results.Record], label: str) -> None:
    """Milliseconds against `x`, which is doubled from point to point."""
    axes.plot(
        x,
        [1e3 * point["time"] for point in points],
        "o-" if points[0]["mode"] == "jit" else "s:",
        color=charts.COLOURS[points[0]["layer"]],
        label=label,
        markersize=3,
        lw=1,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False)


def main(config: Config) -> int:
    """Measures, records, prints the tables and draws the picture."""
    start, records, picture = charts.measured("bench_scaling", config, run)
    console = Console(width=100)
    console.print(table(records))
    for axis, name in product(AXES[1:], collectives.LAYERS):
        value = slope(start, records, axis, name)
        console.print(f"slope by {axis}, {name}: {value:.2f}")
    draw(start, records, picture)
    return 0


if __name__ == "__main__":
    keep_memory("experiments.bench.scaling")
    sys.exit(study.start(main, SMOKE, tyro.cli(Config, description=__doc__)))
