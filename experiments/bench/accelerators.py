"""Layers and training steps compiled for TPUs and GPUs, on a machine that has neither.

    python -m experiments.bench.accelerators layer    # ten minutes on one core
    python -m experiments.bench.accelerators step     # three minutes
    python -m experiments.bench.accelerators step --blocks 0 --targets h100
    python -m experiments.bench.accelerators --smoke  # one layer, half a minute

Claim: on each target, for each dtype, forward and forward + backward, a layer of bnjax
reads and writes the input in device memory no more often than Flax's layer does, takes
no more temporary memory and sends no more; and a training step of ResNet-50 moves no
more bytes with it. Control: Flax's layers, Linen and NNX, compiled the same way. The
floor is 3 passes forward, 7 forward + backward in one program; a residual adds its own.

Nothing is run. XLA compiles for devices that are only described (see targets.py), and
the bytes that the optimized program moves are counted in its text (see programs.py): a
pass is the bytes of x, so that reading and writing it are two. What a branch does that
is not taken every time stands apart, under "rare". Temporary memory is the compiler's
plan. With more chips than one the batch is split, by jit or by shard_map, and "sent"
has the numbers of each collective, on each chip. Everything that a user's program would
be given is an argument: the input, parameters, running statistics, and dy, so that
nothing is known to the compiler beforehand.

Known gaps: no caches, no padding of tiles, no tuning, because nothing can be run. A TPU
keeps small inputs on the chip, where passes cost nothing and are not counted: such rows
are marked with "on chip" and compare nothing; take larger shapes.

A program is recorded as soon as it is compiled, and not compiled again when it has been
recorded, unless `--again`. The tables have the newest record of each.

Measured: see docs/pages/performance.md. Another layer is an entry of `LINEN` or `NNX`.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import bnjax
from experiments.bench import charts, targets
from experiments.bench.charts import Measure
from experiments.bench.programs import Program
from experiments.bench.step import NORMS, ResNet, training_step
from experiments.common import results, study


class PlainGhost(nn.Module):
    """`GhostBatchNorm` as Flax's users write it: Flax's formula for each group."""

    use_running_average: bool
    dtype: Any
    axis_name: None = None

    @nn.compact
    def __call__(self, x, mask=None):
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        running = [
            self.variable("batch_stats", name, start, (features,))
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        z = x.reshape(-1, GROUP, *x.shape[1:])
        if mask is not None:
            mask = mask.reshape(-1, GROUP, *mask.shape[1:])
        axes, wide = tuple(range(1, z.ndim - 1)), z.astype(jnp.float32)
        mean = wide.mean(axes, where=mask, keepdims=True)
        var = jnp.square(wide).mean(axes, where=mask, keepdims=True) - jnp.square(mean)
        total = mean.mean(0).ravel(), (var.mean(0) + mean.var(0)).ravel()
        for variable, value in zip(running, total, strict=True):
            variable.value = 0.99 * variable.value + 0.01 * value
        scale, bias = (jnp.expand_dims(v, (0, *axes)) for v in (scale, bias))
        y = (z - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias
        return y.astype(self.dtype).reshape(x.shape)


class PlainSplit(nn.Module):
    """`SplitBatchNorm` as Flax's users write it: a layer for each half of the batch."""

    use_running_average: bool
    dtype: Any
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask=None):
        halves = jnp.split(x, 2)
        masks = [None, None] if mask is None else jnp.split(mask, 2)
        options = {"dtype": self.dtype, "axis_name": self.axis_name}
        return jnp.concatenate(
            [
                nn.BatchNorm(self.use_running_average, **options)(half, mask=mask)
                for half, mask in zip(halves, masks, strict=True)
            ]
        )


