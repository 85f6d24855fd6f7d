"""Running statistics as three pure functions (init, update, read).

    ema            mean <- decay mean + (1 - decay) batch mean, the variance likewise
    debiased_ema   the same from 0, divided by 1 - decay^t
    cumulative     mean <- mean + (batch mean - mean) / t

`decay` is the weight of the old value: Flax's momentum, one minus PyTorch's. A feature
without an estimate in the batch (count 0; for the unbiased variance count 1 too)
keeps its statistics, and t counts only batches with an estimate. These rules average
variances of batches, which leaves out the variance of the batches' means. For the
variance of a population `merge` the moments.

Rules of one kind and the same settings are equal, hashable and can be pickled.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from bnjax import _axes, _checks, _dtypes
from bnjax._bound import bind
from bnjax.moments import Moments, broadcast_count

__all__ = ["AverageState", "Rule", "State", "cumulative", "debiased_ema", "ema"]


class State(NamedTuple):
    """Running statistics per feature: mean, and var (real)."""

    mean: jax.Array
    var: jax.Array


class AverageState(NamedTuple):
    """Averages that start at 0, and their total weight, per feature."""

    mean: jax.Array
    var: jax.Array
    weight: jax.Array


class Rule(NamedTuple):
    """A rule for running statistics.

    Attributes:
        init: (feature shape, dtype) -> state.
        update: (state, Moments) -> state.
        read: state -> State(mean, var); (0, 1) for a feature without an estimate yet.
    """

    init: Callable[..., Any]
    update: Callable[[Any, Moments], Any]
    read: Callable[[Any], State]


def ema(decay: float = 0.99, *, ddof: int = 0, skip_nonfinite: bool = False) -> Rule:
    """The exponential moving average that starts at mean 0, var 1: Flax's rule.

        value <- decay value + (1 - decay) batch value

    After t batches the initial value still has the weight decay^t: with 0.99 that is
    37 % after 100 batches.

    Args:
        decay: the weight of the old value, in [0, 1].
        ddof: 0 for the biased variance (Flax), 1 for the unbiased one (PyTorch).
        skip_nonfinite: a batch whose moments hold a NaN or an infinity changes nothing.

    Returns:
        Rule, with State as its state.

    Raises:
        ValueError: decay outside [0, 1].

    >>> rule = ema(0.9, ddof=1)
    >>> batch = Moments(3.0, jnp.ones(1), jnp.full(1, 14 / 3))
    >>> state = rule.update(rule.init((1,)), batch)
    >>> print(rule.read(state).var)
    [1.1333333]

    References: Ioffe & Szegedy 2015, section 3.1, last paragraph.
    """
    settings = {
        "decay": _checked_decay(decay),
        "ddof": ddof,
        "skip_nonfinite": skip_nonfinite,
    }
    return Rule(_init_ema, bind(_update_ema, **settings), _read_ema)


def _init_ema(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> State:
    return State(jnp.zeros(shape, dtype), jnp.ones(shape, _dtypes.real(dtype)))


def _update_ema(
    state: State, batch: Moments, *, decay: float, ddof: int, skip_nonfinite: bool
) -> State:
    new = State(batch.mean, batch.variance(ddof))
    blended = State(*(decay * old + (1 - decay) * b for old, b in zip(state, new)))
    return _select(_usable(batch, ddof, skip_nonfinite), blended, state)


def _read_ema(state: State) -> State:
    return state


def debiased_ema(
    decay: float = 0.99, *, ddof: int = 0, skip_nonfinite: bool = False
) -> Rule:
    """The exponential moving average without the weight of its initial value.

        value <- decay value + (1 - decay) batch value, from 0;  value / (1 - decay^t)

    After one batch it equals that batch's statistics.

    Args:
        decay: the weight of the old value, in [0, 1].
        ddof: 0 for the biased variance, 1 for the unbiased one.
        skip_nonfinite: a batch whose moments hold a NaN or an infinity changes nothing.

    Returns:
        Rule, with AverageState as its state; its weight is 1 - decay^t.

    Raises:
        ValueError: decay outside [0, 1].

    >>> rule = debiased_ema(0.9)
    >>> batch = Moments(3.0, jnp.ones(1), jnp.full(1, 6.0))
    >>> state = rule.update(rule.init((1,)), batch)
    >>> print(rule.read(state).var)
    [2.]

    References: Kingma & Ba 2015, section 3 (the same correction in Adam).
    """
    settings = {
        "decay": _checked_decay(decay),
        "ddof": ddof,
        "skip_nonfinite": skip_nonfinite,
    }
    return Rule(_init_average, bind(_update_debiased, **settings), _read_debiased)


def _update_debiased(
    state: AverageState,
    batch: Moments,
    *,
    decay: float,
    ddof: int,
    skip_nonfinite: bool,
) -> AverageState:
    new = (batch.mean, batch.variance(ddof), 1.0)
    blended = (decay * old + (1 - decay) * b for old, b in zip(state, new))
    usable = _usable(batch, ddof, skip_nonfinite)
    return _select(usable, AverageState(*blended), state)


def _read_debiased(state: AverageState) -> State:
    seen = state.weight > 0
    weight = jnp.where(seen, state.weight, 1)
    return State(
        jnp.where(seen, state.mean / weight, 0),
        jnp.where(seen, state.var / weight, 1),
    )


def cumulative(*, ddof: int = 0, skip_nonfinite: bool = False) -> Rule:
    """The plain average over all batches; of biased variances, unless ddof=1.

        value <- value + (batch value - value) / t

    PyTorch's momentum=None, and Algorithm 2, average unbiased variances: ddof=1.

    Args:
        ddof: 0 for the biased variance, 1 for the unbiased one (PyTorch).
        skip_nonfinite: a batch whose moments hold a NaN or an infinity changes nothing.

    Returns:
        Rule, with AverageState as its state; its weight is t, the number of batches.

    >>> rule, state = cumulative(), cumulative().init((1,))
    >>> for mean in (1.0, 2.0, 6.0):
    ...     state = rule.update(state, Moments(2.0, jnp.full(1, mean), jnp.ones(1)))
    >>> print(rule.read(state).mean, state.weight)
    [3.] [3.]

    References: Ioffe & Szegedy 2015, Algorithm 2, line 10, batch by batch.
    """
    update = bind(_update_cumulative, ddof=ddof, skip_nonfinite=skip_nonfinite)
    return Rule(_init_average, update, _read_cumulative)


def _update_cumulative(
    state: AverageState, batch: Moments, *, ddof: int, skip_nonfinite: bool
) -> AverageState:
    t = state.weight + 1
    averaged = AverageState(
        state.mean + (batch.mean - state.mean) / t,
        state.var + (batch.variance(ddof) - state.var) / t,
        t,
    )
    return _select(_usable(batch, ddof, skip_nonfinite), averaged, state)


def _read_cumulative(state: AverageState) -> State:
    return State(state.mean, jnp.where(state.weight > 0, state.var, 1))


def _checked_decay(value: float) -> float:
    """The decay; a known scalar as a float, because an array has no hash."""
    _checks.decay_rate("decay", value)
    if isinstance(value, Tracer) or np.ndim(value):
        return value
    return float(value)


def _init_average(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> AverageState:
    mean, var = jnp.zeros(shape, dtype), jnp.zeros(shape, _dtypes.real(dtype))
    return AverageState(mean, var, weight=var)


def _usable(batch: Moments, ddof: int, skip_nonfinite: bool) -> jax.Array:
    """Per feature: count > ddof. With skip_nonfinite, False if any is not finite."""
    mean = jnp.asarray(batch.mean)
    usable = broadcast_count(jnp.asarray(batch.count), mean).real > ddof
    if skip_nonfinite:
        finite = jnp.isfinite(mean).all() & jnp.isfinite(batch.m2).all()
        usable = usable & finite
    return usable


def _select(usable: jax.Array, new, old):
    """The new state for the usable features, the old one for the others."""
    return jax.tree.map(functools.partial(_axes.where, usable), new, old)
