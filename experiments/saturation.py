"""Sigmoid and tanh networks, deep ones too, train with batch normalization.

The worked example of the lessons: activations 4, 7, 5, a batch of three. They become
(-4, 5, -1)/sqrt(14); min-max scaling is decided by two of them. The running variance
after one step from 1 is Flax's, then PyTorch's. The gradient of the first output is
(6, 3, -9)/(7 sqrt(14)): any change that moves or stretches all three has none.

    >>> import jax, jax.numpy as jnp, numpy as np, bnjax
    >>> def show(x, digits=4): print(np.round(np.ravel(x), digits) + 0.0)
    >>> def bn(z): return bnjax.batch_norm(z, epsilon=0.0)
    >>> x = jnp.array([[4.0], [7.0], [5.0]])
    >>> y, moments = bn(x)
    >>> show([moments.mean, moments.variance()])  # 16/3 and 14/9
    [5.3333 1.5556]
    >>> show(y)
    [-1.069   1.3363 -0.2673]
    >>> show((x - x.min()) / (x.max() - x.min()))
    [0.     1.     0.3333]
    >>> for rule in bnjax.running.ema(0.99), bnjax.running.ema(0.9, ddof=1):
    ...     show(rule.update(rule.init((1,)), moments).var)
    [1.0056]
    [1.1333]
    >>> show(jax.grad(lambda x: bn(x)[0][0, 0])(x))
    [ 0.2291  0.1145 -0.3436]

A unit of three inputs, one of whose weights is 15: its output is that one input, about
4, 7, 5 again, times 15. Its sigmoid is saturated, and has no gradient. Normalized, it
is not: as BN((aW)u) = BN(Wu), the unit is the one of weights a hundredth as large,
whose gradient is a hundred times as large.

    >>> u = jnp.array([[4.0, 1.0, 2.0], [7.0, 0.0, 1.0], [5.0, 2.0, 0.0]])
    >>> w = jnp.array([[15.0], [0.1], [-0.2]])
    >>> show(u @ w)
    [ 59.7 104.8  75.2]
    >>> slope = jax.vmap(jax.grad(jax.nn.sigmoid))
    >>> show(slope(jnp.ravel(u @ w)))
    [0. 0. 0.]
    >>> show(bn(u @ w)[0])
    [-1.0797  1.3309 -0.2512]
    >>> show(bn(u @ (w / 100))[0] - bn(u @ w)[0])
    [0. 0. 0.]
    >>> show(slope(jnp.ravel(bn(u @ w)[0])))
    [0.1893 0.1653 0.2461]
    >>> gradient = jax.grad(lambda w: jax.nn.sigmoid(bn(u @ w)[0])[0, 0])
    >>> show(gradient(w / 100) / gradient(w), 1)
    [100. 100. 100.]

    python -m experiments.saturation

Time: 22 minutes, if two processes with a core each share the trainings (`--part`); with
--smoke some seconds.

Expected: without batch normalization, sigmoid networks of more than a few layers do not
train at any rate from any initial weights, and tanh networks only from some; with it
they train from all of them, at rates that are larger.

Measured (Fashion-MNIST, 500 steps, 3 seeds, 30 networks of each kind, jax 0.10.2, two
cores of an AMD EPYC):

    hidden layers                                      3     5    10    20    50
    networks that train (%)    sigmoid, without BN    36    17     7     0     0
                               sigmoid, with BN       96    93    81    68    42
                               tanh, without BN       53    24    20     7     2
                               tanh, with BN          73    67    63    50    17
    accuracy of the best (%)   sigmoid, without BN  74.8  69.9  63.4  45.1  16.0
                               sigmoid, with BN     77.6  77.3  77.1  77.3  74.2
                               tanh, without BN     77.1  76.4  74.6  72.1  49.1
                               tanh, with BN        78.7  78.4  78.2  75.9  61.4
    largest rate that trains   sigmoid, without BN     5     1     1     -     -
                               sigmoid, with BN       20    20     5     5     5
                               tanh, without BN        1   0.2   0.2  0.05     -
                               tanh, with BN           5     1     1     1   0.2

As expected, but for three things. Plain sigmoid networks of 5 and 10 layers do train
from large weights, of scale 3 (5 layers) or 10, and plain tanh networks of 20 layers
from scale 1. At three layers the best plain networks are worse by two or three points
only: what BN adds there is above all room for other rates and scales. And BN itself has
its limit: of 50 layers not all train, none at the highest rate; what is lost are small
scales at large rates, and large scales at small ones, since with BN the scale does
nothing but change the effective rate. Rounding alone, on one CPU device or two, changes
the accuracy of single networks of 20 sigmoid layers with BN by up to 20 points at rates
above 0.05 (measured on the digits).

The networks: equal hidden layers, each batch-normalized before its activation or not;
binary images; plain gradient descent at a constant rate. The scale is the standard
deviation of the hidden layers' Gaussian weights, times the square root of the layer's
inputs; the last matrix always starts at scale 1. All rates and scales of one kind of
network are trained at once, from the same draws, on the same batches. To evaluate, the
networks normalize by the statistics of the training images, all in one batch.

To change the data, see `load`; the model, `Network`; the optimizer or schedule, `fit`.
If a run was stopped, repeat the command to continue with the kind of network it was at.

References: Ioffe & Szegedy 2015, sections 1, 3.3, 3.4 and 4.2.2 (BN-x5-Sigmoid).
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from rich import box
from rich.table import Table

import bnjax
from experiments.common import images, panels, results, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.results import Record
from experiments.common.study import Settings, Study, Trained

Params = dict[str, Any]
Activation = Literal["sigmoid", "tanh"]
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}
WITH = {False: "without BN", True: "with BN"}
TRAINS = 0.5  # accuracy of a network that counts as trained: five times chance


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "fashion_mnist"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    depths: tuple[int, ...] = (3, 5, 10, 20, 50)
    """Numbers of hidden layers."""
    activations: tuple[Activation, ...] = ("sigmoid", "tanh")
    """Activation functions of the hidden layers."""
    rates: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0, 5.0, 20.0)
    """Learning rates."""
    scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Factors of the initial weights; 1 keeps the variance of a layer's input."""
    width: int = 64
    """Number of units of each hidden layer."""
    steps: int = 500
    """Number of training steps."""
    batch_size: int = 60
    """Number of images per step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds of the initial weights and batches of all networks."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All networks of one kind and seed: one for each rate and scale."""

    data: str
    activation: Activation
    depth: int
    normalize: bool
    seed: int
    rates: tuple[float, ...]
    scales: tuple[float, ...]
    width: int
    steps: int
    batch_size: int


