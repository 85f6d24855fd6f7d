"""Section 4.2 of the batch normalization paper: Inception in a fraction of the steps.

    python -m experiments.inception                      # seven models on CIFAR-10
    python -m experiments.inception --ablate             # BN-x5 but for each change
    python -m experiments.inception --ensemble 4         # figure 4
    python -m experiments.inception --tune --steps 1500 --evaluate-every 500
    python -m experiments.inception --data imagenet --data-dir FOLDER --divisor 1 \
        --modules 3a 3b 3c 4a 4b 4c 4d 4e 5a 5b --learning-rate 0.0015 \
        --steps 1000000 --evaluate-every 20000

Time: 41 minutes on two CPU cores, --ablate 45, --ensemble 4 25 (both measured on a busy
machine), tuning ten; with --smoke some seconds.

Expected: to the best accuracy of Inception, the same network with batch normalization
needs fewer than half the steps, BN-x5 (five times the rate, and what else section
4.2.1 changes) fewer still; BN-x30 ends highest; BN-x5-Sigmoid trains. Without
normalization, five times the rate diverges, and sigmoids stay at chance.

Measured (CIFAR-10, 6,000 steps, 1 seed, jax 0.10.2, two cores of an AMD EPYC; accuracy
on the test images in %, measured every 300 steps):

                            to 53.08 %          best    steps in the   best in
                         steps     share                   paper      the paper
    Inception            5,700      1.00       53.08      31.0e6       72.2
    BN-Baseline          1,800      0.32       71.74      13.3e6       72.7
    BN-x5                1,500      0.26       73.15       2.1e6       73.0
    BN-x30               3,000      0.53       65.79       2.7e6       74.8
    BN-x5-Sigmoid        2,100      0.37       71.59          -        69.8
    Inception, x5            -         -       10.00          -    diverged
    Inception, sigmoid       -         -       10.00          -         0.1

As expected, but for two things. BN-x30 is the worst of those with batch normalization:
the rate of 0.03 is the largest of the grid that Inception trains at (best of 1,500
steps on held-out images: 20.7, 25.4, 33.9, 34.6 and 10.4 % at 0.001, 0.003, 0.01, 0.03
and 0.1), and thirty times as much is 0.9. From 0.01 (--models bn_x5 bn_x30
--learning-rate 0.01) both end about alike, at 71.61 and 71.03. And BN-x5 is not 14
times as fast as Inception but 4 times, of 6,000 steps where the paper has 31e6. At
chance, 10 %, are the two that fail; their losses stay finite.

Taken back one at a time (--ablate), what BN-x5 ends at best:

    higher rate        68.96      faster decay              72.02
    less distortion    69.32      no LRN                    73.01
    no dropout         69.98      shuffling within shards   73.14
                                  less L2                   73.51

The rate, weaker distortions and the missing dropout are what BN-x5 gains by; the others
are within what one seed can tell. Four varied BN-x30 (--ensemble 4, with dropout of 5
or 10 %, and half of them from larger weights) are right on 62.4, 61.5, 61.1 and 62.5 %,
and together on 66.35: 4.5 points more than on average (in the paper 1.9, of six, with
many crops of each image).

The network: six of the paper's ten modules, two of each size, at an eighth of its
widths, of images of 32x32, which the stem halves once (for ImageNet, with the options
above, the network of its figure 5, with 11.2e6 parameters; the paper says 13.6e6).
Kernels are as He's at first, biases 0. SGD with momentum 0.9, batches of 32, and a
learning rate that decays exponentially: to half of it at the end, or six times as fast.
Its beginning is tuned for Inception, on a tenth of the training images that is held out
(`--tune`), and is multiplied by 5 or 30 as in the paper. What the changes change is in
`experiments.common.studies.recipes`.

All processes of a run are started alike, as for `experiments.data_parallel`, whose loop
this uses. A run that was stopped goes on where it was, inside a training too.

References: Ioffe & Szegedy 2015, sections 4.2.1 to 4.2.3, figures 2 to 5.
"""

