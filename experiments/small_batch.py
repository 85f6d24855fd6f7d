"""Small and non-iid batches: where batch normalization fails, and what helps.

    python -m experiments.small_batch
    python -m experiments.small_batch --data cifar10 --seeds 0

Time: about six minutes on two CPU cores, CIFAR-10 about half an hour (both estimated
from runs on a busy machine); with --smoke some seconds.

Expected: of the same 128 images per step, normalized in groups of 2 to 128 (as devices
would each by itself), the smaller the groups, the larger the error; larger still if the
groups are not iid, one class to each. Batch renormalization and population statistics
get most of it back; to cross-replica statistics, group and layer normalization it is
nothing.

Measured (digits, 3 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %):

    images per group      iid:      2    8   32  128   by class:    2    8   32
    BN, running average          32.8  4.9  5.6  5.9             59.6 17.9 11.2
    BN, pooled                   32.2  4.9  5.7  5.7             60.3 17.3 11.2
    BN, by the test group        55.1  7.6  6.3  5.7             89.6 42.9  6.3
    ghost BN                     33.8  4.8  5.5  5.9             57.9 17.8 11.2
    BN, frozen at the end        26.4  4.5  5.6  5.5             32.1  6.9  6.8
    batch renorm                 14.6  5.2  5.5  6.0             33.1 12.7  7.2
    decorrelated BN               5.6  4.3  4.2  4.8             21.4 20.3 11.9
    cross-replica BN              5.9  5.9  5.9  5.9              5.9  5.9  5.9
    group norm                    6.2  6.2  6.2  6.2              6.2  6.2  6.2
    layer norm                    5.9  5.9  5.9  5.9              5.9  5.9  5.9

(standard deviations up to 3; in groups of 2 or 4 up to 10). BN fails as expected: in
groups of 2, and, if a group is of one class or few, at every size. The running average
is not to blame, contrary to what was expected: pooled statistics are as bad, be they of
mixed batches or of groups as in training. What a network learns by the statistics of
such groups is of little use with any others. What helps is to train with what will be
evaluated by: cross-replica statistics; or to freeze the statistics for the last fifth
of the steps, which costs nothing and takes 17.9 to 6.9. Renorm takes back 43 to 76 % of
what these groups cost over 5.9, but is worse than BN in groups of 4 of one class (27.3
against 20.8), perhaps because its gradient still loses the mean of the group. No
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

A run that was stopped goes on where it was: what is in the file is not trained again.

References: Ioffe 2017 (renorm); Wu & He 2018, figure 1; Wu & Johnson 2021, sections
3, 4, 6; Hoffer et al. 2017 (ghost batches); Huang et al. 2018 and 2019 (whitening).
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments.common import panels, study
from experiments.common.data.batches import Order
from experiments.common.models.norms import METHODS, UNSPLIT, Method
from experiments.common.settings import Settings
from experiments.common.studies import grid
from experiments.common.studies.cells import (
    TASKS,
    Cell,
    Errors,
    evaluate,
    load_images,
    make_network,
)
from experiments.common.study import Study, Trained

RATES = (0.03, 0.1, 0.3, 1.0)  # tried by --tune
SMOKE = {"data": "digits", "sizes": (4,), "steps": 20, "seeds": (0,)}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
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


def cells(config: Config) -> list[Cell]:
    """The networks that a run comprises.

    Raises:
        ValueError: groups that do not divide a batch.
    """
    if uneven := [size for size in config.sizes if config.batch_size % size]:
        raise ValueError(
            f"sizes has {uneven}: expected divisors of batch_size, "
            f"{config.batch_size}. Leave them out, or change --batch-size."
        )
    if config.tune:
        methods: tuple[Method, ...] = ("batch_norm", *UNSPLIT)
        return [
            make_cell(config, method, config.batch_size, "mixed", seed, rate)
            for method, rate in itertools.product(methods, RATES)
            for seed in config.seeds
        ]
    every = itertools.product(config.methods, config.sizes, grid.ORDERS, config.seeds)
    return [make_cell(config, *where) for where in every]


def make_cell(
    config: Config,
    method: Method,
    size: int,
    order: Order,
    seed: int,
    rate: float | None = None,
) -> Cell:
    """The one network that stands for all that are trained in the same way."""
    task = TASKS[config.data]
    if method in UNSPLIT:
        size = config.batch_size
    return Cell(
        data=config.data,
        method=method,
        size=size,
        order="mixed" if size == config.batch_size else order,
        seed=seed,
        rate=rate or task.rates.get(method, task.rates["batch_norm"]),
        steps=config.steps or task.steps,
        batch_size=config.batch_size,
        momentum=config.momentum,
        widths=task.widths,
        strides=task.strides,
        measured="validation" if config.tune else "test",
    )


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The errors of each network."""
    data = load_images(config.data, config.data_dir)

    def kind(cell: Cell) -> tuple[str, int, float]:
        return cell.method, cell.size, cell.rate

    for _, alike in itertools.groupby(cells, kind):
        network = None
        for cell in alike:
            network = network or make_network(cell)  # compiled once for all alike
            errors = evaluate(cell, network, data)
            shown = f"{cell.method} {cell.size}: {errors['running']:.1%}"
            yield Trained(cell, errors, shown)


