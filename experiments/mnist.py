"""Figure 1 of the batch normalization paper: faster and better on MNIST.

    python -m experiments.mnist                               # digits: half a minute
    python -m experiments.mnist --data mnist --steps 50000    # as in the paper

Two networks, with and without batch normalization, start from the same weights and see
the same mini-batches: three hidden layers of 100 sigmoids, softmax, batches of 60, and
gradient descent at a constant rate. Pixels are rounded to 0 or 1. The paper does not
give the rate or the deviation of the weights. Here several rates are tried; the best
has the highest accuracy on the last sixth of the training images, which are not trained
on. The deviation, 0.1 = 1/sqrt(100), suits the network without normalization.

Expected: at the same rate the normalized network learns many times faster at first.
Each at its best rate, it reaches the accuracy that the other ends with in less than
half the steps, and ends higher. The percentiles of a sigmoid's input move less.

Measured (MNIST, 3 seeds, jax 0.10.2, two cores of an AMD EPYC, six minutes): 80 % of
the test images are right after 5 to 21 times fewer steps, at each rate. Both are best
at rate 3: the plain one ends at 97.1 %, which the normalized one reaches after 12,489
of 50,000 steps; it ends at 97.5 %.

To change the data, see `load_binary`; the model, `Network`; the optimizer or schedule,
`train_step`. All rates and seeds of a network are trained at once, by `jax.vmap`.

References: Ioffe & Szegedy 2015, section 4.1 and figure 1.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from experiments.common import images, results

NAMES = {"bn": "with BN", "plain": "without BN"}
COLOURS = {"bn": "#0072b2", "plain": "#d55e00"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; each is an option of the command line."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. The digits come with scikit-learn; the others are downloaded once."""
    data_dir: Path | None = None
    """A local copy of the data; see experiments/common/images.py."""
    steps: int = 3_000
    """Training steps of each network."""
    batch_size: int = 60
    """Images per step."""
    learning_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """The rates that are tried, for either network."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the weights and the mini-batches of one run per learning rate."""
    weight_std: float = 0.1
    """The standard deviation of the Gaussian weights."""
    momentum: float = 0.9
    """The weight of the old running statistics; 0.99 lags behind fast weights."""
    measurements: int = 40
    """How often accuracies are measured; most often at first."""
    out: Path = Path("runs")
    """The folder of the records, to which they are appended, and of the picture."""
    record: bool = False
    """Write the record and the picture that are committed, in experiments/."""
    plot_only: bool = False
    """Train nothing; draw the last run with this data again."""


# Data and model


def load_binary(name: str, data_dir: Path | None = None) -> images.Dataset:
    """The training, validation and test images, as rows of pixels, 0 or 1."""
    train, test = (
        images.Split(pixels.reshape(len(pixels), -1), labels)
        for pixels, labels in images.binary(*images.load(name, data_dir))
    )
    return images.hold_out(train, test, math.ceil(len(train.labels) / 6))


class Network(nn.Module):
    """Three hidden layers of sigmoids; BN comes before each, instead of a bias."""

    normalize: bool
    weight_std: float
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """The logits, and the inputs of the last hidden layer's sigmoids."""
        dense = functools.partial(
            nn.Dense, kernel_init=nn.initializers.normal(self.weight_std)
        )
        z = x = x.astype(jnp.float32)
        for _ in range(3):
            z = dense(100, use_bias=not self.normalize)(x)
            if self.normalize:
                z = bnjax.BatchNorm(not train, momentum=self.momentum)(z)
            x = nn.sigmoid(z)
        return dense(10)(x), z


# Training


def train_step(model: Network, variables: Any, rate: jax.Array, batch: images.Split):
    """The variables after one step of gradient descent."""

    def loss_fn(params):
        given = {**variables, "params": params}
        (logits, _), updates = model.apply(
            given, batch.images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), updates

    grads, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - rate * g, variables["params"], grads)
    return {"params": params, **updates}


@functools.partial(jax.jit, static_argnames=("model", "batch_size"), donate_argnums=1)
def advance(model, variables, rates, keys, data, start, stop, *, batch_size):
    """The variables, which lead with (seed, rate), after the steps start to stop."""

    def of_seed(variables, key):
        def step(i, variables):
            draw = jax.random.fold_in(key, i)
            rows = jax.random.randint(draw, (batch_size,), 0, len(data.labels))
            batch = images.Split(data.images[rows], data.labels[rows])
            one = functools.partial(train_step, model)
            return jax.vmap(one, (0, 0, None))(variables, rates, batch)

        return jax.lax.fori_loop(start, stop, step, variables)

    return jax.vmap(of_seed)(variables, keys)


