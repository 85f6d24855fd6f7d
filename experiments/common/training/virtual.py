"""Trains a network on virtual devices: the groups that each batch is split into."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnjax
from experiments.common.data.splits import Split
from experiments.common.models.norms import AXIS


class State(NamedTuple):
    """Of a network in training."""

    variables: dict[str, Any]
    momentum: Any
    step: jax.Array


class Network:
    """A model, how it is trained, and how its errors are counted.

    The model is called on each group of a batch by itself (vmap, with the axis name
    AXIS). The gradient is that of the mean loss over the whole batch. The running
    statistics are averaged over the groups, the variances too, as in Flax's ImageNet
    example; at each step here, which for linear averages is the same as at the end.
    """

    def __init__(self, model: nn.Module, optimizer: optax.GradientTransformation):
        """
        Args:
            model: called as `model(x, train=..., step=...)`.
            optimizer: of its parameters.
        """
        self.model = model
        self.optimizer = optimizer

    def train(
        self, seed: int, data: Split, batches: np.ndarray, frozen: int = 0
    ) -> dict[str, Any]:
        """The variables after a step on each of `batches`.

        Args:
            seed: of the first weights.
            data: images and labels.
            batches: (step, group, example).
            frozen: the number of steps at the end that normalize by the running
                statistics, and leave them as they are.
        """
        images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
        state = self._init(jax.random.key(seed), images[:2])
        for step, batch in enumerate(batches):
            train = step < len(batches) - frozen
            state = self._step(state, images, labels, batch, train)
        return state.variables

    def error(
        self, variables: dict[str, Any], data: Split, batches: np.ndarray, train: bool
    ) -> float:
        """The share of wrong answers.

        Args:
            variables: of the model.
            data: images and labels.
            batches: (batch, group, example), from `batches.cover`.
            train: whether to normalize by the statistics of each group, not by those
                in `variables`.
        """
        images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
        wrong = (self._wrong(variables, images, labels, b, train) for b in batches)
        return float(sum(wrong)) / len(labels)

    def population(
        self, variables: dict[str, Any], data: Split, groups: np.ndarray
    ) -> dict[str, Any]:
        """`variables` with the statistics pooled over `groups`, (group, example)."""
        batches = (data.images[group] for group in groups)
        pooled = bnjax.population.pooled(self._collect, variables, batches)
        return {**variables, "batch_stats": pooled}

    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key: jax.Array, images: jax.Array) -> State:
        variables: Any = self.model.init(key, images, train=False)
        momentum = self.optimizer.init(variables["params"])
        return State(variables, momentum, jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
    def _step(self, state: State, images, labels, batch, train: bool) -> State:
        def loss(params):
            variables = {**state.variables, "params": params}
            logits, updates = self._apply(variables, images[batch], state.step, train)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, labels[batch]
            )
            return losses.mean(), updates

        params = state.variables["params"]
        gradient, updates = jax.grad(loss, has_aux=True)(params)
        change, momentum = self.optimizer.update(gradient, state.momentum, params)
        params = optax.apply_updates(params, change)
        variables = {**state.variables, **updates, "params": params}
        return State(variables, momentum, state.step + 1)

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def _wrong(self, variables, images, labels, batch, train: bool) -> jax.Array:
        examples = batch % len(labels)
        logits, _ = self._apply(variables, images[examples], 0, train)
        wrong = logits.argmax(-1) != labels[examples]
        return (wrong & (batch < len(labels))).sum()

    def _apply(self, variables, images: jax.Array, step, train: bool):
        """Logits (group, example, class), and the mean of the running statistics."""
        call = functools.partial(
            self.model.apply, variables, train=train, step=step, mutable=["batch_stats"]
        )
        logits, updates = jax.vmap(call, axis_name=AXIS)(images)
        return logits, jax.tree.map(lambda value: value.mean(0), updates)

    def _collect(self, variables, images: jax.Array):
        """What population statistics ask of a model."""
        collections = ["batch_stats", "batch_moments"]
        return self.model.apply(variables, images, train=True, mutable=collections)
