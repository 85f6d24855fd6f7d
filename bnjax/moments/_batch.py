"""The moments of one batch, from sums about a shift that is near the mean.

    s1 = sum d,   s2 = sum |d|^2,   d = x - shift        (valid values, by weight)
    mean = shift + s1/n,   m2 = s2 - |s1|^2/n

Where it can, the shift is known before `x` is: the running mean of the layer, or 0.
Then

* a compiler can take the sums where `x` is produced. On a TPU they become part of the
  convolution, while its output is still on the chip: no read of `x` at all. A shift
  taken from `x` would prevent that, and cost a read in every layer;
* replicas that know the same shift exchange plain sums, 2C numbers in one collective.

The variance loses a factor of 1 + (mean - shift)^2/var in precision. Where that is too
much for a feature, `x` is read again: for its mean, then for the sums about the mean.
Means within 3 standard deviations of the shift never need that. All replicas decide
from the same sums, so they take the same branch of the condition.

What differs by platform:

    TPU   as above: a branch that is not taken costs nothing.
    CPU   the first sums are about 0: they take two thirds of the time of shifted sums,
          and give the mean for the second pass.
    GPU   the host would have to wait for the condition. Convolutions are kernels of
          their own, so nothing is lost by a shift taken from `x`: the mean of a
          subsample, which is near enough to the mean whatever the data. Only where
          several GPUs need a shift in common, it is as on a TPU.

References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
section 3 (shifted data).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from bnjax import _axes, _backend, _checks, _replicas
from bnjax.moments._masks import (
    count_valid,
    gradient_mask,
    is_weighted,
    multiply_by_weights,
    zero_where_masked,
)
from bnjax.moments._moments import (
    Moments,
    abs_product,
    broadcast_count,
    drop_last_bit,
    fast_two_sum,
    mean_from_sum,
)

# The first sums are used where (mean - shift)^2 <= _MAX_SHIFT_SQUARED var: the variance
# is then right to 4e-6. A shift within _NEAR |mean| of the mean is accepted as well:
# float32 resolves no better, and a constant feature would fail the first test.
_MAX_SHIFT_SQUARED = 9


_NEAR = 3e-5


# The shift on a GPU is the mean of one value in this many; of four values at least.
_SUBSAMPLE, _FEWEST = 32, 4


# The name under which a checkpoint policy saves the moments; see `normalize`.
CHECKPOINT_NAME = "bnjax_moments"


SumsAbout = Callable[[jax.Array | None], tuple[jax.Array, jax.Array]]


class ReductionSpec(NamedTuple):
    """What is reduced, and over which replicas; static.

    Attributes:
        axes: the axes to reduce, ascending.
        storage: the dtype that the input had before it was widened.
        axis_name: the named axis or axes to merge over, bound; or None.
        groups: a partition of the named axis, or None.
        implementation: see `batch_norm`.
        local: whether to assume that each sum stays on one device, as those of groups
            of examples. Where that is wrong, it costs communication only.
    """

    axes: tuple[int, ...]
    storage: jnp.dtype
    axis_name: str | tuple[str, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    implementation: str | None = None
    local: bool = False


def reduction_spec(
    x, axis, axis_name=None, groups=None, implementation=None
) -> ReductionSpec:
    """The static description of a reduction of `x`; checks all but `implementation`."""
    feature_axes = _axes.canonical(axis, x.ndim)
    axis_name = _checks.axis_name(axis_name)
    size = 1 if axis_name is None else _replicas.axis_size(axis_name)
    groups = _checks.groups(groups, axis_name, size)
    axes = _axes.complement(feature_axes, x.ndim)
    return ReductionSpec(axes, x.dtype, axis_name, groups, implementation)


def compute_moments(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: ReductionSpec
) -> tuple[Moments, jax.Array]:
    """Returns the Moments of `x` over all replicas, and the rounding error of the mean.

    Differentiable. The error, (feature,), is the exact mean minus the returned one. It
    reaches 1e-3 standard deviations at |mean|/std = 1e4. A merge needs it for the
    distances between the means.

    Args:
        x: (batch, *spatial, feature), at least float32.
        mask: see `mask_with_weights`; None if all values count.
        shift: (feature,), a guess of the mean; see the module. None for 0.
        spec: what is reduced.
    """
    if spec.implementation == _backend.PLAIN:
        batch = _two_pass(x, mask, spec)
        return batch, jnp.zeros_like(batch.mean)
    return batch_moments(x, mask, shift, spec)


#
# jit keeps the trace, so that value and derivative share it. A second trace would cost
# a fifth of the time that a layer needs to be traced.


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3, inline=True)
def batch_moments(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    spec: ReductionSpec,
) -> tuple[Moments, jax.Array]:
    """Carries the derivative rule of `compute_moments`; chooses by platform."""
    features = _axes.complement(spec.axes, x.ndim)
    zero = jnp.zeros(_axes.sizes(x.shape, features), x.dtype)
    shift = common_shift(shift, spec.axis_name, zero)

    count = count_valid(x, mask, spec.axes)
    if spec.axis_name is None:
        # JAX batches a condition in a typed shard_map only if all that its branches use
        # varies over the same axes.
        if mask is None:
            x, shift = _replicas.pvary_together(x, shift)
        else:
            x, shift, mask = _replicas.pvary_together(x, shift, mask)
    sharded = _replicas.may_be_sharded_by_jit(x)
    local = _is_local(x, spec)

    def moments_for(implementation):
        platform_spec = spec._replace(implementation=implementation)
        if spec.axis_name is not None:
            return functools.partial(_moments_by_shift, spec=platform_spec)
        # The condition of the other functions would need a collective if x is sharded,
        # even where each sum stays on one device.
        if local if sharded else implementation == "subsample":
            return functools.partial(_moments_by_subsample, spec=platform_spec)
        return functools.partial(_moments_by_shift_vmappable, spec=platform_spec)

    compute = _backend.by_platform(spec.implementation, moments_for)
    return compute(x, mask, shift, count)


@functools.partial(batch_moments.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    # Named here: a checkpoint policy does not see names inside a jitted call.
    result, mean_error = jax.tree.map(name_for_remat, batch_moments(*primals, spec))
    sums = tangent_sums(x, mask, result.mean, dx, dw, spec)
    spans_devices = spec.axis_name is not None or _replicas.may_span_devices(x)
    change = moments_tangent(result, sums, spec.axis_name, spec.groups, spans_devices)
    return (result, mean_error), (change, jnp.zeros_like(mean_error))


def tangent_sums(x, mask, mean, dx, dw, spec: ReductionSpec):
    """Returns this replica's sums for the tangent, with c = x - mean.

    (sum w dx + dw c, sum conj(c) (w dx + dw c / 2), sum dw). The 1/2 cancels the factor
    2 in dm2. The third is None if the weights have no tangent.
    """
    c, where = deviation_for_gradient(x, mask, mean, spec)
    dx = _axes.split_like(x, jnp.zeros_like(x)) if is_zero(dx) else dx
    first = multiply_by_weights(zero_where_masked(dx, where), mask)
    second = jnp.conj(c) * first
    dn = None
    if is_weighted(mask) and not is_zero(dw):
        by_weight = c * dw.astype(c.dtype)
        first, second = first + by_weight, second + jnp.conj(c) * by_weight / 2
        dn = count_valid(x, dw, spec.axes)
    return first.sum(spec.axes), second.sum(spec.axes), dn


def moments_tangent(
    result: Moments, sums, axis_name, groups, spans_devices: bool
) -> Moments:
    """Returns the tangent of the Moments, summed over replicas in one collective."""
    *sums, dn = sums
    if dn is not None and axis_name is not None:
        *sums, dn = _replicas.packed_sum((*sums, dn), axis_name, groups)
    elif spans_devices:  # one array: under jit XLA then sends one all-reduce
        sums = _replicas.all_sum(jnp.stack(sums), axis_name, groups)
    dmean, dm2 = mean_from_sum(sums[0], result.count), 2 * sums[1].real
    if dn is None:
        return Moments(jnp.zeros_like(result.count), dmean, dm2)
    # The mean and m2 of an empty batch are the constant 0.
    seen = broadcast_count(result.count, result.m2) > 0
    dmean, dm2 = (_axes.where(seen, v, jnp.zeros((), v.dtype)) for v in (dmean, dm2))
    return Moments(dn, dmean, dm2)


def is_zero(tangent) -> bool:
    """Returns whether a tangent is a symbolic zero."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def name_for_remat(value: jax.Array) -> jax.Array:
    """Returns `value`, under the name that the checkpoint policy saves."""
    if jnp.iscomplexobj(value):  # jax.checkpoint keeps no complex value
        return lax.complex(name_for_remat(value.real), name_for_remat(value.imag))
    return checkpoint_name(value, CHECKPOINT_NAME)


