"""Small and non-iid batches: where batch normalization fails, and what helps.

    python -m experiments.small_batch
    python -m experiments.small_batch --data cifar10 --seeds 0

Time: ten minutes on two CPU cores (twice that on a busy machine), CIFAR-10 about half
an hour; with --smoke some seconds.

Expected: of the same 128 images per step, normalized in groups of 2 to 128 (as devices
would each by itself), the smaller the groups, the larger the error; larger still if the
groups are not iid, one class to each. Batch renormalization and population statistics
get most of it back; to cross-replica statistics, group and layer normalization it is
nothing.

Measured (digits, 3 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %):

    images per group      iid:      2    8   32  128   by class:    2    8   32
    BN, running average          34.0  4.8  5.6  5.9             66.2 18.2 11.0
    BN, pooled                   34.2  4.8  5.7  5.7             67.6 17.3 11.0
    BN, by the test group        58.2  7.6  6.3  5.7             89.5 44.2  6.2
    ghost BN                     32.8  4.7  5.5  5.9             65.0 17.3 10.9
    BN, frozen at the end        29.3  4.5  5.6  5.5             38.1  6.9  6.8
    batch renorm                 16.0  5.2  5.4  6.0             32.9 12.2  7.2
    decorrelated BN               6.7  4.3  4.0  4.8             20.4 18.5 12.2
    cross-replica BN              5.9  5.9  5.9  5.9              5.9  5.9  5.9
    group norm                    6.2  6.2  6.2  6.2              6.2  6.2  6.2
    layer norm                    5.9  5.9  5.9  5.9              5.9  5.9  5.9

(standard deviations up to 3, in groups of 2 up to 5). BN fails as expected: in
groups of 2, and, if a group is of one class or few, at every size. The running average
is not to blame, contrary to what was expected: pooled statistics are as bad, be they of
mixed batches or of groups as in training. What a network learns by the statistics of
such groups is of little use with any others. What helps is to train with what will be
evaluated by: cross-replica statistics; or to freeze the statistics for the last fifth
of the steps, which costs nothing and takes 18.2 to 6.9. Renorm takes back 49 to 76 % of
what these groups cost over 5.9, but is worse than BN in groups of 4 of one class (27.3
against 22.5), perhaps because its gradient still loses the mean of the group. No
limits, an average of momentum 0.99, or a third of the rate hardly changed that (one
seed, groups of 2 and 8). Ghost batches are BN's training, and have its errors.
Whitening channels by fours withstands groups of 2 if they are iid. Statistics of the
test group are the worst until it has 16 images.

CIFAR-10 (1 seed):

    images per group      iid:      2    8   32  128   by class:    2    8   32
    BN, running average          42.8 36.1 34.2 33.0             78.8 73.8 58.8
    BN, pooled                   42.4 36.2 34.1 33.1             81.1 77.4 56.5
    BN, by the test group        47.8 40.2 35.7 33.6             40.2 33.9 26.0
    ghost BN                     43.1 36.3 34.1 33.0             77.2 73.4 60.3
    BN, frozen at the end        40.8 35.9 34.1 33.2             50.2 49.7 41.2
    batch renorm                 42.0 38.2 34.9 34.9             71.7 71.4 46.0
    decorrelated BN              43.6 34.4 33.3 33.1             78.7 70.7 56.5
    cross-replica BN             33.8 34.1 34.0 34.0             33.3 33.6 34.4
    group norm                   44.4 44.4 44.4 44.4             44.4 44.4 44.4
    layer norm                   44.9 44.9 44.9 44.9             44.9 44.9 44.9

The same order, with less taken back: renorm helps groups of 16 and more of few classes,
and costs two points where they are iid. Statistics of the test group look good by class
because the group is of the class that is asked for. The network is too narrow for group
and layer normalization to compete; they are flat, as they must be.

The network: convolutions of 3x3, normalized and rectified, then the mean over positions
and a matrix; on the digits three, the last of which has one position per image: a group
of 2 is two values. By class: each batch of 128, drawn at random, is sorted by label and
cut into groups. "By the test group": of test images in groups of that size, put
together in the same way, by label. Pooled: with the weights frozen, up to 4,096
training images pass by the statistics of mixed batches of 128; "as trained": of groups
of the size and the order of training. Gradient descent with momentum 0.9, a rate that
rises for a tenth of the steps and then falls as a cosine; its height is that with the
least error on held-out images (`--tune`), for all methods with statistics of a batch
the one of BN in 128.

To change the data or the sizes of the network, see `convnet.TASKS`; a normalization,
`normalize`; the optimizer or schedule, `Network`. A run that was stopped goes on where
it was: what is in the file is not trained again.

References: Ioffe 2017 (renorm); Wu & He 2018, figure 1; Wu & Johnson 2021, sections
3, 4, 6; Hoffer et al. 2017 (ghost batches); Huang et al. 2018 and 2019 (whitening).
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

import bnjax
from bnjax.training import TrainState
from experiments.common import convnet, panels, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.rates import ByRate, percent
from experiments.common.study import Study, Trained

Method = Literal[
    "batch_norm",
    "ghost",
    "frozen",
    "renorm",
    "decorrelated",
    "cross_replica",
    "group_norm",
    "layer_norm",
]
Order = Literal["mixed", "by class"]
Errors = dict[str, float]
"""The share of wrong answers, by the statistics that a network is evaluated with.

