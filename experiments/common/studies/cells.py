"""One network of a comparison of normalizations: trained, and its errors counted."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import optax

from experiments.common.data import cifar
from experiments.common.data.batches import Order, cover, draw, split
from experiments.common.data.splits import Dataset, Split, load
from experiments.common.models.norms import ONE_CALL, ConvNet, Method, make_norm
from experiments.common.training.virtual import Network

ESTIMATED = 4_096  # images at most, for population statistics

Errors = dict[str, float]
"""The share of wrong answers, by the statistics that a network is evaluated with.

running: the running statistics, or none.  pooled: pooled over mixed batches of the size
of a whole batch.  pooled_groups: over groups as in training.  batch: those of each test
group, which are put together as in training.
"""


class Task(NamedTuple):
    """What depends on the data: the network, and how it is trained.

    The learning rates by method were chosen by `--tune`; those with statistics of a
    batch share one.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    center: float
    spread: float
    steps: int
    rates: dict[str, float]


TASKS = {
    "digits": Task(
        widths=(16, 32, 64),
        strides=(2, 2, 2),
        center=0.0,
        spread=1.0,
        steps=300,
        rates={"batch_norm": 0.1, "group_norm": 0.3, "layer_norm": 0.3},
    ),
    "cifar10": Task(
        widths=(12, 24, 24, 48, 48, 48),
        strides=(2, 2, 1, 2, 1, 1),
        center=120.0,
        spread=64.0,
        steps=1_000,
        rates={"batch_norm": 0.1, "group_norm": 0.1, "layer_norm": 0.3},
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a network, so that none is trained twice."""

    data: str
    method: Method
    size: int
    order: Order
    seed: int
    rate: float
    steps: int
    batch_size: int
    momentum: float
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    measured: Literal["test", "validation"]


def make_network(cell: Cell) -> Network:
    """The network of a cell, and of those that differ in seed or order alone."""
    task = TASKS[cell.data]
    norm = make_norm(cell.method, cell.size, cell.steps, cell.momentum)
    model = ConvNet(cell.widths, cell.strides, norm, task.center, task.spread)
    rate = optax.warmup_cosine_decay_schedule(
        0, cell.rate, cell.steps // 10, cell.steps
    )
    return Network(model, optax.sgd(rate, momentum=0.9, nesterov=True))


def evaluate(cell: Cell, network: Network, data: Dataset) -> Errors:
    """Trains a network, and counts its errors."""

    def groups(indices: np.ndarray, labels: np.ndarray, order: Order) -> np.ndarray:
        found = split(indices, labels, cell.size, order)
        return found.reshape(len(found), 1, -1) if cell.method in ONE_CALL else found

    drawn = draw(cell.seed, len(data.train.labels), cell.steps, cell.batch_size)
    batches = groups(drawn, data.train.labels, cell.order)
    frozen = cell.steps // 5 if cell.method == "frozen" else 0
    variables = network.train(cell.seed, data.train, batches, frozen)

    test: Split = getattr(data, cell.measured)
    every = cover(len(test.labels), cell.batch_size)
    mixed = groups(every, test.labels, "mixed")
    errors = {"running": network.error(variables, test, mixed, train=False)}
    if cell.method == "batch_norm":
        known = drawn[: ESTIMATED // cell.batch_size]
        as_trained = batches[: len(known)].reshape(-1, cell.size)
        for kind, estimate in (("pooled", known), ("pooled_groups", as_trained)):
            new = network.population(variables, data.train, estimate)
            errors[kind] = network.error(new, test, mixed, train=False)
        alike = groups(every, test.labels, cell.order)
        errors["batch"] = network.error(variables, test, alike, train=True)
    return errors


def load_images(name: str, data_dir: Path | None) -> Dataset:
    """Images (n, height, width, colour), uint8, of "digits" or "cifar10"."""
    if name == "digits":
        splits = (Split(s.images.reshape(-1, 8, 8, 1), s.labels) for s in load(name))
        return Dataset(*splits)
    images, labels, *test = cifar.load(data_dir)
    kept = len(images) * 9 // 10  # 45,000
    train = Split(images[:kept], labels[:kept])
    return Dataset(train, Split(images[kept:], labels[kept:]), Split(*test))
