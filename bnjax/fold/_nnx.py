"""Folding an NNX model: in a copy, layers are given another `__call__`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.fold import _layers
from bnjax.fold._graph import Pairs, Path, pair, trace
from bnjax.fold._layers import Folded, checked_result, is_linear, is_norm

_CALL = "_bnjax_fold_call"
_WRITE = "Call model.eval() first, or fold nnx.view(model, use_running_average=True)."


def fold(model: nnx.Module, *arguments: Any, **keywords: Any) -> Folded:
    """`fold_model` for NNX."""
    graph, state = nnx.split(model)
    stored, merge = _by_path(state)
    inputs = _layers.inputs(arguments, keywords)
    reader = _layers.Reader.new(_WRITE)

    def evaluate(values, arrays):
        args, options = inputs.fill(arrays)
        copy = nnx.merge(graph, merge(values))
        for path, layer in _modules(copy):
            _watch(path, layer, reader)
        return copy(*args, **options)

    program = trace(evaluate, reader.recorder, stored, inputs.arrays)
    pairs = pair(program)
    new = _layers.folded_variables(program, pairs, reader.dtypes, stored, _place)
    copy = nnx.clone(model)
    _convert(copy, new, _layers.replacements(reader, pairs), pairs)
    layers = [p for p, m in _modules(copy) if _variables(m, nnx.BatchStat)]
    not_called = reader.without_call(layers)
    graph, state, others = nnx.split(copy, nnx.Param, ...)
    params, merge = _by_path(state)
    constants, merge_others = _by_path(others)

    def apply(params: Any, *arguments: Any, **keywords: Any) -> Any:
        # Each trace needs variables of its own, so both states are made anew.
        state, others = merge(flatten_dict(params)), merge_others(constants)
        folded = nnx.merge(graph, state, others)
        return folded(*arguments, **{**inputs.static, **keywords})

    params = unflatten_dict(params)
    return checked_result(apply, params, inputs, program, pairs, not_called)


def _place(path: Path, name: str) -> Path:
    return (*path, name)


def _by_path(state: Any) -> tuple[dict[Path, Any], Callable[[Mapping], Any]]:
    """The arrays of a state by path, and how to make a state of such a dictionary.

    The state is new, with variables of its own. Leaves that are no arrays stay.
    """
    leaves, tree = jax.tree.flatten_with_path(state)
    by_path = {}
    for keys, value in leaves:
        *path, last = (jax.tree_util.keystr((key,), simple=True) for key in keys)
        by_path[(*path,) if last == "value" else (*path, last)] = value
    arrays = {k: v for k, v in by_path.items() if hasattr(v, "shape")}

    def merge(values: Mapping) -> Any:
        return jax.tree.unflatten(tree, [values.get(k, v) for k, v in by_path.items()])

    return arrays, merge


def _modules(model: nnx.Module) -> list[tuple[Path, Any]]:
    modules = nnx.iter_modules(model)
    return [(tuple(map(str, path)), module) for path, module in modules]


def _variables(layer: nnx.Module, kind: type = nnx.Variable) -> dict[str, nnx.Variable]:
    return {k: v for k, v in vars(layer).items() if isinstance(v, kind)}


@functools.cache
def _calling(layer: type) -> type:
    """The class whose instances call what is set as their attribute `_CALL`."""

    class Called(layer):
        def __call__(self, *args, **kwargs):
            run = functools.partial(layer.__call__, self)
            return getattr(self, _CALL)(self, run, *args, **kwargs)

    Called.__name__ = layer.__name__
    return Called


def _set_call(layer: nnx.Module, call: Callable[..., Any]) -> None:
    object.__setattr__(layer, "__class__", _calling(type(layer)))
    setattr(layer, _CALL, call)


def _watch(path: Path, layer: nnx.Module, reader: _layers.Reader) -> None:
    """Lets the reader run and record the calls of a layer, if its class is known."""
    method = type(layer).__call__  # a class without one: that of its metaclass
    if is_linear(method):
        read = reader.linear
    elif is_norm(method, _variables(layer)):
        read = reader.norm
    else:
        return reader.note_unknown(path, layer, _variables(layer))

    def call(layer, run, *args, **kwargs):
        variables = {
            name: (_place(path, name), variable[...])
            for name, variable in _variables(layer).items()
        }
        return read(path, layer, variables, run, *args, **kwargs)

    _set_call(layer, call)


def _convert(
    model: nnx.Module,
    new: Mapping[Path, Any],
    replacements: Mapping[Path, _layers.Replacement],
    pairs: Pairs,
) -> None:
    """Gives the layers of `model` their new variables, and the replacements."""
    linears = {call.path for call in pairs.folded.values()}
    for path, layer in _modules(model):
        if path in linears:
            layer.kernel = nnx.Param(new[_place(path, "kernel")])
            if (bias := new.get(_place(path, "bias"))) is not None:
                if layer.bias is None:
                    layer.promote_dtype = functools.partial(
                        _promote_without_bias, layer.promote_dtype
                    )
                layer.bias = nnx.Param(bias)
                if hasattr(layer, "use_bias"):  # Linear compares it with its bias
                    layer.use_bias = True
        if path in replacements:
            for name in _variables(layer):
                delattr(layer, name)
            for name in _layers.AFFINE:
                if (value := new.get(_place(path, name))) is not None:
                    setattr(layer, name, nnx.Param(value))
            _set_call(layer, functools.partial(_call_replacement, replacements[path]))


def _promote_without_bias(promote, arrays, **options):
    """Promotes as before the layer had a bias; casts the bias to the kernel's dtype."""
    x, kernel, bias = arrays
    x, kernel, _ = promote((x, kernel, None), **options)
    return x, kernel, jnp.asarray(bias, kernel.dtype)


def _call_replacement(
    replacement, layer, run, x, *args, residual=None, domain=None, **kwargs
):
    variables = {n: v[...] for n, v in _variables(layer).items()}
    return replacement(x, variables, residual, domain)
