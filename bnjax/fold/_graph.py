"""Which normalizations can be folded, and into which linear layers.

While a model is traced, each call of a layer leaves marks: `checkpoint_name`, an
identity that survives jit, remat, vmap and custom derivatives. The program is then
followed value by value, through the calls that it makes. A normalization is folded
under two conditions: its input is the output of a linear layer, which nothing else
reads; and on the way to that output the kernel and the bias pass only operations that
folding commutes with, see `Reach`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from bnjax import _dtypes

_SAME = ("copy", "copy_p", "stop_gradient", "sharding_constraint", "layout_constraint")
_SAME += ("reshard", "mesh_cast", "pvary", "pcast")


# How far a kernel or a bias gets. Folding multiplies both by feature, and adds an
# offset to the bias:
#
#     kernel -> kernel * multiplier,  bias -> bias * multiplier + offset
#
# The layer's output becomes output * multiplier + offset if only these operations lie
# on the way to it: a kernel is cast, reshaped, broadcast, scaled or summed, and
# multiplied with the input; a bias is cast, reshaped, broadcast and added. `axis` says
# where the features are meanwhile.


class Reach(NamedTuple):
    """The part of a linear layer that a value still is.

    Attributes:
        layer: the path of the layer.
        part: "kernel", "bias" or "output".
        axis: the axis of the features.
        has_bias: whether the bias has been added, or it is the bias.
        dtype: the widest dtype on the way.
        widened: whether the product is wider than the kernel, which enters it in the
            dtype that it is stored in.
    """

    layer: tuple[str, ...]
    part: str
    axis: int
    has_bias: bool
    dtype: Any
    widened: bool = False


def reach_of_result(
    eqn: JaxprEqn, reaches: Sequence[Reach | None], zeros: Sequence[bool]
) -> Reach | None:
    """The reach of the result of an equation; None if folding does not commute with it.

    Args:
        eqn: the equation.
        reaches: the reaches of its operands.
        zeros: whether each operand is known to be 0.
    """
    present = [reach for reach in reaches if reach is not None]
    several = len(eqn.outvars) > 1 and eqn.primitive.name != "split"
    if not present or len({reach.layer for reach in present}) > 1 or several:
        return None
    axis = _feature_axis(eqn, reaches, present, zeros)
    if axis is None:
        return None
    first, aval = present[0], _aval(eqn.outvars[0])
    part, widened = first.part, any(reach.widened for reach in present)
    if len(present) > 1:
        part = first.part if {r.part for r in present} == {first.part} else "output"
    elif eqn.primitive.name in ("conv_general_dilated", "dot_general"):
        entered = _aval(eqn.invars[reaches.index(first)]).dtype
        exact = wider(first.dtype, entered) == entered
        part, widened = "output", exact and wider(entered, aval.dtype) != entered
    dtype = wider(aval.dtype, *(reach.dtype for reach in present))
    has_bias = any(reach.has_bias for reach in present)
    return Reach(first.layer, part, axis, has_bias, dtype, widened)


def wider(*dtypes: Any) -> Any:
    """The dtype that holds them all; JAX promotes none of less than 16 bits."""
    inexact = (d for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    narrow = {jnp.dtype(d) for d in inexact if jnp.finfo(d).bits < 16}
    others = [d for d in dtypes if jnp.dtype(d) not in narrow]
    return _dtypes.promote(*others) if others else jnp.dtype(dtypes[0])


def _feature_axis(eqn, reaches, present, zeros) -> int | None:
    """The feature axis of the result; None if folding does not commute with `eqn`."""
    name, params = eqn.primitive.name, eqn.params
    first, has_bias = present[0], any(reach.has_bias for reach in present)
    source = _aval(eqn.invars[reaches.index(first)])
    axis, shape = first.axis, _aval(eqn.outvars[0]).shape
    if len(present) > 1:
        together = len({reach.axis for reach in present}) == 1
        return (
            axis if together and _adds_or_joins(eqn, reaches, present, zeros) else None
        )
    if name in _SAME:
        return axis
    if name == "convert_element_type":
        return axis if _is_cast(source.dtype, params["new_dtype"]) else None
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        new = params["broadcast_dimensions"][axis]
        return new if shape[new] == source.shape[axis] else None
    if name == "reshape" and params.get("dimensions") is None:
        return _axis_after_reshape(source.shape, axis, shape)
    if name == "squeeze":
        return _axis_after_removal(params["dimensions"], axis)
    if name == "rev":
        return None if axis in params["dimensions"] else axis
    if name in ("slice", "dynamic_slice", "split"):
        return axis if shape[axis] == source.shape[axis] else None
    if name in ("add", "add_any", "sub") and any(zeros):
        return axis if reaches[0] or name != "sub" else None
    if has_bias:  # all others multiply or sum, and the offset with them
        return None
    if name == "neg" or (name == "div" and reaches[0]):
        return axis
    if name == "mul":
        return axis
    if name == "select_n":
        choices = zip(reaches[1:], zeros[1:])
        return axis if all(reach or zero for reach, zero in choices) else None
    if name == "pad":
        by_zeros = reaches[0] and zeros[1]
        return (
            axis if by_zeros and params["padding_config"][axis] == (0, 0, 0) else None
        )
    if name == "reduce_sum":
        return _axis_after_removal(params["axes"], axis)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        fits = reaches[1] and numbers.rhs_spec[0] == axis
        fits = fits and params["batch_group_count"] == 1
        return numbers.out_spec[1] if fits else None
    if name == "dot_general":
        return _axis_of_product(eqn, reaches, axis)
    return None


def _aval(atom: Any) -> Any:
    """Its shape and dtype, which the type of `aval` does not promise."""
    return atom.aval


def _adds_or_joins(eqn, reaches, present, zeros) -> bool:
    """Whether an equation of several values of one layer adds or joins them."""
    name, biased = eqn.primitive.name, [reach.has_bias for reach in present]
    if name in ("add", "add_any"):
        return sum(biased) <= 1
    if name == "sub":
        return not biased[1]
    if name == "select_n":
        alike = len(set(biased)) == 1 and reaches[0] is None
        return alike and all(r or (z and not biased[0]) for r, z in zip(reaches, zeros))
    if name == "concatenate":
        alike = len(set(biased)) == 1 and len(present) == len(reaches)
        return alike and eqn.params["dimension"] != present[0].axis
    return False


def _is_cast(old: Any, new: Any) -> bool:
    """Whether the cast neither quantizes nor drops an imaginary part."""
    if not jnp.issubdtype(new, jnp.inexact) or jnp.finfo(new).bits < 16:
        return False
    real = not jnp.issubdtype(new, jnp.complexfloating)
    return not (real and jnp.issubdtype(old, jnp.complexfloating))


def _axis_after_reshape(
    old: Sequence[int], axis: int, new: Sequence[int]
) -> int | None:
    """Where the axis is after a reshape that leaves it whole."""
    before = math.prod(old[:axis])
    matches = [
        i
        for i, size in enumerate(new)
        if size == old[axis] and math.prod(new[:i]) == before
    ]
    return matches[-1] if matches else None


def _axis_after_removal(axes: Sequence[int], axis: int) -> int | None:
    """Where `axis` is without `axes`; None if it is one of them."""
    return None if axis in axes else axis - sum(other < axis for other in axes)


def _axis_of_product(eqn: JaxprEqn, reaches, axis: int) -> int | None:
    """Where `axis` of an operand is in the result of a dot_general."""
    contracted, batch = eqn.params["dimension_numbers"]
    side = 0 if reaches[0] else 1
    free = _axis_after_removal((*contracted[side], *batch[side]), axis)
    if free is None:
        return None
    before = len(batch[0])
    if side == 1:
        before = _aval(eqn.invars[0]).ndim - len(contracted[0])
    return before + free


Path = tuple[str, ...]
Shape = tuple[int, ...]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_ZERO = ("broadcast_in_dim", "convert_element_type", "reshape")
_tokens = itertools.count()


# The traced program, and the pairs in it that are folded.


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        label: the name of its mark, on its input if it normalizes, on its output if it
            is linear.
        path: the path of the layer in the model.
        layer: the module; it belongs to the trace, so that only its settings are used.
        variables: by name, where the model stores each, and its shape in the call.
        obstacle: what keeps it from being folded, wherever it stands, or None.
        row: the row of its variables that it reads, where they have one for each
            domain; None if that is not one number, known in advance.
        rank: the rank of its marked input or output.
    """

    label: str
    path: Path
    layer: Any
    variables: dict[str, tuple[Path, Shape]]
    obstacle: str | None
    row: int | None = 0
    rank: int = 0

    def __str__(self) -> str:
        return f"{type(self.layer).__name__} '{'/'.join(self.path)}'"


