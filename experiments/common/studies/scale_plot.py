"""The picture of `scale_invariance`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.common import panels
from experiments.common.studies.jacobians import QUANTITIES
from experiments.common.studies.scale_kinds import (
    BY_SCALE,
    FACTORS,
    LOOKS,
    SMOOTHED,
    Groups,
    Kind,
    each,
    rate_of,
)
from experiments.common.training.growth import equilibrium

SINGULAR = "singular values: median, 5 to 95 %"


def draw(groups: Groups, data: str, every: int, decay: float, path: Path) -> None:
    """Six panels: the identities, the effective rate, and the Jacobians."""
    seeds = max(map(len, groups.values()))
    title = (
        f"{panels.DATA[data]}, hidden layers of tanh, {seeds} seed{'s' * (seeds > 1)}"
    )
    figure, axes = panels.make(title, (9.8, 5.8), 2, 3)
    _deviations(axes[0], groups)
    _losses(axes[1], groups)
    _rates(axes[2], groups, every)
    _turns(axes[3], groups, every, decay)
    _over_time(axes[4], groups, every)
    _by_scale(axes[5], groups)
    for panel in axes:
        panel.legend(fontsize=6.5, frameon=False)
    panels.save(figure, path)


def _deviations(axes: Axes, groups: Groups) -> None:
    for kind, values, look in each(groups, "deviations", "bn", "plain"):
        shown = len(QUANTITIES) if kind == "bn" else 1  # without BN all are alike
        for i, quantity in enumerate(QUANTITIES[:shown]):
            look |= {"ls": ("-", "--", ":")[i], "marker": "os^"[i], "ms": 3}
            look["label"] = f"{LOOKS[kind].name}: {quantity}"
            panels.line(axes, FACTORS, values[:, i], **look)
    title = "After training: a W instead of W"
    panels.label(axes, title, "a", "relative difference", log="xy")


def _losses(axes: Axes, groups: Groups) -> None:
    shown = "bn small", "bn", "bn large", "bn large fast", "plain"
    for _, values, look in each(groups, "loss", *shown):
        steps = SMOOTHED * (np.arange(values.shape[1]) + 0.5)
        panels.line(axes, steps, values, **look)
    title = "First weights 1/4, 1 and 4 times as large"
    panels.label(axes, title, "training steps", "training loss", log="y")


def _rates(axes: Axes, groups: Groups, every: int) -> None:
    for kind, values, look in each(groups, "length", "bn small", "bn", "bn large"):
        effective = (rate_of(groups, kind) / values**2).mean(-1)
        steps = every * np.arange(effective.shape[1])
        panels.line(axes, steps, effective, marker="o", ms=3, **look)
    title = "The effective rate"
    panels.label(axes, title, "training steps", "rate / |w|², mean of layers", log="y")


def _turns(axes: Axes, groups: Groups, every: int, decay: float) -> None:
    for kind, values, look in each(groups, "turn", "bn", "bn decay"):
        steps = every * (np.arange(values.shape[1]) + 0.5)
        panels.line(axes, steps, values.mean(-1), marker="o", ms=3, **look)
        if kind == "bn decay":
            turn = equilibrium(rate_of(groups, kind), decay)
            axes.axhline(turn, label="√(2 rate L2)", color="0.4", lw=1, ls=":")
    title = "How far weights turn in a step"
    panels.label(axes, title, "training steps", "radians, mean of layers", log="y")


def _over_time(axes: Axes, groups: Groups, every: int) -> None:
    """The median, and from the least percentile to the most."""
    for _, values, look in each(groups, "singular", "plain", "bn"):
        mean = values.mean((0, 2))
        x, colour = every * np.arange(len(mean)), look["color"]
        axes.plot(x, mean[:, 2], marker="o", ms=3, **look)
        axes.fill_between(x, mean[:, 0], mean[:, -1], alpha=0.15, lw=0, color=colour)
    axes.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians over training"
    panels.label(axes, title, "training steps", SINGULAR, log="y")


def _by_scale(axes: Axes, groups: Groups) -> None:
    """Before training (hollow) and after it, the median and from 5 to 95 %."""
    for kind, values, _ in each(groups, "singular", *BY_SCALE):
        usual: Kind = "bn" if kind.startswith("bn") else "plain"
        for point, when in ((0, "before"), (-1, "after")):
            low, _, median, _, high = values[:, point].mean((0, 1))
            shift = (-3 if usual == "plain" else 1) + (2 if point else 0)
            look = {"color": LOOKS[usual].style["color"], "marker": "o", "ms": 4}
            look |= {"mfc": "white"} if point == 0 else {}
            look |= {"label": f"{LOOKS[usual].name}, {when}"} if kind == usual else {}
            bar = [[median - low], [high - median]]
            x = BY_SCALE[kind] * 1.07**shift
            axes.errorbar(x, median, bar, lw=1.2, ls="", capsize=2, **look)
    axes.axhline(1, color="0.4", lw=0.8, ls=":")
    title = "Layer Jacobians before and after training"
    panels.label(axes, title, "scale of the first weights", SINGULAR, log="xy")
