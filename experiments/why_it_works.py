"""Why batch normalization works: not less covariate shift, but a smoother loss.

    python -m experiments.why_it_works
    python -m experiments.why_it_works --data digits

Time: 37 minutes for two processes with a CPU core each (`--part`, see
`common/study.py`); with --smoke some seconds.

Expected: along its gradient the loss with BN changes less, and its gradient too (by
about two orders of magnitude in the paper, read off a plot); noise that makes
distributions less stable than they are without BN hardly slows it down, while noise
alone prevents training; the internal covariate shift is no smaller with BN. At the
small learning rate that the network without BN needs, BN gains little: its gain is the
larger rate.

Measured (CIFAR-10, 3 seeds, jax 0.10.2, two cores of an AMD EPYC; test accuracy in %):

    learning rate         0.1          0.3          1
    without BN     37.6 ± 0.5   24.9 ± 6.9  10.0 ± 0.0
    with BN        46.9 ± 1.0   48.0 ± 1.3  48.7 ± 1.8
    BN and noise   43.6 ± 0.6   47.0 ± 1.7  46.9 ± 1.6
    noise alone    34.2 ± 1.0   10.0 ± 0.0  10.0 ± 0.0

    at 0.1, medians    range of   change of   smooth-   |G - G'|   cosine of
    over training      the loss   gradient    ness      / |G|      G and G'
    without BN         0.21       2.5         17.6      0.42       0.93
    with BN            0.16       3.5         13.3      0.68       0.76
    BN and noise       0.16       3.6         13.8      0.72       0.72

By these medians the loss is hardly smoother with BN: without BN over with, the range
of the loss is 2.2 ± 1.2, the change of the gradient 1.1 ± 0.6, and the smoothness 1.1 ±
0.3. Over the first 150 steps the network without BN is on a plateau, where the gradient
is small and changes little; from step 300 on, when it trains, its gradient changes
about three times as much per distance as with BN. The covariate shift is larger with BN
by the median, and smaller only from step 300 on.

Not as in the papers: noise alone costs 3.4 ± 2.1 points, but trains at the smallest
rate. And BN gains 9.2 ± 1.1 points already at 0.1, the best rate without it, and not
much more, 11.1 ± 5.0, at ten times that rate.

The network: 3x3 convolutions with He's initial weights, rectified, the mean over
positions and a matrix. For CIFAR-10 they are the 13 of VGG-16, the paper's network,
with an eighth of its channels. Convolutions of stride 2 stand for its max-pooling, and
the first one also has stride 2, so that a step takes less time: all but the last three
work at half of VGG's resolution. The digits have eight convolutions.

Noise: after each normalization, or in its place, each value is scaled and shifted at
random, by distributions that are drawn anew at each step. Plain gradient descent at a
constant rate, batches of 128, the same for all networks of a seed; differences are
taken seed by seed, with 95 % confidence intervals. Measured every so many steps, before
the step, on its mini-batch, with the statistics of that batch and the same noise all
along:

* along the gradient, at 1/2, 1, 2 and 4 times the learning rate: the range of the loss,
  that of the change of the gradient (its predictiveness), and the most that it changes
  per distance (the effective beta-smoothness);
* the internal covariate shift of each layer: the gradient of its parameters before the
  step, and with all earlier layers as after it; the cosine of the two, and the length
  of their difference over that of the first.

To change the data, see `convnet.TASKS`; the network, `WIDTHS` and `normalize`; the
optimizer or schedule, `run`. A run that was stopped goes on where it was: what is in
the file is not trained again.

References: Santurkar et al. 2018, definition 2.1, figures 1, 2 and 4; Bjorck et al.
2018, sections 2 and 3.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from rich import box
from rich.table import Table

import bnjax
from experiments.common import convnet, panels, study
from experiments.common.images import Dataset, draw_batches
from experiments.common.intervals import Interval, interval
from experiments.common.rates import ByRate, percent
from experiments.common.results import Record, plain
from experiments.common.study import Study, Trained

Net = Literal["plain", "bn", "noisy bn", "noisy plain"]
NAMES = {
    "plain": "without BN",
    "bn": "with BN",
    "noisy bn": "BN and noise",
    "noisy plain": "noise alone",
}
COLOURS = {**panels.COLOURS, "noisy bn": "#009e73", "noisy plain": "#cc79a7"}
WIDTHS = {
    "digits": (8, 8, 16, 16, 32, 32, 32, 32),
    "cifar10": (8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64),
}
STRIDES = {
    "digits": (1, 1, 2, 1, 2, 1, 1, 1),
    "cifar10": (2, 1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1),
}
BATCH = 128
FACTORS = 0.5, 1.0, 2.0, 4.0  # of the learning rate: steps along the gradient
FIRST = tuple(float(f"{10 ** (k / 4):.2g}") for k in range(-8, 5))
"""Step sizes along the gradient before training, 0.01 to 10."""
ALONG = "range of loss", "change of gradient", "smoothness"
"""What is measured along the gradient, as it is called in the table."""
SMOOTHED = 10  # steps whose losses are averaged


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["cifar10", "digits"] = "cifar10"
    """The images. CIFAR-10 is downloaded once; the digits come with scikit-learn."""
    nets: tuple[Net, ...] = get_args(Net)
    """What is compared."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Learning rates, the same for all networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the batches of one run of each network."""
    steps: int = 600
    """Training steps."""
    depth: int | None = None
    """Convolutions, the first ones of the network; None: all."""
    every: int = 150
    """Steps between two measurements."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides what comes of a training."""

    data: str
    net: Net
    rate: float
    seed: int
    steps: int
    depth: int
    every: int


