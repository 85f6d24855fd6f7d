"""Averaged weights need new statistics; running averages lag early in training.

    python -m experiments.weight_averaging
    python -m experiments.weight_averaging --data digits

Time: eight minutes for two processes with a CPU core each (`--part`, see
`common/study.py`); with --smoke some seconds.

Expected: the mean of the weights of many steps (stochastic weight averaging, SWA) has
less error than the last weights, provided that the statistics of batch normalization
are estimated anew, by one pass over the training data (Izmailov et al. 2018, section
3.2; the paper does not say what is lost otherwise). The statistics of other weights do
not fit the mean; nor does the mean of their statistics, because the activations are not
linear in the weights. An exponential moving average (EMA) of the weights needs new
statistics too.

Early in training, a running average with momentum 0.99 still weighs its start, mean 0
and variance 1, with 0.99^50 = 61 % after 50 steps; pooled statistics have no such lag
(Wu & Johnson 2021, section 3).

Measured (CIFAR-10, 3 seeds, jax 0.10.2, two cores of an AMD EPYC; test error in %):

    statistics                              last weights        SWA         EMA
    running (0.99), of the last step         40.5 ± 1.2   29.9 ± 1.0   25.7 ± 0.8
    running (0.9), of the last step          32.8 ± 1.5   40.3 ± 3.9   31.4 ± 2.6
    running (0.99), averaged as the weights            -  26.0 ± 0.4   26.4 ± 0.4
    pooled, 1 batch                          30.8 ± 0.1   26.2 ± 0.6   26.0 ± 0.9
    pooled, 4 batches                        30.4 ± 0.2   25.9 ± 0.6   25.7 ± 0.8
    pooled, 351 batches                      30.2 ± 0.3   25.9 ± 0.5   25.6 ± 0.8
    Algorithm 2, 351 batches                 30.2 ± 0.3   25.9 ± 0.5   25.6 ± 0.8

    points                                  last weights        SWA         EMA
    lost                                               - -10.6 ± 2.2 -14.8 ± 1.0
    recovered                                10.3 ± 3.2    4.0 ± 1.4    0.0 ± 0.0
    recovered (averaged)                               -   0.1 ± 0.5    0.7 ± 1.3
    gained                                             -   4.3 ± 1.8    4.6 ± 2.3

As expected, averaged weights are better by more than four points, and the running
statistics of the last step cost the SWA weights four points. Not as expected: they cost
the last weights ten. At a constant rate the weights move so fast that an average of
momentum 0.99 is that of other weights; so it happens to suit the EMA of the weights,
whose decay is the same. And running statistics that were averaged as the weights are
as good as pooled ones here. Four batches are enough for pooled statistics, and one is
almost. Between pooled statistics and Algorithm 2 there is no difference.

Early in training the running average costs 10 to 14 points from step 50 to step 500.
Debiasing mends that until step 20, half of it until step 100, and nothing from step 200
on, where the average lags because it is one of older weights.

Of each training the weights are evaluated in three forms: the last ones, their plain
mean over the last part of the training (SWA), and their EMA over all of it, with decay
0.99 per step, debiased. Each is evaluated with several statistics: the running
statistics at the last step, of momentum 0.99 and 0.9; running statistics (0.99) that
were averaged in the same way as the weights; and statistics estimated anew from batches
of the size of training's, pooled (`bnjax.population.pooled`) or by the paper's
Algorithm 2. For CIFAR-10, 351 batches are one pass over the training images.

    lost        error of averaged weights - error of the last weights, both with the
                running statistics (0.99) at the last step
    recovered   error with these running statistics - error with statistics that are
                pooled over most batches, of the same weights
    recovered (averaged)
                the same, from running statistics that were averaged as the weights
    gained      error of the last weights - error of averaged weights, both pooled

The running statistics lag behind the last weights too: what pooling recovers there is
in the row of the last weights.

Early in the same trainings, at a few steps, the first 2,000 test images are classified
with running averages of momentum 0.99 and 0.9, with a debiased average of momentum 0.99
(`bnjax.running.debiased_ema`), and with pooled statistics.

The network is in `common/convnet.py`, with `bnjax.BatchNorm`. The optimizer is gradient
descent with Nesterov momentum 0.9, weight decay 5e-4 for kernels and batches of 128.
The learning rate rises during the first tenth of the steps, then is constant: the one
of 0.03, 0.1, 0.3 and 1 that `experiments.small_batch --tune` chose for this network.
All differences are taken seed by seed, with 95 % confidence intervals.

To change the data or the sizes of the network, see `convnet.TASKS`; which steps are
averaged, when and from how many batches statistics are estimated, `SCHEDULES`; the
optimizer, `Network`. If a run was stopped, repeat the command to continue. Results are
cached by `Cell`: after changing the code use a new --out.

References: Izmailov et al. 2018, "Averaging weights leads to wider optima and better
generalization"; Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, section 3.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from matplotlib.lines import Line2D
from rich import box
from rich.table import Table

import bnjax
from bnjax.training import TrainState
from experiments.common import convnet, panels, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.intervals import Interval, interval
from experiments.common.rates import percent
from experiments.common.results import Record
from experiments.common.study import Study, Trained

COLLECTIONS = ["batch_stats", "batch_moments"]
EARLY_IMAGES = 2_000  # of the test images
WEIGHT_DECAY = 5e-4
DECAY = 0.99  # of the EMA of the weights, per step
WEIGHTS = {"last": "last weights", "swa": "mean (SWA)", "ema": "moving average (EMA)"}
EARLY = {
    "running": "running average, 0.99",
    "running_0.9": "running average, 0.9",
    "debiased": "debiased average, 0.99",
    "pooled": "pooled",
}
DIFFERENCES = ("lost", "recovered", "recovered (averaged)", "gained")


class Schedule(NamedTuple):
    """What depends on the data.

    Attributes:
        steps: the number of training steps.
        averaged_steps: the number of steps, the last ones, for SWA.
        every: SWA averages the weights after every so many of these.
        early: the steps after which early errors are measured.
        early_batches: the number of batches for pooled statistics at these steps.
        batches: for pooled statistics at the end; the last, most, for Algorithm 2 too.
    """

    steps: int
    averaged_steps: int
    every: int
    early: tuple[int, ...]
    early_batches: int
    batches: tuple[int, ...]


SCHEDULES = {
    "digits": Schedule(
        steps=60,
        averaged_steps=24,
        every=4,
        early=(5, 10, 20, 50),
        early_batches=4,
        batches=(1, 4, 8),
    ),
    "cifar10": Schedule(
        steps=3_000,
        averaged_steps=1_200,
        every=40,
        early=(10, 20, 50, 100, 200, 500),
        early_batches=64,
        batches=(1, 4, 16, 64, 351),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(study.Settings):
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "cifar10"] = "cifar10"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once."""
    rate: float = 0.1
    """The learning rate, after its rise during the first tenth of the steps."""
    batch_size: int = 128
    """Images per step, and per batch of the population statistics."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the batches of one training."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The settings of one training; also the key of its result."""

    data: str
    rate: float
    batch_size: int
    seed: int
    steps: int
    averaged_steps: int
    every: int
    early: tuple[int, ...]
    early_batches: int
    batches: tuple[int, ...]


