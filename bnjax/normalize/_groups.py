"""Groups of examples, each normalized by its own statistics."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _axes, _backend, _checks, _replicas
from bnjax.moments import Moments, compute_moments, is_weighted
from bnjax.normalize._transform import (
    Inputs,
    Options,
    TransformSpec,
    apply_training_transform,
    normalize_with_stats,
    stats_or_fallback,
)

_NO_BATCH = (
    "axis={axis!r} names every axis of the input of shape {shape} as a feature axis: "
    "expected a batch axis to split into groups. Name only the features: axis=-1."
)

_ASTRAY = (
    "{groups} group(s) of the batch axis (axis {axis} of {shape}), which is split over "
    "{devices} devices: expected equal groups whose number the devices divide, so that "
    "no group lies on several. Change the size of the groups, or replicate the batch "
    "axis first (jax.reshard)."
)


class GroupMoments(NamedTuple):
    """The Moments of each group.

    Attributes:
        moments: (group, *feature).
        mean_errors: (group, *feature), the exact minus the rounded means.
    """

    moments: Moments
    mean_errors: jax.Array


def normalize_groups(
    x: jax.Array,
    options: Options,
    vectors: Mapping[str, ArrayLike | None],
    num_groups: int,
) -> tuple[jax.Array, GroupMoments]:
    """Normalizes each contiguous block of the batch by its own statistics.

        (batch, *spatial, feature) = (groups x size, *spatial, feature)

    The batch axis becomes (groups, size), and (group, feature) are the feature axes:
    `x` is read once, the gradient is that of `batch_norm`, and no collective is needed
    if each group lies on one device.

    Args:
        x: (batch, *spatial, feature).
        options: those of `batch_norm`, except `axis_name` and `fallback`.
        vectors: by name, mean, var, scale, bias and shift; mean and var replace the
            statistics of groups without a valid value. Each is None, (feature,) or
            (groups, feature).
        num_groups: it must divide the batch size.

    Returns:
        y, of the shape of `x`, and the GroupMoments.
    """
    axes = _axes.canonical(options.get("axis", -1), x.ndim)
    batch_dim = batch_axis(x, options)
    before = sum(a < batch_dim for a in axes)  # feature axes before the group axis

    def cut(value: jax.Array) -> jax.Array:
        sizes = (1, 1) if value.shape[batch_dim] == 1 else (num_groups, -1)
        if 0 in value.shape:  # reshape cannot infer a size
            sizes = (num_groups, value.shape[batch_dim] // max(num_groups, 1))
        return value.reshape(
            *value.shape[:batch_dim], *sizes, *value.shape[batch_dim + 1 :]
        )

    def repeated(value: ArrayLike | None) -> jax.Array | None:
        if value is None:
            return None
        value = jnp.asarray(value)
        if value.ndim == len(axes):
            value = jnp.broadcast_to(value, (num_groups, *value.shape))
            value = _backend.fence_cotangent(value)
        return jnp.moveaxis(value, 0, before)

    mask = _checks.mask(options.get("mask"), x.shape)
    weights = _checks.weights(options.get("weights"), x.shape)
    # complex64: only the shape; `apply_training_transform` checks the dtype.
    residual = _checks.residual(options.get("residual"), x.shape, jnp.complex64)
    mean, var, scale, bias, shift = (
        repeated(vectors[name]) for name in ("mean", "var", "scale", "bias", "shift")
    )
    inner: Options = {
        **options,
        "axis": _feature_and_group_axes(axes, batch_dim),
        "shift": shift,
    }
    inner["mask"] = None if mask is None else cut(mask)
    inner["weights"] = None if weights is None else cut(weights)
    inner["residual"] = None if residual is None else cut(residual)
    if mean is not None and var is not None:
        inner["fallback"] = mean, var
    if mask is None and num_groups:
        reduced = [x.shape[a] for a in _axes.complement(axes, x.ndim)]
        count = math.prod(reduced) // num_groups
        _checks.warn_single_value(count, x.shape, options.get("axis", -1), num_groups)
    y, rows = apply_training_transform(
        _normalize_each_group, cut(x), scale, bias, inner, warns=False
    )

    def leading(value: jax.Array) -> jax.Array:
        return value if value.ndim == 0 else jnp.moveaxis(value, before, 0)

    rows = jax.tree.map(leading, rows)
    count = rows.moments.count
    masks = [value for value in (mask, weights) if value is not None]
    if count.ndim == 0:
        count = jnp.broadcast_to(count, (num_groups,))
    elif masks and all(value.shape[a] == 1 for value in masks for a in axes):
        # The same for all features; a maximum, because there may be no feature.
        count = count.max(tuple(range(1, count.ndim)), initial=0)
    return y.reshape(x.shape), rows._replace(moments=rows.moments._replace(count=count))


def batch_axis(x: jax.Array, options: Options) -> int:
    """Returns the first axis that is not a feature axis."""
    axis = options.get("axis", -1)
    reduced = _axes.complement(_axes.canonical(axis, x.ndim), x.ndim)
    if not reduced:
        raise ValueError(_NO_BATCH.format(axis=axis, shape=x.shape))
    return reduced[0]


def _normalize_each_group(
    inputs: Inputs, spec: TransformSpec
) -> tuple[jax.Array, GroupMoments]:
    reduction = spec.reduction._replace(local=True)
    batch, mean_errors = compute_moments(inputs.x, inputs.mask, inputs.shift, reduction)
    # Without weights the count is a constant. With a symbolic zero for its tangent the
    # rule of the merge skips it.
    if not is_weighted(inputs.mask):
        batch = batch._replace(count=lax.stop_gradient(batch.count))
    vectors = *stats_or_fallback(batch, inputs, spec), inputs.scale, inputs.bias
    y = normalize_with_stats(inputs.bounded_x(), vectors, inputs.epsilon, spec.affine)
    return y, GroupMoments(batch, mean_errors)


def _feature_and_group_axes(axes: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Returns the feature axes and the group axis, after the batch axis became two."""
    return (*(a + (a > batch) for a in axes), batch)


def check_devices(x: jax.Array, batch: int, groups: int, *, equal: bool = True) -> None:
    """Raises where Explicit mesh axes tell that a group lies on several devices."""
    devices = _replicas.num_shards(x, batch)
    if devices > 1 and (groups % devices or not equal):
        raise ValueError(
            _ASTRAY.format(groups=groups, axis=batch, shape=x.shape, devices=devices)
        )
