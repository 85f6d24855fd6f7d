"""Draws the pictures of the pages: "The family", "How it works", "Diagnosing a model".

    python docs/figures.py

It needs matplotlib and bnjax's dependencies, and writes SVG files to
docs/pages/assets/figures. What a picture shows of data is computed by bnjax.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

import bnjax

FOLDER = Path(__file__).parent / "pages" / "assets" / "figures"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GREY = "#dddddd"
matplotlib.rcParams.update(
    {"font.size": 9, "svg.hashsalt": "bnjax", "svg.fonttype": "path"}
)

BATCH, FEATURES, SPACE = 4, 4, 3
Colour = Callable[[int, int, int], str]
"""(example, feature, position) -> the colour of a value."""


# Which values share statistics: a block of batch x feature x space


def block(axes: Axes, title: str, colour: Colour) -> None:
    """A block of values; features to the right, examples to the back, space upwards."""
    step = np.array([0.42, 0.3])  # of one example to the back

    def quad(corner: Sequence[float], u: np.ndarray, v: np.ndarray, face: str) -> None:
        start = np.array(corner)
        points = [start, start + u, start + u + v, start + v]
        axes.add_patch(Polygon(points, facecolor=face, edgecolor="white", lw=1))

    right, up = np.array([1.0, 0.0]), np.array([0.0, 0.62])
    for feature in range(FEATURES):
        for position in range(SPACE):
            corner = feature * right + position * up
            quad(corner, right, up, colour(0, feature, position))
        for example in range(BATCH):
            corner = feature * right + SPACE * up + example * step
            quad(corner, right, step, colour(example, feature, SPACE - 1))
    for position in range(SPACE):
        for example in range(BATCH):
            corner = FEATURES * right + position * up + example * step
            quad(corner, step, up, colour(example, FEATURES - 1, position))
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-0.6, FEATURES + BATCH * step[0] + 0.9)
    axes.set_ylim(-0.55, SPACE * up[1] + BATCH * step[1] + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(FEATURES / 2, -0.3, "feature", ha="center", va="center")
    axes.text(-0.25, SPACE * up[1] / 2, "space", rotation=90, va="center", ha="center")
    middle = FEATURES * right + BATCH / 2 * step
    x, y = middle + np.array([0.45, -0.2])
    axes.text(x, y, "batch", rotation=36, va="center", ha="center")


def shades(colour: str, count: int) -> list[str]:
    """From dark to light."""
    base = np.array(matplotlib.colors.to_rgb(colour))
    parts = np.linspace(0, 0.65, count)
    return [matplotlib.colors.to_hex(base + (1 - base) * part) for part in parts]


def of_feature(colour: str) -> Colour:
    columns = shades(colour, FEATURES)
    return lambda example, feature, position: columns[feature]


def ghost(example: int, feature: int, position: int) -> str:
    return shades((BLUE, ORANGE)[example // 2], FEATURES)[feature]


def split(example: int, feature: int, position: int) -> str:
    domain = (0, 1, 1, 0)[example]
    return shades((BLUE, GREEN)[domain], FEATURES)[feature]


def decorrelated(example: int, feature: int, position: int) -> str:
    return (BLUE, PINK)[feature // 2]


def sets_of_family() -> Figure:
    """One picture for all layers: the same colour, the same statistics."""
    figure = Figure((8.6, 4.6), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    block(
        panels[0],
        "BatchNorm, BatchRenorm\none mean and variance per feature",
        of_feature(BLUE),
    )
    block(panels[1], "GhostBatchNorm\nper feature and group of examples", ghost)
    block(panels[2], "SplitBatchNorm\nper feature and domain", split)
    block(
        panels[3],
        "DecorrelatedBatchNorm\none covariance per group of features",
        decorrelated,
    )
    block(
        panels[4],
        "for comparison: layer norm\nper example",
        lambda example, feature, position: shades(ORANGE, BATCH)[example],
    )
    block(
        panels[5],
        "for comparison: group norm\nper example and group of features",
        lambda example, feature, position: shades((ORANGE, GREEN)[feature // 2], BATCH)[
            example
        ],
    )
    return figure


# Batch renormalization


def renorm() -> Figure:
    """Where the values of three batches go, by BN and by renorm."""
    running_mean, running_var = jnp.zeros(1), jnp.ones(1)
    key = jax.random.key(1)
    batches = [
        ("near the running statistics", 0.3, 0.9, BLUE),
        ("far: mean 2, std 0.5", 2.0, 0.5, ORANGE),
        ("farther than r_max, d_max: mean 8", 8.0, 1.0, GREEN),
    ]
    figure = Figure((8.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    grid = np.linspace(-3.5, 11.5, 150)
    for axes, title in zip(
        panels,
        ("before: x", "BatchNorm", "BatchRenorm (r_max = 3, d_max = 5)"),
        strict=True,
    ):
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
        axes.axvspan(-1, 1, color="0.92", zorder=0)
        axes.set_xlim(-3.5, 11.5)
        axes.set_ylim(-2.35, 0.95)
        axes.set_xlabel("value")
    for level, (name, mean, std, colour) in enumerate(batches):
        x = mean + std * jax.random.normal(key, (64, 1))
        by_batch, _ = bnjax.batch_norm(x)
        by_renorm, _ = bnjax.renorm.batch_renorm(x, running_mean, running_var)
        for axes, values in zip(panels, (x, by_batch, by_renorm), strict=True):
            values = np.ravel(values)
            density = np.exp(-((grid[:, None] - values) ** 2) / 0.18).mean(1)
            height = -level + 0.75 * density / density.max()
            axes.fill_between(grid, -level, height, color=colour, alpha=0.75, lw=0)
        panels[0].text(
            11.5, -level - 0.16, name, ha="right", fontsize=7.5, color=colour
        )
    return figure


# Whitening


def whitening() -> Figure:
    """Two correlated features: standardized, and whitened in three ways."""
    draws = jax.random.normal(jax.random.key(2), (200, 2))
    x = draws @ jnp.array([[2.0, 1.2], [0.0, 0.5]]) + jnp.array([3.0, 1.0])
    far = (x[:, 0] > jnp.quantile(x[:, 0], 0.85)).tolist()
    results = {
        "x": x,
        "BatchNorm\nvariances 1, still correlated": bnjax.batch_norm(x)[0],
        'DecorrelatedBatchNorm, "eigh"\nZCA: turns as little as possible': (
            bnjax.whiten.decorrelate(x)[0]
        ),
        '"cholesky"\nalso white, but turned': bnjax.whiten.decorrelate(
            x, method="cholesky"
        )[0],
    }
    figure = Figure((8.6, 2.6), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, (title, values) in zip(panels, results.items(), strict=True):
        values = np.asarray(values)
        colours = [ORANGE if one else BLUE for one in far]
        axes.scatter(*values.T, s=4, c=colours, lw=0)
        centre = values.mean(0)
        radius = 7 if title == "x" else 3.8
        axes.set_xlim(centre[0] - radius, centre[0] + radius)
        axes.set_ylim(centre[1] - radius, centre[1] + radius)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("feature 1", fontsize=8)
    panels[0].set_ylabel("feature 2", fontsize=8)
    return figure


# How it works


def box(axes: Axes, at: tuple[float, float], text: str, colour: str, width=1.7) -> None:
    x, y = at
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.3),
            width,
            0.6,
            boxstyle="round,pad=0.04",
            facecolor=matplotlib.colors.to_rgba(colour, 0.2),
            edgecolor=colour,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start, end, text="", colour="0.3", style="-|>") -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color=colour)
    )
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.08, text, ha="center", va="bottom", fontsize=7.5)


def canvas(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, x)
    axes.set_ylim(0, y)
    axes.axis("off")
    return figure, axes


def merging() -> Figure:
    """Moments of parts are merged; the order does not matter."""
    figure, axes = canvas(8.6, 2.6, 10, 3.2)
    parts = ("values {4, 7}", "value {5}", "no value (masked)")
    results = (
        "count 2\nmean 5.5, m2 4.5",
        "count 1\nmean 5, m2 0",
        "count 0\nthe identity",
    )
    colours = (BLUE, ORANGE, "0.5")
    for y, part, result, colour in zip(
        (2.7, 1.6, 0.5), parts, results, colours, strict=True
    ):
        box(axes, (1.2, y), part, colour, 2.0)
        arrow(axes, (2.3, y), (3.3, y), "moments")
        box(axes, (4.4, y), result, colour, 2.0)
        arrow(axes, (5.5, y), (7.3, 1.6 + (y - 1.6) * 0.15))
    axes.text(6.3, 2.55, "merge, in any order", fontsize=7.5)
    box(axes, (8.6, 1.6), "count 3\nmean 5.33, m2 4.67", GREEN, 2.4)
    return figure


def collective() -> Figure:
    """What replicas exchange in the forward and in the backward pass."""
    figure, axes = canvas(8.6, 3.3, 10, 4)
    axes.text(0.1, 3.75, "forward", fontsize=9, weight="bold")
    axes.text(5.3, 3.75, "backward", fontsize=9, weight="bold")
    forward = ("$x$ of replica {}", "$\\Sigma d,\\ \\Sigma d^2$", "mean, var", "$y$")
    backward = ("$\\bar y$ of replica {}", "$S,\\ T$", "$S,\\ T$ of all", "$\\bar x$")
    for left, names in ((0.0, forward), (5.2, backward)):
        for number, y in enumerate((3.1, 2.1, 1.1)):
            box(axes, (left + 0.65, y), names[0].format(number), BLUE, 1.15)
            arrow(axes, (left + 1.27, y), (left + 1.5, y))
            box(axes, (left + 1.95, y), names[1], BLUE, 0.8)
            arrow(axes, (left + 2.4, y), (left + 2.75, y))
            arrow(axes, (left + 3.05, y), (left + 3.3, y))
            box(axes, (left + 3.7, y), names[2], GREEN, 0.72)
            arrow(axes, (left + 4.1, y), (left + 4.35, y))
            axes.text(left + 4.45, y, names[3], va="center", fontsize=9)
        axes.add_patch(
            FancyBboxPatch(
                (left + 2.82, 0.75),
                0.16,
                2.7,
                boxstyle="round,pad=0.04",
                facecolor=ORANGE,
                edgecolor="none",
            )
        )
        axes.text(
            left + 2.9,
            0.3,
            "one all-reduce\nof 2C numbers",
            ha="center",
            va="center",
            fontsize=8,
            color=ORANGE,
        )
    return figure


def shifted() -> Figure:
    """The largest error of 64 variances in float32, against |mean| / std."""
    ratios = np.logspace(0, 5, 26)
    draws = np.random.default_rng(0).standard_normal((4096, 64))

    def naive(x: jax.Array, shift: jax.Array) -> jax.Array:
        return (x * x).mean(0) - x.mean(0) ** 2

    def shifted(x: jax.Array, shift: jax.Array) -> jax.Array:
        d = x - shift
        return (d * d).mean(0) - d.mean(0) ** 2

    def ours(x: jax.Array, shift: jax.Array) -> jax.Array:
        return bnjax.moments(x).variance()

    lines = {
        "E[x²] - E[x]²": (naive, ORANGE, "o"),
        "shifted sums, shift 3 std from the mean": (shifted, PINK, "s"),
        "bnjax.moments, no shift given": (ours, BLUE, "^"),
    }
    figure = Figure((6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (function, colour, marker) in lines.items():
        function = jax.jit(function)
        errors = []
        for ratio in ratios:
            x = (draws + ratio).astype(np.float32)
            exact = x.astype(np.float64).var(0)
            found = np.asarray(function(jnp.asarray(x), jnp.float32(ratio - 3)))
            errors.append(np.max(abs(found - exact) / exact))
        axes.loglog(ratios, errors, marker, ms=4, c=colour, label=name)
    axes.axhline(1e-5, color="0.6", lw=1, ls="--")
    axes.text(1.1, 1.3e-5, "1e-5", fontsize=8, color="0.4")
    axes.set_xlabel("|mean| / std")
    axes.set_ylabel("largest relative error of the variance")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def diagnosing() -> Figure:
    """A network of 16 layers, into which seven faults were put."""

    class Net(nn.Module):
        momenta: tuple[float, ...]

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for i, momentum in enumerate(self.momenta):
                x = nn.Dense(24, use_bias=False, name=f"block_{i}_dense")(x)
                norm = bnjax.BatchNorm(False, momentum=momentum, name=f"block_{i}")
                x = nn.relu(norm(x))
            return x

    def apply(momenta: tuple[float, ...], variables, x: jax.Array):
        collections = ["batch_stats", "batch_moments"]
        return Net(momenta).apply(variables, x, mutable=collections)[1]

    momenta, key = (0.9,) * 16, jax.random.key(0)
    variables = Net(momenta).init(key, jnp.zeros((2, 24)))
    step = jax.jit(apply, static_argnums=0)
    for seed in range(60):
        x = jax.random.normal(jax.random.key(seed), (512, 24))
        variables |= {"batch_stats": step(momenta, variables, x)["batch_stats"]}
    variables = jax.tree.map(np.array, variables)
    stats, params = variables["batch_stats"], variables["params"]
    stats["block_2"]["mean"][:], stats["block_2"]["var"][:] = 0, 1
    params["block_4_dense"]["kernel"][:, :9] = 0
    params["block_6"]["scale"][3:6] = 0
    stats["block_8"]["mean"] += 4
    stats["block_12"]["var"][::2] *= 30
    momenta = (0.9,) * 10 + (0.1, 1.0) + (0.9,) * 4
    updates = step(momenta, variables, jax.random.normal(key, (2048, 24)))
    return bnjax.diagnostics.report(
        variables,
        batch_moments=updates["batch_moments"],
        updated=updates["batch_stats"],
    ).figure()


FIGURES = {
    "family": sets_of_family,
    "renorm": renorm,
    "whitening": whitening,
    "merge": merging,
    "collective": collective,
    "variance_error": shifted,
    "diagnosing": diagnosing,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = FOLDER / f"{name}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
