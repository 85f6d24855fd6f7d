"""What Linen and NNX share when they replace the layers of a model.

The model is somebody else's: its layers keep their variables and arguments.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_KEPT = (
    "axis",
    "bias_init",
    "bias_metadata",
    "name",
    "num_features",
    "param_dtype",
    "parent",
    "rngs",
    "scale_init",
    "scale_metadata",
    "use_bias",
    "use_running_average",
    "use_scale",
)

_OPTION = (
    "{option}={value!r} is given, but a layer that is replaced keeps its variables, "
    "feature axis and mode: expected other arguments of {layer}, such as axis_name= or "
    "activation=."
)


class Replacement(NamedTuple):
    """What became of one layer.

    Attributes:
        path: of the layer, such as "encoder/norm"; "" for the model itself.
        before: the name of its class.
        after: the name of the class that it has now; None if it was left.
        reason: why it was left, or what was lost; else "".
    """

    path: str
    before: str
    after: str | None
    reason: str = ""


def without_partial(
    layer: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The layer behind a `functools.partial` of keywords alone, and all options."""
    if isinstance(layer, functools.partial) and not layer.args:
        return layer.func, {**layer.keywords, **options}
    return layer, {**options}


def check_options(options: Mapping[str, Any], layer: Callable[..., Any]) -> None:
    """Raises on options that would change variables, the feature axis or the mode."""
    for option, value in options.items():
        if option in _KEPT:
            name = getattr(layer, "__name__", repr(layer))
            raise ValueError(_OPTION.format(option=option, value=value, layer=name))


def class_name(layer: Any) -> str:
    """Such as flax.nnx.BatchNorm, for a class that its library exports."""
    kind = type(layer)
    library = ".".join(kind.__module__.split(".")[:2])
    return f"{library}.{kind.__qualname__}"
