"""Validation. Messages say what was received, what was expected, what to write."""

import itertools
import numbers
import sys
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike


class BatchNormWarning(UserWarning):
    """The input is valid, but the result is probably not what you want.

    Three cases: one value per feature, so that the output is the bias; a mask or
    weights that fit the first axes of the input as well as the last; float64 that
    `bnjax.convert` rounds to float32.
    """


class UnboundAxisNameError(NameError, ValueError):
    """A collective over an axis that no transform has bound.

    It is a NameError because JAX and Flax raise one here.
    """


_OURS = ("bnjax", "flax", "jax", "contextlib")

_UNBOUND = (
    "axis_name={axis_name!r} is not bound here: expected the name of an axis of the "
    "surrounding jax.shard_map mesh, jax.pmap(axis_name=...) or "
    "jax.vmap(axis_name=...). Inside plain jax.jit write axis_name=None: with a "
    "sharded batch the statistics are already global."
)

_REPEATED_AXIS_NAME = (
    "axis_name={axis_name!r} names {name!r} twice: expected each axis once, or the "
    "values of a replica would count several times. Write axis_name={distinct!r}."
)

_FLOAT_MASK = (
    "mask has dtype {dtype}: expected booleans, True where a value counts, for a mask "
    "does not weigh, and 0.5 would count as much as 1. Write mask > 0, or mask > 0.5; "
    "or weights=... for numbers that say how often a value counts."
)

_WEIGHTS = (
    "weights has dtype {dtype}: expected real floats >= 0, how often each value "
    "counts. Write {cure}."
)

_WRONG_WEIGHTS = (
    "weights holds {wrong}: expected finite numbers >= 0, how often each value counts. "
    "Write {cure}."
)

_AMBIGUOUS = (
    "{name} has shape {received}, which fits the first axes of the input's shape "
    "{shape} as well as the last: it is broadcast along the last, as in NumPy. Write "
    "{trailing} if that is meant, or {leading} for {values} along the first, as one "
    "per example."
)

_SINGLE_VALUE = (
    "batch normalization received one value per feature{each} (input shape {shape}, "
    "feature axis {axis}): expected at least two, because the mean of one value is "
    "that value, and the output is the bias whatever the input. {cure}, or normalize "
    "by the running statistics (use_running_average=True)."
)


def require_inexact(name: str, x: ArrayLike) -> jax.Array:
    """Converts `x` to an array; raises unless its dtype is floating or complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} has dtype {x.dtype}: expected a floating or complex dtype, for "
            "statistics of integers are not integers. Write "
            f"{name}.astype(jnp.float32)."
        )
    not_narrow(name, x.dtype)
    return x


def not_narrow(name: str, dtype) -> None:
    """Raises on a float of 8 bits or fewer, which JAX does no arithmetic with."""
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{name} has dtype {jnp.dtype(dtype).name}: expected a float of 16 bits or "
            "more, for JAX promotes no narrower one. Write "
            f"{name}.astype(jnp.bfloat16), and quantize what the layer returns."
        )


def output_dtype(dtype) -> jnp.dtype:
    """`dtype`, which must be floating or complex."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} is the dtype of the output: expected a "
            "floating or complex dtype. Write dtype=None to infer it from the input."
        )
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"dtype={jnp.dtype(dtype).name} is the dtype of the output: expected a "
            "float of 16 bits or more. Write dtype=jnp.bfloat16, and quantize what is "
            "returned."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def parameter(name: str, value: ArrayLike | None) -> jax.Array | None:
    """`value` as an array that can be promoted with others, or None."""
    if value is None:
        return None
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        not_narrow(name, value.dtype)
    return value


def not_complex(name: str, value: jax.Array, dtype) -> None:
    """Raises if `value` is complex and `dtype`, that of the computation, is real."""
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} has dtype {value.dtype}, but the result is real: expected a real "
            f"{name}. Write {name}.real, or dtype=jnp.complex64 for a complex result."
        )


def feature_shape(name: str, value: jax.Array, expected: Sequence[int], axis) -> None:
    """Raises unless `value` has the shape of the feature axes."""
    if value.shape != tuple(expected):
        raise ValueError(
            f"{name} has shape {value.shape}: expected {tuple(expected)}, the sizes of "
            f"the input along its feature axis (axis={axis!r}). If the features lie "
            "on another axis of the input, name it with axis=...; if the layer was "
            "created for another input, initialize it again."
        )


