"""The scale of the weights, with batch normalization (BN) and without.

    python -m experiments.scale_invariance
    python -m experiments.scale_invariance --data digits
    python -m experiments.scale_invariance --tune        # the learning rates

Time: two minutes, and two with --tune, if two processes with a core each share the
trainings (`--part`); with --smoke some seconds.

Expected: BN((a·W)u) = BN(Wu), the gradient to the input u is the same, and the gradient
to a·W is 1/a times the gradient to W. So large weights learn slowly. With BN the
gradient is orthogonal to the weights, so the weights only grow, until weight decay
balances the growth. The paper conjectures, and leaves open, that singular values of
layer Jacobians are closer to 1 with batch normalization.

Measured (Fashion-MNIST, 8 layers of 64, 3 seeds, jax 0.10.2, two cores of an AMD EPYC):

    after training, W of a hidden layer is replaced by a·W

    factor a                                         0.01    0.1      2    100
    relative change, with BN
        of the output                                0.08  0.001   7e-6   9e-6
        of the gradient to the input                 0.09  0.001   8e-6   1e-5
        of a·gradient to W                           0.11  0.001   1e-5   1e-5
    relative change, without BN, of each             0.99   0.90   1.00    100

    singular values of layer Jacobians: percentiles 5, 50 and 95

    factor of the initial weights            before training       after
    with BN                           1/4    0.02  0.67  2.2       0.007  0.18   1.1
                                        1    0.02  0.67  2.2       0.02   0.51   1.7
                                        4    0.02  0.67  2.2       0.02   0.62   2.1
    without BN                        1/4    0.02  0.20  0.44      0.02   0.20   0.44
                                        1    0.06  0.71  1.6       0.02   0.50   1.5
                                        4    5e-5  0.19  4.0       2e-7   0.01   3.1

"The gradient to the input" is a vector-Jacobian product with one random cotangent, not
the whole Jacobian. The identities hold except for epsilon, the 1e-5 that BN adds to the
variance. Epsilon explains the 1e-5, and the large errors for a <= 0.1.

The formula below predicts the length of the weights from the gradients with a relative
error of 5e-6. If the initial weights are a quarter of the usual ones, the weights grow
1.8 times, and the effective rate, rate / |w|^2, falls to a third. With weight decay the
weights turn by 0.053 radians per step; the prediction sqrt(2 · rate · decay) is 0.055.

If the initial weights are four times the usual ones, training is slower: the test
accuracy is 79.1 %, not 81.1 %. With the rate of these weights 16 times as large,
training is the same again: the loss is within 2 % all along, and the final accuracy is
80.9 %. The network without BN does not train from a quarter of the usual weights (10
%). Accuracies have standard deviations of up to 1 point, with weight decay 3.

The conjecture is not confirmed. If the initial weights suit the network without BN, its
singular values are as close to 1 as with BN. But with BN the singular values before
training do not depend on the scale of the initial weights. Without BN, the scale
decides: from a quarter of the usual weights 95 % of the singular values are below 0.5,
and from four times the weights they spread over five orders of magnitude. Training
lowers the median of both networks, if the initial weights are the usual ones.

The network has equal hidden layers of tanh, with or without BN before tanh, and its
inputs are binary images. The optimizer is plain gradient descent at a constant rate,
without momentum. The update of a weight vector w of a unit with the gradient g is

    w - rate (g + decay w)

Only the networks with weight decay have a decay other than 0, and only for the weights
of hidden layers. With BN and without decay, except for rounding and epsilon,

    |w_T|^2 = |w_0|^2 + sum |rate g_t|^2

In one step w turns by the angle rate |g| / |w|. With BN and decay this angle settles at
sqrt(2 · rate · decay). A network with BN that starts from weights a times as large, and
trains them with a rate a^2 times as large, computes the same function after every step.

The layer Jacobians are those of section 3.3 of the paper: from the normalized vector of
one layer to the normalized vector of the next. Without BN they are from the input of
one activation to the input of the next. They are taken at single images. The statistics
are those of the training images, and are constants.

The network and the data are those of `experiments.saturation`. To change them, see
`Network` and `load` there; to add a network, `KINDS`; the optimizer, `descend`. If a
run was stopped, repeat the command to continue. Results are cached by `Cell`: after
changing the code use a new --out.

References: Ioffe & Szegedy 2015, section 3.3; van Laarhoven 2017, "L2 regularization
versus batch and weight normalization" (the effective rate); Wan et al. 2021, "Spherical
motion dynamics" (the equilibrium).
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.table import Table

import bnjax
from experiments.common import panels, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.rates import percent
from experiments.common.results import Record, plain
from experiments.common.study import Settings, Study, Trained
from experiments.saturation import (
    ACTIVATIONS,
    Network,
    Params,
    evaluate,
    load,
)

FACTORS = 1e-3, 1e-2, 1e-1, 0.5, 2.0, 1e1, 1e2, 1e3  # a in BN((a·W)u)
QUANTITIES = "output", "gradient to the input", "a·gradient to W"
PERCENTILES = 5, 25, 50, 75, 95  # of singular values
EXAMPLES = 16  # images at which Jacobians are taken
LOSS_STEPS = 50  # the mean loss of so many steps is recorded


class Kind(NamedTuple):
    """A network: what differs from the usual one, and how it is shown."""

    label: str
    colour: str
    normalize: bool
    init_scale: float = 1.0  # a factor of the hidden layers' initial weights
    rate_factor: float = 1.0  # a factor of the hidden layers' learning rate
    weight_decay: bool = False  # whether the hidden layers have weight decay


KINDS = {
    "bn": Kind("with BN", "#0072b2", True),
    "bn large": Kind("with BN, 4·W", "#1a1a6c", True, init_scale=4.0),
    "bn small": Kind("with BN, W/4", "#56b4e9", True, init_scale=0.25),
    "bn large fast": Kind(
        "with BN, 4·W, 16·rate", "#cc79a7", True, init_scale=4.0, rate_factor=16.0
    ),
    "bn decay": Kind("with BN, weight decay", "#009e73", True, weight_decay=True),
    "plain": Kind("without BN", "#d55e00", False),
    "plain large": Kind("without BN, 4·W", "#d55e00", False, init_scale=4.0),
    "plain small": Kind("without BN, W/4", "#d55e00", False, init_scale=0.25),
}
BY_SCALE = "bn small", "bn", "bn large", "plain small", "plain", "plain large"


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "fashion_mnist"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """The networks to train: keys of `KINDS`."""
    rate: float = 0.1
    """Learning rate, the best one for both networks (--tune)."""
    weight_decay: float = 0.015
    """Weight decay of the hidden layers, in the networks that have it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds of the initial weights and batches, one run each."""
    steps: int = 2000
    """Number of training steps."""
    measure_every: int = 200
    """Number of steps between two measurements."""
    depth: int = 8
    """Number of hidden layers."""
    width: int = 64
    """Number of units of each hidden layer."""
    batch_size: int = 64
    """Number of images per step."""
    tune: bool = False
    """Only train the networks bn and plain, at each of --rates."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates that --tune tries."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The settings of one training; also the key of its result."""

    data: str
    kind: str
    rate: float
    weight_decay: float
    seed: int
    steps: int
    measure_every: int
    depth: int
    width: int
    batch_size: int


def cells(config: Config) -> list[Cell]:
    """Every training of a run."""
    if config.steps % config.measure_every or config.measure_every % LOSS_STEPS:
        raise ValueError(
            f"received --steps {config.steps} and --measure-every "
            f"{config.measure_every}: expected --steps as a multiple of "
            f"--measure-every, and that as a multiple of {LOSS_STEPS}"
        )
    for kind in config.kinds:
        if kind not in KINDS:
            raise ValueError(f"received --kinds {kind}: expected {', '.join(KINDS)}")
    fields = {field.name for field in dataclasses.fields(Cell)}
    shared = {name: v for name, v in vars(config).items() if name in fields}
    kinds = ("bn", "plain") if config.tune else config.kinds
    rates = config.rates if config.tune else (config.rate,)
    trainings = []
    for kind, seed, rate in itertools.product(kinds, config.seeds, rates):
        weight_decay = config.weight_decay if KINDS[kind].weight_decay else 0.0
        settings = {
            **shared,
            "kind": kind,
            "seed": seed,
            "rate": rate,
            "weight_decay": weight_decay,
        }
        trainings.append(Cell(**settings))
    return trainings


# Training


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        result = run(cell, data)
        yield Trained(cell, result, f"{cell.kind}: {result['test']:.1%}")


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network, and measures before, during and after the training."""
    kind = KINDS[cell.kind]
    network = Network(cell.depth, cell.width, "tanh", kind.normalize)
    statistics_images = jnp.asarray(data.train.images[:4_096], jnp.float32)
    pixels = statistics_images.shape[1]
    key = jax.random.key(cell.seed)
    params = network.init(key, pixels, jnp.asarray(kind.init_scale))
    hidden_rate = cell.rate * kind.rate_factor
    examples = len(data.train.labels)
    all_batches = draw_batches(cell.seed, examples, cell.steps, cell.batch_size)
    measurements = []
    singular = [singular_values(network, params, statistics_images)]
    for batches in all_batches.reshape(-1, cell.measure_every, cell.batch_size):
        params, measured = descend(
            network,
            params,
            data.train,
            batches,
            cell.rate,
            hidden_rate,
            cell.weight_decay,
        )
        measurements.append(measured)
        singular.append(singular_values(network, params, statistics_images))
    by_step = jax.tree.map(lambda *arrays: np.concatenate(arrays), *measurements)
    final_length = mean_lengths(params, cell.depth)
    with np.errstate(invalid="ignore", over="ignore"):  # a network may diverge
        predicted = predicted_length(by_step, hidden_rate)
        prediction_error = np.abs(final_length / predicted - 1).max()
    squared_turns = (by_step["turn"] ** 2).reshape(-1, cell.measure_every, cell.depth)
    predictable = kind.normalize and not kind.weight_decay
    result = {
        "loss": by_step["loss"].reshape(-1, LOSS_STEPS).mean(1),
        **evaluate(network, params, data),
        "length": [*by_step["length"][:: cell.measure_every], final_length],
        "turn": np.sqrt(squared_turns.mean(1)),
        "cosine": by_step["cosine"].max(),
        "prediction_error": prediction_error if predictable else None,
        "deviations": deviations(network, params, statistics_images[: cell.batch_size]),
        "singular": singular,
    }
    return plain(result, 4)


