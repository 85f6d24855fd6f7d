"""What the compiler has to be told, per platform. Below the derivative rules."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = (None, "xla", "reread")


def on_cpu(implementation: str | None, cpu, default):
    """`cpu` where the compiler is told what to do, `default` elsewhere."""

    def choose(*args):
        if implementation == "xla":
            return default(*args)
        if implementation == "reread":
            return cpu(*args)
        return lax.platform_dependent(*args, cpu=cpu, default=default)

    return choose


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def reread(storage, implementation: str | None, x: jax.Array, *vectors: jax.Array):
    """The identity; on a CPU, a fresh read of what `x` was widened from.

    XLA:CPU writes a value that several reductions share to memory: the widened copy of
    a bfloat16 input, and even the broadcast of a per-feature vector. Each user that
    narrows to the `storage` dtype, fences, and widens again reads the stored input
    instead (narrowing a widened value is exact, and XLA removes the pair). Elsewhere
    all users share one fusion, and a fence would only part them.
    """
    return _fence(storage, implementation, x, *vectors)


@reread.defjvp
def _(storage, implementation, primals, tangents):
    return reread(storage, implementation, *primals), tuple(tangents)


def reread_cotangent(storage, implementation: str | None, tangent: jax.Array):
    """The identity on a tangent; its transpose reads the cotangent again, as `reread`.

    Only for a cotangent that was widened from `storage`. A tangent is rounded to it.
    """
    if tangent.dtype == storage:
        return tangent
    return _fence(storage, implementation, tangent)[0]


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
