"""The variants of batch normalization, one paper each."""

import dataclasses
from typing import Any, Unpack

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from bnjax import _layer, running
from bnjax.ghost import Remainder
from bnjax.linen._batch_norm import Normalization
from bnjax.renorm import Limit


class GhostBatchNorm(Normalization, nn.BatchNorm):
    """Ghost batch normalization: small batches inside a large one.

        y_i = (x_i - mean_g) / sqrt(var_g + epsilon) * scale + bias,   i in group g

    The layer of `bnjax.ghost.ghost_batch_norm`, which says how groups of examples lie
    over replicas. The running statistics are those of the whole batch. Variables and
    evaluation are those of `BatchNorm`. `init` takes a batch of any size.

    Attributes:
        virtual_batch_size: how many examples are normalized together.
        remainder: what to do with a batch that is not divisible: "error", or "smaller"
            for a smaller last group.

    All others are those of `BatchNorm`.

    >>> layer = GhostBatchNorm(virtual_batch_size=4, use_running_average=False)
    >>> x = jax.random.normal(jax.random.key(0), (12, 6))
    >>> variables = layer.init(jax.random.key(1), x[:1])
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    References: Hoffer, Hubara & Soudry 2017, section 4.
    """

    virtual_batch_size: int = dataclasses.field(kw_only=True)
    remainder: Remainder = "error"

    @nn.nowrap
    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.ghost_ops(self.virtual_batch_size, self.remainder)


class BatchRenorm(Normalization, nn.BatchNorm):
    """Batch renormalization: trains with nearly what it evaluates with.

        r = clip(sigma_B / sigma, 1/r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * scale + bias

    The layer of `bnjax.renorm.batch_renorm`, for small batches and for batches that are
    not iid. mu and sigma are the running statistics before the update. Variables and
    evaluation are those of `BatchNorm`. Start with r_max = 1, d_max = 0 (batch
    normalization) until the running statistics have settled, then relax both. A plain
    d_max=5.0 beside a schedule of r_max corrects from the first step:

        BatchRenorm(
            r_max=optax.linear_schedule(1, 3, 35_000, 5_000),
            d_max=optax.linear_schedule(0, 5, 20_000, 5_000),
        )

    With `warmup_steps` the layer counts its updates in `batch_stats/steps`, and needs
    no `step`: r_max = 1 and d_max = 0 during the warm-up, then the given values.
    Checkpoints of the BatchRenorm layer in SBX (a JAX library for RL) and in CrossQ
    (mean, var, steps, r_max, d_max) load without conversion into
    `BatchRenorm(warmup_steps=100_000, epsilon=1e-3)`. Their r_max and d_max, always 3
    and 5, are not read. Their layer adds epsilon after the correction, so that outputs
    can differ by up to a third where a variance is near epsilon.

    Attributes:
        r_max: see `bnjax.renorm.batch_renorm`; a number or a function of the step.
        d_max: see `bnjax.renorm.batch_renorm`; a number or a function of the step.
        warmup_steps: how many updates the running statistics get before they correct
            the batch's. None: no counter, and schedules need the `step` of the call.
            With numbers and None the layer corrects from the first step; to train from
            scratch set `warmup_steps`, or schedules.

    All others are those of `BatchNorm`.

    A critic that sees the batches of (s, a) and (s', a') as one, so that both are
    normalized alike (CrossQ, Bhatt et al. 2024):

    >>> import jax.numpy as jnp
    >>> class Critic(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, observation, action, train):
    ...         x = jnp.concatenate([observation, action], -1)
    ...         for features in (64, 64):
    ...             x = nn.Dense(features, use_bias=False)(x)
    ...             x = BatchRenorm(
    ...                 not train, warmup_steps=100_000, activation=nn.relu
    ...             )(x)
    ...         return nn.Dense(1)(x)[..., 0]
    >>> observations, actions = jnp.zeros((2, 5, 3)), jnp.zeros((2, 5, 1))  # now, next
    >>> both = observations.reshape(10, 3), actions.reshape(10, 1)
    >>> critic = Critic()
    >>> variables = critic.init(jax.random.key(0), *both, train=True)
    >>> q, updates = critic.apply(variables, *both, train=True, mutable=["batch_stats"])
    >>> q_now, q_next = jnp.split(q, 2)

    References: Ioffe 2017, Algorithm 1.
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0
    warmup_steps: int | None = None

    needs_running_stats_in_training = True

    @nn.compact
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
        steps = None if self.warmup_steps is None else self._steps()
        if steps is not None and self.is_initializing():
            self.put_variable("batch_stats", "steps", steps)
        ops = _layer.renorm_ops(self.r_max, self.d_max, step, steps, self.warmup_steps)
        return self._normalize(x, use_running_average, ops, **options)

    @nn.nowrap
    def _steps(self) -> jax.Array:
        return self.get_variable("batch_stats", "steps", _layer.no_steps())

    @nn.nowrap
    def _update(
        self,
        variables: list[nn.Variable],
        stored: running.State,
        batch: Any,
        x: jax.Array,
    ) -> None:
        super()._update(variables, stored, batch, x)
        if self.warmup_steps is not None:
            self.put_variable("batch_stats", "steps", _layer.next_step(self._steps()))


class SplitBatchNorm(Normalization):
    """Split batch normalization: separate statistics for each domain of the batch.

        y_i = (x_i - mean_d) / sqrt(var_d + epsilon) * scale_d + bias_d

    The layer of `bnjax.split.split_batch_norm`. Variables: `params/{scale,bias}` and
    `batch_stats/{mean,var}`, each (num_splits, feature). Domain 0 is the main one:
    evaluation normalizes with its statistics, unless the call names another.

    Attributes:
        num_splits: the number of domains.
        shared_affine: whether all domains share one scale and bias, (feature,).

    All others are those of `BatchNorm`. Initializers get the shape of the parameters,
    with the axis of the domains.

    >>> import jax.numpy as jnp
    >>> layer = SplitBatchNorm(num_splits=2, use_running_average=False)
    >>> x = jax.random.normal(jax.random.key(0), (10, 6))
    >>> variables = layer.init(jax.random.key(1), x)
    >>> print(variables["batch_stats"]["mean"].shape)
    (2, 6)
    >>> clean_and_adversarial = jnp.concatenate([x, x + 1])
    >>> y, updates = layer.apply(
    ...     variables, clean_and_adversarial, mutable=["batch_stats"]
    ... )

    References: Xie et al. 2019, section 3.3 (AdvProp); Wu & Johnson 2021, section 5.2.
    """

    num_splits: int = dataclasses.field(kw_only=True)
    shared_affine: bool = False

    @nn.compact
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
            domain: integers: () if all examples belong to one domain, (batch,) for one
                each. None: in training the batch is `num_splits` equal contiguous
                blocks, block d for domain d; in evaluation all examples are of domain
                0.
            **options: as in `BatchNorm.__call__`.

        Returns:
            An array of the shape of `x`.

        Raises:
            TypeError: `domain` is not integer, or as for `BatchNorm`.
            ValueError: `domain` is None and `num_splits` does not divide the batch; a
                `domain` that is known to be out of range; or as for `BatchNorm`.
        """
        ops = _layer.split_ops(self.num_splits, domain)
        return self._normalize(x, use_running_average, ops, **options)


