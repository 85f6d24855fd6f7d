"""Section 4.2 of the batch normalization paper: Inception in a fraction of the steps.

    python -m experiments.inception                      # seven models on CIFAR-10
    python -m experiments.inception --ablate             # BN-x5 but for each change
    python -m experiments.inception --ensemble 4         # figure 4
    python -m experiments.inception --tune --steps 1500 --evaluate-every 500
    python -m experiments.inception --data imagenet --data-dir FOLDER --divisor 1 \
        --modules 3a 3b 3c 4a 4b 4c 4d 4e 5a 5b --learning-rate 0.0015 \
        --steps 1000000 --evaluate-every 20000

Time: 41 minutes on two CPU cores, --ablate 45, --ensemble 4 25 (both measured on a busy
machine), --tune ten; --smoke takes seconds. A run that was stopped goes on from its
last measurement.

Expected: to the best accuracy of Inception, the same network with batch normalization
needs fewer than half the steps, BN-x5 (five times the rate, and what else section
4.2.1 changes) fewer still; BN-x30 ends highest; BN-x5-Sigmoid trains. Without
normalization, five times the rate diverges, and sigmoids stay at chance.

Measured (CIFAR-10, 6,000 steps, 1 seed, jax 0.10.2, two cores of an AMD EPYC; accuracy
on the test images in %, measured every 300 steps):

                            to 53.08 %          best    steps in the   best in
                         steps     share                   paper      the paper
    Inception            5,700      1.00       53.08      31.0e6       72.2
    BN-Baseline          1,800      0.32       71.74      13.3e6       72.7
    BN-x5                1,500      0.26       73.15       2.1e6       73.0
    BN-x30               3,000      0.53       65.79       2.7e6       74.8
    BN-x5-Sigmoid        2,100      0.37       71.59          -        69.8
    Inception, x5            -         -       10.00          -    diverged
    Inception, sigmoid       -         -       10.00          -         0.1

As expected, but for two things. BN-x30 is the worst of those with batch normalization:
the rate of 0.03 is the largest of the grid that Inception trains at (best of 1,500
steps on held-out images: 20.7, 25.4, 33.9, 34.6 and 10.4 % at 0.001, 0.003, 0.01, 0.03
and 0.1), and thirty times as much is 0.9. From 0.01 (--models bn_x5 bn_x30
--learning-rate 0.01) both end about alike, at 71.61 and 71.03. And BN-x5 is not 14
times as fast as Inception but 4 times, of 6,000 steps where the paper has 31e6. At
chance, 10 %, are the two that fail; their losses stay finite.

Taken back one at a time (--ablate), what BN-x5 ends at best:

    higher rate        68.96      faster decay              72.02
    less distortion    69.32      no LRN                    73.01
    no dropout         69.98      shuffling within shards   73.14
                                  less L2                   73.51

The rate, weaker distortions and the missing dropout are what BN-x5 gains by; the others
are within what one seed can tell. Four varied BN-x30 (--ensemble 4) are right on 62.4,
61.5, 61.1 and 62.5 %, and together on 66.35: 4.5 points more than on average (in the
paper 1.9, of six, with many crops of each image).

The network has six of the paper's ten modules, at an eighth of its widths; for
ImageNet, with the options above, it is that of figure 5, with 11.2e6 parameters (the
paper says 13.6e6). To change the data, see `in_memory` and `photos`; the model,
`Inception`; the optimizer or schedule, `optimizer`; how models are trained, `Recipe`.

References: Ioffe & Szegedy 2015, sections 4.2.1 to 4.2.3, figures 2 to 5; Szegedy et
al. 2014 (the network, its crops); Howard 2013 (the changes of colour).
"""

import dataclasses
import functools
import hashlib
import io
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance
from rich import box
from rich.table import Table

import bnjax
from experiments.common import images, panels, results, study
from experiments.common.images import DataError, Split
from experiments.common.results import Record
from experiments.common.study import Settings, Study, Trained