def shift(
    value: ArrayLike | None, expected: Sequence[int], axis, dtype
) -> jax.Array | None:
    """Converts the shift to an array and checks it; returns None for None."""
    if value is None:
        return None
    value = jnp.asarray(value)
    feature_shape("shift", value, expected, axis)
    not_complex("shift", value, dtype)
    return value


def mask(value: ArrayLike | None, shape: Sequence[int]) -> jax.Array | None:
    """The mask as a boolean array of the rank of `x`, or None."""
    if value is None:
        return None
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(_FLOAT_MASK.format(dtype=value.dtype))
    return _aligned("mask", "flags", value.astype(bool), shape)


def weights(value: ArrayLike | None, shape: Sequence[int]) -> jax.Array | None:
    """The weights as a floating array of the rank of `x`, or None."""
    if value is None:
        return None
    received, value = value, jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        cure = "weights.astype(jnp.float32)"
        if value.dtype == bool:
            cure = "mask=weights for flags, or weights.astype(jnp.float32)"
        elif jnp.iscomplexobj(value):
            cure = "weights.real"
        raise TypeError(_WEIGHTS.format(dtype=value.dtype, cure=cure))
    not_narrow("weights", value.dtype)
    known = received if isinstance(received, np.ndarray) else value
    if not isinstance(known, Tracer) and getattr(known, "is_fully_addressable", True):
        numbers = np.asarray(known, np.float64).ravel()
        wrong = numbers[~((numbers >= 0) & (numbers < np.inf))]
        if wrong.size:
            cure = "jnp.maximum(weights, 0)"
            if not np.isfinite(wrong[0]):
                cure = "jnp.where(jnp.isfinite(weights), weights, 0)"
            raise ValueError(_WRONG_WEIGHTS.format(wrong=float(wrong[0]), cure=cure))
    return _aligned("weights", "weights", value, shape)


def _aligned(
    name: str, values: str, value: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """`value` in the rank of `x`; raises unless it broadcasts to the shape of `x`.

    Args:
        name: the name of the argument.
        values: the plural noun for its values, "flags".
        value: the mask or the weights, of any rank.
        shape: the shape of `x`.
    """
    shape, rank = tuple(shape), len(shape)
    aligned = (1,) * (rank - value.ndim) + value.shape
    if not _broadcasts(aligned, shape):
        raise ValueError(
            f"{name} has shape {value.shape}, which does not broadcast to the input's "
            f"shape {shape}: expected sizes that equal the input's or 1. "
            + _shape_hint(name, values, value.shape, shape)
        )
    leading = value.shape + (1,) * (rank - value.ndim)
    if aligned != leading and _broadcasts(leading, shape):
        message = _AMBIGUOUS.format(
            name=name,
            values=values,
            received=value.shape,
            shape=shape,
            trailing=_indexing_code(
                name, value.ndim, range(rank - value.ndim, rank), rank
            ),
            leading=_indexing_code(name, value.ndim, range(value.ndim), rank),
        )
        warnings.warn(message, BatchNormWarning, stacklevel=_callers_level())
    return value.reshape(aligned)


def _broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    """Returns whether the first shape broadcasts to the second, of the same rank."""
    pairs = zip(small, shape)
    return len(small) == len(shape) and all(m == 1 or m == n for m, n in pairs)


def _shape_hint(
    name: str, values: str, small: tuple[int, ...], shape: tuple[int, ...]
) -> str:
    """Returns the reshape that makes the mask or weights broadcast, as a sentence."""
    for kept in itertools.combinations(range(len(shape)), len(small)):  # leading first
        if small and len(small) < len(shape) and small == tuple(shape[a] for a in kept):
            named = ", ".join(map(str, kept))
            return (
                f"For {values} along axis {named} of the input write "
                f"{_indexing_code(name, len(small), kept, len(shape))}."
            )
    return (
        f"For one per example write {name}.reshape((-1,) + (1,) * (x.ndim - 1)), of "
        "shape (batch, 1, ...)."
    )


def _indexing_code(name: str, ndim: int, kept: Sequence[int], rank: int) -> str:
    """Returns code that adds axes of size 1, such as "mask[:, None]"."""
    if tuple(kept) == tuple(range(ndim)):
        return f"{name}[..., {', '.join(['None'] * (rank - ndim))}]"
    index = [":" if a in kept else "None" for a in range(rank)]
    while index[-1] == ":":
        index.pop()
    return f"{name}[{', '.join(index)}]"


def residual(value: ArrayLike | None, shape: Sequence[int], dtype) -> jax.Array | None:
    """The residual as an array of the shape of `x`, or None."""
    if value is None:
        return None
    value = require_inexact("residual", value)
    if value.shape != tuple(shape):
        raise ValueError(
            f"residual has shape {value.shape}: expected {tuple(shape)}, the shape of "
            "the input that it is added to. Project or broadcast it first "
            "(jnp.broadcast_to(residual, x.shape))."
        )
    not_complex("residual", value, dtype)
    return value


def activation(value) -> None:
    """Raises unless `value` is None or a function."""
    if isinstance(value, type):
        raise TypeError(
            f"activation={value!r} is a class: expected an elementwise function of one "
            f"array. Write an instance that can be called, activation={value.__name__}"
            "(), or a function, activation=jax.nn.relu."
        )
    if value is not None and not callable(value):
        raise TypeError(
            f"activation={value!r} is not callable: expected an elementwise function "
            "of one array. Write activation=jax.nn.relu."
        )


def elementwise(activation, shape: Sequence[int], y, dtype) -> None:
    """Raises unless the activation made an array of that shape, real for a real dtype.

    Args:
        activation: the function, for the message.
        shape: the shape of its input.
        y: its result.
        dtype: the dtype that `y` is cast to.
    """
    if not isinstance(y, jax.Array | np.ndarray):
        raise TypeError(
            f"activation={activation!r} returned {_described(y)}: expected one array "
            f"of the input's shape {tuple(shape)}. Write a function that returns the "
            "array alone, such as activation=jax.nn.relu."
        )
    if y.shape != tuple(shape):
        raise ValueError(
            f"activation={activation!r} returned shape {y.shape} for an input of "
            f"shape {tuple(shape)}: expected an elementwise function. Apply what "
            "changes the shape to the output of the normalization."
        )
    if jnp.iscomplexobj(y) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"activation={activation!r} returned dtype {y.dtype}, but the output is of "
            f"the real dtype {jnp.dtype(dtype).name}: expected a real result. Write "
            "dtype=jnp.complex64, or take its real part in the activation."
        )


