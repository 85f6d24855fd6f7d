"""What is wrong with a model's statistics, and what cures it.

`report` looks at variables, and at the Moments of a batch if it is given them. A model
stores these in the collection `batch_moments` if `mutable` names it:

    _, updates = model.apply(variables, x, train=True, mutable=["batch_moments", ...])
    print(report(variables, batch_moments=updates["batch_moments"]))

A Report draws itself (`figure`), and gives scalars for a log (`to_dict`) and rows for a
table (`rows`).

The measures behind it are pure functions of trees, by layer path, that run inside of
jit: `drift`, `channels`, `never_updated`. Others are measures of activations:
`percentiles`, `effective_rank`. `replicas_agree` and `report` run on the host.
"""

from bnjax.diagnostics._judge import report
from bnjax.diagnostics._measures import (
    Agreement,
    Channels,
    Difference,
    Drift,
    channels,
    drift,
    effective_rank,
    never_updated,
    percentiles,
    replicas_agree,
)
from bnjax.diagnostics._report import Finding, Measures, Report

__all__ = [
    "Agreement",
    "Channels",
    "Difference",
    "Drift",
    "Finding",
    "Measures",
    "Report",
    "channels",
    "drift",
    "effective_rank",
    "never_updated",
    "percentiles",
    "replicas_agree",
    "report",
]