# Models


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; the original Inception, unless told otherwise."""

    normalize: bool = False
    activation: Literal["relu", "sigmoid"] = "relu"
    rate: float = 1.0  # a factor of the learning rate
    no_dropout: bool = False
    less_l2: bool = False  # a fifth of it
    faster_decay: bool = False  # of the learning rate, six times as fast
    no_lrn: bool = False
    shuffle: bool = False  # the examples inside of each shard
    less_distortion: bool = False  # colours are changed by a fifth, not by a half
    weights: float = 1.0  # the standard deviation of the first kernels, over He's


ORIGINAL = Recipe()
X5 = Recipe(True, "relu", 5.0, True, True, True, True, True, True)
X30 = dataclasses.replace(X5, rate=30.0)
MODELS = {
    "inception": ORIGINAL,
    "bn_baseline": Recipe(normalize=True),
    "bn_x5": X5,
    "bn_x30": X30,
    "bn_x5_sigmoid": dataclasses.replace(X5, activation="sigmoid"),
    "inception_x5": Recipe(rate=5.0),
    "sigmoid": Recipe(activation="sigmoid"),
}
PAPER = {
    "inception": ("Inception", "31.0e6", "1.00", "72.2"),
    "bn_baseline": ("BN-Baseline", "13.3e6", "0.43", "72.7"),
    "bn_x5": ("BN-x5", "2.1e6", "0.07", "73.0"),
    "bn_x30": ("BN-x30", "2.7e6", "0.09", "74.8"),
    "bn_x5_sigmoid": ("BN-x5-Sigmoid", "-", "-", "69.8"),
    "inception_x5": ("Inception, x5", "-", "-", "diverged"),
    "sigmoid": ("Inception, sigmoid", "-", "-", "0.1"),
}
"""The name, the steps to Inception's best accuracy, their share, and the best in %."""
CHANGES = {
    "rate": "higher rate",
    "no_dropout": "no dropout",
    "less_l2": "less L2",
    "faster_decay": "faster decay",
    "no_lrn": "no LRN",
    "shuffle": "shuffling in shards",
    "less_distortion": "less distortion",
}
"""Those of section 4.2.1; --ablate takes one back at a time."""
COLOURS = "#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # tried by --tune


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings that all trainings of a run have in common."""

    data: Literal["digits", "cifar10", "imagenet"] = "cifar10"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once;
    ImageNet is read from --data-dir: Parquet files, or train/class/ and val/class/."""
    modules: tuple[str, ...] = ("3a", "3c", "4a", "4e", "5a", "5b")
    """Which ones of the paper's figure 5."""
    divisor: int = 8
    """Of the paper's widths; 1 for its own network."""
    steps: int = 6000
    """Of each training."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 0.03
    """Of Inception and of BN-Baseline, at first; see --tune."""
    decay: float = 0.5
    """What is left of the rate at the end; with faster decay its sixth power."""
    l2: float = 1e-4
    """The decay of kernels per step, over the learning rate."""
    dropout: float = 0.4
    """The share of features that are dropped before the last matrix."""
    evaluate_every: int = 300
    """Steps between two measurements on the test images, and two checkpoints."""


@dataclasses.dataclass(frozen=True)
class Config(Training, Settings):
    """The settings of a run; each is an option of the command line."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which ones of these are trained."""
    seeds: tuple[int, ...] = (0,)
    """Of the weights and the order of the images: one training of each model."""
    ablate: bool = False
    """Train BN-x5 without each of the seven changes instead."""
    ensemble: int = 0
    """Train so many varied BN-x30, and let them vote, instead."""
    tune: bool = False
    """Train Inception at several rates, and measure on held-out images, instead."""


@dataclasses.dataclass(frozen=True)
class Cell(Training):
    """All that decides the result of a training."""

    model: str = "inception"
    recipe: Recipe = ORIGINAL
    seed: int = 0
    held_out: bool = False  # test on a tenth of the training images


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that vote."""

    members: tuple[Cell, ...]


def cell_of(config: Config, model: str, recipe: Recipe, **others: Any) -> Cell:
    """One training with the settings of a run, but for the others."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Training)}
    return Cell(**fields | {"model": model, "recipe": recipe, **others})


