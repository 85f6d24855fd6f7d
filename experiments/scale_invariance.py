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

The network and the data are those of `experiments.saturation`. To change them, see
`Network` and `load` there; to add a network, `KINDS`; the optimizer, `descend`. A run
that was stopped goes on where it was.

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
from experiments.common.results import Record, plain
from experiments.common.study import Settings, Study, Trained
from experiments.saturation import (
    ACTIVATIONS,
    Network,
    Params,
    evaluate,
    load,
)

FACTORS = 1e-3, 1e-2, 1e-1, 0.5, 2.0, 1e1, 1e2, 1e3  # a in BN((aW)u)
QUANTITIES = "output", "input's Jacobian", "gradient"  # compared between a W and W
PERCENTILES = 5, 25, 50, 75, 95  # of singular values
EXAMPLES = 16  # images at which Jacobians are taken
SMOOTHED = 50  # steps whose losses are averaged


class Kind(NamedTuple):
    """A network, relative to the usual one, and how it is shown."""

    label: str
    colour: str
    normalize: bool
    scale: float = 1.0  # of the hidden layers' first weights
    faster: float = 1.0  # a factor of their learning rate
    decays: bool = False  # whether they have L2


KINDS = {
    "bn": Kind("with BN", "#0072b2", True),
    "bn large": Kind("with BN, 4 W", "#1a1a6c", True, 4.0),
    "bn small": Kind("with BN, W / 4", "#56b4e9", True, 0.25),
    "bn large fast": Kind("with BN, 4 W, rate x 16", "#cc79a7", True, 4.0, 16.0),
    "bn decay": Kind("with BN and L2", "#009e73", True, decays=True),
    "plain": Kind("without BN", "#d55e00", False),
    "plain large": Kind("without BN, 4 W", "#d55e00", False, 4.0),
    "plain small": Kind("without BN, W / 4", "#d55e00", False, 0.25),
}
BY_SCALE = "bn small", "bn", "bn large", "plain small", "plain", "plain large"


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which networks are trained: names of `KINDS`."""
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
    kind: str
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
    for kind in config.kinds:
        if kind not in KINDS:
            raise ValueError(f"received --kinds {kind}: expected {', '.join(KINDS)}")
    fields = {field.name for field in dataclasses.fields(Cell)}
    shared = {name: v for name, v in vars(config).items() if name in fields}
    kinds = ("bn", "plain") if config.tune else config.kinds
    rates = config.rates if config.tune else (config.rate,)
    made = []
    for kind, seed, rate in itertools.product(kinds, config.seeds, rates):
        decay = config.decay if KINDS[kind].decays else 0.0
        own = {"kind": kind, "seed": seed, "rate": rate, "decay": decay}
        made.append(Cell(**(shared | own)))
    return made


# Training


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = load(config.data, config.data_dir)
    for cell in cells:
        result = run(cell, data)
        yield Trained(cell, result, f"{cell.kind}: {result['test']:.1%}")


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network, and measures on the way."""
    kind = KINDS[cell.kind]
    network = Network(cell.depth, cell.width, "tanh", kind.normalize)
    known = jnp.asarray(data.train.images[:4_096], jnp.float32)
    key, scale = jax.random.key(cell.seed), jnp.asarray(kind.scale)
    params = network.init(key, known.shape[1], scale)
    size, fast = len(data.train.labels), cell.rate * kind.faster
    drawn = draw_batches(cell.seed, size, cell.steps, cell.batch_size)
    parts, singular = [], [singular_values(network, params, known)]
    for batches in drawn.reshape(-1, cell.every, cell.batch_size):
        params, measured = descend(
            network, params, data.train, batches, cell.rate, fast, cell.decay
        )
        parts.append(measured)
        singular.append(singular_values(network, params, known))
    steps = jax.tree.map(lambda *p: np.concatenate(p), *parts)
    with np.errstate(invalid="ignore", over="ignore"):  # a network may diverge
        growth = np.abs(steps["length"][-1] / predicted_length(steps, fast) - 1).max()
    turns = (steps["turn"] ** 2).reshape(-1, cell.every, cell.depth)
    result = {
        "loss": steps["loss"].reshape(-1, SMOOTHED).mean(1),
        **evaluate(network, params, data),
        "length": steps["length"][:: cell.every],
        "turn": np.sqrt(turns.mean(1)),
        "along": steps["along"].max(),
        "growth": growth if kind.normalize and not cell.decay else None,
        "deviations": deviations(network, params, known[: cell.batch_size]),
        "singular": singular,
    }
    return plain(result, 4)


