"""How a photograph is varied in training: cropped, mirrored, and its colours changed.

References: Szegedy et al. 2015 (Going deeper with convolutions), section 6, the crop;
Howard 2013 (Some improvements on deep convolutional neural network based image
classification), section 2, the colours.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

Strength = Literal["none", "weak", "strong"]
"""Of the changes of colour: none, by up to a fifth, by up to a half as in Howard 2013.

Ioffe & Szegedy 2015, section 4.2.1, reduce them for networks with batch normalization:
those see each image fewer times, and should see more of real ones.
"""
AMOUNT = {"none": 0.0, "weak": 0.2, "strong": 0.5}
CHANGES = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
AREA = 0.08, 1.0  # of a crop, over the image's
ASPECT = 3 / 4, 4 / 3  # of a crop, width over height
ATTEMPTS = 10  # at a crop that fits into the image

Box = tuple[int, int, int, int]  # left, top, right, bottom


def crop(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random part of an image: any share of its area from 8 % on, of similar sides.

    If none fits, as in a panorama, it is the largest one in the middle.
    """
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers((width - w + 1, height - h + 1)).tolist()
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ASPECT[1])))
    h = max(1, min(height, round(width / ASPECT[0])))
    return middle(width, height, w, h)


def middle(width: int, height: int, w: int, h: int) -> Box:
    """The part of w x h in the middle."""
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def mirror(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image, or as often as not its mirror image."""
    if rng.integers(2):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def photometric(
    image: Image.Image, rng: np.random.Generator, strength: Strength
) -> Image.Image:
    """Brightness, contrast and saturation times 1 + U(-a, a) each, in random order.

    Args:
        image: RGB, or grey ("L"), which has no saturation.
        rng: is not asked for "none".
        strength: "weak" is a = 0.2, "strong" is a = 0.5.
    """
    if strength == "none":
        return image
    for index in rng.permutation(len(CHANGES)):
        factor = 1 + rng.uniform(-AMOUNT[strength], AMOUNT[strength])
        image = CHANGES[index](image).enhance(factor)
    return image
