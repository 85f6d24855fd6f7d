"""What is wrong with a model's statistics, and what cures it.

`report` looks at variables, and at the moments of a batch if it is given them, which a
model leaves in `batch_moments` where that collection is mutable:

    _, updates = model.apply(variables, x, train=True, mutable=["batch_moments", ...])
    print(report(variables, batch_moments=updates["batch_moments"]))

What it looks at are pure functions of trees, by layer path, that run inside of jit:
`drift`, `channels`, `never_updated`; and of activations: `percentiles`,
`effective_rank`. `replicas_agree` and `report` run on the host.
"""

from bnjax.diagnostics._agreement import Agreement, Difference, replicas_agree
from bnjax.diagnostics._features import effective_rank, percentiles
from bnjax.diagnostics._layers import Channels, Drift, channels, drift, never_updated
from bnjax.diagnostics._report import Finding, Report, report

__all__ = [
    "Agreement",
    "Channels",
    "Difference",
    "Drift",
    "Finding",
    "Report",
    "channels",
    "drift",
    "effective_rank",
    "never_updated",
    "percentiles",
    "replicas_agree",
    "report",
]
