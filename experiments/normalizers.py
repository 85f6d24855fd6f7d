"""Batch, layer, group and weight normalization, whitening, and none: steps and time.

    python -m experiments.normalizers
    python -m experiments.normalizers --data cifar10

Time: four minutes on two busy CPU cores (CIFAR-10 was not run in full); with --smoke
some seconds.

Expected: by steps, batch normalization and whitening first, at batches of 128; group
and layer normalization behind (0.5 and 1.7 points in the error of ResNet-50 on
ImageNet), weight normalization further (4.6), none last. By time, whitening loses what
it gains.

Measured (digits, 3 seeds, jax 0.10.2, two cores of an AMD EPYC, busy with other work
too; steps and seconds, without compilation, until the test error is the 7.0 % that the
network without any ends with):

    method                   rate   test error (%)   ms per step   steps   seconds
    batch norm               1      5.7 ± 0.3        3.4            80     0.3
    whitening, eigenvalues   1      6.1 ± 0.8        4.0           280     1.1
    whitening, Newton        0.1    5.8 ± 0.4        4.5            60     0.3
    group norm               0.3    5.8 ± 1.2        3.6            60     0.2
    layer norm               0.3    5.9 ± 0.8        3.5            60     0.2
    weight norm              0.3    6.4 ± 0.5        3.1           100     0.3
    none                     0.3    7.0 ± 0.7        2.9           180     0.5

Every normalization ends below none, but among themselves they differ by less than their
spread, and 300 held-out images choose the rate poorly: three convolutions on 8x8 pixels
are too easy a task for the order that was expected. What is clear is which rates they
bear: at 1 batch normalization (5.7), whitening (6.1, 5.3) and group normalization (6.7)
still train, while layer (37) and weight normalization (68) fail from some seeds, and
none (92) from all. A step with whitening takes 1.2 to 1.35 times as long as with batch
normalization, without any 0.86 times. CIFAR-10 was not measured in full.

The network: that of `small_batch`, convolutions of 3x3 that are normalized and
rectified, then the mean over positions and a matrix. Layer, group and weight
normalization are Flax's. Layer normalization: over height, width and channels, with a
scale per channel; groups: four. Weights are drawn by He's rule; weight normalization
begins with the length that they have, not by the data as in its paper. Whitening is of
groups of adjacent channels, 16 on the digits, 12 on CIFAR-10: by eigenvalues (DBN), or
five steps of Newton's iteration (IterNorm). A bias stands where no normalization brings
one: with none and with weight normalization.

Gradient descent with Nesterov momentum 0.9, batches of 128, a rate that rises for a
tenth of the steps and then falls as a cosine. Its height is, for each method, that of a
common grid with the highest accuracy on held-out images. The time of a step is the
median over turns that all methods take in one process, compilation left out; in the
picture it is multiplied by the number of steps.

To change the data or the sizes of the network, see `convnet.TASKS`; a normalization,
`normalize`; the optimizer, `train_step`; the schedule, `run`. A run that was stopped
goes on where it was: what is in the file is not trained again.

References: Ba et al. 2016 (layer); Wu & He 2018 (group); Salimans & Kingma 2016
(weight); Huang et al. 2018 and 2019 (whitening).
"""

import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike
from rich import box
from rich.table import Table

import bnjax
from experiments.common import convnet, panels, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.rates import ByRate, percent
from experiments.common.results import Record
from experiments.common.study import Study, Trained

