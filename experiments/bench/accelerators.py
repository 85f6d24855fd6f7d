"""Layers and training steps compiled for TPUs and GPUs, on a machine that has neither.

    python -m experiments.bench.accelerators layer    # ten minutes on one core
    python -m experiments.bench.accelerators step     # three minutes
    python -m experiments.bench.accelerators step --blocks 0 --targets h100
    python -m experiments.bench.accelerators --smoke  # one layer, half a minute

Claim: on each target, for each dtype, forward and forward + backward, a layer of bnjax
reads and writes the input in device memory no more often than Flax's layer does, takes
no more temporary memory and sends no more; and a training step of ResNet-50 moves no
more bytes with it. Control: Flax's layers, Linen and NNX, and the plain formula, all
compiled the same way. The floor is 3 passes forward, 7 forward + backward in one
program; a residual adds its own.

Nothing is run. XLA compiles for devices that are only described (see targets.py), and
the bytes that the optimized program moves are counted in its text (see programs.py): a
pass is the bytes of x, so that reading and writing it are two. What a branch does that
is not taken every time stands apart, under "rare". Temporary memory is the compiler's
plan; the time is the estimate of the compiler for TPUs, which counts all branches as
taken, as do the bytes that it says are accessed. With more chips than one the batch is
split, by jit or by shard_map, and `sent` has the numbers of each collective, on each
chip.

Known gaps: no caches, no padding of tiles, no tuning, because nothing can be run. A TPU
keeps small inputs on the chip, where passes cost nothing and are not counted: such rows
are marked with "on chip" and compare nothing; take larger shapes.

A program is recorded as soon as it is compiled, and left out when it has been recorded
for the same commit, unless `--again` or the commit has been changed. The tables have
the newest record of each.

Measured: see the README.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench import charts, lowered, targets
from experiments.bench.charts import Measure
from experiments.bench.programs import Part, Program
from experiments.bench.step import NORMS
from experiments.common import results

SHAPES = ("256x112x112x64", "256x56x56x256", "256x28x28x512", "8192x4096")
DIRECTIONS = ("forward", "both")
MEASURES = {
    "accessed": Measure("accessed", "GB", 1e9, 1),
    "moved": Measure("moved", "GB", 1e9, 1),
    "estimate": Measure("estimate", "ms", 1e-3, 1),
    "temporary": Measure("temporary", "GB", 1e9, 2),
    "sums": Measure("convolutions with sums"),
    "collectives": Measure("collectives"),
    "compile": Measure("to compile", "s", 1, 1),
}


@dataclass(frozen=True)
class Layer:
    """One layer: passes over device memory, forward and forward + backward."""

    targets: tuple[str, ...] = ("v5e", "h100")
    """Of v5e, v5p, v6e, a100, h100 and b200."""
    shapes: tuple[str, ...] = SHAPES
    """Of the input, on each chip."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of input and output."""
    layers: tuple[str, ...] = lowered.LAYERS
    """Flax's, the plain formula, and bnjax's."""
    variants: tuple[str, ...] = lowered.VARIANTS
    """What stands behind the layer or is given to it; others have no activation."""
    chips: tuple[int, ...] = (1,)
    """1, 16 and 256; 1,024 of v5p; 1, 8, 16 and 128 GPUs."""
    modes: tuple[str, ...] = ("jit", "shard_map")
    """With more than one chip."""
    output: Path = Path("experiments/results/bench_accelerators.jsonl")
    """Appended to."""
    figure: Path = Path("experiments/figures/bench_accelerators.png")
    """The picture."""
    again: bool = False
    """Compile also what has been recorded for this commit."""
    plot_only: bool = False
    """Compile nothing; print and draw what has been recorded."""
    smoke: bool = False
    """One layer, for one TPU."""


