"""One layer, forward and forward + backward, against flax.linen.BatchNorm.

    python -m experiments.bench.layer            # about two minutes on two cores
    python -m experiments.bench.layer --smoke    # one small shape, ten seconds

Claim: forward + backward is faster than Flax's in bfloat16 and not slower in float32,
and stores the input once instead of 4 (bfloat16) or 2 (float32) times its bytes.
Control: Flax is measured in the same run; the calls are interleaved, after warm-up, on
the same arrays, and the ratio is that of the medians. A ratio above 1 is in favour
of bnjax. Both layers are applied in training, with dtype= that of the input, and
update their running statistics.

Outputs of megabytes are page-faulted anew on every call unless glibc keeps the memory,
so the script restarts itself with MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and
MALLOC_TOP_PAD_ set: for both.

Measured: see the table in the README.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import flax.linen as nn
import jax
import tyro
from rich.console import Console
from rich.table import Table

import bnjax
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results

SHAPES = (
    (64, 32, 32, 64),
    (32, 56, 56, 64),
    (32, 14, 14, 256),
    (32, 7, 7, 2048),
    (4096, 1024),
    (256, 512),
)
LAYERS = {"flax": nn.BatchNorm, "bnjax": bnjax.BatchNorm}


@dataclass(frozen=True)
class Config:
    """What is measured."""

    seconds: float = 4.0
    """For each shape and dtype, all layers together."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    output: Path = Path("experiments/results/bench_layer.jsonl")
    """Appended to."""
    smoke: bool = False
    """One small shape, briefly."""


def programs(layer: type[nn.Module], x: jax.Array):
    """(forward, forward + backward, bytes stored between the two)."""
    norm = layer(use_running_average=False, dtype=x.dtype)
    variables = norm.init(jax.random.key(0), x)

    def forward(x, variables):
        return norm.apply(variables, x, mutable=["batch_stats"])

    def split(x, variables):
        def f(x, params):
            return forward(x, {**variables, "params": params})

        return jax.vjp(f, x, variables["params"], has_aux=True)

    def both(x, variables, dy):
        y, vjp, updates = split(x, variables)
        return y, updates, vjp(dy)

    _, vjp, _ = split(x, variables)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    dy = jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype)
    forward, both = jax.jit(forward), jax.jit(both)
    calls = {
        "forward": lambda: forward(x, variables),
        "both": lambda: both(x, variables, dy),
    }
    return calls, stored / x.nbytes


def measure(x: jax.Array, seconds: float):
    """Median seconds of each layer and pass, interleaved; and the stored bytes."""
    calls, stored = {}, {}
    for name, layer in LAYERS.items():
        passes, stored[name] = programs(layer, x)
        calls |= {(name, which): call for which, call in passes.items()}
    return interleaved(calls, seconds), stored


def main(config: Config) -> None:
    """Measures, prints the table, appends one record per shape and dtype."""
    shapes = ((16, 8, 8, 32),) if config.smoke else SHAPES
    seconds = 0.2 if config.smoke else config.seconds
    table = Table(title="Flax / bnjax: time (above 1: bnjax is faster), bytes stored")
    columns = (
        "shape",
        "dtype",
        "forward",
        "fwd + bwd",
        "stored, Flax",
        "stored, bnjax",
    )
    for column in columns:
        justify = "left" if column == "shape" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    with results.Log(config.output) as log:
        log.add("start", bench="layer", settings=asdict(config), **results.stamp())
        for dtype, shape in itertools.product(config.dtypes, shapes):
            x = jax.random.normal(jax.random.key(2), shape).astype(dtype)
            median, stored = measure(x, seconds)
            forward, both = (
                median["flax", which] / median["bnjax", which]
                for which in ("forward", "both")
            )
            ratio = {"forward": forward, "both": both}
            log.add("layer", shape=shape, dtype=dtype, ratio=ratio, stored=stored)
            numbers = f"{forward:.2f}", f"{both:.2f}"
            sizes = (f"{stored[name]:.2f} x" for name in ("flax", "bnjax"))
            table.add_row("x".join(map(str, shape)), dtype, *numbers, *sizes)
    Console(width=100).print(table)


if __name__ == "__main__":
    keep_memory("experiments.bench.layer")
    main(tyro.cli(Config, description=__doc__))
