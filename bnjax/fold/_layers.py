"""What Linen and NNX have in common: known layers, their replacements, the result."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bnjax import _axes, _dtypes
from bnjax.fold._graph import Call, Pairs, Path, Program, Recorder, computed_in, wider
from bnjax.fold._kernels import affine, fold_conv, fold_conv_transpose, fold_dense

AFFINE = ("mean", "multiplier", "bias")  # the variables of what is not folded

_LINEAR = ("_Conv", "Conv", "ConvTranspose", "Dense", "Linear")
_LINEAR_VARIABLES = ("kernel", "bias")
_CONTRACTIONS = (  # attributes by which the user can replace the product of a layer
    "dot_general",
    "dot_general_cls",
    "conv_general_dilated",
    "conv_general_dilated_cls",
)
_NORMS = {  # the classes that define the call of layers that infer by an affine map
    "flax": ("BatchNorm",),
    "bnjax": ("Normalization", "BatchRenorm", "SplitBatchNorm"),
}
_RENORM_VARIABLES = ("steps", "r_max", "d_max")  # here and in SBX, for training alone

_UNKNOWN = (
    "a {layer} with the variables {variables} is not one that fold_model knows: "
    "expected BatchNorm, GhostBatchNorm, BatchRenorm, SplitBatchNorm, with no "
    "variables but mean, var, scale and bias"
)
_NOT_CALLED = (
    "no call of it was seen: these inputs do not call it, or a jit that was traced "
    "before does"
)
_BATCH_STATISTICS = (
    "{layer} {does}, which cannot be folded: expected a model in evaluation, whose "
    "layers normalize by their running statistics and leave them alone. {write}"
)

# A method is known by where it is defined: a subclass that overrides it is not, but
# what it inherits, or calls with super(), is.


def is_linear(method: Any) -> bool:
    """Whether this is the call of a convolution or dense layer of Flax's."""
    package, name = _origin(method)
    return package == "flax" and name in {f"{kind}.__call__" for kind in _LINEAR}


def is_norm(method: Any, variables: Iterable[str]) -> bool:
    """Whether this is the call of a layer that infers by the usual variables alone."""
    package, name = _origin(method)
    inference = {*variables} - {*_RENORM_VARIABLES}
    usual = {"mean", "var"} <= inference <= {"mean", "var", "scale", "bias"}
    known = {f"{layer}.__call__" for layer in _NORMS.get(package, ())}
    return name in known and usual


def _origin(method: Any) -> tuple[str, str]:
    """The package that a method is defined in, and its name there."""
    module = getattr(method, "__module__", None) or ""
    return module.partition(".")[0], getattr(method, "__qualname__", "")


def row_of(domain: Any) -> int | None:
    """The row of a domain's variables; None if it is not one number, known here."""
    if domain is None:
        return 0
    if isinstance(domain, Tracer) or np.ndim(domain):
        return None
    return int(domain)


def _unknown_layer(layer: Any, variables: Iterable[str]) -> str:
    """Why a layer of an unknown class is left alone."""
    return _UNKNOWN.format(
        layer=type(layer).__name__, variables=", ".join(sorted(variables))
    )


