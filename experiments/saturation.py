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

Time: about four minutes on two CPU cores (estimated from the processor time of a run on
a busy machine); with --smoke some seconds.

Expected: without batch normalization, sigmoid networks of more than a few layers do not
train at any rate from any first weights, and tanh networks only from some; with it they
train from all of them, at rates that are larger.

Measured (digits, 500 steps, 1 seed, 30 networks of each kind, jax 0.10.2, two cores of
an AMD EPYC):

    hidden layers                                      3     5    10    20    50
    networks that train (%)    sigmoid, without BN    33    17     7     0     0
                               sigmoid, with BN      100   100    90    80    47
                               tanh, without BN       53    33    17    10     3
                               tanh, with BN          83    70    67    63    27
    accuracy of the best (%)   sigmoid, without BN  94.8  91.8  81.8  37.0   9.5
                               sigmoid, with BN     92.5  92.2  92.5  92.8  88.8
                               tanh, without BN     93.8  93.0  92.0  91.8  75.5
                               tanh, with BN        93.5  94.0  92.8  93.5  86.5
    largest rate that trains   sigmoid, without BN     5     1     1     -     -
                               sigmoid, with BN       20    20    20     5     5
                               tanh, without BN        1     1   0.2   0.2  0.01
                               tanh, with BN           5     5     1     1   0.2

As expected, but for four things. Plain sigmoid networks of 5 and 10 layers do train, if
they start from weights of scale 3 or 10. At three layers the best plain network of
either kind is no worse than the best one with BN: what BN adds there is room for other
rates and scales. Tanh networks of scale 1 train in 20 layers without it. And BN itself
has its limit: of 50 layers not all train, none at the highest rate; what is lost are
small scales at large rates, and large scales at small ones, since with BN the scale
does nothing but change the effective rate. 400 test images: one is 0.25 %.

The networks: equal hidden layers, each batch-normalized before its activation or not;
binary images; plain gradient descent at a constant rate. The scale is the standard
deviation of the hidden layers' Gaussian weights, times the square root of the layer's
inputs; the last matrix always starts at scale 1. All rates and scales of one kind of
network are trained at once, from the same draws, on the same batches. To evaluate, the
networks normalize by the statistics of the training images, all in one batch.

A run that was stopped goes on where it was, from the kind of network it was at.

References: Ioffe & Szegedy 2015, sections 1, 3.3, 3.4 and 4.2.2 (BN-x5-Sigmoid).
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments.common import panels, results, study
from experiments.common.data.batches import draw as draw_batches
from experiments.common.data.splits import load
from experiments.common.models.deep import Activation, Net
from experiments.common.results import Record
from experiments.common.settings import Settings, use_cores
from experiments.common.studies import heatmaps
from experiments.common.studies.heatmaps import TRAINS, Map
from experiments.common.study import Study, Trained
from experiments.common.training.deep_grid import train_grid

WITH = {False: "without BN", True: "with BN"}

Kind = tuple[Activation, bool, int]
"""An activation, whether normalized, and a depth."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    depths: tuple[int, ...] = (3, 5, 10, 20, 50)
    """Numbers of hidden layers."""
    activations: tuple[Activation, ...] = ("sigmoid", "tanh")
    """After each hidden layer."""
    rates: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0, 5.0, 20.0)
    """Of learning."""
    scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Of the first weights; 1 keeps the variance of what a layer is given."""
    width: int = 64
    """Units of each hidden layer."""
    steps: int = 500
    """Of training."""
    batch_size: int = 60
    """Images per step."""
    seeds: tuple[int, ...] = (0,)
    """Each gives the first weights and the batches of all networks."""


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


def kinds(config: Config) -> Iterator[Kind]:
    """Of the networks of a run; those that are compared follow on each other."""
    every = itertools.product(config.depths, config.activations, WITH)
    for depth, activation, normalize in every:
        yield activation, normalize, depth


