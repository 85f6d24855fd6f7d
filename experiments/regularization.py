"""What dropout, L2, LRN, augmentation and shuffling are worth with BN and without.

    python -m experiments.regularization
    python -m experiments.regularization --tune             # learning rates
    python -m experiments.regularization --data cifar10     # not measured yet

Time: two minutes for the digits on two CPU cores; --smoke takes seconds. A run
that was stopped goes on where it was.

Expected: with batch normalization, dropout and local response normalization (LRN) can
be removed, L2 cut to a fifth, and photometric distortions be left out, at no cost or at
a gain, and thorough shuffling helps by about one point. Without it, removing them costs
more.

Measured (digits, 2 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %, and
its change in points when one is removed):

                               with BN                without BN
    nothing                   10.0 ± 1.1              33.2 ± 5.3
    dropout                    8.8   -1.2 ± 1.8       18.0   -15.2 ± 4.9
    four fifths of L2         11.9   +1.9 ± 0.5       32.8    -0.5 ± 1.1
    L2                         8.9   -1.1 ± 3.0       30.0    -3.2 ± 0.7
    LRN                        8.2   -1.8 ± 1.4       12.1   -21.1 ± 1.9
    distortions               11.1   +1.1 ± 3.0       28.9    -4.4 ± 8.0
    augmentation               6.0   -4.0 ± 1.1        6.9   -26.4 ± 4.4
    shuffling across shards   10.8   +0.8 ± 2.5       28.2    -5.0 ± 4.6
    all shuffling             11.0   +1.0 ± 3.5       26.2    -7.0 ± 4.9
    as in the paper            6.4   -3.6 ± 1.9       10.6   -22.6 ± 6.9
    all but shuffling          5.5   -4.5 ± 1.4        7.8   -25.5 ± 6.0

With BN, dropout and LRN are removed at no cost that two seeds can show. What shuffling
is worth they cannot tell from nothing (1.0 ± 3.5 points). Without BN, contrary to what
was expected, every regularizer costs more than it gains: after 300 steps with all of
them that network is underfitted. What their removal costs a plain network that has
converged is not shown here.

Each of the two networks is trained with everything on, and with one thing removed at a
time (`REMOVED`). The same seed gives all networks of a kind the same batches and first
weights, and changes are taken seed by seed. CIFAR-10 is trained on 2,500 images: all
50,000 are seen too seldom in these steps to be learned by heart. Its rates are guesses.
The rates of the digits have the least error on held-out images, on average over
everything on and everything removed.

To change the data, see `TASKS` and `load`; the model, `Network`; the schedule,
`descent`; what is removed, `REMOVED`.

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
from experiments.common import images, panels, study
from experiments.common.images import Split
from experiments.common.results import Record
from experiments.common.study import Settings, Study, Trained

RATES = (0.03, 0.1, 0.3, 1.0)  # tried by --tune
WITH = {True: "with BN", False: "without BN"}
ON: dict[str, Any] = {
    "dropout": 0.4,
    "decay": 5e-4,
    "lrn": True,
    "augmentation": "strong",
    "shuffling": "full",
}
NOTHING, EVERYTHING = "nothing", "all but shuffling"
REMOVED: dict[str, dict[str, Any]] = {
    NOTHING: {},
    "dropout": {"dropout": 0.0},
    "four fifths of L2": {"decay": ON["decay"] / 5},
    "L2": {"decay": 0.0},
    "LRN": {"lrn": False},
    "distortions": {"augmentation": "weak"},
    "augmentation": {"augmentation": "none"},
    "shuffling across shards": {"shuffling": "within shards"},
    "all shuffling": {"shuffling": "none"},
    "as in the paper": {
        "dropout": 0.0,
        "decay": ON["decay"] / 5,
        "lrn": False,
        "augmentation": "weak",
    },
    EVERYTHING: {"dropout": 0.0, "decay": 0.0, "lrn": False, "augmentation": "none"},
}


class Task(NamedTuple):
    """What depends on the data."""

    images: int  # of training
    held_out: int  # for --tune: the last ones of the training images
    steps: int  # of training
    widths: tuple[int, ...]  # the channels of each convolution
    strides: tuple[int, ...]
    padding: int  # the most pixels that an image is moved by
    flip: bool  # whether half of the images are mirrored
    center: float  # what is subtracted from pixels
    spread: float  # what they are then divided by
    white: float  # the largest value of a pixel
    rates: dict[bool, float]  # of learning, with batch normalization and without


TASKS = {
    "digits": Task(
        images=1_097,
        held_out=300,
        steps=300,
        widths=(16, 32, 64),
        strides=(2, 2, 2),
        padding=1,
        flip=False,
        center=0.0,
        spread=1.0,
        white=1.0,
        rates={True: 0.3, False: 0.3},
    ),
    "cifar10": Task(
        images=2_500,
        held_out=5_000,
        steps=500,
        widths=(12, 24, 24, 48, 48, 48),
        strides=(2, 2, 1, 2, 1, 1),
        padding=4,
        flip=True,
        center=120.0,
        spread=64.0,
        white=255.0,
        rates={True: 0.1, False: 0.03},
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    removed: tuple[str, ...] = tuple(REMOVED)[1:]
    """What is removed, one of these at a time, and compared to nothing removed."""
    steps: int | None = None
    """Of training; None: as many as suit the data."""
    batch_size: int = 64
    """Images per step."""
    seeds: tuple[int, ...] = (0, 1)
    """Each gives the first weights and the batches of one training of each kind."""
    tune: bool = False
    """Compare learning rates on images held out of training, and do nothing else."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides the result of a training."""

    data: str
    normalize: bool
    dropout: float
    decay: float
    lrn: bool
    augmentation: Literal["none", "weak", "strong"]
    shuffling: Literal["full", "within shards", "none"]
    seed: int
    rate: float
    images: int
    steps: int
    batch_size: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    measured: Literal["test", "validation"]