def cells(config: Config) -> list[Cell]:
    """Every training of a run; those that are compared follow each other."""
    fields = {field.name for field in dataclasses.fields(Cell)}
    shared = {name: v for name, v in vars(config).items() if name in fields}
    kinds = itertools.product(config.depths, config.activations, WITH, config.seeds)
    return [
        Cell(activation=activation, depth=depth, normalize=bn, seed=seed, **shared)
        for depth, activation, bn, seed in kinds
    ]


# Data


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Rows of binary pixels; those for validation are the last training images."""
    train, test = (
        Split(pixels.reshape(len(pixels), -1), labels)
        for pixels, labels in images.binary(*images.load(name, data_dir))
    )
    return images.hold_out(train, test, 300 if name == "digits" else 10_000)


# Model


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of equal fully connected hidden layers, without its parameters.

    Attributes:
        depth: the number of hidden layers.
        width: the number of units of each hidden layer.
        activation: the activation function of each hidden layer.
        normalize: whether each hidden layer has BN before its activation.
    """

    depth: int
    width: int
    activation: Activation
    normalize: bool

    def init(self, key: jax.Array, pixels: int, init_scale: jax.Array) -> Params:
        """Parameters: the same Gaussian draws for every `init_scale`, also with BN.

        The hidden layers after the first are stacked: their parameters lead with
        an axis of the layers.
        """
        params = {}
        shapes = {
            "first": (pixels, self.width),
            "rest": (self.depth - 1, self.width, self.width),
            "last": (self.width, 10),
        }
        keys = jax.random.split(key, len(shapes))
        for (name, shape), layer_key in zip(shapes.items(), keys, strict=True):
            kernel = jax.random.normal(layer_key, shape) / math.sqrt(shape[-2])
            bias = jnp.zeros((*shape[:-2], shape[-1]))
            params[name] = {"kernel": kernel, "bias": bias}
            if name != "last":
                params[name]["kernel"] *= init_scale
                if self.normalize:
                    params[name]["scale"] = jnp.ones_like(bias)
        return params

    def preactivation(
        self, x: jax.Array, layer_params: Params, statistics: Params | None = None
    ) -> tuple[jax.Array, Params]:
        """The input of one layer's activation, and the statistics of normalization.

        Those are `statistics`, the layer's "mean" and "var", or else of the batch.
        """
        z = x @ layer_params["kernel"]
        bias = layer_params["bias"]
        if not self.normalize:
            return z + bias[None], {}
        scale = layer_params["scale"]
        if statistics:
            mean, var = statistics["mean"], statistics["var"]
            return bnjax.normalize(z, mean, var, scale, bias), statistics
        z, moments = bnjax.batch_norm(z, scale, bias)
        return z, {"mean": moments.mean, "var": moments.variance()}

    def layer(
        self, x: jax.Array, layer_params: Params, statistics: Params | None = None
    ) -> tuple[jax.Array, Params]:
        """The output of one hidden layer, and the statistics; see `preactivation`."""
        z, used = self.preactivation(x, layer_params, statistics)
        return ACTIVATIONS[self.activation](z), used

    def apply(
        self, params: Params, x: jax.Array, statistics: Params | None = None
    ) -> tuple[jax.Array, Params]:
        """The logits of `x`, (example, pixel), and the statistics of normalization.

        Those are `statistics`, returned by an earlier call, or else of the batch.
        """
        given = statistics or {"first": {}, "rest": {}}

        def layer(x, params_and_statistics):
            return self.layer(x, *params_and_statistics)

        x, first = self.layer(x, params["first"], given["first"])
        # A loop: 50 layers one by one would take a minute to compile.
        x, rest = jax.lax.scan(layer, x, (params["rest"], given["rest"]))
        logits = x @ params["last"]["kernel"] + params["last"]["bias"][None]
        return logits, {"first": first, "rest": rest}


