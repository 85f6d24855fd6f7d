"""Curves of a training run, read from its records, and what is compared in them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.common.results import Record

NAMES = {"plain": "without BN", "bn": "with BN"}


class Curves(NamedTuple):
    """How one kind of network did, at each step that was measured.

    Attributes:
        rates: (rate,), the learning rates.
        steps: (time,).
        validation: (time, seed, rate), accuracies on the validation set.
        test: (time, seed, rate), accuracies on the test set.
        percentiles: (time, seed, rate, 3), of one unit's input to the sigmoid.
    """

    rates: np.ndarray
    steps: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    percentiles: np.ndarray

    def best(self) -> int:
        """The index of the rate with the highest mean final validation accuracy."""
        return int(self.validation[-1].mean(0).argmax())

    def final(self, rate: int) -> float:
        """The final test accuracy at a rate, averaged over the seeds."""
        return float(self.test[-1, :, rate].mean())

    def steps_to(self, target: float, rate: int) -> float:
        """The first measured step with a mean test accuracy of `target`; or inf."""
        return self._first(self.test[:, :, rate].mean(1) >= target)

    def each_steps_to(self, target: float, rate: int) -> list[float]:
        """The same for each seed."""
        return [self._first(reached) for reached in self.test[:, :, rate].T >= target]

    def _first(self, reached: np.ndarray) -> float:
        return float(self.steps[reached.argmax()]) if reached.any() else float("inf")


def last_run(records: Sequence[Record], data: str) -> tuple[Record, dict[str, Curves]]:
    """The newest run on a data set: its first record, and its curves by network.

    They end at the last step at which every network was measured.

    Raises:
        LookupError: there is none, or it was stopped before it measured anything.
    """
    runs = [r for r in records if r["kind"] == "run" and r["settings"]["data"] == data]
    rows: dict[str, list[Record]] = {}
    for record in records:
        if (
            runs
            and record["run"] == runs[-1]["run"]
            and record["kind"] == "measurement"
        ):
            rows.setdefault(record["network"], []).append(record)
    if set(rows) != set(NAMES):
        raise LookupError(
            f"the newest of {len(runs)} runs on {data!r} has measurements of "
            f"{sorted(rows)}: expected {sorted(NAMES)}. Let one train for longer."
        )
    length = min(map(len, rows.values()))
    rates = np.array(runs[-1]["settings"]["learning_rates"])
    return runs[-1], {name: _curves(rates, rows[name][:length]) for name in rows}


def by_step(records: Sequence[Record], kind: str) -> dict[int, Record]:
    """The records of one kind by step, of a run that was stopped and resumed.

    What was recorded after a checkpoint that the run then went on from, was trained
    anew: it is left out, and the last record of a step holds.
    """
    found: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "run":
            found = {s: r for s, r in found.items() if s <= record["from_step"]}
        elif record["kind"] == kind:
            found[record["step"]] = record
    return dict(sorted(found.items()))


def _curves(rates: np.ndarray, rows: Sequence[Record]) -> Curves:
    values = ([row[name] for row in rows] for name in Curves._fields[2:])
    steps = np.array([row["step"] for row in rows])
    return Curves(rates, steps, *(np.array(value, float) for value in values))
