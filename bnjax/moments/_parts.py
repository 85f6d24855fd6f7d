"""The moments of an array that jit may have split over devices.

The compiler sees one array: a shift for all of it would be communicated before the
sums are. So each part of the batch has a shift of its own, as each replica of a named
axis has, and the moments of the parts are merged. That takes one collective.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _axes, _replicas
from bnjax.moments import _merge
from bnjax.moments._one_pass import Reduction, one_pass
from bnjax.moments._value import Moments


def of_parts(
    x: jax.Array, mask: jax.Array | None, how: Reduction
) -> tuple[Moments, jax.Array]:
    """`one_pass` over each part that a device may hold, merged."""
    parts = {} if how.whole else _replicas.splits(x, how.axes)
    if not 1 < math.prod(parts.values()) <= _merge.GATHER_LIMIT:
        return one_pass(x, mask, how)
    local, rest = _each(x, mask, how, list(parts.items()))
    return _merge.merge_rows(*(everywhere(rows, len(parts)) for rows in (*local, rest)))


def _each(x, mask, how: Reduction, parts: list[tuple[int, int]]):
    """`one_pass` over each part; the results lead with one axis per split axis."""
    if not parts:
        return one_pass(x, mask, how)
    (axis, n), *others = parts
    along = None
    if mask is not None and mask.shape[axis] > 1:
        mask, along = _cut(_axes.split_like(x, mask), axis, n), axis
    one = jax.vmap(lambda x, mask: _each(x, mask, how, others), (axis, along))
    return one(_cut(x, axis, n), mask)


def _cut(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """`x` with `axis` as two: (parts, the rest)."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    return x.reshape(*before, parts, size // parts, *after)


def everywhere(rows: jax.Array, leading: int) -> jax.Array:
    """`rows`, its leading axes as one, on every device, however jit has split them.

    Written as a sum, because the result of a sum is split along none of its axes.
    """
    lead, rest = rows.shape[:leading], rows.shape[leading:]
    own = np.eye(math.prod(lead), dtype=bool).reshape(-1, *lead, *(1 for _ in rest))
    placed = jnp.broadcast_to(rows, (math.prod(lead), *rows.shape))
    axes = tuple(range(1, leading + 1))
    zero = jnp.zeros((), rows.dtype)
    return _axes.where(jnp.asarray(own), placed, zero).sum(axes)
