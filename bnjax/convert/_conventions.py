"""Names and layouts of each package as data, and how an entry is read by them.

An entry whose name says nothing of batch normalization or of a kernel keeps its name
and its axes. What is learned and what is not cannot be told from its values, but
integers are not.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Convention(NamedTuple):
    """How one package names, computes and stores batch normalization and kernels.

    Attributes:
        scale: the name of gamma.
        bias: the name of beta.
        mean: the name of the running mean.
        var: the name of the running variance.
        count: the name of the number of batches seen, "" where it is not stored.
        kernel: the name of the weight of a dense layer or a convolution.
        embedding: the name of the weight of an embedding.
        momentum: the default momentum.
        momentum_weighs: the value whose weight it is, "old" or "new".
        running_var: whether the running variance is "biased" (n) or "unbiased" (n - 1).
        epsilon: the default epsilon.
        feature_axis: the feature axis of the input.
        linear: the axes of a dense layer's weight: I of the input, O of the output.
        conv: the axes of a convolution's weight; * stands for those of the window.
        conv_transpose: the axes of a transposed convolution's weight; ~ stands for a
            mirrored window.
    """

    scale: str
    bias: str
    mean: str
    var: str
    count: str
    kernel: str
    embedding: str
    momentum: float
    momentum_weighs: str
    running_var: str
    epsilon: float
    feature_axis: int
    linear: str
    conv: str
    conv_transpose: str


CONVENTIONS = {
    "flax": Convention(
        *("scale", "bias", "mean", "var", "", "kernel", "embedding"),
        *(0.99, "old", "biased", 1e-5, -1),
        *("IO", "*IO", "*IO"),
    ),
    "torch": Convention(
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        *("weight", "weight"),
        *(0.1, "new", "unbiased", 1e-5, 1),
        *("OI", "OI*", "IO~"),
    ),
    "keras": Convention(
        *("gamma", "beta", "moving_mean", "moving_variance", ""),
        *("kernel", "embeddings"),
        *(0.99, "old", "biased", 1e-3, -1),
        *("IO", "*IO", "~OI"),
    ),
}
SEPARATORS = {"torch": ".", "keras": "/"}

BUFFERS = "buffers"  # the collection of what is not learned and has no place in Flax
STATISTICS = ("mean", "var")

# What a Flax model may lack: counts, and what Keras's renorm trains with.
OPTIONAL_STATE = {
    "torch": ("n_averaged",),
    "keras": ("count", "moving_stddev", "renorm_mean", "renorm_stddev"),
}
_SEPARABLE_PARTS = {"depthwise_kernel": "depthwise", "pointwise_kernel": "pointwise"}

# The names of classes, without "1d" to "3d".
KINDS = {
    "Linear": "linear",
    "Dense": "linear",
    "Conv": "conv",
    "ConvTranspose": "conv_transpose",
    "DepthwiseConv": "depthwise",
    "Embedding": "embedding",
    "BatchNorm": "norm",
    "SyncBatchNorm": "norm",
    "FrozenBatchNorm": "norm",
    "BatchNormAct": "norm",
    "BatchNormalization": "norm",
    "SplitBatchNorm": "split",
    "InstanceNorm": "norm",
    "LayerNorm": "layer_norm",
    "LayerNormalization": "layer_norm",
    "RMSNorm": "layer_norm",
    "GroupNorm": "norm",
    "GroupNormalization": "norm",
    "PReLU": "slope",
}
_KERAS_ALONE = ("depthwise",)  # torch's are convolutions with groups

# The axes of kinds that lie alike in all packages: D domains, V tokens, M multiples.
_COMMON_AXES = {"norm": "C", "split": "DC", "embedding": "VC", "depthwise": "*IM"}

# What Flax calls the weight of each kind; that of others is "kernel".
_WEIGHT_NAMES = {
    "norm": "scale",
    "layer_norm": "scale",
    "split": "scale",
    "embedding": "embedding",
    "slope": "negative_slope",
}

# Words in the names of unknown classes that contradict what shapes say: the word, the
# kind that a shape would have it be, and the class that it may be.
_TRANSPOSED = {"torch": "ConvTranspose{n}d", "keras": "Conv{n}DTranspose"}
_DOUBTS = (
    ("transpose", "conv", _TRANSPOSED),
    ("deconv", "conv", _TRANSPOSED),
    ("depthwise", "conv", {"keras": "DepthwiseConv{n}D"}),
    ("embedding", "linear", {"torch": "Embedding"}),
)


def kind_of_class(package: str, class_name: str | None) -> str | None:
    """The kind of the layers of a class, or None where the class is not known."""
    kind = None if class_name is None else KINDS.get(without_rank(class_name))
    return "conv" if package != "keras" and kind in _KERAS_ALONE else kind


def kind_by_rank(rank: int) -> str:
    """The kind of layer that a weight of so many axes belongs to."""
    return ("norm", "norm", "linear", "conv")[min(rank, 3)]


def check_guess(
    package: str, module: str, class_name: str | None, kind: str | None, rank: int
) -> None:
    """Raises where the name of an unknown class contradicts the kind guessed for it."""
    if class_name is None or kind_of_class(package, class_name) is not None:
        return
    for word, read_as, cures in _DOUBTS:
        if word in class_name.lower() and kind == read_as and package in cures:
            cure = cures[package].format(n=rank - 2)
            raise ValueError(
                f"its kind {class_name!r} is not known, and its shape does not tell "
                "how its axes lie: expected a class that is known. Write "
                f"kinds={{{module!r}: {cure!r}}}, or {_by_rank(package, rank)!r} if it "
                "is one"
            )


def _by_rank(package: str, rank: int) -> str:
    """The class that a weight of so many axes is taken for."""
    if kind_by_rank(rank) == "linear":
        return {"torch": "Linear", "keras": "Dense"}[package]
    return f"Conv{rank - 2}{'d' if package == 'torch' else 'D'}"


def has_weights(class_name: str) -> bool:
    """Whether every layer of this class has a weight: norms may have nothing."""
    return KINDS.get(without_rank(class_name), "norm") not in ("norm", "layer_norm")


def without_rank(class_name: str) -> str:
    """The name of a class without its number of dimensions: 2d, 2D."""
    return re.sub(r"\d[dD]", "", class_name)


def leaf_of(
    package: str, name: str, known: str | None, shape: tuple[int, ...]
) -> tuple[str | None, str | None]:
    """Flax's name of an entry, and the kind of layer that orders its axes.

    Args:
        package: the package that the entry is from.
        name: the name of the entry in its module.
        known: the kind of the module, if its class is known.
        shape: the shape of the entry.

    Returns:
        (None, None) for a name that says nothing; kind None: the axes stay.
    """
    convention = CONVENTIONS[package]
    for leaf in ("bias", "mean", "var"):
        if name == getattr(convention, leaf):
            vector = "norm" if len(shape) == 1 else None
            return leaf, "split" if known == "split" else vector
    kind = known or kind_by_rank(len(shape))
    weights = ("kernel", "embedding", "scale")
    names = {getattr(convention, leaf): leaf for leaf in weights}
    if package == "torch":  # one name for all
        names = {convention.kernel: _WEIGHT_NAMES.get(kind, "kernel")}
    if name not in names or not (shape or known):
        return None, None
    return names[name], kind


def to_flax(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """Converts a parameter to Flax's layout: kernels become (*window, in, out).

    Kernels of transposed convolutions are flipped if the package stores them mirrored.
    """
    if kind == "slope":  # a scalar in Flax
        return array.reshape(()) if array.size == 1 else array
    if kind == "layer_norm":  # its scale has as many axes as it normalizes
        return array
    order, target = _orders(package, kind, array.shape)
    array = array.transpose([order.index(axis) for axis in target])
    if kind == "depthwise":  # one input for each output
        return array.reshape(*array.shape[:-2], 1, -1)
    return _mirrored(array, package, kind)


def from_flax(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """The inverse of `to_flax`, for what torch has."""
    if kind == "slope":
        return array.reshape(array.shape or (1,))
    if kind == "layer_norm":
        return array
    order, target = _orders(package, kind, array.shape)
    array = _mirrored(array, package, kind)
    return array.transpose([target.index(axis) for axis in order])


def axes_of(
    package: str, kind: str | None, shape: tuple[int, ...]
) -> tuple[str, str] | None:
    """The axes in the package and in Flax, ("OIHW", "HWIO"); None where they are alike.

    A "~" follows those of a mirrored window. What `to_flax` does, in words.
    """
    if kind in (None, "slope", "layer_norm"):
        return None
    order, target = _orders(package, kind, shape)
    if order == target:
        return None
    window = "".join(axis for axis in order if axis.islower())
    names = "DHW"[3 - len(window) :] if len(window) < 4 else window
    end = "~" if _is_mirrored(package, kind) else ""
    letters = str.maketrans(window, names)
    return order.translate(letters) + end, target.translate(letters)


def _orders(package: str, kind: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """A letter for each axis, in the order of the package and in that of Flax."""
    axes = _COMMON_AXES.get(kind) or getattr(CONVENTIONS[package], kind)
    rank, windowed = len(shape), "*" in axes or "~" in axes
    if rank < len(axes) or (rank > len(axes) and not windowed):
        raise ValueError(
            f"its shape {shape} is not that of a layer of the kind {kind!r}: expected "
            f"the axes {axes}"
        )
    window = "abcdefghij"[: rank - len(axes) + 1] if windowed else ""
    order = axes.replace("*", window).replace("~", window)
    return order, window + "".join(a for a in "IOMVDC" if a in axes)


def _mirrored(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """The array with its window mirrored, where the package stores it so.

    The axes of the window lead.
    """
    if not _is_mirrored(package, kind):
        return array
    return np.flip(array, tuple(range(array.ndim - 2)))


def _is_mirrored(package: str, kind: str) -> bool:
    axes = CONVENTIONS[package].conv_transpose
    return kind == "conv_transpose" and "~" in axes


# Where in Flax an entry may lie, and as what: the likeliest reading first.


class Reading(NamedTuple):
    """One place in Flax for an entry.

    Attributes:
        collection: the collection of variables.
        module: the path of the module in it.
        leaf: the name of the variable.
        kind: the kind of layer by which the axes are ordered; None leaves them.
    """

    collection: str
    module: str
    leaf: str
    kind: str | None = None

    @property
    def path(self) -> str:
        return "/".join(filter(None, (self.collection, self.module, self.leaf)))


class Entries(NamedTuple):
    """The entries that are read, and what is known of them.

    Attributes:
        package: the package that they are from.
        modules: by module, the names of its entries.
        kinds: class names by module.
        names: the user's table or function of names.
        rename: module -> Flax's path of it.
        like: the leaves of `like` by path, or None.
    """

    package: str
    modules: Mapping[str, Collection[str]]
    kinds: Mapping[str, str]
    names: Any
    rename: Callable[[str], str]
    like: Mapping[str, Any] | None


def modules_of(package: str, entries: Collection[str]) -> dict[str, set[str]]:
    """The names of the entries of each module; parts of separable convolutions too."""
    modules: dict[str, set[str]] = {}
    for entry in entries:
        module, _, name = entry.rpartition(SEPARATORS[package])
        modules.setdefault(module, set()).add(name)
        if package == "keras" and name in _SEPARABLE_PARTS:
            modules.setdefault(_part(module, name), set())
    return modules


def choose_reading(
    entries: Entries, module: str, name: str, array: np.ndarray
) -> Reading | None:
    """The reading that `like` has, or the likeliest; None for what is left out."""
    readings = _possible_readings(entries, module, name, array)
    if entries.like is None:
        return readings[0]
    for reading in readings:
        if reading.path in entries.like:
            return reading
    if name in OPTIONAL_STATE[entries.package]:
        return None
    if readings[0].kind is None and readings[0].leaf == name != "bias":
        convention = CONVENTIONS[entries.package]
        known = (convention.kernel, convention.embedding, *convention[:4])
        names = ", ".join(dict.fromkeys(known))
        raise ValueError(
            f"its name is not known: expected one of {names}, or that `like` has "
            f"{readings[0].path}"
        )
    return readings[0]


def _possible_readings(
    entries: Entries, module: str, name: str, array: np.ndarray
) -> list[Reading]:
    """All readings of an entry, the likeliest first."""
    separable = _separable_readings(entries, module, name)
    explicit = [reading for reading, is_named in separable if is_named]
    implied = [reading for reading, is_named in separable if not is_named]
    if explicit and (entries.like is None or explicit[0].path in entries.like):
        return explicit  # `names` need not have the module of the layer
    path = entries.rename(module)
    package = entries.package
    known = kind_of_class(package, entries.kinds.get(module))
    unchanged = [Reading(c, path, name) for c in _collections(entries, name, array)]
    slope = [Reading("params", path, "negative_slope", "slope")]
    if package == "keras" and name == "alpha":
        return slope + unchanged if known == "slope" else unchanged + slope
    if package == "keras" and {"mean", "variance"} <= {*entries.modules[module]}:
        leaf = {"mean": "mean", "variance": "var"}.get(name)  # of `Normalization`
        unchanged[:0] = [Reading("batch_stats", path, leaf)] if leaf else []
    leaf, kind = leaf_of(package, name, known, array.shape)
    if leaf is None:
        return explicit + unchanged + implied
    collection = "batch_stats" if leaf in STATISTICS else "params"
    first = [Reading(collection, path, leaf, kind)]
    if name == CONVENTIONS["torch"].kernel and known is None:
        first += slope if array.ndim == 1 else []
        first += [Reading("params", path, "embedding")] if array.ndim == 2 else []
    return explicit + first + unchanged + implied


def _separable_readings(
    entries: Entries, module: str, name: str
) -> list[tuple[Reading, bool]]:
    """An entry of Keras's separable convolution, read as one of two convolutions.

    Each with whether `names` has its module; otherwise the module is that of the layer.
    """
    modules = entries.modules
    is_separable = entries.package == "keras" and "pointwise_kernel" in modules[module]
    if not is_separable or name not in (*_SEPARABLE_PARTS, "bias"):
        return []
    part = _part(module, name)
    is_named = isinstance(entries.names, Mapping) and part in entries.names
    try:
        path = entries.rename(part)
    except ValueError:  # `names` has the layer's module, or neither
        return []
    kind = {"bias": "norm", "depthwise_kernel": "depthwise"}.get(name, "conv")
    leaf = "bias" if name == "bias" else "kernel"
    return [(Reading("params", path, leaf, kind), is_named)]


def _part(module: str, name: str) -> str:
    return "/".join(filter(None, (module, _SEPARABLE_PARTS.get(name, "pointwise"))))


def _collections(entries: Entries, name: str, array: np.ndarray) -> list[str]:
    """Where an entry may lie that keeps its name and axes."""
    is_learned = jnp.issubdtype(array.dtype, jnp.inexact)
    if name in OPTIONAL_STATE[entries.package]:
        is_learned = False
    others = [path.partition("/")[0] for path in entries.like or ()]
    return [*dict.fromkeys(["params" if is_learned else BUFFERS, *others])]
