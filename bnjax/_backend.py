"""Instructions to the compiler, by platform, below the derivative rules."""

import functools
import sys

import jax
import jax.numpy as jnp
from jax import lax

# "xla" lets XLA share reads of x; "reread" has each reduction read x again, which is
# faster on a CPU; "subsample" takes the shift from x, without a condition, for GPUs.
# None chooses by platform. "plain" has no derivative rules of its own: for
# transformations that know none, such as jax.experimental.jet.
PLAIN = "plain"
IMPLEMENTATIONS = (None, "xla", "reread", "subsample", PLAIN)


def resolve_implementation(implementation: str | None, *values) -> str | None:
    """Returns the implementation; PLAIN for None if an argument is a tracer of jet."""
    jet = sys.modules.get("jax.experimental.jet")
    taylor = jet is not None and any(isinstance(v, jet.JetTracer) for v in values)
    return PLAIN if implementation is None and taylor else implementation


def select_cpu(implementation: str | None, cpu, default):
    """Selects `cpu` for "reread", or for None if compiled for a CPU; else `default`."""

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
    """Returns its arguments; on a CPU, `x` is read again from what it was widened from.

    XLA:CPU writes a value that several reductions share to memory: the widened copy of
    a bfloat16 input, and even the broadcast of a per-feature vector. Each user that
    narrows to the `storage` dtype, fences, and widens again reads the stored input
    instead (narrowing a widened value is exact, and XLA removes the pair). Elsewhere
    all users share one fusion, which a fence would split.
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
    """Returns `tangent`; on a CPU its transpose reads the cotangent again.

    See `reread`. The cotangent must have been widened from the dtype `storage`. On a
    CPU a forward-mode tangent is rounded to `storage`.
    """
    if tangent.dtype == storage:
        return tangent
    return _fence(storage, implementation, tangent)[0]


def force_rounding(y: jax.Array, implementation: str | None) -> jax.Array:
    """Returns `y`, with its rounding to a narrow dtype made explicit.

    XLA may cancel a narrowing that is followed by a widening. A GPU may then write, and
    store for the backward pass, a float32 copy in addition to `y`. A TPU fuses y and dx
    only if both end with the same operation.
    """
    wide = jnp.iscomplexobj(y) or jnp.finfo(y.dtype).bits >= 32
    return y if wide or implementation == PLAIN else _force_rounding(y, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _force_rounding(y: jax.Array, implementation: str | None) -> jax.Array:
    return select_cpu(implementation, _unchanged, _round)(y)


@_force_rounding.defjvp
def _(implementation, primals, tangents):
    return _force_rounding(*primals, implementation), tangents[0]


def force_cotangent_rounding(
    y: jax.Array, dtype, implementation: str | None
) -> jax.Array:
    """Returns `y`; its cotangent is rounded to a narrower dtype, and widened again.

    Use it where the cotangent is stored in that dtype anyway: then every use can read
    what was stored. Except on a CPU, a forward-mode tangent is rounded as well.
    """
    return (
        y
        if implementation == PLAIN
        else _force_cotangent_rounding(y, dtype, implementation)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _force_cotangent_rounding(
    y: jax.Array, dtype, implementation: str | None
) -> jax.Array:
    return y


@_force_cotangent_rounding.defjvp
def _(dtype, implementation, primals, tangents):
    def rounding(t):
        return _round(t.astype(dtype)).astype(t.dtype)

    (y,), (tangent,) = primals, tangents
    if tangent.dtype != dtype and not jnp.iscomplexobj(tangent):
        tangent = select_cpu(implementation, _unchanged, rounding)(tangent)
    return _force_cotangent_rounding(y, dtype, implementation), tangent


@jax.custom_jvp
def fence_cotangent(y: jax.Array) -> jax.Array:
    """Returns `y`; its cotangent passes an `optimization_barrier`.

    For a vector that is repeated for each group. Its gradient is the sum of the sums
    over the groups. Without the barrier XLA takes it from the input, in a reduction of
    its own: the input is read once more.
    """
    return y


@fence_cotangent.defjvp
def _(primals, tangents):
    return fence_cotangent(*primals), lax.optimization_barrier(*tangents)


def _unchanged(y: jax.Array) -> jax.Array:
    return y


def _round(y: jax.Array) -> jax.Array:
    """The identity, which XLA does not see through: a rounding to the dtype of `y`."""
    info = jnp.finfo(y.dtype)
    return lax.reduce_precision(y, info.nexp, info.nmant)


def _fence(storage, implementation: str | None, x: jax.Array, *vectors: jax.Array):
    """Returns the values, on a CPU behind a fence."""
    if jnp.iscomplexobj(x):
        storage = x.dtype  # a real input made complex cannot be narrowed

    def fenced(x, *vectors):
        narrow, *vectors = lax.optimization_barrier((x.astype(storage), *vectors))
        return (narrow.astype(x.dtype), *vectors)

    def shared(*values):
        return values

    return select_cpu(implementation, fenced, shared)(x, *vectors)
