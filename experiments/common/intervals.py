"""Confidence intervals of means over few seeds."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """From `mean - half` to `mean + half`."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        """With its sign, as is usual for differences: "+1.2 ± 0.8", or "+1.2"."""
        half = f" ± {self.half:.1f}" if np.isfinite(self.half) else ""
        return f"{self.mean:+.1f}{half}"


def interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The confidence interval of the mean of a normal distribution (Student's t).

    mean(x) ± t(level, n - 1) std(x, ddof=1) / sqrt(n)

    Args:
        values: (seed,); to compare two methods, their differences seed by seed.
        level: the probability that such intervals contain the true mean.

    Returns:
        The interval; of fewer than two values its half is infinite.
    """
    from scipy import stats  # slow to import

    if (count := len(values)) < 2:
        return Interval(float(np.mean(values)), np.inf)
    quantile = stats.t.ppf((1 + level) / 2, count - 1)
    half = quantile * np.std(values, ddof=1) / np.sqrt(count)
    return Interval(float(np.mean(values)), float(half))
