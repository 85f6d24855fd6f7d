"""The tables of `scale_invariance`."""

import numpy as np
from rich import box
from rich.table import Table

from experiments.common.studies.grid import with_spread
from experiments.common.studies.jacobians import PERCENTILES, QUANTITIES
from experiments.common.studies.scale_kinds import (
    BY_SCALE,
    FACTORS,
    LOOKS,
    Groups,
    each,
)
from experiments.common.training.growth import equilibrium


def report(groups: Groups, decay: float) -> list[Table]:
    """Accuracies and weights of each kind; what a W instead of W changes."""
    main = Table(
        *("network", "rate", "validation (%)", "test (%)", "loss at the end"),
        *("weights grew", "prediction off by", "largest cosine of w and g"),
        *("turn per step", "sqrt(2 rate L2)"),
        box=box.MARKDOWN,
    )
    for (kind, rate), records in groups.items():
        length, turn, loss, along = (
            np.array([record[name] for record in records], float)
            for name in ("length", "turn", "loss", "along")
        )
        growth = [r["growth"] for r in records if r["growth"] is not None]
        main.add_row(
            *(LOOKS[kind].name, f"{rate:g}"),
            *(
                with_spread(np.array([record[name] for record in records], float))
                for name in ("validation", "test")
            ),
            f"{loss[:, -1].mean():.3g}",
            f"{(length[:, -1] / length[:, 0]).mean():.3g} x",
            f"{max(growth):.1e}" if growth else "-",
            f"{along.max():.1e}",
            f"{turn[:, -1].mean():.3g}",
            f"{equilibrium(rate, decay):.3g}" if kind == "bn decay" else "-",
        )
    changed = Table(
        "off by, if W is multiplied by", *(f"{a:g}" for a in FACTORS), box=box.MARKDOWN
    )
    singular = Table(
        *("singular values, percentiles", *map(str, PERCENTILES)), box=box.MARKDOWN
    )
    for kind, values, _ in each(groups, "deviations", "bn", "plain"):
        for quantity, row in zip(QUANTITIES, values.max(0), strict=True):
            name = f"{LOOKS[kind].name}: {quantity}"
            changed.add_row(name, *(f"{v:.1e}" for v in row))
    for kind, values, _ in each(groups, "singular", *BY_SCALE):
        for when, point in (("before", 0), ("after", -1)):
            shown = (f"{v:.3g}" for v in values[:, point].mean((0, 1)))
            singular.add_row(f"{LOOKS[kind].name}, {when}", *shown)
    return [main, changed, singular]