def cells(config: Config) -> list[Cell]:
    """Every training of a run; they differ in the seed alone."""
    schedule = SCHEDULES[config.data]._asdict()
    size, rate = config.batch_size, config.rate
    return [Cell(config.data, rate, size, seed, **schedule) for seed in config.seeds]


# Model and training


def normalize(x: jax.Array, train: bool, step: Any) -> jax.Array:
    """Adds a layer to the network that calls it; its running average is "running"."""
    return bnjax.BatchNorm(use_running_average=not train, momentum=0.99)(x)


RULES = {
    "running_0.9": bnjax.running.ema(0.9),
    "debiased": bnjax.running.debiased_ema(0.99),
}
"""Running statistics of `EARLY`, other than those of the layers."""


class Shares(NamedTuple):
    """Of the newest weights in each average."""

    swa: float
    ema: float


class State(NamedTuple):
    """Of one training.

    Attributes:
        trained: the last weights, with the running statistics of the layers.
        swa: the mean of parameters and running statistics over chosen steps.
        ema: their exponential moving average over all steps.
        tracked: the state of each rule of `RULES`, by layer.
    """

    trained: TrainState
    swa: Any
    ema: Any
    tracked: dict[str, dict[str, Any]]


class Network:
    """The network and its training step, the same for all seeds of a cell."""

    def __init__(self, cell: Cell):
        self.model = convnet.ConvNet(convnet.TASKS[cell.data], normalize)
        rise = max(cell.steps // 10, 1)
        rate = optax.warmup_constant_schedule(0, cell.rate, rise)
        self.optimizer = optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY, bnjax.training.weight_decay_mask),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, seed: int, images: jax.Array) -> State:
        """The state before training."""
        variables: Any = self.model.init(jax.random.key(seed), images, train=False)
        trained = TrainState.create(
            apply_fn=self.model.apply, tx=self.optimizer, **variables
        )
        tracked = {
            name: {
                layer: rule.init(stats["mean"].shape)
                for layer, stats in trained.batch_stats.items()
            }
            for name, rule in RULES.items()
        }
        return State(trained, variables, variables, tracked)

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state: State, images, labels, shares: Shares) -> State:
        """The state after one batch."""

        def loss(params):
            variables = {**state.trained.variables, "params": params}
            logits, updates = self.collect(variables, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.trained.params)
        moments = updates.pop("batch_moments")
        trained = state.trained.apply_gradients(grads=grads, **updates)
        swa, ema = (
            optax.incremental_update(trained.variables, old, new)
            for old, new in zip((state.swa, state.ema), shares)
        )
        tracked = {
            name: {
                layer: RULES[name].update(old, moments[layer]["moments"])
                for layer, old in layers.items()
            }
            for name, layers in state.tracked.items()
        }
        return State(trained, swa, ema, tracked)

    def collect(self, variables, images):
        """Logits, and what `bnjax.population` asks of a model."""
        return self.model.apply(variables, images, train=True, mutable=COLLECTIONS)


