"""Entry by entry from one package to another, and the checks on the whole."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.convert import _checks, _readings, _tree
from bnjax.convert._conventions import (
    CONVENTIONS,
    SEPARATORS,
    check_guess,
    from_flax,
    kind_by_rank,
    known_kind,
    to_flax,
)

_ADVICE = (
    "Expected the same layers in both models, with the same features. Name modules "
    "with names={'conv1': 'Conv_0'}, say what shapes do not with kinds={'up': "
    "'ConvTranspose2d'}, and take out what the other model lacks."
)
_KNOWN = {
    "params": ("kernel", "embedding", "scale", "bias", "negative_slope"),
    "batch_stats": _readings.STATISTICS,
}
_NORMS = ("layer_norm", "split")
_FIXED = {"embedding": "embedding", "negative_slope": "slope"}
# Numbers of axes that no layer of torch's has there: parameters of a user's module.
_SCALARS = {"bias": (0, 2, 3, 4, 5), "scale": (0, 3, 4, 5)}


def to_flax_variables(
    package: str,
    weights: Any,
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Any,
) -> dict[str, Any]:
    """Converts the weights of a package to Flax variables; see `from_torch`."""
    _checks.weights(package, weights)
    _checks.names_and_kinds(names, kinds)
    separator = SEPARATORS[package]
    wanted = None if like is None else _tree.flat({**_collections(like), **like})
    of = _readings.Entries(
        package,
        _readings.modules_of(package, weights),
        kinds,
        names,
        _tree.renamer(names, separator),
        wanted,
    )
    problems = _tree.Problems()
    found: _tree.Flat = {}
    ordered: _tree.Flat = {}  # of which the axes are known
    sources: dict[str, str] = {}
    for entry, value in _tree.stacked(weights, kinds).items():
        module, _, name = entry.rpartition(separator)
        if name == CONVENTIONS[package].count:
            continue
        try:
            array = _tree.to_numpy(value)
            reading = _readings.chosen(of, module, name, array)
            if reading is None:
                continue
            path, kind = reading.path, reading.kind
            check_guess(package, module, kinds.get(module), kind, array.ndim)
            if kind is not None:
                array = ordered[path] = to_flax(array, package, kind)
            if path in found:
                raise ValueError(f"{path} comes from {sources[path]} already")
        except ValueError as error:
            problems.append(f"{entry}: {error}")
        else:
            found[path], sources[path] = array, entry
    problems += _tree.unused(names, kinds, of.modules, separator)
    problems += _tree.disagreements(ordered)
    dtypes = {path: array.dtype for path, array in found.items()}
    if like is not None:
        own, wanted = _tree.flat(_collections(like)), of.wanted or {}
        problems += _tree.compare(
            found, own | {p: wanted[p] for p in found.keys() & wanted}, sources
        )
        dtypes |= {path: wanted[path].dtype for path in found.keys() & wanted}
    problems += _tree.overflows(found, dtypes, sources)
    problems.check("the weights do not fit", _ADVICE, _checks.CASTS[package])
    _checks.warn_narrowed(package, {sources[p]: dtype for p, dtype in dtypes.items()})
    arrays = {p: jnp.asarray(a.astype(dtypes[p])) for p, a in found.items()}
    return _tree.nested(_tree.boxed(arrays, like))


def to_state_dict(
    variables: Mapping[str, Any],
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Mapping[str, Any] | None,
    count: np.ndarray,
) -> dict[str, np.ndarray]:
    """Converts Flax variables to a torch state_dict; see `to_torch`."""
    _checks.names_and_kinds(names, kinds)
    if like is not None:
        _checks.weights("torch", like, "like")
    module_of = _tree.inverse(names, SEPARATORS["torch"], like)
    problems = _tree.Problems()
    found: _tree.Flat = {}
    sources: dict[str, str] = {}
    for path, value in _tree.flat(_collections(variables, _readings.BUFFERS)).items():
        collection, *modules, leaf = path.split("/")
        try:
            module = module_of("/".join(modules))
            given = kinds.get(module)
            arrays = _to_torch(collection, module, leaf, np.asarray(value), given, like)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        found |= arrays
        sources |= dict.fromkeys(arrays, path)
        for entry in arrays if (collection, leaf) == ("batch_stats", "var") else ():
            owner = entry.rpartition(SEPARATORS["torch"])[0]
            counter = _entry(owner, CONVENTIONS["torch"].count)
            if like is None or counter in like:
                found[counter], sources[counter] = count, path
    dtypes = {entry: array.dtype for entry, array in found.items()}
    if like is not None:
        wanted = {entry: _tree.to_numpy(value) for entry, value in like.items()}
        state = {e for e in wanted if e.rpartition(".")[2] in _readings.STATE["torch"]}
        for entry in state - found.keys():
            found[entry], sources[entry] = wanted[entry], "like"
        problems += _tree.compare(found, wanted, sources)
        dtypes |= {entry: value.dtype for entry, value in wanted.items()}
    problems.check("the variables do not fit", _ADVICE, _checks.CASTS["flax"])
    return {e: a.astype(dtypes[e], order="C") for e, a in found.items()}


def _to_torch(
    collection: str,
    module: str,
    leaf: str,
    array: np.ndarray,
    given: str | None,
    like: Mapping[str, Any] | None,
) -> dict[str, np.ndarray]:
    """A variable as torch has it, by the names of entries."""
    as_it_is, known = _entry(module, leaf), _KNOWN.get(collection, ())
    if leaf not in known:
        if as_it_is in like if like is not None else collection != "batch_stats":
            return {as_it_is: array}
        if collection == _readings.BUFFERS:
            return {}
        expected = ", ".join(leaf for leaves in _KNOWN.values() for leaf in leaves)
        other = "" if like is None else f", or that `like` has {as_it_is}"
        raise ValueError(f"its name is not known: expected one of {expected}{other}")
    name = getattr(CONVENTIONS["torch"], leaf, CONVENTIONS["torch"].kernel)
    entry, is_split = _entry(module, name), _tree.is_split(given)
    if like is not None and as_it_is in like and entry not in like:
        return {as_it_is: array}
    if array.ndim in _SCALARS.get(leaf, ()) and not is_split:
        return {as_it_is: array}
    of_class = known_kind("torch", given)
    kind = _FIXED.get(leaf, of_class if of_class in _NORMS else "norm")
    if leaf == "kernel":
        kind = of_class or kind_by_rank(array.ndim)
        check_guess("torch", module, given, kind, array.ndim)
    array = from_flax(array, "torch", kind)
    return _tree.unstacked(module, name, array) if is_split else {entry: array}


def _entry(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _collections(variables: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The parameters and the running statistics, without other collections."""
    if not isinstance(variables, Mapping):
        raise TypeError(_checks.NO_VARIABLES.format(received=type(variables).__name__))
    names = ("params", "batch_stats", *others)
    given = {c: variables[c] for c in names if c in variables}
    if not given:
        raise ValueError(
            f"the variables have the collections {list(variables)}: expected 'params', "
            "'batch_stats' or both. Write {'params': params, 'batch_stats': stats}."
        )
    return given
