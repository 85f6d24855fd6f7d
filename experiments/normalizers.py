"""Batch, layer, group and weight normalization, whitening, and none: steps and time.

    python -m experiments.normalizers
    python -m experiments.normalizers --data cifar10

Time: four minutes on two busy CPU cores (CIFAR-10 was never run in full); with --smoke
some seconds.

Expected, at batches of 128: counted in steps, batch normalization and whitening need
the fewest. On ImageNet with ResNet-50 (Wu & He 2018) group, layer and weight norm have
0.5, 1.7 and 4.6 points more error than batch norm; no normalization should be last.
Counted in time, whitening loses what it gains.

Measured (digits, 3 seeds, jax 0.10.2, two cores of an AMD EPYC). The column "steps" is
the number of steps until the test error first reaches 7.0 %, the final error without
normalization, measured every 20 steps; "seconds" is the time of these steps without
compilation:

    method                 rate   test error (%)   ms per step   steps   seconds
    batch norm             1      6.1 ± 0.4        1.7           100     0.2
    whitening (eigh)       1      5.7 ± 1.0        2.3           280     0.6
    whitening (Newton)     1      5.7 ± 0.5        2.4           100     0.2
    group norm             0.3    5.8 ± 1.2        1.8            60     0.1
    layer norm             0.3    5.9 ± 0.8        1.7            60     0.1
    weight norm            0.3    6.4 ± 0.5        1.5           100     0.2
    none                   0.3    7.0 ± 0.7        1.5           180     0.3

The table does not rank the methods. The errors of the normalizations differ by 0.7
points or less, and the standard deviations over seeds reach 1.2 points. 300 validation
images are too few to choose the rate: they chose 0.3 for the network without
normalization (7.0 %), although 0.03 gives 5.8 %. At the rates with the lowest test
error the methods have errors between 5.0 and 5.8 %, which is no ranking either. The
task, 8x8 pixels, is too easy for three convolutions.

Which learning rates each method tolerates is clear. At rate 1 batch norm (error 6.1 %),
whitening (eigh and Newton, 5.7 %) and group norm (6.7 %) still train. Layer norm
(mean error 37 %) and weight norm (68 %) fail from some seeds. The network without
normalization (92 %) fails from all seeds.

A step with whitening takes 1.35 to 1.43 times as long as a step with batch norm. A step
without normalization takes 0.88 times as long.

The network is in `common/convnet.py`: convolutions of 3x3, each followed by a
normalization and a ReLU, then the mean over positions and a linear layer. The pixels of
the digits are rounded to 0 or 1. Layer, group and weight normalization are Flax's.
Layer normalization is over height, width and channels, with a scale per channel. Group
normalization has four groups. Initial weights are drawn by He's rule. Weight
normalization starts with the norm that these weights have, and does not set it from
data as its paper does. Whitening is of groups of adjacent channels, 16 on the digits
and 12 on CIFAR-10.

The optimizer is gradient descent with Nesterov momentum 0.9 and batches of 128. The
learning rate rises to its peak during the first tenth of the steps, then falls as a
cosine. The peak rate is chosen separately for each method, from one grid, by validation
accuracy. The curves of the test error use at most 1,000 test images; the final test
error uses all. The time of a step is the median of many steps, without compilation; all
methods are timed in one process, in turns. The picture multiplies this time by the
number of steps.

To change the data or the sizes of the network, see `convnet.TASKS`; a normalization,
`normalize`; the optimizer, `train_step`; the schedule, `run`. If a run was stopped,
repeat the command to continue. Results are cached by `Cell`: after changing the code
use a new --out.

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

Method = Literal[
    "batch",
    "whitening_eigh",
    "whitening_newton",
    "group",
    "layer",
    "weight",
    "none",
]
"""`whitening_eigh` is DBN (2018), `whitening_newton` is IterNorm (2019)."""
LABELS_AND_COLOURS = {
    "batch": ("batch norm", "#0072b2"),
    "whitening_eigh": ("whitening (eigh)", "#6a3d9a"),
    "whitening_newton": ("whitening (Newton)", "#cc79a7"),
    "group": ("group norm", "#009e73"),
    "layer": ("layer norm", "#56b4e9"),
    "weight": ("weight norm", "#e69f00"),
    "none": ("none", "#d55e00"),
}
STEPS = {"digits": 300, "cifar10": 350}
SEEDS = {"digits": (0, 1, 2), "cifar10": (0,)}
WHITENING_GROUP_SIZE = {"digits": 16, "cifar10": 12}  # channels
BATCH_SIZE = 128
CURVE_IMAGES = 1_000  # the number of test images for a point of a curve


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    methods: tuple[Method, ...] = get_args(Method)
    """The methods to compare; whitening_eigh is DBN, whitening_newton is IterNorm."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates to try, the same for all methods."""
    seeds: tuple[int, ...] | None = None
    """Random seeds of the initial weights and batches. None: 0 1 2, for CIFAR-10 0."""
    steps: int | None = None
    """Number of training steps. None: 300 for the digits, 350 for CIFAR-10."""
    points: int = 15
    """Points per curve."""
    seconds: float = 30.0
    """Seconds that timing the steps of all methods takes."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The settings of one training; also the key of its result."""

    data: str
    method: Method
    rate: float
    seed: int
    steps: int
    points: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """The settings of the timing of all methods; also the key of its result."""

    data: str
    methods: tuple[Method, ...]
    seconds: float


