"""Trains one network of section 4.2, or several that vote."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console

from experiments.common import results
from experiments.common.data.examples import ImageData
from experiments.common.data.photos import Splits
from experiments.common.results import Record
from experiments.common.studies import curves, entries
from experiments.common.studies.entries import Cell, Ensemble
from experiments.common.training import runs
from experiments.common.training.guard import Guard
from experiments.common.training.loop import Job, Options
from experiments.common.training.replicas import Replicas, TrainState
from experiments.common.training.report import Diverged
from experiments.common.training.voting import Votes, together, votes


class Trained(NamedTuple):
    """Attributes: what was trained, the last state, the compiled functions."""

    job: Job
    state: TrainState
    functions: Replicas

    def votes(self) -> Votes:
        """On all test images."""
        return votes(self.job.network, self.state, self.functions.place, self.job.tests)


def train(
    data: ImageData | Splits,
    folder: Path,
    options: Options,
    guard: Guard,
    cell: Cell,
) -> tuple[Record, Trained | None]:
    """The curve of a training, and its end unless it diverged.

    Args:
        data: see `entries.load`.
        folder: of its checkpoints; it goes on from the newest.
        options: of this process.
        guard: of this process.
        cell: what is trained.
    """
    job = entries.make_job(data, folder, cell)
    options = dataclasses.replace(options, evaluate_every=cell.evaluate_every)
    last = None
    try:
        last = Trained(job, *runs.run(job, options, guard, Console()))
    except Diverged:
        pass
    first = jax.process_index() == 0  # the others keep no records
    records = results.read(folder / "training.jsonl") if first else []
    measured = curves.by_step(records, "test")
    return {
        "steps": list(measured),
        "accuracy": [record["accuracy"] for record in measured.values()],
        "diverged": last is None,
        "seconds": sum({r["run"]: r["seconds"] for r in records}.values()),
    }, last


def vote(
    data: ImageData | Splits,
    folder: Path,
    options: Options,
    guard: Guard,
    ensemble: Ensemble,
) -> Record:
    """The last accuracies of the members, and that of all together."""
    found: list[Votes] = []
    seconds = 0.0
    for member in ensemble.members:
        place = folder / entries.name(member)
        result, last = train(data, place, options, guard, member)
        seconds += result["seconds"]
        guard.enter("voting", options.start_timeout)
        found += [] if last is None else [last.votes()]
    accuracies = [member.accuracy() for member in found]
    all_of_them = together(found).accuracy() if found else float("nan")
    return {
        "members": accuracies,
        "diverged": len(ensemble.members) - len(found),
        "together": all_of_them,
        "gain": all_of_them - sum(accuracies) / max(len(accuracies), 1),
        "seconds": seconds,
    }
