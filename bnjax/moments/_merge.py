"""The merge of many moments at once: those of replicas, or of parts of an array."""

import jax
import jax.numpy as jnp

from bnjax import _replicas
from bnjax.moments._value import (
    Moments,
    abs_product,
    beside,
    coarse,
    displaced,
    mean_of,
)

# Up to this many replicas their moments are gathered in one collective, beyond it
# summed in two.
GATHER_LIMIT = 64


def merge_replicas(
    local: Moments, rest: jax.Array, axis_name, groups
) -> tuple[Moments, jax.Array]:
    """The merge of every replica's moments: one collective, or two beyond 64."""
    values = (*local, rest)
    if groups is None and _replicas.axis_size(axis_name) > GATHER_LIMIT:
        return _merge(values, lambda *v: _replicas.packed_sum(v, axis_name))
    vector, unpack = _replicas.pack(values)
    rows = jax.vmap(unpack)(_replicas.gather(vector, axis_name, groups))
    return merge_rows(*rows)


def merge_rows(*rows: jax.Array) -> tuple[Moments, jax.Array]:
    """The merge of (count, mean, m2, rest), each with a row for each set of values."""
    merged, rest = _merge(rows, lambda *v: [each.sum(0, keepdims=True) for each in v])
    return Moments._make(value[0] for value in merged), rest[0]


def _merge(each, total) -> tuple[Moments, jax.Array]:
    """The merge of many (count, mean, m2, rest) at once; `total` sums over them.

    The mean is corrected by the mean deviation from its first estimate, because that
    is rounded at the magnitude of the mean, not of the deviation.
    """
    counts, means, m2s, rests = each
    weight = beside(counts, means)
    count, summed = total(counts, weight * means)
    estimate = coarse(mean_of(summed, count))
    d = (means - estimate) + rests
    summed, m2 = total(weight * d, m2s + abs_product(d, weight * d))
    delta = mean_of(summed, count)
    mean, rest = displaced(estimate, delta)
    m2 = jnp.maximum(m2 - abs_product(summed, delta), 0)
    return Moments(count, mean, m2), rest
