"""Results of networks, each trained at several learning rates from several seeds."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from experiments.common.results import Record


class ByRate(NamedTuple):
    """What is recorded, a record for each seed, by name of the network and rate."""

    records: dict[tuple[str, float], list[Record]]

    @classmethod
    def grouped(cls, results: Iterable[tuple[str, float, Record]]) -> "ByRate":
        """From the name, the rate and the record of each training."""
        records: dict[tuple[str, float], list[Record]] = {}
        for name, rate, record in results:
            records.setdefault((name, rate), []).append(record)
        return cls(records)

    def names(self) -> list[str]:
        """The networks of which there is a record, in the order of training."""
        return list(dict.fromkeys(name for name, _ in self.records))

    def rates(self, name: str) -> list[float]:
        """The rates that a network was trained at."""
        return sorted(rate for known, rate in self.records if known == name)

    def of(self, name: str, rate: float, field: str) -> np.ndarray:
        """A field of the records: (seed, ...), NaN for what is not known."""
        found = self.records.get((name, rate), [{field: np.nan}])
        return np.array([record[field] for record in found], float)

    def best(self, name: str) -> float:
        """The rate with the highest mean of "validation", on held-out images."""
        return max(
            self.rates(name), key=lambda r: self.of(name, r, "validation").mean()
        )

    def table(
        self,
        title: str,
        rates: Sequence[float],
        value: Callable[[str, float], str],
        shown: Callable[[str], str] = str,
    ) -> Table:
        """A row for each network, a column for each rate.

        Args:
            title: of the first column.
            rates: the columns.
            value: name and rate to what is printed.
            shown: the name of a network to what is printed for it.
        """
        table = Table(title, *(f"{rate:g}" for rate in rates), box=box.MARKDOWN)
        for name in self.names():
            table.add_row(shown(name), *(value(name, rate) for rate in rates))
        return table


def percent(shares: np.ndarray) -> str:
    """(seed,) -> mean and standard deviation (n - 1), in percent."""
    known = 100 * shares[np.isfinite(shares)]
    if len(known) < 2:
        return f"{known[0]:.1f}" if len(known) else "-"
    return f"{known.mean():.1f} ± {known.std(ddof=1):.1f}"
