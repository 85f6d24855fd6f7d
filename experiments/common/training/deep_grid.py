"""Trains a grid of deep networks in one jit: every learning rate and initial scale."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.common.data.splits import Dataset
from experiments.common.models.deep import Net

KNOWN = 4_096  # training images at most, for the statistics to evaluate with

# Where the networks of a grid are counted in their parameters. In those of the layers
# that are looped over it comes second: the loop wants the layers first, and would
# transpose all of them in each step.
AXES = {"first": 0, "rest": 1, "last": 0}
SPECS = {"first": P("cell"), "rest": P(None, "cell"), "last": P("cell")}


def train_grid(
    net: Net,
    rates: Sequence[float],
    stds: Sequence[float],
    seed: int,
    data: Dataset,
    batches: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The accuracies on the validation and the test set, (rate, std), after training.

    Plain gradient descent, every network on the same batches. The networks are split
    over the devices. To evaluate, they normalize by the statistics of training images.

    Args:
        net: what is trained; compiled once, for all seeds.
        rates: of learning.
        stds: of the first weights, times sqrt(inputs of the layer).
        seed: of the first weights.
        data: images (n, pixels) and labels.
        batches: (step, example), as from `batches.draw`.
    """
    every = np.array([(rate, std) for rate in rates for std in stds], np.float32)
    devices = jax.devices()[: math.gcd(len(every), len(jax.devices()))]
    mesh = Mesh(np.array(devices), ("cell",))
    found = _fit(net, mesh, jax.random.key(seed), *every.T, data, batches)
    shape = len(rates), len(stds), 2
    validation, test = np.moveaxis(np.asarray(found).reshape(shape), -1, 0)
    return validation, test


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(net: Net, mesh: Mesh, key, rates, stds, data: Dataset, batches) -> jax.Array:
    """(network, 2): accuracies of validation and test."""

    def some(params, rates, data, batches):
        params = _train(net, params, rates, data, batches)
        return jax.vmap(functools.partial(_test, net), (AXES, None))(params, data)

    pixels = data.train.images.shape[1]
    init = jax.vmap(lambda std: net.init(key, pixels, std), out_axes=AXES)
    specs = (SPECS, P("cell"), P(), P())
    split = jax.shard_map(some, mesh=mesh, in_specs=specs, out_specs=P("cell"))
    return split(init(stds), rates, data, batches)


def _train(net: Net, params, rates, data: Dataset, batches):
    """The parameters of all networks after a step on each of `batches`."""

    def loss(params, images, labels):
        logits, _ = net.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def one(params, rate, images, labels):
        gradient = jax.grad(loss)(params, images, labels)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    over_cells = jax.vmap(one, (AXES, 0, None, None), AXES)

    def step(i, params):
        images = data.train.images[batches[i]].astype(jnp.float32)
        return over_cells(params, rates, images, data.train.labels[batches[i]])

    return lax.fori_loop(0, len(batches), step, params)


def _test(net: Net, params, data: Dataset) -> jax.Array:
    """The accuracies of one network on the validation and the test set."""
    known = data.train.images[:KNOWN]
    _, statistics = net.apply(params, jnp.asarray(known, jnp.float32))
    shares = []
    for images, labels in (data.validation, data.test):
        logits, _ = net.apply(params, jnp.asarray(images, jnp.float32), statistics)
        shares.append((logits.argmax(-1) == labels).mean())
    return jnp.stack(shares)
