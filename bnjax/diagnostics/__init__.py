"""What is wrong with a model's statistics, and what cures it.

`report` looks at variables, and at the moments of a batch if it is given them, which a
model leaves in `batch_moments` where that collection is mutable:

    _, updates = model.apply(variables, x, train=True, mutable=["batch_moments", ...])
    print(report(variables, batch_moments=updates["batch_moments"]))

What it looks at are pure functions of trees, by layer path, that run inside of jit:
`drift`, `channels`, `never_updated`; and of activations: `percentiles`,
`effective_rank`. `replicas_agree` and `report` run on the host.
"""

from bnjax.diagnostics._measures import (
    Agreement,
    Difference,
    effective_rank,
    percentiles,
    replicas_agree,
)
from bnjax.diagnostics._report import (
    Channels,
    Drift,
    Finding,
    Report,
    channels,
    drift,
    never_updated,
    report,
)

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
