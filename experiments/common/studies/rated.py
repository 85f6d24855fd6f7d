"""Results of networks, each trained at several learning rates from several seeds."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from experiments.common.results import Record


class Rated(NamedTuple):
    """What is recorded, a record for each seed, by name of the network and rate."""

    records: dict[tuple[str, float], list[Record]]

    @classmethod
    def grouped(cls, results: Iterable[tuple[str, float, Record]]) -> "Rated":
        """From the name, the rate and the record of each training."""
        records: dict[tuple[str, float], list[Record]] = {}
        for name, rate, record in results:
            records.setdefault((name, rate), []).append(record)
        return cls(records)

    def names(self) -> list[str]:
        """Those of which there is something, in the order of training."""
        return list(dict.fromkeys(name for name, _ in self.records))

    def rates(self, name: str) -> list[float]:
        """Those that a network was trained at."""
        return sorted(rate for known, rate in self.records if known == name)

    def of(self, name: str, rate: float, field: str) -> np.ndarray:
        """(seed, ...), NaN for what is not known."""
        found = self.records.get((name, rate), [{field: np.nan}])
        return np.array([record[field] for record in found], float)

    def best(self, name: str) -> float:
        """The rate with the highest mean of "validation", on held-out images."""
        return max(
            self.rates(name), key=lambda r: self.of(name, r, "validation").mean()
        )


def table(
    title: str,
    known: Rated,
    rates: Sequence[float],
    shown: Callable[[str], str],
    value: Callable[[str, float], str],
) -> Table:
    """A row for each network, a column for each rate.

    Args:
        title: of the first column.
        known: the networks.
        rates: the columns.
        shown: the name of a network to what is printed for it.
        value: name and rate to what is printed.
    """
    found = Table(title, *(f"{rate:g}" for rate in rates), box=box.MARKDOWN)
    for name in known.names():
        found.add_row(shown(name), *(value(name, rate) for rate in rates))
    return found
