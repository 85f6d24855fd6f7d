"""What the scale of weights is to batch normalization, and to the layers around it.

    python -m experiments.scale_invariance
    python -m experiments.scale_invariance --data mnist
    python -m experiments.scale_invariance --tune        # the learning rates

Time: a minute on two CPU cores, two with --tune; with --smoke some seconds.

Expected: BN((aW)u) = BN(Wu), with the same Jacobian in u and a gradient 1/a as large;
so large weights learn slowly, and as no gradient shortens its weights they only grow,
until L2 balances that. Singular values of layer Jacobians are closer to 1 with batch
normalization (the paper's conjecture, which it leaves open).

Measured (digits, 8 layers of 64, 3 seeds, jax 0.10.2, two cores of an AMD EPYC):

    W of a hidden layer, after training, times       0.01    0.1      2    100
    with BN, change of its output                    17 %  0.2 %   2e-5   2e-5
                    of the Jacobian in u             19 %  0.3 %   2e-5   3e-5
                    of the gradient, times a         20 %  0.3 %   2e-5   3e-5
    without BN, of the same three                   99 %   90 %  100 %  99 x

    singular values of layer Jacobians       before training       after
    5, 50 and 95 %; weights first at  1/4    0.02  0.68  2.2       0.005  0.11   1.1
    with BN                             1    0.02  0.68  2.2       0.02   0.46   1.6
                                        4    0.02  0.68  2.2       0.02   0.63   2.1
    without BN                        1/4    0.02  0.20  0.44      0.02   0.20   0.44
                                        1    0.06  0.70  1.6       0.02   0.43   1.5
                                        4    7e-5  0.15  4.0       3e-6   0.01   3.1

The identities hold but for epsilon, 1e-5 beside the variance: it is all of the 2e-5,
and what is lost below a tenth of the weights. The lengths of the weights are what the
gradients say within 2e-5; from a quarter of the usual ones they grow 2.7 times, and the
rate over |w|^2 falls to a sixth. With L2 weights turn by 0.053 a step; sqrt(2 rate L2)
is 0.055. From four times the weights, training is slower (91.6 % of the test images,
not 94.4), at sixteen times the rate the same: to four digits of the loss for a hundred
steps, until rounding has grown, and 93.8 % in the end. Without BN, a network of a
quarter of the weights does not train (8 %).

The conjecture: singular values are not closer to 1 with batch normalization than
without, from the first weights that suit the network without. What BN does is to make
them independent of these: without it they are all below 0.5 from weights of a quarter,
and spread over five orders of magnitude from four times the weights. Training lowers
the median of both. Accuracies have standard deviations of up to 1.7.

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
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import study
from experiments.common.data.batches import draw as draw_batches
from experiments.common.data.splits import Dataset, Split, load
from experiments.common.models.deep import Net
from experiments.common.results import Record, plain
from experiments.common.settings import Settings
from experiments.common.studies import jacobians, scale_plot, scale_tables
from experiments.common.studies.scale_kinds import FACTORS, SMOOTHED, Kind
from experiments.common.study import Study, Trained
from experiments.common.training import growth
from experiments.common.training.growth import Rates

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
    validation, test = _accuracies(net, params, known, data.validation, data.test)
    result = {
        "loss": steps.loss.reshape(-1, SMOOTHED).mean(1),
        "validation": validation,
        "test": test,
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


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: Net, params: Record, x: jax.Array, statistics: Record | None = None):
    return net.apply(params, x, statistics)


def _singular(net: Net, params: Record, known: jax.Array) -> np.ndarray:
    """Percentiles of the singular values, (layer, percentile)."""
    _, statistics = _apply(net, params, known)
    found = jacobians.of_layers(net, params, statistics, known[:EXAMPLES])
    return jacobians.singular_values(found)


def _accuracies(net: Net, params: Record, known: jax.Array, *parts: Split):
    """On each part, by the statistics of `known`."""
    _, statistics = _apply(net, params, known)
    images = np.concatenate([part.images for part in parts]).astype(np.float32)
    logits, _ = _apply(net, params, jnp.asarray(images), statistics)
    right = np.asarray(logits).argmax(-1) == np.concatenate([p.labels for p in parts])
    ends = np.cumsum([len(part.labels) for part in parts])
    return [share.mean() for share in np.split(right, ends[:-1])]


def grouped(found: dict[Cell, Record]) -> dict[tuple[Kind, float], list[Record]]:
    """The results of all seeds, by kind and rate."""
    groups: dict[tuple[Kind, float], list[Record]] = {}
    for cell, result in found.items():
        groups.setdefault((cell.kind, cell.rate), []).append(result)
    return groups


def report(config: Config, found: dict[Cell, Record]) -> Sequence[object]:
    """The tables."""
    tables = scale_tables.report(grouped(found), config.decay)
    return tables[:1] if config.tune else tables


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
