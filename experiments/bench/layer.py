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
under its autocast. Haiku and Equinox, given bfloat16, would compute in it, longer, and
with dx off by two units of its last place or more: they are given float32(x), and their
result is rounded, within jit. All update their running statistics, which are float32.
Not compared: what a compiler gains by fusing the layer with its neighbours.

The script restarts itself with glibc told to keep memory (MALLOC_*: outputs of
megabytes are page-faulted anew on every call otherwise); with GOMP_SPINCOUNT, else
PyTorch's idle threads hold a core for milliseconds after each of its calls; and without
the worker processes of torch.compile, which start as the first calls are timed.

Measured: see docs/pages/performance.md. Another library is a function like
`haiku`, named in `MODELS` and `RIVALS`.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import bnjax
from experiments.bench import charts
from experiments.bench.timing import MALLOC, interleaved, keep_memory
from experiments.common import results, study

RIVALS = {  # pip's names
    "flax": "flax",
    "haiku": "dm-haiku",
    "equinox": "equinox",
    "keras": "keras",
    "torch": "torch",
    "torch.compile": "torch",
}
CHANNELS_FIRST = ("equinox", "torch", "torch.compile")
SHAPES = (
    "64x32x32x64",
    "32x56x56x64",
    "32x14x14x256",
    "32x7x7x2048",
    "4096x1024",
    "256x512",
)
PASSES = {"forward": "forward", "both": "fwd + bwd"}
FLOOR = {"forward": 3 / 2, "both": 8 / 2}  # copies
SETTINGS = MALLOC | {"GOMP_SPINCOUNT": "20000", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
SMOKE = {
    "shapes": ("16x8x8x32",),
    "dtypes": ("bfloat16",),
    "rivals": ("flax", "haiku", "torch"),
    "seconds": 0.2,
}


@dataclasses.dataclass(frozen=True)
class Config(study.Output):
    """What is measured."""

    seconds: float = 8.0
    """For each shape and dtype, all layers together."""
    shapes: tuple[str, ...] = SHAPES
    """Of the input, channels last."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of the input and the output; parameters are float32."""
    rivals: tuple[str, ...] = tuple(RIVALS)
    """Those that are installed are measured."""


# The layer in each library: two calls, "forward" of (y, ...) and "both" of (y, dx, ...)


Calls = dict[str, Callable[[], tuple]]


class Model(NamedTuple):
    """A layer of JAX's: apply(params, state, x) is (y, the new state)."""

    apply: Callable[..., tuple[jax.Array, Any]]
    params: Any
    state: Any


def linen(layer: type[nn.Module], x: jax.Array) -> Model:
    """flax.linen.BatchNorm, or bnjax's."""
    norm = layer(use_running_average=False, dtype=x.dtype)
    variables = dict(norm.init(jax.random.key(0), x))

    def apply(params, state, x):
        return norm.apply({"params": params, **state}, x, mutable=["batch_stats"])

    return Model(apply, variables.pop("params"), variables)


def haiku(x: jax.Array) -> Model:
    hk = import_module("haiku")

    def layer(x):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)
        return norm(x.astype(jnp.float32), is_training=True).astype(x.dtype)

    init, apply = hk.transform_with_state(layer)
    params, state = init(None, x)
    return Model(lambda p, s, x: apply(p, s, None, x), params, state)


def equinox(x: jax.Array) -> Model:
    """Its layer takes one example, channels first, within a vmap."""
    eqx = import_module("equinox")
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        x.shape[1], axis_name="batch", mode="batch"
    )
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = eqx.combine(params, static)
        layer = jax.vmap(layer, (0, None), (0, None), axis_name="batch")
        y, state = layer(x.astype(jnp.float32), state)
        return y.astype(x.dtype), state

    return Model(apply, params, state)


def keras(x: jax.Array) -> Model:
    os.environ["KERAS_BACKEND"] = "jax"
    layers = import_module("keras.layers")
    dtype = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else str(x.dtype)
    norm = layers.BatchNormalization(momentum=0.99, epsilon=1e-5, dtype=dtype)
    norm.build(x.shape)
    params = [v.value for v in norm.trainable_variables]
    state = [v.value for v in norm.non_trainable_variables]
    apply = functools.partial(norm.stateless_call, training=True)
    return Model(apply, params, state)


MODELS: dict[str, Callable[[jax.Array], Model]] = {
    "flax": functools.partial(linen, nn.BatchNorm),
    "bnjax": functools.partial(linen, bnjax.BatchNorm),
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
}