def report(config: Config, found: dict[Cell, Errors]) -> list[Any]:
    """A table for each order, or that of the learning rates."""
    if config.tune:
        return [tuning(config, found)]
    printed: list[Any] = []
    for order, rows in curves(config, found).items():
        printed.append(f"Test error (%), {grid.ORDERS[order]}, by their size")
        printed.append(grid.table(rows, config.sizes))
    return printed


def draw(config: Config, found: dict[Cell, Errors], folder: Path) -> list[Path]:
    """A panel for each order."""
    if config.tune:
        return []
    picture = folder / f"small_batch_{config.data}.png"
    grid.draw(curves(config, found), config.sizes, caption(config), picture)
    return [picture]


def curves(config: Config, found: dict[Cell, Errors]) -> grid.Curves:
    """What there is of the cells of `config`, in the rows of the table."""
    rows: grid.Curves = {}
    for order, row in itertools.product(grid.ORDERS, grid.ROWS):
        errors = np.full((len(config.seeds), len(config.sizes)), np.nan)
        for i, seed in enumerate(config.seeds):
            for j, size in enumerate(config.sizes):
                cell = make_cell(config, row.method, size, order, seed)
                errors[i, j] = found.get(cell, {}).get(row.kind, np.nan)
        if np.isfinite(errors).any():
            rows.setdefault(order, {})[row.name] = errors
    return rows


def tuning(config: Config, found: dict[Cell, Errors]) -> Table:
    """Errors on the images held out of training, by method and learning rate."""
    rows = Table("method", *map(str, RATES), box=box.MARKDOWN)
    every = itertools.groupby(cells(config), lambda cell: cell.method)
    for method, alike in every:
        errors = [found.get(cell, {}).get("running", np.nan) for cell in alike]
        by_rate = np.reshape(errors, (len(RATES), -1))
        rows.add_row(method, *map(grid.with_spread, by_rate))
    return rows


def caption(config: Config) -> str:
    """The picture's title."""
    task = TASKS[config.data]
    seeds = len(config.seeds)
    return (
        f"{panels.DATA[config.data]}, {len(task.widths)} convolutions, "
        f"{config.steps or task.steps:,} steps of {config.batch_size} images; "
        f"mean of {seeds} seed{'s' * (seeds > 1)}"
    )


STUDY = Study(
    "small_batch",
    cells=cells,
    train=train,
    report=report,
    draw=draw,
    smoke={**SMOKE, "methods": METHODS[:1]},
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
