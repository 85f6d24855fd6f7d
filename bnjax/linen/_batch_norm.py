"""Batch normalization with the name, fields and variables of `flax.linen.BatchNorm`.

`Normalization` has what all layers share: the fields, the variables and the call.
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

Shape = tuple[int, ...]


def asks_for(collection: str, scope: flax.core.Scope | None) -> bool:
    """Whether the caller has named the collection as mutable.

    Summaries and careless callers pass `mutable=True` or a DenyList. They would get a
    collection that Flax does not have, and more work in evaluation.
    """
    if scope is None or isinstance(scope.mutable, (bool, flax.core.DenyList)):
        return False
    return scope.is_mutable_collection(collection)


class Normalization(nn.Module):
    """The common part of the layers, which differ in their `LayerOps`.

    Layers with Flax's variables and evaluation also inherit from
    `flax.linen.BatchNorm`, because user code tests for it with `isinstance`.
    `Normalization` comes first, so that its `__call__` is used.

    Helper methods are `nn.nowrap`: Flax would name scopes after them, and list their
    calls in summaries.
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

    # Without annotations, so that these are no fields.
    force_float32_reductions = True  # a field of Flax's subclasses alone
    shared_affine = False
    needs_running_stats_in_training = False
    moments_collection = "batch_moments"

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
            x: (batch, *spatial, feature). Integers and booleans are promoted.
            use_running_average: see the attribute. Exactly one of the two is given;
                with `frozen=True` none is needed.
            mask: boolean, broadcastable to `x`; False leaves a value out of the
                statistics.
            weights: real floats >= 0, broadcastable to `x`: how often each value counts
                in the statistics; see `bnjax.batch_norm`.
            residual: of the shape of `x`; added before the activation.
            update_stats: takes precedence over the attribute.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: `use_running_average` given twice or not at all, and whatever
                the pure function of the layer raises, such as `bnjax.batch_norm`.
            flax.errors.ModifyScopeVariableError: the running statistics are to be
                written, but `batch_stats` is not mutable.
        """
        return self._normalize(
            x,
            use_running_average,
            self._layer_ops(),
            mask=mask,
            weights=weights,
            residual=residual,
            update_stats=update_stats,
        )

    @nn.nowrap
    def _normalize(
        self,
        x: ArrayLike,
        use_running_average: bool | None,
        ops: _layer.LayerOps,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """`__call__` by the given `ops`, which may depend on its `step` or `domain`."""
        use_running = self.frozen or nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        _checks.decay_rate("momentum", self.momentum)
        given = jnp.asarray(x)
        x = _layer.to_inexact(given)
        features = _axes.sizes(x.shape, _axes.canonical(self.axis, x.ndim))
        shape = ops.leading + features
        if update_stats is None:
            update_stats = self.update_stats
        update = not use_running if update_stats is None else update_stats
        update = update and not self.frozen
        needed = use_running or update or self.needs_running_stats_in_training
        variables, stored = self._running_statistics(ops, shape, x, bool(needed))
        normalize_options = {
            **self._normalize_options(
                given, x, features if self.shared_affine else shape
            ),
            "residual": residual,
        }
        moments_options: dict[str, Any] = {"mask": mask, "weights": weights}
        if self.is_initializing():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", _checks.BatchNormWarning)
                if use_running:
                    return ops.infer(x, *stored, **normalize_options)
                return ops.init_forward(x, **moments_options, **normalize_options)[0]

        moments_options["axis_name"] = self.axis_name
        moments_options["axis_index_groups"] = self.axis_index_groups
        collects = asks_for(self.moments_collection, self.scope)
        if use_running:
            measure = bool(update or (collects and not self.frozen))
            y, batch = _layer.infer_and_measure(
                x, stored, ops, moments_options, normalize_options, measure=measure
            )
        else:
            y, batch = ops.train(
                x, fallback=stored, **moments_options, **normalize_options
            )
        if update:
            self._update(variables, stored, batch, x)
        if collects:  # empty if frozen: nothing updates the statistics by them
            place = self.moments_collection, "moments"
            collected = self.variable(*place, ops.empty, shape)
            if not self.frozen:
                collected.value = ops.merge(collected.value, batch)
        return y

    @nn.nowrap
    def _running_statistics(
        self, ops: _layer.LayerOps, shape: Shape, x: jax.Array, needed: bool
    ) -> tuple[list[nn.Variable], running.State]:
        """The variables of the running statistics (mean and var, or cov); their values.

        They may be missing if a call neither uses nor writes them. Features without a
        valid value then fall back on the initial values. The mean of complex inputs is
        complex from the start, because a loop over training steps and a checkpoint need
        one type.
        """
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        dtype = _dtypes.real(dtype)
        if jnp.iscomplexobj(x):
            dtype = _dtypes.promote(dtype, x.dtype)
        initial = ops.init_stats(shape, dtype)
        exist = any(self.has_variable("batch_stats", name) for name in initial)
        if not (needed or exist or self.is_initializing()):
            return [], running.State(*initial.values())
        variables = []
        for name, value in initial.items():
            variable = self.variable("batch_stats", name, lambda value=value: value)
            path = f"batch_stats/{name}"
            _checks.feature_shape(path, variable.value, value.shape, self.axis)
            variables.append(variable)
        return variables, running.State._make(v.value for v in variables)

    @nn.nowrap
    def _normalize_options(
        self, given: jax.Array, x: jax.Array, shape: Shape
    ) -> dict[str, Any]:
        """Declares the parameters; returns what `normalize` and `batch_norm` share.

        Args:
            given: the input.
            x: the input after promotion.
            shape: of the parameters.
        """
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "activation": self.activation,
        }
        if self.use_scale:
            options["scale"] = self.param(
                "scale", self.scale_init, shape, self.param_dtype
            )
        if self.use_bias:
            options["bias"] = self.param(
                "bias", self.bias_init, shape, self.param_dtype
            )
        if self.dtype is None and x.dtype != given.dtype:
            parameters = options.get("scale"), options.get("bias")
            options["dtype"] = _dtypes.result(given, *parameters)
        return options

    @nn.nowrap
    def _update(
        self,
        variables: list[nn.Variable],
        stored: running.State,
        batch: Any,
        x: jax.Array,
    ) -> None:
        """Writes the running statistics after one batch, in Flax's dtypes."""
        new = _layer.update_running_stats(
            stored,
            batch,
            momentum=self.momentum,
            unbiased=self.unbiased,
            skip_nonfinite=self.skip_nonfinite_updates,
            batch_dtype=_dtypes.statistics_dtype(
                x.dtype if self.dtype is None else self.dtype
            ),
            keep_dtype=not self.force_float32_reductions,
        )
        for variable, value in zip(variables, new):
            variable.value = value


