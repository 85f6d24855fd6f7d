"""Batch, layer, group and weight normalization, whitening, and none: steps and time.

    python -m experiments.normalizers --tune         # the learning rates
    python -m experiments.normalizers
    python -m experiments.normalizers --data digits

Time: 16 minutes with --tune, then 10 for the comparison, which uses the trainings of
--tune again, for two processes with a CPU core each (`--part`, see `common/study.py`);
with --smoke some seconds.

Expected, at batches of 128: counted in steps, batch normalization and whitening need
the fewest. On ImageNet with ResNet-50 (Wu & He 2018) group, layer and weight norm have
0.5, 1.7 and 4.6 points more error than batch norm; no normalization should be last.
Counted in time, whitening loses what it gains.

Measured (CIFAR-10, 3 seeds, jax 0.10.2, two cores of an AMD EPYC). The columns: the
peak rate; the test error in %; its difference to batch norm's in points, seed by seed,
with 95 % intervals; the time of a step over batch norm's; and the number of steps until
the test error first reaches 44.2 %, the final error without normalization on the images
of the curves:

    method                 rate   test error   difference    time   steps
    batch norm             0.3    33.7 ± 0.3                 1.00     450
    whitening (eigh)       1      30.8 ± 0.2   -2.9 ± 0.7    1.34     600
    whitening (Newton)     1      30.7 ± 0.6   -3.0 ± 1.0    1.41     400
    layer norm             0.1    42.2 ± 0.2   +8.5 ± 0.6    1.02     800
    group norm             0.1    42.9 ± 0.4   +9.2 ± 0.9    1.12     750
    none                   0.1    45.1 ± 2.3  +11.4 ± 6.3    0.88     950
    weight norm            0.1    45.4 ± 2.2  +11.7 ± 6.0    0.90       -

The order is the expected one, with much larger differences: the network is narrow and
is trained for 1,000 steps. Weight norm and no normalization cannot be told apart.
Whitening ends three points below batch norm, at the largest rate of the grid; its time
per step is 1.34 to 1.41 times as long, and for most of the training batch norm has the
lower error after the same time. At rate 1 all train but weight norm and none; group and
layer norm are better at 0.1.

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
cosine. The peak rate of each method is the one of `RATES`: with --tune, each method is
trained at all rates of one grid, from one seed, and the rate with the lowest error on
held-out images is its best. A seed gives all methods the same batches; differences to
batch norm are taken seed by seed, with 95 % confidence intervals.

The curves of the test error use at most 1,000 test images; the final test error uses
all. The time of a step is the median of many steps, without compilation; all methods
are timed in one process, in turns. The picture multiplies this time by the number of
steps.

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
from experiments.common.intervals import Interval, interval
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
STEPS = {"digits": 300, "cifar10": 1_000}
RATES: dict[str, dict[Method, float]] = {
    "digits": {
        "batch": 1.0,
        "whitening_eigh": 1.0,
        "whitening_newton": 1.0,
        "group": 0.3,
        "layer": 0.3,
        "weight": 0.3,
        "none": 0.3,
    },
    "cifar10": {
        "batch": 0.3,
        "whitening_eigh": 1.0,
        "whitening_newton": 1.0,
        "group": 0.1,
        "layer": 0.1,
        "weight": 0.1,
        "none": 0.1,
    },
}
"""The peak learning rate of each method, chosen by --tune."""
TRAINS = 0.8  # a network trains if its error is lower; chance is 0.9
WHITENING_GROUP_SIZE = {"digits": 16, "cifar10": 12}  # channels
BATCH_SIZE = 128
CURVE_IMAGES = 1_000  # the number of test images for a point of a curve


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["cifar10", "digits"] = "cifar10"
    """The images. CIFAR-10 is downloaded once; the digits come with scikit-learn."""
    methods: tuple[Method, ...] = get_args(Method)
    """The methods to compare; whitening_eigh is DBN, whitening_newton is IterNorm."""
    tune: bool = False
    """Only compare peak learning rates, by the error on held-out images."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Peak learning rates that --tune tries, the same for all methods."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds of the initial weights and batches; --tune uses the first."""
    steps: int | None = None
    """Number of training steps. None: 1,000 for CIFAR-10, 300 for the digits."""
    points: int = 20
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
    """Every training of a run, after the timing; --tune has no timing.

    The trainings of two methods alternate, so that of two processes that share them
    (--part 1 2 and --part 2 2) each compiles one of the two.
    """
    steps = config.steps or STEPS[config.data]
    seeds = config.seeds[:1] if config.tune else config.seeds
    tried = config.rates if config.tune else (None,)
    listed: list[Cell | Timing] = []
    if not config.tune:
        listed.append(Timing(config.data, config.methods, config.seconds))
    for first in range(0, len(config.methods), 2):
        pair = config.methods[first : first + 2]
        for seed, rate, method in itertools.product(seeds, tried, pair):
            rate = rate or RATES[config.data][method]
            cell = Cell(config.data, method, rate, seed, steps, config.points)
            listed.append(cell)
    return listed


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
    """`summary`; with --tune, the errors on held-out images and `tuned`."""
    trainings = by_rate(results)
    if not config.tune:
        return [summary(findings(config, results), trainings, step_seconds(results))]

    def error(method: str, rate: float) -> str:
        return percent(1 - trainings.of(method, rate, "validation"))

    title = "held-out error (%) at rate"
    return [
        trainings.table(title, config.rates, error, label_of),
        tuned(trainings),
    ]


def tuned(trainings: ByRate) -> Table:
    """The best rate of each method, and the largest one at which it trains."""
    title = f"largest rate with an error below {TRAINS:.0%}"
    table = Table("method", "best rate", title, box=box.MARKDOWN)
    for method in trainings.names():
        best, largest = trainings.best(method), largest_rate(trainings, method)
        table.add_row(label_of(method), f"{best:g}", f"{largest:g}")
    return table


def largest_rate(trainings: ByRate, method: str) -> float:
    """The largest rate at which a method trains, by held-out images; NaN for none."""
    return max(
        (
            rate
            for rate in trainings.rates(method)
            if 1 - trainings.of(method, rate, "validation").mean() < TRAINS
        ),
        default=np.nan,
    )


class Finding(NamedTuple):
    """What is known of one method.

    Attributes:
        rate: its peak learning rate.
        errors: (seed,), the final test errors in percent.
        difference: of these errors to those of batch norm, in points, seed by seed;
            None for batch norm itself, and if it was not trained.
        relative_time: the time of a step over that of batch norm; NaN if not timed.
    """

    rate: float
    errors: np.ndarray
    difference: Interval | None
    relative_time: float


def findings(config: Config, results: dict[Any, Record]) -> dict[str, Finding]:
    """What is known of each method, by its name."""
    errors: dict[Method, dict[int, float]] = {}
    for cell, result in results.items():
        if isinstance(cell, Cell):
            by_seed = errors.setdefault(cell.method, {})
            by_seed[cell.seed] = 100 * (1 - result["final"])
    seconds = step_seconds(results)

    def finding(method: Method) -> Finding:
        mine, batch = errors[method], errors.get("batch", {})
        differences = [mine[seed] - batch[seed] for seed in mine if seed in batch]
        compared = method != "batch" and len(differences) > 0
        return Finding(
            RATES[config.data][method],
            np.array(list(mine.values())),
            interval(np.array(differences)) if compared else None,
            seconds.get(method, np.nan) / seconds.get("batch", np.nan),
        )

    return {method: finding(method) for method in errors}


def label_of(method: str) -> str:
    """The name of a method in tables and in the picture."""
    label, _ = LABELS_AND_COLOURS[method]
    return label


def summary(
    found: dict[str, Finding], trainings: ByRate, seconds: dict[str, float]
) -> Table:
    """What was found of each method, and its steps and time to the goal.

    The goal is the accuracy of the network without normalization at the end.
    """
    curves = {
        method: trainings.of(method, finding.rate, "test").mean(0)
        for method, finding in found.items()
    }
    goal = curves["none"][-1] if "none" in curves else np.nan
    table = Table(
        "method",
        "rate",
        "test error (%)",
        "minus batch norm's",
        "ms per step",
        "relative to batch norm",
        f"steps to {100 * (1 - goal):.1f} %",
        "seconds",
        box=box.MARKDOWN,
    )
    table.columns[0].no_wrap = True
    for method, finding in found.items():
        steps = trainings.of(method, finding.rate, "steps")[0]
        reached = steps[curves[method] >= goal]
        first_step = reached[0] if len(reached) else np.inf
        step_time = seconds.get(method, np.nan)
        table.add_row(
            label_of(method),
            f"{finding.rate:g}",
            percent(finding.errors / 100),
            str(finding.difference or ""),
            f"{1e3 * step_time:.1f}",
            f"{finding.relative_time:.2f}",
            f"{first_step:g}",
            f"{first_step * step_time:.1f}",
        )
    return table


def draw(config: Config, results: dict[Any, Record], folder: Path) -> list[Path]:
    """Errors against steps and against time, each method at its best rate."""
    if config.tune:
        return []
    trainings = by_rate(results)
    seconds = step_seconds(results)
    count = max(map(len, trainings.records.values()))
    title = (
        f"{panels.DATA[config.data]}, {len(convnet.TASKS[config.data].widths)} "
        "convolutions; each method at its best learning rate; "
        f"mean and range of {count} seed{'s' * (count > 1)}"
    )
    figure, (left, right) = panels.make(title, (9.6, 4.0), 1, 2)
    lowest, highest = 100.0, 0.0
    for method in trainings.names():
        (rate,) = trainings.rates(method)
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
    "seeds": (0,),
    "steps": 20,
    "points": 2,
    "seconds": 0.1,
}
STUDY = Study("normalizers", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
