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

    Each group of `virtual_batch_size` examples is normalized by its own statistics; the
    running statistics are those of the whole batch, and inference is `BatchNorm`'s.
    Variables and views as `BatchNorm`'s.

    Over `axis_name` the running statistics are shared. Groups stay within a replica;
    larger ones than its batch are of adjacent replicas, if these fall into such groups.

    Args:
        num_features: the size of the feature axis.
        virtual_batch_size: how many examples are normalized together.
        remainder: what to do with a batch that is not divisible: "error", or "smaller"
            for a smaller last group.
        rngs: as `BatchNorm`'s.
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
        return _layer.ghost(self.virtual_batch_size, self.remainder)


class BatchRenorm(Normalization, nnx.BatchNorm):
    """Batch renormalization: trains on what it will infer with.

        r = clip(sigma_B / sigma, 1/r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * scale + bias

    mu and sigma are the running statistics from before the update. For small batches
    and for batches that are not iid. Variables, views and inference as `BatchNorm`'s.
    Start with r_max = 1, d_max = 0 (batch normalization) until the running statistics
    are worth something, then relax: `r_max=optax.linear_schedule(1, 3, 35_000, 5_000)`.
    With `warmup_steps` the layer counts its updates, in `steps` (nnx.BatchStat), and no
    step needs to be given: r_max = 1 and d_max = 0 during the warm-up, then as given.
    `bnjax.linen.BatchRenorm` shows a critic with joint batches.

    Args:
        num_features: the size of the feature axis.
        r_max: the largest factor between the standard deviations, >= 1; a number or a
            function of the step.
        d_max: the largest distance between the means, >= 0, in running standard
            deviations; a number or a function of the step.
        warmup_steps: how many updates the running statistics get before they correct
            the batch's. None: no counter, and `step` is given to schedules.
        rngs: as `BatchNorm`'s.
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
        return _layer.renorm(self.r_max, self.d_max, step, steps, self.warmup_steps)

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
            x: (batch, *spatial, feature), real; integers and booleans are promoted.
            use_running_average: as in `BatchNorm.__call__`.
            step: (), integer: the training step, for schedules. None: the layer's own
                counter, which exists only with `warmup_steps`.
            **options: as in `BatchNorm.__call__`.

        Returns:
            An array of the shape of `x`.

        Raises:
            TypeError: `x` is complex, or as for `BatchNorm`.
            ValueError: in training, r_max or d_max is a schedule, and there is neither
                a `step` nor a counter; or as for `BatchNorm`.
        """
        ops = self._layer_ops(step)
        return self._normalize(x, use_running_average, ops, **options)


class SplitBatchNorm(Normalization):
    """Split batch normalization: statistics of its own for each domain of the batch.

        y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d

    Variables as `BatchNorm`'s, but (num_splits, feature). Domain 0 is the main one, by
    which inference normalizes unless the call names another.

    Args:
        num_features: the size of the feature axis.
        num_splits: the number of domains.
        shared_affine: whether all domains share one scale and bias, (feature,).
        rngs: as `BatchNorm`'s.
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
        return _layer.split(self.num_splits, domain)

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
            x: (batch, *spatial, feature); integers and booleans are promoted.
            use_running_average: as in `BatchNorm.__call__`.
            domain: integers: () if all examples belong to one domain, (batch,) for one
                each. None: in training the batch is `num_splits` equal contiguous
                blocks, block d for domain d; in inference all is domain 0.
            **options: as in `BatchNorm.__call__`.

        Returns:
            An array of the shape of `x`.

        Raises:
            TypeError: `domain` is not integer, or as for `BatchNorm`.
            ValueError: `domain` is None and `num_splits` does not divide the batch; a
                `domain` that is known to be out of range; or as for `BatchNorm`.
        """
        ops = self._layer_ops(domain)
        return self._normalize(x, use_running_average, ops, **options)


class DecorrelatedBatchNorm(Normalization):
    """Decorrelated batch normalization: whitening by the covariance of the batch.

        y = activation(W (x - mean) * scale + bias + residual)
        W = (covariance + epsilon I)^(-1/2)

    Within groups of adjacent features. Variables: `scale`, `bias` (nnx.Param), `mean`
    and `cov` (nnx.BatchStat), cov (groups, size, size), which starts as the identity.
    Inference takes the root of the running covariance at each call; `bnjax.whiten` has
    the pure functions, to do it once.

    Args:
        num_features: the size of the feature axis.
        group_size: the features of a group, adjacent, which are whitened together;
            None for one group of all. A batch should hold several times as many
            positions.
        method: "eigh" (exact, ZCA), "newton_schulz" (IterNorm: products alone, stops
            early) or "cholesky" (exact, not ZCA); see `bnjax.whiten.inverse_sqrt`.
        iterations: of "newton_schulz".
        rngs: as `BatchNorm`'s.
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
        return _layer.decorrelated(self.group_size, self.method, self.iterations)