# Training


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The accuracies of each cell's networks, (rate, scale)."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        accuracies = train_grid(cell, data)
        name = f"{cell.activation}, {WITH[cell.normalize]}, depth {cell.depth}"
        share = (accuracies["test"] > TRAINS).mean()
        yield Trained(cell, accuracies, f"{name}: {share:.0%} train")


def train_grid(cell: Cell, data: Dataset) -> dict[str, np.ndarray]:
    """Trains a network for each rate and scale at once, split over the devices."""
    network = Network(cell.depth, cell.width, cell.activation, cell.normalize)
    size = len(data.train.labels)
    batches = draw_batches(cell.seed, size, cell.steps, cell.batch_size)
    grid = np.array([*itertools.product(cell.rates, cell.scales)], np.float32)
    devices = jax.devices()[: math.gcd(len(grid), len(jax.devices()))]
    split = NamedSharding(Mesh(np.array(devices), ("network",)), P("network"))
    rates, scales = jax.device_put(tuple(grid.T), split)
    key = jax.random.key(cell.seed)
    params = fit(network, key, rates, scales, data.train, batches)
    found = jax.vmap(functools.partial(evaluate, network), (0, None))(params, data)
    shape = len(cell.rates), len(cell.scales)
    return {name: np.asarray(v).reshape(shape) for name, v in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def fit(
    network: Network, key: jax.Array, rates, scales, data: Split, batches
) -> Params:
    """The parameters of a network for each of (rates, scales), trained on `batches`."""

    def loss(params, x, labels):
        logits, _ = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def descend(params, rate, x, labels):
        gradient = jax.grad(loss)(params, x, labels)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    def step(i, params):
        x = data.images[batches[i]].astype(jnp.float32)
        labels = data.labels[batches[i]]
        return jax.vmap(descend, (0, 0, None, None))(params, rates, x, labels)

    def init(init_scale):
        return network.init(key, data.images.shape[1], init_scale)

    params = jax.vmap(init)(scales)
    return jax.lax.fori_loop(0, len(batches), step, params)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(network: Network, params: Params, data: Dataset) -> dict[str, jax.Array]:
    """Accuracies, by the statistics of (at most 4,096) training images."""
    statistics_images = jnp.asarray(data.train.images[:4_096], jnp.float32)
    _, statistics = network.apply(params, statistics_images)

    def accuracy(split: Split) -> jax.Array:
        x = jnp.asarray(split.images, jnp.float32)
        logits, _ = network.apply(params, x, statistics)
        return (logits.argmax(-1) == split.labels).mean()

    return {"validation": accuracy(data.validation), "test": accuracy(data.test)}


# Table and picture


def by_kind(found: dict[Cell, Record]) -> dict[tuple, dict[str, np.ndarray]]:
    """Accuracies (seed, rate, scale), by activation, normalization and depth."""
    every: dict[tuple, list[Record]] = {}
    for cell, result in found.items():
        kind = cell.activation, cell.normalize, cell.depth
        every.setdefault(kind, []).append(result)
    return {
        kind: {name: np.array([r[name] for r in rows]) for name in rows[0]}
        for kind, rows in every.items()
    }


def summary(
    rates: Sequence[float], validation: np.ndarray, test: np.ndarray
) -> dict[str, str]:
    """What is told of the networks of one kind; accuracies are (seed, rate, scale).

    The best network has the highest mean accuracy in validation. A rate trains if at
    some scale the mean test accuracy is above `TRAINS`.
    """
    mean = validation.mean(0)
    best = 100 * test[:, *np.unravel_index(mean.argmax(), mean.shape)]
    spread = f" ± {best.std(ddof=1):.1f}" if len(best) > 1 else ""
    trains = (test.mean(0) > TRAINS).any(1)
    largest = max(itertools.compress(rates, trains), default=None)
    return {
        "networks that train (%)": f"{100 * (test > TRAINS).mean():.0f}",
        "accuracy of the best (%)": f"{best.mean():.1f}{spread}",
        "largest rate that trains": "none" if largest is None else f"{largest:g}",
    }


def report(config: Config, found: dict[Cell, Record]) -> list[Table]:
    """How many networks train, how well at best, and up to which rate; by depth."""
    kinds = {k: summary(config.rates, **v) for k, v in by_kind(found).items()}
    table = Table("hidden layers", "", *map(str, config.depths), box=box.MARKDOWN)
    for asked in next(iter(kinds.values())):
        for activation, bn in itertools.product(config.activations, WITH):
            row = (kinds.get((activation, bn, depth)) for depth in config.depths)
            answers = (answer[asked] if answer else "-" for answer in row)
            table.add_row(asked, f"{activation}, {WITH[bn]}", *answers)
    return [table]


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """The mean test accuracy by rate and scale: a map for each kind of network."""
    over = f"; mean of {len(config.seeds)} seeds" * (len(config.seeds) > 1)
    title = (
        f"{panels.DATA[config.data]}: test accuracy after {config.steps:,} steps of "
        f"{config.batch_size} images{over}"
    )
    rows, columns = 2 * len(config.activations), len(config.depths)
    figure, axes = panels.make(title, (9.6, 6.0), rows, columns)
    percent = Normalize(0, 100)
    known = by_kind(found)
    kinds = itertools.product(config.activations, WITH, config.depths)
    for i, (kind, panel) in enumerate(zip(kinds, axes, strict=True)):
        activation, bn, depth = kind
        above = f"{depth} layers\n" if i < columns else ""
        if kind in known:
            test = known[kind]["test"]
            above += f"{(test > TRAINS).mean():.0%} train"
            mean = 100 * test.mean(0).T
            panel.imshow(mean, norm=percent, origin="lower", aspect="auto")
        panel.set_title(above, fontsize=8)
        panel.set_xlabel("learning rate", fontsize=9)
        panel.set_ylabel(f"{activation}\n{WITH[bn]}\ninitial scale", fontsize=9)
        panel.set_xticks(range(len(config.rates)), [f"{r:g}" for r in config.rates])
        panel.set_yticks(range(len(config.scales)), [f"{s:g}" for s in config.scales])
        panel.tick_params(labelsize=7)
        panel.label_outer()
    bar = figure.colorbar(ScalarMappable(percent), ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("test accuracy (%)", fontsize=9)
    path = folder / f"saturation_{config.data}.png"
    panels.save(figure, path)
    return [path]


STUDY = Study(
    "saturation",
    cells,
    train,
    report,
    draw,
    smoke={
        "data": "digits",
        "depths": (8,),
        "activations": ("sigmoid",),
        "rates": (0.01, 1.0),
        "scales": (0.3, 1.0),
        "steps": 200,
        "seeds": (0,),
    },
)

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", results.cores())
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
