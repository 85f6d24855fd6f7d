"""Weights of torch and Keras as Flax variables, and back, checked.

>>> table = {"": Convention._fields, **CONVENTIONS}
>>> for row in [tuple(table), *zip(*table.values())]:
...     print("{:15} {!s:9} {!s:19} {!s}".format(*row))
                flax      torch               keras
scale           scale    weight              gamma
bias            bias     bias                beta
mean            mean     running_mean        moving_mean
var             var      running_var         moving_variance
count                    num_batches_tracked
kernel          kernel   weight              kernel
embedding       embedding weight             embeddings
momentum        0.99     0.1                 0.99
momentum_weighs old      new                 old
running_var     biased   unbiased            biased
epsilon         1e-05    1e-05               0.001
feature_axis    -1       1                   -1
linear          IO       OI                  IO
conv            *IO      OI*                 *IO
conv_transpose  *IO      IO~                 ~OI

I and O are the input's and the output's features, * the window, ~ a mirrored window.
Trees of Flax's BatchNorm and of bnjax's BatchNorm, GhostBatchNorm and BatchRenorm are
identical and need no conversion. Parameters that no layer of Flax has keep their names
and axes: tokens, layer scales, weights of attention. So do, in the collection buffers,
counts and the training statistics of Keras's renorm. timm's SplitBatchNorm2d has a
module for each domain but the first, where SplitBatchNorm has rows: write
kinds={"norm": "SplitBatchNorm2d"}. The weights do not hold these settings, which you
write in the Flax model:

    BatchNorm2d(c)             BatchNorm(momentum=0.9, unbiased=True)
    BatchNormalization()       BatchNorm(epsilon=1e-3)
    Conv2d(c, d, k, padding=p) Conv(d, (k, k), padding=p), not Flax's default "SAME"
    groups=g                   feature_group_count=g
    ConvTranspose2d(c, d, k, padding=p, dilation=e, output_padding=o)
                               ConvTranspose(d, (k, k), padding=(low, low + o)) for each
                               axis of the window, low = e (k - 1) - p
    Conv2DTranspose(d, k)      ConvTranspose(d, (k, k), padding="VALID")
    SeparableConv2D(d, k)      Conv(m, (k, k), feature_group_count=c, use_bias=False),
                               then Conv(d, (1, 1)), named depthwise and pointwise or
                               in names={"sep/depthwise": ..., "sep/pointwise": ...}
    Normalization()            BatchNorm(True, epsilon=0.0, use_scale=False,
                               use_bias=False)
    PReLU()                    PReLU(), and kinds or like, which tell it from a norm

The kernels of transposed convolutions fit `transpose_kernel=False`, Flax's default.
Features lie last in Flax. A dense layer of torch's after a flattened image expects
(c, h, w): transpose before you flatten, or pool.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax.convert import _entries
from bnjax.convert._conventions import CONVENTIONS, Convention
from bnjax.convert._safetensors import load_safetensors, save_safetensors
from bnjax.convert._tree import Names

__all__ = [
    "CONVENTIONS",
    "Convention",
    "from_keras",
    "from_torch",
    "load_safetensors",
    "momentum_from_torch",
    "save_safetensors",
    "to_torch",
]


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    like: Any = None,
) -> dict[str, Any]:
    """Flax variables from the state_dict of a torch layer or model.

    `num_batches_tracked` is dropped. Parameters of modules that have no layer in Flax
    pass unchanged, with their names and axes. torch is not imported.

    Args:
        state_dict: entries by dotted name: torch tensors on any device, or arrays. That
            of a single layer gives the variables of a single layer.
        names: torch's module paths to Flax's: a function of the dotted path, or a dict
            whose keys may also be prefixes ({"layer1.0": "Block_0"}) and have to cover
            every module ("" covers all). Flax's paths have slashes. None keeps torch's.
        kinds: class names by torch's module path, where shapes are ambiguous:
            transposed convolutions, embeddings and PReLU. All of them at once:
            `{name: type(module).__name__ for name, module in net.named_modules()}`.
            Layers of unknown classes are read by names and shapes.
        like: variables of the Flax model, from `init` or `jax.eval_shape`. The result
            has to have the same structure and shapes. It gets their dtypes, which is an
            error if the cast loses anything, and their metadata boxes
            (`nn.Partitioned`). An entry that passes unchanged has to be in `like` under
            the same name, in any collection.

    Returns:
        {"params": ..., "batch_stats": ...}, without empty collections, as new arrays.
        Without `like` there may also be "buffers": integers that are no
        `num_batches_tracked`. A state_dict does not say which other entries are
        buffers, so these are in "params".
        float64 becomes float32, with a warning, unless `jax_enable_x64` is set.

    Raises:
        TypeError: a model, or another object that is no state_dict.
        ValueError: lists all entries that are missing, extra, unknown or do not fit.

    >>> zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    >>> norm = {"weight": ones, "running_mean": zeros, "running_var": ones}
    >>> norm |= {"num_batches_tracked": np.array(7)}
    >>> state_dict = {"conv.weight": np.zeros((5, 3, 2, 4), np.float32)}
    >>> state_dict |= {f"norms.0.{name}": value for name, value in norm.items()}
    >>> variables = from_torch(state_dict, names={"conv": "Conv_0", "norms": "norm"})
    >>> print(variables["params"]["Conv_0"]["kernel"].shape)
    (2, 4, 3, 5)
    >>> print(variables["params"]["norm"]["0"]["scale"])
    [1. 1. 1.]

    References: google/flax: docs/guides/converting_and_upgrading/
    convert_pytorch_to_flax.rst, which leaves the variance's n - 1 out.
    """
    options = names, kinds or {}, like
    return _entries.to_flax_variables("torch", state_dict, *options).tree


def from_keras(
    weights: Mapping[str, Any] | Sequence[Any],
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    like: Any = None,
) -> dict[str, Any]:
    """Flax variables from the weights of a Keras layer or model.

    Args:
        weights: {w.path: w for w in model.weights}; {w.name: w for w in layer.weights};
            or the four arrays gamma, beta, moving_mean, moving_variance that
            BatchNormalization's `get_weights` returns.
        names: see `from_torch`; Keras's paths have slashes too. The paths of a
            `Sequential` begin with its name: names={"sequential": ""}.
        kinds: class names by Keras's layer path, where names and shapes are ambiguous:
            `{layer.path: type(layer).__name__ for layer in model.layers}`.
        like: see `from_torch`.

    Returns:
        See `from_torch`; "buffers" holds counts and the statistics of Keras's renorm
        other than the moving ones.

    Raises:
        ValueError: lists all entries that are missing, extra, unknown or do not fit.

    >>> zeros, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> variables = from_keras([3 * ones, zeros, zeros, ones])
    >>> print(variables["params"]["scale"])
    [3. 3.]

    References: keras-team/keras: keras/src/layers/normalization/batch_normalization.py.
    """
    if isinstance(weights, (list, tuple)):
        names_in_order = CONVENTIONS["keras"][:4]
        if len(weights) != len(names_in_order):
            raise ValueError(
                f"weights is a list of {len(weights)}: expected BatchNormalization's "
                f"{', '.join(names_in_order)}. Any other list does not say what it "
                "holds: pass {w.name: w for w in layer.weights}."
            )
        weights = dict(zip(names_in_order, weights))
    return _entries.to_flax_variables("keras", weights, names, kinds or {}, like).tree


def to_torch(
    variables: Mapping[str, Any],
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    like: Mapping[str, Any] | None = None,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """The state_dict of a torch layer or model from Flax variables.

    The exact inverse of `from_torch`, except that `num_batches_tracked` is 0 unless you
    pass it. Give `like` if a module of your own has parameters with names that Flax
    uses in other layers, such as kernel or scale. Load the result with:

        state_dict = to_torch(variables)
        tensors = {name: torch.as_tensor(v) for name, v in state_dict.items()}
        net.load_state_dict(tensors)

    Args:
        variables: {"params": ..., "batch_stats": ...} and the "buffers" of
            `from_torch`; other collections have no counterpart and are left out.
        names: see `from_torch`: from torch's paths to Flax's. A function needs `like`.
        kinds: see `from_torch`.
        like: the state_dict of the torch model, which the result has to match in names,
            shapes and dtypes. Its dtypes are taken where that loses nothing.
        num_batches_tracked: the count of batches in each normalization; torch uses it
            with momentum=None alone.

    Returns:
        New NumPy arrays by dotted name. torch cannot read NumPy's bfloat16: write
        `value.astype("float32")`.

    Raises:
        ValueError: lists all entries that are missing, extra, unknown or do not fit.

    >>> params = {"up": {"kernel": np.zeros((2, 4, 3, 5))}}
    >>> state_dict = to_torch({"params": params}, kinds={"up": "ConvTranspose2d"})
    >>> print({name: value.shape for name, value in state_dict.items()})
    {'up.weight': (3, 5, 2, 4)}

    References: pytorch/pytorch: torch/nn/modules/batchnorm.py.
    """
    count = np.array(num_batches_tracked, np.int64)
    return _entries.to_state_dict(variables, names, kinds or {}, like, count).tree


def momentum_from_torch(momentum: float | None) -> float:
    """The momentum of Flax's layers that is torch's `momentum`.

        1 - momentum: torch's is the weight of the new value, Flax's that of the old

    Args:
        momentum: the momentum of torch's layer, in [0, 1].

    Returns:
        In [0, 1].

    Raises:
        ValueError: outside of [0, 1], and for None, torch's cumulative average.

    >>> momentum_from_torch(0.1)
    0.9

    References: pytorch/pytorch: torch/nn/modules/batchnorm.py, the note on momentum.
    """
    if momentum is None:
        raise ValueError(
            "momentum=None is torch's cumulative average over all batches, which no "
            "momentum gives: expected a number. Use bnjax.running.cumulative(ddof=1)."
        )
    if isinstance(momentum, str) or not 0 <= (value := float(momentum)) <= 1:
        raise ValueError(
            f"momentum={momentum!r} is the weight of the new value, as in torch: "
            "expected a number in [0, 1]. Write momentum_from_torch(0.1), torch's "
            "default, for the momentum 0.9 of Flax's layers."
        )
    return 1 - value