class Reader(NamedTuple):
    """Intercepts the layers' calls while the model is traced: runs and records them.

    Attributes:
        recorder: stores the calls.
        write: the advice for a model that is not in evaluation.
        dtypes: for each normalization, its output dtypes by input dtype.
        unknown: for each layer of an unknown class, the reason why it is not folded.
    """

    recorder: Recorder
    write: str
    dtypes: dict[Path, dict[Any, Any]]
    unknown: dict[Path, str]

    @classmethod
    def new(cls, write: str) -> "Reader":
        """Makes a reader that has recorded no call."""
        return cls(Recorder(), write, {}, {})

    def note_unknown(self, path: Path, layer: Any, variables: Iterable[str]) -> None:
        """Notes a layer of an unknown class."""
        self.unknown[path] = _unknown_layer(layer, variables)

    def without_call(self, layers: Iterable[Path]) -> dict[Path, str]:
        """Returns, for each of these layers without a recorded call, the reason."""
        paths = (path for path in layers if path not in self.recorder.norms)
        return {path: self.unknown.get(path, _NOT_CALLED) for path in paths}

    def norm(self, path, layer, variables, run, x, *args, **kwargs):
        """Calls a normalization on its marked input."""
        self._evaluates(path, layer, args, kwargs)
        x = jnp.asarray(x)
        last = (x.ndim - 1,)
        obstacle = None
        if _axes.canonical(layer.axis, x.ndim) != last:
            obstacle = f"its feature axis is {layer.axis}, not the last"
        norms, row = self.recorder.norms, row_of(kwargs.get("domain"))
        x = self.recorder.mark(norms, path, layer, variables, obstacle, x, row)
        y = run(x, *args, **kwargs)
        self.dtypes.setdefault(path, {})[x.dtype] = y.dtype
        return y

    def linear(self, path, layer, variables, run, *args, **kwargs):
        """Calls a linear layer, and marks its output."""
        usual = (None, lax.dot_general, lax.conv_general_dilated)
        custom = [n for n in _CONTRACTIONS if getattr(layer, n, None) not in usual]
        obstacle = f"has a {custom[0]} of its own" if custom else None
        if not getattr(layer, "shared_weights", True):
            obstacle = "has a kernel for each position"
        y, linears = run(*args, **kwargs), self.recorder.linears
        return self.recorder.mark(linears, path, layer, variables, obstacle, y)

    def _evaluates(self, path, layer, args, kwargs) -> None:
        """Raises unless the call reads the running statistics and writes nothing."""
        if getattr(layer, "frozen", False):
            return
        running = args[0] if args else kwargs.get("use_running_average")
        if running is None:
            running = layer.use_running_average
        update = kwargs.get("update_stats")
        if update is None:
            update = getattr(layer, "update_stats", None)
        if running is None or (running and not update):  # None: the layer raises
            return
        raise ValueError(
            _BATCH_STATISTICS.format(
                layer=f"{type(layer).__name__} '{'/'.join(path)}'",
                does="updates its statistics" if running else "normalizes by the batch",
                write=self.write,
            )
        )


class Replacement(NamedTuple):
    """The function that the folded model calls instead of a normalization.

    Attributes:
        folded: whether the multiplier was folded into the linear layer before it.
        adds_offset: whether the offset was not folded: it is added here, as the bias.
        axis: the feature axis.
        activation: the activation of the layer, if it has one.
        dtypes: its output dtypes by input dtype.
        row: see `Call`.
        name: the name of the layer, for messages.
    """

    folded: bool
    adds_offset: bool
    axis: Any
    activation: Callable[[jax.Array], jax.Array] | None
    dtypes: Mapping[Any, Any]
    row: int | None
    name: str

    def __call__(
        self, x, variables: Mapping[str, Any], residual=None, domain=None
    ) -> jax.Array:
        """The output: `x`, or its affine map; the residual; the activation."""
        if row_of(domain) != self.row:
            raise ValueError(
                f"{self.name} received domain={domain}: expected {self.row}, for which "
                "the model was folded. Fold it for this domain; or with an array for "
                "the domain, which keeps the layer as it is."
            )
        x = jnp.asarray(x)
        if x.dtype not in self.dtypes:
            expected = " or ".join(str(dtype) for dtype in self.dtypes)
            raise ValueError(
                f"{self.name} received {x.dtype}: expected {expected}, as with the "
                "inputs that the model was folded for. Fold it for inputs of this "
                "dtype, or cast them."
            )
        output = self.dtypes[x.dtype]
        y = x.astype(_dtypes.statistics_dtype(x.dtype, output))
        if not self.folded:
            axes = _axes.canonical(self.axis, y.ndim)
            vectors = (jnp.asarray(variables[name], y.dtype) for name in AFFINE)
            mean, multiplier, bias = (_axes.expand(v, axes, y.ndim) for v in vectors)
            y = (y - mean) * multiplier + bias
        elif self.adds_offset:
            y = add_bias(y, variables["bias"])
        if residual is not None:
            y = y + jnp.asarray(residual, y.dtype)
        if self.activation is not None:
            y = self.activation(y)
        return y.astype(output)


