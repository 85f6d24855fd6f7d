"""Ghost batch normalization: small batches inside a large one.

    mean_g = sum_{i in g} x_i / m,   var_g = sum_{i in g} |x_i - mean_g|^2 / m
    y_i = (x_i - mean_g) / sqrt(var_g + epsilon) * scale + bias,     i in group g

The batch is cut into groups of `virtual_batch_size` examples, each normalized by its
own statistics. Its gradients are those of gradient accumulation over the groups, and of
replicas that do not share statistics. This keeps the accuracy of small batches where
the batch is large.

Two deviations from the paper. The running statistics are those of the whole batch (the
groups' Moments, merged). They include the variance between the means of the groups,
which the paper leaves out: it averages over the groups in turn. And one step updates
them once, not once per group.

References: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", section 4.
"""

from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _replicas
from bnjax._bound import bind
from bnjax.moments import (
    Moments,
    ReductionSpec,
    merge_rows_with_rule,
    moments_of_group_and_pool,
    reduction_spec,
)
from bnjax.normalize import (
    GroupMoments,
    Inputs,
    Options,
    TransformSpec,
    apply_training_transform,
    batch_axis,
    check_devices,
    normalize_groups,
    normalize_with_stats,
    stats_or_fallback,
)

__all__ = ["ghost_batch_norm"]

Remainder = Literal["error", "smaller"]

_SIZE = (
    "virtual_batch_size={size!r}: expected a positive integer, the number of examples "
    "that are normalized together. Write virtual_batch_size=32."
)

_REMAINDER = (
    "a batch of {batch} (axis {axis} of {shape}) is not divisible by "
    "virtual_batch_size={size}: expected a multiple. Choose one that divides it, drop "
    "the last examples, or write remainder='smaller' for a last group of {rest}."
)

_REPLICAS = (
    "virtual_batch_size={size} is more than a replica has, a batch of {batch} (axis "
    "{axis} of {shape}), and the replicas of axis_name={axis_name!r}, {replicas} that "
    "pool their statistics, do not fall into groups of that size: expected a multiple "
    "of {batch} that divides {total}, or a divisor of {batch}. Choose one; or have "
    "groups of any replicas by BatchNorm(axis_name={axis_name!r}, "
    "axis_index_groups=[[0, 1], ...]), and bnjax.training.merge_batch_stats for one "
    "set of running statistics from theirs."
)

_POLICY = (
    "remainder={remainder!r} is unknown: expected 'error', or 'smaller' for a smaller "
    "last group. Write remainder='error'."
)


def ghost_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    virtual_batch_size: int,
    remainder: Remainder = "error",
    **options: Unpack[Options],
) -> tuple[jax.Array, Moments]:
    """Normalizes each group of `virtual_batch_size` examples by its own statistics.

        y_i = (x_i - mean_g) / sqrt(var_g + epsilon) * scale + bias,   i in group g

    By a reshape, in one pass over all groups. Under jit, where a group lies on one
    device the normalization needs no collective, and the returned Moments one. Explicit
    mesh axes on which a group would lie on several devices are an error; Auto ones
    cannot be seen, and the statistics of such groups are communicated.

    Args:
        x: (batch, *spatial, feature).
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        virtual_batch_size: how many examples are normalized together; the batch axis is
            the first that is no feature axis.
        remainder: what to do with a batch that is not divisible: "error", or "smaller"
            for a smaller last group.
        **options: those of `batch_norm`. Over `axis_name` the returned Moments are
            merged. A group lies within a replica if it is not larger than the replica's
            batch. A larger one is made of adjacent replicas (a size of 32 with 16
            examples per replica: of two) and takes one collective. Where replicas
            cannot be grouped so, remainder="smaller" makes each replica one group.
            `fallback` normalizes groups without a valid value.

    Returns:
        y, of the shape of `x`, and the Moments of the whole batch.

    Raises:
        ValueError: a batch that is not divisible, a `virtual_batch_size` below 1, or
            one that replicas do not fill, and whatever `batch_norm` raises.

    Warns:
        BatchNormWarning: at trace time, for one value per feature and group.

    >>> x = jnp.array([[1.0], [3.0], [5.0], [9.0]])
    >>> y, moments = ghost_batch_norm(x, virtual_batch_size=2, epsilon=0.0)
    >>> print(y.ravel(), moments.variance())
    [-1.  1. -1.  1.] [8.75]

    References: Hoffer, Hubara & Soudry 2017, section 4, Algorithm 1.
    """
    x = _checks.require_inexact("x", x)
    reduction = reduction_spec(
        x,
        options.get("axis", -1),
        options.get("axis_name"),
        options.get("axis_index_groups"),
    )
    batch = batch_axis(x, options)
    _check_policy(virtual_batch_size, remainder)
    together = _together(x.shape, batch, virtual_batch_size, remainder, reduction)
    if together is not None:
        options["axis_index_groups"] = together
        transform = bind(_normalize_over_replicas, outer_groups=reduction.groups)
        return apply_training_transform(transform, x, scale, bias, options)
    runs = _runs(x.shape, batch, virtual_batch_size, remainder)
    options = {**options, "axis_name": None, "axis_index_groups": None}
    mean, var = options.pop("fallback", None) or (None, None)
    shift = options.pop("shift", None)
    shift = mean if shift is None else shift
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias, "shift": shift}
    _check_vectors(x, options.get("axis", -1), vectors)
    number = sum(groups for _, _, groups in runs)
    check_devices(x, batch, number, equal=len(runs) == 1)
    pieces = [
        normalize_groups(*_run(x, options, batch, start, stop), vectors, groups)
        for start, stop, groups in runs
    ]
    y, rows = pieces[0] if len(pieces) == 1 else _joined(pieces, batch)
    shift = None if shift is None else jnp.asarray(shift)
    return y, merge_rows_with_rule(*rows, shift, reduction.axis_name, reduction.groups)


