"""How far a kernel or a bias gets through nothing but what folding may pass.

Folding multiplies both by feature, and adds an offset to the bias:

    kernel -> kernel * multiplier,  bias -> bias * multiplier + offset

The layer's output becomes output * multiplier + offset if on its way there a kernel is
cast, reshaped, broadcast, scaled or summed, and multiplied with the input; and a bias
is cast, reshaped, broadcast and added. Its features are followed along.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from bnjax import _dtypes

_SAME = ("copy", "copy_p", "stop_gradient", "sharding_constraint", "layout_constraint")
_SAME += ("reshard", "mesh_cast", "pvary", "pcast")


class Reach(NamedTuple):
    """What of a linear layer a value still is.

    Attributes:
        layer: the path of the layer.
        what: "kernel", "bias" or "output".
        axis: of the features.
        shifted: whether the bias is in it.
        dtype: the widest of those that it had.
        widened: whether the product is wider than the kernel, which enters it as it is
            stored.
    """

    layer: tuple[str, ...]
    what: str
    axis: int
    shifted: bool
    dtype: Any
    widened: bool = False


def carried(
    eqn: JaxprEqn, reaches: Sequence[Reach | None], zeros: Sequence[bool]
) -> Reach | None:
    """What the result of an equation is, if folding passes it; `zeros`: operands."""
    held = [reach for reach in reaches if reach is not None]
    several = len(eqn.outvars) > 1 and eqn.primitive.name != "split"
    if not held or len({reach.layer for reach in held}) > 1 or several:
        return None
    axis = _axis(eqn, reaches, held, zeros)
    if axis is None:
        return None
    first, aval = held[0], _aval(eqn.outvars[0])
    what, widened = first.what, any(reach.widened for reach in held)
    if len(held) > 1:
        what = "output" if {r.what for r in held} != {first.what} else first.what
    elif eqn.primitive.name in ("conv_general_dilated", "dot_general"):
        entered = _aval(eqn.invars[reaches.index(first)]).dtype
        exact = wider(first.dtype, entered) == entered
        what, widened = "output", exact and wider(entered, aval.dtype) != entered
    dtype = wider(aval.dtype, *(reach.dtype for reach in held))
    shifted = any(reach.shifted for reach in held)
    return Reach(first.layer, what, axis, shifted, dtype, widened)


def wider(*dtypes: Any) -> Any:
    """The dtype that holds them all; JAX promotes none of less than 16 bits."""
    inexact = (d for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    narrow = {jnp.dtype(d) for d in inexact if jnp.finfo(d).bits < 16}
    kept = [d for d in dtypes if jnp.dtype(d) not in narrow]
    return _dtypes.promote(*kept) if kept else jnp.dtype(dtypes[0])


def _axis(eqn, reaches, held, zeros) -> int | None:
    """Where the features are in the result; None if folding does not pass it."""
    name, given = eqn.primitive.name, eqn.params
    first, shifted = held[0], any(reach.shifted for reach in held)
    source = _aval(eqn.invars[reaches.index(first)])
    axis, shape = first.axis, _aval(eqn.outvars[0]).shape
    if len(held) > 1:
        together = len({reach.axis for reach in held}) == 1
        return axis if together and _sums(eqn, reaches, held, zeros) else None
    if name in _SAME:
        return axis
    if name == "convert_element_type":
        return axis if _is_cast(source.dtype, given["new_dtype"]) else None
    if name == "transpose":
        return given["permutation"].index(axis)
    if name == "broadcast_in_dim":
        new = given["broadcast_dimensions"][axis]
        return new if shape[new] == source.shape[axis] else None
    if name == "reshape" and given.get("dimensions") is None:
        return _reshaped(source.shape, axis, shape)
    if name == "squeeze":
        return _without(given["dimensions"], axis)
    if name == "rev":
        return None if axis in given["dimensions"] else axis
    if name in ("slice", "dynamic_slice", "split"):
        return axis if shape[axis] == source.shape[axis] else None
    if name in ("add", "add_any", "sub") and any(zeros):
        return axis if reaches[0] or name != "sub" else None
    if shifted:  # what is left multiplies or sums
        return None
    if name == "neg" or (name == "div" and reaches[0]):
        return axis
    if name == "mul":
        return axis
    if name == "select_n":
        rest = zip(reaches[1:], zeros[1:])
        return axis if all(reach or zero for reach, zero in rest) else None
    if name == "pad":
        apart = reaches[0] and zeros[1] and given["padding_config"][axis] == (0, 0, 0)
        return axis if apart else None
    if name == "reduce_sum":
        return _without(given["axes"], axis)
    if name == "conv_general_dilated":
        numbers = given["dimension_numbers"]
        fits = reaches[1] and numbers.rhs_spec[0] == axis
        fits = fits and given["batch_group_count"] == 1
        return numbers.out_spec[1] if fits else None
    if name == "dot_general":
        return _of_product(eqn, reaches, axis)
    return None


def _aval(atom: Any) -> Any:
    """Its shape and dtype, which the type of `aval` does not promise."""
    return atom.aval


def _sums(eqn, reaches, held, zeros) -> bool:
    """Whether an equation of several values of one layer adds or joins them."""
    name, shifts = eqn.primitive.name, [reach.shifted for reach in held]
    if name in ("add", "add_any"):
        return sum(shifts) <= 1
    if name == "sub":
        return not shifts[1]
    if name == "select_n":
        alike = len(set(shifts)) == 1 and reaches[0] is None
        return alike and all(r or (z and not shifts[0]) for r, z in zip(reaches, zeros))
    if name == "concatenate":
        alike = len(set(shifts)) == 1 and len(held) == len(reaches)
        return alike and eqn.params["dimension"] != held[0].axis
    return False


def _is_cast(old: Any, new: Any) -> bool:
    """Whether the cast is no quantization, and keeps what a multiplier brings in."""
    if not jnp.issubdtype(new, jnp.inexact) or jnp.finfo(new).bits < 16:
        return False
    real = not jnp.issubdtype(new, jnp.complexfloating)
    return not (real and jnp.issubdtype(old, jnp.complexfloating))


def _reshaped(old: Sequence[int], axis: int, new: Sequence[int]) -> int | None:
    """Where the axis is after a reshape that leaves it whole."""
    before = math.prod(old[:axis])
    found = [
        i
        for i, size in enumerate(new)
        if size == old[axis] and math.prod(new[:i]) == before
    ]
    return found[-1] if found else None


def _without(axes: Sequence[int], axis: int) -> int | None:
    return None if axis in axes else axis - sum(other < axis for other in axes)


def _of_product(eqn: JaxprEqn, reaches, axis: int) -> int | None:
    contracted, batch = eqn.params["dimension_numbers"]
    side = 0 if reaches[0] else 1
    apart = _without((*contracted[side], *batch[side]), axis)
    if apart is None:
        return None
    before = len(batch[0])
    if side == 1:
        before = _aval(eqn.invars[0]).ndim - len(contracted[0])
    return before + apart
