"""Draws every picture again, from the results alone.

    python -m experiments.figures

Time: ten seconds. The pictures in experiments/figures come from the results that are
committed, experiments/results/*.jsonl, and from nothing else.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from rich.console import Console

from experiments import (
    inception,
    mnist,
    normalizers,
    population,
    regularization,
    saturation,
    scale_invariance,
    small_batch,
    weight_averaging,
    why_it_works,
)
from experiments.bench import (
    accelerators,
    charts,
    compile,
    layer,
    scaling,
    step,
    whitening,
)
from experiments.common import images, study

HERE = Path(__file__).parent
STUDIES: dict[Any, list[Any]] = {
    inception: [inception.Config(), inception.Config(ablate=True)],
    normalizers: [normalizers.Config()],
    regularization: [regularization.Config()],
    saturation: [saturation.Config()],
    scale_invariance: [scale_invariance.Config()],
    weight_averaging: [weight_averaging.Config()],
    why_it_works: [why_it_works.Config()],
    small_batch: [small_batch.Config(), small_batch.Config(deeper=True)],
}
"""The settings of the runs whose results are committed."""
BENCHES = layer, compile, scaling, step, whitening
Figure = Callable[[Path, Path], Iterator[Path]]
"""(the folder of results, the folder of pictures) -> the pictures drawn."""


@dataclasses.dataclass(frozen=True)
class Config:
    """From where to where; each is an option of the command line."""

    results: Path = HERE / "results"
    """The folder of the JSON lines."""
    out: Path = HERE / "figures"
    """The folder of the pictures."""


def main(config: Config) -> int:
    """Draws all that there are results for; returns the exit status."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    missing = False
    for name, figure in FIGURES.items():
        try:
            for path in figure(config.results, config.out):
                console.print(str(path), highlight=False, soft_wrap=True)
        except (FileNotFoundError, LookupError, images.DataError) as error:
            message = f"{name}: {error}"
            console.print(message, style="red", markup=False, soft_wrap=True)
            missing = True
    return int(missing)


def of_study(module: Any, runs: list[Any], source: Path, folder: Path):
    """The pictures of an experiment of many trainings, for the settings of each run."""
    for config in runs:
        path = source / f"{module.STUDY.name}.jsonl"
        found = study.load(module.STUDY, config, path)
        yield from module.STUDY.draw(config, found, folder)


def of_bench(module: ModuleType, source: Path, folder: Path) -> Iterator[Path]:
    """The picture of the newest run of a bench."""
    name = f"bench_{module.__name__.rpartition('.')[2]}"
    start, *records = charts.last_run(source / f"{name}.jsonl")
    module.draw(start, records, folder / f"{name}.png")
    yield folder / f"{name}.png"


def of_mnist(source: Path, folder: Path) -> Iterator[Path]:
    """Figure 1 of the paper."""
    run = mnist.last_run(source / "mnist.jsonl", "mnist")
    mnist.draw(*run, folder / "mnist.png")
    yield folder / "mnist.png"


def of_population(source: Path, folder: Path) -> Iterator[Path]:
    """Accuracy against steps, by each kind of statistics."""
    run = population.last_run(source / "population.jsonl", "digits")
    population.draw(*run, folder / "population.png")
    yield folder / "population.png"


def of_accelerators(source: Path, folder: Path) -> Iterator[Path]:
    """Programs for TPUs and GPUs: one layer, and a step of ResNet-50."""
    layers = accelerators.Layer(
        targets=("v5e", "h100"), shapes=("256x56x56x256",), layers=("flax", "bnjax")
    )
    for config, draw in (
        (layers, accelerators.draw_layers),
        (accelerators.Step(blocks=0), accelerators.draw_steps),
    ):
        name = accelerators.NAMES[type(config)]
        path = folder / f"{name}.png"
        draw(accelerators.known(config, source / f"{name}.jsonl"), path)
        yield path


FIGURES: dict[str, Figure] = {
    "mnist": of_mnist,
    "population": of_population,
    **{m.STUDY.name: partial(of_study, m, runs) for m, runs in STUDIES.items()},
    **{m.__name__: partial(of_bench, m) for m in BENCHES},
    accelerators.__name__: of_accelerators,
}

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
