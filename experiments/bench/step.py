"""A training step of a ResNet: time and memory with our layers and with Flax's.

    python -m experiments.bench.step                    # six minutes on two cores
    python -m experiments.bench.step --batch-size 32    # two minutes
    python -m experiments.bench.step --smoke            # under ten seconds

Claim: forward, backward and update take no longer with `bnjax.BatchNorm` than with
`flax.linen.BatchNorm`, nothing else changed, and less memory; with `activation=` and
`residual=` less again; and less again with the blocks in
`nn.remat(policy=bnjax.remat_policy)`, which runs no convolution twice, as `nn.remat` of
a whole block does.

Control: Flax's layers in the same network, plain and with `nn.remat` of the blocks. All
start from the same parameters and must give the same loss before they are timed. The
calls take turns; a ratio is one of medians, over that of Flax plain: below 1 is faster.
Memory is what the compiler plans for temporary arrays, what the derivative stores
between the passes (parameters included), and what the device says it had in use at
most, where it says so. The data are random, of the sizes of CIFAR-10 (ResNet-18, 3x3
stem) or ImageNet (ResNet-50).

Measured: see the README.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

import bnjax
from experiments.bench import charts
from experiments.bench.charts import Measure
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results
from experiments.common.models.imagenet import Basic, Bottleneck, Norm, ResNet
from experiments.common.training.steps import Step, compiled

NORMS = {
    "flax": Norm(nn.BatchNorm),
    "flax remat": Norm(nn.BatchNorm, remat=nn.remat),
    "bnjax": Norm(bnjax.BatchNorm),
    "bnjax fused": Norm(bnjax.BatchNorm, fused=True),
    "bnjax remat": Norm(
        bnjax.BatchNorm,
        fused=True,
        remat=partial(nn.remat, policy=bnjax.remat_policy),
        region="stage",
    ),
}
MEASURES = {
    "time": Measure("time", "s", decimals=3),
    "planned": Measure("temporary", "MiB", 2**20),
    "stored": Measure("residuals", "MiB", 2**20),
    "used": Measure("most in use", "MiB", 2**20),
}
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # how far losses may differ


class Task(NamedTuple):
    """A network, and what a GPU is given of it unless the options say otherwise."""

    network: Callable[..., ResNet]
    images: int
    side: int
    dtypes: tuple[str, ...]


TASKS = {
    "resnet18": Task(
        partial(ResNet, Basic, (2, 2, 2, 2), small=True, classes=10),
        images=128,
        side=32,
        dtypes=("bfloat16", "float32"),
    ),
    "resnet50": Task(
        partial(ResNet, Bottleneck, (3, 4, 6, 3)), 256, 224, ("bfloat16",)
    ),
    "tiny": Task(partial(ResNet, Basic, (1,), small=True, width=8), 4, 8, ("float32",)),
}


@dataclass(frozen=True)
class Config:
    """What is measured; empty or 0 for what the device or the model decides."""

    model: Literal["", "resnet18", "resnet50", "tiny"] = ""
    """ResNet-18 on a CPU, else ResNet-50."""
    dtypes: tuple[str, ...] = ()
    """Of the computation: both, or bfloat16 for ResNet-50; parameters are float32."""
    batch_size: int = 0
    """Images per step: 128, or 256 for ResNet-50."""
    image_size: int = 0
    """Their side: 32, or 224 for ResNet-50."""
    seconds: float = 30.0
    """For each dtype, all variants together; at least five steps of each."""
    plan_only: bool = False
    """Compile for the memory's sake, and run nothing (ResNet-50 on a CPU)."""
    output: Path = Path("experiments/results/bench_step.jsonl")
    """Appended to."""
    figure: Path = Path("experiments/figures/bench_step.png")
    """The picture."""
    smoke: bool = False
    """One block on a few small images, in float32."""


def complete(config: Config) -> Config:
    """The settings with none left open."""
    if config.smoke:  # so few steps take less time than optimization
        jax.config.update("jax_disable_most_optimizations", True)
        config = replace(config, model="tiny", seconds=0.1)
    on_cpu = jax.default_backend() == "cpu"
    model = config.model or ("resnet18" if on_cpu else "resnet50")
    return replace(
        config,
        model=model,
        dtypes=config.dtypes or TASKS[model].dtypes,
        batch_size=config.batch_size or TASKS[model].images,
        image_size=config.image_size or TASKS[model].side,
    )


def prepare(config: Config, dtype: str) -> dict[str, Step]:
    """The steps of all variants, from the same parameters and images."""
    build = partial(TASKS[config.model].network, dtype=dtype)
    size = config.batch_size, config.image_size, config.image_size, 3
    images = jax.random.normal(jax.random.key(1), size, dtype)
    init = jax.jit(build(norm=NORMS["flax"]).init)
    variables = init(jax.random.key(0), images[:2])
    data = images, jnp.arange(len(images)) % 10
    return {
        name: compiled(build(norm=norm), variables, data)
        for name, norm in NORMS.items()
    }


def run(steps: dict[str, Step], seconds: float) -> dict[str, dict[str, Any]]:
    """The loss, the device's memory and the median seconds of each variant.

    The least hungry is the first to run, because the device's maximum only rises.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in steps}
    for name in sorted(steps, key=lambda name: steps[name].planned):
        found[name]["loss"] = float(steps[name].run()[0])
        memory = jax.devices()[0].memory_stats() or {}
        found[name]["used"] = memory.get("peak_bytes_in_use")
    medians = interleaved({name: step.run for name, step in steps.items()}, seconds)
    for name, median in medians.items():
        found[name]["time"] = median
    return found


def main(config: Config) -> None:
    """Measures, records, prints the table and draws the picture."""
    config = complete(config)
    with results.Log(config.output) as log:
        log.add("start", bench="step", settings=asdict(config), **results.stamp())
        for dtype in config.dtypes:
            steps = prepare(config, dtype)
            found = {} if config.plan_only else run(steps, config.seconds)
            for name, step in steps.items():
                memory = {"planned": step.planned, "stored": step.stored}
                fields = memory | found.get(name, {})
                log.add("variant", dtype=dtype, variant=name, **fields)
            check(found, AGREE[dtype])
    start, *records = charts.last_run(config.output)
    title = "Over Flax plain (below 1: faster, smaller); in brackets medians and sizes"
    Console(width=120).print(charts.table(title, records, "dtype", MEASURES))
    draw(start, records, config.figure)


def check(found: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Raises where two variants differ in the loss: they compute something else."""
    losses = {name: numbers["loss"] for name, numbers in found.items()}
    if losses and not max(losses.values()) - min(losses.values()) <= tolerance:
        raise RuntimeError(f"the losses differ by more than {tolerance}: {losses}")


def draw(start: results.Record, records: list[results.Record], path: Path) -> None:
    """A panel for each dtype: time and memory over those of Flax plain."""
    settings = start["settings"]
    side = settings["image_size"]
    title = (
        f"A training step of {settings['model']}, {settings['batch_size']} images of "
        f"{side} x {side}: over Flax plain\n{charts.machine(start)}"
    )
    known = {key: m for key, m in MEASURES.items() if records[0].get(key) is not None}
    figure, panels = charts.panels(title, len(settings["dtypes"]))
    for axes, dtype in zip(panels, settings["dtypes"], strict=True):
        charts.bars(axes, [r for r in records if r["dtype"] == dtype], "dtype", known)
        axes.set_title(dtype, fontsize=9)
    charts.save(figure, path, panels[:1])


if __name__ == "__main__":
    keep_memory("experiments.bench.step")
    main(tyro.cli(Config, description=__doc__))