def jitted(model: Model, x: jax.Array, dy: jax.Array) -> Calls:
    apply, params, state = model

    def both(params, state, x, dy):
        y, vjp, new = jax.vjp(lambda p, x: apply(p, state, x), params, x, has_aux=True)
        dparams, dx = vjp(dy)
        return y, dx, dparams, new

    forward, both = jax.jit(apply), jax.jit(both)
    return {
        "forward": lambda: forward(params, state, x),
        "both": lambda: both(params, state, x, dy),
    }


def stored(model: Model, x: jax.Array) -> float:
    """Bytes stored between the forward and the backward pass, over those of x."""
    apply, params, state = model
    _, vjp, _ = jax.vjp(lambda p, x: apply(p, state, x), params, x, has_aux=True)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) / x.nbytes


def pytorch(x: jax.Array, dy: jax.Array, compiled: bool = False) -> Calls:
    """PyTorch on the CPU, on the very same memory; channels_last if of 4 axes."""
    torch = import_module("torch")
    torch.set_num_threads(results.cores())
    torch.compiler.reset()  # else the ninth shape would silently not be compiled
    norm = torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d
    norm = norm(x.shape[-1], momentum=0.01)
    layer = torch.compile(norm, fullgraph=True, dynamic=False) if compiled else norm
    data, dy = (torch.from_dlpack(v).movedim(-1, 1) for v in (x, dy))
    leaf = data.detach().requires_grad_()

    def forward():
        with torch.no_grad():
            return (layer(data),)

    def both():
        y = layer(leaf)
        return y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], dy)

    return {"forward": forward, "both": both}


def calls_of(name: str, x: jax.Array, dy: jax.Array) -> Calls:
    """The two calls of one library; x and dy have their channels last."""
    if name not in MODELS:
        return pytorch(x, dy, compiled=name == "torch.compile")
    if name in CHANNELS_FIRST:
        x, dy = jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1)
    return jitted(MODELS[name](x), x, dy)


def missing(names: Iterable[str]) -> dict[str, str]:
    """Which libraries cannot be measured here, and why."""
    reasons = {}
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            reasons[name] = f"{RIVALS[name]} is not installed"
        elif name.startswith("torch") and jax.default_backend() != "cpu":
            reasons[name] = "compared on the CPU only"
        elif name == "torch.compile":
            torch = import_module("torch")
            try:
                torch.compile(torch.sin)(torch.ones(2))
            except RuntimeError as error:  # most often there is no C++ compiler
                reasons[name] = str(error).strip().splitlines()[0]
    return reasons


# What is timed is right


