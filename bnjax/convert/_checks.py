"""What is no state_dict, no tree of variables or no table of names; dtypes."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnjax._checks import BatchNormWarning

CASTS = {
    "torch": "net.to(torch.{dtype}).state_dict()",
    "keras": '{{w.path: np.asarray(w, "{dtype}") for w in model.weights}}',
    "flax": "jax.tree.map(lambda v: v.astype(jnp.{dtype}), variables)",
}
NO_VARIABLES = (
    "the variables are of type {received}: expected a dict of collections. Write "
    "{{'params': params, 'batch_stats': batch_stats}}, or of a state "
    "{{'params': state.params, 'batch_stats': state.batch_stats}}."
)
_EXPECTED = {
    "torch": "the entries of a state_dict by name. Write {write}",
    "keras": (
        "weights by path. Write {{w.path: w for w in model.weights}}, or of a layer "
        "{{w.name: w for w in layer.weights}}."
    ),
}
_NARROWED = (
    "{number} of {total} entries are {received}, {first} the first: they become "
    "{becomes}, for JAX has no {received} unless it is told so. Cast before, "
    "{cast}, or write jax.config.update('jax_enable_x64', True)."
)


def weights(package: str, given: Any, name: str = "") -> None:
    """Raises on a model, a path or anything else in place of its weights."""
    name = name or {"torch": "state_dict", "keras": "weights"}[package]
    if isinstance(given, Mapping) and all(isinstance(entry, str) for entry in given):
        return
    write = "net.state_dict() for a network `net`."
    if isinstance(given, (str, bytes, os.PathLike)):
        write = "torch.load(path, weights_only=True)."
    received = f"a {type(given).__name__}"
    if isinstance(given, Mapping):
        received = f"a {type(given).__name__} whose keys are no strings"
    expected = _EXPECTED[package].format(write=write)
    raise TypeError(f"{name} is {received}: expected {expected}")


def names_and_kinds(names: Any, kinds: Any) -> None:
    """Raises on tables of other things than strings."""
    if names is not None and not callable(names) and not _is_table(names):
        raise TypeError(
            f"names={names!r}: expected a dict of module paths, or a function of one. "
            "Write names={'conv1': 'Conv_0'}."
        )
    if not _is_table(kinds):
        raise TypeError(
            f"kinds={kinds!r}: expected names of classes by module path. Write "
            "kinds={name: type(module).__name__ for name, module in "
            "net.named_modules()}."
        )


def warn_narrowed(package: str, dtypes: Mapping[str, Any]) -> None:
    """Warns of entries wider than JAX's arrays are."""
    wide = [
        entry
        for entry, dtype in dtypes.items()
        if jnp.issubdtype(dtype, jnp.inexact)
        and jax.dtypes.canonicalize_dtype(dtype) != dtype
    ]
    if not wide:
        return
    received = dtypes[wide[0]]
    narrow = jax.dtypes.canonicalize_dtype(received)
    message = _NARROWED.format(
        number=len(wide),
        total=len(dtypes),
        received=received,
        first=repr(wide[0]),
        becomes=narrow,
        cast=CASTS[package].format(dtype=narrow),
    )
    warnings.warn(message, BatchNormWarning, stacklevel=4)


def _is_table(given: Any) -> bool:
    """Whether it is a mapping to strings; Keras's layers without weights lack a key."""
    return isinstance(given, Mapping) and all(
        isinstance(value, str) for value in given.values()
    )
