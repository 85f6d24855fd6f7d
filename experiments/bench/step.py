"""A training step of a ResNet: time and memory with our layers and with Flax's.

    python -m experiments.bench.step                    # six minutes on two cores
    python -m experiments.bench.step --batch-size 32    # two minutes
    python -m experiments.bench.step --smoke            # under ten seconds

Claim: forward, backward and update take no longer with `bnjax.BatchNorm` than with
`flax.linen.BatchNorm`, nothing else changed, and less memory; with `activation=` and
`residual=` less again; and less again with the blocks in
`nn.remat(policy=bnjax.remat_policy)`, which runs no convolution twice, as `nn.remat` of
a whole block does.

Control: Flax's layers in the same network, plain and with `nn.remat` of the blocks. All
start from the same parameters and must give the same loss before they are timed. The
calls take turns; a ratio is one of medians, over that of Flax plain: below 1 is faster.
Memory is what the compiler plans for temporary arrays, what the derivative stores
between the passes (parameters included), and what the device says it had in use at
most, where it says so. The data are random, of the sizes of CIFAR-10 (ResNet-18, 3x3
stem) or ImageNet (ResNet-50).

Measured: see docs/pages/performance.md. The network is `ResNet`; another layer is an
entry of `NORMS`.

References: He et al. 2016 (Deep residual learning), table 1; the stride of a bottleneck
is in its 3x3 convolution.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.typing import DTypeLike
from rich.console import Console

import bnjax
from experiments.bench import charts
from experiments.bench.charts import Measure
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results, study

MEASURES = {
    "time": Measure("time", "s", decimals=3),
    "planned": Measure("temporary", "MiB", 2**20),
    "stored": Measure("residuals", "MiB", 2**20),
    "used": Measure("most in use", "MiB", 2**20),
}
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # how far losses may differ
SMOKE = {"model": "tiny", "seconds": 0.1}


@dataclasses.dataclass(frozen=True)
class Config(study.Output):
    """What is measured; empty or 0 for what the device or the model decides."""

    model: Literal["", "resnet18", "resnet50", "tiny"] = ""
    """ResNet-18 on a CPU, else ResNet-50."""
    dtypes: tuple[str, ...] = ()
    """Of the computation: both, or bfloat16 for ResNet-50; parameters are float32."""
    batch_size: int = 0
    """Images per step: 128, or 256 for ResNet-50."""
    image_size: int = 0
    """Their side: 32, or 224 for ResNet-50."""
    seconds: float = 30.0
    """For each dtype, all variants together; at least five steps of each."""
    plan_only: bool = False
    """Compile for the memory's sake, and run nothing (ResNet-50 on a CPU)."""


# Network: the parameters and the result are the same, whichever its `Norm`


class Norm(NamedTuple):
    """How a network normalizes.

    Attributes:
        layer: `flax.linen.BatchNorm` or one that replaces it.
        fused: whether the layer is told the activation and the residual.
        remat: `nn.remat` with its options, or None: what is computed again backward.
        region: whether a block or a stage at a time.
    """

    layer: type[nn.Module]
    fused: bool = False
    remat: Callable[[Any], Any] | None = None
    region: Literal["block", "stage"] = "block"

    def __call__(self, x: jax.Array, activation=None, residual=None) -> jax.Array:
        """activation(normalized x + residual), in the dtype of `x`."""
        options: dict[str, Any] = {"use_running_average": False, "dtype": x.dtype}
        if self.fused:
            layer: Any = self.layer(**options, activation=activation)
            return layer(x, residual=residual)
        y = self.layer(**options)(x)
        y = y if residual is None else y + residual
        return y if activation is None else activation(y)


NORMS = {
    "flax": Norm(nn.BatchNorm),
    "flax remat": Norm(nn.BatchNorm, remat=nn.remat),
    "bnjax": Norm(bnjax.BatchNorm),
    "bnjax fused": Norm(bnjax.BatchNorm, fused=True),
    "bnjax remat": Norm(
        bnjax.BatchNorm,
        fused=True,
        remat=partial(nn.remat, policy=bnjax.remat_policy),
        region="stage",
    ),
}


def convolution(
    x: jax.Array, features: int, kernel: int, strides: int = 1
) -> jax.Array:
    layer = nn.Conv(
        features,
        (kernel, kernel),
        strides,
        use_bias=False,
        dtype=x.dtype,
        kernel_init=nn.initializers.he_normal(),
    )
    return layer(x)


