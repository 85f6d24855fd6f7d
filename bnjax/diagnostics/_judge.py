"""What is wrong with the layers of a model: judges their measures, names cures."""

import functools
import operator
import re
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _trees
from bnjax.diagnostics._measures import (
    Agreement,
    Channels,
    Difference,
    Drift,
    batch_stats_in,
    channels,
    counts_of,
    drift,
    moments_of,
    never_updated,
    statistics_of,
)
from bnjax.diagnostics._momentum import SMALLEST, momentum_of
from bnjax.diagnostics._report import Finding, Measures, Report
from bnjax.moments import Moments

_CURES = {
    "statistics never updated": (
        "train with mutable=['batch_stats'] and keep the collection that apply "
        "returns; after a new start reload the checkpoint's batch_stats"
    ),
    "exploded": (
        "a smaller learning rate or warm-up; statistics with NaN never recover: reset "
        "them, and set skip_nonfinite_updates=True"
    ),
    "dead": (
        "a smaller learning rate, less weight decay on what feeds the layer; or prune "
        "these channels"
    ),
    "gamma near zero": (
        "keep weight decay off the scales; or prune these channels. Expected where "
        "the scale starts at zero"
    ),
    "mean drifted": (
        "train longer, take a smaller momentum, or estimate population statistics; "
        "check that inputs are prepared as in training"
    ),
    "momentum too small": (
        "momentum is the weight of the old value: write momentum=0.9 where PyTorch has "
        "0.1 (convert.momentum_from_torch)"
    ),
    "not updated by the step": (
        "use_running_average=False and a momentum below 1 in training; keep the "
        "batch_stats that apply returns"
    ),
    "replicas differ": (
        "pass axis_name to the layers, so that replicas share their statistics; unite "
        "those that differ with training.merge_batch_stats"
    ),
}
_CURES["variance drifted"] = _CURES["mean drifted"]


def report(
    variables: Mapping[str, Any],
    *,
    batch_moments: Any = None,
    updated: Any = None,
    replicas: Agreement | None = None,
    epsilon: float = 1e-5,
    largest_drift: float = 1.0,
) -> Report:
    """What is wrong with the layers of a model, how bad it is, and what cures it.

    Looks for statistics that were never updated, for exploded and dead channels, for
    scales near zero; and with `batch_moments` for batches that lie far from the
    running statistics. If there is a batch, dead and exploded channels are looked for
    in its statistics, because the running ones take long to change. Channels of a
    SplitBatchNorm are [domain, channel].

    With `updated` too, it reads off each layer's momentum m, the weight of the old
    value, from the step itself:

        mean_updated = m mean + (1 - m) mean_B

    and reports statistics that the step did not update, and momenta below 0.4, with
    which the statistics are those of the last batch or two: PyTorch's momentum of 0.1
    is 0.9 here.

    Args:
        variables: {"params": ..., "batch_stats": ...}.
        batch_moments: the collection `batch_moments` that `apply` returns: the Moments
            of one batch or of many.
        updated: the collection `batch_stats` that the same `apply` returns; the one in
            `variables` is that before the step, and `batch_moments` are those of this
            one step.
        replicas: what `replicas_agree` returns for `batch_stats`, or for variables.
        epsilon: the epsilon of the layers.
        largest_drift: the limit L. Reported are a mean that is more than L running
            standard deviations away from the running mean, and a standard deviation
            that is more than 1 + L times larger or smaller than the running one, but
            only if chance does not explain it: batches of independent, normal values
            give a report of drift less than once in 1,000. Infinite for no report of
            drift.

    Returns:
        Report. Iterate over it, print it, or `rich.print` it; draw it with `figure()`.
        Empty, and false, where nothing was found.

    Raises:
        ValueError: no `batch_stats` in `variables`; `batch_moments` or `updated` of
            other layers; `updated` without `batch_moments`; a negative limit.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.array([1.0, 0.5, 0.0])}
    >>> for finding in report({"batch_stats": {"norm": stats}}):
    ...     print(finding.layer, "|", finding.what, "|", finding.figure)
    norm | dead | 1 of 3 channels (2)

    A step with PyTorch's momentum:

    >>> old, batch = jnp.array([2.0, 5.0]), jnp.array([1.0, 4.0])
    >>> found = report(
    ...     {"batch_stats": {"norm": {"mean": old, "var": jnp.ones(2)}}},
    ...     batch_moments={"norm": {"moments": Moments(8.0, batch, jnp.full(2, 8.0))}},
    ...     updated={"norm": {"mean": 0.1 * old + 0.9 * batch, "var": jnp.ones(2)}},
    ... )
    >>> print(found.findings[0].what, "|", found.findings[0].figure)
    momentum too small | 0.1, an average of 1.1 batches

    References: Wu & Johnson 2021, section 3 (stale running statistics); Chernoff 1952
    (the bound on chance).
    """
    if not largest_drift >= 0:
        raise ValueError(
            f"largest_drift={largest_drift} is a distance: expected a number >= 0. "
            "Write largest_drift=1.0, or inf for no report of drift."
        )
    batch_stats = batch_stats_in(variables)
    running = statistics_of(batch_stats)
    running = {path: running[path] for path in sorted(running, key=_natural)}
    others = {_trees.layer_of(p) for p in _trees.flatten(batch_stats)[0]} - {*running}
    batches, drifts = {}, {}
    if batch_moments is not None:
        batches = moments_of(batch_moments)
        if batches or not others:
            drifts = drift(running, batch_moments, epsilon=epsilon)
    after = running if updated is None else _checked_updated(updated, batches, running)
    initial = {k: np.asarray(v) for k, v in never_updated(running).items()}
    params = {"params": variables.get("params", {})}
    stored = channels(params | {"batch_stats": running}, epsilon=epsilon)
    latest = running | {path: _latest(running[path], b) for path, b in batches.items()}
    now = channels(params | {"batch_stats": latest}, epsilon=epsilon)
    features = sum(np.size(each.mean) for each in drifts.values())
    differences = {} if replicas is None else _by_layer(replicas)
    findings, measures = [], []
    for path in running:
        flags = now[path]._replace(exploded=now[path].exploded | stored[path].exploded)
        flags = jax.device_get(flags)
        moved = drifted = momentum = apart = None
        figures = _never_figures(initial[path]) | _channel_figures(flags)
        if path in drifts:
            count = counts_of(batches[path])
            ignored = (
                flags.dead | flags.exploded | (count <= 1) | initial[path][..., None]
            )
            moved = jax.tree.map(
                functools.partial(np.where, ignored, np.nan), drifts[path]
            )
            drifted = _drifted(moved, largest_drift, count, features)
            figures |= _drift_figures(moved, drifted)
        if updated is not None:
            momentum = np.full(initial[path].shape, np.nan)
            if path in batches:
                measured = momentum_of(running[path], after[path], batches[path])
                momentum = np.where(initial[path], np.nan, measured)
            figures |= _momentum_figures(momentum)
        if replicas is not None:
            apart = differences[path].largest if path in differences else 0.0
        if path in differences:
            figures["replicas differ"] = differences[path].figure
        findings += [Finding(path, k, v, _CURES[k]) for k, v in figures.items()]
        parts = (initial[path], flags, moved, drifted, momentum)
        for row in np.ndindex(initial[path].shape):
            of_row = jax.tree.map(operator.itemgetter(row), parts)
            measures.append(Measures(path, row, *of_row, difference=apart))
    findings += [
        Finding(path, "replicas differ", difference.figure, _CURES["replicas differ"])
        for path, difference in differences.items()
        if path not in running
    ]
    return Report(
        len(running),
        tuple(findings),
        tuple(sorted(others, key=_natural)),
        tuple(measures),
        largest_drift,
    )