def reference(x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, dx), from section 3 of Ioffe & Szegedy 2015; scale is 1 and bias 0."""
    axes = tuple(range(x.ndim - 1))
    rstd = 1 / np.sqrt(x.var(axes) + 1e-5)
    y = (x - x.mean(axes)) * rstd
    return y, rstd * (dy - dy.mean(axes) - y * (dy * y).mean(axes))


def check(name: str, calls: Calls, x: jax.Array, dy: jax.Array) -> None:
    """Raises ValueError if y or dx is off by more than 1.5 units of x's last place.

    Right rounding is 0.5; torch.compile rounds dx twice, 1.05. On top of it, 256 units
    of float32's, in which all compute: PyTorch's sums over 1e5 values lose 30.
    """
    eps = jnp.finfo(jnp.float32).eps
    tolerance = 1.5 * float(jnp.finfo(x.dtype).eps) + 256 * float(eps)
    y, dx = reference(np.asarray(x, np.float64), np.asarray(dy, np.float64))
    found = (calls["forward"]()[0], *calls["both"]()[:2])
    for what, value, exact in zip(("y", "y", "dx"), found, (y, y, dx), strict=True):
        if name.startswith("torch"):
            value = value.detach().double()
        value = np.asarray(value, np.float64)
        value = np.moveaxis(value, 1, -1) if name in CHANNELS_FIRST else value
        worst = (abs(value - exact) / np.maximum(1, abs(exact))).max()
        if not worst <= tolerance:
            raise ValueError(
                f"{what} of {name} is off by {worst:.2g} for {x.dtype} {x.shape}, "
                f"expected at most {tolerance:.2g}; it is not timed."
            )


# Measurement


def run(config: Config, path: Path) -> None:
    """Appends one record per shape and dtype."""
    left_out = missing(config.rivals)
    names = [name for name in config.rivals if name not in left_out]
    stamp = results.stamp()
    found = {RIVALS[name] for name in names}
    stamp["versions"] |= {name: importlib.metadata.version(name) for name in found}
    stamp["environment"] = {k: v for k, v in os.environ.items() if k in SETTINGS}
    with results.Log(path) as log:
        settings = results.settings_of(config)
        log.add("start", settings=settings, left_out=left_out, **stamp)
        for dtype, shape in itertools.product(config.dtypes, config.shapes):
            sizes = [int(size) for size in shape.split("x")]
            x, dy = (
                jax.random.normal(jax.random.key(i), sizes).astype(dtype)
                for i in range(2)
            )
            measured = measure(names, x, dy, config.seconds)
            log.add("layer", shape=sizes, dtype=dtype, **measured)


def measure(
    names: Iterable[str], x: jax.Array, dy: jax.Array, seconds: float
) -> results.Record:
    """Medians of each layer and pass, their ratios; and the bytes stored."""
    layers = {name: calls_of(name, x, dy) for name in ("bnjax", *names)}
    for name, pair in layers.items():
        check(name, pair, x, dy)
    calls = {(n, which): c for n, pair in layers.items() for which, c in pair.items()}
    copy = functools.partial(jax.jit(jnp.negative), x)  # reads and writes x once
    median = interleaved({**calls, "copy": copy}, seconds, untimed=1)

    def each(value):
        return {n: {w: value(median[n, w], w) for w in PASSES} for n in layers}

    return {
        "copy_bytes_per_second": 2 * x.nbytes / median["copy"],
        "milliseconds": each(lambda t, _: 1e3 * t),
        "ratio": each(lambda t, which: t / median["bnjax", which]),
        "floors": each(lambda t, which: t / (FLOOR[which] * median["copy"])),
        "stored": {n: stored(MODELS[n](x), x) for n in ("flax", "bnjax")},
    }


# Table and picture


def by_dtype(records: list[results.Record]) -> dict[str, list[results.Record]]:
    dtypes = dict.fromkeys(r["dtype"] for r in records)
    return {dtype: [r for r in records if r["dtype"] == dtype] for dtype in dtypes}


def shown(shape: list[int]) -> str:
    return "x".join(map(str, shape))


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
    result = Table("shape", "dtype", "pass")
    result.title = "Time over that of bnjax (above 1: bnjax is faster)"
    for column in (*names, "bnjax / floor", "stored"):
        result.add_column(column, justify="right", no_wrap=True)
    rows = [(shown(r["shape"]), r["dtype"], r) for r in records]
    for dtype, some in by_dtype(records).items():
        both = {field: means(some, field) for field in ("ratio", "floors")}
        rows.append(("geometric mean", dtype, both))
    for shape, dtype, r in rows:
        for which, text in PASSES.items():
            numbers = [f"{r['ratio'][name][which]:.2f}" for name in names]
            numbers.append(f"{r['floors']['bnjax'][which]:.2f}")
            if which == "both" and "stored" in r:
                numbers.append(
                    f"{r['stored']['flax']:.2f} → {r['stored']['bnjax']:.2f}"
                )
            result.add_row(shape, dtype, text, *numbers)
    return result


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """Ratios of forward + backward, a panel for each dtype."""
    found, hardware = start["versions"], start["hardware"]
    libraries = dict.fromkeys(("jax", *RIVALS.values()))
    versions = ", ".join(f"{n} {found[n]}" for n in libraries if n in found)
    title = (
        "One batch-norm layer, forward + backward: time over that of bnjax\n"
        f"{hardware['cpu']}, {hardware['cores']} cores; {versions}"
    )
    panels = by_dtype(records)
    height = 1.4 + 0.9 * (1 + len(next(iter(panels.values()))))
    figure, axes = charts.panels(title, len(panels), height=height, share=True)
    for each, (dtype, some) in zip(axes, panels.items(), strict=True):
        groups = {shown(r["shape"]): r["ratio"] for r in some}
        groups["geometric\nmean"] = means(some, "ratio")
        ratios = {
            group: {n: t["both"] for n, t in ratio.items() if n != "bnjax"}
            for group, ratio in groups.items()
        }
        charts.bars_of_ratios(each, ratios, "ratio (above 1: bnjax is faster)")
        each.set_title(dtype, fontsize=9)
    charts.save(figure, path, axes[:1])


def main(config: Config) -> int:
    """Measures; prints the table and draws the picture, both from the records."""
    start, records, picture = charts.measured("bench_layer", config, run)
    console = Console(width=130)
    console.print(table(records))
    for name, reason in start["left_out"].items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    draw(start, records, picture)
    return 0


if __name__ == "__main__":
    keep_memory("experiments.bench.layer", SETTINGS)
    sys.exit(study.start(main, SMOKE, tyro.cli(Config, description=__doc__)))
