"""Normalization by given statistics, and the training transform.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias

`batch_norm` is `normalize` by the `moments` of its own input. Each has a derivative of
its own, and JAX composes and transposes them:

    normalize:  dy = dx a + x_hat A + B,   a = scale rstd,   x_hat = (x - mean) rstd,
                A = dscale - a rstd dvar/2,   B = dbias - a dmean
    moments:    dmean = sum dx / n,   dm2 = 2 sum (x - mean) dx     (each by its weight)

The backward pass, with y_bar and x_bar for cotangents, is then two full reductions,
S = sum y_bar and T = sum y_bar x_hat, one collective, and

    x_bar = a (y_bar - S/n - x_hat T/n)                Ioffe & Szegedy 2015, section 3


Both sit inside one `jax.checkpoint` that keeps the moments by name. Stored for the
backward pass are `x` in its own dtype, per-feature vectors, and the residual, mask and
weights where they are given; the normalized value, the sum with the residual and the
activation are computed again. The checkpoint stands outside the derivative rules,
because JAX with its setting `jax_remat3` cannot transpose one inside.
"""

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike

from bnjax import _backend, _checks
from bnjax.moments import Moments
from bnjax.normalize._groups import (
    GroupMoments,
    batch_axis,
    check_devices,
    normalize_groups,
)
from bnjax.normalize._transform import (
    Activation,
    AffineSpec,
    Inputs,
    Options,
    TransformSpec,
    add_residual_and_activate,
    affine_spec,
    apply_training_transform,
    checkpoint_saving_moments,
    feature_vectors,
    normalize_with_batch_stats,
    normalize_with_stats,
    remat_policy,
    stats_or_fallback,
    zero_masked_garbage,
    zero_masked_overflow,
)

