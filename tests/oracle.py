"""Batch normalization in float64 NumPy, two passes, straight from the paper.

Imports nothing of bnjax. Statistics have the shape of the feature axes in ascending
order; `axes` are the reduced axes, non-negative. Ioffe & Szegedy 2015, Algorithm 1 and
the gradients of its section 3, node by node.
"""

import numpy as np


def wide(x):
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def moments(x, axes, mask=None):
    """(count, mean, m2); a feature without values has mean 0 and m2 0."""
    x = wide(x)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    count = valid.sum(axes).astype(np.float64)
    safe = np.maximum(count, 1)
    mean = np.where(valid, x, 0).sum(axes) / safe
    deviation = np.where(valid, np.abs(x - np.expand_dims(mean, axes)), 0)
    return count, mean, (deviation**2).sum(axes)


def normalize(x, mean, var, scale, bias, axes, epsilon=1e-5):
    mean, var, scale, bias = (
        np.expand_dims(wide(v), axes) for v in (mean, var, scale, bias)
    )
    return (wide(x) - mean) / np.sqrt(var + epsilon) * scale + bias


def batch_norm(x, scale, bias, axes, mask=None, epsilon=1e-5):
    count, mean, m2 = moments(x, axes, mask)
    var = m2 / np.maximum(count, 1)
    return normalize(x, mean, var, scale, bias, axes, epsilon)


def batch_norm_gradients(x, scale, dy, axes, mask=None, epsilon=1e-5):
    """(dx, dscale, dbias), by the chain rule through mean and variance separately."""
    x, dy = wide(x), wide(dy)
    count, mean, m2 = moments(x, axes, mask)
    m = np.maximum(count, 1)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    centred = x - np.expand_dims(mean, axes)
    s = np.expand_dims(np.sqrt(m2 / m + epsilon), axes)
    m = np.expand_dims(m, axes)
    dx_hat = dy * np.expand_dims(wide(scale), axes)
    dvar = (dx_hat * centred * -0.5 * s**-3).sum(axes, keepdims=True)
    dmean = (dx_hat * -1 / s).sum(axes, keepdims=True)
    dx = dx_hat / s + valid * (dvar * 2 * centred / m + dmean / m)
    return dx, (dy * centred / s).sum(axes), dy.sum(axes)


def co_moments(x, axis, size, mask=None):
    """(count, mean, m2), m2 a (size, size) matrix for each group of features."""
    x = np.moveaxis(wide(x), axis, -1)
    valid = np.ones(x.shape[:-1], bool)
    if mask is not None:
        valid = np.broadcast_to(np.moveaxis(mask, axis, -1), (*x.shape[:-1], 1))[..., 0]
    vectors = x[valid]
    mean = vectors.sum(0) / max(len(vectors), 1)
    centred = (vectors - mean).reshape(len(vectors), len(mean) // size, size)
    m2 = np.stack([c.T @ c for c in np.moveaxis(centred, 1, 0)])
    return float(len(vectors)), mean, m2


def inverse_root(matrix, method="eigh", iterations=5):
    """One matrix; Newton's iteration as IterNorm's Algorithm 1 has it."""
    if method == "cholesky":
        return np.linalg.inv(np.linalg.cholesky(matrix))
    if method == "eigh":
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(values**-0.5) @ vectors.T
    p, normalized = np.eye(len(matrix)), matrix / np.trace(matrix)
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ normalized) / 2
    return p / np.sqrt(np.trace(matrix))


def whiten(x, mean, covariance, scale, bias, axis, epsilon=1e-5, method="eigh"):
    """Group by group; `covariance` is (groups, size, size)."""
    x = np.moveaxis(wide(x), axis, -1)
    size = covariance.shape[-1]
    grouped = (x - wide(mean)).reshape(*x.shape[:-1], -1, size)
    y = np.empty_like(grouped)
    for g, matrix in enumerate(wide(covariance)):
        root = inverse_root(matrix + epsilon * np.eye(size), method)
        y[..., g, :] = grouped[..., g, :] @ root.T
    return np.moveaxis(y.reshape(x.shape) * wide(scale) + wide(bias), -1, axis)


def decorrelate(x, scale, bias, axis, size, mask=None, epsilon=1e-5, method="eigh"):
    count, mean, m2 = co_moments(x, axis, size, mask)
    covariance = m2 / max(count, 1)
    return whiten(x, mean, covariance, scale, bias, axis, epsilon, method)


def ghost_batch_norm(x, scale, bias, size, mask=None, epsilon=1e-5):
    """Hoffer et al. 2017, Algorithm 1: `size` examples of the first axis at a time."""
    mask = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    axes = tuple(range(x.ndim - 1))
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return np.concatenate(
        [batch_norm(x[p], scale, bias, axes, mask[p], epsilon) for p in parts]
    )


def batch_renorm(x, mean, var, scale, bias, limits, axes, mask=None, epsilon=1e-5):
    """Ioffe 2017, Algorithm 1; limits: (r_max, d_max)."""
    mu, sigma = wide(mean), np.sqrt(wide(var) + epsilon)
    count, mu_b, m2 = moments(x, axes, mask)
    sigma_b = np.sqrt(m2 / np.maximum(count, 1) + epsilon)
    r_max, d_max = limits
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mu_b - mu) / sigma, -d_max, d_max)
    mu_b, sigma_b, r, d, scale, bias = (
        np.expand_dims(wide(v), axes) for v in (mu_b, sigma_b, r, d, scale, bias)
    )
    return ((wide(x) - mu_b) / sigma_b * r + d) * scale + bias


def batch_renorm_gradients(
    x, mean, var, scale, bias, dy, limits, axes, mask=None, epsilon=1e-5
):
    """(dx, dscale, dbias): those of batch normalization by scale r, but for dscale.

    dx = scale r / sigma_B (g - mean(g) - x_hat mean(g x_hat)), and y = x_hat' scale +
    bias, where x_hat' = x_hat r + d.
    """
    count, _, m2 = moments(x, axes, mask)
    sigma_b = np.sqrt(m2 / np.maximum(count, 1) + epsilon)
    sigma = np.sqrt(wide(var) + epsilon)
    r = np.clip(sigma_b / sigma, 1 / limits[0], limits[0])
    dx = batch_norm_gradients(x, wide(scale) * r, dy, axes, mask, epsilon)[0]
    one, zero = np.ones_like(wide(scale)), np.zeros_like(wide(bias))
    x_hat = batch_renorm(x, mean, var, one, zero, limits, axes, mask, epsilon)
    return dx, (wide(dy) * x_hat).sum(axes), wide(dy).sum(axes)


def split_batch_norm(x, scale, bias, domain, mask=None, epsilon=1e-5):
    """Xie et al. 2019: each domain by itself; a row of scale and bias for each."""
    mask = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    axes = tuple(range(x.ndim - 1))
    y = np.full(x.shape, np.nan)
    for d in np.unique(domain):
        own = domain == d
        y[own] = batch_norm(x[own], scale[d], bias[d], axes, mask[own], epsilon)
    return y