class BatchNorm(Normalization, nn.BatchNorm):
    """Batch normalization, a drop-in replacement of `flax.linen.BatchNorm`.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Variables: `params/{scale,bias}`, `batch_stats/{mean,var}` (float32). Two switches
    are independent: where the statistics come from (`use_running_average`), and whether
    the running statistics are written (`update_stats`).

    If `mutable` is a list with "batch_moments", the layer also stores the Moments of
    its input, as `batch_moments/moments` (`mutable=True` is not enough). Two calls in
    one step are merged. Do not pass `batch_moments` into the next step, or it is merged
    too.

    The class is a subclass of `flax.linen.BatchNorm`, for code that tests for it with
    `isinstance`, but uses none of its methods. So are GhostBatchNorm and BatchRenorm,
    whose variables and evaluation are the same.

    Attributes:
        use_running_average: whether to normalize with the running statistics; here or
            in the call, not both.
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
        update_stats: None: update when the batch's statistics are used, as Flax does.
            False: never update; `mutable` is then not needed. (With
            use_running_average=False the layer also needs no `batch_stats`; PyTorch's
            track_running_stats=False.) True: always update, also when the layer
            normalizes with the running statistics, which are then the old ones.
        skip_nonfinite_updates: whether a batch whose moments hold a NaN or an infinity
            leaves the running statistics as they were.
        activation: an elementwise function; its input is not stored for the backward
            pass.
        frozen: if True, the layer evaluates, whatever the call says: it uses the
            running statistics and never writes them, and the Moments that it stores
            are empty. To freeze scale and bias as well, mask the optimizer with
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
