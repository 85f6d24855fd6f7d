"""Decorrelated batch normalization: whitening by the covariance of the batch.

    y = activation(W (x - mean) * scale + bias + residual)
    W = (covariance + epsilon I)^(-1/2)

within groups of adjacent features; groups of one feature are batch normalization. The
derivative is the composition of those of the co-moments, of the inverse root, and of
two products; one `jax.checkpoint` keeps `x` in its own dtype and matrices as large as
the covariance, by name.

Also the scaling of inputs, fitted once: `standardize`, `min_max_scale`, `zca_whiten`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bnjax import _checks
from bnjax.normalize import (
    Activation,
    Options,
    add_residual_and_activate,
    affine_spec,
    apply_training_transform,
    checkpoint_saving_moments,
    feature_vectors,
)
from bnjax.whiten._co_moments import (
    CoMoments,
    co_moments,
    group_covariances,
    group_size_of,
    layout_of,
    mask_and_weights,
    merge,
    require_real,
    require_real_result,
)
from bnjax.whiten._scaling import Scaler, min_max_scale, standardize, zca_whiten
from bnjax.whiten._whiten import (
    Whitening,
    check_method,
    inverse_sqrt,
    normalize_with_stats,
)

__all__ = [
    "CoMoments",
    "Scaler",
    "co_moments",
    "decorrelate",
    "inverse_sqrt",
    "merge",
    "min_max_scale",
    "standardize",
    "whiten_by",
    "zca_whiten",
]


def whiten_by(
    x: ArrayLike,
    mean: ArrayLike,
    covariance: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    method: str = "eigh",
    iterations: int = 5,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Whitens `x` with given statistics: evaluation, or frozen statistics.

        y = activation(W (x - mean) * scale + bias + residual)
        W = inverse_sqrt(covariance, epsilon=epsilon, method=method)

    Args:
        x: (batch, *spatial, feature), floating.
        mean: (feature,).
        covariance: (groups, size, size), for groups of `size` adjacent features.
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        axis: the feature axis.
        epsilon: added to the diagonal of the covariance.
        method: "eigh", "newton_schulz" or "cholesky"; see `inverse_sqrt`.
        iterations: the number of iterations of "newton_schulz".
        residual: an array of the shape of `x`, added before the activation.
        activation: an elementwise function.
        dtype: the dtype of the output; None for `result_type(x, scale, bias)`. The
            arithmetic is in at least float32 and rounded once, at the end.

    Returns:
        An array of the shape of `x`.

    Raises:
        TypeError: `x` or `residual` holds integers or complex numbers; `activation` is
            not callable.
        ValueError: shapes that do not fit, several feature axes, or one out of range;
            an unknown method, a negative epsilon, an integer dtype.

    >>> x, covariance = jnp.array([[4.0, 7.0]]), jnp.array([[[4.0, 0.0], [0.0, 25.0]]])
    >>> print(whiten_by(x, jnp.array([2.0, 2.0]), covariance, epsilon=0.0))
    [[1. 1.]]

    References: Huang et al. 2018, section 3.3 (inference).
    """
    x = require_real("x", x)
    covariance = require_real("covariance", covariance)
    layout = layout_of(x, axis, group_size_of(covariance))
    require_real_result(dtype, scale=scale, bias=bias)
    whitening = Whitening(layout, *check_method(method, iterations))
    covariance = group_covariances(covariance, layout)
    spec = affine_spec(
        x,
        (scale, bias),
        axis=axis,
        dtype=dtype,
        activation=activation,
        implementation=None,
    )
    vectors = {"mean": mean, "var": None, "scale": scale, "bias": bias}
    mean, _, scale, bias = feature_vectors(x, axis, spec, **vectors)
    _checks.epsilon(epsilon)
    residual = _checks.residual(residual, x.shape, spec.compute)

    @checkpoint_saving_moments
    def transform(x, covariance, vectors, epsilon, residual):
        y = normalize_with_stats(x, covariance, vectors, epsilon, whitening, spec)
        return add_residual_and_activate(y, residual, activation, spec)

    return transform(x, covariance, (mean, scale, bias), epsilon, residual)


def decorrelate(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    group_size: int | None = None,
    method: str = "eigh",
    iterations: int = 5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    fallback: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[jax.Array, CoMoments]:
    """Whitens `x` by its own statistics: the training transform.

        mean = sum x / n,  C = sum (x - mean)(x - mean)^T / n     (over the valid x)
        y = activation(W (x - mean) * scale + bias + residual)
        W = (C + epsilon I)^(-1/2)

    Differentiable in every mode and order, through `y` and through the CoMoments.
    The backward pass stores `x` in its own dtype, `residual`, and matrices of the size
    of the covariance. No matrix is decomposed twice. Over replicas: two collectives
    forward, one backward.

    Args:
        x: (batch, *spatial, feature), floating.
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        axis: the feature axis; all others are reduced.
        epsilon: added to the diagonal of the covariance.
        group_size: the number of adjacent features that are whitened together; None
            for one group of all. The rank of the covariance is below the number of
            valid positions: a batch should hold several times group_size of them.
        method: "eigh" (exact, ZCA), "newton_schulz" (products alone, stops early) or
            "cholesky" (exact, not ZCA); see `inverse_sqrt`.
        iterations: the number of iterations of "newton_schulz".
        mask: boolean, broadcastable to `x`, with size 1 along the feature axis; True =
            counts. Masked values are whitened like the others, but have no influence
            on the statistics; those that are not finite, or beyond 1e9, are read as 0.
        weights: real floats >= 0, broadcastable as the mask: how often each position
            counts in the statistics; see `bnjax.batch_norm`. None for 1.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to share statistics
            over. Not needed under jit.
        axis_index_groups: a partition of that axis: statistics are shared within each
            group. Groups may differ in size.
        residual: an array of the shape of `x`, added before the activation.
        activation: an elementwise function; its input is computed again, not stored.
        dtype: the dtype of the output; None for `result_type(x, scale, bias)`.
        fallback: (mean, covariance), as in `whiten_by`: used where no position is
            valid. None for (0, I).

    Returns:
        y, of the shape of `x`, and the CoMoments of the batch (of every replica).

    Raises:
        TypeError: `x` or `residual` holds integers or complex numbers; `activation` is
            not callable.
        ValueError: shapes that do not fit; several feature axes, or one out of range; a
            group size that does not divide the features; a mask or weights that do not
            broadcast or vary by feature; an axis name that is not bound; groups that
            do not partition it; an unknown method; a negative epsilon; an integer
            dtype.

    Warns:
        BatchNormWarning: one position; at trace time.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 8.0], [5.0, 2.0], [3.0, 4.0]])
    >>> y, batch = decorrelate(x, epsilon=0.0)
    >>> print(co_moments(y).covariance().round(3) + 0.0)
    [[[1. 0.] [0. 1.]]]

    References: Huang et al. 2018 (decorrelated batch normalization), Algorithm 1;
    Huang et al. 2019 (IterNorm), Algorithm 1.
    """
    x = require_real("x", x)
    layout = layout_of(x, axis, group_size)
    require_real_result(dtype, scale=scale, bias=bias)
    whitening = Whitening(layout, *check_method(method, iterations))
    mean, covariance = fallback or (None, None)
    covariance = group_covariances(covariance, layout)
    mask, weights = mask_and_weights(mask, weights, x, layout.axis)
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
    }
    if mean is not None:
        options["fallback"] = mean, jnp.ones_like(mean)
    return apply_training_transform(whitening, x, scale, bias, options, covariance)
