"""What the training transforms share: batch_norm and its variants.

A transform is a pure function of the checked arrays,

    (Inputs, TransformSpec, *extra) -> (normalized x, Moments)

that takes its statistics from `moments.compute_moments` and its output from
`normalize_with_stats`. Their derivatives compose, so it needs none of its own.
`apply_training_transform` does the rest: the checks, what is stored for the backward
pass, the residual, the activation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _backend, _checks, _dtypes, _replicas
from bnjax.moments import (
    CHECKPOINT_NAME,
    Moments,
    ReductionSpec,
    compute_moments,
    is_zero,
    mask_with_weights,
    reduction_spec,
    valid_or_bounded,
    zero_where_masked,
)

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
    """The arrays that a transform is given, checked.

    Vectors have the shape (*leading, feature) and the dtype of the arithmetic; leading
    is (domain,) where each example has a domain, else empty.

    Attributes:
        x: (batch, *spatial, feature).
        fallback_mean: normalizes features without a valid value.
        fallback_var: likewise.
        scale: a vector.
        bias: a vector.
        shift: see `moments`.
        epsilon: added to the variance.
        mask: boolean, or weights; `moments.mask_with_weights` builds it. None for all.
    """

    x: jax.Array
    fallback_mean: jax.Array
    fallback_var: jax.Array
    scale: jax.Array
    bias: jax.Array
    shift: jax.Array
    epsilon: ArrayLike
    mask: jax.Array | None

    def bounded_x(self) -> jax.Array:
        """See `zero_masked_garbage`."""
        return zero_masked_garbage(self.x, self.mask)


class AffineSpec(NamedTuple):
    """The static configuration of the affine map.

    Attributes:
        feature_axes: ascending.
        storage: the dtype of the input, before it is widened.
        compute: the dtype of the arithmetic.
        output: the dtype of the result.
        cotangent: the dtype of the incoming cotangent, before it is widened.
        implementation: see `batch_norm`.
    """

    feature_axes: tuple[int, ...]
    storage: jnp.dtype
    compute: jnp.dtype
    output: jnp.dtype
    cotangent: jnp.dtype
    implementation: str | None


class TransformSpec(NamedTuple):
    """The static configuration of a transform."""

    reduction: ReductionSpec
    affine: AffineSpec


Transform = Callable[..., tuple[jax.Array, Any]]


def zero_masked_garbage(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` with 0 for masked values that are NaN, infinite or huge."""
    return x if mask is None else zero_where_masked(x, valid_or_bounded(x, mask))


