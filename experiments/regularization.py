"""What dropout, L2, LRN, augmentation and shuffling are worth with BN and without.

    python -m experiments.regularization
    python -m experiments.regularization --data cifar10

Expected: with batch normalization, dropout and local response normalization (LRN) can
be removed, L2 cut to a fifth, and photometric distortions be left out, at no cost or at
a gain, and thorough shuffling helps by about one point. Without it, removing them costs
more.

Time: on the digits at most six minutes (342 s on a busy machine; not measured alone);
CIFAR-10 not measured yet; with --smoke some seconds.

Measured (digits, 2 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %, and
its change in points when one is removed):

                               with BN                without BN
    nothing                    9.5 ± 1.8              33.2 ± 5.3
    dropout                    9.9   +0.4 ± 1.2       18.0   -15.2 ± 4.9
    four fifths of L2          8.5   -1.0 ± 1.4       32.8    -0.5 ± 1.1
    L2                         8.6   -0.9 ± 1.6       30.0    -3.2 ± 0.7
    LRN                        8.2   -1.2 ± 1.4       12.1   -21.1 ± 1.9
    distortions               10.0   +0.5 ± 0.4       28.9    -4.4 ± 8.0
    augmentation               4.9   -4.6 ± 1.9        6.9   -26.4 ± 4.4
    shuffling across shards   10.0   +0.5 ± 0.0       28.2    -5.0 ± 4.6
    all shuffling             11.1   +1.6 ± 0.5       26.2    -7.0 ± 4.9
    as in the paper            6.4   -3.1 ± 0.9       10.6   -22.6 ± 6.9
    all but shuffling          5.1   -4.4 ± 1.9        7.8   -25.5 ± 6.0

With BN as in the paper: dropout and LRN go at no cost that can be seen with two seeds,
and shuffling is worth 1.6 points. Without it, against what was expected, everything
costs more than it brings: in 300 steps that network is underfitted with all of them on.
What removing costs a plain network that has converged is not shown here. CIFAR-10 has
neither been tuned nor run.

The network: convolutions of 3x3, batch-normalized or with a bias, rectified; the mean
over positions, and a matrix. On CIFAR-10 six of them, and the first 2,500 training
images: all 50,000 are seen too seldom in these steps to be learned by heart. With
everything on: dropout of 40 % of the means; L2 of 5e-4 on kernels; LRN after the first
two convolutions, over 5 channels with k = 2, beta = 0.75 and alpha = 1e-4 for pixels of
0 to 255; images moved (by up to 4 pixels, the digits by 1), those of CIFAR-10 mirrored,
and distorted, that is brightness, contrast and colour each times 0.5 to 1.5, all three
drawn for each image; every epoch in a new order.

One is removed at a time. "Distortions": images are still moved and mirrored.
"Augmentation": nothing is done to them. "Shuffling across shards": a random order is
dealt into ten shards once; these follow on each other in each epoch, and each is
shuffled anew. "All shuffling": every epoch in one random order, in the same batches,
which is what the paper comes from. "As in the paper": dropout, LRN and distortions are
removed and L2 is cut to a fifth, all at once. "All but shuffling": dropout, L2, LRN and
augmentation.

Gradient descent with momentum 0.9, a rate that rises for a tenth of the steps and then
falls as a cosine; its height is, for each kind of network, that with the least error on
held-out images, on average over everything on and everything removed (`--tune`). The
same seed gives all networks of a kind the same batches and first weights, and changes
are taken seed by seed.

A run that was stopped goes on where it was: what is in the file is not trained again.

References: Ioffe & Szegedy 2015, section 4.2.1; Krizhevsky et al. 2012, section 3.3.
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

from experiments.common import study
from experiments.common.results import Record
from experiments.common.settings import Settings
from experiments.common.studies import cells as networks
from experiments.common.studies import changes
from experiments.common.studies.ablation import TASKS, Cell, errors_of
from experiments.common.study import Study, Trained

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


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    removed: tuple[str, ...] = tuple(REMOVED)
    """What is removed; "nothing" among them, which the others are compared to."""
    steps: int | None = None
    """Of training; None: as many as suit the data."""
    batch_size: int = 64
    """Images per step."""
    seeds: tuple[int, ...] | None = None
    """Each gives the first weights and the batches of one training; None: from 0 on, as
    many as suit the data."""
    tune: bool = False
    """Compare learning rates on images held out of training, and do nothing else."""


def seeds_of(config: Config) -> Sequence[int]:
    """The seeds of each kind of training."""
    return config.seeds or range(TASKS[config.data].seeds)


def cell_of(
    config: Config, normalize: bool, removed: str, seed: int, rate: float | None = None
) -> Cell:
    """One training; without a rate, at the one that was chosen."""
    task, shape = TASKS[config.data], networks.TASKS[config.data]
    return Cell(
        data=config.data,
        normalize=normalize,
        **(ON | REMOVED[removed]),
        seed=seed,
        rate=rate or task.rates[normalize],
        images=task.images,
        steps=config.steps or task.steps,
        batch_size=config.batch_size,
        widths=shape.widths,
        strides=shape.strides,
        measured="validation" if config.tune else "test",
    )


def cells(config: Config) -> list[Cell]:
    """Every training of a run.

    Raises:
        ValueError: what is removed is not in REMOVED, or lacks "nothing".
    """
    if NOTHING not in config.removed or not set(config.removed) <= REMOVED.keys():
        raise ValueError(
            f"removed is {config.removed}: expected {NOTHING!r}, and some of "
            f"{', '.join(map(repr, REMOVED))}. Quote what has spaces."
        )
    if config.tune:
        tried = itertools.product(WITH, (NOTHING, EVERYTHING), seeds_of(config), RATES)
        return [cell_of(config, *which) for which in tried]
    every = itertools.product(WITH, config.removed, seeds_of(config))
    return [cell_of(config, *which) for which in every]


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The errors of each network; those that differ in less are compiled once."""
    data = networks.load_images(config.data, config.data_dir)
    for cell in cells:
        result = errors_of(cell, data)
        shown = f"{WITH[cell.normalize]}: {result['error']:.1%} wrong"
        yield Trained(cell, result, shown)


