"""The networks of `scale_invariance`: names, looks, and what is recorded of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.common.results import Record

Kind = Literal[
    "bn",
    "bn large",
    "bn small",
    "bn large fast",
    "bn decay",
    "plain",
    "plain large",
    "plain small",
]
FACTORS = 1e-3, 1e-2, 1e-1, 0.5, 2.0, 1e1, 1e2, 1e3
"""Of the weights after training: a in BN((aW)u)."""
SMOOTHED = 50  # steps whose losses are averaged
BY_SCALE: dict[Kind, float] = {
    "bn small": 0.25,
    "bn": 1.0,
    "bn large": 4.0,
    "plain small": 0.25,
    "plain": 1.0,
    "plain large": 4.0,
}
"""Of the first weights, those with BN first."""
Groups = Mapping[tuple[Kind, float], Sequence[Record]]
"""Results of the seeds, by kind and rate."""


class Look(NamedTuple):
    """A name, and how a line is drawn."""

    name: str
    style: dict[str, Any]


BLUE, SKY, NAVY, GREEN, PINK = "#0072b2", "#56b4e9", "#1a1a6c", "#009e73", "#cc79a7"
ORANGE = "#d55e00"
LOOKS: dict[Kind, Look] = {
    "bn": Look("with BN", {"color": BLUE}),
    "bn large": Look("with BN, 4 W", {"color": NAVY}),
    "bn small": Look("with BN, W / 4", {"color": SKY}),
    "bn large fast": Look("with BN, 4 W, rate x 16", {"color": PINK, "ls": "--"}),
    "bn decay": Look("with BN and L2", {"color": GREEN}),
    "plain": Look("without BN", {"color": ORANGE}),
    "plain large": Look("without BN, 4 W", {"color": ORANGE}),
    "plain small": Look("without BN, W / 4", {"color": ORANGE}),
}


def each(
    groups: Groups, field: str, *kinds: Kind
) -> Iterator[tuple[Kind, np.ndarray, dict[str, Any]]]:
    """Of those kinds that there are: (seed, ...), and how a line of it is drawn."""
    for kind in kinds:
        for (known, _), records in groups.items():
            if known == kind:
                values = np.array([record[field] for record in records], float)
                yield kind, values, {"label": LOOKS[kind].name, **LOOKS[kind].style}


def rate_of(groups: Groups, kind: Kind) -> float:
    """At which a kind was trained."""
    return next(rate for known, rate in groups if known == kind)