@functools.partial(jax.jit, static_argnums=0)
def descend(
    network: Network,
    params: Params,
    data: Split,
    batches: jax.Array,
    rate: jax.Array,
    hidden_rate: jax.Array,
    weight_decay: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
    """The parameters after a step on each of `batches`, and what is measured.

    Every step is w - rate (g + decay w). The kernels of the hidden layers have
    `hidden_rate` and `weight_decay`; all other parameters have `rate` and no decay.

    Measured are the loss of each batch, (step,), and what `measure` returns,
    (step, layer).
    """

    def loss(params, x, labels):
        logits, _ = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(path, w, g):
        layer, name = (entry.key for entry in path)
        if layer != "last" and name == "kernel":
            return w - hidden_rate * (g + weight_decay * w)
        return w - rate * g

    def step(params, batch):
        x = data.images[batch].astype(jnp.float32)
        batch_loss, gradients = jax.value_and_grad(loss)(params, x, data.labels[batch])
        updated = jax.tree.map_with_path(update, params, gradients)
        by_layer = [
            measure(w["kernel"], g["kernel"], new["kernel"])
            for w, g, new in zip(
                hidden_layers(params, network.depth),
                hidden_layers(gradients, network.depth),
                hidden_layers(updated, network.depth),
                strict=True,
            )
        ]
        measured = jax.tree.map(lambda *values: jnp.stack(values), *by_layer)
        return updated, {"loss": batch_loss, **measured}

    return jax.lax.scan(step, params, batches)


def hidden_layers(stacked: Params, depth: int) -> list[Params]:
    """A dictionary for each of `depth` hidden layers.

    Args:
        stacked: parameters, gradients or statistics, as `Network` has them.
        depth: the number of hidden layers.
    """
    layers = [stacked["first"]]
    for i in range(depth - 1):
        layers.append({name: values[i] for name, values in stacked["rest"].items()})
    return layers


def measure(w: jax.Array, g: jax.Array, new: jax.Array) -> dict[str, jax.Array]:
    """Measures one step of a layer; every column is the weight vector of a unit.

    Args:
        w: the weights before the step.
        g: their gradients.
        new: the weights after the step.

    Returns:
        Root mean squares over units of "length" |w|, "gradient_norm" |g| and "turn",
        the angle in radians between w and new; and "cosine", the largest |cosine| of
        the angle between w and g.
    """

    def directions(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=0, keepdims=True), 1e-30)

    # The angle from the chord c, 2 arcsin(c/2), since arccos of a cosine near 1 loses
    # small angles in float32.
    chord = jnp.linalg.norm(directions(new) - directions(w), axis=0)
    turn = 2 * jnp.arcsin(jnp.minimum(chord / 2, 1))
    return {
        "length": jnp.sqrt((w**2).sum(0).mean()),
        "gradient_norm": jnp.sqrt((g**2).sum(0).mean()),
        "turn": jnp.sqrt((turn**2).mean()),
        "cosine": jnp.abs((directions(w) * directions(g)).sum(0)).max(),
    }


