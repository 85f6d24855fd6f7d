"""What dropout, L2 and LRN are worth with batch normalization, and without.

    python -m experiments.regularization
    python -m experiments.regularization --tune     # learning rates

Time: 16 minutes with --tune, then 37, for two processes with a CPU core each (`--part`,
see `common/study.py`); with --smoke some seconds.

Expected: with batch normalization, dropout and local response normalization (LRN) can
be removed, and L2 be cut to a fifth, at no cost or at a gain. Without it, removing them
costs more.

Measured (CIFAR-10, 3 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %, of
training in brackets, and by how many points each change makes it larger):

                              with BN                       without BN
    nothing                   38.1 ± 0.8 (10)               42.6 ± 0.2 (23)
    no dropout                36.3 ± 0.5 (2)    -1.8 ± 1.6  42.7 ± 1.1 (9)   +0.1 ± 2.2
    a fifth of L2             40.0 ± 0.6 (2)    +1.9 ± 0.9  45.6 ± 0.5 (14)  +3.0 ± 1.1
    no L2                     41.6 ± 0.8 (3)    +3.5 ± 2.4  46.1 ± 1.6 (13)  +3.5 ± 3.4
    no dropout, a fifth of L2 40.3 ± 0.7 (0)    +2.2 ± 2.7  45.5 ± 0.8 (0)   +2.9 ± 1.4
    no dropout, no L2         42.1 ± 0.8 (0)    +4.0 ± 1.0  46.2 ± 0.4 (0)   +3.6 ± 0.7
    LRN as well               39.6 ± 0.1 (12)   +1.6 ± 2.0  46.4 ± 0.7 (41)  +3.8 ± 1.2

With BN dropout is removed at a gain, as expected, and LRN brings nothing. L2 cannot be
cut to a fifth at no cost: that takes 1.9 points. And that all this is needed less than
without BN is not shown: there dropout brings nothing either, and what L2 is worth
differs by less than three seeds can tell (1.1 ± 1.9 points). Removing dropout and L2
costs both networks the same.

Both networks are trained on the first 10,000 images of CIFAR-10 until, without dropout
and L2, they have learned them by heart: then there is something to regularize. The same
seed gives both the same batches, and changes are taken seed by seed; intervals are of
95 % (Student's t). The rates have the least error on held-out images, on average over
everything on and everything removed. There is no augmentation, which would prevent
overfitting as well: what less distortion and thorough shuffling are worth is measured
by `experiments.inception --ablate`.

To change the data, see `TASKS`; the model, `Network`; the schedule, `descent`; what is
changed, `CHANGES`.

References: Ioffe & Szegedy 2015, section 4.2.1; Krizhevsky et al. 2012, section 3.3.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from rich import box
from rich.table import Table

import bnjax
from experiments.common import convnet, panels, study
from experiments.common.images import Split, draw_batches
from experiments.common.intervals import Interval, interval
from experiments.common.rates import percent
from experiments.common.results import Record
from experiments.common.study import Settings, Study, Trained

RATES = (0.03, 0.1, 0.3)  # tried by --tune
WITH = {True: "with BN", False: "without BN"}
NOTHING, EVERYTHING = "nothing", "no dropout, no L2"
CHANGES: dict[str, dict[str, Any]] = {
    NOTHING: {},
    "no dropout": {"dropout": 0.0},
    "a fifth of L2": {"l2": 0.2},
    "no L2": {"l2": 0.0},
    "no dropout, a fifth of L2": {"dropout": 0.0, "l2": 0.2},
    EVERYTHING: {"dropout": 0.0, "l2": 0.0},
    "LRN as well": {"lrn": True},
}
"""What differs from dropout and L2 without LRN; `l2` is a factor."""


class Task(NamedTuple):
    """What depends on the data; pixels and layers are those of `convnet.TASKS`."""

    images: int  # of training: the first ones
    steps: int  # of training
    l2: float
    white: float  # the largest value of a pixel
    rates: dict[bool, float]  # of learning, with batch normalization and without


TASKS = {
    "digits": Task(
        images=1_097, steps=300, l2=5e-4, white=1.0, rates={True: 0.3, False: 0.3}
    ),
    "cifar10": Task(
        images=10_000, steps=4_000, l2=2e-3, white=255.0, rates={True: 0.3, False: 0.03}
    ),
}
DROPOUT = 0.4  # the share of features that are dropped, as in GoogLeNet


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "cifar10"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    changes: tuple[str, ...] = tuple(CHANGES)[1:]
    """What is changed, one of these at a time, and compared to nothing changed."""
    steps: int | None = None
    """Of training; None: as many as suit the data."""
    batch_size: int = 64
    """Images per step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the first weights and the batches of one training of each kind."""
    tune: bool = False
    """Compare learning rates on images held out of training, and do nothing else."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides the result of a training."""

    data: str
    normalize: bool
    dropout: float
    l2: float
    lrn: bool
    seed: int
    rate: float
    images: int
    steps: int
    batch_size: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    measured: Literal["test", "validation"]