running: the running statistics, or none.  pooled: pooled over mixed batches of the size
of a whole batch.  pooled_groups: over groups as in training.  batch: those of each test
group, which are put together as in training.
"""

METHODS: tuple[Method, ...] = get_args(Method)
PER_IMAGE: tuple[Method, ...] = ("group_norm", "layer_norm")
"""Methods for which it does not matter how a batch is split."""
ORDERS: dict[Order, str] = {
    "mixed": "groups drawn at random (iid)",
    "by class": "groups of one class, or few (not iid)",
}
WHOLE: tuple[Method, ...] = ("ghost", *PER_IMAGE)
"""Methods that are called on a whole batch, not on each of its groups."""
AXIS = "devices"
ESTIMATED = 4_096  # images at most, for population statistics
STEPS = {"digits": 300, "cifar10": 1_000}
RATES = {
    "digits": {"group_norm": 0.3, "layer_norm": 0.3},
    "cifar10": {"group_norm": 0.1, "layer_norm": 0.3},
}
"""Chosen by --tune; methods with statistics of a batch share BATCH_RATE."""
BATCH_RATE = 0.1
PERCENTS = (1, 2, 3, 5, 10, 20, 30, 50, 100)  # along the axis of errors
TRIED = (0.03, 0.1, 0.3, 1.0)  # by --tune


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 128)
    """Of the groups that a batch is normalized in."""
    batch_size: int = 128
    """Images per step, on all virtual devices together."""
    steps: int | None = None
    """Training steps; None: as many as suit the data."""
    momentum: float = 0.9
    """Of the running statistics."""
    methods: tuple[Method, ...] = METHODS
    """What is trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the batches of one run of each method and size."""
    tune: bool = False
    """Compare learning rates on images held out of training, and do nothing else."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    method: Method
    size: int
    order: Order
    seed: int
    rate: float
    steps: int
    batch_size: int
    momentum: float
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    measured: Literal["test", "validation"]


def cells(config: Config) -> list[Cell]:
    """Every training of a run.

    Raises:
        ValueError: groups that do not divide a batch.
    """
    if uneven := [size for size in config.sizes if config.batch_size % size]:
        raise ValueError(
            f"sizes has {uneven}: expected divisors of batch_size, "
            f"{config.batch_size}. Leave them out, or change --batch-size."
        )
    if config.tune:
        methods: tuple[Method, ...] = ("batch_norm", *PER_IMAGE)
        return [
            make_cell(config, method, config.batch_size, "mixed", seed, rate)
            for method, rate in itertools.product(methods, TRIED)
            for seed in config.seeds
        ]
    every = itertools.product(config.methods, config.sizes, ORDERS, config.seeds)
    return [make_cell(config, *where) for where in every]


