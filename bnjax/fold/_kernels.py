"""The affine map that evaluation is, and its product with the kernel before it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes


def affine(
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Batch normalization with given statistics as a multiplier and an offset.

        (x - mean) / sqrt(var + epsilon) * scale + bias = x * multiplier + offset
        multiplier = scale / sqrt(var + epsilon),  offset = bias - mean * multiplier

    Where |mean| is far above sqrt(var), as in raw data, `x * multiplier + offset`
    cancels; `(x - mean) * multiplier + bias` does not.

    Args:
        mean: the mean of each feature, of any shape.
        var: the variance, real, of the shape of `mean`.
        scale: gamma, of the shape of `mean`; None for 1.
        bias: beta, of the shape of `mean`; None for 0.
        epsilon: added to the variance.

    Returns:
        (multiplier, offset), of the shape of `mean`, in at least float32.

    Raises:
        ValueError: shapes that differ; a negative epsilon.

    >>> multiplier, offset = affine(jnp.array([5.0]), jnp.array([4.0]), epsilon=0.0)
    >>> print(multiplier, offset)
    [0.5] [-2.5]

    References: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    _checks.epsilon(epsilon)
    compute = _dtypes.statistics_dtype(
        mean, *(v for v in (var, scale, bias) if v is not None)
    )
    mean = jnp.asarray(mean, compute)
    vectors = {
        "var": jnp.asarray(var, _dtypes.real(compute)),
        "scale": jnp.ones_like(mean) if scale is None else jnp.asarray(scale, compute),
        "bias": jnp.zeros_like(mean) if bias is None else jnp.asarray(bias, compute),
    }
    for name, value in vectors.items():
        _same_shape(name, value.shape, "mean", mean.shape)
    multiplier = lax.rsqrt(vectors["var"] + epsilon) * vectors["scale"]
    return multiplier, vectors["bias"] - mean * multiplier


def fold_conv(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bn_bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """The convolution that equals this convolution followed by batch normalization.

        kernel' = kernel * multiplier,  bias' = bias * multiplier + offset

    with the multiplier and the offset of `affine`. Exact for every stride, padding,
    dilation and number of groups.

    Args:
        kernel: (*window, in / groups, out), as in Flax.
        bias: the bias of the convolution, (out,); None for 0.
        mean: the mean of its output, (out,).
        var: the variance of its output, (out,).
        scale: the scale of the normalization, (out,); None for 1.
        bn_bias: the bias of the normalization, (out,); None for 0.
        epsilon: added to the variance.

    Returns:
        (kernel, bias), computed in at least float32, in the dtype of `kernel`. Cast the
        kernel first if the layer multiplies in a wider dtype.

    Raises:
        ValueError: a kernel of two dimensions or less (see `fold_dense`); vectors of
            another number of features; a negative epsilon.

    >>> kernel = jnp.ones((3, 1, 2))
    >>> mean, var = jnp.array([1.0, 2.0]), jnp.array([4.0, 16.0])
    >>> kernel, bias = fold_conv(kernel, None, mean, var, epsilon=0.0)
    >>> print(kernel[0], bias)
    [[0.5  0.25]] [-0.5 -0.5]

    References: Jacob et al. 2018 (Quantization and training), section 3.2, eq. 14.
    """
    kernel = _kernel(kernel, jnp.ndim(kernel) > 2, "(*window, in / groups, out)")
    return _fold(kernel, -1, bias, affine(mean, var, scale, bn_bias, epsilon=epsilon))


def fold_dense(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bn_bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """The dense layer that equals this one followed by batch normalization.

        kernel' = kernel * multiplier,  bias' = bias * multiplier + offset

    Args:
        kernel: (in, out).
        bias: the bias of the dense layer, (out,); None for 0.
        mean: the mean of its output, (out,).
        var: the variance of its output, (out,).
        scale: the scale of the normalization, (out,); None for 1.
        bn_bias: the bias of the normalization, (out,); None for 0.
        epsilon: added to the variance.

    Returns:
        (kernel, bias), computed in at least float32, in the dtype of `kernel`. Cast the
        kernel first if the layer multiplies in a wider dtype.

    Raises:
        ValueError: a kernel of another rank; vectors of another number of features; a
            negative epsilon.

    >>> mean, var = jnp.array([1.0, 2.0]), jnp.array([4.0, 16.0])
    >>> kernel, bias = fold_dense(jnp.ones((3, 2)), None, mean, var, epsilon=0.0)
    >>> print(kernel[0], bias)
    [0.5  0.25] [-0.5 -0.5]

    References: Jacob et al. 2018 (Quantization and training), section 3.2, eq. 14.
    """
    kernel = _kernel(kernel, jnp.ndim(kernel) == 2, "(in, out)")
    return _fold(kernel, -1, bias, affine(mean, var, scale, bn_bias, epsilon=epsilon))


def fold_conv_transpose(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bn_bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    transpose_kernel: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The transposed convolution that equals this one followed by normalization.

        kernel' = kernel * multiplier,  bias' = bias * multiplier + offset

    Args:
        kernel: `(*window, in, out)`; with `transpose_kernel` `(*window, out, in)`.
        bias: the bias of the convolution, (out,); None for 0.
        mean: the mean of its output, (out,).
        var: the variance of its output, (out,).
        scale: the scale of the normalization, (out,); None for 1.
        bn_bias: the bias of the normalization, (out,); None for 0.
        epsilon: added to the variance.
        transpose_kernel: the option of `flax.linen.ConvTranspose` and of
            `lax.conv_transpose`.

    Returns:
        (kernel, bias), computed in at least float32, in the dtype of `kernel`. Cast the
        kernel first if the layer multiplies in a wider dtype.

    Raises:
        ValueError: see `fold_conv`.

    >>> kernel, mean, var = jnp.ones((3, 2, 1)), jnp.ones(2), jnp.array([4.0, 16.0])
    >>> kernel, bias = fold_conv_transpose(
    ...     kernel, None, mean, var, epsilon=0.0, transpose_kernel=True
    ... )
    >>> print(kernel[0].T, bias)
    [[0.5  0.25]] [-0.5  -0.25]

    References: Jacob et al. 2018 (Quantization and training), section 3.2, eq. 14.
    """
    kernel = _kernel(kernel, jnp.ndim(kernel) > 2, "(*window, in, out)")
    axis = -2 if transpose_kernel else -1
    return _fold(kernel, axis, bias, affine(mean, var, scale, bn_bias, epsilon=epsilon))


