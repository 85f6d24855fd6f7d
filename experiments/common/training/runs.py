"""Training that can be killed: what a program does around the loop.

`experiments.data_parallel` says how it works.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.common import results
from experiments.common.data import pipeline
from experiments.common.data.idx import DataError
from experiments.common.settings import SettingsError
from experiments.common.training import commands, replicas
from experiments.common.training.checkpoints import CheckpointError, Checkpoints
from experiments.common.training.cluster import Preempted
from experiments.common.training.guard import FAILED, Guard
from experiments.common.training.loop import Job, Loop, Options
from experiments.common.training.report import Diverged, Report

EXPECTED = DataError, SettingsError, CheckpointError, Diverged


def supervise(
    module: str,
    options: Options,
    folder: Path,
    checkpoints: Path,
    work: Callable[[Guard], int],
    console: Console,
) -> int:
    """Works under a guard; what is expected to go wrong ends with a message.

    Args:
        module: what the command line names, to go on.
        options: of this process.
        folder: of the run, which all processes share.
        checkpoints: where they are, for the advice.
        work: what is done; returns the exit status.
        console: for messages.

    Returns:
        The exit status.
    """
    advice = commands.advice(module, options, checkpoints)
    with Guard(
        folder / "processes",
        active=options.several,
        timeout=options.timeout,
        advice=advice,
    ) as guard:
        try:
            return guard.end(work(guard))
        except EXPECTED as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            return guard.end(1)
        except Preempted as error:
            console.print(f"{error}\n{advice}", markup=False, soft_wrap=True)
            return guard.end(FAILED)
        except KeyboardInterrupt:
            console.print(advice, markup=False, soft_wrap=True)
            return guard.end(130)


def run(
    job: Job, options: Options, guard: Guard, console: Console
) -> tuple[replicas.TrainState, replicas.Replicas]:
    """Trains together with the other processes, and records how it goes.

    Returns:
        The last state, and the compiled functions.

    Raises:
        CheckpointError: see `Checkpoints.begin`.
        Diverged: the loss is no longer finite.
        Preempted: told to end.
    """
    guard.enter("compiling", options.start_timeout)
    first: Any = job.batches[0]  # None only of data sets that leave some out
    state, functions = replicas.start(
        job.network, job.optimizer, first, job.tests[0], job.seed
    )
    guard.enter("opening the checkpoints", options.start_timeout)
    folder = job.folder / "checkpoints"
    saved = Checkpoints(folder, job.settings, replicas.digest, keep=options.keep)
    state, examples = saved.begin(state, resume=options.resume)
    guard.enter("waiting for the others to compile", options.start_timeout)
    multihost_utils.sync_global_devices("compiled")

    path, speaks = job.folder / f"{job.name}.jsonl", jax.process_index() == 0
    with Report(
        path, job.total, console, speaks=speaks, bar=job.bar, title=job.title
    ) as report:
        layout = {"processes": jax.process_count(), "devices": jax.device_count()}
        step = examples // job.batch_size
        report.add("run", experiment=job.name, from_step=step, **layout)
        report.add("about", settings=job.about, **results.stamp())
        loop = Loop(job, options, guard, report, functions, saved)
        try:
            state = loop.train(state, pipeline.from_step(job.batches, step), step)
        except Diverged:
            saved.close()
            raise
        guard.enter("waiting for the last checkpoint")
        saved.close()
        guard.enter("comparing the devices")
        report.add("end", step=job.total, sha256=replicas.compare(state))
    return state, functions


def check(batch_size: int) -> None:
    """Raises SettingsError if a batch cannot be split evenly over the devices."""
    if batch_size % jax.device_count():
        raise SettingsError(
            f"received --batch-size {batch_size}: expected a multiple of the "
            f"{jax.device_count()} devices."
        )
