"""Batch, layer, group and weight normalization, whitening, and none: steps and time.

    python -m experiments.normalizers
    python -m experiments.normalizers --data cifar10

Time: four minutes on two busy CPU cores (CIFAR-10 was not run in full); with --smoke
some seconds.

Expected: by steps, batch normalization and whitening first, at batches of 128; group
and layer normalization behind (0.5 and 1.7 points in the error of ResNet-50 on
ImageNet), weight normalization further (4.6), none last. By time, whitening loses what
it gains.

Measured (digits, 3 seeds, jax 0.10.2, two cores of an AMD EPYC, busy with other work
too; steps and seconds, without compilation, until the test error is the 7.0 % that the
network without any ends with):

    method                   rate   test error (%)   ms per step   steps   seconds
    batch norm               1      5.7 ± 0.3        3.4            80     0.3
    whitening, eigenvalues   1      6.1 ± 0.8        4.0           280     1.1
    whitening, Newton        0.1    5.8 ± 0.4        4.5            60     0.3
    group norm               0.3    5.8 ± 1.2        3.6            60     0.2
    layer norm               0.3    5.9 ± 0.8        3.5            60     0.2
    weight norm              0.3    6.4 ± 0.5        3.1           100     0.3
    none                     0.3    7.0 ± 0.7        2.9           180     0.5

Every normalization ends below none, but among themselves they differ by less than their
spread, and 300 held-out images choose the rate poorly: three convolutions on 8x8 pixels
are too easy a task for the order that was expected. What is clear is which rates they
bear: at 1 batch normalization (5.7), whitening (6.1, 5.3) and group normalization (6.7)
still train, while layer (37) and weight normalization (68) fail from some seeds, and
none (92) from all. A step with whitening takes 1.2 to 1.35 times as long as with batch
normalization, without any 0.86 times. CIFAR-10 was not measured in full.


The network: that of `small_batch`, convolutions of 3x3 that are normalized and
rectified, then the mean over positions and a matrix. Layer, group and weight
normalization are Flax's. Layer normalization: over height, width and channels, with a
scale per channel; groups: four. Weights are drawn by He's rule; weight normalization
begins with the length that they have, not by the data as in its paper. Whitening is of
groups of adjacent channels, 16 on the digits, 12 on CIFAR-10: by eigenvalues (DBN), or
five steps of Newton's iteration (IterNorm). A bias stands where no normalization brings
one: with none and with weight normalization.

Gradient descent with Nesterov momentum 0.9, batches of 128, a rate that rises for a
tenth of the steps and then falls as a cosine. Its height is, for each method, that of a
common grid with the highest accuracy on held-out images. The time of a step is the
median over turns that all methods take in one process, compilation left out; in the
picture it is multiplied by the number of steps.

A run that was stopped goes on where it was: what is in the file is not trained again.

References: Ba et al. 2016 (layer); Wu & He 2018 (group); Salimans & Kingma 2016
(weight); Huang et al. 2018 and 2019 (whitening).
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments.bench.timing import interleaved, keep_memory
from experiments.common import panels, study
from experiments.common.data.batches import draw as draw_batches
from experiments.common.data.splits import Dataset, Split
from experiments.common.models.layers import Normalizer, make_network
from experiments.common.results import Record
from experiments.common.settings import Settings
from experiments.common.studies import contest
from experiments.common.studies.cells import TASKS, load_images
from experiments.common.studies.grid import with_spread
from experiments.common.studies.rated import Rated, table
from experiments.common.study import Study, Trained
from experiments.common.training.classifier import Classifier
from experiments.common.training.descent import Descent

STEPS = {"digits": 300, "cifar10": 350}
SEEDS = {"digits": (0, 1, 2), "cifar10": (0,)}
WHITENED = {"digits": 16, "cifar10": 12}  # channels at once
BATCH = 128
SEEN = 1_000  # of the test images, for the points of a curve


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    methods: tuple[Normalizer, ...] = get_args(Normalizer)
    """What is compared."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates, the same for all methods."""
    seeds: tuple[int, ...] | None = None
    """Each gives the weights and the batches of one run; None: as suits the data."""
    steps: int | None = None
    """Training steps; None: as suits the data."""
    points: int = 15
    """Of each curve."""
    seconds: float = 30.0
    """Of timing steps, for all methods together."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    method: Normalizer
    rate: float
    seed: int
    steps: int
    points: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """The steps of these methods, timed in turns."""

    data: str
    timed: tuple[Normalizer, ...]
    seconds: float


def cells(config: Config) -> list[Cell | Timing]:
    """The timing, then every training of a run, those of one method side by side."""
    steps = config.steps or STEPS[config.data]
    every = itertools.product(
        config.methods, config.rates, config.seeds or SEEDS[config.data]
    )
    found = [Cell(config.data, *which, steps, config.points) for which in every]
    return [Timing(config.data, config.methods, config.seconds), *found]


def train(config: Config, cells: Sequence[Cell | Timing]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = load_images(config.data, config.data_dir)

    @functools.cache  # compiled once
    def descent(method: Normalizer) -> Descent:
        return make_descent(config.data, method, data.train)

    for cell in cells:
        if isinstance(cell, Timing):
            timed: dict[str, Descent] = {name: descent(name) for name in cell.timed}
            result = {"seconds": time_steps(timed, cell)}
            yield Trained(cell, result, "the time of a step")
        else:
            result = run(cell, descent(cell.method), data)
            shown = f"{cell.method} {cell.rate:g}: {result['final']:.1%}"
            yield Trained(cell, result, shown)


def make_descent(data: str, method: Normalizer, split: Split) -> Descent:
    """How the network is trained with a method."""
    task = TASKS[data]
    model = make_network(
        method,
        task.widths,
        task.strides,
        center=task.center,
        spread=task.spread,
        whitened=WHITENED[data],
    )
    return Descent(Classifier(model, optax.sgd(1.0, 0.9, nesterov=True)), split)


def time_steps(descents: dict[str, Descent], cell: Timing) -> dict[str, float]:
    """The median seconds of a step of each, on one batch; they take turns."""
    batch = np.arange(BATCH)

    def call(descent: Descent):
        state = descent.init(0)
        return lambda: descent.step(state, batch, 0.1)

    calls = {name: call(descent) for name, descent in descents.items()}
    return interleaved(calls, cell.seconds, least=1, untimed=1)


def run(cell: Cell, descent: Descent, data: Dataset) -> Record:
    """Trains a network; its accuracies."""
    batches = draw_batches(cell.seed, len(data.train.labels), cell.steps, BATCH)
    rate = optax.warmup_cosine_decay_schedule(
        0, cell.rate, cell.steps // 10, cell.steps
    )
    rates = np.asarray(jax.vmap(rate)(np.arange(cell.steps)))
    measured = np.linspace(0, cell.steps, cell.points + 1).round()[1:].astype(int)
    seen = Split(*(values[:SEEN] for values in data.test))
    accuracy = descent.classifier.accuracy
    state, curve = descent.init(cell.seed), []
    for step, (batch, height) in enumerate(zip(batches, rates, strict=True), 1):
        state, _ = descent.step(state, batch, height)
        if step in measured:
            curve.append(round(accuracy(state.variables, seen), 4))
    return {
        "steps": measured,
        "test": curve,
        "validation": accuracy(state.variables, data.validation),
        "final": accuracy(state.variables, data.test),
    }


def rated(found: dict[Any, Record]) -> Rated:
    """The trainings, by method and rate."""
    return Rated.grouped(
        (c.method, c.rate, r) for c, r in found.items() if isinstance(c, Cell)
    )


def seconds(found: dict[Any, Record]) -> dict[str, float]:
    """Of a step of each method; none if they have not been timed."""
    timings = (r["seconds"] for c, r in found.items() if isinstance(c, Timing))
    return next(timings, {})


def report(config: Config, found: dict[Any, Record]) -> list[Table]:
    """Errors of all methods at all rates; and steps and time to one error."""
    known = rated(found)

    def name(method: str) -> str:
        return contest.SHOWN[method][0]

    def error(method: str, rate: float) -> str:
        return with_spread(1 - known.of(method, rate, "final"))

    by_rate = table("test error (%) at rate", known, config.rates, name, error)
    return [by_rate, contest.summary(known, seconds(found))]


def draw(config: Config, found: dict[Any, Record], folder: Path) -> list[Path]:
    """Errors against steps and against time."""
    task = f"{panels.DATA[config.data]}, {len(TASKS[config.data].widths)} convolutions"
    path = folder / f"normalizers_{config.data}.png"
    contest.draw(rated(found), seconds(found), task, path)
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
    settings = tyro.cli(Config, description=__doc__)
    if not settings.smoke:
        keep_memory("experiments.normalizers")
    sys.exit(study.main(STUDY, settings))
