"""Photographs to training examples: images per second and core, and what takes time.

    python -m experiments.bench.decode                       # a minute on two cores
    python -m experiments.bench.decode --data-dir IMAGENET   # of the images there
    python -m experiments.bench.decode --smoke               # a few small ones, seconds

Claim: decoding takes most of the time that an example needs, so that decoding a large
photograph at a half or a quarter of its size, where the crop allows, is what helps; and
threads suffice, since Pillow lets go of Python's lock: on all cores there are nearly as
many images per second and core as on one.

Control: the same crops of the same photographs, decoded at their full size. The calls
take turns; each reads the photographs from memory, by as many threads of grain as said.
Without --data-dir the photographs are synthetic: noise at all scales, 500 x 375 pixels,
of about the bytes that ImageNet's have (110 kB on average).

Measured: not yet.
"""

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
from experiments.common import decoding, distortions, photos, results, synthetic
from experiments.common.folders import Encoded

SIZE = 224
QUALITY = 96  # of synthetic photographs
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
    calls = {
        (stage, count): partial(consume, make, stored, count)
        for stage, make in STAGES.items()
        for count in threads
    }
    with results.Log(config.output) as log:
        size = sum(len(image.content) for image in stored) / len(stored)
        about = {"settings": asdict(config), "bytes": size, **results.stamp()}
        log.add("start", bench="decode", **about)
        for (stage, count), time in interleaved(calls, config.seconds).items():
            rate = len(stored) / time
            log.add("point", stage=stage, threads=count, rate=rate)
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


def consume(make: Make, stored: Sequence[Encoded], threads: int) -> None:
    """Makes something of each image."""

    def example(index: int, rng: np.random.Generator) -> int:
        make(stored[index].content, rng)
        return index

    examples = grain.MapDataset.range(len(stored)).seed(0).random_map(example)
    options = grain.ReadOptions(threads, prefetch_buffer_size=4 * threads)
    for _ in examples.to_iter_dataset(options):
        pass


def table(start: results.Record, records: list[results.Record]) -> Table:
    """A row for each stage: its time, how much of it is decoding, and the rates."""
    size = f"{start['bytes'] / 1000:.0f} kB"
    made = Table(title=f"Photographs of {size}, in memory, to {SIZE} x {SIZE}")
    rates = {(r["stage"], r["threads"]): r["rate"] for r in records}
    threads = sorted({count for _, count in rates})
    made.add_column("stage")
    for name in ("ms per image", "of it decoding", *(f"{n} threads" for n in threads)):
        made.add_column(name, justify="right")
    for stage in STAGES:
        rate = rates[stage, threads[0]] / threads[0]
        share = rate / (rates["decoded", threads[0]] / threads[0])
        known = stage in ("decoded", "cropped", "colours changed")
        numbers = [f"{1000 / rate:.2f}", f"{share:.0%}" if known else ""]
        for count in threads:
            each = rates[stage, count]
            numbers.append(f"{each:.0f}/s, {each / count:.0f} per core")
        made.add_row(stage, *numbers)
    return made


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
