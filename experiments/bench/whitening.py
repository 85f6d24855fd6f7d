"""Step time of whitening, by each inverse square root, over batch normalization's.

    python -m experiments.bench.whitening            # a good minute on two cores
    python -m experiments.bench.whitening --smoke    # one small point, ten seconds

Claim: forward + backward of `whiten.decorrelate` costs about the same by Newton's and
Schulz's iteration as by the eigenvalues, because the products with the input, which
both share, take most of the time. (The iteration is made for accelerators, where the
eigenvalues are slow: there this bench has yet to run.) Control: `batch_norm` of the
same input, compiled and called the same way, in turns; a number is a ratio of medians
to it.

Measured (two cores of an AMD EPYC, jax 0.10.2): 5.5 to 19 times batch normalization;
the eigenvalues 0.91 to 1.07 times the iteration, Cholesky 0.90 to 1.03 (two runs).
"""

import dataclasses
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import bnjax
from bnjax import whiten
from experiments.bench import charts
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results, study

CONTROL = "batch_norm"
LAYERS = {CONTROL: bnjax.batch_norm} | {
    name: partial(whiten.decorrelate, method=name)
    for name in ("newton_schulz", "eigh", "cholesky")
}
SMOKE = {"positions": 64, "features": (8,), "groups": (4,), "seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class Config(study.Output):
    """What is measured."""

    positions: int = 8192
    """Batch times height times width."""
    features: tuple[int, ...] = (64, 256)
    """Of the input."""
    groups: tuple[int, ...] = (16, 64, 256)
    """Features that are whitened together; only divisors of the features are run."""
    seconds: float = 8.0
    """For each point, all layers together."""


def calls_of(positions: int, features: int, size: int):
    """Forward + backward of each layer, by name; all of one input."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (2, positions, features))
    mixing = jax.random.normal(keys[1], (features, features)) / features**0.5
    x = x @ (jnp.eye(features) + 0.5 * mixing)
    vectors = jnp.ones(features), jnp.zeros(features)

    def step(layer, *inputs):
        y, vjp, _ = jax.vjp(layer, *inputs, has_aux=True)
        return y, vjp(dy)

    made = {}
    for name, layer in LAYERS.items():
        sized = {} if name == CONTROL else {"group_size": size}
        program = jax.jit(partial(step, partial(layer, **sized)))
        made[name] = partial(program, x, *vectors)
    return made


def run(config: Config, path: Path) -> None:
    """Appends one record per point."""
    with results.Log(path, digits=9) as log:
        settings = results.settings_of(config)
        log.add("start", bench="whitening", settings=settings, **results.stamp())
        for features, size in product(config.features, config.groups):
            if features % size == 0:
                calls = calls_of(config.positions, features, size)
                times = interleaved(calls, config.seconds)
                log.add("point", features=features, group_size=size, time=times)


def ratios(record: results.Record) -> dict[str, float]:
    """The times over the control's."""
    times = record["time"]
    return {name: t / times[CONTROL] for name, t in times.items() if name != CONTROL}


def table(records: list[results.Record]) -> Table:
    """A row for each point."""
    made = Table(title="Forward + backward over batch_norm's (bnjax)")
    names = list(ratios(records[0]))
    for name in ("features", "group size", *names, f"{CONTROL}, ms"):
        made.add_column(name, justify="right")
    for record in records:
        numbers = [f"{ratios(record)[name]:.2f}" for name in names]
        milliseconds = f"{1e3 * record['time'][CONTROL]:.2f}"
        sizes = str(record["features"]), str(record["group_size"])
        made.add_row(*sizes, *numbers, milliseconds)
    return made


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """A group of bars for each point."""
    groups = {
        f"{r['features']} features\nin groups of {r['group_size']}": ratios(r)
        for r in records
    }
    title = (
        f"Whitening {start['settings']['positions']} positions, float32, forward + "
        f"backward\n{charts.machine(start)}"
    )
    figure, (axes,) = charts.panels(title, 1, height=1.2 + 0.5 * len(groups))
    charts.bars_of_ratios(axes, groups, "time over batch normalization's")
    charts.save(figure, path, [axes])


def main(config: Config) -> int:
    """Measures, records, prints the table and draws the picture."""
    start, records, picture = charts.measured("bench_whitening", config, run)
    Console(width=100).print(table(records))
    draw(start, records, picture)
    return 0


if __name__ == "__main__":
    keep_memory("experiments.bench.whitening")
    sys.exit(study.start(main, SMOKE, tyro.cli(Config, description=__doc__)))
