"""Statistics for evaluation, early in training: estimated anew against averaged.

    python -m experiments.population

Time: half a minute on two CPU cores.

Expected: after 50 steps with momentum 0.99 the running statistics still weigh their
start, mean 0 and variance 1, with 0.99^50 = 61 %: evaluated by them, the network is far
worse than it was in training. The same weights with pooled statistics
(`bnjax.population.pooled`) are as good as in training; so are they with the paper's
Algorithm 2, which differs by the variance of the means of batches; and nearly so with
the debiased average, which still mixes the statistics of older weights.

Measured (digits, 5 seeds, jax 0.10.2, two cores of an AMD EPYC): after 50 steps 88.9 %
of the test images are right by the statistics of their batch, 89.5 % by pooled ones and
by Algorithm 2's, 88.4 % by the debiased average, and 29.9 % by the running average. It
needs 500 steps to catch up. Algorithm 2 and pooled stay within 0.4 points of each other
throughout; the debiased average is up to 2.3 points below them from 50 steps on.

The network: that of Figure 1, three hidden layers of 100 batch-normalized sigmoids,
trained by plain gradient descent. At each measured step the test images are classified
by the same weights with five kinds of statistics: those of the test images themselves
(as in training), the running average, the debiased one, Algorithm 2's and the pooled
ones, the last two from training images in batches of the size of training's.

References: Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, section 3.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from experiments import mnist
from experiments.common import images, results

NAMES = {
    "batch": "of the batch, as in training",
    "pooled": "pooled",
    "algorithm_2": "Algorithm 2",
    "debiased_ema": "running average, debiased",
    "ema": "running average",
}
STYLES = {
    "batch": {"color": "0.6", "lw": 5, "alpha": 0.6, "solid_capstyle": "butt"},
    "pooled": {"color": "#0072b2", "lw": 1.6},
    "algorithm_2": {"color": "#009e73", "lw": 0, "marker": "o", "ms": 4, "mfc": "none"},
    "debiased_ema": {"color": "#e69f00", "lw": 1.6, "ls": "--"},
    "ema": {"color": "#d55e00", "lw": 1.6},
}
COLLECTIONS = ["batch_stats", "batch_moments"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    data_dir: Path | None = None
    """A local copy of the data; see experiments/common/images.py."""
    steps: int = 1_000
    """Training steps."""
    batch_size: int = 60
    """Images per step, and per batch of the population statistics."""
    learning_rate: float = 1.0
    """Of plain gradient descent."""
    momentum: float = 0.99
    """Of the running statistics, debiased or not: the default of Flax's layer."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each gives the weights and the mini-batches of one run."""
    estimate_batches: int = 100
    """Most batches that the population statistics are estimated from."""
    out: Path = Path("runs")
    """The folder of the records, to which they are appended, and of the picture."""
    record: bool = False
    """Write the record and the picture that are committed, in experiments/."""
    plot_only: bool = False
    """Train nothing; draw the last run with this data again."""


class State(NamedTuple):
    """Of one network: its variables, and the debiased averages by layer."""

    params: Any
    batch_stats: Any
    debiased: dict[str, bnjax.running.AverageState]


def train(config: Config, path: Path) -> None:
    """Trains a network for each seed, and appends what is measured to `path`."""
    data, _, test = mnist.load_binary(config.data, config.data_dir)
    network = Network(config)
    places = {"data_dir", "out", "record", "plot_only"}
    settings = dataclasses.asdict(config)
    settings = {name: v for name, v in settings.items() if name not in places}
    with results.Log(path) as log:
        log.add("run", experiment="population", settings=settings, **results.stamp())
        for seed in track(config.seeds, "training"):
            for step, accuracy in train_one(network, config, data, test, seed):
                log.add("measurement", seed=seed, step=step, accuracy=accuracy)


