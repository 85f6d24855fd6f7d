"""Split batch normalization: statistics of its own for each domain of a batch.

    mean_d = mean of the x_i of domain d,   var_d likewise
    y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d,    d = domain of i

All other weights are shared. Domains are given per example (clean and adversarial
images; hospitals; agents), for the whole batch, or as equal parts of it in turn.

References: Xie et al. 2019, "Adversarial Examples Improve Image Recognition" (AdvProp,
an auxiliary batch norm); Wu & Johnson 2021, section 5.2 (domain-specific statistics).
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _replicas
from bnjax.moments import (
    Moments,
    broadcast_count,
    compute_moments,
    is_weighted,
    mask_with_weights,
)
from bnjax.normalize import (
    Inputs,
    Options,
    TransformSpec,
    apply_training_transform,
    batch_axis,
    normalize,
    normalize_groups,
    normalize_with_batch_stats,
    normalize_with_stats,
)

__all__ = ["split_batch_norm", "split_moments", "split_normalize"]

_NUMBER = (
    "num_splits={value!r}: expected a positive integer, the number of domains. Write "
    "num_splits=2 for a clean and an adversarial half."
)

_PARTS = (
    "a batch of {batch} (axis {axis} of {shape}) does not fall into {splits} equal "
    "parts: expected a multiple of num_splits={splits}. Or name each example's domain: "
    "domain=jnp.array([...]) of shape ({batch},)."
)

_SHAPE = (
    "domain has shape {received}: expected () for the whole batch, or ({batch},) for "
    "one domain per example of axis {axis}. Write domain=0, or domain.reshape(-1)."
)

_INTEGER = (
    "domain has dtype {dtype}: expected integers from 0 to {last}. Write "
    "domain.astype(jnp.int32)."
)

_UNSEEN = (
    "domain holds {wrong}, but there are {splits} domains: expected integers from 0 to "
    "{last}. Raise num_splits, or map the new domain to one that has statistics."
)

_DOMAINS = (
    "{name} has shape {received}: expected {shared}, shared by all domains, or "
    "{separate}, a row for each. Write jnp.stack([{name}] * {splits})."
)


def split_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_splits: int,
    domain: ArrayLike | None = None,
    **options: Unpack[Options],
) -> tuple[jax.Array, Moments]:
    """Normalizes each example by the statistics of its own domain's examples.

        y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d

    One read of `x` for equal parts and for one domain; for domains by example the
    statistics take a read per domain.

    Args:
        x: (batch, *spatial, feature).
        scale: (feature,), shared, or (domain, feature); None for 1.
        bias: (feature,), shared, or (domain, feature); None for 0.
        num_splits: the number of domains.
        domain: integers. None: the batch is `num_splits` equal parts in turn. (): the
            domain of the whole batch. (batch,): that of each example. Traced values
            that are out of range give NaN.
        **options: those of `batch_norm`; `fallback` is (mean, var), each
            (domain, feature).

    Returns:
        y, of the shape of `x`, and the Moments, (domain, feature); count 0 for a domain
        without examples.

    Raises:
        TypeError: `domain` is not integer.
        ValueError: a batch that does not fall into equal parts, a `domain` of another
            shape or known to be out of range, and whatever `batch_norm` raises.

    >>> x = jnp.array([[1.0], [5.0], [3.0], [9.0]])
    >>> domain = jnp.array([0, 1, 0, 1])
    >>> y, moments = split_batch_norm(x, num_splits=2, domain=domain, epsilon=0.0)
    >>> print(y.ravel(), moments.mean.ravel())
    [-1. -1.  1.  1.] [2. 7.]

    References: Xie et al. 2019, section 3.3.
    """
    x = _checks.require_inexact("x", x)
    domain = _domains(x, num_splits, domain, options)
    mean, var = options.pop("fallback", None) or (None, None)
    shift = options.pop("shift", None)
    shift = mean if shift is None else shift
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias, "shift": shift}
    rows = {n: _rows(n, v, x, num_splits, options) for n, v in vectors.items()}
    if domain is None:
        y, found = normalize_groups(x, options, rows, num_splits)
        return y, found.moments
    own = rows if domain.ndim else {n: _row(v, domain) for n, v in rows.items()}
    mean, var, scale, bias, options["shift"] = own.values()
    if mean is not None and var is not None:
        options["fallback"] = mean, var
    if domain.ndim:
        leading = (num_splits,)
        return apply_training_transform(
            _normalize_each_domain, x, scale, bias, options, domain, leading=leading
        )
    y, batch = apply_training_transform(
        normalize_with_batch_stats, x, scale, bias, options
    )
    return y, jax.tree.map(lambda v: _placed(v, domain, num_splits), batch)


def split_moments(
    x: ArrayLike,
    *,
    num_splits: int,
    domain: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Moments:
    """The moments of each domain's examples.

        count_d, mean_d, m2_d of the x_i with domain d

    Args:
        x: (batch, *spatial, feature).
        num_splits: the number of domains.
        domain: see `split_batch_norm`.
        **options: `axis`, `mask`, `weights`, `axis_name` and `axis_index_groups` of
            `moments`.

    Returns:
        Moments, (domain, feature).

    Raises:
        TypeError, ValueError: as `split_batch_norm`.

    >>> x = jnp.array([[1.0], [5.0], [3.0], [9.0]])
    >>> print(split_moments(x, num_splits=2).mean.ravel())
    [3. 6.]

    References: Xie et al. 2019, section 3.3.
    """
    return split_batch_norm(x, num_splits=num_splits, domain=domain, **options)[1]


def split_normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    domain: ArrayLike = 0,
    **options: Unpack[Options],
) -> jax.Array:
    """Normalizes each example by the given statistics of its domain.

        y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d

    Args:
        x: (batch, *spatial, feature).
        mean: (domain, feature).
        var: (domain, feature), real.
        scale: (feature,), shared, or (domain, feature); None for 1.
        bias: (feature,), shared, or (domain, feature); None for 0.
        domain: integers: () for the whole batch, (batch,) by example. 0 is the main
            domain, by which AdvProp infers.
        **options: `axis`, `epsilon`, `residual`, `activation`, `dtype` and
            `implementation` of `normalize`.

    Returns:
        An array of the shape of `x`.

    Raises:
        TypeError, ValueError: as `split_batch_norm`.

    >>> mean, var = jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [4.0]])
    >>> x = jnp.array([[2.0], [2.0]])
    >>> print(split_normalize(x, mean, var, domain=[0, 1], epsilon=0.0).ravel())
    [ 2. -1.]

    References: Xie et al. 2019, section 3.3.
    """
    x = _checks.require_inexact("x", x)
    splits = jnp.shape(mean)[0]
    domain = jnp.asarray(_domains(x, splits, domain, options))
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    rows = {n: _rows(n, v, x, splits, options) for n, v in vectors.items()}
    others: Any = options  # those of `normalize`
    if domain.ndim == 0:
        own = {n: _row(v, domain) for n, v in rows.items()}
        return normalize(x, **own, **others)
    axes = _axes.canonical(options.get("axis", -1), x.ndim)
    batch = batch_axis(x, options)
    each = {n: _rows_of_examples(v, domain, axes, batch) for n, v in rows.items()}
    return normalize(x, **each, **{**others, "axis": (*axes, batch)})


def _normalize_each_domain(inputs: Inputs, spec: TransformSpec, domain: jax.Array):
    """Statistics by a mask for each domain; then each example by those of its own."""
    axes, batch = spec.affine.feature_axes, spec.reduction.axes[0]
    along = [domain.size if a == batch else 1 for a in range(inputs.x.ndim)]

    def one(number: jax.Array, shift: jax.Array) -> Moments:
        own = (domain == number).reshape(along)
        if inputs.mask is None:
            mask = own
        elif is_weighted(inputs.mask):
            mask = mask_with_weights(inputs.x, own, inputs.mask)
        else:
            mask = own & inputs.mask
        return compute_moments(inputs.x, mask, shift, spec.reduction)[0]

    numbers = jnp.arange(len(inputs.fallback_mean), dtype=domain.dtype)
    found = jax.vmap(one)(numbers, inputs.shift)
    seen = broadcast_count(found.count, found.m2) > 0
    mean = jnp.where(seen, found.mean, inputs.fallback_mean).astype(
        inputs.fallback_mean.dtype
    )
    var = jnp.where(seen, found.variance(), inputs.fallback_var)
    vectors = [
        _rows_of_examples(rows, domain, axes, batch)
        for rows in (mean, var, inputs.scale, inputs.bias)
    ]
    affine = spec.affine._replace(feature_axes=tuple(sorted((*axes, batch))))
    y = normalize_with_stats(inputs.bounded_x(), vectors, inputs.epsilon, affine)
    return y, found


def _rows_of_examples(
    rows: jax.Array | None, domain: jax.Array, axes: tuple[int, ...], batch: int
) -> Any:
    """The row of each example's domain.

    A masked sum over the domains, because its transpose is a sum and not a scatter.

    Args:
        rows: (domain, *feature), or None.
        domain: (batch,).
        axes: of the features in `x`.
        batch: the batch axis of `x`.

    Returns:
        *feature with the batch axis at its place; None for None.
    """
    if rows is None:
        return None
    own = domain[:, None] == jnp.arange(len(rows), dtype=domain.dtype)[None]
    own = own.reshape(own.shape + (1,) * (rows.ndim - 1))
    each = jnp.where(own, rows[None], jnp.zeros((), rows.dtype)).sum(1)
    each = jnp.where(own.any(1), each, jnp.full((), jnp.nan, rows.dtype))
    return jnp.moveaxis(each, 0, sum(a < batch for a in axes))


def _row(rows: jax.Array | None, domain: jax.Array) -> Any:
    """The row of one domain."""
    row = _rows_of_examples(rows, domain[None], (), 0)
    return None if row is None else row[0]


def _placed(row: jax.Array, domain: jax.Array, splits: int) -> jax.Array:
    """A row for each domain: `row` for that one, 0 for the others."""
    own = jnp.arange(splits, dtype=domain.dtype) == domain
    own = own.reshape((splits,) + (1,) * row.ndim)
    return jnp.where(own, row, jnp.zeros((), row.dtype))


def _domains(
    x: jax.Array, splits: int, domain: ArrayLike | None, options: Options
) -> jax.Array | None:
    """`domain`, checked; None where the batch is to be cut into equal parts."""
    if not isinstance(splits, int) or splits < 1:
        raise ValueError(_NUMBER.format(value=splits))
    axis = batch_axis(x, options)
    size = x.shape[axis]
    if domain is None:
        if size % splits:
            raise ValueError(
                _PARTS.format(batch=size, axis=axis, shape=x.shape, splits=splits)
            )
        if splits % _replicas.num_shards(x, axis) == 0:
            return None
        domain = jnp.repeat(jnp.arange(splits), size // splits)
        return _split_like_batch(x, domain, axis)  # parts on many devices
    if not isinstance(domain, Tracer):
        _check_known(np.asarray(domain), splits)
    domain = jnp.asarray(domain)
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise TypeError(_INTEGER.format(dtype=domain.dtype, last=splits - 1))
    if jnp.iinfo(domain.dtype).bits < 32:  # too narrow, perhaps, to number the domains
        domain = domain.astype(jnp.int32)
    if domain.shape not in ((), (size,)):
        raise ValueError(_SHAPE.format(received=domain.shape, batch=size, axis=axis))
    return _split_like_batch(x, domain, axis) if domain.ndim else domain


def _split_like_batch(x: jax.Array, domain: jax.Array, axis: int) -> jax.Array:
    """`domain`, split over Explicit mesh axes as the batch: rows stay by their `x`."""
    along = [domain.size if a == axis else 1 for a in range(x.ndim)]
    return _axes.split_like(x, domain.reshape(along)).reshape(-1)


def _check_known(domain: np.ndarray, splits: int) -> None:
    """Raises on a domain that is known, but has no statistics."""
    if domain.dtype.itemsize == 1:  # NumPy compares int4 with no number beyond it
        domain = domain.astype(int)
    wrong = sorted(set(domain[(domain < 0) | (domain >= splits)].ravel().tolist()))
    if wrong:
        message = _UNSEEN.format(wrong=wrong[:5], splits=splits, last=splits - 1)
        raise ValueError(message)


def _rows(
    name: str, value: ArrayLike | None, x: jax.Array, splits: int, options: Options
) -> jax.Array | None:
    """`value` with a row for each domain."""
    if value is None:
        return None
    value = jnp.asarray(value)
    features = _axes.sizes(x.shape, _axes.canonical(options.get("axis", -1), x.ndim))
    if value.shape not in (features, (splits, *features)):
        message = _DOMAINS.format(
            name=name,
            received=value.shape,
            shared=features,
            separate=(splits, *features),
            splits=splits,
        )
        raise ValueError(message)
    return jnp.broadcast_to(value, (splits, *features))