def cells(config: Config) -> list[Cell]:
    """Every training of a run.

    The trainings of two networks alternate, so that of two processes that share them
    (--part 1 2 and --part 2 2) each compiles one of the two.
    """
    depth = config.depth or len(WIDTHS[config.data])
    more = config.steps, depth, config.every
    pairs = (config.nets[i : i + 2] for i in range(0, len(config.nets), 2))
    return [
        Cell(config.data, net, rate, seed, *more)
        for pair in pairs
        for rate, seed, net in itertools.product(config.rates, config.seeds, pair)
    ]


# Model


class Noise(nn.Module):
    """The noise of Santurkar et al. 2018: no distribution stays as it was for a step.

        y = s x + m,   m ~ U(shift - 0.1, shift + 0.1),   s ~ N(scale, 0.1)

    m and s are drawn for each value; shift ~ U(-0.5, 0.5) and scale ~ U(1, 1.25) for
    the layer, anew at each step. At test the means stand for them: y = 1.125 x.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train:
            return 1.125 * x
        keys = jax.random.split(self.make_rng("dropout"), 4)
        shift = jax.random.uniform(keys[0], (), x.dtype, -0.5, 0.5)
        scale = jax.random.uniform(keys[1], (), x.dtype, 1.0, 1.25)
        m = shift + 0.1 * jax.random.uniform(keys[2], x.shape, x.dtype, -1, 1)
        s = scale + 0.1 * jax.random.normal(keys[3], x.shape, x.dtype)
        return s * x + m


def normalize(net: Net, x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
    """Adds what follows each convolution of a network; the step is not used."""
    if net in ("bn", "noisy bn"):
        x = bnjax.BatchNorm(not train, momentum=0.9)(x)
    return Noise()(x, train) if net in ("noisy plain", "noisy bn") else x


@functools.cache  # of the same model, a step is compiled once
def make_model(data: str, net: Net, depth: int) -> convnet.ConvNet:
    """The network with He's initial weights; with a bias if it has no BN."""
    sizes = {"widths": WIDTHS[data][:depth], "strides": STRIDES[data][:depth]}
    conv = functools.partial(
        nn.Conv,
        kernel_init=nn.initializers.he_normal(),
        use_bias=net in ("plain", "noisy plain"),
    )
    task = convnet.TASKS[data]._replace(**sizes)
    return convnet.ConvNet(task, functools.partial(normalize, net), conv)


# The loss around the weights