def fit(cell: Cell, network: Network, data: Split) -> Iterator[tuple[int, State]]:
    """The number of each step, from 1, and the state after it."""
    state = network.init(cell.seed, data.images[:2])
    batches = draw_batches(cell.seed, len(data.labels), cell.steps, cell.batch_size)
    for step, batch in enumerate(batches, 1):
        images, labels = data.images[batch], data.labels[batch]
        state = network.step(state, images, labels, shares(cell, step))
        yield step, state


def shares(cell: Cell, step: int) -> Shares:
    """For SWA, 1/n at the n-th step that is averaged; for the EMA, without bias."""
    number, between = divmod(step - cell.steps + cell.averaged_steps, cell.every)
    swa = 1 / number if number > 0 and not between else 0.0
    return Shares(swa, ema=(1 - DECAY) / (1 - DECAY**step))


# Evaluation


def train(config: Config, cells: Sequence[Cell]) -> Iterator[Trained]:
    """The errors of each training."""
    data = convnet.load(config.data, config.data_dir)
    network = Network(cells[0])  # compiled once: cells differ in the seed alone
    for cell in cells:
        result = train_cell(cell, network, data)
        final = result["final"]
        errors = (f"{weights} {e['running']:.1%}" for weights, e in final.items())
        yield Trained(cell, result, f"seed {cell.seed}: {', '.join(errors)}")


def train_cell(cell: Cell, network: Network, data: Dataset) -> Record:
    """The errors of one training.

    Returns:
        early: statistics to the error after each of the early steps.
        final: weights to statistics to the error after the last step.
    """
    # In the order of the first epoch.
    chosen = draw_batches(
        cell.seed, len(data.train.labels), cell.batches[-1], cell.batch_size
    )
    first = Split(*(part[:EARLY_IMAGES] for part in data.test))
    early: dict[str, list[float]] = {name: [] for name in EARLY}
    state = None
    for step, state in fit(cell, network, data.train):
        if step in cell.early:
            batches = data.train.images[chosen[: cell.early_batches]]
            for name, stats in early_statistics(network, state, batches).items():
                variables = {**state.trained.variables, "batch_stats": stats}
                error = 1 - convnet.accuracy(network.model, variables, first)
                early[name].append(error)
    assert state is not None
    images = data.train.images[chosen]
    final = {
        weights: {
            kind: 1 - convnet.accuracy(network.model, variables, data.test)
            for kind, variables in variants(cell, network, state, weights, images)
        }
        for weights in WEIGHTS
    }
    return {"early": early, "final": final}


