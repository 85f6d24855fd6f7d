"""What packages call things and how they lay them out, as data, and its use."""

import re
from typing import NamedTuple

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
        momentum: the default.
        momentum_weighs: whether the momentum is the weight of the old or of the new.
        running_var: whether the running variance is biased (n) or unbiased (n - 1).
        epsilon: the default.
        feature_axis: of the input.
        linear: the axes of a dense layer's weight: I of the input, O of the output.
        conv: the axes of a convolution's weight; * stands for those of the window.
        conv_transpose: of a transposed convolution's; ~ is a window that lies mirrored.
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
_SAME = {"norm": "C", "split": "DC", "embedding": "VC", "depthwise": "*IM"}
# D domains, V tokens, M multiples
_WEIGHTS = {
    "norm": "scale",
    "layer_norm": "scale",
    "split": "scale",
    "embedding": "embedding",
    "slope": "negative_slope",
}
# by kind; others: "kernel"

# Words in the names of unknown classes that contradict what shapes say: the word, the
# kind that a shape would have it be, and the class that it may be.
_TRANSPOSED = {"torch": "ConvTranspose{n}d", "keras": "Conv{n}DTranspose"}
_DOUBTS = (
    ("transpose", "conv", _TRANSPOSED),
    ("deconv", "conv", _TRANSPOSED),
    ("depthwise", "conv", {"keras": "DepthwiseConv{n}D"}),
    ("embedding", "linear", {"torch": "Embedding"}),
)


def known_kind(package: str, given: str | None) -> str | None:
    """The kind of the layers of a class, or None where the class is not known."""
    kind = None if given is None else KINDS.get(plain(given))
    return "conv" if package != "keras" and kind in _KERAS_ALONE else kind


def kind_by_rank(rank: int) -> str:
    """The kind of layer that a weight of so many axes belongs to."""
    return ("norm", "norm", "linear", "conv")[min(rank, 3)]


def check_guess(
    package: str, module: str, given: str | None, kind: str | None, rank: int
) -> None:
    """Raises where an unknown class is called otherwise than its shape was read."""
    if given is None or known_kind(package, given) is not None:
        return
    for word, read_as, cures in _DOUBTS:
        if word in given.lower() and kind == read_as and package in cures:
            cure = cures[package].format(n=rank - 2)
            raise ValueError(
                f"its kind {given!r} is not known, and its shape does not tell how its "
                f"axes lie: expected a class that is known. Write kinds={{{module!r}: "
                f"{cure!r}}}, or {_by_rank(package, rank)!r} if it is one"
            )


def _by_rank(package: str, rank: int) -> str:
    """What a weight of so many axes is taken for, as a name of a class."""
    if kind_by_rank(rank) == "linear":
        return {"torch": "Linear", "keras": "Dense"}[package]
    return f"Conv{rank - 2}{'d' if package == 'torch' else 'D'}"


def has_weights(given: str) -> bool:
    """Whether every layer of this class has a weight: norms may have nothing."""
    return KINDS.get(plain(given), "norm") not in ("norm", "layer_norm")


def plain(given: str) -> str:
    """The name of a class without its dimensions: 2d, 2D."""
    return re.sub(r"\d[dD]", "", given)


def leaf_of(
    package: str, name: str, known: str | None, shape: tuple[int, ...]
) -> tuple[str | None, str | None]:
    """What Flax calls an entry, and the kind of layer that orders its axes.

    Args:
        package: whose entry it is.
        name: of the entry in its module.
        known: the kind of the module, if its class is known.
        shape: of the entry.

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
        names = {convention.kernel: _WEIGHTS.get(kind, "kernel")}
    if name not in names or not (shape or known):
        return None, None
    return names[name], kind


def to_flax(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """Converts a parameter to Flax's layout: kernels become (*window, in, out).

    Kernels of transposed convolutions are flipped if the package stores them mirrored.
    """
    if kind == "slope":  # Flax has one of no axes
        return array.reshape(()) if array.size == 1 else array
    if kind == "layer_norm":  # of as many axes as it normalizes
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


def _orders(package: str, kind: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """A letter for each axis, in the order of the package and in that of Flax."""
    axes = _SAME.get(kind) or getattr(CONVENTIONS[package], kind)
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
    """The window mirrored, where it lies mirrored; its axes lead."""
    if kind != "conv_transpose" or "~" not in CONVENTIONS[package].conv_transpose:
        return array
    return np.flip(array, tuple(range(array.ndim - 2)))