def mean_lengths(params: Params, depth: int) -> np.ndarray:
    """(layer,): the root mean square over units of the length of their weights."""
    kernels = [np.asarray(layer["kernel"]) for layer in hidden_layers(params, depth)]
    return np.array([np.sqrt((w**2).sum(0).mean()) for w in kernels])


def predicted_length(by_step: dict[str, Any], hidden_rate: float) -> np.ndarray:
    """(layer,): the length after the last step, by Pythagoras, without weight decay."""
    initial_length = by_step["length"][0]
    step_lengths = hidden_rate * by_step["gradient_norm"]
    return np.sqrt(initial_length**2 + (step_lengths**2).sum(0))


# Jacobians


def singular_values(
    network: Network, params: Params, statistics_images: jax.Array
) -> np.ndarray:
    """Percentiles of the singular values of layer Jacobians, (layer, percentile)."""
    examples = statistics_images[:EXAMPLES]
    jacobians = np.asarray(
        layer_jacobians(network, params, statistics_images, examples)
    )
    if not np.isfinite(jacobians).all():  # the network diverged
        return np.full((len(jacobians), len(PERCENTILES)), np.nan)
    values = np.linalg.svd(jacobians, compute_uv=False)
    return np.percentile(values.reshape(len(values), -1), PERCENTILES, axis=1).T


