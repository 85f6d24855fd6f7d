"""Local response normalization: each value is divided by what surrounds its channel."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def local_response_norm(
    x: ArrayLike,
    *,
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> jax.Array:
    """Divides by the strength of the adjacent channels at the same position.

        y_i = x_i / (k + alpha sum_j x_j^2)^beta,    |j - i| <= (size - 1)/2

    The sum ends at the first and the last channel. As in the paper, alpha is not
    divided by the size, as it is in Caffe and PyTorch. Nothing is learned here.

    Args:
        x: (..., channel), floating.
        size: how many channels are summed over; odd.
        k: what is divided by, to the power of beta, where all is 0.
        alpha: the weight of the sum.
        beta: the power; 0 for `x` itself.

    Returns:
        An array of the shape and dtype of `x`; the arithmetic is in at least float32.

    Raises:
        ValueError: `size` is even, or less than 1.

    >>> print(local_response_norm(jnp.array([3.0, 4.0]), k=0.0, alpha=1.0, beta=0.5))
    [0.6 0.8]

    References: Krizhevsky et al. 2012, section 3.3, where the defaults are from.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"size is {size}: expected an odd number, as many channels before each one "
            f"as after it, and the one itself."
        )
    x = jnp.asarray(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    window, strides = (1,) * (x.ndim - 1) + (size,), (1,) * x.ndim
    zero = np.zeros((), wide.dtype)
    sums = lax.reduce_window(wide**2, zero, lax.add, window, strides, "SAME")
    return (wide / (k + alpha * sums) ** beta).astype(x.dtype)
