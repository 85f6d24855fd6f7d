"""The variants of batch normalization, one paper each."""

from typing import Any, Unpack

import jax
from flax import nnx
from jax.typing import ArrayLike

from bnjax import _layer, running
from bnjax.ghost import Remainder
from bnjax.nnx._batch_norm import Normalization, Settings
from bnjax.renorm import Limit


class GhostBatchNorm(Normalization, nnx.BatchNorm):
    """Ghost batch normalization: small batches inside a large one.

        y_i = (x_i - mean_g) / sqrt(var_g + epsilon) * scale + bias,   i in group g

    See `bnjax.linen.GhostBatchNorm`. Variables and views are those of `BatchNorm`.

    Args:
        num_features: the size of the feature axis.
        virtual_batch_size: how many examples are normalized together.
        remainder: "error" or "smaller"; see `bnjax.ghost.ghost_batch_norm`.
        rngs: see `BatchNorm`.
        **settings: the other arguments of `BatchNorm`.

    >>> layer = GhostBatchNorm(6, virtual_batch_size=4, rngs=nnx.Rngs(0))
    >>> print(layer(jax.random.normal(jax.random.key(0), (12, 6))).shape)
    (12, 6)

    References: Hoffer, Hubara & Soudry 2017, section 4.
    """

    def __init__(
        self,
        num_features: int,
        *,
        virtual_batch_size: int,
        remainder: Remainder = "error",
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ):
        self.virtual_batch_size = virtual_batch_size
        self.remainder: Remainder = remainder
        super().__init__(num_features, rngs=rngs, **settings)

    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.ghost_ops(self.virtual_batch_size, self.remainder)


class BatchRenorm(Normalization, nnx.BatchNorm):
    """Batch renormalization: trains with nearly what it evaluates with.

        r = clip(sigma_B / sigma, 1/r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * scale + bias

    See `bnjax.linen.BatchRenorm` for schedules, the warm-up and a critic with joint
    batches. Variables and views are those of `BatchNorm`; with `warmup_steps` also
    `steps` (nnx.BatchStat), which counts the updates.

    Args:
        num_features: the size of the feature axis.
        r_max: a number or a function of the step; see `bnjax.renorm.batch_renorm`.
        d_max: a number or a function of the step; see `bnjax.renorm.batch_renorm`.
        warmup_steps: the updates before corrections begin; None for no counter. With
            numbers and None the layer corrects from the first step; to train from
            scratch set `warmup_steps`, or schedules.
        rngs: see `BatchNorm`.
        **settings: the other arguments of `BatchNorm`.

    >>> layer = BatchRenorm(6, r_max=lambda step: 1 + step / 100, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (5, 6)), step=50)

    References: Ioffe 2017, Algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        warmup_steps: int | None = None,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ):
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        if warmup_steps is not None:
            self.steps = nnx.BatchStat(_layer.no_steps())
        super().__init__(num_features, rngs=rngs, **settings)

    def _layer_ops(self, step: ArrayLike | None = None) -> _layer.LayerOps:
        steps = None if self.warmup_steps is None else self.steps[...]
        return _layer.renorm_ops(self.r_max, self.d_max, step, steps, self.warmup_steps)

    def _update(self, stored: running.State, batch: Any, x: jax.Array) -> None:
        super()._update(stored, batch, x)
        if self.warmup_steps is not None:
            self.steps.set_value(_layer.next_step(self.steps[...]))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        step: ArrayLike | None = None,
        **options: Unpack[_layer.CallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates the running statistics.

        Args:
            x: (batch, *spatial, feature), real.
            use_running_average: as in `BatchNorm.__call__`.
            step: (), integer: the training step; see `bnjax.linen.BatchRenorm`.
            **options: as in `BatchNorm.__call__`.

        Returns:
            An array of the shape of `x`.

        Raises:
            TypeError: as for `bnjax.linen.BatchRenorm`.
            ValueError: as for `bnjax.linen.BatchRenorm`.
        """
        ops = self._layer_ops(step)
        return self._normalize(x, use_running_average, ops, **options)


class SplitBatchNorm(Normalization):
    """Split batch normalization: separate statistics for each domain of the batch.

        y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d

    See `bnjax.linen.SplitBatchNorm`. Variables are those of `BatchNorm`, but
    (num_splits, feature).

    Args:
        num_features: the size of the feature axis.
        num_splits: the number of domains.
        shared_affine: whether all domains share one scale and bias, (feature,).
        rngs: see `BatchNorm`.
        **settings: the other arguments of `BatchNorm`.

    >>> layer = SplitBatchNorm(6, num_splits=2, rngs=nnx.Rngs(0))
    >>> clean = jax.random.normal(jax.random.key(0), (5, 6))
    >>> y = layer(jax.numpy.concatenate([clean, clean + 1]))
    >>> print(layer.mean.shape)
    (2, 6)

    References: Xie et al. 2019, section 3.3 (AdvProp); Wu & Johnson 2021, section 5.2.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_splits: int,
        shared_affine: bool = False,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ):
        self.num_splits = num_splits
        self.shared_affine = shared_affine
        super().__init__(num_features, rngs=rngs, **settings)

    def _layer_ops(self, domain: ArrayLike | None = None) -> _layer.LayerOps:
        return _layer.split_ops(self.num_splits, domain)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: ArrayLike | None = None,
        **options: Unpack[_layer.CallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates the running statistics.

        Args:
            x: (batch, *spatial, feature).
            use_running_average: as in `BatchNorm.__call__`.
            domain: integers, () or (batch,), or None; see `bnjax.linen.SplitBatchNorm`.
            **options: as in `BatchNorm.__call__`.

        Returns:
            An array of the shape of `x`.

        Raises:
            TypeError: as for `bnjax.linen.SplitBatchNorm`.
            ValueError: as for `bnjax.linen.SplitBatchNorm`.
        """
        ops = self._layer_ops(domain)
        return self._normalize(x, use_running_average, ops, **options)


class DecorrelatedBatchNorm(Normalization):
    """Decorrelated batch normalization: whitening by the covariance of the batch.

        y = activation(W (x - mean) * scale + bias + residual)
        W = (covariance + epsilon I)^(-1/2)

    See `bnjax.linen.DecorrelatedBatchNorm`. Variables: `scale` and `bias` (nnx.Param),
    `mean` and `cov` (nnx.BatchStat), where cov is (groups, size, size).

    Args:
        num_features: the size of the feature axis.
        group_size: how many features are whitened together; None for all. See
            `bnjax.whiten.decorrelate`.
        method: "eigh", "newton_schulz" (IterNorm) or "cholesky"; see
            `bnjax.whiten.inverse_sqrt`.
        iterations: of "newton_schulz".
        rngs: see `BatchNorm`.
        **settings: the other arguments of `BatchNorm`.

    >>> layer = DecorrelatedBatchNorm(6, group_size=3, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (20, 6)))
    >>> print(layer.cov.shape)
    (2, 3, 3)

    References: Huang et al. 2018 (decorrelated batch normalization); Huang et al. 2019
    (IterNorm).
    """

    def __init__(
        self,
        num_features: int,
        *,
        group_size: int | None = None,
        method: str = "eigh",
        iterations: int = 5,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ):
        self.group_size = group_size
        self.method = method
        self.iterations = iterations
        super().__init__(num_features, rngs=rngs, **settings)

    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.decorrelated_ops(self.group_size, self.method, self.iterations)
