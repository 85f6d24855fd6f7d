"""A loss around a point: along its gradient, and as a layer sees it when others move.

Of one loss, a function of the parameters alone: the caller fixes the mini-batch and all
that is drawn. References: Santurkar et al. 2018, definition 2.1 and section 3.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.training.descent import Gradient


class Line(NamedTuple):
    """A loss L along its gradient g, at w - a g for each step size a.

    Attributes:
        start: L(w).
        losses: (step,), L(w - a g).
        changes: (step,), |grad L(w - a g) - g|, whose range is the (lack of)
            predictiveness of the gradient.
        distances: (step,), |a g|.
    """

    start: float
    losses: np.ndarray
    changes: np.ndarray
    distances: np.ndarray

    def smoothness(self) -> float:
        """The effective beta: the most that the gradient changes per distance."""
        return float((self.changes / self.distances).max())


def along_gradient(
    gradient: Gradient, params: Any, steps: Sequence[float] | np.ndarray
) -> Line:
    """Walks along the gradient at `params`, by each of the step sizes.

    Args:
        gradient: of the loss.
        params: where the line begins.
        steps: positive factors of the gradient.
    """
    start, slope = gradient(params)
    found = []
    for size in steps:
        loss, other = gradient(_moved(params, slope, size))
        found.append((loss, _compare(slope, other)[0]))
    losses, changes = np.array(found).T
    _, length, _ = _compare(slope, slope)
    return Line(float(start), losses, changes, np.array(steps) * float(length))


class Shift(NamedTuple):
    """The internal covariate shift of each layer, of one step.

    With G the gradient before the step and G' the one with all earlier layers moved:

    Attributes:
        distance: (layer,), |G - G'|.
        length: (layer,), |G|.
        cosine: (layer,), of the angle between G and G'.
    """

    distance: np.ndarray
    length: np.ndarray
    cosine: np.ndarray


def covariate_shift(
    gradient: Gradient,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    layers: Sequence[Sequence[str]],
) -> Shift:
    """How much the gradient of each layer changes because those below it moved.

    Args:
        gradient: of the loss; the same before and after, with the same mini-batch.
        before: parameters before a step.
        after: parameters after it.
        layers: from the first to the last, the names of each one's parameters.

    Returns:
        Of the first layer, which has none below, 0 and cosine 1.
    """
    _, old = gradient(before)
    moved, new, rows = dict(before), old, []
    for names in layers:
        rows.append(_compare({n: old[n] for n in names}, {n: new[n] for n in names}))
        moved |= {name: after[name] for name in names}
        if len(rows) < len(layers):
            _, new = gradient(moved)
    return Shift(*np.array(rows).T)


@jax.jit
def _moved(params: Any, slope: Any, size: float) -> Any:
    return jax.tree.map(lambda p, g: p - size * g, params, slope)


@jax.jit
def _compare(first: Any, second: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """|first - second|, |first|, and the cosine between them."""

    def dot(x, y):
        return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

    difference = jax.tree.map(jnp.subtract, first, second)
    length = jnp.sqrt(dot(first, first))
    cosine = dot(first, second) / (length * jnp.sqrt(dot(second, second)))
    return jnp.sqrt(dot(difference, difference)), length, cosine
