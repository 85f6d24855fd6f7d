"""The trainings of section 4.2: what decides each, and the job that it is."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.common import results, study
from experiments.common.data import photos, pipeline, sources
from experiments.common.data.examples import Batch, ImageData, Source
from experiments.common.data.photos import Photos, Splits
from experiments.common.studies import recipes
from experiments.common.studies.recipes import ORIGINAL, Amounts, Recipe
from experiments.common.training.loop import Job

TESTED = 200  # images at once
HELD_OUT = 10  # one of so many training images


@dataclasses.dataclass(frozen=True)
class Training(Amounts):
    """The settings that all trainings of a run have in common."""

    data: Literal["digits", "cifar10", "imagenet"] = "cifar10"
    """The images. The digits come with scikit-learn; CIFAR-10 is downloaded once;
    ImageNet, or what is laid out as it is, lies in --data-dir."""
    steps: int = 6000
    """Of each training."""
    batch_size: int = 32
    """Images per step, of all processes together."""
    evaluate_every: int = 300
    """Steps between two measurements on the test images."""


@dataclasses.dataclass(frozen=True)
class Cell(Training):
    """What decides how one network turns out.

    Attributes:
        model: its name.
        recipe: how it is trained.
        seed: of the weights, dropout, the order of the images and their augmentation.
        held_out: whether to test on images that are held out of training.
    """

    model: str = "inception"
    recipe: Recipe = ORIGINAL
    seed: int = 0
    held_out: bool = False


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that vote."""

    members: tuple[Cell, ...]


def cell(settings: Training, model: str, recipe: Recipe, **others: Any) -> Cell:
    """A cell with these settings, whatever else they say."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Training)}
    return Cell(**fields, model=model, recipe=recipe, **others)


def name(cell: Cell | Ensemble) -> str:
    """Of a folder; another cell has another."""
    first = cell.model if isinstance(cell, Cell) else "ensemble"
    return f"{first}-{hashlib.sha256(study.key(cell).encode()).hexdigest()[:12]}"


def make_job(data: ImageData | Splits, folder: Path, cell: Cell) -> Job:
    """What this process trains."""
    process, processes = jax.process_index(), jax.process_count()
    recipe = cell.recipe
    source = varied(data, cell)
    share = cell.batch_size, process, processes
    order = recipes.shuffle(recipe)
    return Job(
        name="training",
        folder=folder,
        settings=results.plain(dataclasses.asdict(cell)),
        about=dataclasses.asdict(cell),
        network=recipes.network(recipe, cell, source.shape[0], source.classes),
        optimizer=recipes.optimizer(recipe, cell, cell.steps),
        batches=pipeline.training(source, cell.seed, *share, shuffle=order),
        tests=pipeline.testing(source, TESTED, process, processes),
        count=source.test_count,
        batch_size=cell.batch_size,
        total=cell.steps,
        seed=cell.seed,
        title=f"{cell.model}, ",
        bar=False,
    )


def load(name: str, data_dir: Path | None) -> ImageData | Splits:
    """A data set, of which any cell's source is made.

    Raises:
        idx.DataError: files are missing, altered, or cannot be downloaded.
    """
    if name == "digits" or name == "cifar10":
        return sources.load(name, data_dir)
    return photos.splits(data_dir)


def varied(data: ImageData | Splits, cell: Cell) -> Source:
    """The source with the cell's changes of colour, and held-out images if it has them.

    Raises:
        ValueError: images cannot be held out of a data set that is not in memory.
    """
    colours = recipes.colours(cell.recipe)
    if isinstance(data, Splits):
        if cell.held_out:
            raise ValueError(f"received {cell.data}: expected digits or cifar10")
        return Photos(data, colours=colours)
    data = data._replace(colours=colours)
    if not cell.held_out:
        return data
    images, labels = data.train
    cut = len(labels) - len(labels) // HELD_OUT
    rest, test = (
        Batch(images[part], labels[part]) for part in (slice(cut), slice(cut, None))
    )
    return data._replace(train=rest, test=test)
