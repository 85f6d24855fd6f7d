"""Small and non-iid batches: where batch normalization fails, and what helps.

    python -m experiments.small_batch
    python -m experiments.small_batch --deeper
    python -m experiments.small_batch --data digits
    python -m experiments.small_batch --tune --seeds 0

Time, if two processes with a core each share the trainings (`--part`, see
experiments/common/study.py): 26 minutes, and 41 with --deeper; with --smoke some
seconds.

Expected: of the same 128 images per step, normalized in groups of 2 to 128 (as devices
would each by itself), the smaller the groups, the larger the error; larger still if the
groups are not iid, one class to each. Batch renormalization and population statistics
get most of it back; to cross-replica statistics and group normalization it is nothing.
With --deeper: population statistics are better than the running average, most of all
early in training, and small groups make an error of the estimate that accumulates from
layer to layer.

Measured (CIFAR-10, 3 seeds, jax 0.10.2, two cores of an AMD EPYC); in one group of 128
34.3 % are wrong. Standard deviations are up to 1.1 points iid, and 4.7 by class.

    test error (%), in groups of          iid: 2     8    32    by class: 2     8    32
    BN, running average                     43.0  36.0  34.6           76.6  74.5  58.8
    BN, average of one group                43.5  36.2  34.6           90.0  87.3  74.0
    BN, pooled statistics                   42.9  36.0  34.6           81.4  78.1  57.8
    BN, by the test group                   48.1  40.4  36.2           41.0  33.4  25.7
    BN, frozen for the last fifth           40.9  35.7  34.6           51.1  49.8  40.9
    batch renorm                            44.0  37.8  36.3           70.7  67.1  46.5
    BN, cross-replica                       34.8  34.8  34.8           34.8  34.8  34.8
    group norm                              43.3  43.3  43.3           43.3  43.3  43.3

BN fails as expected, in groups that are not iid at all sizes. Freezing takes back a
quarter of that in iid groups of 2, and 60 to 73 % by class; renorm half in groups of 32
by class, and elsewhere nothing that three seeds can tell, or makes it worse. Population
statistics close none of the gap: what is lost is lost in training. By class, the
network does best by the statistics of the test group, which tell it the class.

With --deeper, points of error by pooled statistics minus those by the running average
of momentum 0.9, in groups of 32 and 1,600 steps:

    convolutions                         6            12            18
    after half of the steps     -0.8 ± 0.5    -2.1 ± 1.2    -3.1 ± 3.8
    after all steps             -0.0 ± 0.2    +0.1 ± 0.2    -0.0 ± 0.2

So population statistics pay as long as the rate is high, by the mean the more the
deeper the network, and more still against momentum 0.99 (3 to 7 points here, 19 in 12
convolutions after 200 steps). Once the rate has fallen they pay nothing, at any depth
or length that was tried. In groups of 2 the average of one group alone is worse by 0.6
to 1.6 points.

The network: convolutions of 3x3, normalized and rectified, then the mean over positions
and a matrix; on CIFAR-10 six, on the digits three, the last of which has one position
per image: a group of 2 is two values. By class: each batch of 128, drawn at random, is
sorted by label and cut into groups.

A network with batch normalization is trained once, and evaluated by several statistics.
The running average is that of the mean over the groups; "of one group": of the first
group alone, as a replica has it that does not share its statistics (by class, the first
group always has the same classes). "By the test group": of test images in groups of
that size, put together in the same way, by label. Pooled: with the weights frozen, up
to 4,096 training images pass by the statistics of mixed batches of 128; "as trained":
of groups of the size and the order of training. "Frozen at the end": the last fifth of
the steps is repeated with the running statistics in place of those of the groups.

Cross-replica statistics are those of the whole batch, however it is split: one training
per seed, in the smallest groups.

With --deeper each convolution of the network is followed by none, one or two more of
stride 1, and the number of steps varies; groups are iid. The same training keeps a
running average of momentum 0.99 as well, and is evaluated after half of the steps too,
where the rate is still high. All differences are taken seed by seed; their intervals
are Student's, of 95 %.

Gradient descent with Nesterov momentum 0.9, a rate that rises for a tenth of the steps
and then falls as a cosine; its height is that with the least error on held-out images
(`--tune`), for all methods with statistics of a batch the one of BN in 128.

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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

import bnjax
from bnjax import running
from bnjax.training import TrainState
from experiments.common import convnet, panels, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.intervals import Interval, interval
from experiments.common.rates import ByRate, percent
from experiments.common.study import Study, Trained

Method = Literal[
    "batch_norm",
    "renorm",
    "cross_replica",
    "group_norm",
    "ghost",
    "decorrelated",
    "layer_norm",
]
Order = Literal["mixed", "by class"]
When = Literal["halfway", "end"]
Errors = dict[str, float]
"""The share of wrong answers, by the statistics that a network is evaluated with.

