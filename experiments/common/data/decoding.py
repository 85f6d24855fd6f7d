"""A photograph's bytes to the pixels that a network is given.

Whatever the file is, the result is RGB: grey images, CMYK with values inverted as Adobe
writes them or not, palettes, transparency, and formats other than the name says.
"""

import io
import math

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from experiments.common.data import distortions
from experiments.common.data.distortions import Box, Strength

MARGIN = 256 / 224  # of the shorter side, over the crop for validation
FAILURES = OSError, SyntaxError, ValueError, Image.DecompressionBombError


class Undecodable(Exception):
    """These bytes are no image, or not all of one."""


def training(
    content: bytes, rng: np.random.Generator, size: int, colours: Strength
) -> np.ndarray:
    """A random crop, resized to (size, size, 3), mirrored or not, its colours changed.

    Raises:
        Undecodable: it is no image, or not all of one.
    """
    image = opened(content)
    box = distortions.crop(*image.size, rng)
    image = distortions.mirror(part(image, box, size, size), rng)
    return np.asarray(distortions.photometric(image, rng, colours))


def validation(content: bytes, size: int) -> np.ndarray:
    """The middle (size, size, 3), after the shorter side was resized to 8/7 of that.

    Raises:
        Undecodable: it is no image, or not all of one.
    """
    image = opened(content)
    scale = round(size * MARGIN) / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = part(image, (0, 0, *image.size), width, height)
    return np.asarray(image.crop(distortions.middle(width, height, size, size)))


def opened(content: bytes) -> Image.Image:
    """An image of which only the header was read."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # whose text names an object in memory
        raise Undecodable(f"{len(content)} bytes of no known format") from error
    except FAILURES as error:
        raise Undecodable(str(error)) from error


def part(image: Image.Image, box: Box, width: int, height: int) -> Image.Image:
    """A part of an image that was just opened, resized by linear interpolation, RGB."""
    scale = shrink(image, box, width, height)
    left, top, right, bottom = (edge * scale for edge in box)
    return rgb(image).resize(
        (width, height), Image.Resampling.BILINEAR, (left, top, right, bottom)
    )


def shrink(image: Image.Image, box: Box, width: int, height: int) -> float:
    """Has a JPEG decoded at 1/2, 1/4 or 1/8 of its size, if that is enough.

    It is if each pixel of the result is still made of one or more.

    Returns:
        The factor; 1 for other images.
    """
    left, top, right, bottom = box
    whole = image.size
    enough = (
        math.ceil(whole[0] * width / (right - left)),
        math.ceil(whole[1] * height / (bottom - top)),
    )
    drafted = image.draft(image.mode, enough)
    return drafted[1][2] / whole[0] if drafted else 1.0


def rgb(image: Image.Image) -> Image.Image:
    """The pixels in RGB.

    Raises:
        Undecodable: the file is cut off or damaged.
    """
    try:
        image.load()
    except FAILURES as error:
        raise Undecodable(str(error)) from error
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all of them for Adobe's
    return image if image.mode == "RGB" else image.convert("RGB")
