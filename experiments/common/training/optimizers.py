"""Gradient descent with momentum, its rate over time, and decay of kernels alone."""

from typing import NamedTuple

import optax

import bnjax


class Optimizer(NamedTuple):
    """Attributes: the transformation, and the learning rate in it, by step."""

    transformation: optax.GradientTransformation
    schedule: optax.Schedule


def cosine(steps: int, warmup: int, peak: float, weight_decay: float) -> Optimizer:
    """Nesterov momentum; the rate rises linearly, then falls as a cosine to 0.

    Kernels decay; biases and what belongs to batch normalization do not.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    return _sgd(schedule, weight_decay, nesterov=True)


def exponential(
    steps: float, factor: float, rate: float, weight_decay: float
) -> Optimizer:
    """Momentum; the rate is multiplied by `factor` every `steps` steps, evenly.

    Kernels decay; biases and what belongs to batch normalization do not.
    """

    def schedule(count):
        return rate * factor ** (count / steps)

    return _sgd(schedule, weight_decay, nesterov=False)


def _sgd(schedule: optax.Schedule, weight_decay: float, *, nesterov: bool) -> Optimizer:
    transformation = optax.chain(
        optax.add_decayed_weights(weight_decay, bnjax.training.weight_decay_mask),
        optax.sgd(schedule, momentum=0.9, nesterov=nesterov),
    )
    return Optimizer(transformation, schedule)
