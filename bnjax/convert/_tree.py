"""Dotted names and nested trees, and the report of all that does not fit."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _trees
from bnjax.convert._conventions import CONVENTIONS, KINDS, has_weights, without_rank

Names = Mapping[str, str] | Callable[[str], str] | None
Flat = dict[str, Any]  # by "collection/module/leaf"

_CAST = (
    "Expected dtypes that those of `like` can hold: nothing is narrowed unasked. "
    "Cast before, {cast}, or give a `like` that is as wide."
)


class Problems(list[str]):
    """A list of conversion errors, one line each; `check` raises them as one error."""

    def check(self, what: str, advice: str, cast: str) -> None:
        """Raises a ValueError that lists them, if there are any.

        Args:
            what: the clause that begins the message, "the weights do not fit".
            advice: what to write about layers, names and shapes.
            cast: code that casts to {dtype}. It replaces the advice where only dtypes
                are wrong.
        """
        if self:
            lines = "".join(f"\n  {line}" for line in self)
            dtypes = [line for line in self if line.startswith("dtype: ")]
            if dtypes:
                dtype = dtypes[0].rpartition(" ")[2]
                cast = _CAST.format(cast=cast.format(dtype=dtype))
                advice = cast if len(dtypes) == len(self) else f"{advice} {cast}"
            raise ValueError(f"{what}, and nothing was converted:{lines}\n{advice}")


def to_numpy(value: Any) -> np.ndarray:
    """The array behind a torch tensor, a Keras variable or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype == "bfloat16" or dtype.startswith("float8"):
            return value.float().numpy().astype(jnp.dtype(dtype))  # not by torch
        return value.numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(
            f"a {type(value).__name__}, which is no array: pass the state_dict itself, "
            "as in checkpoint['state_dict']"
        )
    return array


def renamer(names: Names, separator: str) -> Callable[[str], str]:
    """The function from module paths to Flax's; a dict acts by the longest prefix."""
    if names is None:
        return lambda module: module.replace(separator, "/")
    if callable(names):
        return functools.partial(_call, names)
    longest_first = sorted(names, key=len, reverse=True)

    def rename(module: str) -> str:
        for key in longest_first:
            if leads(key, module, separator):
                below = module[len(key) :].split(separator)
                return "/".join(filter(None, [names[key], *below]))
        raise ValueError(f"names has no key for the module {module!r}")

    return rename


def _call(names: Callable[[str], str], module: str) -> str:
    path = names(module)
    if not isinstance(path, str):
        raise ValueError(
            f"names({module!r}) is {path!r}: expected a path, 'Block_0/Conv'"
        )
    return path


def inverse(
    names: Names, separator: str, like: Iterable[str] | None
) -> Callable[[str], str]:
    """The function from Flax's module paths back to those of the entries in `like`."""
    rename = renamer(names, separator)
    if like is not None:
        known: dict[str, str] = {}
        for module in {entry.rpartition(separator)[0] for entry in like}:
            with contextlib.suppress(ValueError):  # not in names: reported as missing
                known[rename(module)] = module
        return functools.partial(_look_up, known)
    if callable(names):
        raise ValueError(
            "names is a function, which has no inverse: pass like=net.state_dict() "
            "too, to whose modules it is applied, or a dict of names."
        )
    inverted = names and {v: k.replace(separator, "/") for k, v in names.items()}
    back = renamer(inverted, "/")

    def checked(path: str) -> str:
        module = back(path).replace("/", separator)
        if rename(module) != path:
            raise ValueError(f"names leads {module!r} elsewhere, to {rename(module)!r}")
        return module

    return checked


def leads(key: str, module: str, separator: str) -> bool:
    """Whether `module` is `key` or lies in it."""
    return key in ("", module) or module.startswith(key + separator)


def _look_up(modules: Mapping[str, str], path: str) -> str:
    if path not in modules:
        raise ValueError(f"names leads no module of `like` to {path!r}")
    return modules[path]


def unused(
    names: Names, kinds: Mapping[str, str], modules: Iterable[str], separator: str
) -> list[str]:
    """Lines on keys of `names` that match no module, and of `kinds` without weights."""
    keys = list(names) if isinstance(names, Mapping) else []
    return [
        f"missing: names has {key!r}, of which there are no weights"
        for key in keys
        if not any(leads(key, module, separator) for module in modules)
    ] + [
        f"missing: kinds has {key!r}, a {kind}, of which there are no weights"
        for key, kind in kinds.items()
        if key not in modules and has_weights(kind)
    ]


def flat(tree: Any) -> Flat:
    """The leaves of nested dictionaries by path, without Flax's metadata boxes."""
    leaves = jax.tree.flatten_with_path(_trees.unboxed(tree))[0]
    return {_path(keys): leaf for keys, leaf in leaves}


