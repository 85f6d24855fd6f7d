"""What process 0 tells of a training run: a progress bar, and records in a file."""

import contextlib
import math
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.common import results


class Diverged(Exception):
    """The loss is no longer finite; the message says what to do."""


class Report(contextlib.ExitStack):
    """Speaks in process 0; in the others, which run the same code, it is silent."""

    def __init__(
        self,
        path: Path,
        steps: int,
        console: Console,
        *,
        speaks: bool,
        bar: bool = True,
        title: str = "",
    ):
        """
        Args:
            path: the file of records, which is appended to.
            steps: of the whole run.
            console: where the bar is drawn.
            speaks: whether this is process 0.
            bar: whether there is a progress bar.
            title: before each line that is printed.
        """
        super().__init__()
        self._log = self._bar = None
        self._console = console if speaks else None
        self._title = title
        if speaks:
            self._log = self.enter_context(results.Log(path, digits=None))
        if speaks and bar:
            columns = (
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} steps"),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
            )
            self._bar = self.enter_context(Progress(*columns, console=console))
            self._task = self._bar.add_task("", total=steps, shown="")

    def __enter__(self) -> Self:
        return self

    def add(self, kind: str, **fields: Any) -> None:
        """Appends a record."""
        if self._log is not None:
            self._log.add(kind, **fields)

    def step(self, step: int, metrics: dict[str, jax.Array], *, record: bool) -> None:
        """Waits for the metrics of a step; shows them, and records them if asked to.

        Raises:
            Diverged: the loss is not finite; in every process, silent or not.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]):
            raise Diverged(
                f"the loss is {values['loss']} at step {step}: expected a finite one. "
                "Start anew, in another folder, with a lower --learning-rate."
            )
        if record:
            self.add("step", step=step, **values)
        if self._bar is not None:
            loss = f"loss {values['loss']:.3f}"
            self._bar.update(self._task, completed=step, shown=loss)

    def test(self, step: int, accuracy: float) -> None:
        """Records and prints the accuracy on the test images."""
        self.add("test", step=step, accuracy=accuracy)
        if self._console is not None:
            text = f"step {step:,}: {accuracy:.2%} of the test images are right"
            self._console.print(self._title + text, highlight=False)