def train_one(
    network: "Network",
    config: Config,
    data: images.Split,
    test: images.Split,
    seed: int,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields (step, accuracy by kind of statistics) at each measured step."""
    random = np.random.default_rng(seed)
    state = network.init(jax.random.key(seed), data.images)
    chosen = random.permutation(len(data.labels))
    count = min(len(chosen) // config.batch_size, config.estimate_batches)
    estimate = data.images[chosen[: count * config.batch_size]]
    estimate = estimate.reshape(count, config.batch_size, -1)
    measured = measured_steps(config.steps)
    for step in range(config.steps + 1):
        if step in measured:
            yield step, network.accuracies(state, estimate, test)
        rows = random.choice(len(data.labels), config.batch_size, replace=False)
        state = network.step(state, data.images[rows], data.labels[rows])


class Network:
    """The model with its training step and its evaluation."""

    def __init__(self, config: Config):
        self.model = mnist.Network(True, weight_std=0.1, momentum=config.momentum)
        self.rule = bnjax.running.debiased_ema(config.momentum)
        self.rate = config.learning_rate

    def init(self, key: jax.Array, images: np.ndarray) -> State:
        v: Any = self.model.init(key, images[:2], train=False)
        debiased = {
            name: self.rule.init(stats["mean"].shape)
            for name, stats in v["batch_stats"].items()
        }
        return State(v["params"], v["batch_stats"], debiased)

    def collect(self, variables, images: jax.Array):
        """What population statistics ask of a model."""
        return self.model.apply(variables, images, train=True, mutable=COLLECTIONS)

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state: State, images: jax.Array, labels: jax.Array) -> State:
        """One step of gradient descent."""

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            (logits, _), updates = self.collect(variables, images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(state.params)
        params = jax.tree.map(lambda p, g: p - self.rate * g, state.params, gradients)
        debiased = {
            name: self.rule.update(old, updates["batch_moments"][name]["moments"])
            for name, old in state.debiased.items()
        }
        return State(params, updates["batch_stats"], debiased)

    def accuracies(self, state, batches, test: images.Split) -> dict[str, float]:
        """Test accuracies by kind of statistics."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        debiased = {n: self.rule.read(s)._asdict() for n, s in state.debiased.items()}
        kinds = {
            "batch": state.batch_stats,
            "pooled": bnjax.population.pooled(self.collect, variables, batches),
            "algorithm_2": bnjax.population.algorithm_2(
                self.collect, variables, batches
            ),
            "debiased_ema": debiased,
            "ema": state.batch_stats,
        }
        return {
            kind: float(self.accuracy(state.params, stats, *test, kind == "batch"))
            for kind, stats in kinds.items()
        }

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def accuracy(self, params, batch_stats, images, labels, train: bool) -> jax.Array:
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, _ = self.model.apply(
            variables, images, train=train, mutable=COLLECTIONS
        )
        return (outputs[0].argmax(-1) == labels).mean()


def measured_steps(steps: int) -> list[int]:
    """1, 2, 3, 5, 7, 10, 15, 20, ... and the last step."""
    marks = (m * 10**e // 10 for e in range(7) for m in (10, 15, 20, 30, 50, 70))
    return sorted({m for m in marks if 0 < m < steps} | {steps})


def last_run(path: Path, data: str) -> tuple[dict, dict[int, dict[str, np.ndarray]]]:
    """The settings of the newest run with this data, and its accuracies.

    Those are, by step and by kind of statistics, of shape (seed,).
    """
    first, rows = results.last_run(path, data=data)
    found: dict[int, dict[str, np.ndarray]] = {}
    for step in sorted({row["step"] for row in rows}):
        each = [row["accuracy"] for row in rows if row["step"] == step]
        found[step] = {kind: np.array([a[kind] for a in each]) for kind in NAMES}
    return first["settings"], found


def table(rows: dict[int, dict[str, np.ndarray]]) -> Table:
    """Accuracies by kind of statistics, after some of the steps."""
    shown = [step for step in rows if step in (5, 20, 50, 100, 200, max(rows))]
    found = Table(
        title="Test accuracy (%) against steps, mean over the seeds", box=box.SIMPLE
    )
    found.add_column("statistics", no_wrap=True)
    for step in shown:
        found.add_column(f"{step:,}", justify="right")
    for kind, name in NAMES.items():
        means = (100 * rows[step][kind].mean() for step in shown)
        found.add_row(name, *(f"{mean:.1f}" for mean in means))
    return found


def draw(settings: dict, rows: dict[int, dict[str, np.ndarray]], path: Path) -> None:
    """Test accuracy against steps, a line and its range for each kind of statistics."""
    figure = Figure((6.4, 3.8), dpi=180, layout="constrained")
    axes = figure.subplots()
    steps, momentum = list(rows), settings["momentum"]
    for kind, style in STYLES.items():
        values = 100 * np.array([row[kind] for row in rows.values()])
        axes.plot(steps, values.mean(1), label=NAMES[kind], **style)
        if kind in ("pooled", "ema"):
            shade = {"color": style["color"], "alpha": 0.15, "lw": 0}
            axes.fill_between(steps, values.min(1), values.max(1), **shade)
    if 50 in rows:
        axes.axvline(50, color="0.5", lw=0.8, ls=":")
        weight = f"{momentum**50:.0%}"
        note = f"after 50 steps\nthe running average\nis still {weight} its start"
        where = {"ha": "right", "va": "center", "size": 8}
        axes.annotate(note, (50, 42), (-4, 0), "data", "offset points", **where)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("training steps", fontsize=9)
    axes.set_ylabel("test accuracy (%)", fontsize=9)
    axes.set_ylim(0, 100)
    axes.set_title(
        f"{settings['data']}, momentum {momentum:g}: the same weights, "
        "evaluated by different statistics\n"
        f"(mean and range of {len(settings['seeds'])} seeds)",
        fontsize=9,
    )
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title="statistics",
        title_fontsize=8,
        fontsize=8,
        loc="lower right",
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(config: Config) -> int:
    """Trains, prints the table and draws the picture; returns the exit status."""
    console = Console()
    log, folder = results.places("population", config.out, config.record)
    picture = folder / "population.png"
    try:
        if not config.plot_only:
            train(config, log)
        settings, rows = last_run(log, config.data)
    except (images.DataError, LookupError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    draw(settings, rows, picture)
    console.print(table(rows), f"{log}\n{picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