@dataclass(frozen=True)
class Step:
    """A training step of ResNet-50 in bfloat16, or of its first blocks."""

    targets: tuple[str, ...] = ("v5e", "v5p", "h100")
    """Of v5e, v5p, v6e, a100, h100 and b200."""
    variants: tuple[str, ...] = tuple(NORMS)
    """As in bench.step."""
    blocks: int = 2
    """Behind the stem; 0 for the whole network: minutes for each TPU program."""
    images: int = 128
    """On each chip."""
    side: int = 224
    """Of an image."""
    chips: int = 1
    """They share the batch, by jit."""
    output: Path = Path("experiments/results/bench_accelerators_step.jsonl")
    """Appended to."""
    figure: Path = Path("experiments/figures/bench_accelerators_step.png")
    """The picture."""
    again: bool = False
    """Compile also what has been recorded for this commit."""
    plot_only: bool = False
    """Compile nothing; print and draw what has been recorded."""
    smoke: bool = False
    """One block, two small images, one TPU."""


def main(config: Layer | Step) -> None:
    """Compiles what is missing, records it, prints the tables and draws the picture."""
    targets.prepare()
    if config.smoke and config.output == type(config).output:  # not among the results
        output, figure = (
            p.with_stem(p.stem + "_smoke") for p in (config.output, config.figure)
        )
        config = replace(config, output=output, figure=figure)
    if config.smoke and isinstance(config, Layer):
        config = replace(
            config, targets=("v5e",), shapes=("256x56x56x256",), dtypes=("bfloat16",)
        )
        config = replace(config, layers=("flax", "bnjax"), variants=("relu",))
    elif config.smoke:
        config = replace(config, targets=("v5e",), blocks=1, images=2, side=32)
        config = replace(config, variants=("flax", "bnjax"))
    if not config.plot_only:
        run(config)
    records = known(config, config.output)
    console = Console(width=160)
    if isinstance(config, Layer):
        console.print(table(records))
        draw_layers(records, config.figure)
    else:
        title = "Over Flax plain (below 1: less); in brackets the numbers"
        console.print(charts.table(title, records, "target", MEASURES))
        draw_steps(records, config.figure)
    console.print(f"{config.output}\n{config.figure}", highlight=False, soft_wrap=True)


def known(config: Layer | Step, path: Path) -> list[results.Record]:
    """The newest record of each program that is asked for."""
    found = recorded(path)
    records = [found[key(cell)] for cell in cells_of(config) if key(cell) in found]
    if not records:
        raise LookupError(f"{path} has none of what is asked for.")
    return records


def cells_of(config: Layer | Step) -> list[results.Record]:
    """The programs that are asked for."""
    return layer_cells(config) if isinstance(config, Layer) else step_cells(config)


def layer_cells(config: Layer) -> list[results.Record]:
    """The programs of layers that are asked for."""
    cells = []
    modes = [
        (chips, mode)
        for chips in config.chips
        for mode in (config.modes if chips > 1 else ("jit",))
    ]
    for target, (chips, mode), shape, dtype, variant, name, direction in product(
        config.targets,
        modes,
        config.shapes,
        config.dtypes,
        config.variants,
        config.layers,
        DIRECTIONS,
    ):
        if variant == "activation" and name in lowered.OTHERS:
            continue
        sizes = tuple(int(size) for size in shape.split("x"))
        cell = lowered.Cell(target, chips, mode, name, variant, dtype, sizes, direction)
        cells.append(cell._asdict())
    return cells


def step_cells(config: Step) -> list[results.Record]:
    """The steps that are asked for."""
    size = {name: getattr(config, name) for name in ("blocks", "images", "side")}
    return [
        {"target": target, "chips": config.chips, "variant": variant, **size}
        for target in config.targets
        for variant in config.variants
    ]


def key(record: results.Record) -> str:
    """What a program is, of a record or a cell: its target, shape and the like."""
    names = (*lowered.Cell._fields, "blocks", "images", "side")
    return str({n: results.plain(record[n]) for n in names if n in record})


def recorded(path: Path) -> dict[str, results.Record]:
    """The newest record of each program, with the commit and jax of its run."""
    found, starts = {}, {}
    for record in results.read(path) if path.exists() else []:
        if record["kind"] == "start":
            starts[record["run"]] = record
        else:
            start = starts[record["run"]]
            origin = {"commit": start["commit"], "versions": start["versions"]}
            found[key(record)] = record | origin
    return found