def early_statistics(
    network: Network, state: State, batches: np.ndarray
) -> dict[str, Any]:
    """`batch_stats` for the last weights, by the names of `EARLY`."""
    trained, tracked = state.trained, tracked_statistics(state)
    pooled = bnjax.population.pooled(network.collect, trained.variables, batches)
    return {"running": trained.batch_stats, **tracked, "pooled": pooled}


def tracked_statistics(state: State) -> dict[str, Any]:
    """`batch_stats` by the names of `RULES`."""
    return {
        name: {layer: RULES[name].read(s)._asdict() for layer, s in layers.items()}
        for name, layers in state.tracked.items()
    }


def variants(
    cell: Cell, network: Network, state: State, weights: str, batches: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """The weights, one of `WEIGHTS`, with each kind of statistics, and its name."""
    last = state.trained.variables
    variables = {"last": last, "swa": state.swa, "ema": state.ema}[weights]

    def replaced(batch_stats: Any) -> Any:
        return {**variables, "batch_stats": batch_stats}

    yield "running", replaced(last["batch_stats"])
    yield "running_0.9", replaced(tracked_statistics(state)["running_0.9"])
    if weights != "last":
        yield "averaged", variables
    for count in cell.batches:
        pooled = bnjax.population.pooled(network.collect, variables, batches[:count])
        yield f"pooled_{count}", replaced(pooled)
    yield (
        "algorithm_2",
        replaced(bnjax.population.algorithm_2(network.collect, variables, batches)),
    )


# Tables and picture


class Findings(NamedTuple):
    """What the results say, in percent and percentage points.

    Attributes:
        early: statistics to errors (seed, step).
        lag: early step to the error by the running average, minus pooled.
        final: weights to statistics to errors (seed,).
        differences: weights to those of `DIFFERENCES` that they have.
    """

    early: dict[str, np.ndarray]
    lag: dict[int, Interval]
    final: dict[str, dict[str, np.ndarray]]
    differences: dict[str, dict[str, Interval]]


def findings(config: Config, found: dict[Cell, Record]) -> Findings:
    """Errors and their differences, seed by seed, of the trainings there are."""
    rows = [found[cell] for cell in cells(config) if cell in found]
    early = {name: 100 * np.array([r["early"][name] for r in rows]) for name in EARLY}
    final = {
        weights: {
            kind: 100 * np.array([r["final"][weights][kind] for r in rows])
            for kind in rows[0]["final"][weights]
        }
        for weights in WEIGHTS
    }
    schedule = SCHEDULES[config.data]
    lag = (early["running"] - early["pooled"]).T
    most = f"pooled_{schedule.batches[-1]}"
    last, differences = final["last"], {}
    for weights, own in final.items():
        values = {"recovered": own["running"] - own[most]}
        if weights != "last":
            values["lost"] = own["running"] - last["running"]
            values["recovered (averaged)"] = own["averaged"] - own[most]
            values["gained"] = last[most] - own[most]
        differences[weights] = {name: interval(v) for name, v in values.items()}
    return Findings(
        early, dict(zip(schedule.early, map(interval, lag))), final, differences
    )


def kinds(schedule: Schedule) -> dict[str, str]:
    """The statistics of the final errors, and what they are called."""
    pooled = {
        f"pooled_{count}": f"pooled, {count} batch{'es' * (count > 1)}"
        for count in schedule.batches
    }
    return {
        "running": "running (0.99), of the last step",
        "running_0.9": "running (0.9), of the last step",
        "averaged": "running (0.99), averaged as the weights",
        **pooled,
        "algorithm_2": f"Algorithm 2, {schedule.batches[-1]} batches",
    }


def report(config: Config, found: dict[Cell, Record]) -> list[str | Table]:
    """Early errors, errors by weights and statistics, and the differences."""
    schedule, known = SCHEDULES[config.data], findings(config, found)

    early = Table("statistics", box=box.MARKDOWN)
    for step in schedule.early:
        early.add_column(f"{step:,}", justify="right", no_wrap=True)
    for name, label in EARLY.items():
        early.add_row(label, *(percent(e / 100) for e in known.early[name].T))
    lag = [str(known.lag[step]) for step in schedule.early]
    early.add_row("0.99 minus pooled", *lag)

    final = Table("statistics", *WEIGHTS.values(), box=box.MARKDOWN)
    for kind, label in kinds(schedule).items():
        errors = (known.final[weights].get(kind) for weights in WEIGHTS)
        final.add_row(label, *("" if e is None else percent(e / 100) for e in errors))

    changes = Table("weights", *DIFFERENCES, box=box.MARKDOWN)
    for weights, values in known.differences.items():
        each = (str(values.get(name, "")) for name in DIFFERENCES)
        changes.add_row(WEIGHTS[weights], *each)
    return [
        f"Error (%) on {EARLY_IMAGES:,} test images after early steps, and the "
        "difference in points with its 95 % interval",
        early,
        "Test error (%) after the last step, by weights and statistics",
        final,
        "Differences in points, with 95 % intervals: lost by averaging alone, "
        "recovered by pooled statistics, gained by averaging with these",
        changes,
    ]


COLOURS = {
    "last": "0.4",
    "swa": "#0072b2",
    "ema": "#e69f00",
    "running": "#d55e00",
    "running_0.9": "#cc79a7",
    "debiased": "#e69f00",
    "pooled": "#0072b2",
}
DASHES = {"running": ":", "averaged": "--"}


def draw(config: Config, found: dict[Cell, Record], folder: Path) -> list[Path]:
    """Errors against early steps, and of averaged weights by number of batches."""
    schedule, known = SCHEDULES[config.data], findings(config, found)
    task, seeds = convnet.TASKS[config.data], len(known.early["running"])
    title = (
        f"{panels.DATA[config.data]}, {len(task.widths)} convolutions, "
        f"{schedule.steps:,} steps of {config.batch_size} images; "
        f"mean and range of {seeds} seed{'s' * (seeds > 1)}"
    )
    figure, (left, right) = panels.make(title, (10.4, 4.0), 1, 2)

    for name, label in EARLY.items():
        style = {"color": COLOURS[name], "label": label, "marker": "o", "ms": 3}
        panels.line(left, schedule.early, known.early[name], **style)
    panels.label(left, "Early in training", "training steps", "test error (%)", log="x")
    left.legend(fontsize=7, frameon=False, title="statistics", title_fontsize=7)

    names = kinds(schedule)
    for weights, label in WEIGHTS.items():
        errors, colour = known.final[weights], COLOURS[weights]
        pooled = np.stack([errors[f"pooled_{count}"] for count in schedule.batches], 1)
        style = {"color": colour, "label": label, "marker": "o", "ms": 3}
        panels.line(right, schedule.batches, pooled, **style)
        for kind in DASHES.keys() & errors.keys():
            error = errors[kind].mean()
            right.axhline(error, color=colour, ls=DASHES[kind], lw=1.2)
    panels.label(
        right,
        "At the end, by weights (colour) and statistics (line)",
        f"batches of {config.batch_size} images for pooled statistics",
        "test error (%)",
        log="xy",
    )
    lines = {"pooled": "-"} | {names[kind]: ls for kind, ls in DASHES.items()}
    styles = [Line2D([], [], color="k", ls=ls, label=k) for k, ls in lines.items()]
    handles, _ = right.get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    right.legend(handles=[*handles, *styles], fontsize=7, frameon=False, **place)
    path = folder / f"weight_averaging_{config.data}.png"
    panels.save(figure, path)
    return [path]


STUDY = Study(
    "weight_averaging",
    cells,
    train,
    report,
    draw,
    smoke={"data": "digits", "seeds": (0,)},
)

if __name__ == "__main__":
    sys.exit(study.main(STUDY, tyro.cli(Config, description=__doc__)))