running: the running statistics, or none.  one_group, slow: see `AVERAGES`.  pooled:
pooled over mixed batches of the size of a whole batch.  pooled_groups: over groups as
in training.  batch: those of each test group, which are put together as in training.
frozen: the running statistics, by which the last fifth of the steps was trained.
"K, halfway": by K, after half of the steps.
"""

METHODS: tuple[Method, ...] = get_args(Method)
BY_DEFAULT = METHODS[:4]
PER_IMAGE: tuple[Method, ...] = ("group_norm", "layer_norm")
"""Methods for which it does not matter how a batch is split."""
ORDERS: dict[Order, str] = {
    "mixed": "groups drawn at random (iid)",
    "by class": "groups of one class, or few (not iid)",
}
WHOLE: tuple[Method, ...] = ("ghost", *PER_IMAGE)
"""Methods that are called on a whole batch, not on each of its groups."""
EVALUATED = "running", "one_group", "pooled", "pooled_groups", "batch", "frozen"
"""By what a network with batch normalization is evaluated."""
EVALUATED_DEEPER = "running", "slow", "one_group", "pooled", "pooled_groups"
AVERAGES: dict[str, tuple[float | None, slice]] = {
    "one_group": (None, slice(0, 1)),
    "slow": (0.99, slice(None)),
}
"""Running averages beside the one of the training, which they do not change.

The momentum, None for that of the training, and the groups that are averaged.
"""
AXIS = "devices"
ESTIMATED = 4_096  # images at most, for population statistics
STEPS = {"digits": 300, "cifar10": 1_000}
RATES = {
    "digits": {"group_norm": 0.3, "layer_norm": 0.3},
    "cifar10": {"group_norm": 0.1, "layer_norm": 0.3},
}
"""Chosen by --tune; methods with statistics of a batch share BATCH_RATE."""
BATCH_RATE = 0.1
PERCENTS = (1, 2, 3, 5, 10, 20, 30, 40, 50, 70, 100)  # along the axis of errors
TRIED = (0.03, 0.1, 0.3, 1.0)  # by --tune


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "cifar10"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    sizes: tuple[int, ...] = (2, 8, 32, 128)
    """Of the groups that a batch is normalized in."""
    batch_size: int = 128
    """Images per step, on all virtual devices together."""
    steps: int | None = None
    """Training steps; None: as many as suit the data."""
    momentum: float = 0.9
    """Of the running statistics."""
    methods: tuple[Method, ...] = BY_DEFAULT
    """What is trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the batches of one run of each method and size."""
    tune: bool = False
    """Compare learning rates on images held out of training, and do nothing else."""
    deeper: bool = False
    """Compare statistics of deeper networks instead, with batch normalization alone."""
    networks: tuple[tuple[int, int], ...] = (
        *((1, 400), (1, 1_600)),
        *((2, 400), (2, 1_600)),
        *((3, 1_600),),
    )
    """With --deeper: how many convolutions take the place of each, and the steps."""
    deeper_sizes: tuple[int, ...] = (2, 32)
    """With --deeper: of the groups."""


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
    evaluated: tuple[str, ...]
    halfway: bool


def cells(config: Config) -> list[Cell]:
    """Every training of a run.

    Networks alternate, those with the same number of trainings, so that of two
    processes with every other cell each has its own networks to compile.

    Raises:
        ValueError: groups that do not divide a batch; --deeper with --tune.
    """
    if config.deeper and config.tune:
        raise ValueError("received --deeper and --tune: expected one of them")
    sizes = config.deeper_sizes if config.deeper else config.sizes
    if uneven := [size for size in sizes if config.batch_size % size]:
        raise ValueError(
            f"sizes has {uneven}: expected divisors of batch_size, "
            f"{config.batch_size}. Leave them out, or change --batch-size."
        )
    networks = sorted(by_network(_cells(config)), key=len, reverse=True)
    every: list[Cell] = []
    for pair in itertools.zip_longest(networks[::2], networks[1::2], fillvalue=[]):
        every += filter(None, itertools.chain(*itertools.zip_longest(*pair)))
    return every


def _cells(config: Config) -> Iterator[Cell]:
    """Every training, perhaps more than once, in an order to be read."""
    if config.deeper:
        for network, size, seed in itertools.product(
            config.networks, config.deeper_sizes, config.seeds
        ):
            yield deeper_cell(config, *network, size, seed)
    elif config.tune:
        for method in ("batch_norm", *PER_IMAGE):
            if method in config.methods:
                for rate, seed in itertools.product(TRIED, config.seeds):
                    yield make_cell(
                        config, method, config.batch_size, "mixed", seed, rate
                    )
    else:
        for where in itertools.product(
            config.methods, config.sizes, ORDERS, config.seeds
        ):
            yield make_cell(config, *where)


def by_network(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells, each once, that differ in seed or order alone in one list."""
    lists: dict[Cell, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        network = dataclasses.replace(cell, seed=0, order="mixed")
        lists.setdefault(network, []).append(cell)
    return list(lists.values())


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
    elif method == "cross_replica":
        size, order = min(config.sizes), "mixed"
    compared = method == "batch_norm" and not config.tune
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
        evaluated=EVALUATED if compared else EVALUATED[:1],
        halfway=False,
    )


