"""Several networks that decide together: the mean of their probabilities."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from experiments.common.data.pipeline import Batch
from experiments.common.training.replicas import TrainState


class Votes(NamedTuple):
    """Of one network: probabilities (image, class), and the labels (image,)."""

    probabilities: np.ndarray
    labels: np.ndarray

    def accuracy(self) -> float:
        """The share of images whose most probable class is theirs."""
        return float(np.mean(self.probabilities.argmax(-1) == self.labels))


def votes(
    network: nn.Module,
    state: TrainState,
    place: Callable[[Batch], Batch],
    tests: Iterable[Batch],
) -> Votes:
    """Those of a trained network, by its running statistics; the same everywhere.

    Args:
        network: called as `network(images, train=False)`; it returns logits.
        state: after training.
        place: see `Replicas`.
        tests: this process's share of the test batches.
    """
    copied = jax.tree.leaves(state.params)[0].sharding

    @functools.partial(jax.jit, out_shardings=copied)
    def of(state: TrainState, batch: Batch) -> Votes:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = network.apply(variables, batch.images, train=False)
        return Votes(jax.nn.softmax(logits), batch.labels)  # type: ignore[arg-type]

    found = [jax.tree.map(np.asarray, of(state, place(batch))) for batch in tests]
    probabilities, labels = map(np.concatenate, zip(*found))
    return Votes(probabilities[labels >= 0], labels[labels >= 0])


def together(members: Sequence[Votes]) -> Votes:
    """The arithmetic mean of the members' probabilities."""
    mean = np.mean([member.probabilities for member in members], axis=0)
    return Votes(mean, members[0].labels)
