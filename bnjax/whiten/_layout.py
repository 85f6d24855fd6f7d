"""Groups of adjacent features, the products within them, and their checks."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _checks

HIGHEST = lax.Precision.HIGHEST


class Layout(NamedTuple):
    """Where the features are, and how many groups of which size; static."""

    axis: int
    groups: int
    size: int


def layout(x: jax.Array, axis: int, group_size: int | None) -> Layout:
    """The checked layout of `x`; one group of all features where the size is None."""
    axes = _axes.canonical(axis, x.ndim)
    if len(axes) != 1:
        raise ValueError(
            f"axis={axis!r} names {len(axes)} axes: expected one feature axis, whose "
            "features are whitened together. Reshape those axes to one first."
        )
    features = x.shape[axes[0]]
    if features == 0:
        raise ValueError(
            f"the input has shape {tuple(x.shape)}, with 0 features (axis={axis!r}): "
            "expected at least one to whiten. Leave the layer out where there are none."
        )
    size = features if group_size is None else operator.index(group_size)
    if size < 1 or features % size:
        raise ValueError(
            f"group_size={group_size!r} does not divide the {features} features of "
            f"the input's shape {tuple(x.shape)} (axis={axis!r}): expected groups of "
            "equal size. Write group_size=None for one group of all features, or a "
            "divisor of their number."
        )
    return Layout(axes[0], features // size, size)


def real(name: str, x: ArrayLike) -> jax.Array:
    """`x` as a JAX array of a real floating dtype."""
    x = _checks.require_inexact(name, x)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{name} has dtype {x.dtype}: expected a real floating dtype, for complex "
            "values are not whitened here. Write "
            f"{name}.real, or stack {name}.real and {name}.imag as two features."
        )
    return x


def real_result(dtype: DTypeLike | None, **parameters: ArrayLike | None) -> None:
    """Raises where the output would be complex."""
    for name, value in parameters.items():
        if jnp.iscomplexobj(value):
            real(name, jnp.asarray(value))
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"dtype={jnp.dtype(dtype).name} is the dtype of the output: expected a "
            "real one. Write dtype=None to infer it from the input."
        )


def positions(
    mask: ArrayLike | None, weights: ArrayLike | None, x: jax.Array, axis: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Both in the rank of `x`; they say how positions count, for all features."""
    flags, numbers = _checks.mask(mask, x.shape), _checks.weights(weights, x.shape)
    for name, given, value, cure in (
        ("mask", mask, flags, "all"),
        ("weights", weights, numbers, "min"),
    ):
        if given is not None and value is not None and value.shape[axis] != 1:
            raise ValueError(
                f"{name} has shape {jnp.shape(given)}, which varies along the feature "
                f"axis {axis} of the input's shape {tuple(x.shape)}: expected size 1 "
                "there, for a covariance needs both of its features. Write "
                f"{name}.{cure}(axis={axis}, keepdims=True)."
            )
    return flags, numbers


def covariances(value: ArrayLike | None, spec: Layout) -> jax.Array:
    """A real (size, size) matrix for each group; the identity where `value` is None."""
    shape = (spec.groups, spec.size, spec.size)
    if value is None:
        return jnp.broadcast_to(jnp.eye(spec.size), shape)
    value = real("covariance", value)
    if value.shape != shape:
        raise ValueError(
            f"covariance has shape {value.shape}: expected {shape}, a matrix for each "
            f"group of {spec.size} features. Write group_size=... as in the "
            "statistics, or covariance[None] for a single group."
        )
    return value


def size_of(covariance: jax.Array) -> int:
    """The group size that a covariance tells."""
    if covariance.ndim != 3 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(
            f"covariance has shape {covariance.shape}: expected (groups, size, size), "
            "a matrix for each group. Write covariance[None] for a single group."
        )
    return covariance.shape[-1]


def split(x: jax.Array, spec: Layout) -> jax.Array:
    """`x` as (..., groups, size): the features last, and in their groups."""
    x = jnp.moveaxis(x, spec.axis, -1)
    return x.reshape(*x.shape[:-1], spec.groups, spec.size)


def _join(x: jax.Array, spec: Layout) -> jax.Array:
    """The inverse of `split`."""
    x = x.reshape(*x.shape[:-2], spec.groups * spec.size)
    return jnp.moveaxis(x, -1, spec.axis)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum a b^T over all positions: (groups, size, size), for a and b as of `split`."""
    positions = tuple(range(a.ndim - 2))
    group = (a.ndim - 2,)
    sharding = jax.typeof(a).sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return lax.dot_general(
        a,
        b,
        ((positions, positions), (group, group)),
        precision=HIGHEST,
        out_sharding=replicated if any(sharding.spec) else None,  # Explicit axes
    )


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T of two vectors for each group."""
    return a[..., :, None] * b[..., None, :]


def whitened(matrices: jax.Array, x: jax.Array, spec: Layout) -> jax.Array:
    """Multiplies the features of each group by its matrix; subtracts no mean."""
    y = jnp.einsum("gij,...gj->...gi", matrices, split(x, spec), precision=HIGHEST)
    return _join(y, spec)