GROUP = 32
LINEN: dict[str, Any] = {
    "flax": nn.BatchNorm,
    "flax-ghost": PlainGhost,
    "flax-split": PlainSplit,
    "bnjax": bnjax.BatchNorm,
    "ghost": partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=GROUP),
    "renorm": bnjax.linen.BatchRenorm,
    "split": partial(bnjax.linen.SplitBatchNorm, num_splits=2),
}
NNX: dict[str, Any] = {"flax-nnx": nnx.BatchNorm, "bnjax-nnx": bnjax.nnx.BatchNorm}
FLAX = ("flax", "flax-nnx", "flax-ghost", "flax-split")  # no activation, no residual
# In the picture. Layers of NNX make the same programs as those of Linen.
DRAWN = ("flax", "bnjax", "renorm", "flax-ghost", "ghost", "flax-split", "split")
SHAPES = ("256x56x56x256", "256x112x112x64", "256x28x28x512", "8192x4096")
DIRECTIONS = ("forward", "both")
STAGES = (3, 4, 6, 3)  # of ResNet-50
MEASURES = {
    "moved": Measure("moved", "GB", 1e9, 1),
    "temporary": Measure("temporary", "GB", 1e9, 2),
    "sums": Measure("convolutions with sums"),
    "compile": Measure("to compile", "s", 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Layer(study.Output):
    """One layer: passes over device memory, forward and forward + backward."""

    targets: tuple[str, ...] = ("v5e", "h100")
    """Of v5e, v5p, v6e, a100, h100 and b200."""
    shapes: tuple[str, ...] = SHAPES
    """Of the input, on each chip."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of input and output."""
    layers: tuple[str, ...] = (*FLAX, "bnjax", "bnjax-nnx", "ghost", "renorm", "split")
    """Flax's and bnjax's."""
    variants: tuple[str, ...] = ("plain", "relu", "activation", "residual", "mask")
    """What stands behind the layer or is given to it; see `LayerCell`."""
    chips: tuple[int, ...] = (1,)
    """1, 16 and 256; 1,024 of v5p; 1, 8, 16 and 128 GPUs."""
    modes: tuple[str, ...] = ("jit", "shard_map")
    """With more than one chip."""
    again: bool = False
    """Compile also what has been recorded: after a change of the library."""


@dataclasses.dataclass(frozen=True)
class Step(study.Output):
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
    again: bool = False
    """Compile also what has been recorded: after a change of the library."""


Command = (
    Annotated[Layer, tyro.conf.subcommand("layer")]
    | Annotated[Step, tyro.conf.subcommand("step")]
)
NAMES = {Layer: "bench_accelerators", Step: "bench_accelerators_step"}
SMOKE: dict[type, dict[str, Any]] = {
    Layer: {"targets": ("v5e",), "shapes": ("256x56x56x256",), "variants": ("relu",)}
    | {"dtypes": ("bfloat16",), "layers": ("flax", "bnjax")},
    Step: {"targets": ("v5e",), "blocks": 1, "images": 2, "side": 32}
    | {"variants": ("flax", "bnjax")},
}


# The programs


class LayerCell(NamedTuple):
    """One program of one layer.

    Attributes:
        target: see `targets.TARGETS`.
        chips: that share the batch.
        mode: "jit" or "shard_map"; with one chip there is no difference.
        layer: a key of `LINEN` or `NNX`.
        variant: "relu" stands behind the layer, "activation" is the layer's own;
            "residual" is added and ReLU follows, by the layer if it can; "mask" and
            "weights" are given to the layer, "plain" has nothing.
        dtype: of x and y.
        shape: of x on each chip.
        direction: "forward", or "both": one program with y, dx and all else.
    """

    target: str
    chips: int
    mode: str
    layer: str
    variant: str
    dtype: str
    shape: tuple[int, ...]
    direction: str


class StepCell(NamedTuple):
    """One training step; the fields are those of `Step`."""

    target: str
    chips: int
    variant: str
    blocks: int
    images: int
    side: int


Cell = LayerCell | StepCell


def cells_of(config: Layer | Step) -> list[Cell]:
    """The programs that are asked for."""
    if isinstance(config, Step):
        size = config.blocks, config.images, config.side
        return [
            StepCell(target, config.chips, variant, *size)
            for target, variant in itertools.product(config.targets, config.variants)
        ]
    places = [
        (target, chips, mode)
        for target in config.targets
        for chips in config.chips
        for mode in (config.modes if chips > 1 else ("jit",))
    ]
    shapes = [tuple(map(int, shape.split("x"))) for shape in config.shapes]
    rest = (shapes, config.dtypes, config.variants, config.layers, DIRECTIONS)
    return [
        LayerCell(*place, layer, variant, dtype, shape, direction)
        for place, shape, dtype, variant, layer, direction in itertools.product(
            places, *rest
        )
        if variant != "activation" or layer not in FLAX
    ]


def of_linen(kind: Any, x: jax.ShapeDtypeStruct, options: dict[str, Any]):
    """A layer's `apply(params, stats, x)`, for inputs like `x`; params and stats."""
    module = kind(**options)
    shapes: Any = dict(jax.eval_shape(module.init, jax.random.key(0), x))
    params = shapes.pop("params")

    def apply(params, stats, x, **options):
        variables = {"params": params, **stats}
        return module.apply(variables, x, mutable=list(shapes), **options)

    return apply, params, shapes


def of_nnx(kind: Any, x: jax.ShapeDtypeStruct, options: dict[str, Any]):
    """The same of a layer of NNX."""
    module = nnx.eval_shape(lambda: kind(x.shape[-1], rngs=nnx.Rngs(0), **options))
    definition, params, stats = nnx.split(module, nnx.Param, ...)

    def apply(params, stats, x, **options):
        module = nnx.merge(definition, params, stats)
        y = module(x, **options)
        return y, nnx.pure(nnx.split(module, nnx.Param, ...)[2])

    return apply, nnx.pure(params), nnx.pure(stats)


def lower_layer(cell: LayerCell) -> jax.stages.Lowered:
    """One layer in training: y, the next statistics and, backward, each gradient."""
    split = P("data") if cell.chips > 1 else P()
    shared = cell.mode == "shard_map" and cell.chips > 1
    x = jax.ShapeDtypeStruct((cell.chips * cell.shape[0], *cell.shape[1:]), cell.dtype)
    behind = cell.variant in ("relu", "activation", "residual")
    fused = behind and cell.variant != "relu" and cell.layer not in FLAX
    options: dict[str, Any] = {"use_running_average": False, "dtype": x.dtype}
    options |= {"axis_name": "data" if shared else None}
    options |= {"activation": nn.relu} if fused else {}
    build, kinds = (of_nnx, NNX) if cell.layer in NNX else (of_linen, LINEN)
    apply, params, stats = build(kinds[cell.layer], x, options)
    arrays = {"x": x} | ({"residual": x} if cell.variant == "residual" else {})
    masks = {}
    if cell.variant in ("mask", "weights"):
        dtype = bool if cell.variant == "mask" else jnp.float32
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        masks[cell.variant] = jax.ShapeDtypeStruct(shape, dtype)

    def forward(params, stats, arrays, masks):
        options = arrays | masks
        x = options.pop("x")
        residual = None if fused else options.pop("residual", None)
        y, stats = apply(params, stats, x, **options)
        y = y if residual is None else y + residual
        return (nn.relu(y) if behind and not fused else y), stats

    def both(params, stats, arrays, masks, dy):
        y, vjp, stats = jax.vjp(
            lambda params, arrays: forward(params, stats, arrays, masks),
            params,
            arrays,
            has_aux=True,
        )
        return y, stats, *vjp(dy)

    arguments: tuple = params, stats, arrays, masks
    given, result, f = (P(), P(), split, split), (split, P()), forward
    if cell.direction == "both":
        arguments, given = (*arguments, x), (*given, split)
        result, f = (*result, P(), split), both
    mesh = mesh_of(cell)
    if shared:
        f = jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=result)
    return lower(f, mesh, arguments, given, result)


def lower_step(cell: StepCell) -> jax.stages.Lowered:
    """A training step of ResNet-50 in bfloat16, as `bench.step` has it."""
    stages = (cell.blocks,) if cell.blocks else STAGES
    model = ResNet(stages, True, NORMS[cell.variant], dtype=jnp.bfloat16)
    count = cell.chips * cell.images
    data = jax.ShapeDtypeStruct((count, cell.side, cell.side, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), data)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(optimizer.init, variables["params"])
    split = P("data") if cell.chips > 1 else P()
    return lower(
        training_step(model, optimizer),
        mesh_of(cell),
        (variables, state, data, labels),
        (P(), P(), split, split),
        P(),
    )


def mesh_of(cell: Cell) -> Mesh:
    devices = np.array(targets.devices(cell.target, cell.chips))
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def lower(
    f: Callable[..., Any], mesh: Mesh, arguments: tuple, given: tuple, result: Any
) -> jax.stages.Lowered:
    """`f` for arguments and results that lie on the mesh as the specs say."""

    def on(spec: P, values: Any) -> Any:  # committed, as a loop's arrays are
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda v: v.update(sharding=sharding), values)

    def is_spec(leaf: Any) -> bool:
        return isinstance(leaf, P)

    placed = jax.tree.map(on, given, arguments, is_leaf=is_spec)
    results = jax.tree.map(partial(NamedSharding, mesh), result, is_leaf=is_spec)
    return jax.jit(f, out_shardings=results).lower(*placed)


