"""An experiment of many trainings: those that are missing are run, and all are drawn.

What decides the result of one training is a cell, a frozen dataclass. Each result is
one line in the experiment's file, with its cell; a cell whose line is there is not
trained again. If a run was stopped, repeat the command to continue. Results are cached
by `Cell`, not by code: after changing the code use a new --out.

Networks as small as these use one core. Two processes share the trainings of a run:

    python -m experiments.normalizers --part 1 2 & python -m experiments.normalizers \
        --part 2 2; wait; python -m experiments.normalizers --plot-only
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments.common import results
from experiments.common.images import DataError
from experiments.common.results import Record

RUNS = Path("runs")
"""Where results go by default; git ignores it."""
EXPECTED = DataError, FileNotFoundError, LookupError, ValueError
COLUMNS = (
    *(BarColumn(), MofNCompleteColumn()),
    *(TextColumn("{task.fields[shown]}"), TimeRemainingColumn()),
)


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go: the options of all that measures."""

    out: Path = RUNS
    """The folder of the records, to which they are appended, and of the pictures."""
    record: bool = False
    """Write the records and the pictures that are committed, in experiments/."""
    smoke: bool = False
    """A run of seconds, to see that all works; it keeps nothing without --out."""
    plot_only: bool = False
    """Measure nothing; print and draw what there is of these settings again."""


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    """The options that every experiment has."""

    data_dir: Path | None = None
    """A local copy of the data; see experiments/common/images.py."""
    part: tuple[int, int] = (1, 1)
    """K N: run only the K-th of N parts of the trainings, and draw nothing."""


class Trained(NamedTuple):
    """A cell, what is recorded of it, and a few words beside the progress bar."""

    cell: Any
    result: Record
    shown: str = ""


class Study(NamedTuple):
    """What one experiment is made of; `config` extends `Settings`.

    Attributes:
        name: of its file of results.
        cells: (config) -> every training that belongs to a run.
        train: (config, cells) -> each of them, trained; as they end, in any order.
        report: (config, {cell: result}) -> tables and sentences to be printed.
        draw: (config, {cell: result}, folder) -> the pictures that it wrote there.
        smoke: the settings of a run of seconds.
    """

    name: str
    cells: Callable[[Any], Sequence[Any]]
    train: Callable[[Any, Sequence[Any]], Iterator[Trained]]
    report: Callable[[Any, dict[Any, Record]], Sequence[Any]]
    draw: Callable[[Any, dict[Any, Record], Path], Sequence[Path]]
    smoke: dict[str, Any]


def main(study: Study, config: Any) -> int:
    """Trains, prints and draws; returns the exit status."""
    return start(functools.partial(_main, study), study.smoke, config)


def start(work: Callable[[Any], int], smoke: dict[str, Any], config: Any) -> int:
    """Does the work of an experiment; with --smoke, in seconds, and keeps nothing.

    Args:
        work: (config) -> the exit status.
        smoke: the settings of a run of seconds.
        config: extends `Output`.
    """
    console = Console()
    try:
        if not config.smoke:
            return work(config)
        # So few steps take less time than their optimization.
        jax.config.update("jax_disable_most_optimizations", True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) if config.out == RUNS else config.out
            changed = {"smoke": False, "record": False, "out": out, **smoke}
            return work(dataclasses.replace(config, **changed))
    except EXPECTED as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here", soft_wrap=True)
        return 130


def _main(study: Study, config: Any) -> int:
    console = Console()
    console.width = max(console.width, 120)  # tables whole, to be copied
    path, folder = results.places(study.name, config.out, config.record)
    if not config.plot_only:
        complete(study, config, path, console)
    if config.part != (1, 1):
        return 0
    found = load(study, config, path)
    console.print(*study.report(config, found), sep="\n", highlight=False)
    drawn = study.draw(config, found, folder)
    for file in (path, *drawn):
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)
    return 0


def complete(study: Study, config: Any, path: Path, console: Console) -> None:
    """Trains the cells that the file has no result of, and appends theirs.

    Raises:
        ValueError: a part that does not exist.
    """
    part, parts = config.part
    if not 1 <= part <= parts:
        raise ValueError(
            f"received part {part} of {parts}: expected 1 to {max(parts, 1)} of at "
            "least 1, as in --part 1 2"
        )
    known = finished(path)
    cells = list(dict.fromkeys(study.cells(config)))[part - 1 :: parts]  # each once
    missing = [cell for cell in cells if key(cell) not in known]
    if not missing:
        return
    with results.Log(path) as log, Progress(*COLUMNS, console=console) as progress:
        log.add("run", experiment=study.name, **results.stamp())
        done = len(cells) - len(missing)
        bar = progress.add_task("", total=len(cells), completed=done, shown="")
        for cell, result, shown in study.train(config, missing):
            log.add("cell", cell=dataclasses.asdict(cell), result=result)
            progress.update(bar, advance=1, shown=shown)
        log.add("end", finished=True)


def load(study: Study, config: Any, path: Path) -> dict[Any, Record]:
    """What there is of the cells of `config`.

    Raises:
        LookupError: nothing.
    """
    known = finished(path)
    found = {c: known[key(c)] for c in study.cells(config) if key(c) in known}
    if not found:
        raise LookupError(
            f"none of the {len(known)} trainings in {path} has these settings: "
            "expected some. Leave out --plot-only to run them."
        )
    return found


def finished(path: Path) -> dict[str, Record]:
    """The results in the file, the newest of each cell, by `key`."""
    records = results.read(path) if path.exists() else []
    cells = (record for record in records if record["kind"] == "cell")
    return {json.dumps(r["cell"], sort_keys=True): r["result"] for r in cells}


def key(cell: Any) -> str:
    """A cell as it stands in the file."""
    return json.dumps(results.plain(dataclasses.asdict(cell)), sort_keys=True)