def _described(value) -> str:
    """Returns a short description of a value for messages: "None", "the class X"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a value of type {type(value).__name__}"


def epsilon(value, features: Sequence[int] = ()) -> None:
    """Raises on an epsilon that is no real number >= 0, nor one for each feature."""
    low, _ = _range("epsilon", value, "is added to the variance", "epsilon=1e-5")
    if np.shape(value) not in ((), tuple(features)):
        alternatives = (
            f", or shape {tuple(features)}, one per feature" if features else ""
        )
        raise ValueError(
            f"epsilon has shape {np.shape(value)}: expected a number{alternatives}. "
            "Write epsilon=1e-5."
        )
    if not low >= 0:
        raise ValueError(
            f"epsilon={value!r} is added to the variance: expected a number >= 0. "
            "Write epsilon=1e-5."
        )


def decay_rate(name: str, value) -> None:
    """Raises unless a momentum or decay is a real number in [0, 1]."""
    low, high = _range(name, value, "is the weight of the old value", f"{name}=0.99")
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"{name}={value!r} is the weight of the old running value: expected a "
            f"number in [0, 1]. Write {name}=0.99 (PyTorch's momentum=0.1 is "
            f"{name}=0.9 here)."
        )


def _range(name: str, value, what: str, example: str) -> tuple[float, float]:
    """The smallest and the largest value; (0, 1) if traced; raises unless real."""
    real = isinstance(value, numbers.Real)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = jnp.issubdtype(value.dtype, jnp.number) and not jnp.iscomplexobj(value)
    if not real:
        raise TypeError(
            f"{name}={value!r} {what}: expected a real number. Write {example}."
        )
    if isinstance(value, Tracer) or not np.size(value):
        return 0.0, 1.0
    return float(np.min(value)), float(np.max(value))


def chosen(value: bool | None) -> bool:
    """`use_running_average`, which the layer or the call must give."""
    if value is None:
        raise ValueError(
            "No `use_running_average` argument was provided to BatchNorm: expected "
            "True or False. Write it in the constructor, BatchNorm(..., "
            "use_running_average=False), in the call, layer(x, "
            "use_running_average=False), or call model.train() or model.eval()."
        )
    return value


def implementation(value, known: Sequence[str | None]) -> None:
    """Raises on the name of an implementation that does not exist."""
    if value not in known:
        raise ValueError(
            f"implementation={value!r} is unknown: expected one of {list(known)}. "
            "Write implementation=None to let bnjax choose for the platform."
        )


def axis_name(value):
    """`axis_name` as None, a str or a tuple; raises if repeated, or not bound."""
    if value is None or value == ():
        return None
    names = (value,) if isinstance(value, str) else tuple(value)
    distinct = tuple(dict.fromkeys(names))
    if len(distinct) < len(names):
        name = next(name for name in distinct if names.count(name) > 1)
        if len(distinct) == 1:
            distinct = name
        raise ValueError(
            _REPEATED_AXIS_NAME.format(axis_name=value, name=name, distinct=distinct)
        )
    try:
        for name in names:
            lax.axis_size(name)
    except NameError:
        raise UnboundAxisNameError(_UNBOUND.format(axis_name=value)) from None
    return value if isinstance(value, str) else names


def groups(value, name, size: int) -> tuple[tuple[int, ...], ...] | None:
    """`axis_index_groups` as tuples; raises unless they partition the named axis."""
    if value is None:
        return None
    if name is None:
        raise ValueError(
            f"axis_index_groups={value!r} was given without axis_name: expected the "
            "name of the axis whose replicas it groups. Write axis_name='batch'; for "
            "groups within one batch under plain jax.jit normalize the reshaped batch "
            "(ghost batches)."
        )
    as_tuples = tuple(tuple(int(i) for i in group) for group in value)
    if sorted(i for group in as_tuples for i in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={value!r} does not partition the {size} replicas of "
            f"axis_name={name!r}: expected every index from 0 to {size - 1} in exactly "
            "one group. Groups may differ in size."
        )
    return as_tuples


def warn_single_value(count, shape: Sequence[int], axis, groups: int = 0) -> None:
    """Warns where the statistics are those of one value.

    Args:
        count: the number of values per feature and group; an int, or symbolic.
        shape: the shape of the input.
        axis: the feature axis or axes.
        groups: the number of parts of the batch with separate statistics; 0 for none.
    """
    if not isinstance(count, int) or count != 1:
        return
    each = f" in each of {groups} groups" if groups else ""
    cure = "Use a larger batch, pass axis_name=... to share them between replicas"
    if groups:
        cure = "Use fewer, larger groups"
    message = _SINGLE_VALUE.format(shape=tuple(shape), axis=axis, each=each, cure=cure)
    warnings.warn(message, BatchNormWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Returns the `stacklevel` by which warnings.warn points at the user's code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in _OURS:
            break
        level, frame = level + 1, frame.f_back
    return level


NO_STATISTICS = (
    "batch_stats/{path} is not the statistics of a batch normalization: expected a "
    "tree of {{'mean': ..., 'var': ...}}. Pass variables['batch_stats'], without what "
    "other layers keep there."
)


def replica_axis(path: str, shape: Sequence[int], axis: int) -> None:
    """Raises unless an array of this shape has the axis."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{path} has shape {tuple(shape)}, which has no axis={axis}: expected the "
            "axis along which the values of replicas lie. Write axis=None to compare "
            "the copies that devices hold of a replicated array."
        )


