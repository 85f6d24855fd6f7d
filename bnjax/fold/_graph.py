"""Which normalization reads nothing but which linear layer, from a traced program.

While a model is traced, each call of a layer leaves marks: `checkpoint_name`, an
identity that survives jit, remat, vmap and custom derivatives. The program is then
followed value by value, through the calls that it makes. A normalization is folded if
its input is the output of a linear layer, which nothing else reads.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Path = tuple[str, ...]
Shape = tuple[int, ...]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_tokens = itertools.count()


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        label: of its marks: its input if it normalizes, its output if it is linear.
        path: of the layer in the model.
        layer: the module; within the trace, so that only its settings are of use.
        variables: by name, where the model stores each, and its shape in the call.
        obstacle: what keeps it from being folded, wherever it stands, or None.
        row: of its variables, that it reads, where they have one for each domain; None
            if that is not one number, known in advance.
    """

    label: str
    path: Path
    layer: Any
    variables: dict[str, tuple[Path, Shape]]
    obstacle: str | None
    row: int | None = 0

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
        seen = {name: (key, value.shape) for name, (key, value) in variables.items()}
        call = Call(label, path, layer, seen, obstacle, row)
        calls.setdefault(path, []).append(call)
        return checkpoint_name(x, label)


@dataclasses.dataclass(eq=False)
class Value:
    """What a program computes.

    Attributes:
        origin: the mark that it left, or in words what it comes from.
        shape: of a variable.
        readers: the marks and primitives that read it, marks of variables left out.
    """

    origin: str
    shape: Shape = ()
    readers: list[str] = dataclasses.field(default_factory=list)


class Program(NamedTuple):
    """A traced model.

    Attributes:
        recorder: of its calls.
        variables: by where the model stores them.
        marked: what each mark was put on, once for each time that the program has it.
        outputs: the shapes and dtypes of what the model returns.
    """

    recorder: Recorder
    variables: dict[Path, Value]
    marked: dict[str, list[Value]]
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
    stored = {k: Value("a variable", v.shape) for k, v in variables.items()}
    rest = len(closed.jaxpr.invars) - len(stored)
    given = [*stored.values(), *(Value("an input of the model") for _ in range(rest))]
    program = Program(recorder, stored, {}, outputs)
    for value in _follow(closed.jaxpr, given, program):
        value.readers.append("the caller")
    return program


def _follow(jaxpr: Jaxpr, inputs: list[Value], program: Program) -> list[Value]:
    """The outputs of `jaxpr`; notes readers and marks on the way."""
    constant = Value("a constant")
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update((v, constant) for v in jaxpr.constvars)

    def of(atom) -> Value:
        return constant if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [of(atom) for atom in eqn.invars]
        bodies = _bodies(eqn)
        if eqn.primitive.name in _CALLS and len(bodies) == 1:
            results = _follow(bodies[0], operands, program)
        else:
            results = _step(eqn, operands, program)
            for body in bodies:  # of a loop or branch: its values are others each time
                inside = Value(f"`{eqn.primitive.name}`")
                _follow(body, [inside] * len(body.invars), program)
        values.update(zip(eqn.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _step(eqn: JaxprEqn, operands: list[Value], program: Program) -> list[Value]:
    primitive = eqn.primitive.name
    if primitive != "name":
        for operand in operands:
            operand.readers.append(f"`{primitive}`")
        return [Value(f"`{primitive}`") for _ in eqn.outvars]
    label, prefix = eqn.params["name"], program.recorder.prefix
    if not label.startswith(prefix):  # a name of the user's
        return operands
    program.marked.setdefault(label, []).append(operands[0])
    if "." not in label.removeprefix(prefix):
        operands[0].readers.append(label)
    return [Value(label)]


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
    """

    folded: dict[Path, Call]
    kept: dict[Path, str]
    untouched: set[Path]


def pair(program: Program) -> Pairs:
    """Finds for each normalization the linear layer to fold it into, or why not."""
    pairs = Pairs({}, {}, set())
    for path, calls in program.recorder.norms.items():
        changed = next(filter(None, (_changed(program, call) for call in calls)), None)
        if len({call.row for call in calls}) > 1 or calls[0].row is None:
            changed = (
                "domain is not one number, known in advance, so that it is one affine "
                "map for each domain"
            )
        if changed is not None:
            pairs.untouched.add(path)
            pairs.kept[path] = f"its {changed}"
            continue
        found = _before(program, calls)
        if isinstance(found, Call):
            pairs.folded[path] = found
        else:
            pairs.kept[path] = found
    return pairs


def _changed(program: Program, call: Call) -> str | None:
    """Which variable of a layer is not, in its call, what the model stores."""
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


def _before(program: Program, calls: list[Call]) -> Call | str:
    """The linear layer to fold a normalization into, or why there is none."""
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
    if changed := _changed(program, linear):
        return f"of {linear}, before it, the {changed}"
    for name, (key, _) in linear.variables.items():
        if len(program.variables[key].readers) != 1:
            return f"the {name} of {linear}, before it, is also read elsewhere"
    return linear
