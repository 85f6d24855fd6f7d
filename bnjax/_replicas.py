"""Collectives over named axes, the same in shard_map, pmap and vmap.

Under shard_map(check_vma=True) a value is typed by the mesh axes that it varies
over. There a gathered value must be requested as invarying, and a value that does
not vary yet must be cast before it is summed. Under pmap, vmap and
shard_map(check_vma=False) nothing is typed, and both are errors.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def varying(x) -> frozenset:
    """The mesh axes that `x` is typed to vary over; empty where nothing is typed."""
    return jax.typeof(x).manual_axis_type.varying


def pvary_like(reference, x):
    """Marks `x` as varying over the mesh axes that `reference` varies over."""
    return _cast(x, varying(reference))


def pvary_together(*values):
    """Marks each value as varying over every mesh axis that one of them varies over."""
    axes = frozenset().union(*map(varying, values))
    return [_cast(value, axes) for value in values]


def may_span_devices(x: jax.Array) -> bool:
    """Returns whether `x` may lie on several devices, as far as its type tells."""
    return bool(varying(x)) or jax.typeof(x).sharding.mesh.size > 1


def may_be_sharded_by_jit(x: jax.Array) -> bool:
    """Whether jit may have split `x`, so that each sum of it is communicated."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_types, mesh.axis_sizes)
    return any(kind != AxisType.Manual and size > 1 for kind, size in kinds)


def axis_size(axis_name: AxisName) -> int:
    """How many replicas the named axis, or tuple of axes, has."""
    return math.prod(lax.axis_size(name) for name in _names(axis_name))


def all_sum(x: jax.Array, axis_name: AxisName | None, groups: Groups | None = None):
    """Sums `x` over the replicas, or over those of this replica's group."""
    if axis_name is None:
        return x
    if groups is None:
        return lax.psum(_cast(x, _typed(axis_name)), axis_name)
    return _zero_other_groups(_all_gather(x, axis_name), axis_name, groups).sum(0)


def num_shards(x: jax.Array, axis: int) -> int:
    """Returns into how many shards Explicit mesh axes split `x` along `axis`."""
    sharding = jax.typeof(x).sharding
    names = _names(sharding.spec[axis] or ())
    return math.prod(sharding.mesh.shape[name] for name in names)


def packed_sum(values, axis_name: AxisName | None, groups: Groups | None = None):
    """The sums of several arrays over the replicas, in one collective."""
    vector, unpack = pack(values)
    return unpack(all_sum(vector, axis_name, groups))


def packed_group_sums(values, axis_name: AxisName | None, groups: Groups | None):
    """The sums of several arrays over the replicas, in one collective.

    With `groups` each has a leading axis: the sums of every group, the same on all
    replicas. Never differentiated (jax-ml/jax transposes `to="invarying"` wrongly
    outside a typed shard_map before 0.12).
    """
    if axis_name is None:
        return list(values)
    if groups is None:
        return packed_sum(values, axis_name)
    vector, unpack = pack(values)
    rows = _all_gather(vector, axis_name, invarying=True)
    members = _groups_of(rows.shape[0], groups) == np.arange(len(groups))[:, None]
    sums = jnp.where(members[..., None], rows[None], jnp.zeros_like(rows[None])).sum(1)
    return jax.vmap(unpack)(sums)


def packed_rows(values, axis_name: AxisName):
    """Each array of every replica, along a leading axis, in one collective.

    The same on all replicas. Never differentiated: see `packed_group_sums`.
    """
    vector, unpack = pack(values)
    return jax.vmap(unpack)(_all_gather(vector, axis_name, invarying=True))


def zero_other_groups(rows: jax.Array, axis_name: AxisName, groups: Groups | None):
    """The rows of replicas, with those of other groups set to zero."""
    return rows if groups is None else _zero_other_groups(rows, axis_name, groups)


def select_own_group(rows, axis_name: AxisName | None, groups: Groups | None):
    """From each array with a row for every group, the row of this replica's group."""
    if groups is None or axis_name is None:
        return list(rows)
    group_index = _at_this_replica(_groups_of(axis_size(axis_name), groups), axis_name)
    return [lax.dynamic_index_in_dim(row, group_index, keepdims=False) for row in rows]


def group_sizes(axis_name: AxisName | None, groups: Groups | None, dtype):
    """How many replicas sum together: (), or (group,) where there are groups."""
    if axis_name is None:
        return jnp.ones((), dtype)
    sizes = axis_size(axis_name) if groups is None else [len(g) for g in groups]
    return jnp.asarray(sizes, dtype)


def replicated(x: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether `x` is known to be the same on every replica."""
    if axis_name is None:
        return True
    typed = _typed(axis_name)
    return typed == frozenset(_names(axis_name)) and not varying(x) & typed


def pack(values):
    """Concatenates the arrays into one real vector, for one collective.

    Returns (vector, unpack); `unpack(vector)` returns the list of arrays.
    """
    parts = []
    for value in values:
        parts += [value.real, value.imag] if jnp.iscomplexobj(value) else [value]
    ends = list(itertools.accumulate((part.size for part in parts), initial=0))

    def unpack(vector):
        split = iter(
            vector[start:end].reshape(part.shape)
            for part, start, end in zip(parts, ends, ends[1:], strict=False)
        )
        return [
            lax.complex(next(split), next(split))
            if jnp.iscomplexobj(value)
            else next(split)
            for value in values
        ]

    return jnp.concatenate([part.ravel() for part in parts]), unpack


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _all_gather(x: jax.Array, axis_name: AxisName, invarying: bool = False):
    typed = _typed(axis_name)
    to = "invarying" if invarying and typed else "varying"
    x = _cast(x, typed)
    if frozenset(_names(axis_name)) <= frozenset(
        jax.sharding.get_abstract_mesh().axis_names
    ):
        return lax.all_gather(x, axis_name, to=to)
    rows = x  # axes of vmap: JAX gathers over one at a time
    for name in reversed(_names(axis_name)):
        rows = lax.all_gather(rows, name)
    return rows.reshape(-1, *x.shape)


def _typed(axis_name: AxisName) -> frozenset:
    """The named axes that values are typed by here: empty in pmap and vmap."""
    return varying(lax.axis_index(axis_name)) & frozenset(_names(axis_name))


def _cast(x, axes: frozenset):
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _zero_other_groups(rows: jax.Array, axis_name: AxisName, groups: Groups):
    """`rows` with every row of another group set to zero (not multiplied: NaN)."""
    group_of = _groups_of(rows.shape[0], groups)
    group_index = _at_this_replica(group_of, axis_name)
    in_group = (group_of == group_index).reshape((-1,) + (1,) * (rows.ndim - 1))
    return jnp.where(in_group, rows, jnp.zeros_like(rows))


def _groups_of(replicas: int, groups: Groups) -> np.ndarray:
    """The number of each replica's group."""
    group_of = np.zeros(replicas, np.int32)
    for number, members in enumerate(groups):
        group_of[list(members)] = number
    return group_of


def _at_this_replica(values: np.ndarray, axis_name: AxisName) -> jax.Array:
    """The value of this replica, of values that have one for each."""
    return jnp.asarray(values)[lax.axis_index(axis_name)]
