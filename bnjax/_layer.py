"""What the layers of Linen and NNX share: pure functions, and no variables.

The layers differ in their `LayerOps`, the functions of one paper.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bnjax import _checks, _dtypes, running, whiten
from bnjax.ghost import Remainder, ghost_batch_norm
from bnjax.moments import Moments, mask_with_weights, merge, moments
from bnjax.normalize import (
    batch_norm,
    normalize,
    zero_masked_garbage,
    zero_masked_overflow,
)
from bnjax.renorm import Limit, at_step, batch_renorm, warmed_up
from bnjax.split import split_batch_norm, split_moments, split_normalize

Shape = tuple[int, ...]


def _zero_and_one(shape: Shape, dtype: DTypeLike) -> dict[str, jax.Array]:
    return running.ema().init(shape, dtype)._asdict()


class CallOptions(TypedDict, total=False):
    """The keyword arguments of every layer's call; see `BatchNorm.__call__`."""

    mask: ArrayLike | None
    weights: ArrayLike | None
    residual: ArrayLike | None
    update_stats: bool | None


class LayerOps(NamedTuple):
    """The pure functions that a layer calls.

    Attributes:
        train: (x, **options of batch_norm) -> (y, Moments); the running statistics are
            its `fallback`.
        infer: (x, mean, var, **options of normalize) -> y.
        measure: (x, **options of moments) -> Moments.
        init_forward: (x, **options of batch_norm) -> (y, Moments): the output during
            `init`, where the batch may be only an example of its shape.
        init_stats: (shape, dtype) -> the initial running statistics, by name.
        empty: (shape, dtype) -> the Moments of an empty set.
        merge: merges two Moments.
        leading: the axes of the statistics before those of the features.
    """

    train: Callable[..., tuple[jax.Array, Any]] = batch_norm
    infer: Callable[..., jax.Array] = normalize
    measure: Callable[..., Any] = moments
    init_forward: Callable[..., tuple[jax.Array, Any]] = batch_norm
    init_stats: Callable[..., dict[str, jax.Array]] = _zero_and_one
    empty: Callable[..., Any] = Moments.empty
    merge: Callable[..., Any] = merge
    leading: tuple[int, ...] = ()


def ghost_ops(virtual_batch_size: int, remainder: Remainder) -> LayerOps:
    """The functions of `GhostBatchNorm`."""
    by = {"virtual_batch_size": virtual_batch_size, "remainder": remainder}
    return LayerOps(partial(ghost_batch_norm, **by))


def renorm_ops(
    r_max: Limit,
    d_max: Limit,
    step: ArrayLike | None,
    steps: ArrayLike | None = None,
    warmup_steps: int | None = None,
) -> LayerOps:
    """The functions of `BatchRenorm`.

    Args:
        r_max: see `BatchRenorm`.
        d_max: see `BatchRenorm`.
        step: the training step, for schedules; None to use `steps`.
        steps: how many updates the layer has counted; None without a counter.
        warmup_steps: see `BatchRenorm`; None without a counter.
    """

    def train(x, *, fallback, **options):
        at = steps if step is None else step
        limits = at_step("r_max", r_max, at), at_step("d_max", d_max, at)
        if steps is not None and warmup_steps is not None:
            limits = warmed_up(*limits, steps, warmup_steps)
        return batch_renorm(x, *fallback, r_max=limits[0], d_max=limits[1], **options)

    return LayerOps(train)


def no_steps() -> jax.Array:
    """The initial value of a counter."""
    return jnp.zeros((), jnp.int32)


def next_step(steps: ArrayLike) -> jax.Array:
    """The counter after an update of the running statistics; 2^31 - 1 is the last."""
    steps = jnp.asarray(steps)
    return steps + (steps < jnp.iinfo(jnp.int32).max).astype(steps.dtype)


def split_ops(num_splits: int, domain: ArrayLike | None) -> LayerOps:
    """The functions of `SplitBatchNorm`."""
    main = 0 if domain is None else domain

    def empty(shape: Shape, dtype: DTypeLike = jnp.float32) -> Moments:
        nothing = Moments.empty(shape, dtype)
        return nothing._replace(count=jnp.zeros(num_splits, nothing.count.dtype))

    return LayerOps(
        train=partial(split_batch_norm, num_splits=num_splits, domain=domain),
        infer=partial(split_normalize, domain=main),
        measure=partial(split_moments, num_splits=num_splits, domain=domain),
        init_forward=partial(split_batch_norm, num_splits=num_splits, domain=main),
        empty=empty,
        leading=(num_splits,),
    )


