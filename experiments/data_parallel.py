"""Data-parallel training that can be killed: a ResNet on CIFAR-10, on any machines.

    python -m experiments.data_parallel                      # the digits, one process
    python -m experiments.data_parallel --data cifar10 --depth 20 --epochs 100
    python -m experiments.data_parallel --data imagenet --depth 50 --width 64 ...
    python -m experiments.data_parallel --local-processes 3  # to try out several
    srun python -m experiments.data_parallel --distributed --resume --data cifar10 ...

Time: with the digits ten seconds on two CPU cores, with --smoke less; with CIFAR-10 and
--depth 8 a good minute per epoch.

The same program runs in each process, and is written as if there were one: a mesh over
all devices of all processes, the batch split over it, everything else on every device.
Under `jax.jit` the statistics of batch normalization are then those of the whole batch,
with no axis name. What the processes need to agree on, they compute alike.

If a process is lost, the others end within --timeout seconds, with a message that says
which one, and the command that goes on from the last checkpoint. The parts lie in
`experiments.common`: loop, training (what is around it), guard (when to give up),
roll (who is lost), checkpoints and launcher.

Expected: three processes of two devices train as one of six does, but for rounding. A
run that is killed anywhere and resumed has the losses, the final parameters and the
statistics of one that was left alone, bit for bit.

Measured (jax 0.10.2 and 0.12.0, two cores of an AMD EPYC; 23 steps on the digits):
three processes against one, losses differ by 2e-7 at most; resumed, by nothing. In full
length the digits end at 97.5 % of the test images, and CIFAR-10 with --depth 8 --epochs
12 at 78.1 %.

ImageNet was not trained on. Its layout was tried with 200 synthetic photographs (see
`experiments.common.data.synthetic`), one of them damaged: ResNet-18 in full size.

References: He et al. 2016 (the network); Goyal et al. 2017 (the rate grows with the
batch, after a warm-up; no decay but of kernels).
"""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from experiments.common.data import pipeline, sources
from experiments.common.models import networks
from experiments.common.settings import SettingsError, start
from experiments.common.training import cluster, commands, optimizers, runs
from experiments.common.training.guard import Guard
from experiments.common.training.loop import Job, Options

MODULE = "experiments.data_parallel"
OUT = Path(__file__).parent / "results" / "data_parallel"
SMOKE: dict[str, Any] = {
    "data": "digits",
    "width": 4,
    "epochs": 4,
    "warmup_epochs": 1.0,
    "checkpoint_every": 20,
}


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings that make a run what it is: it is resumed with the same only."""

    data: Literal["digits", "cifar10", "imagenet"] = "digits"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once;
    ImageNet, or what is laid out as it is, lies in --data-dir."""
    depth: Literal[8, 14, 20, 32, 44, 56, 110, 18, 34, 50] = 8
    """Layers of the network; the last three are of those of ImageNet."""
    width: int = 16
    """Channels of its first stage; ImageNet's is 64 in the paper."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and statistics are float32."""
    batch_size: int = 128
    """Images per step, on all devices together."""
    epochs: int = 20
    """How often each image is seen."""
    learning_rate: float = 0.1
    """The highest, for each 128 images of the batch."""
    warmup_epochs: float = 2.0
    """While the rate rises."""
    weight_decay: float = 1e-4
    """Of kernels."""
    seed: int = 0
    """Of the weights, the order of the images and how they are augmented."""


@dataclasses.dataclass(frozen=True)
class Config(Options, Training):
    """The settings of a run; each is an option of the command line."""

    data_dir: Path | None = None
    """Where ImageNet lies, or CIFAR-10 if not to be downloaded; or BNJAX_DATA."""
    smoke: bool = False
    """A run of seconds on the digits, to see that all works."""

    def folder(self) -> Path:
        """The run's folder."""
        return OUT if self.out is None else self.out

    def fixed(self) -> dict[str, Any]:
        """The settings of `Training`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Training)}


def main(config: Config) -> int:
    """Trains, or starts the processes that do; returns the exit status."""
    return start(_main, SMOKE, config)


def _main(config: Config) -> int:
    if config.launches:
        return commands.launch(MODULE, config)
    console = Console()

    def work(guard: Guard) -> int:
        run(config, guard, console)
        return 0

    folder = config.folder()
    return runs.supervise(MODULE, config, folder, folder / "checkpoints", work, console)


def run(config: Config, guard: Guard, console: Console) -> None:
    """Meets the other processes, trains with them, and records how it goes."""
    cluster.check(config)
    cluster.make_writable(config.folder())
    process, processes = cluster.connect(config, guard)
    check(config)
    guard.enter("reading the data", config.start_timeout)
    runs.run(make_job(config, process, processes), config, guard, console)
    if processes > 1:
        guard.enter("leaving together")
        jax.distributed.shutdown()


def check(config: Config) -> None:
    """Raises SettingsError if settings do not go together."""
    networks.check(config.data, config.depth)
    runs.check(config.batch_size)
    if not 0 <= config.warmup_epochs < config.epochs:
        raise SettingsError(
            f"received --warmup-epochs {config.warmup_epochs}: expected less than the "
            f"{config.epochs} of --epochs."
        )


def make_job(config: Config, process: int, processes: int) -> Job:
    """What one process trains; together they are one job."""
    data = sources.load(config.data, config.data_dir)
    share = config.batch_size, process, processes
    epoch = data.train_count / config.batch_size
    total, warmup = round(config.epochs * epoch), round(config.warmup_epochs * epoch)
    peak = config.learning_rate * config.batch_size / 128
    return Job(
        name="data_parallel",
        folder=config.folder(),
        settings=config.fixed(),
        about=dataclasses.asdict(config),
        network=networks.build(
            config.data, config.depth, config.width, config.dtype, data.classes
        ),
        optimizer=optimizers.cosine(total, warmup, peak, config.weight_decay),
        batches=pipeline.training(data, config.seed, *share),
        tests=pipeline.testing(data, *share),
        count=data.test_count,
        batch_size=config.batch_size,
        total=total,
        seed=config.seed,
    )


if __name__ == "__main__":
    # Started in the background of a shell, Python would ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(tyro.cli(Config, description=__doc__)))
