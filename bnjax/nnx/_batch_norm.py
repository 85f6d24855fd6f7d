"""Batch normalization with the name, arguments and views of `flax.nnx.BatchNorm`.

`Normalization` has what all layers share: the variables, the views and the call.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from bnjax import _checks, _dtypes, _layer, _trees, running


@nnx.register_variable_name("batch_moments", overwrite=True)
class BatchMoments(nnx.Variable):
    """The Moments of a layer's inputs since it began to record them.

    Its value is a `bnjax.Moments`. A layer has it as `moments`, beside `mean` and
    `var`, while its `record_moments` is true. In Linen it is the collection
    `batch_moments`.

    >>> import bnjax
    >>> layer = bnjax.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    >>> recording = nnx.view(layer, record_moments=True)
    >>> y = recording(jax.random.normal(jax.random.key(0), (5, 6)))
    >>> moments = nnx.pop(recording, BatchMoments)["moments"].get_value()
    >>> print(moments.count)
    5.0
    """


_REAL_MEAN = (
    "x has dtype {dtype}, but the running mean of this layer has dtype {mean}, and "
    "would lose the imaginary part: expected a layer that is declared for complex "
    "inputs. Write {layer}(..., dtype=jnp.complex64); or param_dtype=jnp.complex64, "
    "for a complex scale and bias as well."
)

_FLAXS = (
    "{path} is a flax.nnx.BatchNorm, which has no setting that train() leaves alone: "
    "expected layers of bnjax.nnx. Build the model with bnjax.nnx.BatchNorm, which "
    "loads the same state, or name the others by other patterns."
)


class Settings(TypedDict, total=False):
    """The arguments that every variant shares with `BatchNorm`."""

    use_running_average: bool | None
    axis: int
    momentum: float
    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    use_bias: bool
    use_scale: bool
    bias_init: Callable[..., Any]
    scale_init: Callable[..., Any]
    axis_name: str | Sequence[str] | None
    axis_index_groups: Any
    use_fast_variance: bool
    promote_dtype: Callable[..., Any]
    bias_metadata: Mapping[str, Any]
    scale_metadata: Mapping[str, Any]
    unbiased: bool
    update_stats: bool | None
    skip_nonfinite_updates: bool
    activation: Callable[[jax.Array], jax.Array] | None
    frozen: bool


class Normalization(nnx.Module):
    """The common part of the layers, which differ in their `LayerOps`.

    Layers with Flax's variables and evaluation also inherit from `flax.nnx.BatchNorm`,
    because user code tests for it with `isinstance`. `Normalization` comes first, so
    that its methods are used.
    """

    mean: nnx.BatchStat[jax.Array]
    shared_affine = False

    def _layer_ops(self) -> _layer.LayerOps:
        raise NotImplementedError

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = initializers.zeros,
        scale_init: Callable[..., Any] = initializers.ones,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        unbiased: bool = False,
        update_stats: bool | None = None,
        skip_nonfinite_updates: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        frozen: bool = False,
    ):
        # A subclass sets what its `_layer_ops` reads before it calls this.
        ops = self._layer_ops()
        shape = (*ops.leading, num_features)
        initial = ops.init_stats(shape, _statistics_dtype(dtype, param_dtype))
        for name, value in initial.items():
            setattr(self, name, nnx.BatchStat(value))
        self.statistics = tuple(initial)  # their names
        of_affine = (num_features,) if self.shared_affine else shape

        def parameter(wanted, init, metadata):
            if not wanted:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), of_affine, param_dtype), **metadata)

        self.scale = parameter(use_scale, scale_init, scale_metadata)
        self.bias = parameter(use_bias, bias_init, bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.unbiased = unbiased
        self.update_stats = update_stats
        self.skip_nonfinite_updates = skip_nonfinite_updates
        self.activation = activation
        self.frozen = frozen
        self.record_moments = False

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
            use_running_average: takes precedence over the attribute.
            mask: boolean, broadcastable to `x`; False leaves a value out of the
                statistics.
            weights: real floats >= 0, broadcastable to `x`: how often each value counts
                in the statistics; see `bnjax.batch_norm`.
            residual: of the shape of `x`; added before the activation.
            update_stats: takes precedence over the attribute.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: `use_running_average` given nowhere, and whatever the pure
                function of the layer raises, such as `bnjax.batch_norm`.
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
        if use_running_average is None:
            use_running_average = self.use_running_average
        use_running = self.frozen or _checks.chosen(use_running_average)
        _checks.decay_rate("momentum", self.momentum)
        if update_stats is None:
            update_stats = self.update_stats
        update = not use_running if update_stats is None else update_stats
        update = update and not self.frozen
        record = self.record_moments and not self.frozen
        given = jnp.asarray(x)
        x = _layer.to_inexact(given)
        variables = [getattr(self, name) for name in self.statistics]
        stored = running.State._make(variable[...] for variable in variables)
        if update and jnp.iscomplexobj(x) and not jnp.iscomplexobj(stored.mean):
            raise TypeError(
                _REAL_MEAN.format(
                    dtype=x.dtype, mean=stored.mean.dtype, layer=type(self).__name__
                )
            )
        normalize_options = {
            **self._normalize_options(given, stored),
            "residual": residual,
        }
        moments_options = {
            "mask": mask,
            "weights": weights,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
        }
        if use_running:
            measure = bool(update or record)
            y, batch = _layer.infer_and_measure(
                x, stored, ops, moments_options, normalize_options, measure=measure
            )
        else:
            y, batch = ops.train(
                x, fallback=stored, **moments_options, **normalize_options
            )
        batch = jax.lax.stop_gradient(batch)
        if update:
            self._update(stored, batch, x)
        if record:
            self.moments.set_value(ops.merge(self.moments.get_value(), batch))
        return y

    @property
    def record_moments(self) -> bool:
        """Whether calls leave their Moments in `moments`; setting True empties it."""
        return hasattr(self, "moments")

    @record_moments.setter
    def record_moments(self, on: bool) -> None:
        if self.record_moments:
            del self.moments
        if on:
            ops = self._layer_ops()
            own = (*ops.leading, self.num_features)
            stacked = self.mean.shape[: self.mean.ndim - len(own)]
            empty = ops.empty(own, _dtypes.statistics_dtype(self.mean.dtype))
            self.moments = BatchMoments(
                jax.tree.map(lambda v: jnp.broadcast_to(v, (*stacked, *v.shape)), empty)
            )

    # `nnx.view_info` reads this docstring, and expects Flax's indentation.
    def set_view(
        self,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
        record_moments: bool | None = None,
        frozen: bool | None = None,
    ) -> None:
        """Sets what is not None; `nnx.view` calls it on its copies of the layers.

        Args:
          use_running_average: whether to normalize with the running statistics.
          update_stats: whether the running statistics are written.
          record_moments: whether calls leave the Moments of their input in `moments`,
            which then starts empty.
          frozen: whether to use the running statistics, whatever the call says, and
            write nothing.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats
        if record_moments is not None:
            self.record_moments = record_moments
        if frozen is not None:
            self.frozen = frozen

    def _normalize_options(self, x: jax.Array, stored: running.State) -> dict[str, Any]:
        """The arguments that `normalize` and `batch_norm` share."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype
        if dtype is None:
            values = (x, *stored, scale, bias)
            x, _, _, *parameters = self.promote_dtype(values, dtype=None)
            dtype = _dtypes.result(x, *parameters)
        return {
            "scale": scale,
            "bias": bias,
            "axis": self.axis,
            "epsilon": self.epsilon,
            "dtype": dtype,
            "activation": self.activation,
        }

    def _update(self, stored: running.State, batch: Any, x: jax.Array) -> None:
        """Writes the running statistics after one batch, in the dtypes they have."""
        new = _layer.update_running_stats(
            stored,
            batch,
            momentum=self.momentum,
            unbiased=self.unbiased,
            skip_nonfinite=self.skip_nonfinite_updates,
            batch_dtype=_dtypes.statistics_dtype(x.dtype),
            keep_dtype=True,
        )
        for name, value in zip(self.statistics, new, strict=True):
            getattr(self, name).set_value(value)


def _statistics_dtype(*declared: DTypeLike | None) -> DTypeLike:
    """The dtype of the running mean; it stays, for loops over training steps."""
    given = (dtype for dtype in declared if dtype is not None)
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in given)
    return jnp.complex64 if is_complex else jnp.float32


class BatchNorm(Normalization, nnx.BatchNorm):
    """Batch normalization, a drop-in replacement of `flax.nnx.BatchNorm`.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Variables: `scale` and `bias` (nnx.Param), `mean` and `var` (nnx.BatchStat, float32;
    the mean is complex64 where `dtype` or `param_dtype` is complex, which is how a
    layer is declared for complex inputs). Two switches are independent: where the
    statistics come from (`use_running_average`; `train()` and `eval()` set it), and
    whether the running statistics are written (`update_stats`).

    If `record_moments` is True, the layer also has a variable `moments`, a
    BatchMoments. Each call merges the Moments of its input into it. Setting
    `record_moments=True` empties it; setting False removes it, and so does `nnx.pop`.
    `nnx.view(model, record_moments=True)` sets it in the view alone,
    `model.set_attributes(record_moments=True)` in the model.

    The class is a subclass of `flax.nnx.BatchNorm`, for code that tests for it with
    `isinstance`, but uses none of its methods. So are GhostBatchNorm and BatchRenorm,
    whose variables and evaluation are the same.

    One difference to Flax is intended. Flax casts the input and all variables to
    `dtype` before it computes. In evaluation, (x - mean) / sqrt(var + epsilon) is then
    often 0 in bfloat16, which cannot tell x from the mean. Here the statistics stay
    float32, in evaluation too, the arithmetic is in at least float32, and only the
    result has the dtype `dtype`. Values that are written to variables have no gradient,
    as in Flax.

    Args:
        num_features: the size of the feature axis.
        use_running_average: whether to normalize with the running statistics. The call
            takes precedence; None leaves it to the call.
        axis: the feature axis; all others are reduced.
        momentum: the weight of the old running value (PyTorch's is one minus this).
        epsilon: added to the variance.
        dtype: of the output; None for what `promote_dtype` makes of x, scale and bias.
            A complex one declares the layer for complex inputs.
        param_dtype: of the parameters. A complex one declares the layer for complex
            inputs.
        use_bias: whether to add a bias (beta).
        use_scale: whether to multiply by a scale (gamma).
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to share statistics
            over. Not needed under jit.
        axis_index_groups: a partition of that axis; groups may differ in size.
        use_fast_variance: accepted and without effect: one pass is as accurate as two.
        promote_dtype: (x, mean, var, scale, bias) -> the same, promoted. Only their
            dtypes are used: if `dtype` is None, the result has the dtype of the
            promoted x, scale and bias. Flax's default includes the float32 statistics.
        rngs: one key of `rngs.params` is drawn for the scale, then one for the bias.
        bias_metadata: metadata of the variable `bias`.
        scale_metadata: metadata of the variable `scale`.
        unbiased: whether the running variance divides by n - 1, as PyTorch's does. The
            batch is always normalized by the biased variance.
        update_stats: None: update when the batch's statistics are used, as Flax does.
            False: never update. True: always update, also when the layer normalizes
            with the running statistics, which are then the old ones.
        skip_nonfinite_updates: whether a batch whose moments hold a NaN or an infinity
            leaves the running statistics as they were.
        activation: an elementwise function; its input is not stored for the backward
            pass.
        frozen: if True, the layer evaluates, whatever the call and `train()` say: it
            uses the running statistics and never writes them, and `moments` stay
            empty. See `bnjax.nnx.freeze`. To freeze scale and bias as
            well, mask the optimizer with `bnjax.training.freeze_mask`.

    >>> layer = BatchNorm(6, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (5, 6)))
    >>> print(sorted(nnx.state(layer, nnx.BatchStat)))
    ['mean', 'var']

    References: Ioffe & Szegedy 2015.
    """

    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.LayerOps()


def freeze(model: nnx.Module, *patterns: str, frozen: bool = True) -> tuple[str, ...]:
    """Freezes the normalization layers of a part of a model.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean, var constant

    Sets `frozen` of these layers, in place. They use their running statistics and never
    write them, whatever `model.train()`, the call, or
    `set_attributes(use_running_average=False)` say. Scale and bias are still
    parameters; `bnjax.training.freeze_mask` makes a mask for the optimizer, so that it
    does not change them. To freeze only a view of the model, write
    `nnx.view(model, frozen=True)`.

    Args:
        model: a model with layers of `bnjax.nnx`, or such a layer.
        *patterns: shell patterns for paths of layers such as "encoder/norm_1"; *
            matches any characters, also /: "encoder/*". None for all layers.
        frozen: False to undo it.

    Returns:
        The paths of the layers that were set.

    Raises:
        TypeError: a pattern that matches a `flax.nnx.BatchNorm`.
        ValueError: a pattern that matches no layer.

    >>> layers = [BatchNorm(3, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(*layers)
    >>> print(freeze(model, "layers/0"))
    ('layers/0',)
    >>> model.train()
    >>> print(model.layers[0].frozen, model.layers[1].frozen)
    True False

    References: Wu & Johnson 2021, section 4 (FrozenBN).
    """
    found: dict[str, Any] = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (Normalization, nnx.BatchNorm))
    }
    chosen = sorted(_trees.matching(patterns or ("*",), {*found}, "pattern"))
    for path in chosen:
        if not isinstance(found[path], Normalization):
            raise TypeError(_FLAXS.format(path=path or "the model"))
    for path in chosen:
        found[path].frozen = frozen
    return tuple(chosen)