Gradient = Callable[[Any], tuple[Any, ...]]
"""Parameters -> the loss, its gradient, and possibly more, of one batch and noise."""


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(
    model: nn.Module,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
    params: Any,
) -> tuple[jax.Array, Any, Any]:
    """The loss of a batch in training, its gradient, and new running statistics.

    `params` stands in the place of the parameters in `variables`; `noise` is the key of
    what is drawn.
    """

    def loss(params):
        logits, updates = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": noise},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    (value, updates), slope = jax.value_and_grad(loss, has_aux=True)(params)
    return value, slope, updates


class Line(NamedTuple):
    """A loss L along its gradient g, at w - a g for each step size a.

    Attributes:
        start: L(w).
        losses: (step,), L(w - a g).
        changes: (step,), |grad L(w - a g) - g|, whose range is the (lack of)
            predictiveness of the gradient.
        smoothness: the effective beta, the largest of the changes over |a g|.
    """

    start: jax.Array
    losses: np.ndarray
    changes: np.ndarray
    smoothness: np.ndarray


def along_gradient(
    gradient: Gradient, params: Any, sizes: Sequence[float] | np.ndarray
) -> Line:
    """The loss along the gradient at `params`, by each of the step sizes."""
    start, slope, *_ = gradient(params)
    found = []
    for size in sizes:
        loss, other, *_ = gradient(descend(params, slope, size))
        found.append((loss, compare(slope, other)[0]))
    losses, changes = np.array(found).T
    distances = np.array(sizes) * float(compare(slope, slope)[1])
    return Line(start, losses, changes, (changes / distances).max())


def covariate_shift(
    gradient: Gradient,
    before: dict[str, Any],
    after: dict[str, Any],
    layers: Sequence[Sequence[str]],
) -> tuple[np.ndarray, np.ndarray]:
    """How much the gradient of each layer changes because those below it moved.

    Args:
        gradient: of the loss; the same before and after, with the same mini-batch.
        before: parameters before a step.
        after: parameters after it.
        layers: from the first to the last, the names of each one's parameters.

    Returns:
        |G - G'| / |G| and the cosine of G and G', (layer,), with G the gradient before
        the step and G' the one with all earlier layers moved; of the first layer, which
        has none below, 0 and 1.
    """
    _, old, *_ = gradient(before)
    moved, new, rows = before, old, []
    for names in layers:
        rows.append(compare({n: old[n] for n in names}, {n: new[n] for n in names}))
        moved = moved | {name: after[name] for name in names}
        if len(rows) < len(layers):
            _, new, *_ = gradient(moved)
    distance, length, cosine = np.array(rows).T
    with np.errstate(invalid="ignore"):  # a layer may be dead: 0/0
        return distance / length, cosine


@jax.jit
def descend(params: Any, slope: Any, size: ArrayLike) -> Any:
    """A step against the gradient."""
    return jax.tree.map(lambda p, g: p - size * g, params, slope)


@jax.jit
def compare(first: Any, second: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """|first - second|, |first|, and the cosine between them."""

    def dot(x, y):
        return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

    difference = jax.tree.map(jnp.subtract, first, second)
    length = jnp.sqrt(dot(first, first))
    cosine = dot(first, second) / (length * jnp.sqrt(dot(second, second)))
    return jnp.sqrt(dot(difference, difference)), length, cosine


# Training


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """Each cell's result, as it comes."""
    data = convnet.load(config.data, config.data_dir)
    for cell in cells:
        result = run(cell, data)
        yield Trained(cell, result, f"{cell.net} {cell.rate:g}: {result['test']:.1%}")


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, seed: int, images: jax.Array) -> tuple[Any, jax.Array]:
    """The variables before training, and the key of all noise."""
    weights, noise = jax.random.split(jax.random.key(seed))
    return model.init(weights, images, train=False), noise