def _check_vectors(x: jax.Array, axis, vectors: dict[str, ArrayLike | None]) -> None:
    """Raises on a vector that does not fit, before the groups make another of it."""
    features = _axes.sizes(x.shape, _axes.canonical(axis, x.ndim))
    for name, value in vectors.items():
        if value is not None:
            _checks.feature_shape(name, jnp.asarray(value), features, axis)


def _check_policy(size: int, remainder: str) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(_SIZE.format(size=size))
    if remainder not in ("error", "smaller"):
        raise ValueError(_POLICY.format(remainder=remainder))


def _together(
    shape, batch: int, size: int, remainder: str, reduction: ReductionSpec
) -> tuple[tuple[int, ...], ...] | None:
    """The replicas of each group, where a group is of several; else None."""
    own = shape[batch]
    if reduction.axis_name is None or own == 0 or size <= own:
        return None
    outer_groups = reduction.groups or (
        tuple(range(_replicas.axis_size(reduction.axis_name))),
    )
    several, rest = divmod(size, own)
    if not rest and not any(len(pool) % several for pool in outer_groups):
        return tuple(
            pool[start : start + several]
            for pool in outer_groups
            for start in range(0, len(pool), several)
        )
    if remainder == "smaller":
        return None
    least = min(map(len, outer_groups))
    raise ValueError(
        _REPLICAS.format(
            size=size,
            batch=own,
            axis=batch,
            shape=tuple(shape),
            axis_name=reduction.axis_name,
            replicas=least,
            total=least * own,
        )
    )


def _normalize_over_replicas(
    inputs: Inputs,
    spec: TransformSpec,
    *,
    outer_groups: tuple[tuple[int, ...], ...] | None,
) -> tuple[jax.Array, Moments]:
    """Each group of replicas by its statistics; the Moments of the pool it is in."""
    group, pool = moments_of_group_and_pool(
        inputs.x, inputs.mask, inputs.shift, spec.reduction, outer_groups
    )
    vectors = *stats_or_fallback(group, inputs, spec), inputs.scale, inputs.bias
    return normalize_with_stats(
        inputs.bounded_x(), vectors, inputs.epsilon, spec.affine
    ), pool


def _runs(shape, batch: int, size: int, remainder: str) -> list[tuple[int, int, int]]:
    """(start, stop, groups) of each run of equal groups."""
    total = shape[batch]
    whole, rest = total - total % size, total % size
    if rest and remainder == "error":
        raise ValueError(
            _REMAINDER.format(
                batch=total, axis=batch, shape=tuple(shape), size=size, rest=rest
            )
        )
    runs = [(0, whole, whole // size)] if whole or not rest else []
    return runs + ([(whole, total, 1)] if rest else [])


def _run(
    x: jax.Array, options: Options, batch: int, start: int, stop: int
) -> tuple[jax.Array, Options]:
    """`x` and the options, for the examples from `start` to `stop`."""
    if stop - start == x.shape[batch]:
        return x, options

    def cut(value: jax.Array) -> jax.Array:
        if value.shape[batch] == 1:
            return value
        return lax.slice_in_dim(value, start, stop, axis=batch)

    mask = _checks.mask(options.get("mask"), x.shape)
    weights = _checks.weights(options.get("weights"), x.shape)
    residual = _checks.residual(options.get("residual"), x.shape, jnp.complex64)
    own: Options = {**options}
    own["mask"] = None if mask is None else cut(mask)
    own["weights"] = None if weights is None else cut(weights)
    own["residual"] = None if residual is None else cut(residual)
    return cut(x), own


def _joined(pieces: list[tuple[jax.Array, GroupMoments]], batch: int):
    """The outputs along the batch axis, and all rows."""
    y = jnp.concatenate([y for y, _ in pieces], batch)
    return y, jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *(rows for _, rows in pieces)
    )
