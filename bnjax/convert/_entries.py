"""The conversion of all entries from one package to another, and its checks."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._checks import BatchNormWarning
from bnjax.convert import _tree
from bnjax.convert._conventions import (
    BUFFERS,
    CONVENTIONS,
    OPTIONAL_STATE,
    SEPARATORS,
    STATISTICS,
    Entries,
    axes_of,
    check_guess,
    choose_reading,
    from_flax,
    kind_by_rank,
    kind_of_class,
    modules_of,
    to_flax,
)

_ADVICE = (
    "Expected the same layers in both models, with the same features. Name modules "
    "with names={'conv1': 'Conv_0'}, say what shapes do not with kinds={'up': "
    "'ConvTranspose2d'}, and take out what the other model lacks."
)
_LEAVES = {
    "params": ("kernel", "embedding", "scale", "bias", "negative_slope"),
    "batch_stats": STATISTICS,
}
_NORMS = ("layer_norm", "split")
_KIND_OF_LEAF = {"embedding": "embedding", "negative_slope": "slope"}
# Ranks that no layer of torch's has there: parameters of a user's module.
_RANKS_OF_USERS = {"bias": (0, 2, 3, 4, 5), "scale": (0, 3, 4, 5)}
_CASTS = {
    "torch": "net.to(torch.{dtype}).state_dict()",
    "keras": '{{w.path: np.asarray(w, "{dtype}") for w in model.weights}}',
    "flax": "jax.tree.map(lambda v: v.astype(jnp.{dtype}), variables)",
}
_NO_VARIABLES = (
    "the variables are of type {received}: expected a dict of collections. Write "
    "{{'params': params, 'batch_stats': batch_stats}}, or of a state "
    "{{'params': state.params, 'batch_stats': state.batch_stats}}."
)
_EXPECTED_WEIGHTS = {
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


class Row(NamedTuple):
    """What a conversion does to one entry.

    Attributes:
        source: the name of the entry; "" for one that is made.
        before: its shape and dtype.
        target: the name that it gets; "" for one that is left out.
        after: the shape and dtype that it gets.
        what: what else is done to it: the axes before and after, why it is left out.
    """

    source: str
    before: jax.ShapeDtypeStruct | None
    target: str
    after: jax.ShapeDtypeStruct | None
    what: str


class Converted(NamedTuple):
    """The result of a conversion, and how each entry came into it."""

    tree: dict[str, Any]
    rows: tuple[Row, ...]


def to_flax_variables(
    package: str,
    weights: Any,
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Any,
) -> Converted:
    """Converts the weights of a package to Flax variables; see `from_torch`."""
    _check_weights(package, weights)
    _check_names_and_kinds(names, kinds)
    separator = SEPARATORS[package]
    like_leaves = None if like is None else _tree.flat({**_collections(like), **like})
    entries = Entries(
        package,
        modules=modules_of(package, weights),
        kinds=kinds,
        names=names,
        rename=_tree.renamer(names, separator),
        like=like_leaves,
    )
    problems = _tree.Problems()
    converted: _tree.Flat = {}
    ordered: _tree.Flat = {}  # those whose axes are known
    sources: dict[str, str] = {}
    before: dict[str, jax.ShapeDtypeStruct] = {}
    moved: dict[str, str] = {}
    left_out: dict[str, str] = {}
    stacked = _tree.stacked(weights, kinds)
    for entry, value in stacked.items():
        module, _, name = entry.rpartition(separator)
        if name == CONVENTIONS[package].count:
            left_out[entry] = "left out: Flax counts no batches"
            continue
        try:
            array = _tree.to_numpy(value)
            if value is weights[entry]:  # not the rows of a layer, stacked
                before[entry] = shape_of(array)
            reading = choose_reading(entries, module, name, array)
            if reading is None:
                left_out[entry] = "left out: not in the Flax model"
                continue
            path, kind = reading.path, reading.kind
            check_guess(package, module, kinds.get(module), kind, array.ndim)
            moved[entry] = " -> ".join(axes_of(package, kind, array.shape) or ())
            if kind is not None:
                array = ordered[path] = to_flax(array, package, kind)
            if path in converted:
                raise ValueError(f"{path} comes from {sources[path]} already")
        except ValueError as error:
            problems.append(f"{entry}: {error}")
        else:
            converted[path], sources[path] = array, entry
    problems += _tree.unused(names, kinds, entries.modules, separator)
    problems += _tree.disagreements(ordered)
    dtypes = {path: array.dtype for path, array in converted.items()}
    if like is not None and like_leaves is not None:
        # Of the other collections of `like` only what was converted is compared.
        compared = _tree.flat(_collections(like))
        taken = {path: like_leaves[path] for path in converted.keys() & like_leaves}
        problems += _tree.compare(converted, compared | taken, sources)
        dtypes |= {path: leaf.dtype for path, leaf in taken.items()}
    problems += _tree.overflows(converted, dtypes, sources)
    problems.check("the weights do not fit", _ADVICE, _CASTS[package])
    _warn_narrowed(package, {sources[p]: dtype for p, dtype in dtypes.items()})
    arrays = {p: jnp.asarray(a.astype(dtypes[p])) for p, a in converted.items()}
    targets = {entry: path for path, entry in sources.items()}
    rows = []
    for entry, value in weights.items():
        if entry not in before:
            before[entry] = shape_of(_tree.to_numpy(value))
        if entry in targets:
            path = targets[entry]
            shape = shape_of(arrays[path])
            row = Row(entry, before[entry], path, shape, moved[entry])
        else:
            why = left_out.get(entry, "a further row of what the layer stacks")
            row = Row(entry, before[entry], "", None, why)
        rows.append(row)
    return Converted(_tree.nested(_tree.boxed(arrays, like)), tuple(rows))


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, for a row."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def to_state_dict(
    variables: Mapping[str, Any],
    names: _tree.Names,
    kinds: Mapping[str, str],
    like: Mapping[str, Any] | None,
    count: np.ndarray,
) -> Converted:
    """Converts Flax variables to a torch state_dict; see `to_torch`."""
    _check_names_and_kinds(names, kinds)
    if like is not None:
        _check_weights("torch", like, "like")
    module_of = _tree.inverse(names, SEPARATORS["torch"], like)
    problems = _tree.Problems()
    converted: _tree.Flat = {}
    sources: dict[str, str] = {}
    before: dict[str, jax.ShapeDtypeStruct] = {}
    moved: dict[str, str] = {}
    for path, value in _tree.flat(_collections(variables, BUFFERS)).items():
        collection, *modules, leaf = path.split("/")
        try:
            module = module_of("/".join(modules))
            array, class_name = np.asarray(value), kinds.get(module)
            arrays, axes = _to_torch(collection, module, leaf, array, class_name, like)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        before[path], moved[path] = shape_of(array), axes
        converted |= arrays
        sources |= dict.fromkeys(arrays, path)
        for entry in arrays if (collection, leaf) == ("batch_stats", "var") else ():
            owner = entry.rpartition(SEPARATORS["torch"])[0]
            counter = _entry(owner, CONVENTIONS["torch"].count)
            if like is None or counter in like:
                converted[counter], sources[counter] = count, path
    dtypes = {entry: array.dtype for entry, array in converted.items()}
    if like is not None:
        target = {entry: _tree.to_numpy(value) for entry, value in like.items()}
        state = {e for e in target if e.rpartition(".")[2] in OPTIONAL_STATE["torch"]}
        for entry in state - converted.keys():
            converted[entry], sources[entry] = target[entry], "like"
        problems += _tree.compare(converted, target, sources)
        dtypes |= {entry: value.dtype for entry, value in target.items()}
    problems.check("the variables do not fit", _ADVICE, _CASTS["flax"])
    tree = {e: a.astype(dtypes[e], order="C") for e, a in converted.items()}
    rows = []
    for entry, array in tree.items():
        path, after = sources[entry], shape_of(array)
        if entry.rpartition(".")[2] == CONVENTIONS["torch"].count:
            rows.append(Row("", None, entry, after, f"made: {count}"))
        elif path == "like":
            rows.append(Row("", None, entry, after, "taken from like"))
        else:
            rows.append(Row(path, before[path], entry, after, moved[path]))
    used = set(sources.values())
    for path, leaf in _tree.flat({**variables}).items():
        if path not in used:
            shape = shape_of(leaf) if hasattr(leaf, "dtype") else None
            rows.append(Row(path, shape, "", None, "left out: not in torch"))
    return Converted(tree, tuple(rows))


def _to_torch(
    collection: str,
    module: str,
    leaf: str,
    array: np.ndarray,
    class_name: str | None,
    like: Mapping[str, Any] | None,
) -> tuple[dict[str, np.ndarray], str]:
    """The entries of a state_dict that a variable becomes, by name; how axes move."""
    same_name = _entry(module, leaf)
    if leaf not in _LEAVES.get(collection, ()):
        if same_name in like if like is not None else collection != "batch_stats":
            return {same_name: array}, ""
        if collection == BUFFERS:
            return {}, ""
        expected = ", ".join(leaf for leaves in _LEAVES.values() for leaf in leaves)
        other = "" if like is None else f", or that `like` has {same_name}"
        raise ValueError(f"its name is not known: expected one of {expected}{other}")
    name = getattr(CONVENTIONS["torch"], leaf, CONVENTIONS["torch"].kernel)
    entry, is_split = _entry(module, name), _tree.is_split(class_name)
    if like is not None and same_name in like and entry not in like:
        return {same_name: array}, ""
    if array.ndim in _RANKS_OF_USERS.get(leaf, ()) and not is_split:
        return {same_name: array}, ""
    of_class = kind_of_class("torch", class_name)
    kind = _KIND_OF_LEAF.get(leaf, of_class if of_class in _NORMS else "norm")
    if leaf == "kernel":
        kind = of_class or kind_by_rank(array.ndim)
        check_guess("torch", module, class_name, kind, array.ndim)
    axes = " -> ".join(reversed(axes_of("torch", kind, array.shape) or ()))
    array = from_flax(array, "torch", kind)
    if is_split:
        return _tree.unstacked(module, name, array), axes
    return {entry: array}, axes


def _entry(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _collections(variables: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The parameters and the running statistics, without other collections."""
    if not isinstance(variables, Mapping):
        raise TypeError(_NO_VARIABLES.format(received=type(variables).__name__))
    names = ("params", "batch_stats", *others)
    collections = {c: variables[c] for c in names if c in variables}
    if not collections:
        raise ValueError(
            f"the variables have the collections {list(variables)}: expected 'params', "
            "'batch_stats' or both. Write {'params': params, 'batch_stats': stats}."
        )
    return collections