def _two_pass(x: jax.Array, mask: jax.Array | None, spec: ReductionSpec) -> Moments:
    """The two passes of the definition, without derivative rules of their own."""
    total = multiply_by_weights(zero_where_masked(x, mask), mask).sum(spec.axes)
    sums = count_valid(x, mask, spec.axes), total
    if spec.axis_name is not None:
        sums = _replicas.packed_sum(sums, spec.axis_name, spec.groups)
    count, mean = sums[0], mean_from_sum(sums[1], sums[0])
    d, _ = deviation_for_gradient(x, mask, mean, spec)
    m2 = abs_product(d, multiply_by_weights(d, mask)).sum(spec.axes)
    return Moments(count, mean, _replicas.all_sum(m2, spec.axis_name, spec.groups))


def _moments_by_subsample(x, mask, shift, count, spec: ReductionSpec):
    """Returns the Moments from sums about the mean of a subsample."""
    shift = _subsample_mean(x, mask, spec)
    return moments_from_sums(count, shift, *sums_about(x, mask, shift, spec))


def _subsample_mean(
    x: jax.Array, mask: jax.Array | None, spec: ReductionSpec
) -> jax.Array:
    """The mean of a fixed subsample: near enough to the mean, whatever the data.

    By Cauchy-Schwarz the mean over any K of N values lies within sqrt(N/K) standard
    deviations of the mean of all, outliers or not:
        (mean_K - mean)^2 <= (1/K) sum_K (x - mean)^2 <= (N/K) var
    so the shifted sums lose at most a factor 1 + N/K of precision. Along an axis that
    the mask varies by, of each N/K adjacent values the one of the largest weight is
    taken: so the bound holds among the valid, by weight.
    `x` is narrowed to its stored dtype before it is sliced, because a compiler may
    write the operand of a slice to memory. Masked axes come last, because their values
    are gathered, not sliced; the batch comes after the spatial axes, because it is
    split over devices more often.
    """
    axes, dtype = spec.axes, x.dtype
    x = x if jnp.iscomplexobj(x) else x.astype(spec.storage)
    values = math.prod(x.shape[a] for a in axes)
    stride = _SUBSAMPLE  # how many times smaller the subsample must still become
    if isinstance(values, int):
        stride = min(stride, max(values // _FEWEST, 1))
    masked = [a for a in axes if mask is not None and mask.shape[a] != 1]
    for a in [a for a in axes[1:] + axes[:1] if a not in masked] + masked:
        size = x.shape[a]
        if stride == 1 or _replicas.num_shards(x, a) > 1:
            continue
        if a not in masked:
            x = lax.slice_in_dim(x, 0, size, stride=stride, axis=a)
        elif mask is not None and isinstance(size, int):
            x, mask = _one_in(stride, x, mask, a)
        else:
            continue
        stride = max(stride // max(size, 1), 1) if isinstance(size, int) else 1
    total = multiply_by_weights(zero_where_masked(x.astype(dtype), mask), mask).sum(
        axes
    )
    return drop_last_bit(mean_from_sum(total, count_valid(x.astype(dtype), mask, axes)))


def _one_in(
    number: int, x: jax.Array, mask: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Of each `number` values along the axis, the one of the largest weight; the mask.

    A boolean mask weighs 0 and 1.
    """
    size = x.shape[axis]
    padding = [(0, -size % number if a == axis else 0) for a in range(mask.ndim)]
    shape = list(mask.shape)
    shape[axis : axis + 1] = [-1, number]
    blocks = jnp.pad(mask, padding).reshape(shape)
    chosen = blocks.argmax(axis + 1)
    starts = jnp.arange(chosen.shape[axis], dtype=chosen.dtype) * number
    chosen = chosen + _axes.expand(starts, (axis,), mask.ndim)
    x = jnp.take_along_axis(x, chosen, axis, mode="promise_in_bounds")
    return x, blocks.max(axis + 1)


def _moments_by_shift_vmappable(x, mask, shift, count, spec: ReductionSpec):
    """As `_moments_by_shift`; under vmap all batches share one condition.

    A condition for each batch would become a select, which computes both branches.
    """

    @jax.custom_batching.custom_vmap
    def one_batch(x, mask, shift, count):
        (_, mean, m2), mean_error = _moments_by_shift(x, mask, shift, count, spec)
        return mean, m2, mean_error

    @one_batch.def_vmap
    def _(size, batched, x, mask, shift, count):
        axes = jax.tree.map(lambda along: 0 if along else None, batched)
        (_, mean, m2), mean_error = _moments_by_shift(
            x, mask, shift, count, spec, size, axes
        )
        return (mean, m2, mean_error), (True, True, True)

    mean, m2, mean_error = one_batch(x, mask, shift, count)
    return Moments(count, mean, m2), mean_error


def _moments_by_shift(
    x,
    mask,
    shift,
    count,
    spec: ReductionSpec,
    vmap_size: int | None = None,
    vmap_axes=(),
) -> tuple[Moments, jax.Array]:
    """Returns the Moments; under vmap, those of `vmap_size` batches.

    `vmap_axes` has 0 or None for each of x, mask, shift and count.
    """

    def vmapped(function, *axes):
        if vmap_size is None:
            return function
        return jax.vmap(function, axes, axis_size=vmap_size)

    # The condition is given x as it is stored, not a widened copy.
    stored = x if jnp.iscomplexobj(x) else x.astype(spec.storage)
    dtype = x.dtype

    def sums(centre):
        def of_one(stored, mask, centre):
            return sums_about(stored.astype(dtype), mask, centre, spec)

        along = None if centre is None else 0
        return vmapped(of_one, *vmap_axes[:2], along)(stored, mask, centre)

    def first_sums(x, mask, shift):
        if spec.implementation == "reread":
            return jnp.zeros_like(shift), *sums_about(x, mask, None, spec)
        return shift, *sums_about(x, mask, shift, spec)

    if vmap_size is not None and vmap_axes[3] is None:
        count = jnp.broadcast_to(count, (vmap_size, *count.shape))
    return moments_with_retry(
        sums,
        count,
        vmapped(first_sums, *vmap_axes[:3])(x, mask, shift),
        spec.axis_name,
        spec.groups,
        spec.implementation,
        same_count=mask is None,
    )


def moments_with_retry(
    sums: SumsAbout,
    count: jax.Array,
    first: tuple[jax.Array, jax.Array, jax.Array],
    axis_name: _replicas.AxisName | None,
    groups: _replicas.Groups | None,
    implementation: str | None,
    *,
    same_count: bool = False,
) -> tuple[Moments, jax.Array]:
    """Returns the Moments from the first sums, or from a second pass about the mean.

    The second pass is for shifts that are too far from the mean.

    Args:
        sums: (centre) -> this replica's sum d and sum |d|^2 about it; None for 0.
        count: this replica's.
        first: a centre that is the same on every replica, and the sums about it.
        axis_name: of the replicas to sum over, or None.
        groups: a partition of that axis, or None.
        implementation: see `batch_norm`.
        same_count: whether every replica has that count, so that none is sent.
    """

    def group_sums(*values):  # a row for each group of replicas, if there are groups
        return _replicas.packed_group_sums(values, axis_name, groups)

    def select_own(*rows):
        return _replicas.select_own_group(rows, axis_name, groups)

    centre, s1, s2 = first
    centre = _axes.split_like(s1, centre)
    if same_count:
        s1, s2 = group_sums(s1, s2)
        count = count * _replicas.group_sizes(axis_name, groups, count.dtype)
    else:
        count, s1, s2 = group_sums(count, s1, s2)
    # All groups decide together: the collectives of the branch are of all replicas.
    near_enough = _centre_is_near_enough(count, s1, s2, centre)
    count, s1, s2 = select_own(count, s1, s2)
    varying_count = _replicas.pvary_like(s1, count)

    def keep_first_sums():
        return _replicas.pvary_together(centre, s1, s2)

    def recompute_about_mean():
        total = s1  # about 0 on a CPU
        if implementation != "reread":
            (total,) = select_own(*group_sums(sums(None)[0]))
        mean = drop_last_bit(mean_from_sum(total, varying_count))
        return [mean, *select_own(*group_sums(*sums(mean)))]

    def finish(values):
        (_, mean, m2), mean_error = moments_from_sums(varying_count, *values)
        return mean, m2, mean_error

    # On a CPU the Moments are finished inside the branches: outside of them XLA:CPU
    # would compute the mean again for each value. Elsewhere they are finished outside:
    # the first branch then returns its operands, and a GPU need not compute both.
    if implementation == "reread":
        mean, m2, mean_error = lax.cond(
            near_enough,
            lambda: finish(keep_first_sums()),
            lambda: finish(recompute_about_mean()),
        )
    else:
        mean, m2, mean_error = finish(
            lax.cond(near_enough, keep_first_sums, recompute_about_mean)
        )
    return Moments(count, mean, m2), mean_error


def moments_from_sums(count, centre, s1, s2) -> tuple[Moments, jax.Array]:
    """Returns the Moments and the rounding error of the mean.

    From s1 = sum d and s2 = sum |d|^2, where d = x - centre. An empty set has mean 0,
    for any centre.
    """
    centre = centre * broadcast_count(count > 0, centre)
    delta = mean_from_sum(s1, count)
    mean, mean_error = fast_two_sum(centre, delta)
    m2 = jnp.maximum(s2 - abs_product(s1, delta), 0)
    return Moments(count, mean, m2), mean_error


def _centre_is_near_enough(count, s1, s2, centre) -> jax.Array:
    """Returns whether the first sums are accurate enough for every feature.

    A feature that is not finite counts as accurate: a second pass would not help.
    """
    delta = mean_from_sum(s1, count)
    square = abs_product(s1, delta)
    mean = jnp.broadcast_to(centre, delta.shape) + delta
    near = jnp.abs(delta) <= _NEAR * jnp.abs(mean)
    exact = (square <= _MAX_SHIFT_SQUARED * (s2 - square)) | near | ~jnp.isfinite(delta)
    return jnp.all(exact)


def common_shift(shift, axis_name, zero: jax.Array) -> jax.Array:
    """Returns the shift, 0 where it is not finite, or 0 if replicas may differ in it.

    Only shard_map(check_vma=True) tells that a value is the same on every replica.
    """
    if shift is None or not _replicas.replicated(shift, axis_name):
        return zero
    if jnp.iscomplexobj(shift) and not jnp.iscomplexobj(zero):
        shift = shift.real
    return jnp.where(jnp.isfinite(shift), shift.astype(zero.dtype), zero)


def _is_local(x: jax.Array, spec: ReductionSpec) -> bool:
    """Returns whether every sum is known to stay on one device."""
    kinds = set(jax.typeof(x).sharding.mesh.axis_types)
    typed = kinds == {AxisType.Explicit}
    split = any(_replicas.num_shards(x, a) > 1 for a in spec.axes)
    return spec.local or (typed and not split)


def sums_about(
    x: jax.Array,
    mask: jax.Array | None,
    centre: jax.Array | None,
    spec: ReductionSpec,
) -> tuple[jax.Array, jax.Array]:
    """sum w d and sum w |d|^2 over the valid values, d = x - centre; None for 0."""
    first = _reread_x_and_centre(x, centre, spec)
    again = _reread_x_and_centre(*first, spec)
    values = multiply_by_weights(deviation(*first, mask, spec), mask)
    d = deviation(*again, mask, spec)
    squares = abs_product(d, multiply_by_weights(d, mask))
    several_axes = x.ndim - len(spec.axes) > 1
    if spec.implementation == "subsample" and several_axes:  # compiled for a GPU
        return _sums_together(values, squares, spec.axes)
    return values.sum(spec.axes), squares.sum(spec.axes)


def _sums_together(x: jax.Array, y: jax.Array, axes: tuple[int, ...]):
    """Both sums, as one reduction.

    XLA:GPU chooses the layout of the input of a sum by that of the result, and for a
    result of (group, feature) may write a transposed float32 copy of x. It keeps the
    layout of the input of a reduction that has two results.
    """
    zeros = jnp.zeros((), x.dtype), jnp.zeros((), y.dtype)

    def add(a, b):
        return a[0] + b[0], a[1] + b[1]

    return tuple(lax.reduce((x, y), zeros, add, axes))


def deviation(
    x: jax.Array,
    centre: jax.Array | None,
    mask: jax.Array | None,
    spec: ReductionSpec,
) -> jax.Array:
    """Returns x - centre, and 0 where the mask is False.

    Masked values are set to the centre before the subtraction. Zeroing the difference
    instead can make XLA:GPU write an array as large as x.
    """
    if centre is None:
        return zero_where_masked(x, mask)
    centre = _axes.expand(centre, _axes.complement(spec.axes, x.ndim), x.ndim)
    return (x if mask is None else _axes.where(mask.astype(bool), x, centre)) - centre


def deviation_for_gradient(
    x: jax.Array, mask: jax.Array | None, mean: jax.Array, spec: ReductionSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Returns x - mean, 0 outside the gradient mask, and that mask. Reads `x` again."""
    x, centre = _reread_x_and_centre(x, mean, spec)
    where = gradient_mask(x, mask)
    return deviation(x, centre, where, spec), where


def _reread_x_and_centre(x: jax.Array, centre: jax.Array | None, spec: ReductionSpec):
    """Returns both behind a fence, so that the next sum reads `x` again on a CPU."""
    vectors = [] if centre is None else [centre]
    values = _replicas.pvary_together(x, *vectors)
    x, *vectors = _backend.reread(spec.storage, spec.implementation, *values)
    return x, vectors[0] if vectors else None