__all__ = [
    "Activation",
    "AffineSpec",
    "GroupMoments",
    "Inputs",
    "Options",
    "TransformSpec",
    "add_residual_and_activate",
    "affine_spec",
    "apply_training_transform",
    "batch_axis",
    "batch_norm",
    "check_devices",
    "checkpoint_saving_moments",
    "feature_vectors",
    "normalize",
    "normalize_groups",
    "normalize_with_stats",
    "remat_policy",
    "stats_or_fallback",
    "zero_masked_garbage",
    "zero_masked_overflow",
]


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Normalizes `x` by given statistics: inference, or frozen batch normalization.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Args:
        x: (batch, *spatial, feature), floating or complex.
        mean: (feature,).
        var: (feature,), real.
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        axis: the feature axis or axes; with several, per-feature values have their
            sizes in ascending axis order.
        epsilon: added to the variance.
        residual: of the shape of `x`; added before the activation.
        activation: an elementwise function.
        dtype: of the output; None for `result_type(x, scale, bias)`. The arithmetic is
            in at least float32 and rounded once, at the end.
        implementation: None for "xla"; "plain" for `jax.experimental.jet`. See
            `batch_norm`.

    Returns:
        An array of the shape of `x`.

    Raises:
        TypeError: `x` or `residual` holds integers; `activation` is not callable.
        ValueError: shapes that do not fit, an axis out of range or repeated, a
            negative epsilon, an integer dtype.

    >>> import jax.numpy as jnp
    >>> x, mean, var = jnp.array([[4.0], [7.0]]), jnp.array([5.0]), jnp.array([4.0])
    >>> print(normalize(x, mean, var, epsilon=0.0).ravel())
    [-0.5  1. ]

    References: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    x = _checks.require_inexact("x", x)
    arrays = x, mean, var, scale, bias, residual
    implementation = (
        _backend.resolve_implementation(implementation, *arrays) or "xla"
    )  # x is read once: no platform needs the fences of "reread"
    spec = affine_spec(
        x,
        (scale, bias),
        axis=axis,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
    )
    vectors = feature_vectors(x, axis, spec, mean=mean, var=var, scale=scale, bias=bias)
    _checks.epsilon(epsilon, vectors[0].shape)
    residual = _checks.residual(residual, x.shape, spec.compute)

    def forward(x, vectors, epsilon, residual):
        y = normalize_with_stats(x, vectors, epsilon, spec)
        return add_residual_and_activate(y, residual, activation, spec)

    if implementation != _backend.PLAIN:
        forward = checkpoint_saving_moments(forward)
    return forward(x, vectors, epsilon, residual)


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    shift: ArrayLike | None = None,
    fallback: tuple[ArrayLike, ArrayLike] | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own statistics: the training transform.

        mean = sum w x / n,  var = sum w |x - mean|^2 / n,  n = sum w
        w = 1 for each valid x, or its weight                (biased, over the valid x)
        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Differentiable in every mode and order, through `y` and through the Moments.
    The backward pass stores `x` in its own dtype, `residual`, and per-feature vectors.

    Args:
        x: (batch, *spatial, feature), floating or complex.
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        axis: the feature axis or axes; all others are reduced.
        epsilon: added to the variance.
        mask: boolean, broadcastable to `x`; True = counts. Masked values are normalized
            like the others, but do not count in the statistics. Those that are not
            finite, or beyond 1e9, are read as 0; a masked float16 output that overflows
            becomes 0.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to share statistics
            over. Not needed under jit: the statistics of a sharded batch are global
            there. For statistics of parts of the batch use
            `bnjax.ghost.ghost_batch_norm`.
        axis_index_groups: a partition of that axis: statistics are shared within each
            group. Groups may differ in size.
        residual: of the shape of `x`; added before the activation.
        activation: an elementwise function; its input is computed again, not stored.
        dtype: of the output; None for `result_type(x, scale, bias)`.
        implementation: None to choose for the platform.
            "xla" lets XLA share reads of `x`.
            "reread" has each reduction read `x` again, which is faster on a CPU.
            "subsample" is for GPUs: it takes the shift from `x`, without a condition,
            unless replicas must share the shift.
            "plain" is the definition: two reads of `x`, no derivative rules, and more
            is stored. `jax.experimental.jet` needs it, and gets it for None, but not
            inside a jitted function that was traced before.
        shift: (feature,), a guess of the mean that does not depend on `x`; see
            `moments`. None for the mean of `fallback`.
        fallback: (mean, var), each (feature,): normalizes the features without a valid
            value. None for (0, 1).
        weights: real floats >= 0, broadcastable to `x`: how often each value counts in
            the statistics; all are normalized alike. A weight of 2 counts the value
            twice; 0 ignores it. If all weights are multiplied by the same number, the
            output does not change; the count and the unbiased variance, which divides
            by sum w - 1, do. Differentiable. `mask` and `weights` can be combined.

    Returns:
        y, of the shape of `x`, and the Moments of the batch, merged over all replicas.

    Raises:
        TypeError: `x`, `residual` or `weights` holds integers; `activation` is not
            callable.
        ValueError: shapes that do not fit, an axis out of range or repeated, a mask or
            weights that do not broadcast, weights known to be negative or not finite,
            an axis name that is not bound, groups that do not partition it, a negative
            epsilon, an integer dtype.

    Warns:
        BatchNormWarning: at trace time, for one value per feature.

    >>> import jax.numpy as jnp
    >>> y, (count, mean, m2) = batch_norm(jnp.array([[1.0], [5.0]]), epsilon=0.0)
    >>> print(y.ravel(), mean)
    [-1.  1.] [3.]

    References: Ioffe & Szegedy 2015, Algorithm 1; section 3.2 for spatial axes.
    """
    options: Options = {
        "axis": axis,
        "epsilon": epsilon,
        "mask": mask,
        "weights": weights,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "residual": residual,
        "activation": activation,
        "dtype": dtype,
        "implementation": implementation,
        "shift": shift,
        "fallback": fallback,
    }
    return apply_training_transform(normalize_with_batch_stats, x, scale, bias, options)
