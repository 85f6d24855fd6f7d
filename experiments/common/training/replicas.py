"""One network on every device of every process: batches are split, the rest is copied.

All is plain `jax.jit`: the arrays' shardings say that a batch is split over the mesh,
so that gradients and batch normalization's statistics are those of the whole batch.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common.data.pipeline import Batch
from experiments.common.training.optimizers import Optimizer


class TrainState(NamedTuple):
    """All that training changes; each device holds all of it."""

    params: Any
    batch_stats: Any
    optimizer: optax.OptState


class Replicas(NamedTuple):
    """The compiled functions of a model, for one size of batch each.

    Attributes:
        place: a process's share of a batch, to the whole batch on the devices.
        train: (state, batch) to the next state and the metrics; the state is given up.
        correct: (state, batch) to how many predictions are right.
    """

    place: Callable[[Batch], Batch]
    train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    correct: Callable[[TrainState, Batch], jax.Array]


def start(
    model: nn.Module, optimizer: Optimizer, share: Batch, tested: Batch, seed: int
) -> tuple[TrainState, Replicas]:
    """The state at step 0 and the compiled functions.

    Args:
        model: called as `model(images, train=...)`, in training with an rng "dropout"
            of the step; it returns logits.
        optimizer: see `optimizers`.
        share: this process's share of some training batch.
        tested: the same of some test batch.
        seed: of the first weights and of dropout.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place(batch: Batch) -> Batch:
        return Batch(*(jax.make_array_from_process_local_data(split, x) for x in batch))

    def init(images: jax.Array) -> TrainState:
        variables = model.init(jax.random.key(seed), images, train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(params, stats, optimizer.transformation.init(params))

    blank = np.zeros((1, *share.images.shape[1:]), share.images.dtype)
    state = jax.jit(init, out_shardings=copied)(blank)
    train, correct = _functions(model, *optimizer, seed)
    trained = jax.jit(train, donate_argnums=0, out_shardings=copied)
    counted = jax.jit(correct, out_shardings=copied)
    compiled = (
        function.lower(state, place(batch)).compile()
        for function, batch in ((trained, share), (counted, tested))
    )
    return state, Replicas(place, *compiled)


def _functions(
    model: nn.Module, optimizer, schedule, seed: int
) -> tuple[Callable, Callable]:
    """`Replicas.train` and `Replicas.correct`, before they are compiled."""

    def loss(params, batch_stats, batch: Batch, key: jax.Array):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(
            variables,
            batch.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        right = logits.argmax(-1) == batch.labels
        return losses.mean(), (updates.get("batch_stats", {}), right.mean())

    def train(state: TrainState, batch: Batch):
        step = optax.tree_utils.tree_get(state.optimizer, "count")
        key = jax.random.fold_in(jax.random.key(seed), step)
        of_params = jax.value_and_grad(loss, has_aux=True)
        (value, (stats, accuracy)), gradient = of_params(*state[:2], batch, key)
        rate = schedule(step)
        updates, state_after = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "accuracy": accuracy, "learning_rate": rate}
        return TrainState(params, stats, state_after), metrics

    def correct(state: TrainState, batch: Batch) -> jax.Array:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, batch.images, train=False)
        return jnp.sum(logits.argmax(-1) == batch.labels)

    return train, correct


def digest(tree: Any, device: int = 0) -> str:
    """SHA-256 of the values that the `device`-th device of this process holds."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf.addressable_shards[device].data).tobytes())
    return total.hexdigest()


def compare(state: TrainState) -> dict[str, list[str]]:
    """The digests of parameters and statistics, on every device of every process.

    Raises:
        RuntimeError: devices differ in what each should hold a copy of.
    """
    found = {}
    for name in ("params", "batch_stats"):
        tree = getattr(state, name)
        local = [digest(tree, i) for i in range(jax.local_device_count())]
        mine = np.frombuffer(bytes.fromhex("".join(local)), np.uint8)
        every = multihost_utils.process_allgather(mine).reshape(-1, 32)
        found[name] = [row.tobytes().hex() for row in every]
        if len(set(found[name])) > 1:
            raise RuntimeError(f"{name} differ between devices: {found[name]}")
    return found
