"""A network trained at rates that are arguments: compiled once for all of them.

A step is two compiled calls, the gradient and the change by it, so that the gradient
can be asked for elsewhere too: along a line, or with some layers moved.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from experiments.common.data.splits import Split
from experiments.common.training.classifier import Classifier, State

Gradient = Callable[[Any], tuple[jax.Array, Any]]
"""Parameters -> the loss and its gradient, as `jax.value_and_grad(loss)`."""


class Descent:
    """How a classifier is trained on one set of images.

    The augmentation and the dropout of a step follow from the state before it.

    Attributes:
        classifier: whose optimizer has the rate 1; what it asks for is multiplied by
            the rate of each step.
    """

    def __init__(self, classifier: Classifier, data: Split):
        self.classifier = classifier
        self._data = jnp.asarray(data.images), jnp.asarray(data.labels)

    def init(self, seed: int) -> State:
        """The state before the first step."""
        return self.classifier.init(seed, self._data[0][:2])

    def step(
        self, state: State, batch: ArrayLike, rate: ArrayLike
    ) -> tuple[State, jax.Array]:
        """The state after a step on a batch of examples, and the loss before it."""
        loss, updates, gradient = self._gradient(state, *self._data, batch)
        return self._change(state, updates, gradient, jnp.float32(rate)), loss

    def at(self, state: State, batch: ArrayLike) -> Gradient:
        """The loss of the batch, and its gradient, as functions of the parameters.

        All else is as in the step from `state` on that batch.
        """

        def gradient(params: Any) -> tuple[jax.Array, Any]:
            moved = state._replace(variables={**state.variables, "params": params})
            loss, _, found = self._gradient(moved, *self._data, batch)
            return loss, found

        return gradient

    @functools.partial(jax.jit, static_argnums=0)
    def _gradient(self, state: State, images, labels, batch):
        """The loss, the updated collections, and the gradient."""

        def of_params(params):
            variables = {**state.variables, "params": params}
            key = jax.random.fold_in(state.key, state.step)
            return self.classifier.loss(variables, images[batch], labels[batch], key)

        find = jax.value_and_grad(of_params, has_aux=True)
        (loss, updates), gradient = find(state.variables["params"])
        return loss, updates, gradient

    @functools.partial(jax.jit, static_argnums=0)
    def _change(self, state: State, updates, gradient, rate: jax.Array) -> State:
        params, optimizer = state.variables["params"], self.classifier.optimizer
        change, optimizer = optimizer.update(gradient, state.optimizer, params)
        params = jax.tree.map(lambda p, c: p + rate * c, params, change)
        variables = {**state.variables, **updates, "params": params}
        return State(variables, optimizer, state.step + 1, state.key)
