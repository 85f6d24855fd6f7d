"""Where in Flax an entry may lie, and as what: the likeliest reading first.

An entry whose name says nothing of batch normalization or of a kernel passes as it is.
What is learned and what is not cannot be told from its values, but integers are not.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.convert._conventions import CONVENTIONS, SEPARATORS, known_kind, leaf_of

BUFFERS = "buffers"  # the collection of what is not learned and has no place in Flax
STATISTICS = ("mean", "var")

# What a Flax model may do without: counts, and what Keras's renorm trains with.
STATE = {
    "torch": ("n_averaged",),
    "keras": ("count", "moving_stddev", "renorm_mean", "renorm_stddev"),
}
_PARTS = {"depthwise_kernel": "depthwise", "pointwise_kernel": "pointwise"}


class Reading(NamedTuple):
    """One place in Flax for an entry.

    Attributes:
        collection: of variables.
        module: the path in it.
        leaf: the name of the variable.
        kind: of the layer, by which the axes are ordered; None leaves them.
    """

    collection: str
    module: str
    leaf: str
    kind: str | None = None

    @property
    def path(self) -> str:
        return "/".join(filter(None, (self.collection, self.module, self.leaf)))


class Entries(NamedTuple):
    """What there is to read, and what is known of it.

    Attributes:
        package: whose entries they are.
        modules: the names of the entries of each module.
        kinds: class names by module.
        names: as the user gave them.
        rename: modules to Flax's.
        wanted: the leaves of `like` by path, or None.
    """

    package: str
    modules: Mapping[str, Collection[str]]
    kinds: Mapping[str, str]
    names: Any
    rename: Callable[[str], str]
    wanted: Mapping[str, Any] | None


def modules_of(package: str, entries: Collection[str]) -> dict[str, set[str]]:
    """The names of the entries of each module; parts of separable convolutions too."""
    modules: dict[str, set[str]] = {}
    for entry in entries:
        module, _, name = entry.rpartition(SEPARATORS[package])
        modules.setdefault(module, set()).add(name)
        if package == "keras" and name in _PARTS:
            modules.setdefault(_part(module, name), set())
    return modules


def chosen(of: Entries, module: str, name: str, array: np.ndarray) -> Reading | None:
    """The reading that `like` has, or the likeliest; None for what is left out."""
    readings = _readings(of, module, name, array)
    if of.wanted is None:
        return readings[0]
    for reading in readings:
        if reading.path in of.wanted:
            return reading
    if name in STATE[of.package]:
        return None
    if readings[0].kind is None and readings[0].leaf == name != "bias":
        convention = CONVENTIONS[of.package]
        known = (convention.kernel, convention.embedding, *convention[:4])
        names = ", ".join(dict.fromkeys(known))
        raise ValueError(
            f"its name is not known: expected one of {names}, or that `like` has "
            f"{readings[0].path}"
        )
    return readings[0]


def _readings(of: Entries, module: str, name: str, array: np.ndarray) -> list[Reading]:
    found = _parts(of, module, name)
    explicit = [r for r, named in found if named]
    implied = [r for r, named in found if not named]
    if explicit and (of.wanted is None or explicit[0].path in of.wanted):
        return explicit  # `names` need not have the module of the layer
    own = of.rename(module)
    known = known_kind(of.package, of.kinds.get(module))
    as_it_is = [Reading(c, own, name) for c in _collections(of, name, array)]
    slope = [Reading("params", own, "negative_slope", "slope")]
    if of.package == "keras" and name == "alpha":
        return slope + as_it_is if known == "slope" else as_it_is + slope
    if of.package == "keras" and {"mean", "variance"} <= {*of.modules[module]}:
        leaf = {"mean": "mean", "variance": "var"}.get(name)  # of `Normalization`
        as_it_is[:0] = [Reading("batch_stats", own, leaf)] if leaf else []
    leaf, kind = leaf_of(of.package, name, known, array.shape)
    if leaf is None:
        return explicit + as_it_is + implied
    collection = "batch_stats" if leaf in STATISTICS else "params"
    first = [Reading(collection, own, leaf, kind)]
    if name == CONVENTIONS["torch"].kernel and known is None:
        first += slope if array.ndim == 1 else []
        first += [Reading("params", own, "embedding")] if array.ndim == 2 else []
    return explicit + first + as_it_is + implied


def _parts(of: Entries, module: str, name: str) -> list[tuple[Reading, bool]]:
    """An entry of Keras's separable convolution as one of two convolutions.

    Each with whether `names` has its module, or it was taken from that of the layer.
    """
    separable = of.package == "keras" and "pointwise_kernel" in of.modules[module]
    if not separable or name not in (*_PARTS, "bias"):
        return []
    part = _part(module, name)
    named = isinstance(of.names, Mapping) and part in of.names
    try:
        path = of.rename(part)
    except ValueError:  # `names` has the layer's module, or neither
        return []
    kind = {"bias": "norm", "depthwise_kernel": "depthwise"}.get(name, "conv")
    leaf = "bias" if name == "bias" else "kernel"
    return [(Reading("params", path, leaf, kind), named)]


def _part(module: str, name: str) -> str:
    return "/".join(filter(None, (module, _PARTS.get(name, "pointwise"))))


def _collections(of: Entries, name: str, array: np.ndarray) -> list[str]:
    """Where an entry may lie that passes as it is."""
    learned = jnp.issubdtype(array.dtype, jnp.inexact)
    own = "params" if learned and name not in STATE[of.package] else BUFFERS
    others = [path.partition("/")[0] for path in of.wanted or ()]
    return [*dict.fromkeys([own, *others])]
