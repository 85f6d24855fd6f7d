"""One step of training a classifier, compiled, and the memory that it takes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax


class Step(NamedTuple):
    """A compiled step.

    Attributes:
        run: the step; returns the loss, the next variables and optimizer state.
        planned: bytes of temporary arrays, by the compiler's plan.
        stored: see `stored`.
    """

    run: Callable[[], tuple[jax.Array, Any, optax.OptState]]
    planned: int
    stored: int


def compiled(model: nn.Module, variables: Any, data: tuple[jax.Array, ...]) -> Step:
    """A step of SGD with momentum, from these variables on (images, labels)."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    arguments = variables, optimizer.init(variables["params"]), *data
    step = jax.jit(update(model, optimizer)).lower(*arguments).compile()
    analysis: Any = step.memory_analysis()
    planned = analysis.temp_size_in_bytes
    return Step(partial(step, *arguments), planned, stored(model, variables, data))


def stored(model: nn.Module, variables: Any, data: tuple[jax.Array, ...]) -> int:
    """Bytes that the derivative keeps between the forward and the backward pass.

    Parameters included, which are needed anyway. Nothing is computed.
    """
    kept = jax.eval_shape(partial(_residuals, model), variables, *data)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def _loss(model: nn.Module, params: Any, stats: Any, images, labels):
    """The loss and the next batch_stats."""
    variables = {"params": params, "batch_stats": stats}
    logits, updates = model.apply(variables, images, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates["batch_stats"]


def update(model: nn.Module, optimizer: optax.GradientTransformation):
    """(variables, optimizer state, images, labels) to the loss, and the next two."""
    gradient = jax.value_and_grad(partial(_loss, model), has_aux=True)

    def step(variables: Any, state: optax.OptState, images, labels):
        params, stats = variables["params"], variables["batch_stats"]
        (loss, stats), grads = gradient(params, stats, images, labels)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return loss, {"params": params, "batch_stats": stats}, state

    return step


def _residuals(model: nn.Module, variables: Any, images, labels):
    """The backward pass as a pytree, whose leaves are what it needs."""

    def of_params(params: Any):
        return _loss(model, params, variables["batch_stats"], images, labels)[0]

    return jax.vjp(of_params, variables["params"])[1]