def decorrelated_ops(group_size: int | None, method: str, iterations: int) -> LayerOps:
    """The functions of `DecorrelatedBatchNorm`."""
    by = {"method": method, "iterations": iterations}

    def grouped(shape: Shape) -> tuple[int, int]:  # `decorrelate` checks the size
        size = max(group_size or shape[-1], 1)
        return shape[-1] // size, size

    def init_stats(shape: Shape, dtype: DTypeLike) -> dict[str, jax.Array]:
        dtype = _dtypes.real(dtype)  # of real inputs alone
        groups, size = grouped(shape)
        identity = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (groups, size, size))
        return {"mean": jnp.zeros(shape, dtype), "cov": identity}

    def empty(shape: Shape, dtype: DTypeLike = jnp.float32) -> whiten.CoMoments:
        return whiten.CoMoments.empty(*grouped(shape), dtype)

    decorrelate = partial(whiten.decorrelate, group_size=group_size, **by)
    return LayerOps(
        train=decorrelate,
        infer=partial(whiten.whiten_by, **by),
        measure=partial(whiten.co_moments, group_size=group_size),
        init_forward=decorrelate,
        init_stats=init_stats,
        empty=empty,
        merge=whiten.merge,
    )


def to_inexact(x: ArrayLike) -> jax.Array:
    """`x` as an array to compute with: integers and booleans as float32, as in Flax."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        return x.astype(_dtypes.statistics_dtype(x.dtype))
    return _checks.require_inexact("x", x)


def infer_and_measure(
    x: jax.Array,
    stored: running.State,
    ops: LayerOps,
    moments_options: Mapping[str, Any],
    normalize_options: Mapping[str, Any],
    *,
    measure: bool,
) -> tuple[jax.Array, Any]:
    """Normalizes `x` by the running statistics; also returns its Moments, if wanted.

    Masked values are normalized like the others. Those that are NaN, infinite or beyond
    1e9 are read as 0, because a masked NaN would make the gradient of the scale NaN.

    Args:
        x: (batch, *spatial, feature).
        stored: the running statistics.
        ops: the functions of the layer.
        moments_options: the arguments that `moments` and `batch_norm` share, except the
            axis.
        normalize_options: the arguments that `normalize` and `batch_norm` share.
        measure: whether to return the Moments; else None.
    """
    mask = _checks.mask(moments_options["mask"], x.shape)
    weights = _checks.weights(moments_options["weights"], x.shape)
    mask = mask_with_weights(x, mask, weights)
    y = ops.infer(zero_masked_garbage(x, mask), *stored, **normalize_options)
    y = zero_masked_overflow(y, mask)
    if not measure:
        return y, None
    shift = stored.mean if jnp.iscomplexobj(x) else stored.mean.real
    axis = normalize_options["axis"]
    return y, ops.measure(x, axis=axis, shift=shift, **moments_options)


def update_running_stats(
    stored: running.State,
    batch: Moments | whiten.CoMoments,
    *,
    momentum: float,
    unbiased: bool,
    skip_nonfinite: bool,
    batch_dtype: DTypeLike,
    keep_dtype: bool,
) -> running.State:
    """The running statistics after a batch.

    Args:
        stored: the running statistics before the batch.
        batch: its Moments; a covariance is averaged as a variance is.
        momentum: the weight of `stored`.
        unbiased: whether the running variance divides by n - 1.
        skip_nonfinite: whether a batch that is not finite changes nothing.
        batch_dtype: the dtype of the batch statistics in Flax; the result is promoted
            to it.
        keep_dtype: whether the result keeps the dtype of `stored` instead. A real dtype
            is not kept for a complex result.
    """
    # CoMoments pass as Moments: m2 is then the co-moment matrix, var the covariance.
    rule = running.ema(momentum, ddof=int(unbiased), skip_nonfinite=skip_nonfinite)
    values = []
    for old, new in zip(stored, rule.update(stored, Moments(*batch))):
        dtype = _dtypes.promote(old, batch_dtype)
        if not jnp.iscomplexobj(new):
            dtype = _dtypes.real(dtype)
        if keep_dtype and jnp.iscomplexobj(new) == jnp.iscomplexobj(old):
            dtype = old.dtype
        values.append(new.astype(dtype))
    return running.State(*values)
