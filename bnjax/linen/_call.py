"""One call of a Linen layer: its variables, and the pure functions on their values.

Functions, not methods: Flax wraps methods, and summaries list their calls.
"""

import warnings
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes, _layer, running
from bnjax.moments import Moments

Shape = tuple[int, ...]


def call(
    layer: Any,
    x: ArrayLike,
    family: _layer.Family,
    *,
    use_running_average: bool | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    update_stats: bool | None,
    shared_affine: bool = False,
) -> jax.Array:
    """Normalizes `x` and writes what is to be written: see `BatchNorm.__call__`."""
    use_running = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    _checks.weight("momentum", layer.momentum)
    update = layer.update_stats if update_stats is None else update_stats
    x = _checks.inexact("x", x)
    features = _axes.sizes(x.shape, _axes.canonical(layer.axis, x.ndim))
    shape = family.leading + features
    stats = _running_statistics(layer, family, shape)
    stored = running.State._make(variable.value for variable in stats)
    affine = {
        **parameters(layer, features if shared_affine else shape),
        "residual": residual,
    }
    over: dict[str, Any] = {"mask": mask}
    if layer.is_initializing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _checks.BatchNormWarning)
            if use_running:
                return family.infer(x, *stored, **affine)
            return family.start(x, **over, **affine)[0]

    over["axis_name"] = layer.axis_name
    over["axis_index_groups"] = layer.axis_index_groups
    update = not use_running if update is None else update
    pools = asks_for_moments(layer)
    y, batch = _layer.forward(
        x,
        stored,
        affine,
        over,
        family,
        use_running=use_running,
        measure=bool(update or pools),
    )
    if batch is None:
        return y
    if update:
        _update(layer, stats, stored, batch, x)
    if pools:
        pool = layer.variable("batch_moments", "moments", family.empty, shape)
        pool.value = family.merge(pool.value, batch)
    return y


def _running_statistics(
    layer: Any, family: _layer.Family, shape: Shape
) -> list[nn.Variable]:
    """The variables of the running statistics: mean, var."""
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    stats = []
    for name, value in family.begin(shape, dtype).items():
        stored = layer.variable("batch_stats", name, lambda value=value: value)
        path = f"batch_stats/{name}"
        _checks.feature_shape(path, stored.value, value.shape, layer.axis)
        stats.append(stored)
    return stats


def parameters(layer: Any, shape: Shape) -> dict[str, Any]:
    """The arguments that `normalize` and `batch_norm` share; declares the params."""
    shared: dict[str, Any] = {}
    if layer.use_scale:
        shared["scale"] = layer.param(
            "scale", layer.scale_init, shape, layer.param_dtype
        )
    if layer.use_bias:
        shared["bias"] = layer.param("bias", layer.bias_init, shape, layer.param_dtype)
    shared.update(axis=layer.axis, epsilon=layer.epsilon, dtype=layer.dtype)
    shared.update(activation=layer.activation)
    return shared


def asks_for_moments(layer: Any) -> bool:
    """Whether `batch_moments` is mutable by name.

    `mutable=True` and DenyList, which summaries and careless callers pass, would leave
    Flax's users with a collection, and in evaluation with work, that Flax has not.
    """
    everything = layer.scope is None or isinstance(
        layer.scope.mutable, (bool, flax.core.DenyList)
    )
    return not everything and layer.is_mutable_collection("batch_moments")


def _update(
    layer: Any,
    stats: list[nn.Variable],
    stored: running.State,
    batch: Moments,
    x: jax.Array,
) -> None:
    """Writes the running statistics after one batch, in the dtypes of Flax's."""
    new = _layer.updated(
        stored,
        batch,
        momentum=layer.momentum,
        unbiased=layer.unbiased,
        skip_nonfinite=layer.skip_nonfinite_updates,
        batch_dtype=_dtypes.statistics(x.dtype if layer.dtype is None else layer.dtype),
        keep_dtype=not layer.force_float32_reductions,
    )
    for variable, value in zip(stats, new):
        variable.value = value