# What is counted in them


def count(cell: Cell) -> results.Record:
    """What one program does on each chip, and how long it took to make.

    Of a step, in bytes and seconds; of a layer, in passes over x and seconds.
    """
    start = time.perf_counter()
    low = lower_layer(cell) if isinstance(cell, LayerCell) else lower_step(cell)
    middle = time.perf_counter()
    compiled = targets.compile(cell.target, low)
    end = time.perf_counter()
    program = Program(str(compiled.as_text()))
    memory: Any = compiled.memory_analysis()
    found = {
        "moved": program.always.bytes,
        "moved_rarely": program.sometimes.bytes,
        "temporary": memory.temp_size_in_bytes,
        "sent": [each._asdict() for each in program.always.collectives],
        "sent_rarely": [each._asdict() for each in program.sometimes.collectives],
        "unknown_loops": program.unknown_loops,
        "lower": middle - start,
        "compile": end - middle,
    }
    if isinstance(cell, StepCell):
        convolutions, sums = program.convolutions()
        return found | {"convolutions": convolutions, "sums": sums or None}
    size = math.prod(cell.shape)
    x = size * jnp.dtype(cell.dtype).itemsize
    passes = {n: found[n] / x for n in ("moved", "moved_rarely", "temporary")}
    written = program.always.written(size // 2)
    on_chip = program.on_chip(size // 2)
    return found | passes | {"written": written, "on_chip": on_chip}


# Records


def key(record: results.Record) -> str:
    """What a program is, of a record or of a cell's fields."""
    names = (*LayerCell._fields, *StepCell._fields)
    return str({n: results.plain(record[n]) for n in names if n in record})


def recorded(path: Path) -> dict[str, results.Record]:
    """The newest record of each program, with the versions of its run."""
    found, starts = {}, {}
    for record in results.read(path) if path.exists() else []:
        if record["kind"] == "start":
            starts[record["run"]] = record
        else:
            versions = starts[record["run"]]["versions"]
            found[key(record)] = record | {"versions": versions}
    return found


def known(config: Layer | Step, path: Path) -> list[results.Record]:
    """The newest record of each program that is asked for.

    Raises:
        LookupError: there is none.
    """
    found = recorded(path)
    keys = [key(cell._asdict()) for cell in cells_of(config)]
    records = [found[key] for key in keys if key in found]
    if not records:
        raise LookupError(f"{path} has none of what is asked for.")
    return records


def run(config: Layer | Step, path: Path) -> None:
    """Compiles and records what has not been recorded."""
    done = set() if config.again else set(recorded(path))
    with results.Log(path) as log:
        settings = results.settings_of(config)
        log.add("start", bench="accelerators", settings=settings, **results.stamp())
        for cell in cells_of(config):
            if key(cell._asdict()) not in done:
                kind = "layer" if isinstance(cell, LayerCell) else "step"
                log.add(kind, **cell._asdict(), **count(cell))


# Tables and pictures


def place(record: results.Record) -> str:
    """The target; with its chips, if there are several."""
    if record["chips"] == 1:
        return record["target"]
    return f"{record['chips']} {record['target']}, {record['mode']}"


def table(records: list[results.Record]) -> Table:
    """A row for each program of a layer; of `sent`, the numbers per collective."""
    result = Table(title="Passes over the bytes of x in device memory")
    names = ("shape", "dtype", "variant", "layer", "direction")
    for name in ("target", *names):
        result.add_column(name, no_wrap=True)
    for name in ("passes", "rare", "temporary", "sent", "compile (s)"):
        result.add_column(name, justify="right")
    for record in records:
        shape = "x".join(map(str, record["shape"]))
        rare = record["moved_rarely"]
        result.add_row(
            *(place(record), shape, *(record[name] for name in names[1:])),
            f"{record['moved']:.2f}" + (" on chip" if record["on_chip"] else ""),
            f"{rare:.2f}" if rare else "",
            f"{record['temporary']:.2f}",
            "+".join(str(each["elements"]) for each in record["sent"]),
            f"{record['compile']:.1f}",
        )
    return result


def draw_layers(records: list[results.Record], path: Path) -> None:
    """Passes of forward + backward for one shape: a panel for each target and dtype."""
    records = [r for r in records if r["direction"] == "both" and not r["on_chip"]]
    records = [r for r in records if r["shape"] == records[0]["shape"]]
    measured = dict.fromkeys(r["layer"] for r in records)
    order = [name for name in DRAWN if name in measured] or [*measured]
    records = [r for name in order for r in records if r["layer"] == name]
    panels: dict[str, charts.Groups] = {}
    for r in records:
        groups = panels.setdefault(f"{place(r)}\n{r['dtype']}", {})
        groups.setdefault(r["variant"], {})[r["layer"]] = r["moved"]
    if not panels:
        raise LookupError("nothing to draw: expected layers, forward + backward.")
    shape = " x ".join(map(str, records[0]["shape"]))
    title = (
        f"One layer, x of {shape}: passes over its bytes in device memory, forward + "
        f"backward\n(dotted: 7, the floor); jax {records[0]['versions']['jax']}"
    )
    figure, axes = charts.panels(title, len(panels), height=5.5, share=True)
    for each, (name, groups) in zip(axes, panels.items(), strict=True):
        charts.horizontal_bars(each, groups)
        each.set_xlim(0, 16)
        each.axvline(7, color="black", linewidth=0.8, linestyle=":")
        each.set_title(name, fontsize=9)
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
    shown = {k: MEASURES[k] for k in ("moved", "temporary")}
    for each, name in zip(axes, names, strict=True):
        some = [record for record in records if record["target"] == name]
        charts.bars_over_flax(each, some, "target", shown)
        each.set_title(name, fontsize=9)
    charts.save(figure, path, axes[:1])


def main(config: Layer | Step) -> int:
    """Compiles what is missing, records it, prints the tables and draws the picture."""
    jax.config.update("jax_platforms", "cpu")  # else JAX may look for a TPU
    name = NAMES[type(config)]
    path, folder = results.places(name, config.out, config.record)
    if not config.plot_only:
        run(config, path)
    records = known(config, path)
    console = Console(width=160)
    if isinstance(config, Layer):
        console.print(table(records))
        draw_layers(records, folder / f"{name}.png")
    else:
        title = "Over Flax plain (below 1: less); in brackets the numbers"
        console.print(charts.table(title, records, "target", MEASURES))
        draw_steps(records, folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["layer", *given]
    config = tyro.cli(Command, args=given, description=__doc__)
    sys.exit(study.start(main, SMOKE[type(config)], config))