def cells(config: Config) -> Sequence[Cell | Ensemble]:
    """Every training of a run."""
    if config.tune:
        tried = functools.partial(cell_of, config, "inception", ORIGINAL, held_out=True)
        return [tried(learning_rate=rate) for rate in RATES]
    if config.ensemble:  # varied as in section 4.2.3: larger weights, some dropout
        members = []
        for i in range(config.ensemble):
            weights, dropout = (1.0, 1.0, 1.5, 1.5)[i % 4], (0.05, 0.1)[i % 2]
            recipe = dataclasses.replace(X30, no_dropout=False, weights=weights)
            members.append(cell_of(config, "bn_x30", recipe, seed=i, dropout=dropout))
        return [Ensemble(tuple(members))]
    if config.ablate:
        recipes = {"inception": ORIGINAL, "bn_x5": X5}
        for change in CHANGES:
            without = {change: getattr(ORIGINAL, change)}
            recipes[change] = dataclasses.replace(X5, **without)
    elif unknown := set(config.models) - MODELS.keys():
        raise ValueError(f"received the models {unknown}: expected some of {[*MODELS]}")
    else:
        recipes = {name: MODELS[name] for name in config.models}
    return [
        cell_of(config, name, recipe, seed=seed)
        for seed in config.seeds
        for name, recipe in recipes.items()
    ]


# Data


class Data(NamedTuple):
    """Training and test examples by their numbers, and what they have in common."""

    counts: tuple[int, int]
    shape: tuple[int, ...]
    classes: int
    training: Callable[[int, np.random.Generator, float], Split]
    """(number, rng, how much colours are changed) -> a training example, augmented."""
    testing: Callable[[int], Split]


def load(config: Config) -> Data:
    """The data of a run; to tune, the last tenth of the training images is the test."""
    if config.data == "imagenet":
        if config.tune:
            raise ValueError("received --tune --data imagenet: expected other data")
        return photos(config.data_dir)
    train, test = images.load(config.data, config.data_dir)
    if config.tune:
        cut = len(train.labels) - len(train.labels) // 10
        test = Split(train.images[cut:], train.labels[cut:])
        train = Split(train.images[:cut], train.labels[:cut])
    if config.data == "digits":  # pixels from 0 to 16
        train, test = (Split(15 * part.images, part.labels) for part in (train, test))
        return in_memory(train, test, padding=1, flip=False)
    return in_memory(train, test, padding=4, flip=True)


def in_memory(train: Split, test: Split, padding: int, flip: bool) -> Data:
    """Images of one size; those of training are moved by up to `padding` pixels."""
    shape = height, width, channels = train.images.shape[1:]
    border = (padding, padding)

    def training(number: int, rng: np.random.Generator, amount: float) -> Split:
        moves = 2 * padding + 1
        top, left, mirrored = rng.integers((moves, moves, 2))
        image = np.pad(train.images[number], (border, border, (0, 0)))
        image = image[top : top + height, left : left + width]
        image = image[:, ::-1] if flip and mirrored else image
        pixels = Image.fromarray(image.squeeze(2) if channels == 1 else image)
        image = np.asarray(change_colours(pixels, rng, amount)).reshape(shape)
        return Split(image, train.labels[number])

    def testing(number: int) -> Split:
        return Split(test.images[number], test.labels[number])

    counts = len(train.labels), len(test.labels)
    return Data(counts, shape, 1 + int(train.labels.max()), training, testing)