def replacements(reader: Reader, pairs: Pairs) -> dict[Path, Replacement]:
    """What replaces each normalization that is not left untouched."""
    by_path = {}
    for path, (call, *_) in reader.recorder.norms.items():
        if path not in pairs.untouched:
            by_path[path] = Replacement(
                folded=path in pairs.folded,
                adds_offset=path in pairs.adding_offset,
                axis=call.layer.axis,
                activation=getattr(call.layer, "activation", None),
                dtypes=reader.dtypes[path],
                row=call.row,
                name=str(call),
            )
    return by_path


def folded_variables(
    program: Program,
    pairs: Pairs,
    dtypes: Mapping[Path, Mapping[Any, Any]],
    variables: Mapping[Path, Any],
    place: Callable[[Path, str], Path],
) -> dict[Path, Any]:
    """The variables after folding; moves pairs that overflow to `pairs.kept`.

    Args:
        program: the traced model.
        pairs: the pairs to fold. Those that overflow are moved to `kept`, and where an
            offset is added in its own place is noted.
        dtypes: for each normalization, its output dtypes by input dtype.
        variables: the variables of the model, by where it stores them.
        place: (path of a layer, name) -> where that variable is stored.
    """
    new = dict(variables)
    for path, (norm, *_) in program.recorder.norms.items():
        if path in pairs.untouched:
            continue
        compute = _dtypes.statistics_dtype(*dtypes[path], *dtypes[path].values())
        stored = {
            name: _inference_row(new.pop(key), norm)
            for name, (key, _) in norm.variables.items()
        }
        vectors = [
            _at_least(compute, stored.get(name))
            for name in ("mean", "var", "scale", "bias")
        ]
        epsilon = norm.layer.epsilon
        if path in pairs.folded:
            linear = pairs.folded[path]
            old: list[Any] = [new.get(place(linear.path, n)) for n in _LINEAR_VARIABLES]
            ((input_dtype, output_dtype),) = dtypes[path].items()
            adds_offset = wider(input_dtype, output_dtype) != input_dtype
            dtype = wider(computed_in(program, linear), old[0].dtype)
            folded = _fold(linear.layer, old, vectors, epsilon, dtype, adds_offset)
            if _overflows(folded[:2], [*old, *vectors], input_dtype):
                del pairs.folded[path]
                pairs.kept[path] = (
                    f"the kernel or the bias of {linear}, before it, would overflow "
                    f"{input_dtype}"
                )
            else:
                kernel, bias, offset = folded
                new[place(linear.path, "kernel")] = kernel
                if bias is not None:
                    new[place(linear.path, "bias")] = bias
                if offset is not None:
                    new[place(path, "bias")] = offset
                    pairs.adding_offset.add(path)
                continue
        mean, var, scale, bias = vectors
        multiplier, offset = affine(mean, var, scale, epsilon=epsilon)
        bias = jnp.zeros_like(offset) if bias is None else bias
        new.update(
            (place(path, n), v) for n, v in zip(AFFINE, (mean, multiplier, bias))
        )
    return new


def _inference_row(value: Any, norm: Call) -> Any:
    """Of a variable with a row for each domain, the one that inference reads."""
    return value[norm.row] if jnp.ndim(value) > np.size(norm.layer.axis) else value


def _at_least(dtype: Any, value: Any) -> Any:
    """A variable in the dtype that the layer computes in, if that is wider."""
    if value is None:
        return None
    if not jnp.iscomplexobj(value):
        dtype = _dtypes.real(dtype)
    return jnp.asarray(value, wider(value.dtype, dtype))


def _fold(layer, linear, vectors, epsilon, dtype, adds_offset):
    """The kernel, the bias, and an offset that is added in its own place.

    Args:
        layer: the linear layer.
        linear: its kernel and its bias; None for no bias.
        vectors: the mean, var, scale and bias of the normalization.
        epsilon: added to the variance.
        dtype: the dtype of the kernel and the bias.
        adds_offset: whether the offset is returned by itself; otherwise it is None.
    """
    (kernel, bias), offset = linear, None
    if adds_offset:
        _, offset = affine(*vectors, epsilon=epsilon)
        mean, var, scale, _ = vectors
        vectors = [jnp.zeros_like(mean), var, scale, None]
    fold = fold_dense if jnp.ndim(kernel) == 2 else fold_conv
    if hasattr(layer, "transpose_kernel"):
        fold = functools.partial(
            fold_conv_transpose, transpose_kernel=layer.transpose_kernel
        )
    kernel, new_bias = fold(jnp.asarray(kernel, dtype), bias, *vectors, epsilon=epsilon)
    return kernel, None if adds_offset and bias is None else new_bias, offset


