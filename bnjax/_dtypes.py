"""The dtypes of statistics and of results."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def promote(*values) -> jnp.dtype:
    """Returns the result dtype by JAX's standard promotion, whatever mode is set."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def statistics_dtype(*values) -> jnp.dtype:
    """Returns the dtype of statistics: at least float32; float64 and complex stay."""
    return promote(jnp.float32, *values)


def result(*values) -> jnp.dtype:
    """The dtype of a result of these values, without None; float32 for integers."""
    dtype = promote(*(value for value in values if value is not None))
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else statistics_dtype(dtype)


def real(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of |x|: variances and counts are real."""
    return jnp.finfo(dtype).dtype