def cell_of(
    config: Config, normalize: bool, removed: str, seed: int, rate: float | None = None
) -> Cell:
    """One training; without a rate, at the one that was chosen."""
    task = TASKS[config.data]
    return Cell(
        data=config.data,
        normalize=normalize,
        **(ON | REMOVED[removed]),
        seed=seed,
        rate=rate or task.rates[normalize],
        images=task.images,
        steps=config.steps or task.steps,
        batch_size=config.batch_size,
        widths=task.widths,
        strides=task.strides,
        measured="validation" if config.tune else "test",
    )


def cells(config: Config) -> list[Cell]:
    """Every training of a run."""
    if unknown := set(config.removed) - REMOVED.keys():
        raise ValueError(
            f"received {unknown} to be removed: expected some of {[*REMOVED]}. "
            "Quote what has spaces."
        )
    if config.tune:
        tried = itertools.product(WITH, (NOTHING, EVERYTHING), config.seeds, RATES)
        return [cell_of(config, *which) for which in tried]
    every = itertools.product(WITH, (NOTHING, *config.removed), config.seeds)
    return [cell_of(config, *which) for which in every]


# Data


def load(name: str, data_dir: Path | None) -> dict[str, Split]:
    """The images "train", "validation" and "test"; pixels of the digits are 0 or 1."""
    train, test = images.load(name, data_dir)
    if name == "digits":
        train, test = images.binary(train, test)
    return images.hold_out(train, test, TASKS[name].held_out)._asdict()


def batches(cell: Cell) -> np.ndarray:
    """Numbers of examples, (step, example), epoch by epoch without replacement.

    The last examples of an epoch, which fill no batch, are left out.
    """
    random = np.random.default_rng(cell.seed)
    whole = cell.images // cell.batch_size * cell.batch_size
    first = random.permutation(cell.images)[:whole]
    epochs = [first]
    while len(epochs) * whole < cell.steps * cell.batch_size:
        if cell.shuffling == "none":  # the same batches in each epoch
            epochs.append(first)
        elif cell.shuffling == "full":
            epochs.append(random.permutation(cell.images)[:whole])
        else:  # ten shards follow on each other, and each is shuffled anew
            shards = np.array_split(first, 10)
            epochs.append(np.concatenate([random.permutation(s) for s in shards]))
    return np.concatenate(epochs).reshape(-1, cell.batch_size)[: cell.steps]