@functools.partial(jax.jit, static_argnames="model")
def evaluate(model, variables, validation, test):
    """Accuracies and percentiles of a sigmoid's input, by the running statistics."""

    def one(variables):
        def accuracy(data: images.Split):
            logits, z = model.apply(variables, data.images, train=False)
            return (logits.argmax(-1) == data.labels).mean(), z[:, 0]

        (validated, _), (tested, z) = accuracy(validation), accuracy(test)
        percentiles = jnp.percentile(z, jnp.array([15, 50, 85]))
        return {"validation": validated, "test": tested, "percentiles": percentiles}

    return jax.vmap(jax.vmap(one))(variables)


def train(config: Config, path: Path) -> None:
    """Trains both networks side by side, and appends what is measured to `path`."""
    data, validation, test = load_binary(config.data, config.data_dir)
    rates = np.array(config.learning_rates, np.float32)
    keys = jax.vmap(jax.random.key)(np.array(config.seeds))
    # The rates are split over the devices, be they GPUs or the cores of a CPU.
    devices = jax.devices()[: math.gcd(len(rates), len(jax.devices()))]
    mesh = Mesh(np.array(devices), ("rate",))
    models, variables = {}, {}
    for name in NAMES:
        models[name] = Network(name == "bn", config.weight_std, config.momentum)
        init = functools.partial(models[name].init, x=data.images[:1], train=False)
        start = jax.tree.map(
            lambda v: jnp.stack([v] * len(rates), 1), jax.vmap(init)(keys)
        )
        variables[name] = jax.device_put(start, NamedSharding(mesh, P(None, "rate")))
    with results.Log(path) as log:
        settings = results.settings_of(config)
        log.add("run", experiment="mnist", settings=settings, **results.stamp())
        stops = np.unique(
            np.geomspace(1, config.steps, config.measurements).astype(int)
        )
        last = 0
        for stop in track([0, *stops.tolist()], "training"):
            for name, model in models.items():
                variables[name] = advance(
                    *(model, variables[name], rates, keys, data, last, stop),
                    batch_size=config.batch_size,
                )
                measured = evaluate(model, variables[name], validation, test)
                measured = jax.tree.map(np.asarray, measured)
                log.add("measurement", network=name, step=stop, **measured)
            last = stop


# Table and picture


def last_run(path: Path, data: str) -> tuple[dict, np.ndarray, dict]:
    """Of the newest run with this data: settings, steps, measurements by network.

    The measurements are arrays of the axes (time, seed, rate).
    """
    first, rows = results.last_run(path, data=data)
    each = {name: [r for r in rows if r["network"] == name] for name in NAMES}
    count = min(map(len, each.values()))  # a run that was stopped has one more of "bn"
    fields = "validation", "test", "percentiles"
    measured = {
        name: {f: np.array([r[f] for r in each[name][:count]], float) for f in fields}
        for name in NAMES
    }
    steps = np.array([row["step"] for row in each["bn"][:count]])
    return first["settings"], steps, measured


def best_rate(measured: dict) -> int:
    """The index of the rate with the highest final accuracy on validation images."""
    return int(measured["validation"][-1].mean(0).argmax())


def steps_to(steps: np.ndarray, measured: dict, rate: int, accuracy: float) -> float:
    """The first measured step with that mean test accuracy, or infinity."""
    reached = measured["test"][:, :, rate].mean(1) >= accuracy
    return float(steps[reached.argmax()]) if reached.any() else math.inf