def replicas(path: str, shape: Sequence[int], counts: Sequence[int] | None) -> None:
    """Raises unless there is a leading replica axis, as long as the counts, if given.

    `counts` is their shape.
    """
    if not shape or (counts is not None and tuple(counts) != tuple(shape[:1])):
        expected = "a leading axis of replicas"
        if counts is not None:
            expected = f"counts {tuple(counts)}"
        raise ValueError(
            f"batch_stats/{path}/mean has shape {tuple(shape)}: expected "
            f"{expected}, one value of each replica. Stack what the replicas hold with "
            "jax.tree.map(lambda *v: jnp.stack(v), *each), or pass axis_name inside of "
            "shard_map or pmap."
        )


def mergeable(values: Sequence, kind: type) -> None:
    """Raises unless all are of the kind, Moments or CoMoments, and of one shape."""
    name = kind.__name__
    for number, value in enumerate(values, 1):
        if not isinstance(value, kind):
            raise TypeError(
                f"argument {number} of merge is {_described(value)}: expected {name}. "
                f"Write merge(first, second), each {name}(count, mean, m2), or "
                "merge(*each) for a list of them."
            )
        for field in ("mean", "m2"):
            shapes = [np.shape(getattr(v, field)) for v in (values[0], value)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"argument {number} of merge has {field} of shape {shapes[1]}, the "
                    f"first of {shapes[0]}: expected {name} of the same features. "
                    "Reduce both over the same axes, or write jnp.broadcast_to for "
                    "features that share their values."
                )