def _natural(path: str) -> list[list[str | int]]:
    """A key that sorts `block_10` behind `block_9`."""
    pieces = [re.split(r"(\d+)", piece.casefold()) for piece in path.split("/")]
    return [[int(p) if i % 2 else p for i, p in enumerate(each)] for each in pieces]


def _checked_updated(
    updated: Any, batches: Mapping[str, Moments], running: Mapping[str, Any]
) -> dict[str, Any]:
    """The updated statistics by path; raises unless they fit the running ones."""
    if not batches:
        raise ValueError(
            "updated= without batch_moments: expected both, of one step. Write "
            "report(variables, batch_moments=updates['batch_moments'], "
            "updated=updates['batch_stats'])."
        )
    after = statistics_of(updated)
    for path, stats in running.items():
        received = np.shape(after[path]["mean"]) if path in after else None
        if received != np.shape(stats["mean"]):
            is_so = "is missing" if received is None else f"is of {received} features"
            raise ValueError(
                f"updated/{path} {is_so}: expected {np.shape(stats['mean'])}, as in "
                "variables['batch_stats']. Write updated=updates['batch_stats'], "
                "what apply returns."
            )
    return {path: after[path] for path in running}


def _latest(running: Mapping[str, Any], batch: Moments) -> dict[str, Any]:
    """A batch's mean and var; the running ones of features without a variance in it."""
    estimated = counts_of(batch) > 1
    return {
        "mean": jnp.where(estimated, batch.mean, running["mean"]),
        "var": jnp.where(estimated, batch.variance(), running["var"]),
    }


def _never_figures(never: np.ndarray) -> dict[str, str]:
    figure = f"mean 0, var 1{_in_rows(never)}"
    return {"statistics never updated": figure} if never.any() else {}


def _in_rows(which: np.ndarray) -> str:
    """' in the rows 1, 3'; nothing for a layer that has no rows."""
    rows = ", ".join(map(str, np.flatnonzero(which)))
    return f" in the rows {rows}" * bool(which.ndim)