class Recorder:
    """The calls of one trace."""

    def __init__(self) -> None:
        self.norms: dict[Path, list[Call]] = {}
        self.linears: dict[Path, list[Call]] = {}
        self.prefix = f"bnjax.fold.{next(_tokens)}."
        self._count = itertools.count()

    def mark(
        self,
        calls: dict[Path, list[Call]],
        path: Path,
        layer: Any,
        variables: Mapping[str, tuple[Path, jax.Array]],
        obstacle: str | None,
        x: jax.Array,
        row: int | None = 0,
    ) -> jax.Array:
        """`x`, marked; adds the call to `calls`."""
        label = f"{self.prefix}{next(self._count)}"
        for name, (_, value) in variables.items():
            checkpoint_name(value, f"{label}.{name}")
        shapes = {name: (key, value.shape) for name, (key, value) in variables.items()}
        call = Call(label, path, layer, shapes, obstacle, row, x.ndim)
        calls.setdefault(path, []).append(call)
        return checkpoint_name(x, label)


@dataclasses.dataclass(eq=False)
class Value:
    """A value that a program computes.

    Attributes:
        origin: the mark that it left, or in words what it comes from.
        shape: the shape of a variable, or of the result of an equation.
        dtype: the dtype of a variable.
        readers: the marks and primitives that read it, without marks of variables.
        reach: the reach of the kernel or bias that gets here, see `Reach`.
        zero: whether it is known to be 0.
    """

    origin: str
    shape: Shape = ()
    dtype: Any = None
    readers: list[str] = dataclasses.field(default_factory=list)
    reach: Reach | None = None
    zero: bool = False