@functools.partial(jax.jit, static_argnums=0)
def descend(
    network: Network, params: Params, data: Split, batches, rate, fast, decay
) -> tuple[Params, dict[str, jax.Array]]:
    """The parameters after a step on each of `batches`, and what is measured.

    The hidden layers' kernels have the rate `fast` and the L2 `decay`. Measured are the
    loss of each batch, (step,), and what `measure` returns, (step, layer).
    """

    def loss(params, x, labels):
        logits, _ = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def change(path, p, g):
        if path[0].key != "last" and path[1].key == "kernel":
            return p - fast * (g + decay * p)
        return p - rate * g

    def step(params, batch):
        x = data.images[batch].astype(jnp.float32)
        value, gradient = jax.value_and_grad(loss)(params, x, data.labels[batch])
        new = jax.tree.map_with_path(change, params, gradient)
        layers = zip(hidden(params), hidden(gradient), hidden(new), strict=True)
        rows = [measure(w["kernel"], g["kernel"], v["kernel"]) for w, g, v in layers]
        measured = jax.tree.map(lambda *values: jnp.stack(values), *rows)
        return new, {"loss": value, **measured}

    return jax.lax.scan(step, params, batches)


def hidden(params: Params) -> list[Params]:
    """The parameters of each hidden layer."""
    depth = len(params["rest"]["kernel"])
    rest = [jax.tree.map(lambda p, i=i: p[i], params["rest"]) for i in range(depth)]
    return [params["first"], *rest]


def measure(w: jax.Array, g: jax.Array, new: jax.Array) -> dict[str, jax.Array]:
    """Of the units of a layer: weights w, the columns; gradients g; weights after.

    The roots of the mean squares of lengths |w|, slopes |g| and turns, the angles in
    radians between w before and after; and the largest |cosine| of w and g.
    """

    def directions(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=0, keepdims=True), 1e-30)

    # Of the chord: the cosine of a small angle is 1 in float32.
    chord = jnp.linalg.norm(directions(new) - directions(w), axis=0)
    turn = 2 * jnp.arcsin(jnp.minimum(chord / 2, 1))
    return {
        "length": jnp.sqrt((w**2).sum(0).mean()),
        "slope": jnp.sqrt((g**2).sum(0).mean()),
        "turn": jnp.sqrt((turn**2).mean()),
        "along": jnp.abs((directions(w) * directions(g)).sum(0)).max(),
    }


def predicted_length(steps: dict[str, Any], rate: float) -> Any:
    """(layer,): by Pythagoras, without L2, the length before the last step."""
    start, taken = steps["length"][0], rate * steps["slope"][:-1]
    return np.sqrt(start**2 + (taken**2).sum(0))


# Jacobians


def singular_values(network: Network, params: Params, known: jax.Array) -> np.ndarray:
    """Percentiles of layer Jacobians' singular values, (layer, percentile)."""
    jacobians = np.asarray(layer_jacobians(network, params, known, known[:EXAMPLES]))
    if not np.isfinite(jacobians).all():  # the network diverged
        return np.full((len(jacobians), len(PERCENTILES)), np.nan)
    values = np.linalg.svd(jacobians, compute_uv=False)
    return np.percentile(values.reshape(len(values), -1), PERCENTILES, axis=1).T


@functools.partial(jax.jit, static_argnums=0)
def layer_jacobians(
    network: Network, params: Params, known: jax.Array, x: jax.Array
) -> jax.Array:
    """The Jacobian of each hidden layer but the first, (layer, example, unit, unit).

    With BN of the transformation from one normalized vector, before scale and bias, to
    the next; without, from one activation's input to the next. The statistics are
    constants, those of `known`; both it and `x` are (example, pixel).
    """
    _, statistics = network.apply(params, known)
    parts = {name: params[name] | used for name, used in statistics.items()}
    first, *others = hidden(parts)

    def normalized(x, own):
        if not network.normalize:
            return network.preactivation(x, own)[0]
        return bnjax.normalize(x @ own["kernel"], own["mean"], own["var"])

    def activated(z, own):
        y = z * own["scale"][None] + own["bias"][None] if network.normalize else z
        return ACTIVATIONS[network.activation](y)

    z, below, found = normalized(x, first), first, []
    for own in others:

        def between(one, below=below, own=own):  # of one example
            return normalized(activated(one[None], below), own)[0]

        found.append(jax.vmap(jax.jacfwd(between))(z))
        z, below = normalized(activated(z, below), own), own
    return jnp.stack(found)