Method = Literal["batch", "whitening", "iternorm", "group", "layer", "weight", "none"]
SHOWN = {
    "batch": ("batch norm", "#0072b2"),
    "whitening": ("whitening, eigenvalues", "#6a3d9a"),
    "iternorm": ("whitening, Newton", "#cc79a7"),
    "group": ("group norm", "#009e73"),
    "layer": ("layer norm", "#56b4e9"),
    "weight": ("weight norm", "#e69f00"),
    "none": ("none", "#d55e00"),
}
"""The name and the colour of each method."""
STEPS = {"digits": 300, "cifar10": 350}
SEEDS = {"digits": (0, 1, 2), "cifar10": (0,)}
WHITENED = {"digits": 16, "cifar10": 12}  # channels at once
BATCH = 128
SEEN = 1_000  # of the test images, for the points of a curve


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    methods: tuple[Method, ...] = get_args(Method)
    """What is compared."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates, the same for all methods."""
    seeds: tuple[int, ...] | None = None
    """Each gives the weights and the batches of one run; None: as suits the data."""
    steps: int | None = None
    """Training steps; None: as suits the data."""
    points: int = 15
    """Of each curve."""
    seconds: float = 30.0
    """Of timing steps, for all methods together."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    method: Method
    rate: float
    seed: int
    steps: int
    points: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """The steps of these methods, timed in turns."""

    data: str
    timed: tuple[Method, ...]
    seconds: float


def cells(config: Config) -> list[Cell | Timing]:
    """The timing, then every training of a run, those of one method side by side."""
    steps = config.steps or STEPS[config.data]
    seeds = config.seeds or SEEDS[config.data]
    every = itertools.product(config.methods, config.rates, seeds)
    found = [Cell(config.data, *which, steps, config.points) for which in every]
    return [Timing(config.data, config.methods, config.seconds), *found]


# Model


@functools.cache  # of the same model, a step is compiled once
def make_model(data: str, method: Method) -> convnet.ConvNet:
    """The network with one of the methods; with a bias if nothing else has one."""
    biased: Any = functools.partial(nn.Conv, kernel_init=nn.initializers.he_normal())
    conv = functools.partial(biased, use_bias=False)
    if method == "none":
        conv = biased
    elif method == "weight":

        def conv(width: int, size: tuple[int, ...], *, strides: int) -> nn.Module:
            # The length that He's kernels have on average.
            length = nn.initializers.constant(2**0.5)
            layer = biased(width, size, strides=strides)
            return nn.WeightNorm(layer, scale_init=length)

    layer = functools.partial(normalize, method, WHITENED[data])
    return convnet.ConvNet(convnet.TASKS[data], layer, conv)


def normalize(
    method: Method, channels: int, x: jax.Array, train: bool, step: ArrayLike
) -> jax.Array:
    """Adds the layer of a method to the network that calls it.

    Args:
        method: its name.
        channels: how many are whitened together.
        x: what is normalized.
        train: whether by the batch.
        step: not used.
    """
    running: Any = {"use_running_average": not train, "momentum": 0.9}
    whiten: Any = functools.partial(
        bnjax.linen.DecorrelatedBatchNorm, **running, group_size=channels
    )
    match method:
        case "batch":
            return bnjax.BatchNorm(**running)(x)
        case "whitening":
            return whiten(method="eigh")(x)
        case "iternorm":
            return whiten(method="newton_schulz")(x)
        case "group":
            return nn.GroupNorm(num_groups=4)(x)
        case "layer":
            # Over height, width and channels, with a scale per channel: Wu & He 2018.
            return nn.LayerNorm(reduction_axes=(1, 2, 3))(x)
        case "weight" | "none":
            return x


# Training


class State(NamedTuple):
    """Of a network in training; `variables` are what the model is applied with."""

    variables: dict[str, Any]
    momentum: optax.OptState


MOMENTUM = optax.trace(0.9, nesterov=True)


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, seed: int, images: jax.Array) -> State:
    """The state before training."""
    weights, _ = jax.random.split(jax.random.key(seed))
    variables: Any = model.init(weights, images, train=False)
    return State(variables, MOMENTUM.init(variables["params"]))


@functools.partial(jax.jit, static_argnums=0)
def train_step(
    model: nn.Module, state: State, images: jax.Array, labels: jax.Array, rate: float
) -> State:
    """The state after a step of gradient descent."""

    def loss(params):
        variables = {**state.variables, "params": params}
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    params = state.variables["params"]
    gradient, updates = jax.grad(loss, has_aux=True)(params)
    direction, momentum = MOMENTUM.update(gradient, state.momentum)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return State({**state.variables, **updates, "params": params}, momentum)


def train(config: Config, cells: Sequence[Cell | Timing]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = convnet.load(config.data, config.data_dir)
    for cell in cells:
        if isinstance(cell, Timing):
            result = {"seconds": time_steps(cell, data.train)}
            yield Trained(cell, result, "the time of a step")
        else:
            result = run(cell, data)
            shown = f"{cell.method} {cell.rate:g}: {result['final']:.1%}"
            yield Trained(cell, result, shown)


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network; its accuracies."""
    model = make_model(cell.data, cell.method)
    images, labels = data.train
    batches = draw_batches(cell.seed, len(labels), cell.steps, BATCH)
    schedule = optax.warmup_cosine_decay_schedule(
        0, cell.rate, cell.steps // 10, cell.steps
    )
    rates = np.asarray(jax.vmap(schedule)(np.arange(cell.steps)))
    measured = np.linspace(0, cell.steps, cell.points + 1).round()[1:].astype(int)
    seen = Split(*(values[:SEEN] for values in data.test))
    state, curve = init(model, cell.seed, images[:2]), []
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        state = train_step(model, state, images[batch], labels[batch], rate)
        if step in measured:
            curve.append(round(convnet.accuracy(model, state.variables, seen), 4))
    return {
        "steps": measured,
        "test": curve,
        "validation": convnet.accuracy(model, state.variables, data.validation),
        "final": convnet.accuracy(model, state.variables, data.test),
    }