def _overflows(new: Iterable[Any], old: Iterable[Any], dtype: Any) -> bool:
    """Whether something becomes infinite in that dtype that was finite."""
    if any(isinstance(value, Tracer) for value in new):
        return False

    def are_finite(values, dtype=None):
        return all(jnp.isfinite(jnp.asarray(v, dtype)).all() for v in values)

    new, old = ([v for v in values if v is not None] for values in (new, old))
    return not are_finite(new, dtype) and are_finite(old)


def add_bias(y: jax.Array, bias: Any) -> jax.Array:
    """The output of a linear layer that had no bias, with one."""
    return y + _axes.expand(jnp.asarray(bias, y.dtype), (y.ndim - 1,), y.ndim)


class Inputs(NamedTuple):
    """The arguments of a model, apart from its variables.

    Attributes:
        arrays: the leaves that are traced.
        static: the keyword arguments without an array, which `apply` remembers.
        fill: (arrays) -> (arguments, keywords).
    """

    arrays: list[Any]
    static: dict[str, Any]
    fill: Callable[[list[Any]], tuple[tuple, dict[str, Any]]]


def inputs(arguments: tuple, keywords: dict[str, Any]) -> Inputs:
    """Separates the arrays in the arguments of a model from its settings."""
    leaves, tree = jax.tree.flatten((arguments, keywords))
    positions = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def fill(arrays):
        by_position = dict(zip(positions, arrays, strict=True))
        filled = [by_position.get(i, leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, filled)

    static = {k: v for k, v in keywords.items() if not _has_array(v)}
    return Inputs([leaves[i] for i in positions], static, fill)


def _has_array(tree: Any) -> bool:
    return any(map(_is_array, jax.tree.leaves(tree)))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


class Folded(NamedTuple):
    """A model whose batch normalization is in the layers before it.

    Attributes:
        apply: (params, *inputs) -> what the model returns. The keyword arguments that
            hold no array are those that it was folded with.
        params: a nested dictionary of arrays.
        folded: (linear layer, normalization) for each pair that has become one.
        kept: (normalization, reason) for each that was not folded into another layer.
    """

    apply: Callable[..., Any]
    params: Any
    folded: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]


def checked_result(
    apply: Callable[..., Any],
    params: Any,
    inputs: Inputs,
    program: Program,
    pairs: Pairs,
    not_called: Mapping[Path, str],
) -> Folded:
    """Returns the result, if `apply` returns the shapes and dtypes of the model."""

    def run(params, arrays):
        arguments, keywords = inputs.fill(arrays)
        return apply(params, *arguments, **keywords)

    try:
        outputs = jax.eval_shape(run, params, inputs.arrays)
    except (flax.errors.FlaxError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the folded model does not run ({error}): expected a model in which only "
            "a normalization itself reads its statistics and parameters. Keep what "
            "else the model reads in a variable of another layer."
        ) from error
    if _described(outputs) != _described(program.outputs):
        raise ValueError(
            f"the folded model returns {outputs}: expected {program.outputs}, what the "
            "model returns. Fold it without `mutable` and the like."
        )
    names = {path: "/".join(path) for path in program.recorder.norms}
    folded = [("/".join(pairs.folded[p].path), names[p]) for p in pairs.folded]
    reasons = {**pairs.kept, **not_called}
    kept = [("/".join(path), reason) for path, reason in reasons.items()]
    return Folded(apply, params, tuple(folded), tuple(kept))


def _described(outputs: Any) -> Any:
    leaves, tree = jax.tree.flatten(outputs)
    return [(leaf.shape, leaf.dtype) for leaf in leaves], tree