class DecorrelatedBatchNorm(Normalization):
    """Decorrelated batch normalization: whitening by the covariance of the batch.

        y = activation(W (x - mean) * scale + bias + residual)
        W = (covariance + epsilon I)^(-1/2)

    The layer of `bnjax.whiten.decorrelate`: it whitens within groups of adjacent
    features. Variables: `params/{scale,bias}` and `batch_stats/{mean,cov}`, where cov
    is (groups, size, size) and starts as the identity. Evaluation takes the root of the
    running covariance at each call; the functions of `bnjax.whiten` can take it once.

    Attributes:
        group_size: how many features are whitened together; None for all. See
            `bnjax.whiten.decorrelate`.
        method: "eigh", "newton_schulz" (IterNorm) or "cholesky"; see
            `bnjax.whiten.inverse_sqrt`.
        iterations: of "newton_schulz".

    All others are those of `BatchNorm`, but `axis` is one axis. A mask and weights are
    the same for all features.

    >>> import jax.numpy as jnp
    >>> layer = DecorrelatedBatchNorm(group_size=3, use_running_average=False)
    >>> x = jax.random.normal(jax.random.key(0), (20, 6))
    >>> variables = layer.init(jax.random.key(1), x)
    >>> print(jax.tree.map(jnp.shape, variables["batch_stats"]))
    {'cov': (2, 3, 3), 'mean': (6,)}
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    References: Huang et al. 2018 (decorrelated batch normalization); Huang et al. 2019
    (IterNorm).
    """

    group_size: int | None = None
    method: str = "eigh"
    iterations: int = 5

    @nn.nowrap
    def _layer_ops(self) -> _layer.LayerOps:
        return _layer.decorrelated_ops(self.group_size, self.method, self.iterations)
