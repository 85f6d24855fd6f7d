"""One layer, forward and forward + backward: other libraries', and the memory's floor.

    python -m experiments.bench.layer            # about three minutes on two cores
    python -m experiments.bench.layer --smoke    # one small shape, ten seconds

Claim: inputs of a megabyte and more pass forward + backward faster than in any other
JAX library, and are stored once, where Flax stores 4 (bfloat16) or 2 (float32) times
their bytes. PyTorch is the one to beat.
Control: all run in one process, on the same arrays and threads, and take turns; in each
turn a call is run twice and the second is timed, so that it finds its own caches, and
no threads of another library still busy waiting. Ratios are those of the medians. A
layer whose y or dx is not float64's, to the rounding of the dtype, stops the bench.
Libraries that are not installed are named and left out.

The floor: forward reads x for the statistics, then reads x and writes y; backward reads
x and dy for the sums, then reads both and writes dx: 3 and 5 passes over the bytes of
x, where a copy, timed in the same turns, is 2. Less than the floor is possible: a write
costs more than a read, small inputs stay in the cache, and XLA copies bfloat16 at about
two thirds of float32's bytes per second.

As their users write it: Equinox has channels first, in a vmap; Keras the policy
mixed_bfloat16; PyTorch channels_last, and bfloat16 input with float32 parameters, as
under its autocast. Haiku and Equinox compute in float32 (see rivals.py). Not compared:
what a compiler gains by fusing the layer with its neighbours.

The script restarts itself with glibc told to keep memory (MALLOC_*: outputs of
megabytes are page-faulted anew on every call otherwise); with GOMP_SPINCOUNT, else
PyTorch's idle threads hold a core for milliseconds after each of its calls; and without
the worker processes of torch.compile, which start as the first calls are timed.

Measured: see the README.
"""

import itertools
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench import bars, rivals
from experiments.bench.charts import last_run
from experiments.bench.installed import DISTRIBUTIONS, missing, versions
from experiments.bench.right import check
from experiments.bench.timing import MALLOC, copying, interleaved, keep_memory
from experiments.common import results