def run(config: Layer | Step) -> None:
    """Compiles and records what has not been recorded for this commit."""
    stamp = results.stamp()
    done: set[str] = set()
    if not config.again and "changed" not in (stamp["commit"] or "changed"):
        now = stamp["commit"], stamp["versions"]
        found = recorded(config.output).items()
        done = {k for k, r in found if (r["commit"], r["versions"]) == now}
    with results.Log(config.output) as log:
        name = "accelerators"
        log.add("start", bench=name, settings=asdict(config), **stamp)
        for cell in cells_of(config):
            if key(cell) not in done:
                kind, count = ("layer", layer) if "layer" in cell else ("step", step)
                log.add(kind, **cell, **count(cell))


def layer(cell: results.Record) -> results.Record:
    """What one layer's program does, in passes over x on each chip."""
    of = lowered.Cell(**cell)
    program, numbers = measure(of.target, lambda: lowered.layer(of))
    size = math.prod(of.shape)
    x = size * jnp.dtype(of.dtype).itemsize
    scaled = ("moved", "moved_rarely", "accessed", "temporary")
    passes = {n: numbers[n] / x if numbers[n] is not None else None for n in scaled}
    return {
        **numbers,
        **passes,
        "written": program.always.written(size // 2),
        "written_rarely": program.sometimes.written(size // 2),
        "on_chip": program.on_chip(size // 2),
    }


def step(cell: results.Record) -> results.Record:
    """What one step's program does, in bytes."""
    options = {**cell, "norm": cell["variant"]}
    del options["variant"]
    program, numbers = measure(cell["target"], lambda: lowered.step(**options))
    convolutions, sums = program.convolutions()
    return {**numbers, "convolutions": convolutions, "sums": sums or None}


def measure(target: str, lower: Any) -> tuple[Program, results.Record]:
    """The program, compiled, and what is counted or planned: bytes and seconds."""
    start = time.perf_counter()
    low = lower()
    middle = time.perf_counter()
    compiled = targets.compile(target, low)
    end = time.perf_counter()
    program = Program(str(compiled.as_text()))
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    return program, {
        "moved": program.always.bytes,
        "moved_rarely": program.sometimes.bytes,
        "accessed": cost.get("bytes accessed"),
        "estimate": estimate(cost.get("optimal_seconds"), program.custom_calls()),
        "temporary": memory.temp_size_in_bytes,
        "collectives": len(program.always.collectives) or None,
        "sent": sent(program.always),
        "sent_rarely": sent(program.sometimes),
        "unknown_loops": program.unknown_loops,
        "lower": middle - start,
        "compile": end - middle,
    }


def estimate(seconds: float | None, custom_calls: int) -> float | None:
    """The compiler's; it takes off one second for each call that it cannot judge."""
    if seconds is None:
        return None
    seconds += custom_calls
    return seconds if 0 < seconds < 0.9 else None  # else not all were counted


def sent(part: Part) -> list[dict[str, Any]]:
    return [collective._asdict() for collective in part.collectives]


def table(records: list[results.Record]) -> Table:
    """A row for each layer, forward and forward + backward side by side."""
    result = Table(title="Forward / forward + backward; passes are over the bytes of x")
    names = ("target", "shape", "dtype", "variant", "layer")
    numbers = ("passes", "rare", "temporary", "estimate (ms)", "sent", "compile (s)")
    for name in (*names, *numbers):
        left = name in names
        result.add_column(name, justify="left" if left else "right", no_wrap=left)
    both = {}
    for record in records:
        parts = {k: v for k, v in record.items() if k in lowered.Cell._fields}
        del parts["direction"]
        both.setdefault(str(parts), {})[record["direction"]] = record
    last = None
    for pair in both.values():
        any_one = next(iter(pair.values()))
        at = [place(any_one), "x".join(map(str, any_one["shape"])), any_one["dtype"]]
        if last not in (None, at):
            result.add_section()
        last = at
        columns = zip(*(cells(pair.get(which)) for which in DIRECTIONS))
        texts = [" / ".join(column) if any(column) else "" for column in columns]
        result.add_row(*at, any_one["variant"], any_one["layer"], *texts)
    return result


def place(record: results.Record) -> str:
    """The target; with its chips, if there are several."""
    if record["chips"] == 1:
        return record["target"]
    return f"{record['chips']} {record['target']}, {record['mode']}"


def cells(record: results.Record | None) -> list[str]:
    """The numbers of one program, as the table has them."""
    if record is None:
        return [""] * 6
    rare = record["moved_rarely"]
    numbers = [str(each["elements"]) for each in record["sent"]]
    time = record["estimate"]
    return [
        f"{record['moved']:.2f}" + (" on chip" if record["on_chip"] else ""),
        f"{rare:.2f}" if rare else "",
        f"{record['temporary']:.2f}",
        "" if time is None else f"{1e3 * time:.2f}",
        "+".join(numbers),
        f"{record['compile']:.1f}",
    ]


def draw_layers(records: list[results.Record], path: Path) -> None:
    """Passes of forward + backward: a panel for each target and dtype."""
    records = [r for r in records if r["direction"] == "both" and not r["on_chip"]]
    found: dict[str, dict[tuple[str, str], float]] = {}
    for r in records:
        panel = found.setdefault(f"{place(r)}\n{r['dtype']}", {})
        panel[r["layer"], r["variant"]] = r["moved"]
    if not found:
        raise LookupError("nothing to draw: expected layers, forward + backward.")
    shape = " x ".join(map(str, records[0]["shape"]))
    title = (
        f"One layer, x of {shape}: passes over its bytes in device memory, forward + "
        f"backward\n(dotted: 7, the floor); jax {records[0]['versions']['jax']}"
    )
    figure, axes = charts.panels(title, len(found))
    for each, (name, passes) in zip(axes, found.items(), strict=True):
        layers = list(dict.fromkeys(layer for layer, _ in passes))
        variants = list(dict.fromkeys(variant for _, variant in passes))
        width = 0.85 / len(layers)
        for index, layer in enumerate(layers):
            heights = [passes.get((layer, v), math.nan) for v in variants]
            y = [
                n + (index - (len(layers) - 1) / 2) * width
                for n in range(len(variants))
            ]
            colour = charts.COLOURS.get(layer)
            bars = each.barh(y, heights, 0.9 * width, color=colour, label=layer)
            each.bar_label(bars, fmt="%.1f", fontsize=6, padding=2)
        each.set_yticks(range(len(variants)), variants)
        each.set_xlim(0, 15)
        each.invert_yaxis()
        each.axvline(7, color="black", linewidth=0.8, linestyle=":")
        each.grid(visible=False, axis="y")
        each.set_title(name, fontsize=9)
        if each is not axes[0]:
            each.tick_params(labelleft=False)
    charts.save(figure, path, axes[:1])


def draw_steps(records: list[results.Record], path: Path) -> None:
    """A panel for each target: bytes and memory over those with Flax's layers."""
    first = records[0]
    network = f"its stem and {first['blocks']} blocks" if first["blocks"] else "whole"
    title = (
        f"A training step of ResNet-50 ({network}), {first['images']} images: over "
        f"Flax plain\njax {first['versions']['jax']}"
    )
    names = dict.fromkeys(record["target"] for record in records)
    figure, axes = charts.panels(title, len(names))
    for each, name in zip(axes, names, strict=True):
        some = [record for record in records if record["target"] == name]
        shown = {k: MEASURES[k] for k in ("moved", "temporary")}
        charts.bars(each, some, "target", shown)
        each.set_title(name, fontsize=9)
    charts.save(figure, path, axes[:1])


Command = (
    Annotated[Layer, tyro.conf.subcommand("layer")]
    | Annotated[Step, tyro.conf.subcommand("step")]
)

if __name__ == "__main__":
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["layer", *given]
    main(tyro.cli(Command, args=given, description=__doc__))