def cells(config: Config) -> list[Cell | Timing]:
    """The timing, then every training of a run, those of one method side by side."""
    steps = config.steps or STEPS[config.data]
    seeds = config.seeds or SEEDS[config.data]
    trainings = [
        Cell(config.data, method, rate, seed, steps, config.points)
        for method, rate, seed in itertools.product(config.methods, config.rates, seeds)
    ]
    return [Timing(config.data, config.methods, config.seconds), *trainings]


# Model


# Cached, since the model is a static argument of jitted functions. Partials compare by
# identity: jit would compile again for a second model of the same method.
@functools.cache
def make_model(data: str, method: Method) -> convnet.ConvNet:
    """The network with the layers of one method."""
    add_normalization = functools.partial(normalize, method, WHITENING_GROUP_SIZE[data])
    make_convolution = functools.partial(convolution, method)
    return convnet.ConvNet(convnet.TASKS[data], add_normalization, make_convolution)


def convolution(
    method: Method, channels: int, size: tuple[int, ...], *, strides: int
) -> nn.Module:
    """The convolution of a method; `convnet.ConvNet` gives the other arguments.

    Convolutions have a bias only where the normalization adds none.
    """
    conv: Any = functools.partial(
        nn.Conv, channels, size, strides, kernel_init=nn.initializers.he_normal()
    )
    match method:
        case "none":
            return conv()
        case "weight":
            # The norm that the kernels of an output channel have on average.
            initial_norm = nn.initializers.constant(2**0.5)
            return nn.WeightNorm(conv(), scale_init=initial_norm)
        case _:
            return conv(use_bias=False)


def normalize(
    method: Method, group_size: int, x: jax.Array, train: bool, step: ArrayLike
) -> jax.Array:
    """Adds the normalization layer of a method to the network that calls it.

    Args:
        method: the name of the method.
        group_size: the number of channels that are whitened together.
        x: the input of the layer.
        train: normalize by the batch's statistics, else by the running ones.
        step: part of ConvNet's interface, unused here.
    """
    running: Any = {"use_running_average": not train, "momentum": 0.9}
    whiten: Any = functools.partial(
        bnjax.linen.DecorrelatedBatchNorm, **running, group_size=group_size
    )
    match method:
        case "batch":
            return bnjax.BatchNorm(**running)(x)
        case "whitening_eigh":
            return whiten(method="eigh")(x)
        case "whitening_newton":
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
    """The state of a training; `variables` are the arguments of `model.apply`."""

    variables: dict[str, Any]
    momentum: optax.OptState