SHAPES = (
    (64, 32, 32, 64),
    (32, 56, 56, 64),
    (32, 14, 14, 256),
    (32, 7, 7, 2048),
    (4096, 1024),
    (256, 512),
)
PASSES = {"forward": "forward", "both": "fwd + bwd"}
FLOOR = {"forward": 3 / 2, "both": 8 / 2}  # copies
SETTINGS = MALLOC | {"GOMP_SPINCOUNT": "20000", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@dataclass(frozen=True)
class Config:
    """What is measured."""

    seconds: float = 8.0
    """For each shape and dtype, all layers together."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    rivals: tuple[str, ...] = tuple(DISTRIBUTIONS)
    """Those that are installed are measured."""
    output: Path | None = None
    """Appended to; by default experiments/results/bench_layer.jsonl."""
    picture: Path | None = None
    """Drawn from the output; by default experiments/figures/bench_layer.png."""
    plot_only: bool = False
    """Measure nothing; print and draw the newest run again."""
    smoke: bool = False
    """One small shape, briefly, without torch.compile; files of another name."""


def main(config: Config) -> None:
    """Measures; prints the table and draws the picture, both from the records."""
    name = "bench_layer_smoke" if config.smoke else "bench_layer"
    output = config.output or Path(f"experiments/results/{name}.jsonl")
    path = config.picture or Path(f"experiments/figures/{name}.png")
    if not config.plot_only:
        run(config, output)
    start, *records = last_run(output)
    console = Console(width=130)
    console.print(table(records))
    for name, reason in start["left_out"].items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    draw(start, records, path)
    console.print(f"{output}\n{path}", highlight=False, soft_wrap=True)


def run(config: Config, output: Path) -> None:
    """Appends one record per shape and dtype."""
    wanted, shapes, seconds = config.rivals, SHAPES, config.seconds
    if config.smoke:
        wanted = tuple(name for name in wanted if name != "torch.compile")
        shapes, seconds = ((16, 8, 8, 32),), 0.2
    left_out = missing(wanted)
    names = [name for name in wanted if name not in left_out]
    stamp = results.stamp()
    stamp["versions"] |= versions(names)
    stamp["environment"] = {k: v for k, v in os.environ.items() if k in SETTINGS}
    with results.Log(output) as log:
        settings = {"seconds": seconds, "dtypes": config.dtypes, "rivals": names}
        log.add("start", settings=settings, left_out=left_out, **stamp)
        for dtype, shape in itertools.product(config.dtypes, shapes):
            x, dy = (
                jax.random.normal(jax.random.key(i), shape).astype(dtype)
                for i in range(2)
            )
            log.add("layer", shape=shape, dtype=dtype, **measure(names, x, dy, seconds))


def measure(
    names: Iterable[str], x: jax.Array, dy: jax.Array, seconds: float
) -> results.Record:
    """Medians of each layer and pass, their ratios; and the bytes stored."""
    layers = {name: rivals.calls(name, x, dy) for name in ("bnjax", *names)}
    for name, pair in layers.items():
        check(name, pair, x, dy)
    calls = {(n, which): c for n, pair in layers.items() for which, c in pair.items()}
    median = interleaved({**calls, "copy": copying(x)}, seconds, untimed=1)
    copy = median["copy"]

    def each(value):
        return {n: {w: value(median[n, w], w) for w in PASSES} for n in layers}

    return {
        "copy_bytes_per_second": 2 * x.nbytes / copy,
        "milliseconds": each(lambda t, _: 1e3 * t),
        "ratio": each(lambda t, which: t / median["bnjax", which]),
        "floors": each(lambda t, which: t / (FLOOR[which] * copy)),
        "stored": {n: rivals.stored(rivals.MODELS[n](x), x) for n in ("flax", "bnjax")},
    }


def means(records: list[results.Record], field: str) -> dict[str, dict[str, float]]:
    """The geometric mean over the shapes, of each layer and pass."""
    return {
        name: {
            which: statistics.geometric_mean(r[field][name][which] for r in records)
            for which in PASSES
        }
        for name in records[0][field]
    }


def table(records: list[results.Record]) -> Table:
    """Ratios of all shapes, then their geometric means."""
    names = [name for name in records[0]["ratio"] if name != "bnjax"]
    result = Table(title="Time over that of bnjax (above 1: bnjax is faster)")
    for column in ("shape", "dtype", "pass", *names, "bnjax / floor", "stored"):
        left = column in ("shape", "dtype", "pass")
        result.add_column(column, justify="left" if left else "right", no_wrap=True)

    def add(shape, dtype, ratio, floors, stored):
        for which, text in PASSES.items():
            numbers = [f"{ratio[name][which]:.2f}" for name in names]
            floor = f"{floors['bnjax'][which]:.2f}"
            kept = stored if which == "both" else ""
            result.add_row(shape, dtype, text, *numbers, floor, kept)

    for r in records:
        stored = " → ".join(f"{r['stored'][name]:.2f}" for name in ("flax", "bnjax"))
        add(shown(r["shape"]), r["dtype"], r["ratio"], r["floors"], stored)
    result.add_section()
    for dtype, some in by_dtype(records).items():
        add("geometric mean", dtype, means(some, "ratio"), means(some, "floors"), "")
    return result


def by_dtype(records: list[results.Record]) -> dict[str, list[results.Record]]:
    dtypes = dict.fromkeys(r["dtype"] for r in records)
    return {dtype: [r for r in records if r["dtype"] == dtype] for dtype in dtypes}


def shown(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """Ratios of forward + backward, a panel for each dtype."""
    panels = {}
    for dtype, some in by_dtype(records).items():
        groups = {shown(r["shape"]): r["ratio"] for r in some}
        groups["geometric\nmean"] = means(some, "ratio")
        panels[dtype] = {
            group: {n: t["both"] for n, t in ratio.items() if n != "bnjax"}
            for group, ratio in groups.items()
        }
    found, hardware = start["versions"], start["hardware"]
    libraries = dict.fromkeys(("jax", *DISTRIBUTIONS.values()))
    bars.draw(
        panels,
        path,
        title="One batch-norm layer, forward + backward: time over that of bnjax",
        note=f"{hardware['cpu']}, {hardware['cores']} cores; "
        + ", ".join(f"{n} {found[n]}" for n in libraries if n in found),
        label="ratio (above 1: bnjax is faster)",
    )


if __name__ == "__main__":
    keep_memory("experiments.bench.layer", SETTINGS)
    main(tyro.cli(Config, description=__doc__))
