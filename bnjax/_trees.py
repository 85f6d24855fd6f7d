"""The batch-normalization layers of a model, by the paths of their variables.

Trees of Linen (dicts, FrozenDicts) and of NNX (States) alike: a layer at `block/norm`
has `block/norm/mean`, `block/norm/var` and leaves `block/norm/moments`. The metadata
that Flax puts around a leaf (`nn.Partitioned` and the like) is no part of its path.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import _dtypes
from bnjax.moments import Moments

_NO_MOMENTS = (
    "{function} returned {received}, which holds no Moments of any layer: expected "
    "what model.apply(variables, x, mutable=['batch_stats', 'batch_moments']) returns, "
    "or the tree that it has below 'batch_moments'. Flax's own BatchNorm leaves no "
    "Moments; bnjax.BatchNorm, which loads the same variables, does."
)

_UNSEEN = (
    "batch_stats/{paths} got no Moments: the layer was not called, has a covariance, "
    "or is none of bnjax's (below nn.scan and nn.vmap name batch_moments among the "
    "variable_axes). Name what shall stay as it is: keep={keep!r}."
)

_UNKNOWN = (
    "Moments were left at {path}, where batch_stats has {received}: expected "
    "{expected}. Pass the variables of the model that was applied, or name the layer "
    "in keep={keep!r}."
)

_NO_MATCH = (
    "{option}={pattern!r} matches none of the paths: expected a pattern of paths such "
    "as {paths}. * stands for any characters, / among them: write '*/{last}'."
)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by path, Moments being leaves; and its structure."""
    nodes = jax.tree.flatten_with_path(
        tree, is_leaf=lambda node: _are_moments(node) or is_box(node)
    )[0]
    leaves, structure = jax.tree.flatten(tree, is_leaf=_are_moments)
    return dict(
        zip((name_of(path) for path, _ in nodes), leaves, strict=True)
    ), structure


def is_box(node: Any) -> bool:
    """Whether it is one of Flax's metadata boxes around an array."""
    boxes = hasattr(node, "unbox") and hasattr(node, "replace_boxed")
    return boxes and len(jax.tree.leaves(node)) == 1


def unboxed(tree: Any) -> Any:
    """The tree without metadata boxes."""

    def bare(node: Any) -> Any:  # `unbox` would put the array on the mesh
        return jax.tree.leaves(node)[0] if is_box(node) else node

    return jax.tree.map(bare, tree, is_leaf=is_box)


def map_paths(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree with f(path, leaf) in place of each leaf."""
    leaves, structure = flatten(tree)
    return jax.tree.unflatten(structure, [f(*item) for item in leaves.items()])


def layer_of(path: str) -> str:
    """The path of the layer that has the variable."""
    return path.rpartition("/")[0]


def moments_of(result: Any, function: str) -> dict[str, Moments]:
    """The Moments that a call of the model has left, by layer.

    Args:
        result: (anything, {"batch_moments": tree}), {"batch_moments": tree} or tree.
        function: the name of the function that returned it, for the message.
    """
    tree = result[1] if isinstance(result, tuple) and len(result) == 2 else result
    if isinstance(tree, Mapping) and "batch_moments" in tree:
        tree = tree["batch_moments"]
    leaves = flatten(tree)[0]
    moments = {layer_of(p): v for p, v in leaves.items() if isinstance(v, Moments)}
    if not moments or not all(map(_are_moments, leaves.values())):
        shapes = jax.tree.map(jnp.shape, result)
        received = f"{type(result).__name__} of shapes {shapes}"
        raise TypeError(_NO_MOMENTS.format(function=function, received=received))
    return moments


def updated(
    batch_stats: Any,
    estimates: Mapping[str, Any],
    update: Callable[[str, Any, Any], tuple[Any, Any]],
    keep: Sequence[str],
) -> Any:
    """`batch_stats` with the new statistics of every layer that is not kept.

    Args:
        batch_stats: a tree that has a mean and a var at the path of every layer. Other
            leaves (the vectors of `nn.SpectralNorm`) stay as they are.
        estimates: by layer, an object with a mean: Moments, or an average.
        update: (path, mean, var) -> the new (mean, var) of a layer.
        keep: patterns of the layers that stay unchanged.
    """
    stored, structure = flatten(batch_stats)
    layers = {layer_of(path) for path in stored}
    kept = matching(keep, layers, "keep")
    normalize = {layer_of(p) for p in stored if p.rpartition("/")[2] in ("mean", "var")}
    unseen = sorted(normalize - kept - set(estimates))
    if unseen:
        raise ValueError(
            _UNSEEN.format(paths=", batch_stats/".join(unseen), keep=unseen)
        )
    for layer in sorted(set(estimates) - kept):
        names = [f"{layer}/{name}".removeprefix("/") for name in ("mean", "var")]
        _check_layer(layer, [stored.get(name) for name in names], estimates[layer].mean)
        old = [stored[name] for name in names]
        new = update(layer, *old)
        stored |= {n: _cast_like(v, o) for n, v, o in zip(names, new, old, strict=True)}
    return jax.tree.unflatten(structure, stored.values())


def matching(patterns: Sequence[str], paths: set[str], option: str) -> set[str]:
    """The paths that match one of the patterns, each of which must match one."""
    if isinstance(patterns, str):
        patterns = [patterns]
    matched: set[str] = set()
    for pattern in patterns:
        matches = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not matches:
            some = sorted(paths)[:3]
            last = some[-1].rpartition("/")[2] if some else ""
            message = _NO_MATCH.format(
                option=option, pattern=pattern, paths=some, last=last
            )
            raise ValueError(message)
        matched |= matches
    return matched


def _are_moments(node: Any) -> bool:
    """Whether it is Moments, or the CoMoments of a layer that whitens."""
    return isinstance(node, tuple) and hasattr(node, "mean")


def name_of(path: tuple) -> str:
    """'block/norm/mean', also of an NNX State, whose leaves end in .value."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_layer(layer: str, stored: list, mean: Any) -> None:
    shape = jnp.shape(mean)
    if all(value is not None and jnp.shape(value) == shape for value in stored):
        return
    received = [None if value is None else jnp.shape(value) for value in stored]
    message = _UNKNOWN.format(
        path=layer or "the top",
        received=f"mean, var of shapes {received[0]}, {received[1]}",
        expected=f"a mean and a var of shape {shape}",
        keep=[layer],
    )
    raise ValueError(message)


def _cast_like(value: Any, stored: Any) -> jax.Array:
    """`value` in the dtype of what it replaces."""
    dtype = jnp.asarray(stored).dtype
    if jnp.iscomplexobj(value):  # Flax's mean starts real
        dtype = _dtypes.promote(dtype, jnp.complex64)
    return jnp.asarray(value, dtype)