def photos(data_dir: Path | None, size: int = 224) -> Data:
    """Photographs of any size on disk, decoded when they are needed.

    A damaged training image is replaced by the next one, so that the batch of a step
    follows from the seed; a damaged test image has the label -1, and does not count.
    """
    import datasets  # slow to import, and not needed for the digits

    datasets.disable_progress_bars()
    try:
        if data_dir is None or not data_dir.is_dir():
            raise FileNotFoundError("it is no folder")
        found = datasets.load_dataset(str(data_dir))
        train, test = (
            found[split].cast_column("image", datasets.Image(decode=False))
            for split in ("train", "validation")
        )
        classes = train.features["label"].num_classes
    except Exception as error:  # of many packages: files, folders, Parquet
        raise DataError(
            f"ImageNet cannot be read from {data_dir}: {type(error).__name__}: {error}."
            " Expected images in train/class/ and val/class/, or Parquet files; name "
            "their folder by --data-dir."
        ) from error

    def training(number: int, rng: np.random.Generator, amount: float) -> Split:
        for row in (train[n % len(train)] for n in range(number, number + len(train))):
            if (image := opened(row)) is not None:
                box = crop(*image.size, rng)
                image = image.resize((size, size), Image.Resampling.BILINEAR, box)
                if rng.integers(2):
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                image = np.asarray(change_colours(image, rng, amount))
                return Split(image, np.array(row["label"], np.int32))
        raise DataError("no training image can be decoded: expected JPEG or PNG files.")

    def testing(number: int) -> Split:
        row = test[number]
        if (image := opened(row)) is None:
            return Split(np.zeros((size, size, 3), np.uint8), np.array(-1, np.int32))
        side = min(image.size) * size / 256  # of the square in the middle
        left, top = ((whole - side) / 2 for whole in image.size)
        middle = left, top, left + side, top + side
        image = image.resize((size, size), Image.Resampling.BILINEAR, middle)
        return Split(np.asarray(image), np.array(row["label"], np.int32))

    counts = len(train), len(test)
    return Data(counts, (size, size, 3), classes, training, testing)


def opened(row: dict) -> Image.Image | None:
    """The image of a row in RGB; one that is damaged is reported, and is None."""
    content, path = row["image"]["bytes"], row["image"]["path"]
    try:
        image = Image.open(io.BytesIO(content or Path(path).read_bytes()))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises
        warnings.warn(f"left out {path}, which cannot be decoded", stacklevel=2)
        return None