def deviations(
    network: Network, params: Params, x: jax.Array, factors: Sequence[float] = FACTORS
) -> np.ndarray:
    """How far a W of a hidden layer is from W: (quantity, factor), the worst layer.

    Each is |of a W - of W| / |of W|: of the layer's normalized output; of its input's
    cotangent, for a random one of the output; and of that of W, times a. They are those
    of training: the batch's statistics are differentiated through.
    """
    random = np.random.default_rng(0)
    cotangent = jnp.asarray(random.normal(size=(len(x), network.width)), x.dtype)
    rows, u = [], x
    for own in hidden(params):
        rows.append(layer_deviations(network, own, u, cotangent, jnp.asarray(factors)))
        u, _ = network.layer(u, own)
    return np.max(rows, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def layer_deviations(network: Network, own: Params, u, cotangent, factors):
    """Of one layer, whose input is `u`: (quantity, factor)."""

    def scaled(a):
        def preactivation(u, kernel):
            return network.preactivation(u, own | {"kernel": kernel})[0]

        z, pullback = jax.vjp(preactivation, u, a * own["kernel"])
        of_u, of_kernel = pullback(cotangent)
        return z, of_u, a * of_kernel

    def compare(a):
        norm, pairs = jnp.linalg.norm, zip(scaled(a), scaled(1.0), strict=True)
        return jnp.stack([norm(s - t) / norm(t) for s, t in pairs])

    return jax.lax.map(compare, factors).T


# Tables and picture


def series(
    found: dict[Cell, Record], field: str, *kinds: str
) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Of each of `kinds` that there is: its name, (seed, ...), and a line's style."""
    for kind in kinds:
        rows = [r[field] for cell, r in found.items() if cell.kind == kind]
        if rows:
            style = {"label": KINDS[kind].label, "color": KINDS[kind].colour}
            yield kind, np.array(rows, float), style


def report(config: Config, found: dict[Cell, Record]) -> list[Table]:
    """Accuracies and weights of each kind; the identities; the singular values."""
    main = Table(
        *("network", "rate", "validation (%)", "test (%)", "loss at the end"),
        *("weights grew", "prediction off by", "largest cosine of w and g"),
        *("turn per step", "sqrt(2 rate L2)"),
        box=box.MARKDOWN,
    )
    groups: dict[tuple[str, float], list[Record]] = {}
    for cell, result in found.items():
        groups.setdefault((cell.kind, cell.rate), []).append(result)
    for (kind, rate), rows in groups.items():
        of = {name: np.array([r[name] for r in rows], float) for name in rows[0]}
        grown = of["length"][:, -1] / of["length"][:, 0]
        exact = KINDS[kind].normalize and not KINDS[kind].decays
        main.add_row(
            *(KINDS[kind].label, f"{rate:g}"),
            *(percent(of[name]) for name in ("validation", "test")),
            f"{of['loss'][:, -1].mean():.3g}",
            f"{grown.mean():.3g} x",
            f"{of['growth'].max():.1e}" if exact else "-",
            f"{of['along'].max():.1e}",
            f"{of['turn'][:, -1].mean():.3g}",
            f"{equilibrium(rate, config.decay):.3g}" if KINDS[kind].decays else "-",
        )
    if config.tune:
        return [main]
    title = "off by, if W is multiplied by"
    changed = Table(title, *(f"{a:g}" for a in FACTORS), box=box.MARKDOWN)
    for kind, values, _ in series(found, "deviations", "bn", "plain"):
        for quantity, row in zip(QUANTITIES, values.max(0), strict=True):
            name = f"{KINDS[kind].label}: {quantity}"
            changed.add_row(name, *(f"{v:.1e}" for v in row))
    title = "singular values, percentiles"
    singular = Table(title, *map(str, PERCENTILES), box=box.MARKDOWN)
    for kind, values, _ in series(found, "singular", *BY_SCALE):
        for when, point in (("before", 0), ("after", -1)):
            shown = (f"{v:.3g}" for v in values[:, point].mean((0, 1)))
            singular.add_row(f"{KINDS[kind].label}, {when}", *shown)
    return [main, changed, singular]


def percent(shares: np.ndarray) -> str:
    """The mean, and the standard deviation (n - 1) of several."""
    spread = f" ± {100 * shares.std(ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * shares.mean():.1f}{spread}"


def equilibrium(rate: float, decay: float) -> float:
    """The turn per step, in radians, once growth and L2 balance (Wan et al. 2021)."""
    return math.sqrt(2 * rate * decay)


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Six panels: the identities, the effective rate, and the Jacobians."""
    if config.tune:
        return []
    count = len({cell.seed for cell in found})
    seeds = f"{count} seed{'s' * (count > 1)}"
    title = f"{panels.DATA[config.data]}, hidden layers of tanh, {seeds}"
    figure, axes = panels.make(title, (9.8, 5.8), 2, 3)
    identities, losses, rates, turns, over_time, by_scale = axes
    dots: dict[str, Any] = {"marker": "o", "ms": 3}

    for kind, values, style in series(found, "deviations", "bn", "plain"):
        shown = len(QUANTITIES) if kind == "bn" else 1  # without BN all are alike
        for i, quantity in enumerate(QUANTITIES[:shown]):
            style |= {"ls": ("-", "--", ":")[i], "marker": "os^"[i], "ms": 3}
            style |= {"label": f"{KINDS[kind].label}: {quantity}"}
            panels.line(identities, FACTORS, values[:, i], **style)
    title = "After training: a W instead of W"
    panels.label(identities, title, "a", "relative difference", log="xy")

    shown = "bn small", "bn", "bn large", "bn large fast", "plain"
    for kind, values, style in series(found, "loss", *shown):
        steps = SMOOTHED * (np.arange(values.shape[1]) + 0.5)
        ls = "--" if kind == "bn large fast" else "-"
        panels.line(losses, steps, values, ls=ls, **style)
    title = "First weights 1/4, 1 and 4 times as large"
    panels.label(losses, title, "training steps", "training loss", log="y")

    for _, values, style in series(found, "length", "bn small", "bn", "bn large"):
        effective = (config.rate / values**2).mean(-1)
        steps = config.every * np.arange(effective.shape[1])
        panels.line(rates, steps, effective, **dots, **style)
    y = "rate / |w|², mean of layers"
    panels.label(rates, "The effective rate", "training steps", y, log="y")

    for _, values, style in series(found, "turn", "bn", "bn decay"):
        steps = config.every * (np.arange(values.shape[1]) + 0.5)
        panels.line(turns, steps, values.mean(-1), **dots, **style)
    turn = equilibrium(config.rate, config.decay)
    turns.axhline(turn, label="√(2 rate L2)", color="0.4", lw=1, ls=":")
    title = "How far weights turn in a step"
    panels.label(turns, title, "training steps", "radians, mean of layers", log="y")

    y = "singular values: median, 5 to 95 %"
    for _, values, style in series(found, "singular", "plain", "bn"):
        low, _, median, _, high = values.mean((0, 2)).T
        steps = config.every * np.arange(len(median))
        over_time.plot(steps, median, **dots, **style)
        over_time.fill_between(steps, low, high, alpha=0.15, lw=0, color=style["color"])
    over_time.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians over training"
    panels.label(over_time, title, "training steps", y, log="y")

    for kind, values, _ in series(found, "singular", *BY_SCALE):
        usual = "bn" if KINDS[kind].normalize else "plain"
        for point, when, shift in ((0, "before", 0), (-1, "after", 2)):
            low, _, median, _, high = values[:, point].mean((0, 1))
            style = {"color": KINDS[usual].colour, "marker": "o", "ms": 4}
            style |= {"mfc": "white"} if when == "before" else {}
            style |= {"label": f"{KINDS[kind].label}, {when}"} if kind == usual else {}
            x = KINDS[kind].scale * 1.07 ** (shift + (1 if usual == "bn" else -3))
            bar = [[median - low], [high - median]]
            by_scale.errorbar(x, median, bar, lw=1.2, ls="", capsize=2, **style)
    by_scale.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians before and after training"
    panels.label(by_scale, title, "scale of the first weights", y, log="xy")

    for panel in axes:
        panel.legend(fontsize=6.5, frameon=False)
    path = folder / f"scale_invariance_{config.data}.png"
    panels.save(figure, path)
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
