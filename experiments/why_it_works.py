"""Why batch normalization works: not less covariate shift, but a smoother loss.

    python -m experiments.why_it_works
    python -m experiments.why_it_works --data cifar10

Time: about four minutes on two CPU cores (estimated from a run on a busy machine;
CIFAR-10 was not run in full); with --smoke some seconds.

Expected: along its gradient the loss with BN changes less, and its gradient too (by
about two orders of magnitude in the paper, read off a plot); noise that makes
distributions less stable than they are without BN hardly slows it down, while noise
alone prevents training; the internal covariate shift is no smaller with BN. At the
small learning rate that the network without BN needs, BN gains little: its gain is the
larger rate.

Measured (digits, 2 seeds, jax 0.10.2, two cores of an AMD EPYC; test accuracy in %):

    learning rate         0.01   0.03    0.1    0.3      1      3
    without BN            16.8   80.4   93.5   51.9    7.9    9.5
    with BN               83.6   90.8   92.9   93.9   95.1   95.2
    BN and noise          81.1   91.5   93.6   94.5   95.2   94.6
    noise alone           27.0   88.0   86.2   70.0    7.9    9.5

    at 0.1, medians    range of   change of   smooth-   |G - G'|   cosine of
    over training      the loss   gradient    ness      / |G|      G and G'
    without BN         2.55       17.7        22.7      0.22       0.98
    with BN            0.029      0.70         6.4      0.32       0.96
    BN and noise       0.078      1.25         7.6      0.40       0.92

(standard deviations up to 1.6 where BN is and at 0.1; up to 60 at 0.3 without). Along
the gradient the loss ranges over 90 times less with BN, and the gradient changes 25
times less; per distance 3.6 times less, not a hundred times. At 0.1, the best rate
without BN, BN gains nothing in accuracy (-0.6 points), though its training loss ends
at 0.018 and not at 0.13; its gain, 1.6 points, is at ten times that rate. Noise takes
nothing from BN. The covariate shift is larger with BN in the lower half of the layers
and smaller in the upper half, where without BN, in the last two, G and G' are almost at
right angles; by the median it is the largest with BN and noise. It does not tell which
network trains.

Not as in the paper: noise alone slows training, and costs five points or more, but
does not prevent it. And before training, without BN, the gradient is so small here that
no step up to 10 changes the loss by more than 4 %; with BN one of 0.5 to 1 takes off a
quarter, and one of 10 adds three quarters.


The network: 3x3 convolutions with He's initial weights, rectified, some of stride 2
(the digits eight, CIFAR-10 eight), the mean over positions and a matrix. Noise: after
each normalization, or in its place, each value is scaled and shifted at random, by
distributions that are drawn anew at each step. Plain gradient descent at a constant
rate, batches of 128, the same for all networks of a seed. Measured every so many steps,
before the step, on its mini-batch, with the statistics of that batch and the same noise
all along:

* along the gradient, at 1/2, 1, 2 and 4 times the learning rate: the range of the loss,
  that of the change of the gradient (its predictiveness), and the most that it changes
  per distance (the effective beta-smoothness);
* the internal covariate shift of each layer: the gradient of its parameters before the
  step, and with all earlier layers as after it; the cosine of the two, and the length
  of their difference over that of the first.

A run that was stopped goes on where it was: what is in the file is not trained again.

References: Santurkar et al. 2018, definition 2.1, figures 1, 2 and 4; Bjorck et al.
2018, sections 2 and 3.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import optax
import tyro
from rich.table import Table

from experiments.bench.timing import keep_memory
from experiments.common import study
from experiments.common.data.batches import draw as draw_batches
from experiments.common.data.splits import Dataset
from experiments.common.models.layers import make_network
from experiments.common.results import Record, plain
from experiments.common.settings import Settings
from experiments.common.studies import landscape, why_plot, why_tables
from experiments.common.studies.cells import TASKS, load_images
from experiments.common.studies.rated import Rated
from experiments.common.studies.why_plot import FIRST, NETS, SMOOTHED, Net
from experiments.common.study import Study, Trained
from experiments.common.training.classifier import Classifier, State
from experiments.common.training.descent import Descent

BATCH = 128
FACTORS = 0.5, 1.0, 2.0, 4.0  # of the learning rate: steps along the gradient


class Size(NamedTuple):
    """What depends on the data."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    steps: int
    seeds: tuple[int, ...]