import dataclasses
import functools
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.common import panels, study
from experiments.common.results import Record
from experiments.common.settings import RESULTS, Settings, SettingsError
from experiments.common.studies import entries, races, recipes, trainings
from experiments.common.studies.entries import Cell, Ensemble, Training
from experiments.common.studies.recipes import CHANGES, MODELS, Model, Recipe
from experiments.common.study import Study, Trained
from experiments.common.training import cluster, commands, runs
from experiments.common.training.guard import Guard
from experiments.common.training.loop import Options

MODULE = "experiments.inception"
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
NAMES = {
    "inception": "Inception",
    "bn_baseline": "BN-Baseline",
    "bn_x5": "BN-x5",
    "bn_x30": "BN-x30",
    "bn_x5_sigmoid": "BN-x5-Sigmoid",
    "inception_x5": "Inception, x5",
    "sigmoid": "Inception, sigmoid",
    "rate": "higher rate",
    "no_dropout": "no dropout",
    "less_l2": "less L2",
    "faster_decay": "faster decay",
    "no_lrn": "no LRN",
    "shuffle": "shuffling in shards",
    "less_distortion": "less distortion",
}
PAPER = {
    "inception": ("31.0e6", "1.00", "72.2"),
    "bn_baseline": ("13.3e6", "0.43", "72.7"),
    "bn_x5": ("2.1e6", "0.07", "73.0"),
    "bn_x30": ("2.7e6", "0.09", "74.8"),
    "bn_x5_sigmoid": ("-", "-", "69.8"),
    "inception_x5": ("-", "-", "diverged"),
    "sigmoid": ("-", "-", "0.1"),
}
SMOKE: dict[str, Any] = {
    "data": "digits",
    "models": ("bn_x5",),
    "modules": ("3c",),
    "divisor": 16,
    "steps": 60,
    "evaluate_every": 20,
    "learning_rate": 0.02,
}


@dataclasses.dataclass(frozen=True)
class Config(Training, Options, Settings):
    """The settings of a run; each is an option of the command line."""

    models: tuple[Model, ...] = tuple(MODELS)
    """Which ones are trained."""
    seeds: tuple[int, ...] = (0,)
    """Of the weights and the order of the images: one training of each model."""
    ablate: bool = False
    """Train BN-x5 without each of the seven changes instead."""
    ensemble: int = 0
    """Train so many varied BN-x30, and let them vote, instead."""
    tune: bool = False
    """Train Inception at several rates, and measure on held-out images, instead."""

    def folder(self) -> Path:
        """The folder of the results."""
        return RESULTS if self.record else self.out


def cells(config: Config) -> Sequence[Cell | Ensemble]:
    """Every training of a run."""
    if config.tune:
        rates = [dataclasses.replace(config, learning_rate=rate) for rate in RATES]
        return [
            entries.cell(c, "inception", recipes.ORIGINAL, held_out=True) for c in rates
        ]
    if config.ensemble:
        members = []
        for index in range(config.ensemble):
            recipe, dropout = recipes.member(index)
            varied = dataclasses.replace(config, dropout=dropout)
            members.append(entries.cell(varied, "bn_x30", recipe, seed=index))
        return [Ensemble(tuple(members))]
    models: dict[str, Recipe] = {model: MODELS[model] for model in config.models}
    if config.ablate:
        models = {model: MODELS[model] for model in ("inception", "bn_x5")}
        models |= {change: recipes.without(change) for change in CHANGES}
    return [
        entries.cell(config, model, recipe, seed=seed)
        for seed in config.seeds
        for model, recipe in models.items()
    ]


