"""Serving a ResNet-18 without batch normalization, in a process that has only JAX.

    python -m experiments.serve

Time: about a minute on two CPU cores; with --smoke some seconds.

What it does, to copy from: the network, with Flax's layers, gets statistics from some
batches; bnjax's layers take their place, with the same variables;
`bnjax.fold.fold_model` folds all batch normalization into the convolutions; and
`jax.export` makes one program of it, for any batch size and for CPUs, CUDA GPUs and
TPUs, which is written to a file with the weights inside. A fresh process, which imports
neither bnjax nor Flax, reads the file and classifies batches of several sizes.

Expected: the fresh process's logits equal those of the unfolded network within 1e-5 of
the largest. Folding takes away 20 normalizations, their statistics and their reads of
memory; it makes the network faster where the compiler had not fused them away.

Measured (32x32 images, float32, jax 0.10.2, two cores of an AMD EPYC): the logits
differ by 7e-7. Folding gains nothing in time there: the folded network runs at 0.96
times the speed of the unfolded one for one image, and at 0.99 times for 32 (earlier
runs: 0.92 to 0.97). XLA puts each network but for its last layers into one fusion (of
YNNPACK's), batch normalization included; why the folded one is a little slower was not
found out. Not measured on a GPU or TPU.

To change the network, see `ResNet`; the batches of its statistics, `trained`.

References: Jacob et al. 2018 (Quantization and training), section 3.2, for folding.
"""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tyro
from jax import export
from rich.console import Console
from rich.table import Table

import bnjax
from experiments.bench.timing import interleaved, keep_memory
from experiments.common import results
from experiments.common.study import start

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5  # relative to the largest logit
LAYERS = {"flax": nn.BatchNorm, "bnjax": bnjax.BatchNorm}
CLIENT = """
import sys
import jax, numpy as np
from jax import export

program, images, logits = sys.argv[1:]
model = export.deserialize(bytearray(open(program, "rb").read()))
batches = np.load(images)
np.savez(logits, **{name: jax.jit(model.call)(x) for name, x in batches.items()})
assert not {"bnjax", "flax"} & sys.modules.keys()
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; each is an option of the command line."""

    file: Path | None = None
    """Where to keep the program with its weights (45 MB); None for a temporary file."""
    image_size: int = 32
    """The side of the images."""
    width: int = 64
    """Features of the first stage."""
    stages: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images per call, for the timings; a fresh process gets batches of these too."""
    seconds: float = 15.0
    """For the timings of each batch size."""
    out: Path = Path("runs")
    """The folder of serve.jsonl, which is appended to."""
    record: bool = False
    """Append to the record that is committed, in experiments/results."""
    smoke: bool = False
    """A narrow network on tiny images, and few timings; nothing is kept."""


SMOKE: dict[str, Any] = {
    "image_size": 16,
    "width": 8,
    "stages": (1, 1),
    "batch_sizes": (1, 3),
    "seconds": 0.05,
}


# Model


class Block(nn.Module):
    """Two 3x3 convolutions, and the sum with the input."""

    features: int
    strides: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(self.features, 3, self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = conv(self.features, 3)(y)
        y = self.norm()(y)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.strides)(x)
            x = self.norm()(x)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """A residual network for small images, with any layer for batch normalization."""

    norm: Callable[..., nn.Module]
    stages: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of images (batch, height, width, channels)."""
        x = conv(self.width, 3)(x)
        x = nn.relu(self.norm()(x))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                layer = Block(
                    self.width * 2**stage,
                    strides,
                    self.norm,
                    name=f"stage{stage}_block{block}",
                )
                x = layer(x)
        return nn.Dense(10)(x.mean((1, 2)))


def conv(features: int, size: int, strides: int = 1) -> nn.Conv:
    """A convolution without a bias, as batch normalization follows."""
    init = nn.initializers.he_normal()
    return nn.Conv(features, (size, size), strides, use_bias=False, kernel_init=init)


# Export, serving, timing


def main(config: Config) -> int:
    """Folds, exports, serves, compares and measures; returns the exit status."""
    return start(_main, SMOKE, config)