def cell_of(
    config: Config, normalize: bool, change: str, seed: int, rate: float | None = None
) -> Cell:
    """One training; without a rate, at the one that was chosen."""
    task, layers = TASKS[config.data], convnet.TASKS[config.data]
    on = {"dropout": DROPOUT, "l2": 1.0, "lrn": False} | CHANGES[change]
    return Cell(
        data=config.data,
        normalize=normalize,
        **on | {"l2": on["l2"] * task.l2},
        seed=seed,
        rate=rate or task.rates[normalize],
        images=task.images,
        steps=config.steps or task.steps,
        batch_size=config.batch_size,
        widths=layers.widths,
        strides=layers.strides,
        measured="validation" if config.tune else "test",
    )


def cells(config: Config) -> list[Cell]:
    """Every training of a run; every second one has batch normalization."""
    if unknown := set(config.changes) - CHANGES.keys():
        raise ValueError(
            f"received the changes {unknown}: expected some of {[*CHANGES]}. "
            "Quote what has spaces."
        )
    if config.tune:
        tried = itertools.product((NOTHING, EVERYTHING), (0,), RATES)
    else:
        tried = itertools.product((NOTHING, *config.changes), config.seeds, (None,))
    return [cell_of(config, normalize, *which) for which in tried for normalize in WITH]


# Model


def local_response_norm(x: jax.Array, alpha: float) -> jax.Array:
    """Divides each value by the strength of the channels around its own.

    y_i = x_i / (2 + alpha sum_j x_j^2)^0.75,  |j - i| <= 2 (Krizhevsky et al. 2012)
    """
    window, strides = (1, 1, 1, 5), (1, 1, 1, 1)
    sums = lax.reduce_window(x**2, np.float32(0), lax.add, window, strides, "SAME")
    return x / (2 + alpha * sums) ** 0.75