def make_cell(
    config: Config,
    method: Method,
    size: int,
    order: Order,
    seed: int,
    rate: float | None = None,
) -> Cell:
    """The one training that stands for all that are the same."""
    task = convnet.TASKS[config.data]
    if method in PER_IMAGE:
        size = config.batch_size
    return Cell(
        data=config.data,
        method=method,
        size=size,
        order="mixed" if size == config.batch_size else order,
        seed=seed,
        rate=rate or RATES[config.data].get(method, BATCH_RATE),
        steps=config.steps or STEPS[config.data],
        batch_size=config.batch_size,
        momentum=config.momentum,
        widths=task.widths,
        strides=task.strides,
        measured="validation" if config.tune else "test",
    )


# Model


def normalize(cell: Cell, x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
    """Adds the layer of the cell's method to the network that calls it."""
    running: Any = {"use_running_average": not train, "momentum": cell.momentum}
    match cell.method:
        case "batch_norm" | "frozen":
            return bnjax.BatchNorm(**running)(x)
        case "cross_replica":
            return bnjax.BatchNorm(**running, axis_name=AXIS)(x)
        case "ghost":
            size = cell.size
            return bnjax.linen.GhostBatchNorm(**running, virtual_batch_size=size)(x)
        case "decorrelated":
            whiten = {"group_size": 4, "method": "newton_schulz"}
            return bnjax.linen.DecorrelatedBatchNorm(**running, **whiten)(x)
        case "renorm":
            # As in the paper, of whose 130,000 steps the first 5,000 are plain.
            plain, r_steps, d_steps = (k * cell.steps // 130 for k in (5, 35, 20))
            r_max = optax.linear_schedule(1.0, 3.0, max(r_steps, 1), plain)
            d_max = optax.linear_schedule(0.0, 5.0, max(d_steps, 1), plain)
            norm = bnjax.linen.BatchRenorm(**running, r_max=r_max, d_max=d_max)
            return norm(x, step=step)
        case "group_norm":
            return nn.GroupNorm(num_groups=4)(x)
        case "layer_norm":
            # Over height, width and channels, with a scale per channel: Wu & He 2018.
            return nn.GroupNorm(num_groups=1)(x)


class Network:
    """The network of a cell, and of all that differ in seed or order alone.

    It is called on each group of a batch by itself (vmap, with the axis name AXIS). The
    gradient is that of the mean loss over the whole batch. The running statistics are
    averaged over the groups at each step, the variances too, as in Flax's ImageNet
    example.
    """

    def __init__(self, cell: Cell):
        task = convnet.TASKS[cell.data]
        self.model = convnet.ConvNet(task, functools.partial(normalize, cell))
        rate = optax.warmup_cosine_decay_schedule(
            0, cell.rate, cell.steps // 10, cell.steps
        )
        self.optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, seed: int, images: jax.Array) -> TrainState:
        """The state before training."""
        variables: Any = self.model.init(jax.random.key(seed), images, train=False)
        variables = {"batch_stats": {}, **variables}  # some methods have none
        return TrainState.create(
            apply_fn=self.model.apply, tx=self.optimizer, **variables
        )

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def step(self, state: TrainState, images, labels, train: bool) -> TrainState:
        """The state after one batch: images (group, example, ...), and labels."""

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = self.apply(variables, images, state.step, train)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **updates)

    def apply(self, variables, images, step, train: bool):
        """Logits (group, example, class), and the mean of the running statistics."""

        def one(images):
            settings: Any = {"train": train, "step": step, "mutable": ["batch_stats"]}
            return self.model.apply(variables, images, **settings)

        logits, updates = jax.vmap(one, axis_name=AXIS)(images)
        return logits, jax.tree.map(lambda value: value.mean(0), updates)

    @functools.partial(jax.jit, static_argnums=0)
    def classify(self, variables, images: jax.Array) -> jax.Array:
        """The classes (group, example), by the statistics of each group."""
        logits, _ = self.apply(variables, images, 0, train=True)
        return logits.argmax(-1)

    def collect(self, variables, images: jax.Array):
        """What `bnjax.population.pooled` asks of a model."""
        collections = ["batch_stats", "batch_moments"]
        return self.model.apply(variables, images, train=True, mutable=collections)


