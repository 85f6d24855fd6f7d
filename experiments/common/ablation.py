"""One network with some regularizers and not others: trained, its errors counted."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import optax

import bnjax
from experiments.common import cells as networks
from experiments.common.augment import Strength, make_augment
from experiments.common.batches import Shuffling, draw
from experiments.common.classifier import Classifier
from experiments.common.data import Dataset, Split
from experiments.common.regularized import RegularizedNet
from experiments.common.results import Record


class Task(NamedTuple):
    """What depends on the data, besides `networks.TASKS`.

    Attributes:
        name: of the data.
        images: of training.
        steps: of training.
        padding: how far images are moved.
        white: the largest value of a pixel.
        rates: of learning, with batch normalization and without, chosen by `--tune`.
    """

    name: str
    images: int
    steps: int
    padding: int
    white: float
    rates: dict[bool, float]


TASKS = {
    "digits": Task("Digits", 1_097, 300, 1, 1.0, {True: 0.1, False: 0.1}),
    "cifar10": Task("CIFAR-10", 5_000, 1_000, 4, 255.0, {True: 0.1, False: 0.03}),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    normalize: bool
    dropout: float
    decay: float
    lrn: bool
    augmentation: Strength
    shuffling: Shuffling
    seed: int
    rate: float
    images: int
    steps: int
    batch_size: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    measured: Literal["test", "validation"]


def errors_of(cell: Cell, data: Dataset) -> Record:
    """The shares of wrong answers of one network, after its training."""
    known = Split(*(part[: cell.images] for part in data.train))
    batches = draw(
        cell.seed, len(known.labels), cell.steps, cell.batch_size, cell.shuffling
    )
    alike = dataclasses.replace(cell, seed=0, shuffling="full", measured="test")
    classifier, variables = make_classifier(alike), {}
    for state, _ in classifier.train(cell.seed, known, batches):
        variables = state.variables
    measured: Split = getattr(data, cell.measured)
    wrong = {"error": measured, "training_error": known}
    return {n: 1 - classifier.accuracy(variables, split) for n, split in wrong.items()}


@functools.cache
def make_classifier(cell: Cell) -> Classifier:
    """What trains a cell, whatever its seed and order."""
    task, shape = TASKS[cell.data], networks.TASKS[cell.data]
    # Of the paper, whose pixels were not divided by anything.
    alpha = 1e-4 * (255 * shape.spread / task.white) ** 2
    model = RegularizedNet(
        cell.widths,
        cell.strides,
        cell.normalize,
        dropout=cell.dropout,
        lrn=alpha if cell.lrn else 0.0,
        center=shape.center,
        spread=shape.spread,
    )
    rate = optax.warmup_cosine_decay_schedule(
        0, cell.rate, cell.steps // 10, cell.steps
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(cell.decay, bnjax.training.weight_decay_mask),
        optax.sgd(rate, momentum=0.9, nesterov=True),
    )
    flip = cell.data == "cifar10"
    augment = make_augment(cell.augmentation, task.padding, flip, task.white)
    return Classifier(model, optimizer, augment)