SIZES = {
    "digits": Size(
        (8, 8, 16, 16, 32, 32, 32, 32), (1, 1, 2, 1, 2, 1, 1, 1), 300, (0, 1)
    ),
    "cifar10": Size(
        (12, 12, 24, 24, 48, 48, 48, 48), (2, 1, 2, 1, 2, 1, 1, 1), 300, (0,)
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    nets: tuple[Net, ...] = get_args(Net)
    """What is compared."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates, the same for all networks."""
    seeds: tuple[int, ...] | None = None
    """Each gives the weights and the batches of one run; None: as suits the data."""
    steps: int | None = None
    """Training steps; None: as suits the data."""
    depth: int = 8
    """Convolutions: the first of eight."""
    every: int = 50
    """Steps between two measurements."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    net: Net
    rate: float
    seed: int
    steps: int
    depth: int
    every: int


def cells(config: Config) -> list[Cell]:
    """Every training of a run, those of one network side by side."""
    size = SIZES[config.data]
    every = itertools.product(config.nets, config.rates, config.seeds or size.seeds)
    more = config.steps or size.steps, config.depth, config.every
    return [Cell(config.data, *which, *more) for which in every]


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = load_images(config.data, config.data_dir)
    for net, alike in itertools.groupby(cells, lambda cell: cell.net):
        descent = make_descent(config, net, data)  # compiled once for all alike
        for cell in alike:
            result = run(cell, descent, data)
            yield Trained(cell, result, f"{net} {cell.rate:g}: {result['test']:.1%}")


def make_descent(config: Config, net: str, data: Dataset) -> Descent:
    """How a network is trained."""
    size, task = SIZES[config.data], TASKS[config.data]
    sizes = size.widths[: config.depth], size.strides[: config.depth]
    model = make_network(
        NETS[net].layers, *sizes, center=task.center, spread=task.spread
    )
    return Descent(Classifier(model, optax.sgd(1.0)), data.train)


def run(cell: Cell, descent: Descent, data: Dataset) -> Record:
    """Trains a network, and measures on the way until its loss is not finite."""
    batches = draw_batches(cell.seed, len(data.train.labels), cell.steps, BATCH)
    measured = range(0, cell.steps, cell.every)
    state = descent.init(cell.seed)
    first = landscape.along_gradient(
        descent.at(state, batches[0]), state.variables["params"], FIRST
    )
    losses, rows = np.full(cell.steps, np.nan), []
    for step, batch in enumerate(batches):
        after, losses[step] = descent.step(state, batch, cell.rate)
        if step in measured and np.isfinite(losses[step]):
            rows.append(measure(descent, state, after, batch, cell.rate))
        elif step in measured:
            break
        state = after
    unknown = {name: np.full(np.shape(v), np.nan) for name, v in rows[0].items()}
    rows += [unknown] * (len(measured) - len(rows))
    smooth = losses[: cell.steps // SMOOTHED * SMOOTHED].reshape(-1, SMOOTHED).mean(1)
    result = {
        "loss": smooth,
        "first": first.losses / first.start,
        "validation": descent.classifier.accuracy(state.variables, data.validation),
        "test": descent.classifier.accuracy(state.variables, data.test),
        **{name: [row[name] for row in rows] for name in rows[0]},
    }
    return plain(result, 4)


def measure(
    descent: Descent, before: State, after: State, batch: np.ndarray, rate: float
) -> Record:
    """Along the gradient of one step, and what the step shifts."""
    gradient = descent.at(before, batch)
    old, new = (state.variables["params"] for state in (before, after))
    line = landscape.along_gradient(gradient, old, rate * np.array(FACTORS))
    shift = landscape.covariate_shift(gradient, old, new, layers_of(old))
    with np.errstate(invalid="ignore"):  # a layer may be dead: 0/0
        relative = shift.distance / shift.length
    return {
        "losses": [line.losses.min(), line.losses.max()],
        "changes": [line.changes.min(), line.changes.max()],
        "smoothness": line.smoothness(),
        "shift": relative,
        "cosine": shift.cosine,
    }


def layers_of(params: Record) -> list[list[str]]:
    """The names of each layer's parameters; a normalization is with its convolution."""
    numbers = sorted(
        {int(name.split("_")[1]) for name in params if "Dense" not in name}
    )
    convolutions = [
        [name for name in params if name in (f"Conv_{i}", f"BatchNorm_{i}")]
        for i in numbers
    ]
    return [*convolutions, ["Dense_0"]]


def rated(found: dict[Cell, Record]) -> Rated:
    """What there is, by network and rate."""
    return Rated.grouped((c.net, c.rate, r) for c, r in found.items())


def report(config: Config, found: dict[Cell, Record]) -> list[Table | str]:
    """By learning rate; and what was measured on the way, at a shared one."""
    return why_tables.report(rated(found), config.rates)


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Six panels."""
    path = folder / f"why_it_works_{config.data}.png"
    why_plot.draw(rated(found), config.data, config.every, path)
    return [path]


SMOKE = {
    "data": "digits",
    "nets": ("plain", "bn"),
    "rates": (1.0,),
    "seeds": (0,),
    "steps": 20,
    "depth": 3,
    "every": 10,
}
STUDY = Study("why_it_works", cells, train, report, draw, SMOKE)


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    if not settings.smoke:
        keep_memory("experiments.why_it_works")
    sys.exit(study.main(STUDY, settings))