class Layer(NamedTuple):
    """The parameters of a hidden layer, and its statistics: none without BN."""

    params: Params
    statistics: Params


@functools.partial(jax.jit, static_argnums=0)
def layer_jacobians(
    network: Network, params: Params, statistics_images: jax.Array, x: jax.Array
) -> jax.Array:
    """The Jacobians of `layer_map`, (layer, example, unit, unit).

    There is one for every hidden layer but the first.

    Args:
        network: the network.
        params: its parameters.
        statistics_images: (example, pixel); their statistics are constants here.
        x: (example, pixel), the images at which the Jacobians are taken.
    """
    _, statistics = network.apply(params, statistics_images)
    layers = [
        Layer(layer_params, layer_statistics)
        for layer_params, layer_statistics in zip(
            hidden_layers(params, network.depth),
            hidden_layers(statistics, network.depth),
            strict=True,
        )
    ]
    jacobians = []
    normalized = normalize_input(network, layers[0], x)
    for below, layer in itertools.pairwise(layers):
        to_next = functools.partial(layer_map, network, below, layer)
        jacobians.append(jax.vmap(jax.jacfwd(to_next))(normalized))
        normalized = jax.vmap(to_next)(normalized)
    return jnp.stack(jacobians)


def layer_map(
    network: Network, below: Layer, layer: Layer, normalized: jax.Array
) -> jax.Array:
    """The normalized vector of a layer, (unit,), from that of the layer below.

    Both belong to one example. They are normalized without scale and bias. Without BN,
    they are the inputs of the activations.
    """
    z = normalized[None]
    if network.normalize:
        z = z * below.params["scale"][None] + below.params["bias"][None]
    u = ACTIVATIONS[network.activation](z)
    return normalize_input(network, layer, u)[0]


def normalize_input(network: Network, layer: Layer, u: jax.Array) -> jax.Array:
    """The normalized vectors of a layer whose input is `u`, (example, unit)."""
    if not network.normalize:
        z, _ = network.preactivation(u, layer.params)
        return z
    z = u @ layer.params["kernel"]
    return bnjax.normalize(z, layer.statistics["mean"], layer.statistics["var"])