# Training and evaluation


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The errors of each network."""
    data = convnet.load(config.data, config.data_dir)

    def kind(cell: Cell) -> tuple[str, int, float]:
        return cell.method, cell.size, cell.rate

    for _, alike in itertools.groupby(cells, kind):
        network = None
        for cell in alike:
            network = network or Network(cell)  # compiled once for all alike
            errors = evaluate(cell, network, data)
            shown = f"{cell.method} {cell.size}: {errors['running']:.1%}"
            yield Trained(cell, errors, shown)


def evaluate(cell: Cell, network: Network, data: Dataset) -> Errors:
    """Trains a network, and counts its errors."""
    images, labels = data.train
    drawn = draw_batches(cell.seed, len(labels), cell.steps, cell.batch_size)
    groups = split(drawn, labels, cell)
    state = fit(cell, network, data.train, groups)
    test: Split = getattr(data, cell.measured)

    def error(variables: Any) -> float:
        return 1 - convnet.accuracy(network.model, variables, test)

    errors = {"running": error(state.variables)}
    if cell.method == "batch_norm":
        mixed = drawn[: ESTIMATED // cell.batch_size]
        as_trained = groups[: len(mixed)].reshape(-1, cell.size)
        for kind, batches in (("pooled", mixed), ("pooled_groups", as_trained)):
            examples = (images[batch] for batch in batches)
            stats = bnjax.population.pooled(network.collect, state.variables, examples)
            errors[kind] = error({"params": state.params, "batch_stats": stats})
        errors["batch"] = error_by_group(cell, network, state, test)
    return errors


def split(batches: np.ndarray, labels: np.ndarray, cell: Cell) -> np.ndarray:
    """(batch, example) -> (batch, group, example), each batch as it is or by class."""
    if cell.order == "by class":
        sort = np.argsort(labels[batches], axis=1, kind="stable")
        batches = np.take_along_axis(batches, sort, axis=1)
    size = cell.batch_size if cell.method in WHOLE else cell.size
    return batches.reshape(len(batches), -1, size)


def fit(cell: Cell, network: Network, data: Split, batches: np.ndarray) -> TrainState:
    """The state after a step on each of `batches`, (step, group, example)."""
    state = network.init(cell.seed, data.images[:2])
    frozen = cell.steps // 5 if cell.method == "frozen" else 0
    for step, batch in enumerate(batches):
        train = step < cell.steps - frozen  # else by the running statistics
        state = network.step(state, data.images[batch], data.labels[batch], train)
    return state


def error_by_group(
    cell: Cell, network: Network, state: TrainState, test: Split
) -> float:
    """By the statistics of each test group; groups are put together as in training."""
    count, size = len(test.labels), cell.batch_size
    # The last batch is filled up from the start, by images that are not counted.
    places = np.arange(-(-count // size) * size)
    labels, wrong = test.labels[places % count], 0
    for groups in split(places.reshape(-1, size), labels, cell):
        classes = network.classify(state.variables, test.images[groups % count])
        wrong += int(((classes != labels[groups]) & (groups < count)).sum())
    return wrong / count


# Tables and pictures

Curves = dict[Order, dict[str, np.ndarray]]
"""Errors (seed, size), by order and name of the row; NaN where there is none."""


class Row(NamedTuple):
    """A line of the table: a method, evaluated in one way; and how it is drawn."""

    method: Method
    kind: str
    colour: str
    dashes: str = "-"
    width: float = 1.4


ORANGE = "#d55e00"
ROWS = {
    "BN, running average": Row("batch_norm", "running", ORANGE, width=2.2),
    "BN, pooled, groups of 128": Row("batch_norm", "pooled", ORANGE, "--"),
    "BN, pooled, as trained": Row("batch_norm", "pooled_groups", ORANGE, ":"),
    "BN, by the test group": Row("batch_norm", "batch", "#e69f00"),
    "ghost BN": Row("ghost", "running", "#56b4e9"),
    "BN, frozen at the end": Row("frozen", "running", "#cc79a7"),
    "batch renorm": Row("renorm", "running", "#009e73"),
    "decorrelated BN": Row("decorrelated", "running", "#6a3d9a"),
    "cross-replica BN": Row("cross_replica", "running", "#0072b2", width=2.2),
    "group norm": Row("group_norm", "running", "0.3", "--"),
    "layer norm": Row("layer_norm", "running", "0.6", "--"),
}


def report(config: Config, found: dict[Cell, Errors]) -> list[Any]:
    """A table for each order, or that of the learning rates."""
    if config.tune:
        known = ByRate.grouped((c.method, c.rate, e) for c, e in found.items())

        def error(method: str, rate: float) -> str:
            return percent(known.of(method, rate, "running"))

        return [known.table("error (%) at rate", TRIED, error)]
    printed: list[Any] = []
    for order, rows in curves(config, found).items():
        table = Table(box=box.MARKDOWN)
        table.add_column("method", no_wrap=True)
        for size in config.sizes:
            table.add_column(f"{size}", justify="right", no_wrap=True)
        for name, errors in rows.items():
            table.add_row(name, *map(percent, errors.T))
        printed += [f"Test error (%), {ORDERS[order]}, by their size", table]
    return printed


def curves(config: Config, found: dict[Cell, Errors]) -> Curves:
    """What there is of the cells of `config`, in the rows of the table."""
    rows: Curves = {}
    for order, (name, row) in itertools.product(ORDERS, ROWS.items()):
        errors = np.full((len(config.seeds), len(config.sizes)), np.nan)
        for i, seed in enumerate(config.seeds):
            for j, size in enumerate(config.sizes):
                cell = make_cell(config, row.method, size, order, seed)
                errors[i, j] = found.get(cell, {}).get(row.kind, np.nan)
        if np.isfinite(errors).any():
            rows.setdefault(order, {})[name] = errors
    return rows


def draw(config: Config, found: dict[Cell, Errors], folder: Path) -> list[Path]:
    """A panel for each order, with a line for each row of the table."""
    if config.tune:
        return []
    known = curves(config, found)
    task, seeds = convnet.TASKS[config.data], len(config.seeds)
    figure = Figure((9.4, 4.4), dpi=panels.DPI, layout="constrained")
    figure.suptitle(
        f"{panels.DATA[config.data]}, {len(task.widths)} convolutions, "
        f"{config.steps or STEPS[config.data]:,} steps of {config.batch_size} images; "
        f"mean of {seeds} seed{'s' * (seeds > 1)}",
        fontsize=10,
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (order, title) in zip((left, right), ORDERS.items(), strict=True):
        for name, errors in known[order].items():
            _, _, colour, dashes, width = ROWS[name]
            style = {"color": colour, "ls": dashes, "lw": width, "marker": "o", "ms": 3}
            axes.plot(config.sizes, 100 * errors.mean(0), label=name, **style)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(config.sizes, map(str, config.sizes))
        axes.set_yticks(PERCENTS, map(str, PERCENTS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("images per normalized group, of 128 per step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    drawn = [100 * e for order in ORDERS for e in known[order].values()]
    left.set_ylim(0.9 * np.nanmin(drawn), 1.1 * np.nanmax(drawn))
    left.set_ylabel("test error (%)", fontsize=9)
    place = {"loc": "outside right center", "fontsize": 8, "frameon": False}
    figure.legend(*left.get_legend_handles_labels(), **place)
    path = folder / f"small_batch_{config.data}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [path]


SMOKE = {
    "data": "digits",
    "sizes": (4,),
    "steps": 20,
    "seeds": (0,),
    "methods": METHODS[:1],
}
STUDY = Study("small_batch", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