def _check_weights(package: str, weights: Any, name: str = "") -> None:
    """Raises on a model, a path or anything else in place of its weights."""
    name = name or {"torch": "state_dict", "keras": "weights"}[package]
    if isinstance(weights, Mapping) and all(isinstance(key, str) for key in weights):
        return
    write = "net.state_dict() for a network `net`."
    if isinstance(weights, (str, bytes, os.PathLike)):
        write = "torch.load(path, weights_only=True)."
    received = f"a {type(weights).__name__}"
    if isinstance(weights, Mapping):
        received = f"a {type(weights).__name__} whose keys are no strings"
    expected = _EXPECTED_WEIGHTS[package].format(write=write)
    raise TypeError(f"{name} is {received}: expected {expected}")


def _check_names_and_kinds(names: Any, kinds: Any) -> None:
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


def _warn_narrowed(package: str, dtypes: Mapping[str, Any]) -> None:
    """Warns of entries that are wider than JAX's arrays."""
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
        cast=_CASTS[package].format(dtype=narrow),
    )
    warnings.warn(message, BatchNormWarning, stacklevel=4)


def _is_table(table: Any) -> bool:
    """Whether it is a mapping to strings; Keras's layers without weights lack a key."""
    return isinstance(table, Mapping) and all(
        isinstance(value, str) for value in table.values()
    )