class Block(nn.Module):
    """Two convolutions of 3x3, or a bottleneck: 1x1, 3x3, 1x1 to four times as many."""

    features: int
    strides: int
    norm: Norm
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, out = x, self.features
        if self.bottleneck:
            y, out = self.norm(convolution(x, out, 1), nn.relu), 4 * out
        y = self.norm(convolution(y, self.features, 3, self.strides), nn.relu)
        y = convolution(y, out, 1 if self.bottleneck else 3)
        if x.shape != y.shape:
            x = self.norm(convolution(x, out, 1, self.strides))
        return self.norm(y, nn.relu, x)


class ResNet(nn.Module):
    """A stem, stages of blocks of doubling width, the mean over space, a matrix.

    Attributes:
        stages: blocks in each.
        bottleneck: the kind of the blocks.
        norm: how it normalizes.
        dtype: of the computation; parameters are float32.
        small: whether images are small, as CIFAR's: the stem is a 3x3 convolution.
        width: features of the first stage.
        classes: the number of logits.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    norm: Norm
    dtype: DTypeLike = jnp.float32
    small: bool = False
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, float32, of images (batch, height, width, channels)."""
        x = x.astype(self.dtype)
        kernel, strides = (3, 1) if self.small else (7, 2)
        x = self.norm(convolution(x, self.width, kernel, strides), nn.relu)
        if not self.small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage in range(len(self.stages)):
            x = self._recomputed("stage", ResNet._stage, stage)(self, x)
        x = x.mean((1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes)(x)

    @nn.nowrap
    def _stage(self, x: jax.Array, stage: int) -> jax.Array:
        for index in range(self.stages[stage]):
            x = self._recomputed("block", ResNet._block, stage, index)(self, x)
        return x

    @nn.nowrap
    def _block(self, x: jax.Array, stage: int, index: int) -> jax.Array:
        features, strides = self.width * 2**stage, 2 if stage and not index else 1
        name = f"stage{stage}_block{index}"
        return Block(features, strides, self.norm, self.bottleneck, name=name)(x)

    @nn.nowrap
    def _recomputed(self, region: str, part: Callable[..., jax.Array], *which: int):
        """A part of the network, computed again backward if it is to be."""

        def run(network: ResNet, x: jax.Array) -> jax.Array:
            return part(network, x, *which)

        remat = self.norm.remat if self.norm.region == region else None
        return run if remat is None else remat(run)


RESNET18 = partial(ResNet, (2, 2, 2, 2), False, small=True, classes=10)
RESNET50 = partial(ResNet, (3, 4, 6, 3), True)
TINY = partial(ResNet, (1,), False, small=True, width=8)
NETWORKS = {"resnet18": RESNET18, "resnet50": RESNET50, "tiny": TINY}
DEFAULTS = {  # unless the options say otherwise
    "resnet18": {
        "batch_size": 128,
        "image_size": 32,
        "dtypes": ("bfloat16", "float32"),
    },
    "resnet50": {"batch_size": 256, "image_size": 224, "dtypes": ("bfloat16",)},
    "tiny": {"batch_size": 4, "image_size": 8, "dtypes": ("float32",)},
}


# Training step


def loss_of(model: nn.Module, params: Any, stats: Any, images, labels):
    """The loss and the next batch_stats."""
    variables = {"params": params, "batch_stats": stats}
    logits, updates = model.apply(variables, images, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates["batch_stats"]


def training_step(model: nn.Module, optimizer: optax.GradientTransformation):
    """(variables, optimizer state, images, labels) to the loss, and the next two."""
    gradient = jax.value_and_grad(partial(loss_of, model), has_aux=True)

    def step(variables: Any, state: optax.OptState, images, labels):
        params, stats = variables["params"], variables["batch_stats"]
        (loss, stats), grads = gradient(params, stats, images, labels)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return loss, {"params": params, "batch_stats": stats}, state

    return step


def stored(model: nn.Module, variables: Any, images, labels) -> int:
    """Bytes that the derivative keeps between the forward and the backward pass.

    Parameters included, which are needed anyway. Nothing is computed.
    """

    def residuals(variables, images, labels):  # the leaves of a vjp are what it needs
        def of_params(params: Any):
            return loss_of(model, params, variables["batch_stats"], images, labels)[0]

        return jax.vjp(of_params, variables["params"])[1]

    kept = jax.eval_shape(residuals, variables, images, labels)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


# Measurement


class Step(NamedTuple):
    """A compiled step, and the bytes that are planned and stored."""

    run: Callable[[], tuple[jax.Array, Any, optax.OptState]]
    planned: int
    stored: int


def prepare(config: Config, dtype: str) -> dict[str, Step]:
    """The steps of all variants, from the same parameters and images."""
    build = partial(NETWORKS[config.model], dtype=dtype)
    size = config.batch_size, config.image_size, config.image_size, 3
    images = jax.random.normal(jax.random.key(1), size, dtype)
    init = jax.jit(build(norm=NORMS["flax"]).init)
    variables = init(jax.random.key(0), images[:2])
    data = images, jnp.arange(len(images)) % 10
    optimizer = optax.sgd(0.1, momentum=0.9)
    arguments = variables, optimizer.init(variables["params"]), *data
    steps = {}
    for name, norm in NORMS.items():
        model = build(norm=norm)
        step = jax.jit(training_step(model, optimizer)).lower(*arguments).compile()
        memory: Any = step.memory_analysis()
        planned = memory.temp_size_in_bytes
        kept = stored(model, variables, *data)
        steps[name] = Step(partial(step, *arguments), planned, kept)
    return steps


def measure(steps: dict[str, Step], seconds: float) -> dict[str, dict[str, Any]]:
    """The loss, the device's memory and the median seconds of each variant.

    The least hungry is the first to run, because the device's maximum only rises.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in steps}
    for name in sorted(steps, key=lambda name: steps[name].planned):
        found[name]["loss"] = float(steps[name].run()[0])
        memory = jax.devices()[0].memory_stats() or {}
        found[name]["used"] = memory.get("peak_bytes_in_use")
    medians = interleaved({name: step.run for name, step in steps.items()}, seconds)
    for name, median in medians.items():
        found[name]["time"] = median
    return found


def check(found: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Raises where two variants differ in the loss: they compute something else."""
    losses = {name: numbers["loss"] for name, numbers in found.items()}
    if losses and not max(losses.values()) - min(losses.values()) <= tolerance:
        raise RuntimeError(f"the losses differ by more than {tolerance}: {losses}")


def run(config: Config, path: Path) -> None:
    """Appends one record per dtype and variant."""
    on_cpu = jax.default_backend() == "cpu"
    model = config.model or ("resnet18" if on_cpu else "resnet50")
    options = {name: getattr(config, name) or v for name, v in DEFAULTS[model].items()}
    config = dataclasses.replace(config, model=model, **options)
    with results.Log(path) as log:
        settings = results.settings_of(config)
        log.add("start", bench="step", settings=settings, **results.stamp())
        for dtype in config.dtypes:
            steps = prepare(config, dtype)
            found = {} if config.plan_only else measure(steps, config.seconds)
            for name, step in steps.items():
                memory = {"planned": step.planned, "stored": step.stored}
                fields = memory | found.get(name, {})
                log.add("variant", dtype=dtype, variant=name, **fields)
            check(found, AGREE[dtype])


# Table and picture


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """A panel for each dtype: time and memory over those of Flax plain."""
    settings = start["settings"]
    side = settings["image_size"]
    title = (
        f"A training step of {settings['model']}, {settings['batch_size']} images of "
        f"{side} x {side}: over Flax plain\n{charts.machine(start)}"
    )
    known = {key: m for key, m in MEASURES.items() if records[0].get(key) is not None}
    figure, panels = charts.panels(title, len(settings["dtypes"]))
    for axes, dtype in zip(panels, settings["dtypes"], strict=True):
        some = [r for r in records if r["dtype"] == dtype]
        charts.bars_over_flax(axes, some, "dtype", known)
        axes.set_title(dtype, fontsize=9)
    charts.save(figure, path, panels[:1])


def main(config: Config) -> int:
    """Measures, records, prints the table and draws the picture."""
    start, records, picture = charts.measured("bench_step", config, run)
    title = "Over Flax plain (below 1: faster, smaller); in brackets medians and sizes"
    Console(width=120).print(charts.table(title, records, "dtype", MEASURES))
    draw(start, records, picture)
    return 0


if __name__ == "__main__":
    keep_memory("experiments.bench.step")
    sys.exit(study.start(main, SMOKE, tyro.cli(Config, description=__doc__)))
