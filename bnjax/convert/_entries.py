"""Entry by entry from one package to another, and the checks on the whole."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.convert import _split, _tree
from bnjax.convert._conventions import (
    CONVENTIONS,
    SEPARATORS,
    from_flax,
    kind_of,
    leaf_of,
    to_flax,
)

_ADVICE = (
    "Expected the same layers in both models, with the same features. Name modules "
    "with names={'conv1': 'Conv_0'}, say what shapes do not with kinds={'up': "
    "'ConvTranspose2d'}, and take out what the other model lacks."
)
_STATISTICS = ("mean", "var")


def read(
    package: str,
    weights: Mapping[str, Any],
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Any,
) -> dict[str, Any]:
    """Flax variables; see `from_torch`."""
    rename = _tree.renamer(names, SEPARATORS[package])
    problems = _tree.Problems()
    found: _tree.Flat = {}
    sources: dict[str, str] = {}
    modules = {entry.rpartition(SEPARATORS[package])[0] for entry in weights}
    for entry, value in _split.stacked(weights, kinds).items():
        module, _, name = entry.rpartition(SEPARATORS[package])
        if name == CONVENTIONS[package].count:
            continue
        try:
            leaf, array = _to_flax(package, name, value, kinds.get(module))
            path = _path(rename(module), leaf)
            if path in found:
                raise ValueError(f"{path} comes from {sources[path]} already")
        except ValueError as error:
            problems.append(f"{entry}: {error}")
        else:
            found[path], sources[path] = array, entry
    problems += _tree.unused(names, kinds, modules, SEPARATORS[package])
    problems += _tree.disagreements(found)
    dtypes = {path: array.dtype for path, array in found.items()}
    if like is not None:
        wanted = _tree.flat(_collections(like))
        problems += _tree.compare(found, wanted, sources)
        dtypes |= {path: leaf.dtype for path, leaf in wanted.items()}
    problems.check("the weights do not fit", _ADVICE)
    return _tree.nested({p: jnp.asarray(a.astype(dtypes[p])) for p, a in found.items()})


def write(
    variables: Mapping[str, Any],
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Mapping[str, Any] | None,
    count: np.ndarray,
) -> dict[str, np.ndarray]:
    """A state_dict; see `to_torch`."""
    module_of = _tree.inverse(names, SEPARATORS["torch"], like)
    problems = _tree.Problems()
    found: _tree.Flat = {}
    sources: dict[str, str] = {}
    for path, value in _tree.flat(_collections(variables)).items():
        _, *modules, leaf = path.split("/")
        try:
            module = module_of("/".join(modules))
            array = _from_flax(leaf, np.asarray(value), kinds.get(module))
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        name = getattr(CONVENTIONS["torch"], leaf)
        arrays = {_entry(module, name): array}
        if _split.is_split(kinds.get(module)):
            arrays = _split.unstacked(module, name, array)
        found |= arrays
        sources |= dict.fromkeys(arrays, path)
        for entry in arrays if leaf == "var" else ():
            owner = entry.rpartition(SEPARATORS["torch"])[0]
            counter = _entry(owner, CONVENTIONS["torch"].count)
            if like is None or counter in like:
                found[counter], sources[counter] = count, path
    dtypes = {entry: array.dtype for entry, array in found.items()}
    if like is not None:
        wanted = {entry: _tree.to_numpy(value) for entry, value in like.items()}
        problems += _tree.compare(found, wanted, sources)
        dtypes |= {entry: value.dtype for entry, value in wanted.items()}
    problems.check("the variables do not fit", _ADVICE)
    return {e: a.astype(dtypes[e], order="C") for e, a in found.items()}


def _to_flax(package: str, name: str, value: Any, kind: str | None):
    """An entry of a layer as Flax has it: what it is called there, and the array."""
    array = _tree.to_numpy(value)
    known = kind_of(kind, array.shape)
    leaf = leaf_of(package, name, known)
    if leaf not in ("kernel", "embedding", "scale") and known != "split":
        known = "norm"
    return leaf, to_flax(array, package, known)


def _from_flax(leaf: str, array: np.ndarray, kind: str | None) -> np.ndarray:
    """An entry of one of Flax's layers in the order of torch's axes."""
    norm = "split" if _split.is_split(kind) else "norm"
    fixed = {"embedding": "embedding"} | dict.fromkeys(
        ("scale", "bias", *_STATISTICS), norm
    )
    if leaf != "kernel" and leaf not in fixed:
        expected = ", ".join(("kernel", *fixed))
        raise ValueError(f"its name is not known: expected one of {expected}")
    return from_flax(array, "torch", fixed.get(leaf) or kind_of(kind, array.shape))


def _path(module: str, leaf: str) -> str:
    collection = "batch_stats" if leaf in _STATISTICS else "params"
    return "/".join(filter(None, (collection, module, leaf)))


def _entry(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters and the running statistics, without other collections."""
    given = {c: variables[c] for c in ("params", "batch_stats") if c in variables}
    if not given:
        raise ValueError(
            f"the variables have the collections {list(variables)}: expected 'params', "
            "'batch_stats' or both. Write {'params': params, 'batch_stats': stats}."
        )
    return given
