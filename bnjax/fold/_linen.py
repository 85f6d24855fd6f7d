"""Folding a Linen model: its methods are intercepted, the model itself unchanged."""

from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.fold import _layers
from bnjax.fold._graph import Path, pair, trace
from bnjax.fold._layers import Folded, checked_result, is_linear, is_norm

_WRITE = (
    "Pass what makes the model evaluate, for example "
    "fold_model(model, variables, x, train=False)."
)


def fold(model: nn.Module, variables: Any, *arguments: Any, **keywords: Any) -> Folded:
    """`fold_model` for Linen."""
    flat: Any = flatten_dict(nn.meta.unbox(flax.core.unfreeze(variables)))
    for key, value in flat.items():  # SBX's counter starts as a number
        if key[0] == "batch_stats" and isinstance(value, (int, float)):
            flat[key] = jnp.asarray(value)
    stored = {k: v for k, v in flat.items() if hasattr(v, "shape")}
    sown = {k: v for k, v in flat.items() if k not in stored}  # tuples of arrays
    inputs = _layers.inputs(arguments, keywords)
    reader = _layers.Reader.new(_WRITE)

    def evaluate(values, arrays):
        args, options = inputs.fill(arrays)
        with nn.intercept_methods(_reading(reader)):
            return model.apply(unflatten_dict(values | sown), *args, **options)

    program = trace(evaluate, reader.recorder, stored, inputs.arrays)
    pairs = pair(program)
    new = _layers.folded_variables(program, pairs, reader.dtypes, stored, _place)
    new |= sown
    params = unflatten_dict({k[1:]: v for k, v in new.items() if k[0] == "params"})
    others = unflatten_dict({k: v for k, v in new.items() if k[0] != "params"})
    linears = {call.path for call in pairs.folded.values()}
    biased = {path for path in linears if _place(path, "bias") in new}
    intercept = _replacing(_layers.replacements(reader, pairs), biased)

    def apply(params: Any, *arguments: Any, **keywords: Any) -> Any:
        options = {**inputs.static, **keywords}
        with nn.intercept_methods(intercept):
            return model.apply({**others, "params": params}, *arguments, **options)

    layers = sorted({k[1:-1] for k in stored if k[0] == "batch_stats"})
    not_called = reader.without_call(layers)
    return checked_result(apply, params, inputs, program, pairs, not_called)


def _place(path: Path, name: str) -> Path:
    return ("params", *path, name)


def _interceptor(call):
    """An interceptor for `nn.intercept_methods`, of a function for layers alone.

    Args:
        call: (layer, method, run, *args, **kwargs) -> the result. `run` is the call
            itself. Methods of layers that are not bound to variables are run as usual.
    """

    def intercept(run, args, kwargs, context):
        layer = context.module
        method = getattr(context.orig_method, "func", None)
        if method is None or layer.scope is None:
            return run(*args, **kwargs)
        return call(layer, method, run, *args, **kwargs)

    return intercept


def _reading(reader: _layers.Reader):
    """Runs the layers as usual, through the reader."""

    @_interceptor
    def intercept(layer, method, run, /, *args, **kwargs):
        path = layer.scope.path
        if is_linear(method):
            variables = _variables(layer, "params")
            return reader.linear(path, layer, variables, run, *args, **kwargs)
        variables = _variables(layer, "batch_stats", "params")
        if is_norm(method, variables):
            return reader.norm(path, layer, variables, run, *args, **kwargs)
        reader.note_unknown(path, layer, variables)
        return run(*args, **kwargs)

    return intercept


def _variables(layer: nn.Module, *collections: str) -> dict[str, tuple[Path, Any]]:
    """By name, where a layer's variables are stored, and the variables."""
    variables, path = {}, layer.path if layer.scope is None else layer.scope.path
    for collection in collections:
        for name, value in layer.variables.get(collection, {}).items():
            variables[name] = (collection, *path, name), nn.meta.unbox(value)
    return variables


def _replacing(replacements: dict[Path, _layers.Replacement], biased: set[Path]):
    """Calls the replacement of each normalization, and adds the biases gained."""

    @_interceptor
    def intercept(layer, method, run, /, *args, **kwargs):
        path = layer.scope.path
        if path in biased and is_linear(method) and not layer.use_bias:
            bias = layer.get_variable("params", "bias")
            return _layers.add_bias(run(*args, **kwargs), bias)
        if path in replacements and is_norm(method, ("mean", "var")):
            x = args[0] if args else kwargs["x"]
            options = {k: kwargs[k] for k in ("residual", "domain") if k in kwargs}
            params = layer.variables.get("params", {})
            return replacements[path](x, params, **options)
        return run(*args, **kwargs)

    return intercept
