"""The momentum of a step, read off the statistics before and after it.

    new = m old + (1 - m) batch,   m = Re (new - batch)(old - batch)* / |old - batch|^2

for each channel's mean. Means alone: variances may be biased or unbiased.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.diagnostics._measures import counts_of
from bnjax.moments import Moments

SMALLEST = 0.4
"""The smallest momentum that is no finding.

A debiased average of decay d has m = d / (1 + d) in its second step, which is 0.4 or
more if d is 2/3 or more; the cumulative average has 1/2. PyTorch's are at most 0.3.
"""

_ROUNDINGS = 1e3  # by which old and batch differ at least, for m of three digits
_SPREAD = 0.05  # of the channels; if they do not agree, the step was another one


def momentum_of(
    old: Mapping[str, Any], new: Mapping[str, Any], batch: Moments
) -> np.ndarray:
    """The weight of the old mean in the new one: the median over the channels.

    Args:
        old: {mean, var} before the step, (*rows, feature).
        new: the same after it.
        batch: the Moments of the step.

    Returns:
        (*rows,), in [0, 1]: 1 where no mean has changed although the batch has another
        one; NaN where nothing tells, or where channels do not agree: two calls of the
        layer in one step, or the update of another batch.
    """
    eps = float(jnp.finfo(jnp.asarray(new["mean"]).dtype).eps)
    wide = np.complex128 if jnp.iscomplexobj(batch.mean) else np.float64
    before, after, mean = (
        np.asarray(value).astype(wide)
        for value in (old["mean"], new["mean"], batch.mean)
    )
    momentum = np.full(mean.shape[:-1], np.nan)
    if not (np.isfinite(mean) & np.isfinite(batch.m2)).all():
        return momentum  # the layer may have skipped the batch on purpose
    estimated = counts_of(batch) > 1
    for row in np.ndindex(momentum.shape):
        values = np.stack([before[row], after[row], mean[row]])
        seen = estimated[row] & np.isfinite(values).all(0)
        momentum[row] = _of_row(values[:, seen], _ROUNDINGS * eps)
    return momentum


def _of_row(values: np.ndarray, smallest: float) -> float:
    """The momentum of one row.

    Args:
        values: (3, channel): old, new and batch.
        smallest: the distance of old and batch, relative to the larger, that tells.
    """
    old, new, batch = values
    telling = np.abs(old - batch) > smallest * np.maximum(np.abs(old), np.abs(batch))
    old, new, batch = values[:, telling]
    if not old.size:
        return np.nan
    if (new == old).all():
        return 1.0
    each = np.real((new - batch) * np.conj(old - batch)) / np.abs(old - batch) ** 2
    median = np.median(each)
    if np.median(np.abs(each - median)) > _SPREAD:
        return np.nan
    return float(np.clip(median, 0, 1 - 1e-6))  # 1 says that nothing was updated