def deviations(
    network: Network, params: Params, x: jax.Array, factors: Sequence[float] = FACTORS
) -> np.ndarray:
    """Relative changes when W of a hidden layer is replaced by a·W.

    The result is (quantity, factor), the largest of all layers. The quantities are
    `QUANTITIES`: the output before the activation, and two gradients, which are
    vector-Jacobian products with one random cotangent of this output. All are those of
    training: the statistics are the batch's, and the gradients go through them.
    """
    random = np.random.default_rng(0)
    cotangent = jnp.asarray(random.normal(size=(len(x), network.width)), x.dtype)
    by_layer = []
    u = x  # the input of the layer
    for layer_params in hidden_layers(params, network.depth):
        by_layer.append(
            layer_deviations(network, layer_params, u, cotangent, jnp.asarray(factors))
        )
        u, _ = network.layer(u, layer_params)
    return np.max(by_layer, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def layer_deviations(
    network: Network,
    layer_params: Params,
    u: jax.Array,
    cotangent: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """The relative changes for one layer, whose input is `u`: (quantity, factor)."""

    def preactivation(u, kernel):
        z, _ = network.preactivation(u, {**layer_params, "kernel": kernel})
        return z

    def quantities(a):
        output, pullback = jax.vjp(preactivation, u, a * layer_params["kernel"])
        to_input, to_kernel = pullback(cotangent)
        return output, to_input, a * to_kernel

    unscaled = quantities(1.0)

    def relative_changes(a):
        norm = jnp.linalg.norm
        pairs = zip(quantities(a), unscaled, strict=True)
        return jnp.stack([norm(new - old) / norm(old) for new, old in pairs])

    # lax.map, not vmap: each factor is computed with the operations of the unscaled
    # reference. A batched matrix product may round differently.
    return jax.lax.map(relative_changes, factors).T


# Tables and picture


def series(
    results: dict[Cell, Record], field: str, *kinds: str
) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """The kind, its values (seed, ...) and a line's style, for kinds with results."""
    for kind in kinds:
        rows = [result[field] for cell, result in results.items() if cell.kind == kind]
        if rows:
            style = {"label": KINDS[kind].label, "color": KINDS[kind].colour}
            yield kind, np.array(rows, float), style


def report(config: Config, results: dict[Cell, Record]) -> list[Table]:
    """Accuracies and weights of each kind; the identities; the singular values."""
    main = Table(
        "network",
        "rate",
        "validation (%)",
        "test (%)",
        "final loss",
        "weights grew",
        "prediction error",
        "largest cosine of w and g",
        "turn per step",
        "sqrt(2 · rate · decay)",
        box=box.MARKDOWN,
    )
    groups: dict[tuple[str, float], list[Record]] = {}
    for cell, result in results.items():
        groups.setdefault((cell.kind, cell.rate), []).append(result)
    for (name, rate), rows in groups.items():
        kind = KINDS[name]
        values = {field: np.array([r[field] for r in rows], float) for field in rows[0]}
        growth = values["length"][:, -1] / values["length"][:, 0]
        predictable = kind.normalize and not kind.weight_decay
        error = f"{values['prediction_error'].max():.1e}" if predictable else "-"
        turn = f"{equilibrium(rate, config.weight_decay):.3g}"
        main.add_row(
            kind.label,
            f"{rate:g}",
            percent(values["validation"]),
            percent(values["test"]),
            f"{values['loss'][:, -1].mean():.3g}",
            f"{growth.mean():.3g} x",
            error,
            f"{values['cosine'].max():.1e}",
            f"{values['turn'][:, -1].mean():.3g}",
            turn if kind.weight_decay else "-",
        )
    if config.tune:
        return [main]
    title = "relative change, by factor a"
    changes = Table(title, *(f"{a:g}" for a in FACTORS), box=box.MARKDOWN)
    for kind, values, _ in series(results, "deviations", "bn", "plain"):
        for quantity, row in zip(QUANTITIES, values.max(0), strict=True):
            label = f"{KINDS[kind].label}: {quantity}"
            changes.add_row(label, *(f"{v:.1e}" for v in row))
    title = "singular values, percentiles"
    singular = Table(title, *map(str, PERCENTILES), box=box.MARKDOWN)
    for kind, values, _ in series(results, "singular", *BY_SCALE):
        for when, point in (("before", 0), ("after", -1)):
            percentiles = values[:, point].mean((0, 1))
            label = f"{KINDS[kind].label}, {when}"
            singular.add_row(label, *(f"{v:.3g}" for v in percentiles))
    return [main, changes, singular]


def equilibrium(rate: float, decay: float) -> float:
    """The turn per step, in radians, when decay balances growth (Wan et al. 2021)."""
    return math.sqrt(2 * rate * decay)


def draw(config: Config, results: dict[Cell, Record], folder: Path) -> list[Path]:
    """Six panels: the identities, the effective rate, and the Jacobians."""
    if config.tune:
        return []
    count = len({cell.seed for cell in results})
    seeds = f"{count} seed{'s' * (count > 1)}"
    title = f"{panels.DATA[config.data]}, hidden layers of tanh, {seeds}"
    figure, axes = panels.make(title, (9.8, 5.8), 2, 3)
    identities, losses, rates, turns, over_time, by_scale = axes
    dots: dict[str, Any] = {"marker": "o", "ms": 3}

    for kind, values, style in series(results, "deviations", "bn", "plain"):
        # Without BN all quantities change alike.
        quantities = QUANTITIES if kind == "bn" else QUANTITIES[:1]
        for i, quantity in enumerate(quantities):
            style |= {"ls": ("-", "--", ":")[i], "marker": "os^"[i], "ms": 3}
            style |= {"label": f"{KINDS[kind].label}: {quantity}"}
            panels.line(identities, FACTORS, values[:, i], **style)
    title = "After training: a·W instead of W"
    panels.label(identities, title, "factor a", "relative change", log="xy")

    kinds = "bn small", "bn", "bn large", "bn large fast", "plain"
    for kind, values, style in series(results, "loss", *kinds):
        steps = LOSS_STEPS * (np.arange(values.shape[1]) + 0.5)
        ls = "--" if kind == "bn large fast" else "-"
        panels.line(losses, steps, values, ls=ls, **style)
    title = "Initial weights 1/4, 1 and 4 times as large"
    panels.label(losses, title, "training steps", "training loss", log="y")

    for _, values, style in series(results, "length", "bn small", "bn", "bn large"):
        effective = (config.rate / values**2).mean(-1)
        steps = config.measure_every * np.arange(effective.shape[1])
        panels.line(rates, steps, effective, **dots, **style)
    y = "rate / |w|², mean of layers"
    panels.label(rates, "The effective rate", "training steps", y, log="y")

    for _, values, style in series(results, "turn", "bn", "bn decay"):
        steps = config.measure_every * (np.arange(values.shape[1]) + 0.5)
        panels.line(turns, steps, values.mean(-1), **dots, **style)
    turn = equilibrium(config.rate, config.weight_decay)
    turns.axhline(turn, label="√(2 · rate · decay)", color="0.4", lw=1, ls=":")
    title = "How far weights turn in a step"
    panels.label(turns, title, "training steps", "radians, mean of layers", log="y")

    y = "singular values: median, 5 to 95 %"
    for _, values, style in series(results, "singular", "plain", "bn"):
        low, _, median, _, high = values.mean((0, 2)).T
        steps = config.measure_every * np.arange(len(median))
        over_time.plot(steps, median, **dots, **style)
        over_time.fill_between(steps, low, high, alpha=0.15, lw=0, color=style["color"])
    over_time.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians over training"
    panels.label(over_time, title, "training steps", y, log="y")

    for kind, values, _ in series(results, "singular", *BY_SCALE):
        usual = "bn" if KINDS[kind].normalize else "plain"
        for point, when, shift in ((0, "before", 0), (-1, "after", 2)):
            low, _, median, _, high = values[:, point].mean((0, 1))
            style = {"color": KINDS[usual].colour, "marker": "o", "ms": 4}
            style |= {"mfc": "white"} if when == "before" else {}
            style |= {"label": f"{KINDS[kind].label}, {when}"} if kind == usual else {}
            x = KINDS[kind].init_scale * 1.07 ** (shift + (1 if usual == "bn" else -3))
            bar = [[median - low], [high - median]]
            by_scale.errorbar(x, median, bar, lw=1.2, ls="", capsize=2, **style)
    by_scale.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians before and after training"
    panels.label(by_scale, title, "factor of the initial weights", y, log="xy")

    for panel in axes:
        place = (0.5, 0.2) if panel is rates else "best"  # between the lines
        panel.legend(fontsize=6.5, frameon=False, loc=place)
    path = folder / f"scale_invariance_{config.data}.png"
    panels.save(figure, path)
    return [path]


SMOKE = {
    "data": "digits",
    "kinds": ("bn", "bn large", "plain"),
    "seeds": (0,),
    "steps": 100,
    "measure_every": 50,
    "depth": 3,
    "width": 10,
}
STUDY = Study("scale_invariance", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