def cell_of(config: Config, kind: Kind, seed: int) -> Cell:
    """The networks of one kind and seed."""
    activation, normalize, depth = kind
    shared = {f.name for f in dataclasses.fields(Cell)} & vars(config).keys()
    return Cell(
        activation=activation,
        depth=depth,
        normalize=normalize,
        seed=seed,
        **{name: getattr(config, name) for name in shared},
    )


def cells(config: Config) -> list[Cell]:
    """Every training of a run."""
    every = itertools.product(kinds(config), config.seeds)
    return [cell_of(config, kind, seed) for kind, seed in every]


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The accuracies of each cell's networks, (rate, scale)."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        net = Net(cell.depth, cell.width, cell.activation, cell.normalize)
        batches = draw_batches(
            cell.seed, len(data.train.labels), cell.steps, cell.batch_size
        )
        validation, test = train_grid(
            net, cell.rates, cell.scales, cell.seed, data, batches
        )
        name = f"{cell.activation}, {WITH[cell.normalize]}, depth {cell.depth}"
        shown = f"{name}: {(test > TRAINS).mean():.0%} train"
        yield Trained(cell, {"validation": validation, "test": test}, shown)


def maps(config: Config, found: dict[Cell, Record]) -> dict[Kind, Map]:
    """The accuracies of the kinds of which every seed has been trained."""
    every = {}
    for kind in kinds(config):
        seeds = [cell_of(config, kind, seed) for seed in config.seeds]
        if all(cell in found for cell in seeds):
            shares = ([found[c][name] for c in seeds] for name in Map._fields)
            every[kind] = Map(*map(np.asarray, shares))
    return every


def report(config: Config, found: dict[Cell, Record]) -> list[str | Table]:
    """What trains, how well at best, and up to which rate; by depth."""
    every = maps(config, found)

    def best(found: Map) -> str:
        test = 100 * found.best()
        spread = f" ± {test.std(ddof=1):.1f}" if len(test) > 1 else ""
        return f"{test.mean():.1f}{spread}"

    def largest(found: Map) -> str:
        rate = found.largest(config.rates)
        return f"{rate:g}" if np.isfinite(rate) else "none"

    asked: dict[str, Callable[[Map], str]] = {
        f"Networks that train, to over {TRAINS:.0%} of the test images (%), by depth": (
            lambda found: f"{100 * found.trained():.0f}"
        ),
        "Test accuracy of the best on held-out images (%; ± over the seeds)": best,
        "Largest rate at which some train": largest,
    }
    printed: list[str | Table] = []
    for title, question in asked.items():
        table = Table("network", *map(str, config.depths), box=box.MARKDOWN)
        for activation, normalize in itertools.product(config.activations, WITH):
            row = (every.get((activation, normalize, d)) for d in config.depths)
            answers = ("-" if m is None else question(m) for m in row)
            table.add_row(f"{activation}, {WITH[normalize]}", *answers)
        printed += [title, table]
    return printed


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """A heat map for each kind of network."""
    every = maps(config, found)
    rows = list(itertools.product(config.activations, WITH))
    path = folder / f"saturation_{config.data}.png"
    over = f"; mean of {len(config.seeds)} seeds" * (len(config.seeds) > 1)
    heatmaps.draw(
        [[every.get((a, n, depth)) for depth in config.depths] for a, n in rows],
        [f"{activation}\n{WITH[normalize]}" for activation, normalize in rows],
        [f"{depth} layers" for depth in config.depths],
        config.rates,
        config.scales,
        f"{panels.DATA[config.data]}: test accuracy after {config.steps:,} steps of "
        f"{config.batch_size} images{over}",
        path,
    )
    return [path]


STUDY = Study(
    "saturation",
    cells,
    train,
    report,
    draw,
    smoke={
        "depths": (8,),
        "activations": ("sigmoid",),
        "rates": (0.01, 1.0),
        "scales": (0.3, 1.0),
        "steps": 200,
        "seeds": (0,),
    },
)

if __name__ == "__main__":
    use_cores(results.cores())
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
