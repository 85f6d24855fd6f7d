"""Trains a grid of networks in one jit: every learning rate, from every seed."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common.data.splits import Dataset, Split
from experiments.common.training.measure import Measurement, measure

# Arrays of the grid lead with the axes (seed, rate); the rates are split over devices.
GRID = P(None, "rate")


class Grid(NamedTuple):
    """Networks of one kind, a function that trains them, and what they share.

    A seed fixes the first weights and the mini-batches, which are drawn with
    replacement, for all rates and for networks with and without normalization.
    """

    variables: Any
    train: Callable[..., tuple[Any, Measurement]]
    shared: tuple[Any, ...]

    def advance(self, step: int, steps: int) -> tuple["Grid", Measurement]:
        """The grid of step `step`, trained for `steps` more, and how it does there."""
        variables, measured = self.train(self.variables, step, steps, *self.shared)
        return self._replace(variables=variables), measured


def use_cores(count: int) -> None:
    """Makes `count` CPU cores a device each; to be called before JAX is used.

    XLA's threads leave the second core half idle on matrices this small. Two devices
    with half of the networks each keep both busy.
    """
    jax.config.update("jax_num_cpu_devices", count)


def make_grids(
    models: dict[str, nn.Module],
    data: Dataset,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    *,
    batch_size: int,
    longest: int,
    unit: int,
) -> dict[str, Grid]:
    """A grid at step 0 for each model.

    Args:
        models: called as `model(x, train=...)`; they return logits, inputs to sigmoids.
        data: images and labels.
        learning_rates: of gradient descent.
        seeds: of the weights and the mini-batches.
        batch_size: images per step.
        longest: the largest number of steps to advance at once.
        unit: see `measure`.
    """
    devices = jax.devices()[: math.gcd(len(learning_rates), len(jax.devices()))]
    mesh = Mesh(np.array(devices), ("rate",))
    keys = jax.vmap(jax.random.key)(np.array(seeds))
    blank = np.zeros((1, data.train.images.shape[1]), np.float32)

    def start(key: jax.Array):
        # Together: what the models draw alike is compiled once.
        return [model.init(key, blank, train=False) for model in models.values()]

    def repeated(v: jax.Array) -> jax.Array:
        return jnp.repeat(v[:, None], len(learning_rates), 1)

    variables = jax.jit(lambda k: jax.tree.map(repeated, jax.vmap(start)(k)))(keys)
    specs = P("rate"), P(), P()
    shared = np.array(learning_rates, np.float32), keys, data
    shared = tuple(map(jax.device_put, shared, (NamedSharding(mesh, s) for s in specs)))
    grids = {}
    for (name, model), values in zip(models.items(), variables, strict=True):
        train = jax.shard_map(
            functools.partial(_train, model, (longest, batch_size), unit),
            mesh=mesh,
            in_specs=(GRID, P(), P(), *specs),
            out_specs=GRID,
        )
        values = jax.device_put(values, NamedSharding(mesh, GRID))
        grids[name] = Grid(values, jax.jit(train, donate_argnums=0), shared)
    return grids


def _train(model, size, unit, variables, step, steps, rates, keys, data: Dataset):
    """All of `Grid.advance`; size (longest, batch)."""
    indices = _draw(keys, step, size, len(data.train.labels))

    def body(i, variables):
        return _step(model, variables, rates, data.train, indices[:, i])

    variables = lax.fori_loop(0, steps, body, variables)
    return variables, measure(model, variables, data, unit)


def _draw(keys: jax.Array, step, size: tuple[int, int], examples: int) -> jax.Array:
    """(seed, steps, batch): the mini-batches from `step` on."""

    def of_one_seed(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, step), size, 0, examples)

    return jax.vmap(of_one_seed)(keys)


def _step(model, variables, rates: jax.Array, train: Split, indices: jax.Array):
    """One step of every network; indices (seed, batch)."""
    images = train.images[indices].astype(jnp.float32)
    # A copy for each rate, or XLA makes one matrix product of all rates, and transposes
    # every kernel for it: a step then takes 10 to 15 % longer on a CPU.
    copies = len(indices), len(rates), *images.shape[1:]
    images = lax.optimization_barrier(jnp.broadcast_to(images[:, None], copies))
    one = functools.partial(_step_one, model)
    over_grid = jax.vmap(jax.vmap(one, (0, 0, 0, None)), (0, None, 0, 0))
    return over_grid(variables, rates, images, train.labels[indices])


def _step_one(model, variables, rate: jax.Array, images: jax.Array, labels: jax.Array):
    """One step of one network."""

    def loss(params):
        (logits, _), updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    params = variables["params"]
    gradient, updates = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    return {"params": params, **updates}
