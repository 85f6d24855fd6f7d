"""One call of a layer, whichever framework keeps its variables; all pure."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bnjax import _dtypes, running
from bnjax.moments import Moments, moments
from bnjax.normalize import batch_norm, normalize


def forward(
    x: jax.Array,
    stored: running.State,
    affine: Mapping[str, Any],
    over: Mapping[str, Any],
    *,
    use_running: bool,
    measure: bool,
) -> tuple[jax.Array, Moments | None]:
    """The output and the Moments of the batch.

    Args:
        x: (batch, *spatial, feature).
        stored: the running statistics.
        affine: what `normalize` and `batch_norm` share.
        over: what `moments` and `batch_norm` share, but for the axis.
        use_running: whether to normalize by `stored`.
        measure: whether the Moments are needed then too; else they are None.
    """
    if not use_running:
        return batch_norm(x, **over, **affine, fallback=stored)
    y = normalize(x, *stored, **affine)
    return y, moments(x, axis=affine["axis"], **over) if measure else None


def updated(
    stored: running.State,
    batch: Moments,
    *,
    momentum: float,
    unbiased: bool,
    skip_nonfinite: bool,
    batch_dtype: DTypeLike,
    keep_dtype: bool,
) -> running.State:
    """The running statistics after a batch.

    Args:
        stored: those before.
        batch: its Moments.
        momentum: the weight of `stored`.
        unbiased: whether the running variance divides by n - 1.
        skip_nonfinite: whether a batch that is not finite changes nothing.
        batch_dtype: of the statistics of the batch in Flax; the result is promoted to
            it.
        keep_dtype: whether real statistics keep the dtype of `stored` instead.
    """
    rule = running.ema(momentum, ddof=int(unbiased), skip_nonfinite=skip_nonfinite)
    values = []
    for old, new in zip(stored, rule.update(stored, batch)):
        dtype = _dtypes.promote(old, batch_dtype)
        if not jnp.iscomplexobj(new):
            dtype = old.dtype if keep_dtype else _dtypes.real(dtype)
        values.append(new.astype(dtype))
    return running.State(*values)
