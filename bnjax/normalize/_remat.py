"""What is kept for the backward pass, and what is computed again."""

import functools
from typing import Any

import jax

from bnjax.moments import NAME

_moments = jax.checkpoint_policies.save_only_these_names(NAME)
_products = jax.checkpoint_policies.dots_saveable

# Keeps the moments (and with them one collective) and recomputes all else; XLA may
# still share the recomputation with the forward pass inside one jit.
keep_moments = functools.partial(jax.checkpoint, policy=_moments, prevent_cse=False)


def remat_policy(primitive: Any, *avals: Any, **parameters: Any) -> Any:
    """Keeps convolutions, matrix products and batch statistics; recomputes the rest.

        kept:        z = W * x,  and the mean and variance of z
        recomputed:  activation((z - mean) / sqrt(var + epsilon) * scale + bias)

    A policy for `jax.checkpoint` and `flax.linen.remat`. Per convolution, batch
    normalization and activation one array is stored, as by invertible in-place batch
    normalization, but for any activation; and no reduction, convolution or collective
    is run twice.

    What enters a region is stored as well. A region that starts where a convolution
    ends (normalization, activation, convolution) stores one array per convolution; one
    that starts with the convolution stores two, its input and its output. So does
    `lax.scan` over such blocks, whose carry is what enters. In a residual network make
    a stage one region, not each block: the sums of its blocks are then recomputed too.

    Args:
        primitive: the operation that is asked about.
        *avals: the types of its inputs.
        **parameters: of the operation.

    Returns:
        Whether its results are kept.

    >>> import flax.linen as nn, bnjax
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, z):
    ...         norm = bnjax.BatchNorm(use_running_average=False, activation=nn.relu)
    ...         return nn.Conv(8, (3, 3), use_bias=False)(norm(z))
    >>> block = nn.remat(Block, policy=bnjax.remat_policy)()

    References: Chen et al. 2016, section 3; Rota Bulo et al. 2018 (in-place).
    """
    kept = _moments(primitive, *avals, **parameters)
    return kept or _products(primitive, *avals, **parameters)
