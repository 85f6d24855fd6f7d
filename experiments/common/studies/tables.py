"""What a comparison of a plain and a batch-normalized network comes to."""

import numpy as np
from rich import box
from rich.table import Table

from experiments.common.studies.curves import NAMES, Curves


def against_steps(curves: dict[str, Curves]) -> Table:
    """Test accuracy against steps: each network at its best rate, both at the same."""
    best = {name: network.best() for name, network in curves.items()}
    steps = curves["plain"].steps
    marks = np.searchsorted(steps, steps[-1] * np.array([0.02, 0.05, 0.1, 0.2, 0.4]))
    shown = [index for index in np.unique(marks) if index < len(steps) - 1]
    table = _table("Test accuracy (%) against steps, mean over the seeds")
    table.add_column("network")
    for name in ("rate", *(f"{steps[index]:,}" for index in (*shown, -1))):
        table.add_column(name, justify="right")
    rows = [(name, rate) for rate in sorted(set(best.values())) for name in NAMES]
    for name, rate in rows:
        network = curves[name]
        accuracy = network.test[:, :, rate]
        table.add_row(
            NAMES[name] + (", best" if rate == best[name] else ""),
            f"{network.rates[rate]:g}",
            *(_percent(accuracy[index]) for index in shown),
            _with_spread(accuracy[-1]),
        )
    return table


def steps_to_plain(curves: dict[str, Curves]) -> Table:
    """Steps until the accuracy that the plain network ends with, rate by rate."""
    table = _table(
        "Steps until the mean test accuracy that the plain network ends with,\n"
        "and their range over the seeds (best: by mean final validation accuracy)"
    )
    for name in ("rate", "final %\nwithout BN", "final %\nwith BN"):
        table.add_column(name, justify="right")
    for name in ("steps\nwithout BN", "steps\nwith BN", "ratio"):
        table.add_column(name, justify="right")
    rates = curves["plain"].rates
    best = [curves[name].best() for name in NAMES]
    rows = [(f"{value:g}", rate, rate) for rate, value in enumerate(rates)]
    for label, *pair in (*rows, ("best: {:g}, {:g}".format(*rates[best]), *best)):
        networks = [
            (curves[name], rate) for name, rate in zip(NAMES, pair, strict=True)
        ]
        target = curves["plain"].final(pair[0])
        without, with_bn = (n.steps_to(target, rate) for n, rate in networks)
        ratio = with_bn / without if without else np.inf
        table.add_row(
            label,
            *(_with_spread(n.test[-1, :, rate]) for n, rate in networks),
            *(_steps(n, target, rate) for n, rate in networks),
            f"{ratio:.2f}" if np.isfinite(ratio) else "",
        )
    return table


def conclusion(curves: dict[str, Curves]) -> str:
    """One sentence on the best rates."""
    plain, normalized = (curves[name] for name in NAMES)
    target = plain.final(plain.best())
    first = plain.steps_to(target, plain.best())
    steps = normalized.steps_to(target, normalized.best())
    if not np.isfinite(steps):
        return (
            f"With BN the {target:.2%} that the plain network ends with is not reached."
        )
    return (
        f"With BN the {target:.2%} that the plain network ends with is reached after "
        f"{steps:,.0f} steps, {steps / max(plain.steps[-1], 1):.2f} of its "
        f"{plain.steps[-1]:,} and {steps / max(first, 1):.2f} of the {first:,.0f} "
        "after which it first got there. With BN the end is "
        f"{normalized.final(normalized.best()):.2%}."
    )


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE, show_edge=False, collapse_padding=True)


def _percent(accuracy: np.ndarray) -> str:
    return f"{100 * accuracy.mean():.2f}"


def _with_spread(accuracy: np.ndarray) -> str:
    """The mean and the standard deviation (n - 1) over the seeds."""
    if len(accuracy) == 1:
        return _percent(accuracy)
    return f"{_percent(accuracy)} ± {100 * accuracy.std(ddof=1):.2f}"


def _steps(network: Curves, target: float, rate: int) -> str:
    """Steps until the mean accuracy is the target, and the range over the seeds."""
    each = network.each_steps_to(target, rate)
    values = network.steps_to(target, rate), min(each), max(each)
    middle, low, high = (f"{n:,.0f}" if np.isfinite(n) else "never" for n in values)
    return middle if len(each) == 1 else f"{middle}\n{low}-{high}"
