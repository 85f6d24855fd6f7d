"""Random changes of training images that leave their labels true."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Strength = Literal["none", "weak", "strong"]
FACTORS = 0.5, 1.5  # of brightness, contrast and colour


def as_it_is(key: jax.Array, images: jax.Array) -> jax.Array:
    """No augmentation."""
    return images


def make_augment(strength: Strength, padding: int, flip: bool, white: float) -> Augment:
    """(key, images) -> images of the same shape, each changed by itself.

    Args:
        strength: "weak" moves and mirrors; "strong" distorts the light as well.
        padding: pixels that an image is moved by at most, each way.
        flip: whether half of the images are mirrored.
        white: the largest value of a pixel.
    """

    def weak(key: jax.Array, images: jax.Array) -> jax.Array:
        moves, mirrors = jax.random.split(key)
        moved = move(moves, images, padding)
        return mirror(mirrors, moved) if flip else moved

    def strong(key: jax.Array, images: jax.Array) -> jax.Array:
        places, lights = jax.random.split(key)
        return distort(lights, weak(places, images), white)

    return {"none": as_it_is, "weak": weak, "strong": strong}[strength]


def move(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Each image shifted by up to `padding` pixels; what comes into sight is black."""
    count, *shape = images.shape
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    return jax.vmap(crop)(padded, corners)


def mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images with left and right exchanged."""
    chosen = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def distort(key: jax.Array, images: jax.Array, white: float) -> jax.Array:
    """Brightness, contrast and colour multiplied by FACTORS; float32 in [0, white].

    Contrast is the distance from the image's mean, colour that from a pixel's.
    """
    factors = jax.random.uniform(key, (3, len(images), 1, 1, 1), jnp.float32, *FACTORS)
    bright = images.astype(jnp.float32) * factors[0]
    mean = bright.mean((1, 2, 3), keepdims=True)
    contrasted = mean + (bright - mean) * factors[1]
    grey = contrasted.mean(3, keepdims=True)  # of a grey image: itself
    return jnp.clip(grey + (contrasted - grey) * factors[2], 0, white)