def _channel_figures(flags: Channels) -> dict[str, str]:
    """How many channels of each kind of trouble, and the first of them."""
    figures = {}
    for name, flag in flags._asdict().items():
        which = np.flatnonzero(flag)
        if which.size:
            first = ", ".join(_format_index(i, np.shape(flag)) for i in which[:5])
            first += ", ..." * (which.size > 5)
            what = name.replace("_", " ")
            figures[what] = f"{which.size} of {np.size(flag)} channels ({first})"
    return figures


# By chance, for n independent normal values and k = n - 1:
#     (mean_B - mean) sqrt(n) / sigma   is standard normal
#     r = m2_B / (k sigma^2)            is chi-squared over k, which is skewed, and
#     P(r beyond a on its side of 1) <= exp(-k/2 (a - 1 - log a))     (Chernoff)
# Each of the features has four ways to be off, so each way has a quarter of its share
# of _ALARMS (Bonferroni). The running variance may be sigma^2, or k/n of it where the
# variances of such batches were averaged; the limits hold for either.

_ALARMS = 1e-3


class _BeyondChance(NamedTuple):
    """Where the mean, and the standard deviation, drifts further than by chance."""

    mean: np.ndarray
    std: np.ndarray


def _beyond_chance(drift: Drift, count: Any, features: int) -> _BeyondChance:
    """Which features of a layer drift further than by chance.

    Args:
        drift: the drift of a layer.
        count: the number of values of each feature.
        features: the number of features that are judged, in all layers.
    """
    share = _ALARMS / (4 * max(features, 1))
    k = np.maximum(np.asarray(count, np.float64) - 1, 1)
    shift = np.abs(drift.mean) * np.sqrt(k)
    r = np.asarray(drift.std, np.float64) ** 2
    r = np.where(r < 1, np.minimum(r * (k + 1) / k, 1), r)
    with np.errstate(all="ignore"):  # not finite: reported as such
        improbable = k / 2 * (r - 1 - np.log(r)) > -np.log(share)
    return _BeyondChance(shift > -NormalDist().inv_cdf(share), improbable)


def _drifted(drift: Drift, largest: float, count: np.ndarray, features: int) -> Drift:
    """Where the mean, and the standard deviation, drift beyond both limits."""
    chance = _beyond_chance(drift, count, features)
    with np.errstate(divide="ignore"):  # 0 is infinitely far from 1
        either_way = np.maximum(drift.std, 1 / np.asarray(drift.std)) - 1
    return drift._replace(
        mean=chance.mean & (np.abs(drift.mean) > largest),
        std=chance.std & (either_way > largest),
    )


def _drift_figures(drift: Drift, drifted: Drift) -> dict[str, str]:
    """The farthest of the drifts that are reported."""
    figures = {}
    if drifted.mean.any():
        shift = np.where(drifted.mean, np.abs(drift.mean), 0)
        i = np.argmax(shift)
        channel = _format_index(i, shift.shape)
        figures["mean drifted"] = (
            f"{shift.flat[i]:.2g} standard deviations (channel {channel})"
        )
    if drifted.std.any():
        ratio = np.where(drifted.std, drift.std, 1)
        with np.errstate(divide="ignore"):
            i = np.argmax(np.maximum(ratio, 1 / ratio))
        channel = _format_index(i, ratio.shape)
        figures["variance drifted"] = (
            f"{ratio.flat[i]:.2g} running standard deviations (channel {channel})"
        )
    return figures


def _format_index(i: Any, shape: tuple[int, ...]) -> str:
    """Formats a flat index: '3'; for several axes, such as domains, '[1, 3]'."""
    index = [int(j) for j in np.unravel_index(i, shape)]
    return str(index if len(shape) > 1 else index[0])


def _momentum_figures(momentum: np.ndarray) -> dict[str, str]:
    figures = {}
    small, still = momentum < SMALLEST, momentum == 1
    if small.any():
        m = momentum[small].min()
        average = f"{m:.2g}, an average of {1 / (1 - m):.2g} batches"
        figures["momentum too small"] = average + _in_rows(small)
    if still.any():
        figures["not updated by the step"] = "mean as before" + _in_rows(still)
    return figures


class _Apart(NamedTuple):
    """How far the replicas of a layer lie apart, and in words."""

    largest: float
    figure: str


def _by_layer(replicas: Agreement) -> dict[str, _Apart]:
    """The largest difference of each layer, whichever collections were compared."""
    layers: dict[str, dict[str, Difference]] = {}
    for path, difference in replicas.differences.items():
        path = path.removeprefix("batch_stats/").removeprefix("params/")
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, {})[name] = difference
    apart = {}
    for layer, differences in layers.items():
        largest = max(d.relative for d in differences.values())
        size = f"by {largest:.1e} of the largest value"
        if not np.isfinite(largest):
            size = "one is not finite"
        apart[layer] = _Apart(largest, f"{size} ({', '.join(sorted(differences))})")
    return apart