def summary(settings: dict, steps: np.ndarray, measured: dict) -> tuple[Table, str]:
    """A table of all rates, and the same in two sentences."""
    table = Table("rate", "without BN", "with BN", "steps without", "steps with BN")
    table.title = "Final test accuracy, and steps to that of the network without BN"
    best = {name: best_rate(measured[name]) for name in NAMES}
    rates = settings["learning_rates"]
    rows = [(dict.fromkeys(NAMES, i), f"{r:g}") for i, r in enumerate(rates)]
    rows.append((best, f"best: {rates[best['plain']]:g}, {rates[best['bn']]:g}"))
    for rate, label in rows:
        final = {n: measured[n]["test"][-1, :, rate[n]].mean() for n in NAMES}
        needed = {
            n: steps_to(steps, measured[n], rate[n], final["plain"]) for n in NAMES
        }
        with_bn, without = (
            f"{needed[n]:,.0f}" if needed[n] < math.inf else "never" for n in NAMES
        )
        table.add_row(
            label, f"{final['plain']:.2%}", f"{final['bn']:.2%}", without, with_bn
        )
    same = best["bn"]
    reached = measured["plain"]["test"][-1, :, same].mean()
    with_bn, without = (steps_to(steps, measured[n], same, reached) for n in NAMES)
    soon = "does not" if with_bn == math.inf else f"after {with_bn:,.0f}"
    sentence = (
        f"At learning rate {rates[same]:g}, the network without BN reaches "
        f"{reached:.1%} of the test images after {without:,.0f} steps, the one with BN "
        f"{soon}. Each at its best rate, they end at {final['plain']:.1%} and "
        f"{final['bn']:.1%}."
    )
    return table, sentence


def draw(settings: dict, steps: np.ndarray, measured: dict, path: Path) -> None:
    """Both networks at each rate, each at its best, and the inputs of one sigmoid."""
    rates = settings["learning_rates"]
    figure = Figure((9, 5), dpi=160, layout="constrained")
    figure.suptitle(
        f"{settings['data'].upper()}: three layers of 100 sigmoids, batches of "
        f"{settings['batch_size']}; mean and range of {len(settings['seeds'])} seeds"
    )
    rows: Any = figure.subfigures(2, 1)
    above, below = rows
    same = above.subplots(1, len(rates), sharey=True)
    best, *inputs = below.subplots(1, 3, width_ratios=(1.4, 1, 1))
    lines = [(axes, dict.fromkeys(NAMES, i)) for i, axes in enumerate(same)]
    lines += [(best, {name: best_rate(measured[name]) for name in NAMES})]
    for axes, rate in lines:
        for name, label in NAMES.items():
            test = 100 * measured[name]["test"][1:, :, rate[name]]
            label += f", rate {rates[rate[name]]:g}" if axes is best else ""
            axes.plot(steps[1:], test.mean(1), color=COLOURS[name], label=label)
            low, high = test.min(1), test.max(1)
            axes.fill_between(steps[1:], low, high, color=COLOURS[name], alpha=0.2)
        title = f"learning rate {rates[rate['bn']]:g}"
        axes.set_title("each at its best rate" if axes is best else title)
    best.legend(fontsize=8, loc="upper left", frameon=False)
    style = {"fontsize": 9, "frameon": False, "loc": "outside lower center"}
    above.legend(*same[0].get_legend_handles_labels(), ncols=2, **style)
    final = 100 * measured["plain"]["test"][-1, :, best_rate(measured["plain"])].mean()
    best.set_ylim(final - 2 * (100 - final), 100)
    best.axhline(final, color=COLOURS["plain"], lw=0.8, ls=":")
    for axes, name in zip(inputs, ("plain", "bn"), strict=True):
        rate = best_rate(measured["plain"])
        values = measured[name]["percentiles"][1:, 0, rate]
        axes.plot(steps[1:], values, color=COLOURS[name])
        for value, label in zip(values[-1], ("15 %", "50 %", "85 %"), strict=True):
            axes.annotate(label, (steps[-1], value), fontsize=8)
        axes.set_title(f"{NAMES[name]}, rate {rates[rate]:g}")
    limits = [axes.get_ylim() for axes in inputs]
    for axes in inputs:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    same[0].set_ylabel("test accuracy (%)")
    best.set_ylabel("test accuracy (%)")
    inputs[0].set_ylabel("input of one sigmoid\n(percentiles)")
    for axes in (*same, best, *inputs):
        axes.set(xscale="log", xlabel="training steps")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(config: Config) -> int:
    """Trains, prints the table and draws the picture; returns the exit status."""
    console = Console()
    log, folder = results.places("mnist", config.out, config.record)
    picture = folder / "mnist.png"
    try:
        if not config.plot_only:
            train(config, log)
        run = last_run(log, config.data)
    except (images.DataError, LookupError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; --plot-only draws what was measured")
        return 130
    table, sentence = summary(*run)
    draw(*run, picture)
    console.print(table, f"\n{sentence}\n\n{log}\n{picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", results.cores())
    sys.exit(main(tyro.cli(Config, description=__doc__)))
