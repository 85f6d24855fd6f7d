"""One network with some regularizers and not others: trained, its errors counted."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bnjax
from experiments.common.data.augment import Strength, make_augment
from experiments.common.data.batches import Shuffling, draw
from experiments.common.data.splits import Dataset, Split
from experiments.common.models.regularized import RegularizedNet
from experiments.common.results import Record
from experiments.common.studies import cells as networks
from experiments.common.training.classifier import Classifier, State


class Task(NamedTuple):
    """What depends on the data, besides `networks.TASKS`.

    Attributes:
        name: of the data.
        images: of training.
        steps: of training.
        seeds: how many trainings of each kind.
        padding: how far images are moved.
        white: the largest value of a pixel.
        rates: of learning, with batch normalization and without, chosen by `--tune`.
    """

    name: str
    images: int
    steps: int
    seeds: int
    padding: int
    white: float
    rates: dict[bool, float]


TASKS = {
    "digits": Task("Digits", 1_097, 300, 2, 1, 1.0, {True: 0.3, False: 0.3}),
    "cifar10": Task("CIFAR-10", 2_500, 500, 2, 4, 255.0, {True: 0.1, False: 0.03}),
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
    """The share of wrong answers of one network, after its training."""
    known = Split(*(part[: cell.images] for part in data.train))
    batches = draw(
        cell.seed, len(known.labels), cell.steps, cell.batch_size, cell.shuffling
    )
    alike = dataclasses.replace(
        cell, seed=0, rate=0.0, decay=0.0, shuffling="full", measured="test"
    )
    classifier, variables = make_classifier(alike), {}
    classifier.strengths = {"rate": cell.rate, "decay": cell.decay}
    for state, _ in classifier.train(cell.seed, known, batches):
        variables = state.variables
    error = 1 - classifier.accuracy(variables, getattr(data, cell.measured))
    return {"error": error}


class Regularized(Classifier):
    """A classifier whose learning rate and L2 are not compiled into it.

    Attributes:
        strengths: both, of the trainings that begin.
    """

    strengths: dict[str, float]

    def init(self, seed: int, images: jax.Array) -> State:
        """The state before the first step."""
        state = super().init(seed, images)
        strengths = {n: jnp.asarray(v, jnp.float32) for n, v in self.strengths.items()}
        optimizer: Any = state.optimizer
        return state._replace(optimizer=optimizer._replace(hyperparams=strengths))


@functools.cache
def make_classifier(cell: Cell) -> Regularized:
    """What trains a cell, whatever its seed, order, learning rate and L2."""
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
    flip = cell.data == "cifar10"
    augment = make_augment(cell.augmentation, task.padding, flip, task.white)
    return Regularized(model, descent(cell.steps), augment)


def descent(steps: int) -> optax.GradientTransformationExtraArgs:
    """Nesterov's, with L2 on kernels; its state holds the strengths of both."""
    height = optax.warmup_cosine_decay_schedule(0, 1, steps // 10, steps)

    @optax.inject_hyperparams
    def make(rate: Any, decay: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(decay, bnjax.training.weight_decay_mask),
            optax.trace(0.9, nesterov=True),
            optax.scale_by_schedule(lambda step: -rate * height(step)),
        )

    return make(rate=0.0, decay=0.0)