def deeper_cell(config: Config, repeats: int, steps: int, size: int, seed: int) -> Cell:
    """A training with `repeats` convolutions, the last of stride 1, for each."""
    cell = make_cell(config, "batch_norm", size, "mixed", seed)
    ones = (1,) * (repeats - 1)
    return dataclasses.replace(
        cell,
        steps=steps,
        widths=tuple(width for width in cell.widths for _ in range(repeats)),
        strides=tuple(s for stride in cell.strides for s in (stride, *ones)),
        evaluated=EVALUATED_DEEPER,
        halfway=True,
    )


# Model


def normalize(cell: Cell, x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
    """Adds the layer of the cell's method to the network that calls it."""
    running: Any = {"use_running_average": not train, "momentum": cell.momentum}
    match cell.method:
        case "batch_norm":
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


class State(TrainState):
    """What is trained, and running averages beside: {name: batch_stats}."""

    averages: Any


class Network:
    """The network of a cell, and of all that differ in seed or order alone.

    It is called on each group of a batch by itself (vmap, with the axis name AXIS). The
    gradient is that of the mean loss over the whole batch. The running statistics are
    averaged over the groups at each step, the variances too, as in Flax's ImageNet
    example.
    """

    def __init__(self, cell: Cell):
        task = convnet.TASKS[cell.data]
        task = task._replace(widths=cell.widths, strides=cell.strides)
        self.cell = cell
        self.model = convnet.ConvNet(task, functools.partial(normalize, cell))
        rate = optax.warmup_cosine_decay_schedule(
            0, cell.rate, cell.steps // 10, cell.steps
        )
        self.optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)

    def init(self, seed: int, images: ArrayLike) -> State:
        """The state before training; compiled as a whole this takes longer."""
        variables: Any = self.model.init(jax.random.key(seed), images, train=False)
        variables = {"batch_stats": {}, **variables}  # some methods have none
        names = [name for name in self.cell.evaluated if name in AVERAGES]
        return State.create(
            apply_fn=self.model.apply,
            tx=self.optimizer,
            averages=dict.fromkeys(names, variables["batch_stats"]),
            **variables,
        )

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def step(self, state: State, images, labels, train: bool) -> State:
        """The state after one batch: images (group, example, ...), and labels."""

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = self.apply(variables, images, state.step, train)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        averages = state.averages
        if train and averages:
            averages = self.averaged(averages, updates["batch_moments"])
        return state.apply_gradients(
            grads=grads,
            batch_stats=_mean_of_groups(updates.get("batch_stats", {})),
            averages=averages,
        )

    def apply(self, variables, images, step, train: bool):
        """Logits (group, example, class), and what the layers leave of each group."""

        def one(images):
            collections = ["batch_stats", "batch_moments"]
            settings: Any = {"train": train, "step": step, "mutable": collections}
            return self.model.apply(variables, images, **settings)

        return jax.vmap(one, axis_name=AXIS)(images)

    def averaged(self, averages, batch_moments):
        """The averages after a batch with these moments of its groups."""

        def update(name: str, layer: str, old: Any) -> dict[str, jax.Array]:
            momentum, groups = AVERAGES[name]
            rule = running.ema(momentum or self.cell.momentum)
            moments = batch_moments[layer]["moments"]
            moments = jax.tree.map(lambda value: value[groups], moments)
            of_groups = jax.vmap(rule.update, (None, 0))(running.State(**old), moments)
            return _mean_of_groups(of_groups)._asdict()

        return {
            name: {layer: update(name, layer, old) for layer, old in stats.items()}
            for name, stats in averages.items()
        }

    @functools.partial(jax.jit, static_argnums=0)
    def classify(self, variables, images: jax.Array) -> jax.Array:
        """The classes (group, example), by the statistics of each group."""
        logits, _ = self.apply(variables, images, 0, train=True)
        return logits.argmax(-1)

    def collect(self, variables, images: jax.Array):
        """What `bnjax.population.pooled` asks of a model."""
        collections = ["batch_stats", "batch_moments"]
        return self.model.apply(variables, images, train=True, mutable=collections)


