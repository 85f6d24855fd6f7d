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
from bnjax.convert._conventions import CONVENTIONS, KINDS, has_weights, plain

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
            what: does not fit.
            advice: on layers, names and shapes.
            cast: the code that casts to a {dtype}, given in its place where nothing
                else is wrong.
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
        if str(value.dtype) == "torch.bfloat16":  # which torch does not give to NumPy
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(
            f"a {type(value).__name__}, which is no array: pass the state_dict itself, "
            "as in checkpoint['state_dict']"
        )
    return array


def renamer(names: Names, separator: str) -> Callable[[str], str]:
    """Module paths to module paths: `names` by its longest key that leads the path."""
    if names is None:
        return lambda module: module.replace(separator, "/")
    if callable(names):
        return functools.partial(_call, names)
    longest_first = sorted(names, key=len, reverse=True)

    def rename(module: str) -> str:
        for key in longest_first:
            if leads(key, module, separator):
                rest = module[len(key) :].split(separator)
                return "/".join(filter(None, [names[key], *rest]))
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
    """From Flax's module paths back to those of the entries in `like`."""
    rename = renamer(names, separator)
    if like is not None:
        known: dict[str, str] = {}
        for module in {entry.rpartition(separator)[0] for entry in like}:
            with contextlib.suppress(ValueError):  # not in names: reported as missing
                known[rename(module)] = module
        return functools.partial(_known, known)
    if callable(names):
        raise ValueError(
            "names is a function, which has no inverse: pass like=net.state_dict() "
            "too, to whose modules it is applied, or a dict of names."
        )
    turned = names and {v: k.replace(separator, "/") for k, v in names.items()}
    back = renamer(turned, "/")

    def checked(path: str) -> str:
        module = back(path).replace("/", separator)
        if rename(module) != path:
            raise ValueError(f"names leads {module!r} elsewhere, to {rename(module)!r}")
        return module

    return checked


def leads(key: str, module: str, separator: str) -> bool:
    """Whether `module` is `key` or lies in it."""
    return key in ("", module) or module.startswith(key + separator)


def _known(modules: Mapping[str, str], path: str) -> str:
    if path not in modules:
        raise ValueError(f"names leads no module of `like` to {path!r}")
    return modules[path]


def unused(
    names: Names, kinds: Mapping[str, str], modules: Iterable[str], separator: str
) -> list[str]:
    """The keys of `names` that lead no module, and of `kinds` that have no weight."""
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
    """The leaves of nested dictionaries, by path, out of Flax's metadata boxes."""
    leaves = jax.tree.flatten_with_path(_trees.unboxed(tree))[0]
    return {_path(keys): leaf for keys, leaf in leaves}


def boxed(leaves: Flat, like: Any) -> Flat:
    """The leaves in the boxes that `like` has at their paths."""
    nodes = jax.tree.flatten_with_path(like, is_leaf=_trees.is_box)[0]
    boxes = {_path(keys): node for keys, node in nodes if _trees.is_box(node)}
    put = {
        path: jax.tree.unflatten(jax.tree.structure(box), [leaves[path]])
        for path, box in boxes.items()
        if path in leaves
    }
    return leaves | put


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


def disagreements(found: Flat) -> list[str]:
    """Layers whose entries have different numbers of features, or lack one of two."""
    layers: dict[str, dict[str, int]] = {}
    for path, array in found.items():
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


def compare(found: Flat, like: Flat, sources: Mapping[str, str]) -> list[str]:
    """What is missing in `found`, extra, of another shape or a wider dtype."""
    lines = [
        f"missing: {path} {tuple(like[path].shape)}" for path in like.keys() - found
    ]
    for path, value in found.items():
        what = f"{sources[path]} -> {path}"
        if path not in like:
            lines.append(f"extra: {what} {value.shape}")
        elif value.shape != tuple(like[path].shape):
            lines.append(f"shape: {what} {value.shape}, not {like[path].shape}")
        elif not _fits(value, like[path].dtype):
            lines.append(f"dtype: {what} {value.dtype}, not {like[path].dtype}")
    return sorted(lines)


def overflows(found: Flat, dtypes: Flat, sources: Mapping[str, str]) -> list[str]:
    """Integers that JAX would wrap: it has 32 bits unless told otherwise."""
    lines = []
    for path, value in found.items():
        dtype = jax.dtypes.canonicalize_dtype(dtypes[path])
        if jnp.issubdtype(dtype, jnp.integer) and not _fits(value, dtype):
            what = f"{sources[path]} -> {path} {value.dtype}"
            lines.append(f"dtype: {what} holds integers beyond {dtype}")
    return lines


def _fits(value: np.ndarray, dtype: Any) -> bool:
    """Whether the dtype holds all that the dtype of `value` can, or whole `value`."""
    if jnp.issubdtype(value.dtype, jnp.integer) and jnp.issubdtype(dtype, jnp.integer):
        return bool((value.astype(dtype) == value).all())
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
    return kind is not None and KINDS.get(plain(kind)) == "split"


def stacked(weights: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a state_dict, those of each split layer as one with rows."""
    found = dict(weights)
    for module in filter(lambda module: is_split(kinds[module]), kinds):
        for name in _NAMES:
            if (entry := _entry(module, 0, name)) in found:
                entries = (_entry(module, row, name) for row in itertools.count())
                rows = [*itertools.takewhile(found.__contains__, entries)]
                values = [to_numpy(found.pop(entry)) for entry in rows]
                found[entry] = np.stack(values)
    return found


def unstacked(module: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of a state_dict that an array with rows comes from."""
    return {_entry(module, row, name): value for row, value in enumerate(array)}


def _entry(module: str, row: int, name: str) -> str:
    parts = (module, f"aux_bn.{row - 1}" if row else "", name)
    return ".".join(filter(None, parts))
