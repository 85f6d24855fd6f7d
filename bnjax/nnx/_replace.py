"""Other layers in the place of those of a model that somebody else has written."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from bnjax import _replacement, _trees
from bnjax._replacement import Replacement, class_name
from bnjax.nnx._batch_norm import BatchNorm, Normalization

_VARIABLES = ("scale", "bias", "mean", "var")

_LAYER = (
    "layer={layer!r} does not have the variables of flax.nnx.BatchNorm: expected "
    "BatchNorm, GhostBatchNorm, BatchRenorm or SplitBatchNorm of bnjax.nnx, or a "
    "subclass of one."
)


def replace_batch_norm(
    model: nnx.Module,
    layer: Callable[..., Normalization] = BatchNorm,
    *,
    where: str | Sequence[str] = "*",
    **options: Any,
) -> tuple[Any, tuple[Replacement, ...]]:
    """Replaces each `flax.nnx.BatchNorm` of a model by a layer of bnjax.

    In place, like PyTorch's `convert_sync_batchnorm`. The new layers hold the variables
    of the old ones: values, metadata, shardings and paths stay, so that an optimizer
    that was made before still fits. They also keep the arguments of the old ones, and
    their mode. A layer that stands in several places of the model is replaced once.
    Layers that were stacked by `nnx.vmap` stay stacked.

    A `SplitBatchNorm` has a row of each variable for each domain: all start as copies,
    and an optimizer must be made anew. Left are subclasses that override `__call__` or
    have variables of their own.

    Args:
        model: a model, or a layer.
        layer: a class of `bnjax.nnx` with the variables of `BatchNorm`, or a
            `functools.partial` of one.
        where: shell patterns for the paths of layers, such as "encoder/*"; * matches
            any characters, also /.
        **options: arguments of `layer`, such as `virtual_batch_size=32`, that take
            precedence over those of the old layers. `axis_name="batch"` lets layers
            that were written for one device share statistics.

    Returns:
        The model (the new layer, if the model is a layer), and a Replacement for each
        layer of Flax's or bnjax's.

    Raises:
        TypeError: a `layer` with other variables, or that does not take `options`.
        ValueError: a pattern that matches no layer, or an option that would change
            variables, the feature axis or the mode. The model is as it was.

    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
    ...                        nnx.BatchNorm(4, rngs=nnx.Rngs(1)))
    >>> model, found = replace_batch_norm(model)
    >>> print(found[0].path, found[0].before, found[0].after)
    layers/1 flax.nnx.BatchNorm bnjax.nnx.BatchNorm

    References: PyTorch's `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    layer, options = _replacement.without_partial(layer, options)
    is_other_class = isinstance(layer, type) and not issubclass(layer, Normalization)
    if is_other_class or isinstance(layer, nnx.Module) or not callable(layer):
        raise TypeError(_LAYER.format(layer=layer))
    _replacement.check_options(options, layer)

    def make(old: nnx.BatchNorm) -> tuple[Any, str]:
        if isinstance(old, Normalization):
            return None, "is a layer of bnjax"
        if reason := _of_its_own(old, nnx.BatchNorm.__call__.__module__):
            return None, reason
        new = _like(old, layer, **options)
        if getattr(new, "statistics", None) != ("mean", "var"):
            raise TypeError(_LAYER.format(layer=layer))
        shape = new.mean.shape
        for name in _VARIABLES:
            variable = getattr(old, name)
            if variable is not None and len(shape) > 1:  # a row for each domain
                if variable.get_metadata().get("out_sharding"):
                    return None, f"the sharding of {name} is that of one row"
                variable = _with_rows(variable, getattr(new, name).ndim, shape[0])
            setattr(new, name, variable)
        if hasattr(new, "steps"):  # a counter for each layer of a stack
            stack = old.mean.shape[:-1]
            new.steps.set_value(jnp.zeros(stack, new.steps.get_value().dtype))
        return new, ""

    return _replace(model, nnx.BatchNorm, make, where)