def crop(width: int, height: int, rng: np.random.Generator) -> Any:
    """The edges of a part of an image: 8 to 100 % of it, with sides of 3:4 to 4:3."""
    area = width * height * rng.uniform(0.08, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = max(1, min(width, round(math.sqrt(area * aspect))))
    h = max(1, min(height, round(math.sqrt(area / aspect))))
    left, top = rng.integers((width - w + 1, height - h + 1)).tolist()
    return left, top, left + w, top + h


def change_colours(
    image: Image.Image, rng: np.random.Generator, amount: float
) -> Image.Image:
    """Brightness, contrast and saturation times 1 + U(-a, a) each, in random order."""
    changes = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for index in rng.permutation(len(changes)):
        image = changes[index](image).enhance(1 + rng.uniform(-amount, amount))
    return image


@functools.lru_cache(maxsize=4)  # epochs that threads read at the same time
def epoch_order(seed: int, count: int, within: bool, epoch: int) -> np.ndarray:
    """The examples of an epoch.

    They are dealt into shards of 1,024 once. In each epoch the shards come in another
    order; `within` says whether they are shuffled inside too, or read as they were
    written, so that the same examples always meet in a batch.
    """
    dealt = np.random.default_rng((seed, 0)).permutation(count)
    shards = np.split(dealt, range(1024, count, 1024))
    random = np.random.default_rng((seed, 1, epoch))
    turn = [shards[index] for index in random.permutation(len(shards))]
    return np.concatenate([random.permutation(s) if within else s for s in turn])


def training_batches(data: Data, cell: Cell) -> grain.MapDataset:
    """Item k is the batch of step k, and follows from the seed and k alone."""
    count = data.counts[0]
    amount = 0.2 if cell.recipe.less_distortion else 0.5

    def at(position: int) -> int:
        epoch, place = divmod(position, count)
        return int(epoch_order(cell.seed, count, cell.recipe.shuffle, epoch)[place])

    examples = grain.MapDataset.range(count * 10**6).seed(cell.seed).map(at)
    augmented = examples.random_map(lambda n, rng: data.training(n, rng, amount))
    return augmented.batch(cell.batch_size)


def read(batches: grain.MapDataset, step: int = 0) -> Iterator[Split]:
    """The batches from `step` on, read ahead by threads."""
    threads = max(2, min(16, results.cores()))
    return iter(batches[step:].to_iter_dataset(grain.ReadOptions(threads)))


# Network


def local_response_norm(x: jax.Array) -> jax.Array:
    """Divides each value by the strength of the channels around its own.

    y_i = x_i / (2 + 1e-4 sum_j x_j^2)^0.75,  |j - i| <= 2 (Krizhevsky et al. 2012)
    """
    window, strides = (1, 1, 1, 5), (1, 1, 1, 1)
    sums = lax.reduce_window(x**2, np.float32(0), lax.add, window, strides, "SAME")
    return x / (2 + 1e-4 * sums) ** 0.75


def pool(x: jax.Array, kind: str, strides: int) -> jax.Array:
    """The mean or the maximum of 3x3 windows, padded as "SAME" (zeros are counted).

    One axis after the other, by slices: with the derivative 2.5 to 9 times as fast as
    XLA's windows (maps of 16x16 and 8x8, two cores of an AMD EPYC, jax 0.10.2).
    """
    fill = 0 if kind == "mean" else -jnp.inf
    for axis in (1, 2):
        size = x.shape[axis]
        last = (-(-size // strides) - 1) * strides  # where the last window begins
        missing = max(last + 3 - size, 0)
        padding = [(0, 0)] * x.ndim
        padding[axis] = missing // 2, missing - missing // 2
        padded = jnp.pad(x, padding, constant_values=fill)
        a, b, c = (
            lax.slice_in_dim(padded, start, start + last + 1, strides, axis)
            for start in range(3)
        )
        x = (a + b + c) / 3 if kind == "mean" else jnp.maximum(jnp.maximum(a, b), c)
    return x


class Convolution(nn.Module):
    """A convolution, batch-normalized or with a bias, and its nonlinearity."""

    features: int
    kernel: int
    strides: int
    cell: Cell

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        recipe = self.cell.recipe
        activation = {"relu": nn.relu, "sigmoid": nn.sigmoid}[recipe.activation]
        x = nn.Conv(
            self.features // self.cell.divisor,
            (self.kernel, self.kernel),
            self.strides,
            use_bias=not recipe.normalize,
            kernel_init=nn.initializers.variance_scaling(
                2.0 * recipe.weights**2, "fan_in", "truncated_normal"
            ),
            name="conv",
        )(x)
        if not recipe.normalize:
            return activation(x)
        return bnjax.BatchNorm(
            not train, momentum=0.95, activation=activation, name="bn"
        )(x)


MODULES = {
    "3a": (64, (64, 64), (64, 96), "mean", 32),
    "3b": (64, (64, 96), (64, 96), "mean", 64),
    "3c": (0, (128, 160), (64, 96), "max", 0),
    "4a": (224, (64, 96), (96, 128), "mean", 128),
    "4b": (192, (96, 128), (96, 128), "mean", 128),
    "4c": (160, (128, 160), (128, 160), "mean", 96),
    "4d": (96, (128, 192), (160, 192), "mean", 96),
    "4e": (0, (128, 192), (192, 256), "max", 0),
    "5a": (352, (192, 320), (160, 224), "mean", 128),
    "5b": (352, (192, 320), (192, 224), "max", 128),
}
"""Figure 5: the features of a 1x1 convolution; of a 1x1 and a 3x3; of a 1x1 and two
3x3; what is taken of windows of 3x3, and the features of a 1x1 after it. Instead of 0
features there is no convolution; a module without the last one has stride 2."""


class Module(nn.Module):
    """One Inception module: four branches, whose outputs are put side by side."""

    widths: tuple
    cell: Cell

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(x, name, features, kernel, strides=1):
            layer = Convolution(features, kernel, strides, self.cell, name=name)
            return layer(x, train)

        one, three, double, kind, projection = self.widths
        strides = 1 if projection else 2
        branches = [conv(x, "one", one, 1)] if one else []
        y = conv(x, "three_reduce", three[0], 1)
        branches.append(conv(y, "three", three[1], 3, strides))
        y = conv(x, "double_reduce", double[0], 1)
        y = conv(y, "double_1", double[1], 3)
        branches.append(conv(y, "double_2", double[1], 3, strides))
        y = pool(x, kind, strides)
        branches.append(conv(y, "projection", projection, 1) if projection else y)
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """A stem, modules, the mean over space, dropout, a matrix.

    The stem halves small images once, and photographs three times.
    """

    cell: Cell
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits of uint8 images; in training with an rng "dropout"."""
        cell, recipe, small = self.cell, self.cell.recipe, x.shape[1] <= 64
        x = (x.astype(jnp.float32) - 127.5) / 64
        kernel, strides = (3, 1) if small else (7, 2)
        x = Convolution(64, kernel, strides, cell, name="1")(x, train)
        x = x if small else pool(x, "max", 2)
        x = x if recipe.no_lrn else local_response_norm(x)
        x = Convolution(64, 1, 1, cell, name="2_reduce")(x, train)
        x = Convolution(192, 3, 1, cell, name="2")(x, train)
        x = x if recipe.no_lrn else local_response_norm(x)
        x = pool(x, "max", 2)
        for name in cell.modules:
            x = Module(MODULES[name], cell, name=name)(x, train)
        dropout = 0.0 if recipe.no_dropout else cell.dropout
        x = nn.Dropout(dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.classes, name="matrix")(x)


# Training


class State(NamedTuple):
    """All that training changes."""

    params: Any
    batch_stats: Any
    optimizer: optax.OptState


def optimizer(cell: Cell) -> optax.GradientTransformation:
    """Momentum, a rate that decays exponentially, and L2 on kernels."""
    rate = cell.learning_rate * cell.recipe.rate
    steps: Any = cell.steps / (6 if cell.recipe.faster_decay else 1)
    l2 = cell.l2 / (5 if cell.recipe.less_l2 else 1)
    return optax.chain(
        optax.add_decayed_weights(l2, bnjax.training.weight_decay_mask),
        optax.sgd(optax.exponential_decay(rate, steps, cell.decay), momentum=0.9),
    )


def init(model: Inception, blank: jax.Array) -> State:
    """The state before the first step."""
    variables = model.init(jax.random.key(model.cell.seed), blank, train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return State(params, batch_stats, optimizer(model.cell).init(params))


def train_step(model: Inception, state: State, batch: Split):
    """The state after a step, and the loss before it."""
    step = optax.tree_utils.tree_get(state.optimizer, "count")
    key = jax.random.fold_in(jax.random.key(model.cell.seed), step)

    def loss_fn(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), updates.get("batch_stats", {})

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    transformation = optimizer(model.cell)
    change, after = transformation.update(grads, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, change), stats, after), loss


def evaluate(model: Inception, state: State, images: jax.Array) -> Any:
    """The logits, by the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return model.apply(variables, images, train=False)


def train_cell(cell: Cell, data: Data, folder: Path):
    """Trains a network, and saves each measurement with the state in `folder`.

    It goes on from the last one. A batch is split over the devices; all else is copied.

    Returns:
        The curve of the training, and a function that returns the logits and the labels
        of the test images; None instead if the loss is no longer finite.
    """
    devices = jax.devices()[: math.gcd(cell.batch_size, jax.device_count())]
    mesh = Mesh(np.array(devices), ("data",))
    split, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    model = Inception(cell, data.classes)

    def compiled(function, **options):
        function = functools.partial(function, model)
        return jax.jit(function, out_shardings=copied, **options)

    advance, apply = compiled(train_step, donate_argnums=0), compiled(evaluate)
    state = compiled(init)(np.zeros((1, *data.shape), np.uint8))
    batches = training_batches(data, cell)
    tests = grain.MapDataset.range(data.counts[1]).map(data.testing).batch(200)

    def predict():
        found = []
        for batch in read(tests):
            logits = apply(state, jax.device_put(batch.images, copied))
            found.append((np.asarray(logits), batch.labels))
        logits, labels = map(np.concatenate, zip(*found))
        return logits[labels >= 0], labels[labels >= 0]

    curve = {"steps": [], "accuracy": [], "diverged": False, "seconds": 0.0}
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            wanted = ocp.args.Composite(
                state=ocp.args.StandardRestore(state), curve=ocp.args.JsonRestore()
            )
            saved = manager.restore(done, args=wanted)
            state, curve = saved["state"], saved["curve"]
        begin = time.perf_counter() - curve["seconds"]
        steps = range(done + 1, cell.steps + 1)
        for step, batch in zip(steps, read(batches, done)):
            state, loss = advance(state, jax.device_put(batch, split))
            if not math.isfinite(loss):
                seconds = time.perf_counter() - begin
                return {**curve, "diverged": True, "seconds": seconds}, None
            if step % cell.evaluate_every == 0 or step == cell.steps:
                logits, labels = predict()
                accuracy = float((logits.argmax(-1) == labels).mean())
                print(f"{cell.model}, step {step:,}: {accuracy:.2%} are right")
                curve = {
                    "steps": [*curve["steps"], step],
                    "accuracy": [*curve["accuracy"], accuracy],
                    "diverged": False,
                    "seconds": time.perf_counter() - begin,
                }
                both = ocp.args.Composite(
                    state=ocp.args.StandardSave(state), curve=ocp.args.JsonSave(curve)
                )
                manager.save(step, args=both, force=True)
    return curve, predict


def vote(ensemble: Ensemble, data: Data, folder: Path) -> Record:
    """The last accuracies of the members, and that of their mean probabilities."""
    seconds, accuracies, probabilities, labels = 0.0, [], [], np.array([])
    for member in ensemble.members:
        curve, predict = train_cell(member, data, folder / str(member.seed))
        seconds += curve["seconds"]
        if predict is not None:
            logits, labels = predict()
            accuracies.append(float((logits.argmax(-1) == labels).mean()))
            probabilities.append(np.asarray(nn.softmax(logits)))
    mean = np.mean(probabilities, 0) if probabilities else np.zeros((0, 1))
    together = float((mean.argmax(-1) == labels).mean())
    return {
        "members": accuracies,
        "diverged": len(ensemble.members) - len(accuracies),
        "together": together,
        "gain": together - float(np.mean(accuracies)),
        "seconds": seconds,
    }


def train(config: Config, missing: Sequence[Any]) -> Iterator[Trained]:
    """The result of each training, whose checkpoints are removed after it."""
    data = load(config)
    for cell in missing:
        name = hashlib.sha256(study.key(cell).encode()).hexdigest()[:12]
        folder = config.out / "inception" / name
        if isinstance(cell, Ensemble):
            result = vote(cell, data, folder)
            yield Trained(cell, result, f"together {result['together']:.2%}")
        else:
            result, _ = train_cell(cell, data, folder)
            best = max(result["accuracy"], default=math.nan)
            yield Trained(cell, result, f"{cell.model} {best:.2%}")
        shutil.rmtree(folder)  # the result is recorded by now


# Table and picture


class Curve(NamedTuple):
    """The mean of the seeds of a model."""

    name: str
    steps: np.ndarray  # as far as all seeds were measured
    accuracy: np.ndarray
    minutes: float

    def best(self) -> float:
        """The highest accuracy, or NaN."""
        return float(self.accuracy.max()) if len(self.steps) else math.nan

    def steps_to(self, accuracy: float) -> float:
        """The first measured step with that accuracy, or NaN."""
        return float(min(self.steps[self.accuracy >= accuracy], default=math.nan))


def curves(found: dict[Any, Record]) -> dict[str, Curve]:
    """By model."""
    every = {}
    for model in dict.fromkeys(cell.model for cell in found):
        seeds = [result for cell, result in found.items() if cell.model == model]
        name = PAPER[model][0] if model in PAPER else f"BN-x5, not: {CHANGES[model]}"
        name += " (diverged)" if any(result["diverged"] for result in seeds) else ""
        length = min(len(result["steps"]) for result in seeds)
        accuracy = np.mean([result["accuracy"][:length] for result in seeds], 0)
        minutes = np.mean([result["seconds"] for result in seeds]) / 60
        steps = np.array(seeds[0]["steps"][:length])
        every[model] = Curve(name, steps, accuracy, float(minutes))
    return every


def report(config: Config, found: dict[Any, Record]) -> Sequence[Any]:
    """A table; or, of an ensemble and of --tune, sentences."""
    if config.tune:
        lines = [
            f"rate {cell.learning_rate:g}: {max(result['accuracy'], default=0):.2%}"
            for cell, result in found.items()
        ]
        return ["Inception, best accuracy on held-out images by the first rate", *lines]
    if config.ensemble:
        (result,) = found.values()
        members = ", ".join(f"{accuracy:.2%}" for accuracy in result["members"])
        return [
            f"Members: {members}. Together: {result['together']:.2%}, "
            f"{100 * result['gain']:+.2f} points over their mean. (Paper, figure 4: "
            "top-1 error 21.99 % of one, 20.1 % of six, with many crops of an image.)"
        ]
    table = Table(box=box.SIMPLE, show_edge=False)
    table.title = (
        "Steps to Inception's best test accuracy, and the best accuracy\n"
        f"({config.data}, {config.steps:,} steps of {config.batch_size} images)"
    )
    table.add_column("model")
    for name in ("steps", "share", "best %", "minutes"):
        table.add_column(name, justify="right")
    for name in ("steps", "share", "best %"):
        table.add_column(f"paper's\n{name}", justify="right")
    every = curves(found)
    target = every["inception"].best() if "inception" in every else math.nan
    for model, curve in every.items():
        steps = curve.steps_to(target)
        share = steps / every.get("inception", curve).steps_to(target)
        numbers = f"{steps:,.0f}", f"{share:.2f}", f"{100 * curve.best():.2f}"
        shown = ("-" if number == "nan" else number for number in numbers)
        minutes, paper = f"{curve.minutes:.1f}", PAPER.get(model, ("", "", "", ""))
        table.add_row(curve.name, *shown, minutes, *paper[1:])
    return [table]


def draw(config: Config, found: dict[Any, Record], folder: Path) -> Sequence[Path]:
    """Figure 2, with a mark where each model reaches Inception's best accuracy."""
    if config.tune or config.ensemble:
        return []
    title = f"{panels.DATA[config.data]}, batches of {config.batch_size}"
    figure, (axes,) = panels.make(title, (8.0, 4.4), 1, 1)
    every = curves(found)
    target = every["inception"].best() if "inception" in every else math.nan
    for index, curve in enumerate(every.values()):
        # Dashes in the gaps of the line before, which may be at the same height.
        dashed: Any = "-" if index < 5 else (4 * (index % 2), (4, 4))
        colour = COLOURS[index % 7]
        percent = 100 * curve.accuracy
        axes.plot(curve.steps, percent, ls=dashed, label=curve.name, color=colour)
        axes.plot(curve.steps_to(target), 100 * target, "D", color=colour, mec="white")
    axes.axhline(100 * target, color="black", lw=0.8, ls=":")
    panels.label(axes, "", "training steps", "test accuracy (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    kind = "_ablated" if config.ablate else ""
    path = folder / f"inception{kind}_{config.data}.png"
    panels.save(figure, path)
    return [path]


STUDY = Study(
    "inception",
    cells,
    train,
    report,
    draw,
    smoke={
        "data": "digits",
        "models": ("bn_x5",),
        "modules": ("3c",),
        "divisor": 16,
        "steps": 60,
        "evaluate_every": 20,
        "learning_rate": 0.02,
    },
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