def augment(cell: Cell, key: jax.Array, images: Any) -> jax.Array:
    """Images of the same shape, each changed by itself."""
    task = TASKS[cell.data]
    if cell.augmentation == "none":
        return images
    if cell.augmentation == "strong":
        key, lights = jax.random.split(key)
    moves, mirrors = jax.random.split(key)
    images = move(moves, images, task.padding)
    if task.flip:
        mirrored = jax.random.bernoulli(mirrors, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if cell.augmentation == "strong":
        images = distort(lights, images, task.white)
    return images


def move(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Each image shifted by up to `padding` pixels; what comes into sight is black."""
    count, *shape = images.shape
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    return jax.vmap(crop)(padded, corners)


def distort(key: jax.Array, images: jax.Array, white: float) -> jax.Array:
    """Brightness, contrast and colour each times 0.5 to 1.5; float32 in [0, white].

    Contrast is the distance from the image's mean, colour that from a pixel's.
    """
    shape = (3, len(images), 1, 1, 1)
    factors = jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5)
    bright = images.astype(jnp.float32) * factors[0]
    mean = bright.mean((1, 2, 3), keepdims=True)
    contrasted = mean + (bright - mean) * factors[1]
    grey = contrasted.mean(3, keepdims=True)  # of a grey image: itself
    return jnp.clip(grey + (contrasted - grey) * factors[2], 0, white)


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
        cell, task = self.cell, TASKS[self.cell.data]
        x = (jnp.asarray(x, jnp.float32) - task.center) / task.spread
        init = nn.initializers.he_normal()
        # 1e-4 is the alpha of Krizhevsky et al., whose pixels go to 255.
        alpha = 1e-4 * (255 * task.spread / task.white) ** 2
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


def descent(steps: int, rate: Any, decay: Any) -> optax.GradientTransformation:
    """Nesterov's, with L2 on kernels; the rate rises, then falls as a cosine."""
    height = optax.warmup_cosine_decay_schedule(0, 1, steps // 10, steps)
    return optax.chain(
        optax.add_decayed_weights(decay, bnjax.training.weight_decay_mask),
        optax.sgd(lambda step: rate * height(step), momentum=0.9, nesterov=True),
    )


@functools.partial(jax.jit, static_argnums=0)
def init(cell: Cell, key: jax.Array, images: jax.Array):
    """The variables, and the optimizer's state, before the first step."""
    variables = Network(cell).init(key, images, train=False)
    return variables, descent(cell.steps, 0.0, 0.0).init(variables["params"])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(cell: Cell, variables, optimizer, key, data: Split, batch, rate, decay):
    """Both after a step on the examples `batch` of the data."""
    augment_key, dropout_key = jax.random.split(key)

    def loss_fn(params):
        logits, updates = Network(cell).apply(
            {**variables, "params": params},
            augment(cell, augment_key, data.images[batch]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, data.labels[batch]
        )
        return losses.mean(), updates

    params = variables["params"]
    grads, updates = jax.grad(loss_fn, has_aux=True)(params)
    transformation = descent(cell.steps, rate, decay)
    change, optimizer = transformation.update(grads, optimizer, params)
    params = optax.apply_updates(params, change)
    return {**variables, **updates, "params": params}, optimizer


@functools.partial(jax.jit, static_argnums=0)
def evaluate(cell: Cell, variables: Any, data: Split) -> jax.Array:
    """How many answers are right, by the running statistics."""
    logits: Any = Network(cell).apply(variables, data.images, train=False)
    return (logits.argmax(-1) == data.labels).sum()


def train_cell(cell: Cell, data: dict[str, Split]) -> Record:
    """The share of wrong answers of one network, after its training."""
    # Cells that differ in nothing but these are compiled once.
    alike = dataclasses.replace(
        cell, seed=0, rate=0.0, decay=0.0, shuffling="full", measured="test"
    )
    known = jax.tree.map(lambda part: jnp.asarray(part[: cell.images]), data["train"])
    weights, key = jax.random.split(jax.random.key(cell.seed))
    state = init(alike, weights, known.images[:2])
    for step, batch in enumerate(batches(cell)):
        of_step = jax.random.fold_in(key, step)
        state = train_step(alike, *state, of_step, known, batch, cell.rate, cell.decay)
    test = data[cell.measured]
    right = evaluate(alike, state[0], test)
    return {"error": 1 - float(right) / len(test.labels)}


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The error of each network."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        result = train_cell(cell, data)
        shown = f"{WITH[cell.normalize]}: {result['error']:.1%} wrong"
        yield Trained(cell, result, shown)


# Tables and picture


def errors(
    config: Config,
    found: dict[Cell, Record],
    normalize: bool,
    removed: str,
    rate: float | None = None,
) -> np.ndarray:
    """(seed,), in percent; NaN for what is not trained yet."""
    cells = (cell_of(config, normalize, removed, s, rate) for s in config.seeds)
    return np.array([100 * found[c]["error"] if c in found else np.nan for c in cells])


def spread(values: np.ndarray, sign: str = "") -> str:
    """(seed,) -> mean and standard deviation (n - 1)."""
    if len(values) < 2:
        return f"{values.mean():{sign}.1f}"
    return f"{values.mean():{sign}.1f} ± {values.std(ddof=1):.1f}"


def report(config: Config, found: dict[Cell, Record]) -> list[str | Table]:
    """Errors and changes; or, to tune, the errors by learning rate."""
    if config.tune:
        table = Table("network", "removed", *map(str, RATES), box=box.MARKDOWN)
        for which in itertools.product(WITH, (NOTHING, EVERYTHING)):
            each = (spread(errors(config, found, *which, rate)) for rate in RATES)
            table.add_row(WITH[which[0]], which[1], *each)
        return ["Error on held-out images (%) by learning rate", table]
    table = Table("removed", box=box.MARKDOWN)
    for kind in WITH.values():
        table.add_column(f"{kind}: error (%)", justify="right", no_wrap=True)
        table.add_column("change", justify="right", no_wrap=True)
    for removed in (NOTHING, *config.removed):
        row = []
        for normalize in WITH:
            error = errors(config, found, normalize, removed)
            change = error - errors(config, found, normalize, NOTHING)
            row += [spread(error), spread(change, "+") if removed != NOTHING else ""]
        table.add_row(removed, *row)
    title = "Test error and its change (%, ± over the seeds), by what was removed"
    return [title, table]


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Bars of the changes, with one standard deviation and the seeds as dots."""
    if config.tune:
        return []
    title = (
        f"{panels.DATA[config.data]}, {config.steps or TASKS[config.data].steps:,} "
        f"steps of {config.batch_size} images: what removing each costs; mean and "
        f"deviation of {len(config.seeds)} seeds"
    )
    figure, (axes,) = panels.make(title, (8.6, 5.0), 1, 1)
    places = np.arange(len(config.removed))
    for normalize, colour, shift in ((True, "bn", -0.2), (False, "plain", 0.2)):
        base = errors(config, found, normalize, NOTHING)
        each = [
            errors(config, found, normalize, name) - base for name in config.removed
        ]
        change = np.array(each).T  # (seed, removed)
        deviation = change.std(0, ddof=1) if len(change) > 1 else None
        colour = panels.COLOURS[colour]
        label = f"{WITH[normalize]} (all on: {spread(base)} %)"
        style = {"color": colour, "alpha": 0.75, "capsize": 2, "ecolor": "0.2"}
        y = places + shift
        axes.barh(y, change.mean(0), 0.4, xerr=deviation, label=label, **style)
        axes.plot(change.T, y, ".", color="0.2", ms=3)
    panels.label(axes, "", "change of the test error (percentage points)", "removed")
    axes.set_yticks(places, config.removed)
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
        "removed": ("all shuffling",),
        "steps": 20,
        "seeds": (0,),
    },
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