class Network(nn.Module):
    """Convolutions of 3x3, each rectified; the mean over positions, and a matrix.

    LRN follows the first two convolutions, as in AlexNet and GoogLeNet.
    """

    cell: Cell

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits of 10 classes, from pixels (batch, height, width, colour)."""
        cell, pixels = self.cell, convnet.TASKS[self.cell.data]
        x = (jnp.asarray(x, jnp.float32) - pixels.center) / pixels.spread
        init = nn.initializers.he_normal()
        # 1e-4 is the alpha of Krizhevsky et al., whose pixels go to 255.
        alpha = 1e-4 * (255 * pixels.spread / TASKS[cell.data].white) ** 2
        for layer, (width, stride) in enumerate(zip(cell.widths, cell.strides)):
            bias = not cell.normalize
            x = nn.Conv(width, (3, 3), stride, use_bias=bias, kernel_init=init)(x)
            if cell.normalize:
                x = bnjax.BatchNorm(not train, momentum=0.9)(x)
            x = nn.relu(x)
            if cell.lrn and layer < 2:
                x = local_response_norm(x, alpha)
        x = nn.Dropout(cell.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10)(x)


# Training


def descent(steps: int, rate: Any, l2: Any) -> optax.GradientTransformation:
    """Nesterov's, with L2 on kernels; the rate rises, then falls as a cosine."""
    height = optax.warmup_cosine_decay_schedule(0, 1, steps // 10, steps)
    return optax.chain(
        optax.add_decayed_weights(l2, bnjax.training.weight_decay_mask),
        optax.sgd(lambda step: rate * height(step), momentum=0.9, nesterov=True),
    )


@functools.partial(jax.jit, static_argnums=0)
def init(cell: Cell, key: jax.Array, images: jax.Array):
    """The variables, and the optimizer's state, before the first step."""
    variables = Network(cell).init(key, images, train=False)
    return variables, descent(cell.steps, 0.0, 0.0).init(variables["params"])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(cell: Cell, variables, optimizer, key, data: Split, batch, rate, l2):
    """Both after a step on the examples `batch` of the data."""

    def loss_fn(params):
        logits, updates = Network(cell).apply(
            {**variables, "params": params},
            data.images[batch],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, data.labels[batch]
        )
        return losses.mean(), updates

    params = variables["params"]
    grads, updates = jax.grad(loss_fn, has_aux=True)(params)
    transformation = descent(cell.steps, rate, l2)
    change, optimizer = transformation.update(grads, optimizer, params)
    params = optax.apply_updates(params, change)
    return {**variables, **updates, "params": params}, optimizer


@functools.partial(jax.jit, static_argnums=0)
def evaluate(cell: Cell, variables: Any, data: Split) -> jax.Array:
    """How many answers are right, by the running statistics."""
    logits: Any = Network(cell).apply(variables, data.images, train=False)
    return (logits.argmax(-1) == data.labels).sum()


def train_cell(cell: Cell, data: dict[str, Split]) -> Record:
    """The shares of wrong answers of one network, after its training.

    "error" is that of the images asked for, "training" that of the training images.
    """
    # Cells that differ in nothing but these are compiled once.
    alike = dataclasses.replace(cell, seed=0, rate=0.0, l2=0.0, measured="test")
    known = jax.tree.map(lambda part: jnp.asarray(part[: cell.images]), data["train"])
    weights, key = jax.random.split(jax.random.key(cell.seed))
    state = init(alike, weights, known.images[:2])
    drawn = draw_batches(cell.seed, cell.images, cell.steps, cell.batch_size)
    for step, batch in enumerate(drawn):
        of_step = jax.random.fold_in(key, step)
        state = train_step(alike, *state, of_step, known, batch, cell.rate, cell.l2)

    def error(part: Split) -> float:
        return 1 - float(evaluate(alike, state[0], part)) / len(part.labels)

    return {"error": error(data[cell.measured]), "training": error(known)}


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The error of each network."""
    data = convnet.load(config.data, config.data_dir)._asdict()
    for cell in cells:
        result = train_cell(cell, data)
        shown = f"{WITH[cell.normalize]}: {result['error']:.1%} wrong"
        yield Trained(cell, result, shown)


# Tables and picture


def errors(
    config: Config,
    found: dict[Cell, Record],
    normalize: bool,
    change: str,
    rate: float | None = None,
    field: str = "error",
) -> np.ndarray:
    """(seed,), shares; NaN for what is not trained yet."""
    seeds = (0,) if config.tune else config.seeds
    cells = (cell_of(config, normalize, change, seed, rate) for seed in seeds)
    return np.array([found[c][field] if c in found else np.nan for c in cells])


def costs(
    config: Config, found: dict[Cell, Record], normalize: bool, change: str
) -> np.ndarray:
    """(seed,), by how many points the change makes the error larger."""
    changed = errors(config, found, normalize, change)
    return 100 * (changed - errors(config, found, normalize, NOTHING))


class Findings(NamedTuple):
    """What a change costs, in points of the test error.

    Attributes:
        with_bn: the cost with batch normalization.
        without_bn: the cost without.
        less: by how much less it costs with batch normalization.
    """

    with_bn: Interval
    without_bn: Interval
    less: Interval


def findings(config: Config, found: dict[Cell, Record]) -> dict[str, Findings]:
    """By change."""
    every = {}
    for change in config.changes:
        with_bn, without = (costs(config, found, kind, change) for kind in WITH)
        each = map(interval, (with_bn, without, without - with_bn))
        every[change] = Findings(*each)
    return every


def report(config: Config, found: dict[Cell, Record]) -> list[str | Table]:
    """Errors and changes; or, to tune, the errors by learning rate."""
    if config.tune:
        table = Table("network", "changed", *map(str, RATES), box=box.MARKDOWN)
        for which in itertools.product(WITH, (NOTHING, EVERYTHING)):
            each = (percent(errors(config, found, *which, rate)) for rate in RATES)
            table.add_row(WITH[which[0]], which[1], *each)
        return ["Error on held-out images (%) by learning rate", table]
    table, changes = Table(box=box.MARKDOWN), Table(box=box.MARKDOWN)
    columns = [
        f"{kind}: {part}" for kind in WITH.values() for part in ("test", "train")
    ]
    for each, names in ((table, columns), (changes, (*WITH.values(), "less with BN"))):
        each.add_column("changed", no_wrap=True)
        for name in names:
            each.add_column(name, justify="right", no_wrap=True)
    for change in (NOTHING, *config.changes):
        kinds = itertools.product(WITH, ("error", "training"))
        row = (errors(config, found, n, change, field=field) for n, field in kinds)
        table.add_row(change, *map(percent, row))
    for change, finding in findings(config, found).items():
        changes.add_row(change, *map(str, finding))
    return [
        "Error (%) on test and on training images, ± deviation over the seeds",
        table,
        "What each change costs in test error (points, 95 % intervals)",
        changes,
    ]


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Bars of the costs, with 95 % intervals and the seeds as dots."""
    if config.tune:
        return []
    task = TASKS[config.data]
    title = (
        f"{panels.DATA[config.data]}, {task.images:,} training images, "
        f"{config.steps or task.steps:,} steps of {config.batch_size}: what each "
        f"change costs; mean of {len(config.seeds)} seeds, and its 95 % interval"
    )
    figure, (axes,) = panels.make(title, (8.6, 4.2), 1, 1)
    places = np.arange(len(config.changes))
    for normalize, colour, shift in ((True, "bn", -0.2), (False, "plain", 0.2)):
        each = [costs(config, found, normalize, change) for change in config.changes]
        known = list(map(interval, each))
        base = percent(errors(config, found, normalize, NOTHING))
        label = f"{WITH[normalize]} (nothing changed: {base} %)"
        style: Any = {"color": panels.COLOURS[colour], "alpha": 0.75, "ecolor": "0.2"}
        halves = [part.half if np.isfinite(part.half) else 0 for part in known]
        means, y = [part.mean for part in known], places + shift
        axes.barh(y, means, 0.4, xerr=halves, label=label, capsize=2, **style)
        axes.plot(np.array(each), y[:, None], ".", color="0.2", ms=3)
    panels.label(axes, "", "cost in test error (percentage points)", "changed")
    axes.set_yticks(places, config.changes)
    axes.invert_yaxis()
    axes.axvline(0, color="0.2", lw=0.8)
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, frameon=False)
    path = folder / f"regularization_{config.data}.png"
    panels.save(figure, path)
    return [path]


STUDY = Study(
    "regularization",
    cells,
    train,
    report,
    draw,
    smoke={
        "data": "digits",
        "changes": (EVERYTHING,),
        "steps": 20,
        "seeds": (0,),
    },
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