def restore_batch_norm(
    model: nnx.Module, *, where: str | Sequence[str] = "*"
) -> tuple[Any, tuple[Replacement, ...]]:
    """Replaces the layers of bnjax in a model by `flax.nnx.BatchNorm`.

    The inverse of `replace_batch_norm`, in place. Left are layers with other variables
    (`SplitBatchNorm`, `DecorrelatedBatchNorm`), subclasses as in `replace_batch_norm`,
    and those with an option that Flax does not have, because the model would compute
    something else.

    Args:
        model: a model, or a layer.
        where: see `replace_batch_norm`.

    Returns:
        As `replace_batch_norm`.

    Raises:
        ValueError: a pattern that matches no layer. The model is as it was.

    >>> layer, found = restore_batch_norm(BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> print(type(layer) is nnx.BatchNorm)
    True

    References: see `replace_batch_norm`.
    """

    def make(old: Any) -> tuple[Any, str]:
        if not isinstance(old, Normalization):
            return None, "is a layer of Flax"
        if not isinstance(old, nnx.BatchNorm):
            return None, f"{type(old).__name__} has other variables"
        if reason := _of_its_own(old, "bnjax"):
            return None, reason
        defaults = {"unbiased": False, "update_stats": None, "frozen": False}
        defaults |= {"skip_nonfinite_updates": False, "activation": None}
        set_options = [n for n, value in defaults.items() if getattr(old, n) != value]
        if set_options:
            return None, f"Flax has no {', '.join(set_options)}"
        new = _like(old, nnx.BatchNorm)
        for name in _VARIABLES:
            setattr(new, name, getattr(old, name))
        lost = [n for n in ("steps", "moments") if hasattr(old, n)]
        return new, f"lost: {', '.join(lost)}" if lost else ""

    return _replace(model, (nnx.BatchNorm, Normalization), make, where)


def _of_its_own(old: Any, library: str) -> str:
    """What a subclass has that a layer in its place would not have; "" if nothing.

    Args:
        old: the layer.
        library: the module, or the package, whose `__call__` it should have.
    """
    name = type(old).__qualname__
    if not f"{type(old).__call__.__module__}.".startswith(f"{library}."):
        return f"{name} overrides __call__"
    known = {*_VARIABLES, "steps", "moments"}
    own = [
        key
        for key, value in vars(old).items()
        if key not in known and isinstance(value, nnx.Variable | nnx.Pytree)
    ]
    return f"{name} has variables of its own: {', '.join(own)}" if own else ""


def _like(old: Any, layer: Callable[..., Any], **options: Any) -> Any:
    """A layer with the arguments of `old`, and with new variables."""
    names = {*inspect.signature(nnx.BatchNorm.__init__).parameters} & {*vars(old)}
    arguments = {name: getattr(old, name) for name in names}
    arguments |= {"use_scale": old.scale is not None, "use_bias": old.bias is not None}
    return layer(rngs=nnx.Rngs(0), **(arguments | options))


def _with_rows(variable: nnx.Variable, ndim: int, rows: int) -> nnx.Variable:
    """A variable with `rows` copies of the value, along an axis before the features."""
    value = variable.get_value()
    if ndim > 1:
        value = jnp.repeat(jnp.expand_dims(value, -2), rows, axis=-2)
    return type(variable)(value, **variable.get_metadata())


def _replace(model, kinds, make, where) -> tuple[Any, tuple[Replacement, ...]]:
    layers: dict[str, Any] = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, kinds)
    }
    chosen = _trees.matching(where, {*layers}, "where") if layers else set()
    references = [*_references(model)]
    fixed = {id(child) for node, _, child in references if isinstance(node, tuple)}
    reached = {id(model), *(id(child) for _, _, child in references)} - fixed
    found, new_layers = [], {}
    for path, old in layers.items():
        new, reason = make(old) if path in chosen else (None, "where does not match it")
        if new is not None and id(old) not in reached:
            new, reason = None, "is held by a tuple or an unknown container"
        if new is not None:
            new_layers[id(old)] = new
        after = None if new is None else class_name(new)
        found.append(Replacement(path, class_name(old), after, reason))
    for node, key, child in references:
        if id(child) not in new_layers:
            continue
        if isinstance(node, list | dict | nnx.List):
            node[key] = new_layers[id(child)]
        else:
            setattr(node, key, new_layers[id(child)])
    return new_layers.get(id(model), model), tuple(found)


def _references(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(holder, key, child) for all that modules, lists, tuples and dicts hold."""
    seen, todo = set(), [model]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, list | tuple | nnx.List):
            items = list(enumerate(node))
        elif isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, nnx.Module):
            items = [
                (k, v) for k, v in vars(node).items() if not k.startswith("_pytree")
            ]
        else:
            continue
        for key, child in items:
            yield node, key, child
            todo.append(child)
