"""The tables of `why_it_works`, and what they come to."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from experiments.common.studies.grid import with_spread
from experiments.common.studies.rated import Rated, table
from experiments.common.studies.why_plot import NETS, shared


def report(known: Rated, rates: Sequence[float]) -> list[Table | str]:
    """By learning rate; and what was measured on the way, at a shared one."""

    def name(net: str) -> str:
        return NETS[net].name

    def accuracy(net: str, rate: float) -> str:
        return with_spread(known.of(net, rate, "test"))

    def loss(net: str, rate: float) -> str:
        return f"{known.of(net, rate, 'loss')[..., -1].mean():.3g}"

    return [
        table("test accuracy (%) at rate", known, rates, name, accuracy),
        table("training loss at the end", known, rates, name, loss),
        around(known),
        conclusion(known),
    ]


def around(known: Rated) -> Table:
    """The medians, over steps, seeds and layers, of what is measured on the way."""
    found = Table(
        *("medians over training", "rate", "range of loss", "change of gradient"),
        *("smoothness", "|G - G'| / |G|", "cosine of G, G'"),
        box=box.MARKDOWN,
    )
    low = shared(known)
    which = dict.fromkeys(
        (net, r) for net in known.names() for r in (low, known.best(net))
    )
    for net, rate in which:
        if (net, rate) in known.records:
            medians = (
                np.ptp(known.of(net, rate, "losses"), axis=-1),
                known.of(net, rate, "changes")[..., 1],
                known.of(net, rate, "smoothness"),
                known.of(net, rate, "shift")[..., 1:],
                known.of(net, rate, "cosine")[..., 1:],
            )
            shown = (f"{np.nanmedian(values):.3g}" for values in medians)
            found.add_row(NETS[net].name, f"{rate:g}", *shown)
    return found


def conclusion(known: Rated) -> str:
    """What BN gains at the plain network's best rate, and at its own."""
    if not {"plain", "bn"} <= set(known.names()):
        return ""
    low, high = known.best("plain"), known.best("bn")
    plain, slow, fast = (
        100 * known.of(net, rate, "test").mean()
        for net, rate in (("plain", low), ("bn", low), ("bn", high))
    )
    return (
        f"At {low:g}, the best rate without BN, BN gains {slow - plain:+.1f} points "
        f"over {plain:.1f} %; at {high:g}, its own best, {fast - plain:+.1f}."
    )