def _mean_of_groups(tree: Any) -> Any:
    return jax.tree.map(lambda value: value.mean(0), tree)


# Training and evaluation


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The errors of each network."""
    data = convnet.load(config.data, config.data_dir)
    for alike in by_network(cells):
        network = Network(alike[0])  # compiled once for all alike
        for cell in alike:
            errors = evaluate(cell, network, data)
            name = f"{cell.method} {cell.size}, {len(cell.widths)} layers"
            yield Trained(cell, errors, f"{name}: {errors['running']:.1%}")


def evaluate(cell: Cell, network: Network, data: Dataset) -> Errors:
    """Trains a network, and counts its errors."""
    images, labels = data.train
    drawn = draw_batches(cell.seed, len(labels), cell.steps, cell.batch_size)
    groups = split(drawn, labels, cell)
    half, frozen_from = cell.steps // 2, cell.steps - cell.steps // 5
    errors: Errors = {}

    state = network.init(cell.seed, images[:2])
    state = fit(network, state, data.train, groups[:half])
    if cell.halfway:
        found = errors_of(cell, network, state, data, drawn, groups)
        errors |= {f"{kind}, halfway": error for kind, error in found.items()}
    state = fit(network, state, data.train, groups[half:frozen_from])
    last = groups[frozen_from:]
    if "frozen" in cell.evaluated:
        frozen = fit(network, state, data.train, last, train=False)
        test: Split = getattr(data, cell.measured)
        errors["frozen"] = 1 - convnet.accuracy(network.model, frozen.variables, test)
    state = fit(network, state, data.train, last)
    return errors | errors_of(cell, network, state, data, drawn, groups)


def fit(
    network: Network, state: State, data: Split, batches: np.ndarray, train: bool = True
) -> State:
    """The state after a step on each of `batches`, (step, group, example).

    Args:
        network: of the state.
        state: from where it goes on.
        data: the training images.
        batches: places in `data`.
        train: by the statistics of the groups, else by the running statistics.
    """
    for batch in batches:
        state = network.step(state, data.images[batch], data.labels[batch], train)
    return state


def errors_of(
    cell: Cell,
    network: Network,
    state: State,
    data: Dataset,
    drawn: np.ndarray,
    groups: np.ndarray,
) -> Errors:
    """The errors of one state by every kind of statistics that it has."""
    test: Split = getattr(data, cell.measured)
    mixed = drawn[: ESTIMATED // cell.batch_size]
    as_trained = groups[: len(mixed)].reshape(-1, groups.shape[-1])
    stats = {"running": state.batch_stats, **state.averages}
    for kind, batches in (("pooled", mixed), ("pooled_groups", as_trained)):
        if kind in cell.evaluated:
            examples = (data.train.images[batch] for batch in batches)
            stats[kind] = bnjax.population.pooled(
                network.collect, state.variables, examples
            )
    errors: Errors = {}
    for kind, of_kind in stats.items():
        variables = {"params": state.params, "batch_stats": of_kind}
        errors[kind] = 1 - convnet.accuracy(network.model, variables, test)
    if "batch" in cell.evaluated:
        errors["batch"] = error_by_group(cell, network, state, test)
    return errors


def split(batches: np.ndarray, labels: np.ndarray, cell: Cell) -> np.ndarray:
    """(batch, example) -> (batch, group, example), each batch as it is or by class."""
    if cell.order == "by class":
        sort = np.argsort(labels[batches], axis=1, kind="stable")
        batches = np.take_along_axis(batches, sort, axis=1)
    size = cell.batch_size if cell.method in WHOLE else cell.size
    return batches.reshape(len(batches), -1, size)


def error_by_group(cell: Cell, network: Network, state: State, test: Split) -> float:
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


ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#009e73"
BN = "BN, running average"
ROWS = {
    BN: Row("batch_norm", "running", ORANGE, width=2.2),
    "BN, average of one group": Row("batch_norm", "one_group", ORANGE, "-."),
    "BN, pooled, groups of 128": Row("batch_norm", "pooled", ORANGE, "--"),
    "BN, pooled, as trained": Row("batch_norm", "pooled_groups", ORANGE, ":"),
    "BN, by the test group": Row("batch_norm", "batch", "#e69f00"),
    "BN, frozen at the end": Row("batch_norm", "frozen", "#cc79a7"),
    "ghost BN": Row("ghost", "running", "#56b4e9"),
    "batch renorm": Row("renorm", "running", GREEN),
    "decorrelated BN": Row("decorrelated", "running", "#6a3d9a"),
    "cross-replica BN": Row("cross_replica", "running", BLUE, width=2.2),
    "group norm": Row("group_norm", "running", "0.3", "--"),
    "layer norm": Row("layer_norm", "running", "0.6", "--"),
}


def report(config: Config, found: dict[Cell, Errors]) -> list[Any]:
    """The tables of a run."""
    if config.tune:
        known = ByRate.grouped((c.method, c.rate, e) for c, e in found.items())

        def error(method: str, rate: float) -> str:
            return percent(known.of(method, rate, "running"))

        return [known.table("error (%) at rate", TRIED, error)]
    if config.deeper:
        return report_deeper(config, found)
    printed: list[Any] = []
    costs = findings(config, found)
    for order, rows in curves(config, found).items():
        errors, above = (_table("method", *config.sizes) for _ in range(2))
        for name, of_row in rows.items():
            errors.add_row(name, *map(percent, of_row.T))
            known = (costs.get((name, order, size)) for size in config.sizes)
            above.add_row(name, *(str(f.cost) if f else "-" for f in known))
        printed += [f"Test error (%), {ORDERS[order]}, by their size", errors]
        if costs:
            title = f"Points of error above BN in one group of {config.batch_size}"
            printed += [f"{title}, {ORDERS[order]}", above]
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


class Finding(NamedTuple):
    """One number of the table, compared seed by seed, in percentage points.

    Attributes:
        cost: its error minus that of BN in one group of the whole batch.
        change: its error minus that of the base in the same groups.
        closed: the share of the base's mean cost that it takes back; NaN if the
            interval of that cost reaches 0.
    """

    cost: Interval
    change: Interval
    closed: float


def findings(
    config: Config, found: dict[Cell, Errors], base: str = BN
) -> dict[tuple[str, Order, int], Finding]:
    """What sentences quote, by row, order and size; only of what all seeds have.

    Args:
        config: of the run.
        found: its records.
        base: the row that the others are compared to.
    """
    rows = curves(config, found)
    if config.batch_size not in config.sizes or BN not in rows.get("mixed", {}):
        return {}
    whole = rows["mixed"][BN][:, config.sizes.index(config.batch_size)]
    known: dict[tuple[str, Order, int], Finding] = {}
    for order, of_order in rows.items():
        for name, (j, size) in itertools.product(of_order, enumerate(config.sizes)):
            own, others = of_order[name][:, j], of_order[base][:, j]
            if np.isfinite([own, others, whole]).all():
                cost, of_base = points(own - whole), points(others - whole)
                closed = 1 - cost.mean / of_base.mean if of_base.low > 0 else np.nan
                finding = Finding(cost, points(own - others), closed)
                known[name, order, size] = finding
    return known


def points(shares: np.ndarray) -> Interval:
    """(seed,) -> the interval of the mean, in percentage points."""
    return interval(100 * shares)


def _table(*columns: Any) -> Table:
    table = Table(box=box.MARKDOWN)
    for i, name in enumerate(columns):
        table.add_column(str(name), justify="right" if i else "left", no_wrap=True)
    return table


# With --deeper


class Stop(NamedTuple):
    """What is evaluated: convolutions, all steps, images per group, and when."""

    convolutions: int
    steps: int
    size: int
    when: When


AGAINST = {
    "running": ("average", ORANGE),
    "slow": (f"average, {AVERAGES['slow'][0]}", BLUE),
    "one_group": ("of one group", GREEN),
    "pooled_groups": ("as trained", "0.5"),
}
"""What pooled statistics are compared to, its name and colour."""


WHEN: dict[When, str] = {
    "halfway": "after half of the steps",
    "end": "after all steps",
}


def errors_deeper(
    config: Config, found: dict[Cell, Errors]
) -> dict[Stop, dict[str, np.ndarray]]:
    """The errors (seed,) by each kind of statistics, of what all seeds have."""
    known: dict[Stop, dict[str, np.ndarray]] = {}
    for (repeats, steps), size in itertools.product(
        config.networks, config.deeper_sizes
    ):
        of_seeds = [
            deeper_cell(config, repeats, steps, size, seed) for seed in config.seeds
        ]
        if not all(cell in found for cell in of_seeds):
            continue
        layers = len(of_seeds[0].widths)
        for when in WHEN:
            ending = ", halfway" if when == "halfway" else ""
            known[Stop(layers, steps, size, when)] = {
                kind: np.array([found[cell][kind + ending] for cell in of_seeds])
                for kind in EVALUATED_DEEPER
            }
    return known


def findings_deeper(
    config: Config, found: dict[Cell, Errors]
) -> dict[Stop, dict[str, Interval]]:
    """Pooled minus each of `AGAINST`, seed by seed, in percentage points."""
    return {
        stop: {kind: points(errors["pooled"] - errors[kind]) for kind in AGAINST}
        for stop, errors in errors_deeper(config, found).items()
    }


def report_deeper(config: Config, found: dict[Cell, Errors]) -> list[Any]:
    """A row for each network and stop."""
    errors, differences = errors_deeper(config, found), findings_deeper(config, found)
    names = [name for name, _ in AGAINST.values()]
    where = "layers", "steps", "group", "when"
    absolute = _table(*where, "pooled", *names)
    paired = _table(*where, *names)
    for stop, of_stop in errors.items():
        place = [str(value) for value in stop]
        kinds = "pooled", *AGAINST
        absolute.add_row(*place, *(percent(of_stop[kind]) for kind in kinds))
        paired.add_row(*place, *(str(differences[stop][kind]) for kind in AGAINST))
    title = "Points of error by pooled statistics minus those by another"
    return ["Test error (%) by statistics", absolute, title, paired]


def draw_deeper(config: Config, found: dict[Cell, Errors], path: Path) -> None:
    """Pooled minus running averages against depth, by size, length and time."""
    known = findings_deeper(config, found)
    layers = sorted({stop.convolutions for stop in known})
    sizes, seeds = config.deeper_sizes, len(config.seeds)
    figure, axes = panels.make(
        f"{panels.DATA[config.data]}: pooled statistics minus a running average, "
        f"{seeds} seed{'s' * (seeds > 1)}, 95 % intervals",
        (9.4, 6.2),
        len(WHEN),
        len(sizes),
    )
    kinds = [kind for kind in AGAINST if kind != "pooled_groups"]
    lengths = sorted({steps for _, steps in config.networks})
    series = list(itertools.product(kinds, lengths))
    places = itertools.product(WHEN, sizes)
    for panel, (when, size) in zip(axes, places, strict=True):
        panels.label(
            panel,
            f"groups of {size}, {WHEN[when]}",
            "convolutions",
            "difference of the test error (points)",
        )
        panel.axhline(0, color="0.4", lw=0.8)
        for i, (kind, steps) in enumerate(series):
            stops = [Stop(n, steps, size, when) for n in layers]
            of_kind = [known[stop][kind] if stop in known else None for stop in stops]
            drawn = [(j, each) for j, each in enumerate(of_kind) if each]
            name, colour = AGAINST[kind]
            panel.errorbar(
                [j + 0.08 * (i - (len(series) - 1) / 2) for j, _ in drawn],
                [each.mean for _, each in drawn],
                [each.half if np.isfinite(each.half) else 0 for _, each in drawn],
                color=colour,
                ls=("-", "--", ":")[lengths.index(steps) % 3],
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
                label=f"{name}; {steps:,} steps",
            )
        panel.set_xticks(range(len(layers)), map(str, layers))
    place = {"loc": "outside lower center", "fontsize": 8, "frameon": False, "ncols": 3}
    figure.legend(*axes[0].get_legend_handles_labels(), **place)
    panels.save(figure, path)


# Pictures


def draw(config: Config, found: dict[Cell, Errors], folder: Path) -> list[Path]:
    """The picture of a run, if it has one."""
    if config.tune:
        return []
    kind = "_deeper" if config.deeper else ""
    path = folder / f"small_batch{kind}_{config.data}.png"
    (draw_deeper if config.deeper else draw_errors)(config, found, path)
    return [path]


def draw_errors(config: Config, found: dict[Cell, Errors], path: Path) -> None:
    """A panel for each order, with a line for each row of the table."""
    known = curves(config, found)
    task, seeds = convnet.TASKS[config.data], len(config.seeds)
    figure, (left, right) = panels.make(
        f"{panels.DATA[config.data]}, {len(task.widths)} convolutions, "
        f"{config.steps or STEPS[config.data]:,} steps of {config.batch_size} images; "
        f"mean{' and range' * (seeds > 1)} of {seeds} seed{'s' * (seeds > 1)}",
        (9.4, 4.4),
        1,
        2,
    )
    for axes, (order, title) in zip((left, right), ORDERS.items(), strict=True):
        for name, errors in known[order].items():
            _, _, colour, dashes, width = ROWS[name]
            style = {"color": colour, "ls": dashes, "lw": width, "marker": "o", "ms": 3}
            panels.line(axes, config.sizes, 100 * errors, label=name, **style)
        of = f"images per normalized group, of {config.batch_size} per step"
        panels.label(axes, title, of, "test error (%)", log="y")
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.sizes, map(str, config.sizes))
        axes.set_yticks(PERCENTS, map(str, PERCENTS))
        axes.yaxis.set_minor_locator(NullLocator())
    drawn = [100 * e for order in ORDERS for e in known[order].values()]
    for axes in (left, right):
        axes.set_ylim(0.9 * np.nanmin(drawn), 1.1 * np.nanmax(drawn))
    place = {"loc": "outside right center", "fontsize": 8, "frameon": False}
    figure.legend(*left.get_legend_handles_labels(), **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


SMOKE = {
    "data": "digits",
    "sizes": (4,),
    "steps": 20,
    "seeds": (0,),
    "methods": METHODS[:1],
    "networks": ((2, 20),),
    "deeper_sizes": (4,),
}
STUDY = Study("small_batch", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
