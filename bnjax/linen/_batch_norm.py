"""Batch normalization with the name, fields and variables of `flax.linen.BatchNorm`.

`Normalization` is what the variants share: the fields, the variables, and one call.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _checks, _dtypes, _layer, running
from bnjax.moments import Moments

Shape = tuple[int, ...]


class Normalization(nn.Module):
    """The layers' common part; what differs between them is in `LayerOps`.

    Those with the variables of Flax's BatchNorm, which infer as it does, are subclasses
    of both, for public code asks for that class. This comes first: its call is theirs.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = initializers.zeros
    scale_init: Callable[..., Any] = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    unbiased: bool = dataclasses.field(default=False, kw_only=True)
    update_stats: bool | None = dataclasses.field(default=None, kw_only=True)
    skip_nonfinite_updates: bool = dataclasses.field(default=False, kw_only=True)
    activation: Callable[[jax.Array], jax.Array] | None = dataclasses.field(
        default=None, kw_only=True
    )
    frozen: bool = dataclasses.field(default=False, kw_only=True)

    force_float32_reductions = True  # a field of Flax's subclasses alone
    trains_by_statistics = False  # whether training reads the running statistics

    @nn.nowrap
    def _layer_ops(self) -> _layer.LayerOps:
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates the running statistics.

        Args:
            x: (batch, *spatial, feature), of the sizes and dtypes that the function of
                the layer's name takes; or integers or booleans, which are promoted.
            use_running_average: see the attribute; exactly one of the two is given.
            mask: boolean, broadcastable to `x`; True = takes part in the statistics.
            weights: real floats >= 0, broadcastable to `x`: how often each value counts
                in the statistics; see `bnjax.batch_norm`.
            residual: of the shape of `x`; added before the activation.
            update_stats: see the attribute, over which this takes precedence.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: `use_running_average` given twice or not at all, and whatever
                that function raises.
            flax.errors.ModifyScopeVariableError: the running statistics are to be
                written, but `batch_stats` is not mutable.
        """
        return call(
            self,
            x,
            self._layer_ops(),
            use_running_average=use_running_average,
            mask=mask,
            weights=weights,
            residual=residual,
            update_stats=update_stats,
        )


# Functions, not methods: Flax wraps methods, and summaries list their calls.


def call(
    layer: Any,
    x: ArrayLike,
    ops: _layer.LayerOps,
    *,
    use_running_average: bool | None,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    residual: ArrayLike | None,
    update_stats: bool | None,
    shared_affine: bool = False,
    steps: ArrayLike | None = None,
) -> jax.Array:
    """Normalizes `x` and writes what is to be written: see `Normalization.__call__`."""
    use_running = layer.frozen or nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    _checks.weight("momentum", layer.momentum)
    update = layer.update_stats if update_stats is None else update_stats
    given = jnp.asarray(x)
    x = _layer.inexact(given)
    features = _axes.sizes(x.shape, _axes.canonical(layer.axis, x.ndim))
    shape = ops.leading + features
    update = not use_running if update is None else update and not layer.frozen
    stats, stored = _running_statistics(
        layer,
        ops,
        shape,
        x,
        needed=bool(use_running or update or layer.trains_by_statistics),
    )
    affine = {
        **_parameters(layer, features if shared_affine else shape),
        "residual": residual,
    }
    if layer.dtype is None and x.dtype != given.dtype:  # a widened x would tell it
        dtype = _dtypes.result(given, affine.get("scale"), affine.get("bias"))
        affine["dtype"] = dtype
    reduction: dict[str, Any] = {"mask": mask, "weights": weights}
    if layer.is_initializing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _checks.BatchNormWarning)
            if use_running:
                return ops.infer(x, *stored, **affine)
            return ops.start(x, **reduction, **affine)[0]

    reduction["axis_name"] = layer.axis_name
    reduction["axis_index_groups"] = layer.axis_index_groups
    pools = _asks_for_moments(layer)
    y, batch = _layer.forward(
        x,
        stored,
        affine,
        reduction,
        ops,
        use_running=use_running,
        measure=bool(update or (pools and not layer.frozen)),
    )
    if update:
        _update(layer, stats, stored, batch, x)
        if steps is not None:
            layer.put_variable("batch_stats", "steps", _layer.next_step(steps))
    if pools:  # empty ones if frozen: what updates statistics by them leaves these
        pool = layer.variable("batch_moments", "moments", ops.empty, shape)
    if pools and not layer.frozen:
        pool.value = ops.merge(pool.value, batch)
    return y


def _running_statistics(
    layer: Any, ops: _layer.LayerOps, shape: Shape, x: jax.Array, *, needed: bool
) -> tuple[list[nn.Variable], running.State]:
    """The variables of the running statistics, mean and var or cov, and their values.

    Where a call neither uses nor writes them they may be missing: what falls back on
    them, features without a valid value, finds their start then. The mean of complex
    inputs is complex from the start: a loop over training steps needs one type, and so
    does a checkpoint.
    """
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    dtype = _dtypes.real(dtype)
    if jnp.iscomplexobj(x):
        dtype = _dtypes.promote(dtype, x.dtype)
    start = ops.begin(shape, dtype)
    declares = needed or layer.is_initializing()
    if not declares and not any(layer.has_variable("batch_stats", n) for n in start):
        return [], running.State(*start.values())
    stats = []
    for name, value in start.items():
        stored = layer.variable("batch_stats", name, lambda value=value: value)
        path = f"batch_stats/{name}"
        _checks.feature_shape(path, stored.value, value.shape, layer.axis)
        stats.append(stored)
    return stats, running.State._make(variable.value for variable in stats)


def _parameters(layer: Any, shape: Shape) -> dict[str, Any]:
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


def _asks_for_moments(layer: Any) -> bool:
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


class BatchNorm(Normalization, nn.BatchNorm):
    """Batch normalization, a drop-in replacement of `flax.linen.BatchNorm`.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Variables: `params/{scale,bias}`, `batch_stats/{mean,var}` (float32). Two switches
    are independent: where the statistics come from (`use_running_average`), and whether
    the running statistics are written (`update_stats`). Where `mutable` names
    `batch_moments` (`mutable=True` does not), the layer leaves the Moments of its input
    there, as `batch_moments/moments`, merged with what the collection already holds: a
    layer that is called twice pools both inputs. Start it empty at each step.

    An instance is one of `flax.linen.BatchNorm`, for code that looks for those; nothing
    that it does is inherited. So are GhostBatchNorm and BatchRenorm, which have its
    variables and infer as it does.

    Attributes:
        use_running_average: whether to normalize by the running statistics; here or in
            the call, not both.
        axis: the feature axis or axes; all others are reduced.
        momentum: the weight of the old running value (PyTorch's is one minus this).
        epsilon: added to the variance.
        dtype: of the output; None for `result_type(x, scale, bias)`.
        param_dtype: of the parameters.
        use_bias: whether to add a bias (beta).
        use_scale: whether to multiply by a scale (gamma).
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to share statistics
            over. Not needed under jit.
        axis_index_groups: a partition of that axis; groups may differ in size.
        use_fast_variance: accepted and without effect: one pass is as accurate as two.
        force_float32_reductions: if False the running statistics are stored in
            `param_dtype`; they are computed in at least float32 all the same.
        unbiased: whether the running variance divides by n - 1, as PyTorch's does. The
            batch is always normalized by the biased variance.
        update_stats: whether the running statistics are written. None: as Flax, when
            batch statistics are used. False: never, and `mutable` is not needed; where
            batch statistics are used neither is `batch_stats`, which makes a layer
            without running statistics (PyTorch's track_running_stats=False). True:
            always, also when normalizing by the running statistics (those from before
            the update).
        skip_nonfinite_updates: whether a batch whose moments hold a NaN or an infinity
            leaves the running statistics as they were.
        activation: an elementwise function; its input is not stored for the backward
            pass.
        frozen: whether the layer evaluates whatever the call says, in training too: the
            running statistics are used, and never written; the Moments that it leaves
            are empty, so that nothing else updates the statistics by them. Scale and
            bias stay as they are by a mask, `bnjax.training.freeze_mask`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> layer = BatchNorm(use_running_average=False)
    >>> x = jax.random.normal(jax.random.key(0), (5, 6))
    >>> variables = layer.init(jax.random.key(1), x)
    >>> print(jax.tree.map(jnp.shape, variables["batch_stats"]))
    {'mean': (6,), 'var': (6,)}
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    References: Ioffe & Szegedy 2015.
    """

    @nn.nowrap
    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.LayerOps()