class Program(NamedTuple):
    """A traced model.

    Attributes:
        recorder: the calls of its layers.
        variables: the variables, by where the model stores them.
        marked: the values that carry each mark: one for each time that it occurs.
        lost: by linear layer, the first part that an operation reads that folding does
            not commute with, and that operation.
        outputs: the shapes and dtypes of what the model returns.
    """

    recorder: Recorder
    variables: dict[Path, Value]
    marked: dict[str, list[Value]]
    lost: dict[Path, tuple[str, str]]
    outputs: Any


def trace(
    model: Callable[..., Any],
    recorder: Recorder,
    variables: Mapping[Path, jax.Array],
    inputs: Sequence[Any],
) -> Program:
    """The program of `model(variables, inputs)`, which marks for the recorder."""

    def flat(values, inputs):
        return model(dict(zip(variables, values)), inputs)

    traced = jax.make_jaxpr(flat, return_shape=True)
    closed, outputs = traced([*variables.values()], inputs)
    stored = {k: Value("a variable", v.shape, v.dtype) for k, v in variables.items()}
    for call in itertools.chain(*recorder.linears.values()):
        for part in ("kernel", "bias"):
            key, shape = call.variables.get(part, (None, ()))
            if key in stored:
                axis = len(shape) - 1
                if part == "kernel" and getattr(call.layer, "transpose_kernel", False):
                    axis -= 1
                dtype, has_bias = stored[key].dtype, part == "bias"
                stored[key].reach = Reach(call.path, part, axis, has_bias, dtype)
    operands = [*stored.values()]
    while len(operands) < len(closed.jaxpr.invars):
        operands.append(Value("an input of the model"))
    program = Program(recorder, stored, {}, {}, outputs)
    for value in _follow(closed.jaxpr, operands, program):
        _read(value, "the caller", program)
    return program