def zero_masked_overflow(y: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `y` with 0 for masked entries that overflowed.

    After `zero_masked_garbage` only float16 can overflow.
    """
    if mask is None or y.dtype != jnp.float16:
        return y
    return zero_where_masked(y, mask.astype(bool) | jnp.isfinite(y))


def affine_spec(
    x, parameters, *, axis, dtype, activation, implementation
) -> AffineSpec:
    """The checked static description of the normalization of `x`."""
    _checks.activation(activation)
    _checks.implementation(implementation, _backend.IMPLEMENTATIONS)
    if dtype is None:
        arrays = map(_checks.parameter, ("scale", "bias"), parameters)
        output = _dtypes.promote(x, *(a for a in arrays if a is not None))
    else:
        output = _checks.output_dtype(dtype)
    compute = _dtypes.statistics_dtype(x.dtype, output)
    cotangent = output if activation is None else compute
    axes = _axes.canonical(axis, x.ndim)
    return AffineSpec(axes, x.dtype, compute, output, cotangent, implementation)


def feature_vectors(
    x, axis, spec: AffineSpec, leading: tuple[int, ...] = (), **values
) -> tuple[jax.Array, ...]:
    """The values, checked, in the order of their names; the default for None.

    Each is of shape (*leading, feature).
    """
    shape = leading + _axes.sizes(x.shape, spec.feature_axes)
    default = {"mean": 0, "var": 1, "scale": 1, "bias": 0, "shift": 0}
    vectors = []
    for name, value in values.items():
        start, dtype = default[name], spec.compute
        if name == "var":
            dtype = _dtypes.real(dtype)
        if value is None:
            value = jnp.full(shape, start, dtype)
        value = jnp.asarray(value)
        _checks.feature_shape(name, value, shape, axis)
        _checks.not_complex(name, value, dtype)
        vectors.append(value.astype(dtype))
    return tuple(vectors)


def apply_training_transform(
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
        transform: see the module. It is a static argument of jit: pass the same
            function at each call.
        x: (batch, *spatial, feature).
        scale: (*leading, feature), or None.
        bias: (*leading, feature), or None.
        options: of `batch_norm`.
        *extra: arrays that `transform` needs in addition to the Inputs.
        leading: the axes of the per-feature values before those of the features.
        warns: whether to warn if there is one value per feature.
    """
    axis, activation = options.get("axis", -1), options.get("activation")
    x = _checks.require_inexact("x", x)
    arrays = x, scale, bias, options.get("residual")
    implementation = _backend.resolve_implementation(
        options.get("implementation"), *arrays
    )
    spec = affine_spec(
        x,
        (scale, bias),
        axis=axis,
        dtype=options.get("dtype"),
        activation=activation,
        implementation=implementation,
    )
    reduction = reduction_spec(
        x,
        axis,
        options.get("axis_name"),
        options.get("axis_index_groups"),
        implementation,
    )
    mean, var = options.get("fallback") or (None, None)
    shift = mean if options.get("shift") is None else options.get("shift")
    values = {"mean": mean, "var": var, "scale": scale, "bias": bias, "shift": shift}
    fallback_mean, fallback_var, scale, bias, shift = feature_vectors(
        x, axis, spec, leading, **values
    )
    epsilon = options.get("epsilon", 1e-5)
    _checks.epsilon(epsilon, fallback_mean.shape)
    mask = _checks.mask(options.get("mask"), x.shape)
    weights = _checks.weights(options.get("weights"), x.shape)
    residual = _checks.residual(options.get("residual"), x.shape, spec.compute)
    if mask is None and warns:
        _checks.warn_single_value(_smallest_count(x.shape, reduction), x.shape, axis)

    def run(inputs, residual, *extra):
        y, batch = _compiled(transform, inputs, TransformSpec(reduction, spec), *extra)
        y = add_residual_and_activate(y, residual, activation, spec)
        return zero_masked_overflow(y, inputs.mask), batch

    mask = mask_with_weights(x, mask, weights)
    inputs = Inputs(x, fallback_mean, fallback_var, scale, bias, shift, epsilon, mask)
    run = run if implementation == _backend.PLAIN else checkpoint_saving_moments(run)
    y, batch = run(inputs, residual, *extra)
    return y, jax.tree.map(jnp.asarray, batch)  # the count may be a number


def stats_or_fallback(
    batch: Moments, inputs: Inputs, spec: TransformSpec
) -> tuple[jax.Array, jax.Array]:
    """The batch's mean and variance; the fallback of features with count 0."""
    mean, var = batch.mean.astype(spec.affine.compute), batch.variance()
    if inputs.mask is not None or 0 in (inputs.x.shape[a] for a in spec.reduction.axes):
        mean = _axes.where(batch.count > 0, mean, inputs.fallback_mean)
        var = _axes.where(batch.count > 0, var, inputs.fallback_var)
    return mean, var


# Compiled apart from the activation, which may close over anything: layers of one shape
# are traced once, and a call outside of jit runs one program.


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled(transform: Transform, inputs: Inputs, spec: TransformSpec, *extra):
    x = inputs.x.astype(_dtypes.statistics_dtype(inputs.x.dtype))
    x = _backend.force_cotangent_rounding(x, inputs.x.dtype, spec.affine.implementation)
    return transform(inputs._replace(x=x), spec, *extra)


def normalize_with_batch_stats(
    inputs: Inputs, spec: TransformSpec
) -> tuple[jax.Array, Moments]:
    """Batch normalization itself: Algorithm 1."""
    batch, _ = compute_moments(inputs.x, inputs.mask, inputs.shift, spec.reduction)
    vectors = *stats_or_fallback(batch, inputs, spec), inputs.scale, inputs.bias
    return normalize_with_stats(
        inputs.bounded_x(), vectors, inputs.epsilon, spec.affine
    ), batch


@functools.partial(jax.jit, static_argnums=3)
def normalize_with_stats(x, vectors, epsilon, spec: AffineSpec):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, by (mean, var, scale, bias).

    Its derivative is in the symbols of the package's docstring. Only A (slope) and B
    (offset) meet the axes that the replicas vary over. In a typed shard_map they are
    stacked and cast once, which transposes to one collective.
    """
    mean, var, scale, bias = vectors
    var_plus_epsilon = var + jnp.asarray(epsilon, var.dtype)
    affine = _affine_value if spec.implementation == _backend.PLAIN else _affine
    return affine(x.astype(spec.compute), mean, var_plus_epsilon, scale, bias, spec)


def _affine_value(x, mean, var_plus_epsilon, scale, bias, spec: AffineSpec):
    a = lax.rsqrt(var_plus_epsilon).astype(spec.compute) * scale
    x, mean, a, bias = _reread_in_rank_of_x(spec, x, mean, a, bias)
    return (x - mean) * a + bias


_affine = jax.custom_jvp(_affine_value, nondiff_argnums=(5,))


@functools.partial(_affine.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    x, mean, var_plus_epsilon, scale, _ = primals
    y = _affine(*primals, spec)
    rstd = lax.rsqrt(var_plus_epsilon).astype(spec.compute)
    a = rstd * scale
    dx, dmean, dvar, dscale, dbias = (None if is_zero(t) else t for t in tangents)
    slope = _add_tangents(
        dscale, None if dvar is None else a * rstd * dvar.astype(a.dtype) / -2
    )
    offset = _add_tangents(dbias, None if dmean is None else -a * dmean)
    slope, offset = _pvary_like(x, slope, offset)

    x, mean, rstd, a = _reread_in_rank_of_x(spec, x, mean, rstd, a)
    again = functools.partial(
        _backend.reread_cotangent, spec.cotangent, spec.implementation
    )
    dy = None
    if offset is not None:  # as large as x, and split over the devices as x is
        zeros = _axes.split_like(x, jnp.zeros_like(x))
        dy = again(_axes.expand(offset, spec.feature_axes, x.ndim) + zeros)
    if slope is not None:
        slope = _axes.expand(slope, spec.feature_axes, x.ndim)
        dy = again(_add_tangents((x - mean) * rstd * slope, dy))
    return y, _add_tangents(None if dx is None else dx * a, dy)


def _add_tangents(first, second):
    """The sum, where None is zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _pvary_like(x, *vectors) -> list:
    """The vectors that are not None, cast together to vary over the replicas as x."""
    present = [v for v in vectors if v is not None]
    if not present or not _replicas.may_span_devices(x):
        return list(vectors)
    cast = iter(_replicas.pvary_like(x, jnp.stack(present)))
    return [None if v is None else next(cast) for v in vectors]


def _reread_in_rank_of_x(spec: AffineSpec, x, *vectors):
    """`x`, to be read again, and the per-feature vectors in its rank."""
    values = _replicas.pvary_together(x, *vectors)
    x, *vectors = _backend.reread(spec.storage, spec.implementation, *values)
    return x, *(_axes.expand(v, spec.feature_axes, x.ndim) for v in vectors)


def add_residual_and_activate(
    y, residual, activation: Activation | None, spec: AffineSpec
):
    """activation(y + residual), in the dtype of the output."""
    shape = y.shape
    if residual is not None:
        y = y + residual.astype(y.dtype)
        # The cotangent of this sum is that of the residual, stored in its dtype.
        y = _backend.force_cotangent_rounding(y, residual.dtype, spec.implementation)
    if activation is not None:
        y = activation(y)
        _checks.elementwise(activation, shape, y, spec.output)
    return _backend.force_rounding(y.astype(spec.output), spec.implementation)


def _smallest_count(shape: Sequence[int], reduction: ReductionSpec):
    """The number of values per feature in the smallest group of replicas."""
    values = math.prod(shape[a] for a in reduction.axes)
    if reduction.axis_name is None:
        return values
    if reduction.groups is not None:
        return values * min(map(len, reduction.groups))
    return values * _replicas.axis_size(reduction.axis_name)


# What is kept for the backward pass, and what is computed again.


_save_moments = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
_save_products = jax.checkpoint_policies.dots_saveable

# Keeps the moments (and with them one collective) and recomputes all else; XLA may
# still share the recomputation with the forward pass inside one jit.
checkpoint_saving_moments = functools.partial(
    jax.checkpoint, policy=_save_moments, prevent_cse=False
)


def remat_policy(primitive: Any, *avals: Any, **parameters: Any) -> Any:
    """Keeps convolutions, matrix products and batch statistics; recomputes the rest.

        kept:        z = W * x,  and the mean and variance of z
        recomputed:  activation((z - mean) / sqrt(var + epsilon) * scale + bias)

    A policy for `jax.checkpoint` and `flax.linen.remat`. Per convolution, batch
    normalization and activation one array is stored, as by invertible in-place batch
    normalization, but for any activation; and no reduction, convolution or collective
    is run twice.

    What enters a region is stored as well. A region that starts where a convolution
    ends (normalization, activation, convolution) stores one array per convolution; one
    that starts with the convolution stores two, its input and its output. So does
    `lax.scan` over such blocks, whose carry is what enters. In a residual network make
    a stage one region, not each block: the sums of its blocks are then recomputed too.

    Args:
        primitive: the operation that is asked about.
        *avals: the types of its inputs.
        **parameters: of the operation.

    Returns:
        Whether its results are kept.

    >>> import flax.linen as nn, bnjax
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, z):
    ...         norm = bnjax.BatchNorm(use_running_average=False, activation=nn.relu)
    ...         return nn.Conv(8, (3, 3), use_bias=False)(norm(z))
    >>> block = nn.remat(Block, policy=bnjax.remat_policy)()

    References: Chen et al. 2016, section 3; Rota Bulo et al. 2018 (in-place).
    """
    kept = _save_moments(primitive, *avals, **parameters)
    return kept or _save_products(primitive, *avals, **parameters)