def errors(config: Config, found: dict[Cell, Record]) -> changes.Errors:
    """By kind of network and what was removed, if all seeds have been trained."""
    every: changes.Errors = {}
    for normalize, removed in itertools.product(WITH, config.removed):
        seeds = [cell_of(config, normalize, removed, seed) for seed in seeds_of(config)]
        if all(cell in found for cell in seeds):
            shares = np.array([found[cell]["error"] for cell in seeds])
            every.setdefault(WITH[normalize], {})[removed] = shares
    return {kind: e for kind, e in every.items() if NOTHING in e}


def report(config: Config, found: dict[Cell, Record]) -> list[str | Table]:
    """Errors and changes; or, to tune, the errors by learning rate."""
    if not config.tune:
        title = "Test error and its change (%, ± over the seeds), by what was removed"
        return [title, changes.table(errors(config, found))]
    table = Table("network", "removed", *map(str, RATES), box=box.MARKDOWN)
    for normalize, removed in itertools.product(WITH, (NOTHING, EVERYTHING)):
        row = []
        for rate in RATES:
            seeds = (
                cell_of(config, normalize, removed, s, rate) for s in seeds_of(config)
            )
            known = np.array([found[c]["error"] for c in seeds if c in found])
            row.append(changes.spread(known) if len(known) else "-")
        table.add_row(WITH[normalize], removed, *row)
    return ["Error on held-out images (%) by learning rate", table]


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Bars of the changes."""
    known = errors(config, found)
    if config.tune or not known:
        return []
    task, path = TASKS[config.data], folder / f"regularization_{config.data}.png"
    seeds = len(seeds_of(config))
    title = (
        f"{task.name}, {config.steps or task.steps:,} steps of {config.batch_size} "
        f"images: what removing each costs; mean and deviation of {seeds} seeds"
    )
    changes.draw(known, title, path)
    return [path]


STUDY = Study(
    "regularization",
    cells,
    train,
    report,
    draw,
    smoke={
        "data": "digits",
        "removed": (NOTHING, "all shuffling"),
        "steps": 20,
        "seeds": (0,),
    },
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
