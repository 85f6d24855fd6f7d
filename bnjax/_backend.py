"""What the compiler has to be told, per platform. Below the derivative rules."""

import functools
import sys

import jax
import jax.numpy as jnp
from jax import lax

# "plain" is arithmetic alone, without derivatives of its own: for transformations that
# know none, such as jax.experimental.jet.
PLAIN = "plain"
IMPLEMENTATIONS = (None, "xla", "reread", "subsample", PLAIN)


def chosen(implementation: str | None, *values) -> str | None:
    """The implementation; where None is given to Taylor mode, the plain one."""
    jet = sys.modules.get("jax.experimental.jet")
    taylor = jet is not None and any(isinstance(v, jet.JetTracer) for v in values)
    return PLAIN if implementation is None and taylor else implementation


def on_cpu(implementation: str | None, cpu, default):
    """`cpu` where the compiler is told what to do, `default` elsewhere."""

    def choose(*args):
        if implementation is not None:
            return cpu(*args) if implementation == "reread" else default(*args)
        return lax.platform_dependent(*args, cpu=cpu, default=default)

    return choose


def by_platform(implementation: str | None, function):
    """`function(implementation)`; for None, that of the platform compiled for."""

    def choose(*args):
        if implementation is not None:
            return function(implementation)(*args)
        gpu = function("subsample")
        return lax.platform_dependent(
            *args, cpu=function("reread"), cuda=gpu, rocm=gpu, default=function("xla")
        )

    return choose


def reread(storage, implementation: str | None, x: jax.Array, *vectors: jax.Array):
    """The identity; on a CPU, a fresh read of what `x` was widened from.

    XLA:CPU writes a value that several reductions share to memory: the widened copy of
    a bfloat16 input, and even the broadcast of a per-feature vector. Each user that
    narrows to the `storage` dtype, fences, and widens again reads the stored input
    instead (narrowing a widened value is exact, and XLA removes the pair). Elsewhere
    all users share one fusion, and a fence would only part them.
    """
    if implementation == PLAIN:
        return (x, *vectors)
    return _reread(storage, implementation, x, *vectors)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _reread(storage, implementation: str | None, x: jax.Array, *vectors: jax.Array):
    return _fence(storage, implementation, x, *vectors)


@_reread.defjvp
def _(storage, implementation, primals, tangents):
    return _reread(storage, implementation, *primals), tuple(tangents)


def reread_cotangent(storage, implementation: str | None, tangent: jax.Array):
    """The identity on a tangent; its transpose reads the cotangent again, as `reread`.

    Only for a cotangent that was widened from `storage`. A tangent is rounded to it.
    """
    if tangent.dtype == storage:
        return tangent
    return _fence(storage, implementation, tangent)[0]


def rounded(y: jax.Array, implementation: str | None) -> jax.Array:
    """The identity, on a value that really has the precision of its dtype.

    XLA lets a user that widens `y` again have what was there before the rounding. A GPU
    may then write, and store for the backward pass, a float32 copy beside `y`. A TPU
    fuses two results of the same inputs, such as y and dx, only if both end alike.
    """
    wide = jnp.iscomplexobj(y) or jnp.finfo(y.dtype).bits >= 32
    return y if wide or implementation == PLAIN else _rounded(y, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(y: jax.Array, implementation: str | None) -> jax.Array:
    return on_cpu(implementation, _unchanged, _round)(y)


@_rounded.defjvp
def _(implementation, primals, tangents):
    return _rounded(*primals, implementation), tangents[0]


def round_cotangent(y: jax.Array, dtype, implementation: str | None) -> jax.Array:
    """The identity on `y`; its cotangent is `rounded` to a narrower dtype, and widened.

    For a cotangent that is written in that dtype: all users read what was written.
    """
    return y if implementation == PLAIN else _round_cotangent(y, dtype, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _round_cotangent(y: jax.Array, dtype, implementation: str | None) -> jax.Array:
    return y


@_round_cotangent.defjvp
def _(dtype, implementation, primals, tangents):
    def rounding(t):
        return _round(t.astype(dtype)).astype(t.dtype)

    (y,), (tangent,) = primals, tangents
    if tangent.dtype != dtype and not jnp.iscomplexobj(tangent):
        tangent = on_cpu(implementation, _unchanged, rounding)(tangent)
    return _round_cotangent(y, dtype, implementation), tangent


def _unchanged(y: jax.Array) -> jax.Array:
    return y


def _round(y: jax.Array) -> jax.Array:
    """The identity, which XLA does not see through: a rounding to the dtype of `y`."""
    info = jnp.finfo(y.dtype)
    return lax.reduce_precision(y, info.nexp, info.nmant)


def _fence(storage, implementation: str | None, x: jax.Array, *vectors: jax.Array):
    """The values, as the implementation has them: fenced, or left to XLA."""
    if jnp.iscomplexobj(x):
        storage = x.dtype  # a real input made complex cannot be narrowed

    def fenced(x, *vectors):
        narrow, *vectors = lax.optimization_barrier((x.astype(storage), *vectors))
        return (narrow.astype(x.dtype), *vectors)

    def shared(*values):
        return values

    return on_cpu(implementation, fenced, shared)(x, *vectors)