def boxed(leaves: Flat, like: Any) -> Flat:
    """The leaves in the boxes that `like` has at their paths."""
    nodes = jax.tree.flatten_with_path(like, is_leaf=_trees.is_box)[0]
    boxes = {_path(keys): node for keys, node in nodes if _trees.is_box(node)}
    boxed_leaves = {
        path: jax.tree.unflatten(jax.tree.structure(box), [leaves[path]])
        for path, box in boxes.items()
        if path in leaves
    }
    return leaves | boxed_leaves


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def nested(leaves: Flat) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = value
    return tree


def disagreements(leaves: Flat) -> list[str]:
    """Layers whose entries have different numbers of features, or lack one of two."""
    layers: dict[str, dict[str, int]] = {}
    for path, array in leaves.items():
        _, *module, leaf = path.split("/")
        if leaf != "negative_slope":
            layers.setdefault("/".join(module), {})[leaf] = array.shape[-1]
    lines = []
    for module, features in layers.items():
        if len(set(features.values())) > 1:
            sizes = ", ".join(f"{leaf} {size}" for leaf, size in features.items())
            lines.append(f"features: {module or 'the layer'} has {sizes}")
            if "kernel" in features:
                lines[-1] += " (grouped transposed convolutions are not in Flax)"
        if ("mean" in features) != ("var" in features):
            lines.append(f"missing: {module or 'the layer'} has one of mean and var")
    return lines


def compare(converted: Flat, like: Flat, sources: Mapping[str, str]) -> list[str]:
    """Lines on what is missing in `converted`, extra, of another shape or too wide."""
    lines = [
        f"missing: {path} {tuple(like[path].shape)}" for path in like.keys() - converted
    ]
    for path, value in converted.items():
        what = f"{sources[path]} -> {path}"
        if path not in like:
            lines.append(f"extra: {what} {value.shape}")
        elif value.shape != tuple(like[path].shape):
            lines.append(f"shape: {what} {value.shape}, not {like[path].shape}")
        elif not _fits(value, like[path].dtype):
            lines.append(f"dtype: {what} {value.dtype}, not {like[path].dtype}")
    return sorted(lines)


def overflows(converted: Flat, dtypes: Flat, sources: Mapping[str, str]) -> list[str]:
    """Lines on integers that JAX would wrap: it has 32 bits unless told otherwise."""
    lines = []
    for path, value in converted.items():
        dtype = jax.dtypes.canonicalize_dtype(dtypes[path])
        if jnp.issubdtype(dtype, jnp.integer) and not _fits(value, dtype):
            what = f"{sources[path]} -> {path} {value.dtype}"
            lines.append(f"dtype: {what} holds integers beyond {dtype}")
    return lines


def _fits(value: np.ndarray, dtype: Any) -> bool:
    """Whether `dtype` holds every value of that of `value`, or these integers."""
    if jnp.issubdtype(value.dtype, jnp.integer) and jnp.issubdtype(dtype, jnp.integer):
        return bool((value.astype(dtype) == value).all())
    if jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(
        dtype, jnp.floating
    ):  # JAX does not promote floats of 8 bits
        narrow, wide = jnp.finfo(value.dtype), jnp.finfo(dtype)
        return narrow.nmant <= wide.nmant and bool(
            narrow.max <= wide.max
            and narrow.smallest_subnormal >= wide.smallest_subnormal
        )
    return jnp.promote_types(value.dtype, dtype) == dtype


# Layers with statistics for each domain: rows in Flax, modules of their own in timm.
#
#     Flax   norm/mean (domain, feature)
#     timm   norm.running_mean of domain 0, norm.aux_bn.0.running_mean of domain 1, ...
#
# References: huggingface/pytorch-image-models: timm/layers/split_batchnorm.py.


_TORCH = CONVENTIONS["torch"]
_NAMES = (_TORCH.scale, _TORCH.bias, _TORCH.mean, _TORCH.var)


def is_split(kind: str | None) -> bool:
    """Whether modules of this class keep statistics for each domain."""
    return kind is not None and KINDS.get(without_rank(kind)) == "split"


def stacked(weights: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a state_dict, with those of each split layer stacked to rows."""
    entries = dict(weights)
    for module in filter(lambda module: is_split(kinds[module]), kinds):
        for name in _NAMES:
            if (first := _entry(module, 0, name)) in entries:
                rows = (_entry(module, row, name) for row in itertools.count())
                present = [*itertools.takewhile(entries.__contains__, rows)]
                entries[first] = np.stack(
                    [to_numpy(entries.pop(row)) for row in present]
                )
    return entries


def unstacked(module: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of a state_dict that an array with rows becomes."""
    return {_entry(module, row, name): value for row, value in enumerate(array)}


def _entry(module: str, row: int, name: str) -> str:
    parts = (module, f"aux_bn.{row - 1}" if row else "", name)
    return ".".join(filter(None, parts))
