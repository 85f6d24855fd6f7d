"""Which layers are known, by where their call is defined, and which row they read."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.core import Tracer

_UNKNOWN = (
    "a {layer} with the variables {variables} is not one that fold_model knows: "
    "expected {known}, with no variables but mean, var, scale and bias"
)

_LINEAR = ("_Conv", "Conv", "ConvTranspose", "Dense", "Linear")
_NORMS = {  # the classes that define the call of layers that infer by an affine map
    "flax": ("BatchNorm",),
    "bnjax": ("Normalization", "BatchRenorm", "SplitBatchNorm"),
}
_COUNTED = ("steps", "r_max", "d_max")  # of BatchRenorm, here and SBX's: for training
_LAYERS = "BatchNorm, GhostBatchNorm, BatchRenorm, SplitBatchNorm"

# A method is known by where it is defined: a subclass that overrides it is not, but
# what it inherits, or calls with super(), is.


def is_linear(method: Any) -> bool:
    """Whether this is the call of a convolution or dense layer of Flax's."""
    package, name = _origin(method)
    return package == "flax" and name in {f"{kind}.__call__" for kind in _LINEAR}


def is_norm(method: Any, variables: Iterable[str]) -> bool:
    """Whether this is the call of a layer that infers by the usual variables alone."""
    package, name = _origin(method)
    others = {*variables} - {*_COUNTED}
    usual = {"mean", "var"} <= others <= {"mean", "var", "scale", "bias"}
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


def unknown(layer: Any, variables: Iterable[str]) -> str:
    """Why a layer is left alone that is not known."""
    return _UNKNOWN.format(
        layer=type(layer).__name__,
        variables=", ".join(sorted(variables)),
        known=_LAYERS,
    )
