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
    "LayerNorm": "norm",
    "LayerNormalization": "norm",
    "RMSNorm": "norm",
    "GroupNorm": "norm",
    "GroupNormalization": "norm",
}
_SAME = {"norm": "C", "split": "DC", "embedding": "VC", "depthwise": "*IM"}
# D domains, V tokens, M multiples
_WEIGHTS = {"norm": "scale", "split": "scale", "embedding": "embedding"}
# by kind; others: "kernel"


def kind_of(given: str | None, shape: tuple[int, ...]) -> str:
    """The kind of layer that a weight belongs to, by its class or else its rank."""
    if given is None:
        return ("norm", "norm", "linear", "conv")[min(len(shape), 3)]
    kind = KINDS.get(plain(given))
    if kind is None:
        raise ValueError(
            f"its kind {given!r} is not known: expected one of {', '.join(KINDS)} "
            "(with or without 1d, 2d, 3d)"
        )
    return kind


def has_weights(given: str) -> bool:
    """Whether every layer of this class has a weight: norms may have nothing."""
    return KINDS.get(plain(given), "norm") != "norm"


def plain(given: str) -> str:
    """The name of a class without its dimensions: 2d, 2D."""
    return re.sub(r"\d[dD]", "", given)


def leaf_of(package: str, entry: str, kind: str) -> str:
    """What Flax calls an entry of a layer of that kind."""
    convention, weight = CONVENTIONS[package], _WEIGHTS.get(kind, "kernel")
    leaves = ("kernel", "embedding", "scale", "bias", "mean", "var", weight)
    names = {"bias": "bias"} | {getattr(convention, leaf): leaf for leaf in leaves}
    if entry not in names:
        raise ValueError(f"its name is not known: expected one of {', '.join(names)}")
    return names[entry]


def to_flax(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """A weight in the order of Flax's axes: *IO."""
    order, target = _orders(package, kind, array.shape)
    array = array.transpose([order.index(axis) for axis in target])
    if kind == "depthwise":  # one input for each output
        return array.reshape(*array.shape[:-2], 1, -1)
    return _mirrored(array, package, kind)


def from_flax(array: np.ndarray, package: str, kind: str) -> np.ndarray:
    """The inverse of `to_flax`, for what torch has."""
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
