"""(x - mean) / sqrt(var + epsilon) * scale + bias, and its derivative."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _axes, _backend, _checks, _dtypes, _replicas
from bnjax.moments import is_zero


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


def affine_spec(
    x, parameters, *, axis, dtype, activation, implementation
) -> AffineSpec:
    """The checked static description of the normalization of `x`."""
    _checks.activation(activation)
    _checks.implementation(implementation, _backend.IMPLEMENTATIONS)
    if dtype is None:
        given = map(_checks.parameter, ("scale", "bias"), parameters)
        output = _dtypes.promote(x, *(p for p in given if p is not None))
    else:
        output = _checks.output_dtype(dtype)
    compute = _dtypes.statistics_dtype(x.dtype, output)
    cotangent = output if activation is None else compute
    axes = _axes.canonical(axis, x.ndim)
    return AffineSpec(axes, x.dtype, compute, output, cotangent, implementation)


def feature_vectors(
    x, axis, spec: AffineSpec, leading: tuple[int, ...] = (), **given
) -> tuple[jax.Array, ...]:
    """The values given by name, checked, in their order; the default for None.

    Each is of shape (*leading, feature).
    """
    shape = leading + _axes.sizes(x.shape, spec.feature_axes)
    default = {"mean": 0, "var": 1, "scale": 1, "bias": 0, "shift": 0}
    vectors = []
    for name, value in given.items():
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


# The derivative, in the symbols of the module's docstring. Only A and B meet the axes
# that the replicas vary over; stacked and cast once, they transpose to one collective.


def affine(x, mean, var, scale, bias, spec: AffineSpec):
    """(x - mean) / sqrt(var) * scale + bias; epsilon is in `var` already."""
    plain = spec.implementation == _backend.PLAIN
    return (_value if plain else _affine)(x, mean, var, scale, bias, spec)


def _value(x, mean, var, scale, bias, spec: AffineSpec):
    a = lax.rsqrt(var).astype(spec.compute) * scale
    x, mean, a, bias = _reread_operands(spec, x, mean, a, bias)
    return (x - mean) * a + bias


_affine = jax.custom_jvp(_value, nondiff_argnums=(5,))


@functools.partial(_affine.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    x, mean, var, scale, _ = primals
    y = _affine(*primals, spec)
    rstd = lax.rsqrt(var).astype(spec.compute)
    a = rstd * scale
    dx, dmean, dvar, dscale, dbias = (None if is_zero(t) else t for t in tangents)
    slope = _add_tangents(
        dscale, None if dvar is None else a * rstd * dvar.astype(a.dtype) / -2
    )
    offset = _add_tangents(dbias, None if dmean is None else -a * dmean)
    slope, offset = _pvary_like(x, slope, offset)

    x, mean, rstd, a = _reread_operands(spec, x, mean, rstd, a)
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
    given = [v for v in vectors if v is not None]
    if not given or not _replicas.may_span_devices(x):
        return list(vectors)
    cast = iter(_replicas.pvary_like(x, jnp.stack(given)))
    return [None if v is None else next(cast) for v in vectors]


def _reread_operands(spec: AffineSpec, x, *vectors):
    """`x`, to be read again, and the per-feature vectors in its rank."""
    values = _replicas.pvary_together(x, *vectors)
    x, *vectors = _backend.reread(spec.storage, spec.implementation, *values)
    return x, *(_axes.expand(v, spec.feature_axes, x.ndim) for v in vectors)