def _main(config: Config) -> int:
    console = Console()
    if importlib.util.find_spec("flatbuffers") is None:
        console.print(
            "error: jax.export writes files with the package flatbuffers, which is not "
            "installed: expected it beside JAX. Run pip install 'bnjax[experiments]'.",
            markup=False,
            soft_wrap=True,
        )
        return 1
    models, variables = trained(config)
    example = images(config, 2)
    folded = bnjax.fold.fold_model(models["bnjax"], variables, example)
    console.print(
        f"{len(folded.folded)} of {len(folded.folded) + len(folded.kept)} batch "
        "normalizations folded"
    )
    batches = {str(n): np.asarray(images(config, n)) for n in (*config.batch_sizes, 5)}
    unfolded = jax.jit(models["bnjax"].apply)
    expected = {n: unfolded(variables, x) for n, x in batches.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = config.file or Path(folder) / "resnet18.bin"
        path.write_bytes(exported(folded, example))
        size = path.stat().st_size / 1e6
        console.print(f"{size:.1f} MB, for {', '.join(PLATFORMS)} and any batch size")
        served = in_a_fresh_process(path, batches)
    error = max(relative_error(served[n], expected[n]) for n in batches)
    console.print(f"a fresh process differs by {error:.1e} of the largest logit")
    times = measure(config, models, variables, folded)
    record(config, error, times)
    console.print(table(times))
    return 0 if error <= TOLERANCE else 1


def trained(config: Config) -> tuple[dict[str, nn.Module], Any]:
    """The network with either library's layers, and variables that fit both."""

    def network(layer: type[nn.Module], train: bool) -> ResNet:
        norm = functools.partial(layer, use_running_average=not train)
        return ResNet(norm, config.stages, config.width)

    training = network(nn.BatchNorm, train=True)
    variables = jax.jit(training.init)(jax.random.key(0), images(config, 4))

    @jax.jit
    def step(variables, x):
        return training.apply(variables, x, mutable=["batch_stats"])[1]

    for seed in range(20):
        variables = {**variables, **step(variables, images(config, 32, seed))}
    return {name: network(layer, False) for name, layer in LAYERS.items()}, variables


def images(config: Config, count: int, seed: int = 0) -> jax.Array:
    """Random ones."""
    shape = count, config.image_size, config.image_size, 3
    return 0.5 + jax.random.normal(jax.random.key(seed), shape)


def exported(folded: bnjax.fold.Folded, example: jax.Array) -> bytearray:
    """The program with its weights, for any batch size and each of the platforms."""
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *example.shape[1:]), example.dtype)
    predict = jax.jit(functools.partial(folded.apply, folded.params))
    return export.export(predict, platforms=PLATFORMS)(x).serialize()


def in_a_fresh_process(
    program: Path, batches: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The logits of each batch, from a process that reads the program's file."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "images.npz", Path(folder) / "logits.npz"
        np.savez(given, **batches)  # pyright: ignore[reportArgumentType]
        arguments = [str(path.resolve()) for path in (program, given, answer)]
        command = [sys.executable, "-P", "-c", CLIENT, *arguments]
        subprocess.run(command, cwd=folder, check=True)
        with np.load(answer) as logits:
            return dict(logits)


def relative_error(actual: Any, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def measure(
    config: Config,
    models: dict[str, nn.Module],
    variables: Any,
    folded: bnjax.fold.Folded,
) -> dict[int, dict[str, float]]:
    """The median seconds of each network, jitted, by batch size; they take turns."""
    times = {}
    for size in config.batch_sizes:
        x = images(config, size)
        calls = {
            name: functools.partial(jax.jit(model.apply), variables, x)
            for name, model in models.items()
        }
        calls["folded"] = functools.partial(jax.jit(folded.apply), folded.params, x)
        times[size] = interleaved(calls, config.seconds, untimed=1)
    return times


def record(config: Config, error: float, times: dict[int, dict[str, float]]) -> None:
    """Appends the results to the file of records."""
    settings = results.settings_of(config)
    settings["file"] = str(config.file)
    path, _ = results.places("serve", config.out, config.record)
    with results.Log(path, digits=None) as log:
        log.add("run", experiment="serve", settings=settings, **results.stamp())
        log.add("served", error=error)
        for size, medians in times.items():
            log.add("times", batch_size=size, **medians)


def table(times: dict[int, dict[str, float]]) -> Table:
    """Milliseconds, and how many times as fast the folded network is."""
    shown = Table("batch", "Flax", "bnjax", "folded", "over Flax", "over bnjax")
    for size, medians in times.items():
        flax, bnjax_, folded = (medians[n] for n in ("flax", "bnjax", "folded"))
        ms = (f"{1e3 * t:.2f} ms" for t in (flax, bnjax_, folded))
        shown.add_row(
            str(size), *ms, f"{flax / folded:.2f} x", f"{bnjax_ / folded:.2f} x"
        )
    return shown


if __name__ == "__main__":
    keep_memory("experiments.serve")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