def _fold(kernel: jax.Array, axis: int, bias, by) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias times `by`, the affine map of the features on `axis`."""
    multiplier, offset = by
    axes = _axes.canonical(axis, kernel.ndim)
    features = _axes.sizes(kernel.shape, axes)
    _same_shape("mean", multiplier.shape, "the kernel's output features", features)
    compute = _dtypes.statistics_dtype(kernel, multiplier)
    factor = _axes.expand(multiplier.astype(compute), axes, kernel.ndim)
    folded = kernel.astype(compute) * factor
    if bias is not None:
        _same_shape("bias", jnp.shape(bias), "the kernel's output features", features)
        offset = offset + jnp.asarray(bias, compute) * multiplier
    return folded.astype(kernel.dtype), offset.astype(kernel.dtype)


def _kernel(kernel: ArrayLike, fits: bool, layout: str) -> jax.Array:
    """The kernel as an array; raises unless its rank fits the layout."""
    if not fits:
        raise ValueError(
            f"kernel has shape {jnp.shape(kernel)}: expected {layout}. Write "
            "fold_dense for a matrix, fold_conv or fold_conv_transpose for a window, "
            "and move the axes of other libraries' kernels into Flax's order first."
        )
    return _checks.require_inexact("kernel", kernel)


def _same_shape(name: str, shape, other: str, expected) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(shape)}: expected {tuple(expected)}, that of "
            f"{other}. Pass the statistics and parameters of the normalization that "
            "directly follows this layer."
        )
