"""What every NNX layer has: its variables, its views, and one call."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from bnjax import _checks, _dtypes, _layer, running


@nnx.register_variable_name("batch_moments", overwrite=True)
class BatchMoments(nnx.Variable):
    """The Moments of what a layer has been given since it began to record them.

    Its value is a `bnjax.Moments`. It lies beside the layer's `mean` and `var`, as
    `moments`, while the layer's `record_moments` is true. Linen's collection of the
    same meaning is `batch_moments`.

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
    """The layers' common part; what differs between them is in `LayerOps`.

    Those with the variables of Flax's BatchNorm, which infer as it does, are subclasses
    of both, for public code asks for that class. This comes first: its methods are
    theirs.
    """

    mean: nnx.BatchStat[jax.Array]

    def _layer_ops(self) -> _layer.LayerOps:
        raise NotImplementedError

    def _declare(
        self,
        num_features: int,
        rngs: nnx.Rngs,
        *,
        shared_affine: bool = False,
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
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        unbiased: bool = False,
        update_stats: bool | None = None,
        skip_nonfinite_updates: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        frozen: bool = False,
    ) -> None:
        """Sets variables and arguments; what `_layer_ops` reads is set before."""
        ops = self._layer_ops()
        shape = (*ops.leading, num_features)
        start = ops.begin(shape, _statistics_dtype(dtype, param_dtype))
        for name, value in start.items():
            setattr(self, name, nnx.BatchStat(value))
        self.statistics = tuple(start)  # their names
        of_affine = (num_features,) if shared_affine else shape

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
            x: (batch, *spatial, feature), of the sizes and dtypes that the function of
                the layer's name takes; or integers or booleans, which are promoted.
            use_running_average: takes precedence over the attribute.
            mask: boolean, broadcastable to `x`; True = takes part in the statistics.
            weights: real floats >= 0, broadcastable to `x`: how often each value counts
                in the statistics; see `bnjax.batch_norm`.
            residual: of the shape of `x`; added before the activation.
            update_stats: takes precedence over the attribute.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: `use_running_average` given nowhere, and whatever that function
                raises.
        """
        return self._normalize(
            x,
            self._layer_ops(),
            use_running_average=use_running_average,
            mask=mask,
            weights=weights,
            residual=residual,
            update_stats=update_stats,
        )

    def _normalize(
        self,
        x: ArrayLike,
        ops: _layer.LayerOps,
        *,
        use_running_average: bool | None,
        mask: ArrayLike | None,
        weights: ArrayLike | None,
        residual: ArrayLike | None,
        update_stats: bool | None,
    ) -> jax.Array:
        """Normalizes `x` and writes what is to be written: see `__call__`."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        use_running = self.frozen or _checks.chosen(use_running_average)
        _checks.weight("momentum", self.momentum)
        update = self.update_stats if update_stats is None else update_stats
        update = not use_running if update is None else update and not self.frozen
        record = self.record_moments and not self.frozen
        given = jnp.asarray(x)
        x = _layer.inexact(given)
        variables = [getattr(self, name) for name in self.statistics]
        stored = running.State._make(variable[...] for variable in variables)
        if update and jnp.iscomplexobj(x) and not jnp.iscomplexobj(stored.mean):
            raise TypeError(
                _REAL_MEAN.format(
                    dtype=x.dtype, mean=stored.mean.dtype, layer=type(self).__name__
                )
            )
        reduction = {
            "mask": mask,
            "weights": weights,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
        }
        y, batch = _layer.forward(
            x,
            stored,
            {**self._affine(given, stored), "residual": residual},
            reduction,
            ops,
            use_running=use_running,
            measure=bool(update or record),
        )
        if batch is None:
            return y
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
            empty = ops.empty(own, _dtypes.statistics(self.mean.dtype))
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
          use_running_average: whether to normalize by the running statistics.
          update_stats: whether the running statistics are written.
          record_moments: whether calls leave the Moments of their input in `moments`,
            which then starts empty.
          frozen: whether to evaluate whatever the call says, and write nothing.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats
        if record_moments is not None:
            self.record_moments = record_moments
        if frozen is not None:
            self.frozen = frozen

    def _affine(self, x: jax.Array, stored: running.State) -> dict[str, Any]:
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
        """Writes the running statistics after one batch; they keep their dtypes."""
        new = _layer.updated(
            stored,
            batch,
            momentum=self.momentum,
            unbiased=self.unbiased,
            skip_nonfinite=self.skip_nonfinite_updates,
            batch_dtype=_dtypes.statistics(x.dtype),
            keep_dtype=True,
        )
        for name, value in zip(self.statistics, new, strict=True):
            getattr(self, name).set_value(value)


def _statistics_dtype(*declared: DTypeLike | None) -> DTypeLike:
    """Of the running mean; a loop over training steps needs one that stays."""
    given = (dtype for dtype in declared if dtype is not None)
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in given)
    return jnp.complex64 if is_complex else jnp.float32
