"""What training transforms are made of: batch_norm, and the variants in their rooms.

A transform is a pure function of the checked arrays,

    (Inputs, Plan, *extra) -> (normalized x, Moments)

that takes its statistics from `moments.statistics` and its output from `by_given`.
Their derivatives compose, so it needs none of its own. `train` does all that is around
it: the checks, what is stored for the backward pass, the residual, the activation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _backend, _checks, _dtypes, _replicas
from bnjax.moments import (
    Moments,
    Reduction,
    harmless,
    joined,
    reduction,
    statistics,
    valid,
)
from bnjax.normalize._affine import Affine, affine, describe, per_feature
from bnjax.normalize._remat import keep_moments

Activation = Callable[[jax.Array], jax.Array]


class Options(TypedDict, total=False):
    """The options of `batch_norm`, which the variants share."""

    axis: int | Sequence[int]
    epsilon: float
    mask: ArrayLike | None
    weights: ArrayLike | None
    axis_name: str | Sequence[str] | None
    axis_index_groups: Sequence[Sequence[int]] | None
    residual: ArrayLike | None
    activation: Activation | None
    dtype: DTypeLike | None
    implementation: str | None
    shift: ArrayLike | None
    fallback: tuple[ArrayLike, ArrayLike] | None


class Inputs(NamedTuple):
    """The arrays; `mean` and `var` are those of features without a valid value.

    The mask is boolean, or holds weights, as `moments.joined` makes it.
    """

    x: jax.Array
    mean: jax.Array
    var: jax.Array
    scale: jax.Array
    bias: jax.Array
    shift: jax.Array
    epsilon: ArrayLike
    mask: jax.Array | None

    def finite_x(self) -> jax.Array:
        """`x`, with 0 for garbage that does not count."""
        return without_garbage(self.x, self.mask)


class Plan(NamedTuple):
    """What is done to them; static."""

    over: Reduction
    affine: Affine


Transform = Callable[..., tuple[jax.Array, Any]]


def without_garbage(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x`, with 0 for NaN, infinity and huge padding that do not count."""
    return x if mask is None else valid(x, harmless(x, mask))


def without_overflow(y: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`y`, with 0 where what does not count overflows, once normalized.

    It may in float16 alone, of the values that `without_garbage` leaves.
    """
    if mask is None or y.dtype != jnp.float16:
        return y
    return valid(y, mask.astype(bool) | jnp.isfinite(y))


def train(
    transform: Transform,
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    options: Options,
    *extra: Any,
    leading: tuple[int, ...] = (),
    warns: bool = True,
) -> tuple[jax.Array, Any]:
    """activation(transform(x) + residual), and the Moments; all arguments checked.

    Args:
        transform: see the module; the same function at each call, for it is static.
        x: (batch, *spatial, feature).
        scale: (*leading, feature), or None.
        bias: (*leading, feature), or None.
        options: of `batch_norm`.
        *extra: arrays that `transform` needs beside the Inputs.
        leading: the axes of the per-feature values before those of the features.
        warns: whether one value per feature is warned of here.
    """
    axis, activation = options.get("axis", -1), options.get("activation")
    x = _checks.inexact("x", x)
    arrays = x, scale, bias, options.get("residual")
    implementation = _backend.chosen(options.get("implementation"), *arrays)
    how = describe(
        x,
        (scale, bias),
        axis=axis,
        dtype=options.get("dtype"),
        activation=activation,
        implementation=implementation,
    )
    over = reduction(
        x,
        axis,
        options.get("axis_name"),
        options.get("axis_index_groups"),
        implementation,
    )
    mean, var = options.get("fallback") or (None, None)
    shift = mean if options.get("shift") is None else options.get("shift")
    given = {"mean": mean, "var": var, "scale": scale, "bias": bias, "shift": shift}
    vectors = per_feature(x, axis, how, leading, **given)
    epsilon = options.get("epsilon", 1e-5)
    _checks.epsilon(epsilon, vectors[0].shape)
    mask = _checks.mask(options.get("mask"), x.shape)
    weights = _checks.weights(options.get("weights"), x.shape)
    residual = _checks.residual(options.get("residual"), x.shape, how.compute)
    if mask is None and warns:
        _checks.warn_single_value(_smallest_count(x.shape, over), x.shape, axis)

    def run(inputs, residual, *extra):
        y, batch = _compiled(transform, inputs, Plan(over, how), *extra)
        y = finish(y, residual, activation, how)
        return without_overflow(y, inputs.mask), batch

    mean, var, scale, bias, shift = vectors
    mask = joined(x, mask, weights)
    inputs = Inputs(x, mean, var, scale, bias, shift, epsilon, mask)
    run = run if implementation == _backend.PLAIN else keep_moments(run)
    y, batch = run(inputs, residual, *extra)
    return y, jax.tree.map(jnp.asarray, batch)  # a constant count is no array yet


def usable(batch: Moments, given: Inputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The mean and variance to normalize by; those given where there is no value."""
    mean, var = batch.mean.astype(plan.affine.compute), batch.variance()
    if given.mask is not None or 0 in (given.x.shape[a] for a in plan.over.axes):
        mean = _axes.where(batch.count > 0, mean, given.mean)
        var = _axes.where(batch.count > 0, var, given.var)
    return mean, var


# Compiled apart from the activation, which may close over anything: layers of one shape
# are traced once, and a call outside of jit runs one program.


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled(transform: Transform, given: Inputs, plan: Plan, *extra):
    x = given.x.astype(_dtypes.statistics(given.x.dtype))
    x = _backend.round_cotangent(x, given.x.dtype, plan.affine.implementation)
    return transform(given._replace(x=x), plan, *extra)


def by_batch(given: Inputs, plan: Plan) -> tuple[jax.Array, Moments]:
    """Batch normalization itself: Algorithm 1."""
    batch = statistics(given.x, given.mask, given.shift, plan.over)
    vectors = *usable(batch, given, plan), given.scale, given.bias
    return by_given(given.finite_x(), vectors, given.epsilon, plan.affine), batch


@functools.partial(jax.jit, static_argnums=3)
def by_given(x, vectors, epsilon, how: Affine):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, by (mean, var, scale, bias)."""
    mean, var, scale, bias = vectors
    var = var + jnp.asarray(epsilon, var.dtype)
    return affine(x.astype(how.compute), mean, var, scale, bias, how)


def finish(y, residual, activation: Activation | None, how: Affine):
    """activation(y + residual), in the dtype of the output."""
    shape = y.shape
    if residual is not None:
        y = y + residual.astype(y.dtype)
        y = _backend.round_cotangent(y, residual.dtype, how.implementation)
    if activation is not None:
        y = activation(y)
        _checks.elementwise(activation, shape, y, how.output)
    return _backend.rounded(y.astype(how.output), how.implementation)


def _smallest_count(shape: Sequence[int], over: Reduction):
    """The number of values per feature in the smallest group of replicas."""
    values = math.prod(shape[a] for a in over.axes)
    if over.axis_name is None:
        return values
    if over.groups is not None:
        return values * min(map(len, over.groups))
    return values * _replicas.axis_size(over.axis_name)
