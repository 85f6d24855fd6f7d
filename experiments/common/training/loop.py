"""The training loop: steps, checkpoints and measurements, each announced to a guard."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax

from experiments.common.data.pipeline import Batch
from experiments.common.training import cluster, replicas
from experiments.common.training.checkpoints import Checkpoints
from experiments.common.training.cluster import Preempted
from experiments.common.training.guard import Guard
from experiments.common.training.optimizers import Optimizer
from experiments.common.training.report import Report


@dataclasses.dataclass(frozen=True)
class Options(cluster.Cluster):
    """What changes nothing about the result; each is an option of the command line."""

    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    keep: int = 3
    """How many checkpoints remain."""
    log_every: int = 10
    """Steps between two records of the loss."""
    evaluate_every: int = 100
    """Steps between two measurements on the test images."""


class Job(NamedTuple):
    """What is trained, on what, and for how long.

    Attributes:
        name: of the experiment, and of the file of its records.
        folder: of the records and the checkpoints.
        settings: what must not change from one start to the next.
        about: what is recorded of a start.
        network: called as `network(images, train=...)`; it returns logits.
        optimizer: and its schedule.
        batches: this process's share of the training batches; item k is of step k.
        tests: this process's share of the test batches.
        count: of all test images.
        batch_size: images per step, of all processes.
        total: steps.
        seed: of the first weights and of dropout.
        title: before what is printed.
        bar: whether there is a progress bar.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    network: nn.Module
    optimizer: Optimizer
    batches: grain.MapDataset
    tests: Sequence[Batch]
    count: int
    batch_size: int
    total: int
    seed: int
    title: str = ""
    bar: bool = True


class Loop(NamedTuple):
    """Training and measurement; each phase is announced to the guard."""

    job: Job
    options: Options
    guard: Guard
    report: Report
    functions: replicas.Replicas
    saved: Checkpoints

    def train(
        self, state: replicas.TrainState, batches: Iterator[Batch], begin: int
    ) -> replicas.TrainState:
        """The state after all steps, from that after `begin`."""
        running = None  # while a step runs on the devices, the next batch is read
        total = self.job.total
        for step in range(begin + 1, total + 1):
            self.guard.enter(f"reading the batch of step {step}")
            batch = self.functions.place(next(batches))
            self.guard.enter(f"step {step}")
            state, metrics = self.functions.train(state, batch)
            self.finish(running)
            running = step, metrics
            preempted = cluster.preempted(self.options, step)
            saves = preempted or step % self.options.checkpoint_every == 0
            measures = step % self.options.evaluate_every == 0
            if saves or measures or step == total:
                self.finish(running)
                running = None
            if saves or step == total:
                self.guard.enter(f"saving step {step}")
                self.saved.save(step, state, step * self.job.batch_size)
            if preempted:
                self.saved.close()
                raise Preempted(f"saved step {step} since this run was told to end")
            if measures or step == total:
                self.evaluate(state, step)
        return state

    def finish(self, running: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Waits for a step, if there is one, and records it."""
        if running is not None:
            step, metrics = running
            self.report.step(step, metrics, record=step % self.options.log_every == 0)

    def evaluate(self, state: replicas.TrainState, step: int) -> None:
        """Records the accuracy on the test images, by the running statistics."""
        right = 0
        for batch in self.job.tests:
            self.guard.enter(f"testing after step {step}")
            right += int(self.functions.correct(state, self.functions.place(batch)))
        self.report.test(step, right / self.job.count)
