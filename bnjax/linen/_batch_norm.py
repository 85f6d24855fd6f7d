"""Batch normalization with the name, fields and variables of `flax.linen.BatchNorm`."""

import flax.linen as nn

from bnjax import _layer
from bnjax.linen._normalization import Normalization


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