MOMENTUM = optax.trace(0.9, nesterov=True)


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, seed: int, images: jax.Array) -> State:
    """The state before training."""
    weights_key, _ = jax.random.split(jax.random.key(seed))
    variables: Any = model.init(weights_key, images, train=False)
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
            message = f"{cell.method} {cell.rate:g}: {result['final']:.1%}"
            yield Trained(cell, result, message)


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network; returns its accuracies.

    The curve "test" uses at most `CURVE_IMAGES` test images; "final" uses all.
    """
    model = make_model(cell.data, cell.method)
    images, labels = data.train
    batches = draw_batches(cell.seed, len(labels), cell.steps, BATCH_SIZE)
    schedule = optax.warmup_cosine_decay_schedule(
        0, cell.rate, cell.steps // 10, cell.steps
    )
    rates = np.asarray(jax.vmap(schedule)(np.arange(cell.steps)))
    curve_steps = np.linspace(0, cell.steps, cell.points + 1).round()[1:].astype(int)
    curve_images = Split(
        data.test.images[:CURVE_IMAGES], data.test.labels[:CURVE_IMAGES]
    )
    curve = []
    state = init(model, cell.seed, images[:2])
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        state = train_step(model, state, images[batch], labels[batch], rate)
        if step in curve_steps:
            accuracy = convnet.accuracy(model, state.variables, curve_images)
            curve.append(round(accuracy, 4))
    return {
        "steps": curve_steps,
        "test": curve,
        "validation": convnet.accuracy(model, state.variables, data.validation),
        "final": convnet.accuracy(model, state.variables, data.test),
    }


def time_steps(cell: Timing, data: Split) -> dict[str, float]:
    """The median seconds of a training step of each method, all on one batch."""
    images = jax.device_put(data.images[:BATCH_SIZE])
    labels = jax.device_put(data.labels[:BATCH_SIZE])

    def make_timed(method: Method) -> Callable[[], State]:
        model = make_model(cell.data, method)
        state = init(model, 0, images[:2])

        def run_step() -> State:
            after = train_step(model, state, images, labels, np.float32(0.1))
            return jax.block_until_ready(after)

        return run_step

    run_steps = {method: make_timed(method) for method in cell.methods}
    for run_step in run_steps.values():
        for _ in range(3):  # the first call compiles
            run_step()
    seconds: dict[str, list[float]] = {method: [] for method in run_steps}
    end = time.perf_counter() + cell.seconds
    while time.perf_counter() < end or not all(seconds.values()):
        for method, run_step in run_steps.items():
            # An untimed call first: the caches hold the data of the previous method.
            run_step()
            start = time.perf_counter()
            run_step()
            seconds[method].append(time.perf_counter() - start)
    return {method: statistics.median(values) for method, values in seconds.items()}


# Tables and picture


def by_rate(results: dict[Any, Record]) -> ByRate:
    """The results of the trainings, by method and rate."""
    return ByRate.grouped(
        (cell.method, cell.rate, result)
        for cell, result in results.items()
        if isinstance(cell, Cell)
    )


def step_seconds(results: dict[Any, Record]) -> dict[str, float]:
    """The seconds of a step of each method; empty if they were not timed."""
    for cell, result in results.items():
        if isinstance(cell, Timing):
            return result["seconds"]
    return {}


def report(config: Config, results: dict[Any, Record]) -> list[Table]:
    """The errors of all methods at all rates, then `summary`."""
    trainings = by_rate(results)

    def error(method: str, rate: float) -> str:
        return percent(1 - trainings.of(method, rate, "final"))

    title = "test error (%) at rate"
    errors = trainings.table(title, config.rates, error, label_of)
    return [errors, summary(trainings, step_seconds(results))]


def label_of(method: str) -> str:
    """The name of a method in tables and in the picture."""
    label, _ = LABELS_AND_COLOURS[method]
    return label


def summary(trainings: ByRate, seconds: dict[str, float]) -> Table:
    """Each method at its best rate: error, and the steps and time to the goal.

    The goal is the accuracy of the network without normalization at the end.
    """
    best_rates = {method: trainings.best(method) for method in trainings.names()}
    curves = {
        method: trainings.of(method, rate, "test").mean(0)
        for method, rate in best_rates.items()
    }
    goal = curves["none"][-1] if "none" in curves else np.nan
    table = Table(
        "method",
        "rate",
        "test error (%)",
        "ms per step",
        "relative to batch norm",
        f"steps to {100 * (1 - goal):.1f} %",
        "seconds",
        box=box.MARKDOWN,
    )
    for method, rate in best_rates.items():
        step_time = seconds.get(method, np.nan)
        first_step = np.inf  # the first step with accuracy >= goal
        steps = trainings.of(method, rate, "steps")[0]
        for step, accuracy in zip(steps, curves[method], strict=True):
            if accuracy >= goal:
                first_step = step
                break
        table.add_row(
            label_of(method),
            f"{rate:g}",
            percent(1 - trainings.of(method, rate, "final")),
            f"{1e3 * step_time:.1f}",
            f"{step_time / seconds.get('batch', np.nan):.2f}",
            f"{first_step:g}",
            f"{first_step * step_time:.1f}",
        )
    return table


def draw(config: Config, results: dict[Any, Record], folder: Path) -> list[Path]:
    """Errors against steps and against time, each method at its best rate."""
    trainings = by_rate(results)
    seconds = step_seconds(results)
    count = max(map(len, trainings.records.values()))
    title = (
        f"{panels.DATA[config.data]}, {len(convnet.TASKS[config.data].widths)} "
        "convolutions; each method at its best learning rate; "
        f"mean of {count} seed{'s' * (count > 1)}"
    )
    figure, (left, right) = panels.make(title, (9.6, 4.0), 1, 2)
    lowest, highest = 100.0, 0.0
    for method in trainings.names():
        rate = trainings.best(method)
        label, colour = LABELS_AND_COLOURS[method]
        errors = 100 * (1 - trainings.of(method, rate, "test"))
        steps = trainings.of(method, rate, "steps")[0]
        style = {"color": colour, "marker": "o", "ms": 2.5}
        panels.line(left, steps, errors, label=f"{label} ({rate:g})", **style)
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
