"""Photographs to training examples: images per second and core, and what takes time.

    python -m experiments.bench.decode                       # a minute on two cores
    python -m experiments.bench.decode --data-dir IMAGENET   # of the images there
    python -m experiments.bench.decode --smoke               # a few small ones, seconds

Claim: decoding takes more than half of the time that a cropped example needs; and
threads suffice, since Pillow lets go of Python's lock: on all cores there are nearly as
many images per second and core as on one.

Control: the same crops of the same photographs, decoded at their full size; a JPEG is
otherwise decoded at a half, a quarter or an eighth of it where the crop is large
enough. The calls take turns; each reads the photographs from memory, by as many threads
of grain as said. What an image costs is the time that cores spend on it, all threads
together, which other programs on the machine hardly change; the rates by the clock are
those of a machine that does nothing else. Without --data-dir the photographs are
synthetic: noise at all scales, 500 x 375 pixels, of about the bytes that ImageNet's
have (110 kB on average).

Measured (two cores of an AMD EPYC, Pillow 13.0, synthetic photographs of 94 kB): an
image costs 1.9 ms of a core, or 2.4 ms with its colours changed, that is 540 and 420
images per second and core; decoding is 61 and 47 % of that. At the full size it costs
the same: of 500 x 375 pixels, a crop is seldom twice as large as what it is resized to.
For validation it costs 2.4 ms. By the clock two threads give 1.7 times the images of
one, 1.5 times with colours.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import grain
import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.bench import charts
from experiments.bench.timing import interleaved
from experiments.common import results
from experiments.common.data import decoding, distortions, photos, synthetic
from experiments.common.data.folders import Encoded

SIZE = 224
QUALITY = 97  # of synthetic photographs
Make = Callable[[bytes, np.random.Generator], object]


@dataclass(frozen=True)
class Config:
    """What is measured."""

    data_dir: Path | None = None
    """A folder in the layout of ImageNet, or with its record files."""
    images: int = 128
    """How many of them, evenly spaced."""
    threads: tuple[int, ...] = ()
    """Of grain: 1, and as many as there are cores."""
    seconds: float = 60.0
    """For all together."""
    output: Path = Path("experiments/results/bench_decode.jsonl")
    """Appended to."""
    smoke: bool = False
    """A few small photographs, briefly."""


def decode(content: bytes, rng: np.random.Generator) -> None:
    """Decodes what the crop of an example is made of."""
    image = decoding.opened(content)
    decoding.shrink(image, distortions.crop(*image.size, rng), SIZE, SIZE)
    decoding.rgb(image)


def full_size(content: bytes, rng: np.random.Generator) -> np.ndarray:
    """An example as `decoding.training` makes it, but decoded at the full size."""
    image = decoding.opened(content)
    box = distortions.crop(*image.size, rng)
    part = decoding.rgb(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
    return np.asarray(distortions.mirror(part, rng))


STAGES: dict[str, Make] = {
    "decoded": decode,
    "cropped": partial(decoding.training, size=SIZE, colours="none"),
    "colours changed": partial(decoding.training, size=SIZE, colours="strong"),
    "cropped, from full size": full_size,
    "validation": lambda content, _: decoding.validation(content, SIZE),
}


def main(config: Config) -> None:
    """Measures, records and prints the table."""
    if config.smoke:
        config = replace(config, images=4, seconds=0)
    threads = config.threads or tuple(sorted({1, results.cores()}))
    stored = load(config)
    spent: dict[tuple[str, int], list[float]] = {
        (stage, count): [] for stage in STAGES for count in threads
    }
    calls = {
        (stage, count): partial(consume, STAGES[stage], stored, count, times)
        for (stage, count), times in spent.items()
    }
    with results.Log(config.output) as log:
        size = statistics.mean(len(image.content) for image in stored)
        about = {"settings": asdict(config), "bytes": size, **results.stamp()}
        log.add("start", bench="decode", **about)
        for (stage, count), seconds in interleaved(calls, config.seconds).items():
            core = statistics.median(spent[stage, count]) / len(stored)
            numbers = {"core_seconds": core, "rate": len(stored) / seconds}
            log.add("point", stage=stage, threads=count, **numbers)
    start, *records = charts.last_run(config.output)
    Console(width=100).print(table(start, records))


def load(config: Config) -> list[Encoded]:
    """Photographs in memory; of those of a folder, only whole ones."""
    if config.data_dir is not None:
        train = photos.splits(config.data_dir).train
        numbers = range(0, len(train), max(1, len(train) // config.images))
        return [image for number in numbers if whole(image := train[number])]
    rng = np.random.default_rng(0)
    size = (50, 40) if config.smoke else (500, 375)
    pictures = (synthetic.picture(*size, 0.2 * i, rng) for i in range(config.images))
    return [
        Encoded(synthetic.encoded(picture, "rgb", QUALITY), 0, f"picture {number}")
        for number, picture in enumerate(pictures)
    ]


def whole(image: Encoded) -> bool:
    """Whether it can be decoded."""
    try:
        decoding.rgb(decoding.opened(image.content))
    except decoding.Undecodable:
        return False
    return True


def consume(
    make: Make, stored: Sequence[Encoded], threads: int, spent: list[float]
) -> None:
    """Makes something of each image, and adds the seconds that all cores spent."""

    def example(index: int, rng: np.random.Generator) -> int:
        make(stored[index].content, rng)
        return index

    start = time.process_time()
    examples = grain.MapDataset.range(len(stored)).seed(0).random_map(example)
    options = grain.ReadOptions(threads, prefetch_buffer_size=4 * threads)
    for _ in examples.to_iter_dataset(options):
        pass
    spent.append(time.process_time() - start)


def table(start: results.Record, records: list[results.Record]) -> Table:
    """A row for each stage: what it costs, how much of that is decoding, the rates."""
    size = f"{start['bytes'] / 1000:.0f} kB"
    made = Table(title=f"Photographs of {size}, in memory, to {SIZE} x {SIZE}")
    found = {(r["stage"], r["threads"]): r for r in records}
    threads = sorted({count for _, count in found})
    made.add_column("stage")
    clock = (f"by the clock,\n{count} threads" for count in threads)
    for name in ("ms of a core", "of it\ndecoding", "images/s\nper core", *clock):
        made.add_column(name, justify="right")
    decoding_alone = found["decoded", threads[0]]["core_seconds"]
    for stage in STAGES:
        cost = found[stage, threads[0]]["core_seconds"]
        known = stage in ("decoded", "cropped", "colours changed")
        share = f"{decoding_alone / cost:.0%}" if known else ""
        rates = (found[stage, count]["rate"] for count in threads)
        numbers = f"{1000 * cost:.2f}", share, f"{1 / cost:.0f}"
        made.add_row(stage, *numbers, *(f"{rate:.0f}/s" for rate in rates))
    return made


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
