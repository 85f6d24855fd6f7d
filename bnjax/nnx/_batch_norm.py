"""Batch normalization with the name, arguments and views of `flax.nnx.BatchNorm`."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.nn import initializers
from jax.typing import DTypeLike

from bnjax import _layer
from bnjax.nnx._normalization import Normalization


class BatchNorm(Normalization, nnx.BatchNorm):
    """Batch normalization, a drop-in replacement of `flax.nnx.BatchNorm`.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)

    Variables: `scale` and `bias` (nnx.Param), `mean` and `var` (nnx.BatchStat, float32;
    the mean is complex64 where `dtype` or `param_dtype` is complex, which is how a
    layer is declared for complex inputs). Two switches are independent: where the
    statistics come from (`use_running_average`; `train()` and `eval()` set it), and
    whether the running statistics are written (`update_stats`). Where `record_moments`
    is true, each call merges the Moments of its input into `moments`, a BatchMoments
    variable that starts empty whenever `record_moments=True` is set: by
    `nnx.view(model, record_moments=True)` in the view alone, by `model.set_attributes(
    record_moments=True)` in the model. False removes it, and so does `nnx.pop`.

    An instance is one of `flax.nnx.BatchNorm`, for code that looks for those; nothing
    that it does is inherited. So are GhostBatchNorm and BatchRenorm, which have its
    variables and infer as it does.

    One difference to Flax is meant. Flax casts the input and all variables to `dtype`
    before it computes, which in evaluation leaves of (x - mean) / sqrt(var + epsilon)
    what bfloat16 can tell apart, often 0. Here the statistics stay float32, in
    evaluation too, the arithmetic is in at least float32, and `dtype` is that of the
    result. What is written to variables has no gradient, as in Flax.

    Args:
        num_features: the size of the feature axis.
        use_running_average: whether to normalize by the running statistics. The call
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
        promote_dtype: (x, mean, var, scale, bias) -> the same, promoted. Asked for
            dtypes only: where `dtype` is None, the result has the dtype of the promoted
            x, scale and bias. Flax's default includes the float32 statistics.
        rngs: one key of `rngs.params` is drawn for the scale, then one for the bias.
        bias_metadata: of the variable `bias`.
        scale_metadata: of the variable `scale`.
        unbiased: whether the running variance divides by n - 1, as PyTorch's does. The
            batch is always normalized by the biased variance.
        update_stats: whether the running statistics are written. None: as Flax, when
            batch statistics are used. False: never. True: always, also when normalizing
            by the running statistics (those from before the update).
        skip_nonfinite_updates: whether a batch whose moments hold a NaN or an infinity
            leaves the running statistics as they were.
        activation: an elementwise function; its input is not stored for the backward
            pass.
        frozen: whether the layer evaluates whatever the call or `train()` says: the
            running statistics are used, and never written, and `moments` stay empty.
            See `bnjax.nnx.freeze`. Scale and bias stay as they are by a mask,
            `bnjax.training.freeze_mask`.

    >>> layer = BatchNorm(6, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (5, 6)))
    >>> print(sorted(nnx.state(layer, nnx.BatchStat)))
    ['mean', 'var']

    References: Ioffe & Szegedy 2015.
    """

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
        self._declare(
            num_features,
            rngs,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            unbiased=unbiased,
            update_stats=update_stats,
            skip_nonfinite_updates=skip_nonfinite_updates,
            activation=activation,
            frozen=frozen,
        )

    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.LayerOps()
