"""Batch normalization for JAX: functions, and layers for Flax."""

from bnjax import (
    convert,
    diagnostics,
    fold,
    ghost,
    linen,
    nnx,
    population,
    renorm,
    running,
    split,
    training,
    whiten,
)
from bnjax._checks import BatchNormWarning, UnboundAxisNameError
from bnjax.linen import BatchNorm
from bnjax.moments import Moments, merge, moments
from bnjax.normalize import batch_norm, normalize, remat_policy

__version__ = "0.2.0"

__all__ = [
    "BatchNorm",
    "BatchNormWarning",
    "Moments",
    "UnboundAxisNameError",
    "batch_norm",
    "convert",
    "diagnostics",
    "fold",
    "ghost",
    "linen",
    "merge",
    "moments",
    "nnx",
    "normalize",
    "population",
    "remat_policy",
    "renorm",
    "running",
    "split",
    "training",
    "whiten",
]
