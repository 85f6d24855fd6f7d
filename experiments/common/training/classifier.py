"""One network, trained step by step on images that lie in memory.

A step is one compiled call, not a loop inside of one: XLA's convolutions on a CPU are
several times slower in a loop.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.data.augment import Augment, as_it_is
from experiments.common.data.batches import cover
from experiments.common.data.splits import Split

TESTED = 500  # images at once


class State(NamedTuple):
    """Of a network in training; `variables` are what the model is applied with."""

    variables: dict[str, Any]
    optimizer: optax.OptState
    step: jax.Array
    key: jax.Array


class Classifier:
    """A model and how it is trained; compiled once, for all seeds.

    Attributes:
        model: called as `model(images, train=...)`, with an rng "dropout" in training;
            returns logits. Images are as they lie in the data, augmented.
        optimizer: of its parameters; weight decay is a part of it.
        augment: (key, images) to images of the same shape.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optax.GradientTransformation,
        augment: Augment = as_it_is,
    ):
        self.model = model
        self.optimizer = optimizer
        self.augment = augment

    def train(
        self, seed: int, data: Split, batches: np.ndarray
    ) -> Iterator[tuple[State, jax.Array]]:
        """The state after each step, and the loss that the step began with.

        The state is given up when the next one is asked for.

        Args:
            seed: of the first weights, augmentation and dropout.
            data: images and labels.
            batches: (step, example), as from `batches.draw`.
        """
        images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
        state = self.init(seed, images[:2])
        for batch in batches:
            state, loss = self._step(state, images, labels, batch)
            yield state, loss

    def accuracy(self, variables: dict[str, Any], data: Split) -> float:
        """The share of right answers, by the running statistics."""
        images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
        batches = cover(len(labels), min(TESTED, len(labels)))
        right = sum(self._right(variables, images, labels, b) for b in batches)
        return float(right) / len(labels)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, seed: int, images: jax.Array) -> State:
        """The state before the first step."""
        weights, key = jax.random.split(jax.random.key(seed))
        variables: Any = self.model.init(weights, images, train=False)
        optimizer = self.optimizer.init(variables["params"])
        return State(variables, optimizer, jnp.zeros((), jnp.int32), key)

    def loss(self, variables: dict[str, Any], images, labels, key):
        """The mean loss of a batch in training, and the updated collections."""
        augments, drops = jax.random.split(key)
        logits, updates = self.model.apply(
            variables,
            self.augment(augments, images),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": drops},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state: State, images, labels, batch) -> tuple[State, jax.Array]:
        def of_params(params):
            variables = {**state.variables, "params": params}
            key = jax.random.fold_in(state.key, state.step)
            return self.loss(variables, images[batch], labels[batch], key)

        params = state.variables["params"]
        (loss, updates), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        change, optimizer = self.optimizer.update(gradient, state.optimizer, params)
        params = optax.apply_updates(params, change)
        variables = {**state.variables, **updates, "params": params}
        return State(variables, optimizer, state.step + 1, state.key), loss

    @functools.partial(jax.jit, static_argnums=0)
    def _right(self, variables, images, labels, batch) -> jax.Array:
        examples = batch % len(labels)
        logits: Any = self.model.apply(variables, images[examples], train=False)
        right = logits.argmax(-1) == labels[examples]
        return (right & (batch < len(labels))).sum()
