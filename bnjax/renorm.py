"""Batch renormalization: training computes nearly the same function as evaluation.

    r = clip(sigma_B / sigma, 1/r_max, r_max),    d = clip((mu_B - mu) / sigma, +-d_max)
    y = ((x - mu_B) / sigma_B * r + d) * scale + bias
    sigma = sqrt(var + epsilon), from the running statistics before this batch's update

r and d are constants to the gradient. Unclipped, the output is that of inference, and
the gradient still knows that the batch moves its own statistics. r_max = 1, d_max = 0
is batch normalization. It is for small batches and for batches that are not iid.

The paper averages sigma; the running statistics here are a mean and a variance, as
`BatchNorm` has them, so that checkpoints fit.

References: Ioffe 2017, "Batch Renormalization", Algorithm 1.
"""

import numbers
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _checks
from bnjax.moments import Moments, compute_moments
from bnjax.normalize import (
    Inputs,
    Options,
    TransformSpec,
    apply_training_transform,
    normalize_with_stats,
    stats_or_fallback,
)

__all__ = ["at_step", "batch_renorm", "warmed_up"]

Limit = ArrayLike | Callable[[ArrayLike], ArrayLike]

_LIMIT = (
    "{name}={value!r} limits {what}: expected a number >= {least}. {advice} is batch "
    "normalization; the paper relaxes r_max to 3 and d_max to 5 during training."
)

_NO_STEP = (
    "{name} is a schedule, but no step was given: expected the number of the training "
    "step. Write layer(x, step=step), or a number for {name}."
)

_WARMUP = (
    "warmup_steps={received!r} is how many updates the running statistics get before "
    "they correct the batch's: expected an integer >= 0. Write warmup_steps=100_000, "
    "or None for no counter."
)

_COMPLEX = (
    "x has dtype {dtype}: expected a real one, for batch renormalization clips by "
    "order. Normalize x.real and x.imag, or use batch normalization."
)


def batch_renorm(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    **options: Unpack[Options],
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own statistics, corrected towards the running ones.

        r = clip(sigma_B / sigma, 1/r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * scale + bias

    No gradient passes through r and d, nor reaches `mean` and `var`.

    Args:
        x: (batch, *spatial, feature), real.
        mean: (feature,), the running mean; also of features without a valid value.
        var: (feature,), the running variance.
        scale: (feature,), gamma; None for 1.
        bias: (feature,), beta; None for 0.
        r_max: the largest factor between the standard deviations, >= 1; may be traced.
        d_max: the largest distance between the means, >= 0, in running standard
            deviations; may be traced.
        **options: those of `batch_norm`, but for `fallback`.

    Returns:
        y, of the shape of `x`, and the Moments of the batch.

    Raises:
        TypeError: `x` is complex, or integer.
        ValueError: `r_max` below 1, `d_max` below 0, and whatever `batch_norm` raises.

    Warns:
        BatchNormWarning: at trace time, for one value per feature.

    >>> x = jnp.array([[1.0], [5.0]])
    >>> mean, var = jnp.array([2.0]), jnp.array([16.0])
    >>> y, _ = batch_renorm(x, mean, var, epsilon=0.0)
    >>> print(y.ravel())  # (x - 2) / 4: nothing was clipped
    [-0.25  0.75]

    References: Ioffe 2017, section 3, Algorithm 1.
    """
    x = _checks.require_inexact("x", x)
    if jnp.iscomplexobj(x):
        raise TypeError(_COMPLEX.format(dtype=x.dtype))
    _check_limit("r_max", r_max, 1, "sigma_B / sigma")
    _check_limit("d_max", d_max, 0, "(mu_B - mu) / sigma")
    running = lax.stop_gradient((jnp.asarray(mean), jnp.asarray(var)))
    options["fallback"] = running
    return apply_training_transform(
        _normalize_with_corrected_stats, x, scale, bias, options, r_max, d_max
    )


def at_step(name: str, limit: Limit, step: ArrayLike | None) -> ArrayLike:
    """The limit; a schedule is evaluated at `step`.

        r_max(step), d_max(step)

    Args:
        name: "r_max" or "d_max", for the message.
        limit: a number, or a function of the step, such as optax's schedules.
        step: (), integer; needed by schedules only.

    Returns:
        A number or a scalar array.

    Raises:
        ValueError: a schedule without a step.

    >>> at_step("r_max", lambda step: 1 + step / 100, 50)
    1.5

    References: Ioffe 2017, section 4.1, where r_max and d_max grow during training.
    """
    if not callable(limit):
        return limit
    if step is None:
        raise ValueError(_NO_STEP.format(name=name))
    return limit(step)


def warmed_up(
    r_max: ArrayLike, d_max: ArrayLike, steps: ArrayLike, warmup_steps: int
) -> tuple[jax.Array, jax.Array]:
    """The limits after a warm-up, during which they are those of batch normalization.

        (1, 0) for steps < warmup_steps, then (r_max, d_max)

    Args:
        r_max: a number >= 1.
        d_max: a number >= 0.
        steps: (), integer: how often the running statistics were updated.
        warmup_steps: the number of updates after which the limits apply.

    Returns:
        r_max and d_max, scalar arrays.

    Raises:
        ValueError: `r_max` below 1, `d_max` below 0, a negative `warmup_steps`.

    >>> r_max, d_max = warmed_up(3.0, 5.0, steps=99_999, warmup_steps=100_000)
    >>> print(r_max, d_max)
    1.0 0.0

    References: Ioffe 2017, section 4.1; Bhatt et al. 2024 (CrossQ), whose warm-up has
    100,000 steps.
    """
    _check_limit("r_max", r_max, 1, "sigma_B / sigma")
    _check_limit("d_max", d_max, 0, "(mu_B - mu) / sigma")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(_WARMUP.format(received=warmup_steps))
    warm = jnp.asarray(steps) >= warmup_steps
    r_max, d_max = (jnp.asarray(limit, float) for limit in (r_max, d_max))
    return jnp.where(warm, r_max, 1), jnp.where(warm, d_max, 0)


def _normalize_with_corrected_stats(
    inputs: Inputs, spec: TransformSpec, r_max: Any, d_max: Any
):
    batch, _ = compute_moments(inputs.x, inputs.mask, inputs.shift, spec.reduction)
    mean, var = stats_or_fallback(batch, inputs, spec)
    r, d = lax.stop_gradient(_corrections(mean, var, inputs, r_max, d_max))
    vectors = mean, var, inputs.scale * r, inputs.bias + inputs.scale * d
    return normalize_with_stats(
        inputs.bounded_x(), vectors, inputs.epsilon, spec.affine
    ), batch


def _corrections(mean, var, inputs: Inputs, r_max, d_max):
    """r and d, from the batch's mean and variance and the running ones."""
    epsilon = jnp.asarray(inputs.epsilon, var.dtype)
    r_max, d_max = (jnp.asarray(limit, var.dtype) for limit in (r_max, d_max))
    sigma = jnp.sqrt(inputs.fallback_var + epsilon)
    r = jnp.clip(jnp.sqrt(var + epsilon) / sigma, 1 / r_max, r_max)
    d = jnp.clip((mean - inputs.fallback_mean) / sigma, -d_max, d_max)
    return r, d


def _check_limit(name: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, numbers.Real) and not float(value) >= least:
        message = _LIMIT.format(
            name=name, value=value, what=what, least=least, advice=f"{name}={least}"
        )
        raise ValueError(message)
