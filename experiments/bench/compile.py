"""Tracing, lowering and compilation of many layers, against flax.linen.BatchNorm.

    python -m experiments.bench.compile            # two minutes on two cores
    python -m experiments.bench.compile --smoke    # two layers, a few seconds

Claim: forward + backward of 50 layers (a 3x3 convolution, batch normalization, ReLU,
one after the other, not scanned) is ready to run in at most 1.1 times the time it takes
with Flax's layer. Control: the same network with Flax's, in the same process: the
networks take turns, JAX's caches are cleared before each, the cache on disk is not
used, and a ratio is one of medians. Above 1, bnjax takes longer.

Two sizes, because a compiler may choose other kernels for small arrays. Nothing is run.

Measured: see docs/pages/performance.md. What is compiled is `Network`; another
layer is an entry of `NETWORKS`.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

import bnjax
from experiments.bench import charts
from experiments.bench.charts import Measure
from experiments.common import results, study

SHAPES = {"small": (4, 8, 8, 16), "large": (64, 32, 32, 16)}
NETWORKS = {
    "flax": functools.partial(nn.BatchNorm),
    "bnjax": functools.partial(bnjax.BatchNorm),
    "bnjax fused": functools.partial(bnjax.BatchNorm, activation=nn.relu),
}
PHASES = ("trace", "lower", "compile")
MEASURES = {key: Measure(key, "s", decimals=2) for key in (*PHASES, "total")} | {
    key: Measure(key) for key in ("equations", "instructions")
}
SMOKE = {"layers": 2, "repeats": 1, "sizes": ("small",)}


@dataclasses.dataclass(frozen=True)
class Config(study.Output):
    """What is compiled, and how often."""

    layers: int = 50
    """Of batch normalization."""
    repeats: int = 7
    """Of which the median is taken."""
    sizes: tuple[Literal["small", "large"], ...] = ("small", "large")
    """Of the input: below and above a megabyte."""


class Network(nn.Module):
    """Layers of a convolution, `norm` and ReLU, unless `norm` has its own."""

    norm: functools.partial
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
            x = self.norm(use_running_average=False)(x)
            if "activation" not in self.norm.keywords:
                x = nn.relu(x)
        return x.mean()


def program(name: str, layers: int, shape: tuple[int, ...]):
    """Loss, gradient and running statistics, and the shapes of its arguments."""
    network = Network(NETWORKS[name], layers)

    def loss(params: Any, stats: Any, x: jax.Array):
        variables = {"params": params, "batch_stats": stats}
        return network.apply(variables, x, mutable=["batch_stats"])

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables: Any = jax.eval_shape(network.init, jax.random.key(0), x)
    step = jax.value_and_grad(loss, has_aux=True)
    return step, (variables["params"], variables["batch_stats"], x)


def prepare(name: str, layers: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds of each phase, and the sizes of what they make."""
    step, arguments = program(name, layers, shape)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(step).trace(*arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return {
        **dict(zip(PHASES, seconds, strict=True)),
        "total": sum(seconds),
        "equations": equations(traced.jaxpr.jaxpr),
        "instructions": str(compiled.as_text()).count(" = "),
    }


def equations(jaxpr: Any) -> int:
    """The equations of a jaxpr, those inside of others included."""
    inner = jax.tree.leaves(
        [equation.params for equation in jaxpr.eqns],
        is_leaf=lambda value: hasattr(value, "eqns"),
    )
    inner = [getattr(value, "jaxpr", value) for value in inner]
    return len(jaxpr.eqns) + sum(equations(j) for j in inner if hasattr(j, "eqns"))


def measure(config: Config, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """The medians of `prepare` for each network; they take turns, after one unseen."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NETWORKS}
    for repeat in range(config.repeats + 1):
        for name in NETWORKS:
            numbers = prepare(name, config.layers, shape)
            if repeat:
                found[name].append(numbers)
    return {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def run(config: Config, path: Path) -> None:
    """Appends one record per size and network."""
    jax.config.update("jax_enable_compilation_cache", False)
    with results.Log(path) as log:
        settings = results.settings_of(config)
        log.add("start", bench="compile", settings=settings, **results.stamp())
        for size in config.sizes:
            for name, numbers in measure(config, SHAPES[size]).items():
                log.add("network", input=size, variant=name, **numbers)


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """A panel for each size of input: the phases over Flax's."""
    settings = start["settings"]
    title = (
        f"{settings['layers']} layers of convolution, batch normalization and ReLU, "
        f"forward + backward: over Flax's time\n{charts.machine(start)}"
    )
    figure, panels = charts.panels(title, len(settings["sizes"]))
    for axes, size in zip(panels, settings["sizes"], strict=True):
        seconds = {key: m for key, m in MEASURES.items() if m.unit == "s"}
        some = [r for r in records if r["input"] == size]
        charts.bars_over_flax(axes, some, "input", seconds)
        megabytes = 4 * math.prod(SHAPES[size]) / 2**20
        axes.set_title(f"{size} input, {megabytes:.2g} MiB", fontsize=9)
        axes.axhline(1.1, color="black", lw=0.8, ls=":")
    charts.save(figure, path, panels[:1])


def main(config: Config) -> int:
    """Measures, records, prints the table and draws the picture."""
    start, records, picture = charts.measured("bench_compile", config, run)
    title = "Over Flax (below 1: faster); in brackets medians"
    Console(width=120).print(charts.table(title, records, "input", MEASURES))
    draw(start, records, picture)
    return 0


if __name__ == "__main__":
    sys.exit(study.start(main, SMOKE, tyro.cli(Config, description=__doc__)))