def train(
    config: Config, missing: Sequence[Cell | Ensemble], guard: Guard | None = None
) -> Iterator[Trained]:
    """Each of them, trained by all processes together; each makes the same calls."""
    folder = config.folder() / "inception"
    guard = guard or Guard(folder, active=False, timeout=config.timeout, advice="")
    guard.enter("reading the data", config.start_timeout)
    runs.check(config.batch_size)
    data = entries.load(config.data, config.data_dir)
    options = dataclasses.replace(config, resume=True)
    for cell in missing:
        place = folder / entries.name(cell)
        if isinstance(cell, Ensemble):
            result = trainings.vote(data, place, options, guard, cell)
            shown = f"together {result['together']:.2%}"
        else:
            result, _ = trainings.train(data, place, options, guard, cell)
            best = max(result["accuracy"], default=float("nan"))
            shown = f"{NAMES[cell.model]} {best:.2%}"
        yield Trained(cell, result, shown)
        if jax.process_index() == 0:  # the result is recorded by now
            shutil.rmtree(place, ignore_errors=True)


def grouped(found: dict[Any, Record]) -> dict[str, races.Curve]:
    """The curves by model, in order."""
    names = dict.fromkeys(cell.model for cell in found)
    return {
        name: races.mean([r for cell, r in found.items() if cell.model == name])
        for name in names
    }


def labels(config: Config) -> dict[str, str]:
    """What models are called."""
    if not config.ablate:
        return NAMES
    return NAMES | {change: f"BN-x5, not: {NAMES[change]}" for change in CHANGES}


def report(config: Config, found: dict[Any, Record]) -> Sequence[Any]:
    """The tables."""
    if config.tune:
        lines = [
            f"rate {cell.learning_rate:g}: {races.mean([result]).best():.2%} of the "
            f"held-out images{', diverged' if result['diverged'] else ''}"
            for cell, result in found.items()
        ]
        return ["Inception, best of all measurements, by the first rate", *lines]
    if config.ensemble:
        (result,) = found.values()
        members = ", ".join(f"{accuracy:.2%}" for accuracy in result["members"])
        return [
            f"Members: {members}. Together: {result['together']:.2%}, "
            f"{100 * result['gain']:+.2f} points over their mean. (Paper, figure 4: "
            "top-1 error 21.99 % of one, 20.1 % of six, with many crops of an image.)"
        ]
    lines = races.rows(grouped(found), "inception")
    title = (
        "Steps to Inception's best test accuracy, and the best accuracy\n"
        f"({config.data}, {config.steps:,} steps of {config.batch_size} images)"
    )
    return [races.table(title, lines, labels(config), PAPER)]


def draw(config: Config, found: dict[Any, Record], folder: Path) -> Sequence[Path]:
    """Figure 2."""
    if config.tune or config.ensemble:
        return []
    kind = "_ablated" if config.ablate else ""
    path = folder / f"inception{kind}_{config.data}.png"
    title = f"{panels.DATA[config.data]}, batches of {config.batch_size}"
    races.picture(grouped(found), "inception", labels(config), title, path)
    return [path]


STUDY = Study("inception", cells, train, report, draw, SMOKE)


def main(config: Config) -> int:
    """Runs the study, in one process or several; returns the exit status."""
    if config.launches:
        return commands.launch(MODULE, config)
    console = Console()
    work = functools.partial(run, config)
    folder = config.folder() / "inception"
    return runs.supervise(MODULE, config, folder, folder, work, console)


def run(config: Config, guard: Guard) -> int:
    """The study in process 0; the others train with it, and are silent."""
    cluster.check(config)
    if config.several and config.smoke and config.out is None:
        raise SettingsError("received --smoke in several processes: expected --out too")
    cluster.make_writable(config.folder())
    process, processes = cluster.connect(config, guard)
    guarded = functools.partial(train, guard=guard)
    if process == 0:
        status = study.main(STUDY._replace(train=guarded), config)
    else:
        status = 0
        if config.smoke:
            jax.config.update("jax_disable_most_optimizations", True)
            config = dataclasses.replace(config, **SMOKE)
        known = study.finished(config.folder() / "inception.jsonl")
        missing = [c for c in cells(config) if study.key(c) not in known]
        for _ in [] if config.plot_only or not missing else guarded(config, missing):
            pass
    if processes > 1:
        guard.enter("leaving together", config.start_timeout)
        jax.distributed.shutdown()
    return status


if __name__ == "__main__":
    # Started in the background of a shell, Python would ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(tyro.cli(Config, description=__doc__)))
