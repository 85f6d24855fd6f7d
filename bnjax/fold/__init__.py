"""Evaluation without batch normalization: linear layers take in its affine map.

    multiplier = scale / sqrt(var + epsilon),  offset = bias - mean * multiplier
    kernel' = kernel * multiplier,  bias' = bias * multiplier + offset

`fold_conv`, `fold_dense` and `fold_conv_transpose` do it for one layer. `fold_model`
finds the pairs in a Linen or NNX model, of Flax's layers or bnjax's.
"""

from typing import Any

import flax.linen as nn
from flax import nnx

from bnjax.fold import _linen, _nnx
from bnjax.fold._kernels import affine, fold_conv, fold_conv_transpose, fold_dense
from bnjax.fold._layers import Folded

__all__ = [
    "Folded",
    "affine",
    "fold_conv",
    "fold_conv_transpose",
    "fold_dense",
    "fold_model",
]


def fold_model(model: Any, *arguments: Any, **keywords: Any) -> Folded:
    """The model without its batch normalization, for evaluation.

        fold_model(model, variables, x, train=False)     # Linen: as model.apply
        fold_model(model, x)                             # NNX: as the call

    The model is traced with these arguments. A BatchNorm, GhostBatchNorm, BatchRenorm
    or SplitBatchNorm is folded into a Conv, ConvTranspose or Dense (Linear) whose
    output it reads, if nothing else does. Elsewhere it is replaced by
    `(x - mean) * multiplier + bias`, with the same result. Of a SplitBatchNorm the row
    of the domain in these arguments is taken, or row 0. A residual and an activation of
    bnjax's layers remain. Nothing that is passed in is changed.

    These stay as they are: a DecorrelatedBatchNorm, a layer whose variables are not its
    own (under `nn.scan`), and a SplitBatchNorm with one domain for each example.

    Nothing is folded into a kernel that is itself transformed (e.g. `nn.WeightNorm`);
    casts, reshapes and scalings do not count. A folded kernel and bias are stored at
    least in the dtype that they are computed in. If the normalization returns a wider
    dtype than the layer before it, only its scale is folded; its offset is added where
    the normalization was, from `params[norm]["bias"]`.

    Args:
        model: a `flax.linen.Module`, or a `flax.nnx.Module` in evaluation mode.
        *arguments: for Linen first the variables, {params, batch_stats, ...}; then
            example inputs, or `jax.ShapeDtypeStruct`s for them.
        **keywords: keyword arguments of the model. Arrays are inputs, which `apply`
            expects too; all others, such as `train=False`, it remembers.

    Returns:
        Folded. `apply(params, *inputs)` returns what the model does; `params` is a
        nested dictionary of arrays. Variables of other collections that remain are
        constants of `apply`. `folded` names the pairs. `kept` names every normalization
        that was not folded into another layer, replaced or not, with the reason.

    Raises:
        TypeError: a model of another library.
        ValueError: a layer that uses the statistics of the batch or updates the running
            ones; a model that reads the variables of a normalization by itself.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
    ...         return nn.BatchNorm(not train, name="norm")(x)
    >>> x = jnp.ones((2, 5, 6, 3))
    >>> variables = Model().init(jax.random.key(0), x, train=False)
    >>> apply, params, folded, kept = fold_model(Model(), variables, x, train=False)
    >>> print(folded, jax.tree.map(jnp.shape, params))
    (('conv', 'norm'),) {'conv': {'bias': (8,), 'kernel': (3, 3, 3, 8)}}
    >>> y = jax.jit(apply)(params, x)

    References: Jacob et al. 2018 (Quantization and training), section 3.2, eq. 14.
    """
    if isinstance(model, nn.Module):
        if not arguments:
            raise TypeError(
                "fold_model received a Linen module alone: expected its variables and "
                "example inputs. Write fold_model(model, variables, x, train=False)."
            )
        return _linen.fold(model, *arguments, **keywords)
    if isinstance(model, nnx.Module):
        return _nnx.fold(model, *arguments, **keywords)
    raise TypeError(
        f"fold_model received a {type(model).__name__}: expected a flax.linen.Module "
        "and its variables, or a flax.nnx.Module. Fold layers of other libraries with "
        "fold_conv, fold_dense and fold_conv_transpose."
    )