def _follow(jaxpr: Jaxpr, inputs: list[Value], program: Program) -> list[Value]:
    """The outputs of `jaxpr`; notes readers and marks on the way."""
    constant, zero = Value("a constant"), Value("a constant", zero=True)
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update((v, constant) for v in jaxpr.constvars)

    def of(atom) -> Value:
        if isinstance(atom, Literal):
            return zero if np.ndim(atom.val) == 0 and atom.val == 0 else constant
        return values[atom]

    for eqn in jaxpr.eqns:
        operands = [of(atom) for atom in eqn.invars]
        bodies = _bodies(eqn)
        if eqn.primitive.name in _CALLS and len(bodies) == 1:
            results = _follow(bodies[0], operands, program)
        else:
            results = _step(eqn, operands, program)
            for body in bodies:  # of a loop or branch: its values change with each run
                inside = Value(f"`{eqn.primitive.name}`")
                _follow(body, [inside] * len(body.invars), program)
        values.update(zip(eqn.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _step(eqn: JaxprEqn, operands: list[Value], program: Program) -> list[Value]:
    primitive = eqn.primitive.name
    if primitive == "name":
        return [_mark(eqn.params["name"], operands[0], program)]
    reach = reach_of_result(
        eqn, [o.reach for o in operands], [o.zero for o in operands]
    )
    for operand in operands:
        _read(operand, f"`{primitive}`", program, passes=reach is not None)
    zero = primitive in _ZERO and all(operand.zero for operand in operands)
    shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    return [Value(f"`{primitive}`", s, reach=reach, zero=zero) for s in shapes]


def _mark(label: str, value: Value, program: Program) -> Value:
    """The value behind a mark: a new one for a layer, the same for a variable."""
    recorder = program.recorder
    if not label.startswith(recorder.prefix):  # a name of the user's
        return value
    program.marked.setdefault(label, []).append(value)
    if "." in label.removeprefix(recorder.prefix):
        return value
    outputs = []  # the marks of the layer whose part this is
    if value.reach is not None:
        outputs = [call.label for call in recorder.linears[value.reach.layer]]
    _read(value, label, program, passes=label in outputs)
    return Value(label)


def _read(value: Value, reader: str, program: Program, passes: bool = False) -> None:
    """Notes who reads a value, and whether a kernel or bias is lost there."""
    value.readers.append(reader)
    if value.reach is not None and not passes:
        program.lost.setdefault(value.reach.layer, (value.reach.part, reader))


def _bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs that an equation holds."""
    bodies = []
    for parameter in eqn.params.values():
        several = isinstance(parameter, (tuple, list))
        for value in parameter if several else (parameter,):
            if isinstance(value, ClosedJaxpr):
                bodies.append(value.jaxpr)
            elif isinstance(value, Jaxpr):
                bodies.append(value)
    return bodies


class Pairs(NamedTuple):
    """What becomes of each normalization.

    Attributes:
        folded: the linear layer that takes it in.
        kept: why it is not folded.
        untouched: those of `kept` that cannot even be one affine map.
        adding_offset: those of `folded` whose offset is added in their own place.
    """

    folded: dict[Path, Call]
    kept: dict[Path, str]
    untouched: set[Path]
    adding_offset: set[Path]


def pair(program: Program) -> Pairs:
    """Finds for each normalization the linear layer to fold it into, or why not."""
    pairs = Pairs({}, {}, set(), set())
    for path, calls in program.recorder.norms.items():
        changed = next(
            filter(None, (_changed_variable(program, call) for call in calls)), None
        )
        if len({call.row for call in calls}) > 1 or calls[0].row is None:
            changed = (
                "domain is not one number, known in advance, so that it is one affine "
                "map for each domain"
            )
        if changed is not None:
            pairs.untouched.add(path)
            pairs.kept[path] = f"its {changed}"
            continue
        linear_or_reason = _foldable_linear(program, calls)
        if isinstance(linear_or_reason, Call):
            pairs.folded[path] = linear_or_reason
        else:
            pairs.kept[path] = linear_or_reason
    return pairs


def _changed_variable(program: Program, call: Call) -> str | None:
    """Which variable of a layer differs, in its call, from what the model stores."""
    for name, (key, shape) in call.variables.items():
        stored = program.variables.get(key)
        if stored is None:
            return f"{name} is that of another layer too"
        marked = program.marked.get(f"{call.label}.{name}", [])
        if marked != [stored] or shape != stored.shape:
            return (
                f"{name} does not reach it as it is stored: a loop, a branch, vmap, "
                "a mapping of variables or a jit that is used twice stands between"
            )
    return None


def _foldable_linear(program: Program, calls: list[Call]) -> Call | str:
    """Returns the linear layer to fold a normalization into, or why it cannot be."""
    norm = calls[0]
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    if norm.obstacle is not None:
        return norm.obstacle
    linears = program.recorder.linears
    known = {call.label: call for calls in linears.values() for call in calls}
    (x,) = program.marked[norm.label]
    linear = known.get(x.origin)
    if linear is None:
        return (
            f"its input comes from {x.origin}, not straight from a Conv, "
            "ConvTranspose or Dense"
        )
    if (times := len(linears[linear.path])) > 1:
        return f"{linear}, before it, is called {times} times"
    if linear.obstacle is not None:
        return f"{linear}, before it, {linear.obstacle}"
    if others := [reader for reader in x.readers if reader != norm.label]:
        norms = {c.label: str(c) for cs in program.recorder.norms.values() for c in cs}
        other = norms.get(others[0], others[0])
        return f"the output of {linear}, before it, is also read by {other}"
    if "kernel" not in linear.variables:
        names = ", ".join(linear.variables) or "none"
        return f"{linear}, before it, has no kernel among its variables, {names}"
    if changed := _changed_variable(program, linear):
        return f"of {linear}, before it, the {changed}"
    if reason := _why_not_linear(program, linear):
        return reason
    values = [program.variables[key] for key, _ in norm.variables.values()]
    if not _is_complex(computed_in(program, linear)):
        if any(_is_complex(value.dtype) for value in values):
            return f"its variables are complex, and {linear}, before it, is real"
    return linear


def computed_in(program: Program, linear: Call) -> Any:
    """The widest dtype that the variables of a layer have on the way to its output."""
    (output,) = program.marked[linear.label]
    assert output.reach is not None
    return output.reach.dtype


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _why_not_linear(program: Program, linear: Call) -> str | None:
    """Why the output is not linear in the kernel with the bias added, or None."""
    (output,) = program.marked[linear.label]
    readers = program.variables[linear.variables["kernel"][0]].readers
    if linear.path in program.lost and readers:
        part, reader = program.lost[linear.path]
        part = "kernel" if part == "output" and len(readers) > 1 else part
        if not reader.startswith("`"):
            reader = "what comes after the layer"
        also = "also " * (len(readers) > 1)
        return (
            f"the {part} of {linear}, before it, is {also}read by {reader}: expected "
            "nothing but casts, reshapes, scalings and the product with its input"
        )
    reach = output.reach
    if reach is None or reach.part != "output":
        return f"the kernel of {linear}, before it, does not reach its output"
    if reach.has_bias != ("bias" in linear.variables):
        return f"the bias of {linear}, before it, does not reach its output"
    last = len(output.shape) - 1
    if len(output.shape) == linear.rank and reach.axis != last:  # not under vmap
        return f"the kernel's features become axis {reach.axis} of {linear}, before it"
    if reach.widened:
        return (
            f"{linear}, before it, takes its kernel as it is stored into a product of "
            "a wider dtype: a folded kernel would be rounded"
        )
    if not jnp.issubdtype(reach.dtype, jnp.inexact):
        return f"{linear}, before it, computes in {reach.dtype}"
    return None