def time_steps(cell: Timing, data: Split) -> dict[str, float]:
    """The median seconds of a step of each method, on one batch; they take turns."""
    images, labels = (jax.device_put(values[:BATCH]) for values in data)

    def call(method: Method) -> Callable[[], State]:
        model = make_model(cell.data, method)
        state = init(model, 0, images[:2])
        step = functools.partial(
            train_step, model, state, images, labels, np.float32(0.1)
        )
        return lambda: jax.block_until_ready(step())

    calls = {method: call(method) for method in cell.timed}
    times: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(3):  # the first compiles
        for step in calls.values():
            step()
    end = time.perf_counter() + cell.seconds
    while time.perf_counter() < end or not all(times.values()):
        for method, step in calls.items():
            step()  # not timed: the caches and threads are then its own
            start = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - start)
    return {method: statistics.median(found) for method, found in times.items()}


# Tables and picture


def by_rate(found: dict[Any, Record]) -> ByRate:
    """The results of the trainings, by method and rate."""
    return ByRate.grouped(
        (c.method, c.rate, r) for c, r in found.items() if isinstance(c, Cell)
    )


def step_seconds(found: dict[Any, Record]) -> dict[str, float]:
    """Of a step of each method; none if they have not been timed."""
    timings = (r["seconds"] for c, r in found.items() if isinstance(c, Timing))
    return next(timings, {})


def report(config: Config, found: dict[Any, Record]) -> list[Table]:
    """Errors of all methods at all rates; and steps and time to one error."""
    known = by_rate(found)

    def error(method: str, rate: float) -> str:
        return percent(1 - known.of(method, rate, "final"))

    title = "test error (%) at rate"
    errors = known.table(title, config.rates, error, lambda m: SHOWN[m][0])
    return [errors, summary(known, step_seconds(found))]


def summary(known: ByRate, seconds: dict[str, float]) -> Table:
    """Each method at its best rate, and when it is as good as none is in the end."""
    curves = {m: known.of(m, known.best(m), "test").mean(0) for m in known.names()}
    goal = curves["none"][-1] if "none" in curves else np.nan
    table = Table(
        *("method", "rate", "test error (%)", "ms per step", "of batch norm's"),
        *(f"steps to {100 * (1 - goal):.1f} %", "seconds"),
        box=box.MARKDOWN,
    )
    for method, curve in curves.items():
        rate, step = known.best(method), seconds.get(method, np.nan)
        steps = known.of(method, rate, "steps")[0]
        reached = steps[curve >= goal].min(initial=np.inf)
        table.add_row(
            SHOWN[method][0],
            f"{rate:g}",
            percent(1 - known.of(method, rate, "final")),
            f"{1e3 * step:.1f}",
            f"{step / seconds.get('batch', np.nan):.2f}",
            f"{reached:g}",
            f"{reached * step:.1f}",
        )
    return table


def draw(config: Config, found: dict[Any, Record], folder: Path) -> list[Path]:
    """Errors against steps and against time, each method at its best rate."""
    known, seconds = by_rate(found), step_seconds(found)
    count = max(map(len, known.records.values()))
    title = (
        f"{panels.DATA[config.data]}, {len(convnet.TASKS[config.data].widths)} "
        "convolutions; each at its best learning rate; "
        f"mean of {count} seed{'s' * (count > 1)}"
    )
    figure, (left, right) = panels.make(title, (9.6, 4.0), 1, 2)
    lowest, highest = 100.0, 0.0
    for method in known.names():
        rate, (name, colour) = known.best(method), SHOWN[method]
        errors = 100 * (1 - known.of(method, rate, "test"))
        steps = known.of(method, rate, "steps")[0]
        style = {"color": colour, "marker": "o", "ms": 2.5}
        panels.line(left, steps, errors, label=f"{name} ({rate:g})", **style)
        panels.line(right, steps * seconds.get(method, np.nan), errors, **style)
        lowest = min(lowest, errors.mean(0).min())
        highest = max(highest, errors.mean(0).max())
    panels.label(left, "By steps", "training steps", "test error (%)", log="y")
    panels.label(right, "By time", "seconds of training", "test error (%)", log="y")
    for axes in (left, right):
        axes.set_ylim(0.9 * lowest, 1.1 * highest)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    path = folder / f"normalizers_{config.data}.png"
    panels.save(figure, path)
    return [path]


SMOKE = {
    "data": "digits",
    "methods": ("batch", "none"),
    "rates": (0.1,),
    "seeds": (0,),
    "steps": 20,
    "points": 2,
    "seconds": 0.1,
}
STUDY = Study("normalizers", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
