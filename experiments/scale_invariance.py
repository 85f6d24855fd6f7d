"""What the scale of weights is to batch normalization, and to the layers around it.

    python -m experiments.scale_invariance
    python -m experiments.scale_invariance --data mnist
    python -m experiments.scale_invariance --tune        # the learning rates

TIME

Expected: BN((aW)u) = BN(Wu), with the same Jacobian in u and a gradient 1/a as large;
so large weights learn slowly, and as no gradient shortens its weights they only grow,
until L2 balances that. Singular values of layer Jacobians are closer to 1 with batch
normalization (the paper's conjecture, which it leaves open).

MEASURED

The network: equal hidden layers of tanh, each batch-normalized before it or not, binary
images, plain gradient descent at a constant rate without momentum: then

    |w_T|^2 = |w_0|^2 + sum |rate g_t|^2

for the weights w of a unit and their gradients g, to rounding and epsilon; the turn of
w in a step is rate |g| / |w|, and with L2 it settles at sqrt(2 rate L2). Started from a
times the weights, at a^2 times their rate, a network with BN computes the same function
after every step.

Layer Jacobians are those of the paper's section 3.3, from one normalized vector to the
next (without BN, from what one activation is given to what the next is), at single
images, with the statistics of the training images held constant.

A run that was stopped goes on where it was.

References: Ioffe & Szegedy 2015, section 3.3; van Laarhoven 2017, "L2 regularization
versus batch and weight normalization" (the effective rate); Wan et al. 2021, "Spherical
motion dynamics" (the equilibrium).
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import growth, jacobians, scale_plot, scale_tables, study
from experiments.common.batches import draw as draw_batches
from experiments.common.data import Dataset, load
from experiments.common.deep import Net
from experiments.common.growth import Rates
from experiments.common.results import Record, plain
from experiments.common.scale_kinds import FACTORS, SMOOTHED, Kind
from experiments.common.study import Settings, Study, Trained

KNOWN = 4_096  # training images at most, for the statistics to evaluate with
EXAMPLES = 16  # at which Jacobians are taken


class Start(NamedTuple):
    """How a network begins, and what is added to its training.

    Attributes:
        normalize: whether there is batch normalization.
        scale: of the hidden layers' first weights.
        faster: a factor of their learning rate.
        decays: whether there is L2.
    """

    normalize: bool
    scale: float = 1.0
    faster: float = 1.0
    decays: bool = False


STARTS: dict[Kind, Start] = {
    "bn": Start(True),
    "bn large": Start(True, 4.0),
    "bn small": Start(True, 0.25),
    "bn large fast": Start(True, 4.0, 16.0),
    "bn decay": Start(True, decays=True),
    "plain": Start(False),
    "plain large": Start(False, 4.0),
    "plain small": Start(False, 0.25),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Which networks are trained."""
    rate: float = 0.3
    """Of learning; the best of both networks, see --tune."""
    decay: float = 0.005
    """L2 of the hidden layers' weights, where there is any."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the batches of one run."""
    steps: int = 2000
    """Of training."""
    every: int = 200
    """Steps between two measurements."""
    depth: int = 8
    """Hidden layers."""
    width: int = 64
    """Units of each."""
    batch_size: int = 64
    """Images per step."""
    tune: bool = False
    """Train the networks with BN and without at several rates instead."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Those."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    kind: Kind
    rate: float
    decay: float
    seed: int
    steps: int
    every: int
    depth: int
    width: int
    batch_size: int


def cells(config: Config) -> list[Cell]:
    """Every training of a run."""
    if config.steps % config.every or config.every % SMOOTHED:
        raise ValueError(
            f"received --steps {config.steps} and --every {config.every}: expected a "
            f"multiple of --every, and of {SMOOTHED}"
        )
    kinds: Sequence[Kind] = ("bn", "plain") if config.tune else config.kinds
    made = []
    for kind, seed in itertools.product(kinds, config.seeds):
        made += [
            Cell(
                config.data,
                kind,
                rate,
                config.decay if STARTS[kind].decays else 0.0,
                seed,
                config.steps,
                config.every,
                config.depth,
                config.width,
                config.batch_size,
            )
            for rate in (config.rates if config.tune else (config.rate,))
        ]
    return made


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        result = run(cell, data)
        yield Trained(cell, result, f"{cell.kind}: {result['test']:.1%}")


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network, and measures on the way."""
    start = STARTS[cell.kind]
    net = Net(cell.depth, cell.width, "tanh", start.normalize)
    drawn = draw_batches(cell.seed, len(data.train.labels), cell.steps, cell.batch_size)
    known = jnp.asarray(data.train.images[:KNOWN], jnp.float32)
    params = net.init(
        jax.random.key(cell.seed), known.shape[1], jnp.asarray(start.scale)
    )
    rates = Rates(cell.rate, cell.rate * start.faster, cell.decay)
    taken, singular = [], [_singular(net, params, known)]
    for batches in drawn.reshape(-1, cell.every, cell.batch_size):
        params, steps = growth.descend(net, params, rates, data.train, batches)
        taken.append(jax.device_get(steps))
        singular.append(_singular(net, params, known))
    steps: growth.Steps = jax.tree.map(lambda *parts: np.concatenate(parts), *taken)
    with np.errstate(invalid="ignore", over="ignore"):  # a network may diverge
        growing = growth.predicted_length(steps, rates.kernels)
        error = np.abs(steps.length[-1] / growing - 1).max()
    _, statistics = net.apply(params, known)
    result = {
        "loss": steps.loss.reshape(-1, SMOOTHED).mean(1),
        "validation": _accuracy(net, params, statistics, data.validation),
        "test": _accuracy(net, params, statistics, data.test),
        "length": steps.length[:: cell.every],
        "turn": np.sqrt((steps.turn**2).reshape(-1, cell.every, cell.depth).mean(1)),
        "along": steps.along.max(),
        "growth": error if start.normalize and not cell.decay else None,
        "deviations": jacobians.deviations(
            net, params, known[: cell.batch_size], FACTORS
        ),
        "singular": singular,
    }
    return plain(result, 4)


def _singular(net: Net, params: Record, known: jax.Array) -> np.ndarray:
    """Percentiles of the singular values, (layer, percentile)."""
    _, statistics = net.apply(params, known)
    found = jacobians.of_layers(net, params, statistics, known[:EXAMPLES])
    return jacobians.singular_values(found)


def _accuracy(net: Net, params: Record, statistics: Record, split) -> float:
    logits, _ = net.apply(params, jnp.asarray(split.images, jnp.float32), statistics)
    return float((logits.argmax(-1) == split.labels).mean())


def grouped(found: dict[Cell, Record]) -> dict[tuple[Kind, float], list[Record]]:
    """The results of all seeds, by kind and rate."""
    groups: dict[tuple[Kind, float], list[Record]] = {}
    for cell, result in found.items():
        groups.setdefault((cell.kind, cell.rate), []).append(result)
    return groups


def report(config: Config, found: dict[Cell, Record]) -> Sequence[object]:
    """The tables."""
    return scale_tables.report(grouped(found), config.decay)


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Six panels."""
    if config.tune:
        return []
    path = folder / f"scale_invariance_{config.data}.png"
    scale_plot.draw(grouped(found), config.data, config.every, config.decay, path)
    return [path]


SMOKE = {
    "data": "digits",
    "kinds": ("bn", "bn large", "plain"),
    "seeds": (0,),
    "steps": 100,
    "every": 50,
    "depth": 3,
    "width": 10,
}
STUDY = Study("scale_invariance", cells, train, report, draw, SMOKE)


if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
