"""Photographs that are none, in the layout of ImageNet and with its oddities.

    python -m experiments.common.data.synthetic FOLDER

They are to try programs with: noise at all scales, as photographs have it, in a colour
of their class. Some are grey, some CMYK (as Adobe writes it, and as nobody else does),
one is a PNG that is named .JPEG, and of one training image half is missing.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageChops

WNIDS = "n01440764", "n01443537", "n01484850", "n01491361", "n01494475"
ADOBE = b"\xff\xee\x00\x0eAdobe"  # the segment of 16 bytes that says so
Kind = Literal["rgb", "grey", "adobe cmyk", "plain cmyk", "png", "cut off"]
KINDS: dict[int, Kind] = {3: "grey", 7: "adobe cmyk", 13: "grey", 17: "plain cmyk"}
PNG, CUT_OFF = 12, 25  # the numbers of single training images


def make(
    folder: tyro.conf.Positional[Path],
    train: int = 160,
    val: int = 40,
    smallest: int = 80,
    largest: int = 600,
    seed: int = 0,
) -> None:
    """Writes train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

    Args:
        folder: where to; it is made.
        train: how many training images.
        val: how many validation images.
        smallest: pixels of a side, at least.
        largest: pixels of a side, at most.
        seed: of all that is random.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            width, height = rng.integers(smallest, largest + 1, 2).tolist()
            label = number % len(WNIDS)
            pixels = picture(width, height, label / len(WNIDS), rng)
            path = folder / split / WNIDS[label] / f"{split}_{number:08}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(pixels, kind(number, split)))


def kind(number: int, split: str) -> Kind:
    """What is odd about an image of a split."""
    if split == "train" and number in (PNG, CUT_OFF):
        return "png" if number == PNG else "cut off"
    return KINDS.get(number % 20, "rgb")


def picture(
    width: int, height: int, hue: float, rng: np.random.Generator
) -> Image.Image:
    """Noise around a colour; the finer, the weaker."""
    angle = 2 * np.pi * (hue + np.arange(3) / 3)
    pixels = np.zeros((height, width, 3)) + 128 + 40 * np.cos(angle)
    for octave in range(1, 8):
        cells = min(width, height) // 2**octave + 2, max(width, height) // 2**octave + 2
        noise = rng.normal(128, 5 * octave, (*cells, 3)).clip(0, 255).astype(np.uint8)
        fine = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(fine) - 128.0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: Kind, quality: int = 90) -> bytes:
    """An RGB image as the bytes of a file of some kind."""
    if kind == "grey":
        image = image.convert("L")
    if kind in ("adobe cmyk", "plain cmyk"):
        image = image.convert("CMYK")
    if kind == "plain cmyk":  # Pillow inverts all that it writes, as Adobe does
        image = ImageChops.invert(image)
    file = io.BytesIO()
    image.save(file, "PNG" if kind == "png" else "JPEG", quality=quality)
    content = file.getvalue()
    if kind == "plain cmyk":
        start = content.index(ADOBE)
        return content[:start] + content[start + 16 :]
    return content[: len(content) // 2] if kind == "cut off" else content


if __name__ == "__main__":
    tyro.cli(make, description=__doc__)