def run(cell: Cell, data: Dataset) -> Record:
    """Trains a network, and measures on the way until its loss is not finite."""
    model = make_model(cell.data, cell.net, cell.depth)
    images, labels = data.train
    variables, key = init(model, cell.seed, images[:2])
    losses, first, rows = np.full(cell.steps, np.nan), None, []
    batches = draw_batches(cell.seed, len(labels), cell.steps, BATCH)
    for step, batch in enumerate(batches):
        _, noise = jax.random.split(jax.random.fold_in(key, step))
        gradient = functools.partial(
            loss_and_gradient, model, variables, images[batch], labels[batch], noise
        )
        params = variables["params"]
        losses[step], slope, updates = gradient(params)
        after = descend(params, slope, cell.rate)
        if step == 0:
            line = along_gradient(gradient, params, FIRST)
            first = line.losses / float(line.start)
        if step % cell.every == 0:
            if not np.isfinite(losses[step]):
                break
            rows.append(measure(gradient, params, after, cell.rate))
        variables = {**variables, **updates, "params": after}
    unknown = jax.tree.map(lambda value: np.nan * value, rows[0])
    rows += [unknown] * (-(-cell.steps // cell.every) - len(rows))
    whole = cell.steps // SMOOTHED * SMOOTHED
    result = {
        "loss": losses[:whole].reshape(-1, SMOOTHED).mean(1),
        "first": first,
        "validation": convnet.accuracy(model, variables, data.validation),
        "test": convnet.accuracy(model, variables, data.test),
        **{name: [row[name] for row in rows] for name in rows[0]},
    }
    return plain(result, 4)


def measure(gradient: Gradient, before: Any, after: Any, rate: float) -> Record:
    """Along the gradient of one step, and what the step shifts."""
    line = along_gradient(gradient, before, rate * np.array(FACTORS))
    depth = sum(name.startswith("Conv") for name in before)
    layers = [(f"Conv_{i}", f"BatchNorm_{i}") for i in range(depth)]
    present = [[name for name in layer if name in before] for layer in layers]
    shift, cosine = covariate_shift(gradient, before, after, [*present, ["Dense_0"]])
    return {
        "losses": [line.losses.min(), line.losses.max()],
        "changes": [line.changes.min(), line.changes.max()],
        "smoothness": line.smoothness,
        "shift": shift,
        "cosine": cosine,
    }


# Tables


def by_rate(found: dict[Cell, Record]) -> ByRate:
    """The results by network and rate."""
    return ByRate.grouped((c.net, c.rate, r) for c, r in found.items())


def shared_rate(known: ByRate) -> float:
    """The rate at which networks are compared: the best of the plain one."""
    return known.best("plain" if "plain" in known.names() else known.names()[0])


def report(config: Config, found: dict[Cell, Record]) -> list[Table | str]:
    """By learning rate; and what was measured on the way, at a shared one."""
    known = by_rate(found)

    def accuracy(net: str, rate: float) -> str:
        return percent(known.of(net, rate, "test"))

    def loss(net: str, rate: float) -> str:
        return f"{known.of(net, rate, 'loss')[..., -1].mean():.3g}"

    name = NAMES.__getitem__
    return [
        known.table("test accuracy (%) at rate", config.rates, accuracy, name),
        known.table("training loss at the end", config.rates, loss, name),
        medians(known),
        conclusion(findings(config, found)),
    ]


def medians(known: ByRate) -> Table:
    """The medians of each network, at the shared rate and at its best."""
    table = Table(
        *("medians over training", "rate", "range of loss", "change of gradient"),
        *("smoothness", "|G - G'| / |G|", "cosine of G, G'"),
        box=box.MARKDOWN,
    )
    for net in known.names():
        for rate in dict.fromkeys((shared_rate(known), known.best(net))):
            if (net, rate) in known.records:
                medians = (f"{m:.3g}" for m in medians_of(known, net, rate))
                table.add_row(NAMES[net], f"{rate:g}", *medians)
    return table


def medians_of(known: ByRate, net: str, rate: float) -> list[float]:
    """The medians over steps, seeds and layers, in the order of the table."""
    return [float(np.nanmedian(v)) for v in measured(known, net, rate).values()]


def measured(known: ByRate, net: str, rate: float) -> dict[str, np.ndarray]:
    """What was measured on the way: (seed, step), of layers (seed, step, layer)."""
    of_seeds = functools.partial(known.of, net, rate)
    return {
        "range of loss": np.ptp(of_seeds("losses"), axis=-1),
        "change of gradient": of_seeds("changes")[..., 1],
        "smoothness": of_seeds("smoothness"),
        "|G - G'| / |G|": of_seeds("shift")[..., 1:],
        "cosine of G, G'": of_seeds("cosine")[..., 1:],
    }


class Findings(NamedTuple):
    """What is concluded, with 95 % confidence intervals over seeds.

    Attributes:
        rate: the shared rate, the best without BN.
        bn_rate: the best rate with BN.
        ratios: for each measure in `ALONG`, the median over training without BN over
            that with BN, both at the shared rate: mean and standard deviation of this
            ratio over seeds.
        plain: (seed,), the test accuracy without BN at the shared rate, in percent.
        gain: of BN at the shared rate, in points over `plain`, seed by seed.
        gain_at_best: the same of BN at its own best rate.
        noise_alone: the same of noise alone at its own best rate; None if that network
            is not trained.
    """

    rate: float
    bn_rate: float
    ratios: dict[str, tuple[float, float]]
    plain: np.ndarray
    gain: Interval
    gain_at_best: Interval
    noise_alone: Interval | None


def findings(config: Config, found: dict[Cell, Record]) -> Findings | None:
    """What is concluded; None if a network that it takes is not trained."""
    known = by_rate(found)
    if not {"plain", "bn"} <= set(known.names()):
        return None
    rate, bn_rate = shared_rate(known), known.best("bn")
    records: dict[tuple[str, float], dict[int, Record]] = {}
    for cell, record in found.items():
        records.setdefault((cell.net, cell.rate), {})[cell.seed] = record
    needed = [("plain", rate), ("bn", rate), ("bn", bn_rate)]
    if noise := "noisy plain" in known.names():
        needed.append(("noisy plain", known.best("noisy plain")))
    seeds = [
        seed
        for seed in config.seeds
        if all(seed in records.get(which, {}) for which in needed)
    ]
    if not seeds:
        return None
    chosen = ByRate({which: [records[which][s] for s in seeds] for which in needed})

    def ratio(name: str) -> tuple[float, float]:
        of_plain, of_bn = (
            np.nanmedian(measured(chosen, net, rate)[name], axis=1)
            for net in ("plain", "bn")
        )
        ratios = of_plain / of_bn
        deviation = ratios.std(ddof=1) if len(ratios) > 1 else np.nan
        return float(ratios.mean()), float(deviation)

    accuracies = [100 * chosen.of(*which, "test") for which in needed]
    plain, *others = accuracies
    gain, gain_at_best, *noise_alone = (interval(other - plain) for other in others)
    return Findings(
        rate,
        bn_rate,
        {name: ratio(name) for name in ALONG},
        plain,
        gain,
        gain_at_best,
        noise_alone[0] if noise else None,
    )


def conclusion(found: Findings | None) -> str:
    """What BN gains and noise costs, and how much smoother the loss is with BN."""
    if found is None:
        return ""
    ratios = ", ".join(
        f"{name} {mean:.3g} ± {deviation:.2g}"
        for name, (mean, deviation) in found.ratios.items()
    )
    sentences = [
        f"At {found.rate:g}, the best rate without BN, BN gains {found.gain} points "
        f"over {found.plain.mean():.1f} %; at {found.bn_rate:g}, its own best, "
        f"{found.gain_at_best}.",
        f"Without BN over with BN, at {found.rate:g}: {ratios}.",
    ]
    if found.noise_alone:
        sentences.append(
            f"Noise alone at its best rate: {found.noise_alone} points over no BN."
        )
    return " ".join(sentences)


# Picture


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Six panels: training, learning rates, and what is around the weights."""
    known = by_rate(found)
    seeds, rate = max(map(len, known.records.values())), shared_rate(known)
    depth = config.depth or len(WIDTHS[config.data])
    title = (
        f"{panels.DATA[config.data]}, {depth} convolutions, {seeds} "
        f"seed{'s' * (seeds > 1)}; second row: at the learning rate {rate:g}, the best "
        "without BN"
    )
    figure, axes = panels.make(title, (9.6, 5.6), 2, 3)
    draw_training(axes[0], known)
    draw_rates(axes[1], known)
    draw_first(axes[2], known)
    draw_ranges(axes[3], known, config.every)
    draw_measured(axes[4], known, config.every, "smoothness")
    title, y = "Smoothness along the gradient", "most change of gradient per distance"
    panels.label(axes[4], title, "training steps", y, log="y")
    draw_measured(axes[5], known, config.every, "cosine")
    title = "Covariate shift: a cosine of 1 is none"
    panels.label(axes[5], title, "training steps", "cosine of G and G', mean of layers")
    handles, names = axes[1].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(names)}
    figure.legend(handles, names, fontsize=8, frameon=False, **place)
    path = folder / f"why_it_works_{config.data}.png"
    panels.save(figure, path)
    return [path]


def style(net: str) -> dict[str, Any]:
    """How the lines of a network are drawn."""
    return {"color": COLOURS[net], "label": NAMES[net]}


def draw_training(axes: Axes, known: ByRate) -> None:
    """The loss of each network at its best rate, and with BN at the plain one's."""
    lines = [(net, known.best(net), "-") for net in known.names()]
    if "bn" in known.names() and shared_rate(known) != known.best("bn"):
        lines.append(("bn", shared_rate(known), "--"))
    for net, rate, dashes in lines:
        loss = known.of(net, rate, "loss")
        steps = SMOOTHED * (np.arange(loss.shape[1]) + 0.5)
        named = style(net) | {"label": f"{NAMES[net]}, {rate:g}"}
        panels.line(axes, steps, loss, ls=dashes, **named)
    title = "Training, at each one's best rate"
    panels.label(axes, title, "training steps", "training loss", log="y")
    axes.legend(fontsize=7, frameon=False)


def draw_rates(axes: Axes, known: ByRate) -> None:
    """The accuracy at the end against the learning rate."""
    for net in known.names():
        rates = known.rates(net)
        test = np.stack([known.of(net, rate, "test") for rate in rates], 1)
        panels.line(axes, rates, 100 * test, marker="o", ms=3, **style(net))
    title = "At the end of training"
    panels.label(axes, title, "learning rate", "test accuracy (%)", log="x")


def draw_first(axes: Axes, known: ByRate) -> None:
    """The loss along the first gradient, which is the same at all learning rates."""
    for net in ("plain", "bn"):
        if net in known.names():
            first = known.of(net, known.rates(net)[0], "first")
            panels.line(axes, FIRST, first, **style(net))
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    title = "Along the gradient before training"
    panels.label(axes, title, "step size", "loss after over loss before", log="x")


def draw_ranges(axes: Axes, known: ByRate, every: int) -> None:
    """Of the first seed: a band from the least to the largest loss."""
    for net in ("plain", "bn"):
        if (net, shared_rate(known)) in known.records:
            low, high = known.of(net, shared_rate(known), "losses")[0].T
            steps = every * np.arange(len(low))
            axes.fill_between(steps, low, high, alpha=0.4, **style(net))
    title, y = "Range of the loss along the gradient", "loss, 1/2 to 4 steps ahead"
    panels.label(axes, title, "training steps", y, log="y")


def draw_measured(axes: Axes, known: ByRate, every: int, field: str) -> None:
    """A line for each network; of layers the mean, without the first."""
    for net in known.names():
        if net != "noisy plain" and (net, shared_rate(known)) in known.records:
            values = known.of(net, shared_rate(known), field)
            values = values[..., 1:].mean(-1) if values.ndim == 3 else values
            steps = every * np.arange(values.shape[1])
            panels.line(axes, steps, values, marker="o", ms=3, **style(net))


SMOKE = {
    "data": "digits",
    "nets": ("plain", "bn"),
    "rates": (1.0,),
    "seeds": (0,),
    "steps": 20,
    "depth": 3,
    "every": 10,
}
STUDY = Study("why_it_works", cells, train, report, draw, SMOKE)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
