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

    Layers with Flax's variables and inference also inherit from `flax.linen.BatchNorm`,
    because user code tests for it with `isinstance`. `Normalization` comes first, so
    that its `__call__` is used.
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
    needs_running_stats_in_training = False

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
            x: (batch, *spatial, feature); see the corresponding function, such as
                `bnjax.batch_norm`. Integers and booleans are promoted.
            use_running_average: see the attribute; exactly one of the two is given.
            mask: boolean, broadcastable to `x`; False leaves a value out of the
                statistics.
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
    _checks.decay_rate("momentum", layer.momentum)
    given = jnp.asarray(x)
    x = _layer.to_inexact(given)
    features = _axes.sizes(x.shape, _axes.canonical(layer.axis, x.ndim))
    shape = ops.leading + features
    if update_stats is None:
        update_stats = layer.update_stats
    update = not use_running if update_stats is None else update_stats
    update = update and not layer.frozen
    variables, stored = _running_statistics(
        layer,
        ops,
        shape,
        x,
        needed=bool(use_running or update or layer.needs_running_stats_in_training),
    )
    normalize_options = {
        **_declare_parameters(layer, features if shared_affine else shape),
        "residual": residual,
    }
    if layer.dtype is None and x.dtype != given.dtype:  # by x before it was promoted
        dtype = _dtypes.result(
            given, normalize_options.get("scale"), normalize_options.get("bias")
        )
        normalize_options["dtype"] = dtype
    moments_options: dict[str, Any] = {"mask": mask, "weights": weights}
    if layer.is_initializing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _checks.BatchNormWarning)
            if use_running:
                return ops.infer(x, *stored, **normalize_options)
            return ops.init_forward(x, **moments_options, **normalize_options)[0]

    moments_options["axis_name"] = layer.axis_name
    moments_options["axis_index_groups"] = layer.axis_index_groups
    collects = _asks_for_moments(layer)
    y, batch = _layer.forward(
        x,
        stored,
        normalize_options,
        moments_options,
        ops,
        use_running=use_running,
        measure=bool(update or (collects and not layer.frozen)),
    )
    if update:
        _update(layer, variables, stored, batch, x)
        if steps is not None:
            layer.put_variable("batch_stats", "steps", _layer.next_step(steps))
    if collects:  # empty if frozen: nothing updates the statistics by them
        collected = layer.variable("batch_moments", "moments", ops.empty, shape)
    if collects and not layer.frozen:
        collected.value = ops.merge(collected.value, batch)
    return y


def _running_statistics(
    layer: Any, ops: _layer.LayerOps, shape: Shape, x: jax.Array, *, needed: bool
) -> tuple[list[nn.Variable], running.State]:
    """The variables of the running statistics, mean and var or cov, and their values.

    They may be missing if a call neither uses nor writes them. Features without a valid
    value then fall back on the initial values. The mean of complex inputs is complex
    from the start: a loop over training steps needs one type, and so does a checkpoint.
    """
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    dtype = _dtypes.real(dtype)
    if jnp.iscomplexobj(x):
        dtype = _dtypes.promote(dtype, x.dtype)
    initial = ops.init_stats(shape, dtype)
    declares = needed or layer.is_initializing()
    if not declares and not any(layer.has_variable("batch_stats", n) for n in initial):
        return [], running.State(*initial.values())
    stats = []
    for name, value in initial.items():
        stored = layer.variable("batch_stats", name, lambda value=value: value)
        path = f"batch_stats/{name}"
        _checks.feature_shape(path, stored.value, value.shape, layer.axis)
        stats.append(stored)
    return stats, running.State._make(variable.value for variable in stats)


def _declare_parameters(layer: Any, shape: Shape) -> dict[str, Any]:
    """Declares the params; returns the options of `normalize` and `batch_norm`."""
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
    new = _layer.update_running_stats(
        stored,
        batch,
        momentum=layer.momentum,
        unbiased=layer.unbiased,
        skip_nonfinite=layer.skip_nonfinite_updates,
        batch_dtype=_dtypes.statistics_dtype(
            x.dtype if layer.dtype is None else layer.dtype
        ),
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
        frozen: if True, the layer runs in inference mode regardless of the call: it
            uses the running statistics and never writes them, and the Moments that it
            leaves are empty. To freeze scale and bias as well, mask the optimizer with
            `bnjax.training.freeze_mask`.

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
